"""End dbt's runs at random moments, run them again, and compare with a run that nobody disturbed.

    make test-long FOR=dbt-ends ROUNDS=20

Each round has a database of its own and a project with every kind of node. Its flow run is killed (SIGKILL of all
its processes but dbt's) or cancelled as in the UI, at a moment drawn evenly over the time of an undisturbed run, and is
then retried. No statement and no transaction may be left five seconds later, and the retried run must leave what the
undisturbed one left.
"""

import contextlib
import functools
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.settings import ROOT
from tests.long.longtest import Findings, Parameters
from tests.orchestration.dbt.projects import every_kind, hold, tables
from tests.orchestration.dbt.task_runs import ENDED, Server, busy, execute
from tests.parts import (
    client_of,
    embedded_postgres,
    kill_run_processes,
    new_database,
    prefect_server,
    rows_of,
    wait_until,
)

WAYS = ("killed", "cancelled")

SQL_END_SECONDS = 5.0
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
class Baseline:
    """A run that nobody disturbed."""

    seconds: float
    """From the start of its process to its end."""
    tables: dict[str, Any] = field(repr=False)

    @classmethod
    def measure(cls, postgres: str, api: str, folder: Path) -> "Baseline":
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
        return self.same and self.sql_ended <= SQL_END_SECONDS and self.state in (*states, "COMPLETED")


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
            if not any(argument.endswith("dbt/child") for argument in each.cmdline()):
                each.send_signal(signal.SIGKILL)


def end_at_random(
    way: str, postgres: str, api: str, server: Server, undisturbed: Baseline, folder: Path, chance: random.Random
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
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            if process.returncode is None:
                _end(way, process, server, run)
            if way == "cancelled":
                # The supervisor polls the run once a second, and then signals the engine.
                wait_until(lambda: server.state(run)["type"] in ENDED, "the end of the run", 60)
            ended_at = time.monotonic()
            wait_until(lambda: busy(query) == 0, "the end of the run's SQL", 30)
            sql_seconds = time.monotonic() - ended_at
            process.wait(60)
            state = server.state(run)["type"]
            done = sum(task["state_type"] == "COMPLETED" for task in server.get("task_runs", run))
            if state != "COMPLETED":
                server.set_state(run, "SCHEDULED", "AwaitingRetry")
                execute(shop, api, run).wait(180)
        finally:
            kill_run_processes(run)
        is_same = server.state(run)["type"] == "COMPLETED" and tables(query) == undisturbed.tables
        return Outcome(way, moment, done, sql_seconds, state, is_same)


def run(parameters: Parameters) -> Findings:
    """End `ROUNDS` runs each way at moments that `SEED` draws."""
    rounds = int(parameters["ROUNDS"])
    chance = random.Random(parameters["SEED"])  # noqa: S311 - moments, no secret
    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        embedded_postgres(Path(temporary) / "postgres") as postgres,
        tempfile.TemporaryDirectory() as home,
        prefect_server(Path(home)) as api,
        client_of(api) as client,
    ):
        folder = Path(temporary)
        undisturbed = Baseline.measure(postgres, api, folder)
        for number in range(1, rounds + 1):
            for way in WAYS:
                outcome = end_at_random(way, postgres, api, Server(client), undisturbed, folder, chance)
                outcomes.append(outcome)
                verdict = "ok" if outcome.right else f"WRONG {outcome}"
                print(
                    f"{number} of {rounds}: {way} after {outcome.moment:.1f} s, {outcome.done} nodes done, "
                    f"SQL gone after {outcome.sql_ended:.1f} s, {verdict}",
                    flush=True,
                )
    figures: dict[str, str | float] = {"seconds of an undisturbed run": round(undisturbed.seconds, 1)}
    for way in WAYS:
        of = [outcome for outcome in outcomes if outcome.way == way]
        moments, done = [outcome.moment for outcome in of], [outcome.done for outcome in of]
        figures |= {
            f"{way}: runs": len(of),
            f"{way}: moment: min, median, max (s)": f"{min(moments):.1f}, {statistics.median(moments):.1f}, "
            f"{max(moments):.1f}",
            f"{way}: nodes done: min, median, max": f"{min(done)}, {statistics.median(done):.0f}, {max(done)}",
            f"{way}: SQL gone after, at most (s)": round(max(outcome.sql_ended for outcome in of), 1),
            f"{way}: after the retry other than undisturbed": sum(not outcome.same for outcome in of),
        }
    return Findings(figures, [str(outcome) for outcome in outcomes if not outcome.right])
