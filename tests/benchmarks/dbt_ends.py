"""End dbt's runs at random moments, run them again, and compare with a run that nobody disturbed.

    python -m tests.benchmarks.dbt_ends --rounds 20      # or: make dbt-ends

Each round has a database of its own and a project with every kind of node. Its flow run is killed (SIGKILL of all
its processes but dbt's) or cancelled as in the UI, at a moment drawn evenly over the time of an undisturbed run, and is
then retried. No statement and no transaction may be left five seconds later, and the retried run must leave what the
undisturbed one left.
"""

import argparse
import contextlib
import functools
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.settings import ROOT
from tests.orchestration.dbt.projects import every_kind, hold, tables
from tests.orchestration.dbt.task_runs import ENDED, Server, busy, execute
from tests.parts import client_of, embedded_postgres, new_database, prefect_server, rows_of, wait_until

RESULTS = Path(__file__).with_name("dbt_ends.md")

WAYS = ("killed", "cancelled")

PROMPT = 5.0
"""Seconds after which none of a run's SQL may be left: half a second until dbt hears it, 2.5 to end it, 2 until
Postgres finds the client gone."""


def deploy(shop: Path, api: str) -> str:
    """Deploy the flow of `tests.orchestration.dbt.shop_flow`; the deployment's id."""
    command = [sys.executable, "-m", "tests.orchestration.dbt.shop_flow", "deploy"]
    environment = os.environ | {"PREFECT_API_URL": api, "SHOP": str(shop)}
    return subprocess.check_output(command, env=environment, cwd=ROOT, text=True).strip()


def _project(folder: Path) -> Path:
    shop = every_kind(folder)
    # Long enough for a moment to fall between its nodes.
    for model in ("paid_orders", "countries", "order_book"):
        hold(shop, model, 0.5)
    return shop


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbed."""

    seconds: float
    """From the start of its process to its end."""
    tables: dict[str, Any] = field(repr=False)

    @classmethod
    def measure(cls, postgres: str, api: str, folder: Path) -> "Undisturbed":
        """Run it once, in a database of its own; a run before that compiles Python's files."""
        shop = _project(folder / "undisturbed")
        deployment = deploy(shop, api)
        with client_of(api) as client, new_database(postgres) as url:
            began = time.monotonic()
            execute(shop, api, Server(client).start(deployment)).wait()
            return cls(time.monotonic() - began, tables(functools.partial(rows_of, url)))


@dataclass(frozen=True)
class Outcome:
    """What became of one ended run."""

    way: str
    moment: float
    """Seconds from its start."""
    done: int
    """Nodes that were recorded as done before the retry."""
    sql_ended: float
    """Seconds after which none of its SQL was left."""
    state: str
    """Its state after that."""
    same: bool
    """Whether the retried run left what an undisturbed one leaves."""

    @property
    def right(self) -> bool:
        """Whether all is as it must be."""
        # Nobody tells the server of a kill: what it heard of last stays.
        states = {"cancelled": ("CANCELLED",), "killed": ("SCHEDULED", "PENDING", "RUNNING")}[self.way]
        return self.same and self.sql_ended <= PROMPT and self.state in (*states, "COMPLETED")


def _end(way: str, process: "subprocess.Popen[bytes]", server: Server, run: str) -> None:
    """Kill the process that the flow runs in, or cancel the run; returns when the process has been told."""
    import psutil

    if way == "cancelled":
        if server.state(run)["type"] not in ENDED:
            server.set_state(run, "CANCELLING", "Cancelling")
        return
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        # dbt itself has to notice that it is alone.
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended, maybe of another's death
            if not any(argument.endswith("child.py") for argument in each.cmdline()):
                each.send_signal(signal.SIGKILL)


def end_at_random(
    way: str, postgres: str, api: str, server: Server, undisturbed: Undisturbed, folder: Path, chance: random.Random
) -> Outcome:
    """One round: a run that is ended at a random moment, and its retry."""
    moment = chance.uniform(0, undisturbed.seconds)
    shop = _project(folder / f"{way} {moment}")
    deployment = deploy(shop, api)
    with new_database(postgres) as url:
        query = functools.partial(rows_of, url)
        run = server.start(deployment)
        process = execute(shop, api, run)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            _end(way, process, server, run)
        if way == "cancelled":
            # It looks once a second, and then tells the flow's process.
            wait_until(lambda: server.state(run)["type"] in ENDED, "the end of the run", 60)
        told = time.monotonic()
        wait_until(lambda: busy(query) == 0, "the end of its SQL", 30)
        sql_ended = time.monotonic() - told
        process.wait(60)
        state = server.state(run)["type"]
        done = sum(task["state_type"] == "COMPLETED" for task in server.get("task_runs", run))
        if state != "COMPLETED":
            server.set_state(run, "SCHEDULED", "AwaitingRetry")
            execute(shop, api, run).wait(180)
        same = server.state(run)["type"] == "COMPLETED" and tables(query) == undisturbed.tables
        return Outcome(way, moment, done, sql_ended, state, same)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rounds and write the results file; the exit status is 1 if one of them went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2013)
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)  # noqa: S311 - moments, no secret
    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        embedded_postgres(Path(temporary) / "postgres") as postgres,
        tempfile.TemporaryDirectory() as home,
        prefect_server(Path(home)) as api,
        client_of(api) as client,
    ):
        folder = Path(temporary)
        undisturbed = Undisturbed.measure(postgres, api, folder)
        for number in range(1, options.rounds + 1):
            for way in WAYS:
                outcome = end_at_random(way, postgres, api, Server(client), undisturbed, folder, chance)
                outcomes.append(outcome)
                verdict = "ok" if outcome.right else f"WRONG {outcome}"
                print(
                    f"{number} of {options.rounds}: {way} after {outcome.moment:.1f} s, {outcome.done} nodes done, "
                    f"SQL gone after {outcome.sql_ended:.1f} s, {verdict}",
                    flush=True,
                )
    lines = [
        f"# dbt's runs, ended at random moments\n\n`make dbt-ends ROUNDS={options.rounds}` (seed {options.seed}), "
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"an undisturbed run takes {undisturbed.seconds:.1f} s.\n\n"
        "| | runs | moment: min, median, max (s) | nodes done: min, median, max | SQL gone after, at most (s) "
        "| after the retry other than undisturbed |\n|---|---:|---:|---:|---:|---:|\n"
    ]
    for way in WAYS:
        of = [outcome for outcome in outcomes if outcome.way == way]
        moments, done = [outcome.moment for outcome in of], [outcome.done for outcome in of]
        lines.append(
            f"| {way} | {len(of)} | {min(moments):.1f}, {statistics.median(moments):.1f}, {max(moments):.1f} "
            f"| {min(done)}, {statistics.median(done):.0f}, {max(done)} | {max(o.sql_ended for o in of):.1f} "
            f"| {sum(not o.same for o in of)} |\n"
        )
    RESULTS.write_text("".join(lines))
    print(RESULTS.read_text())
    return 0 if all(outcome.right for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
