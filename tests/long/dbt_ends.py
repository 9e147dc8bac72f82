"""Kill or cancel runs of dbt at random moments, retry them, and compare with an undisturbed run.

    make test-long FOR=dbt-ends ROUNDS=20

Each round has a new database and a project with every kind of node. Its flow run is killed (SIGKILL of all processes
except dbt's) or cancelled as in the UI, and then retried. The moment is drawn evenly over the time of an undisturbed
run. Five seconds later no statement and no transaction may be left. The retry must leave what the undisturbed run left.
"""

import contextlib
import functools
import random
import signal
import statistics
import subprocess
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
    asked,
    client_of,
    embedded_postgres,
    kill_run_processes,
    new_database,
    prefect_server,
    rows_of,
    wait_until,
)

WAYS = ("killed", "cancelled")

RUN_TIMEOUT_SECONDS, RETRY_TIMEOUT_SECONDS = 600.0, 180.0
"""Upper bounds for the undisturbed run and for a retry."""

SQL_END_SECONDS = 5.0
"""Seconds after which no SQL of a run may be left: 0.5 until dbt is notified, 2.5 to end the SQL, 2 until Postgres
detects that the client is gone."""


def deploy(api: str) -> str:
    """Deploy the flow of `tests.orchestration.dbt.shop_flow`, and return the id of the deployment."""
    # Like prefect.yaml: the flow's code is in the folder already.
    here = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    entrypoint = "tests/orchestration/dbt/shop_flow.py:daily"
    with client_of(api) as client:
        flow = asked(client, "POST", "/flows/", {"name": "daily"})["id"]
        body = {"name": "shop", "flow_id": flow, "entrypoint": entrypoint, "pull_steps": here}
        return str(asked(client, "POST", "/deployments/", body)["id"])


def _project(folder: Path) -> Path:
    shop = every_kind(folder)
    # Long enough that a moment can fall between its nodes.
    for model in ("paid_orders", "countries", "order_book"):
        hold(shop, model, 0.5)
    return shop


@dataclass(frozen=True)
class Baseline:
    """An undisturbed run.

    Args:
        seconds: duration of its process.
        tables: the content of the database after the run.
    """

    seconds: float
    tables: dict[str, Any] = field(repr=False)

    @classmethod
    def measure(cls, postgres: str, api: str, folder: Path) -> "Baseline":
        """Execute a run in a new database."""
        shop = _project(folder / "undisturbed")
        deployment = deploy(api)
        with client_of(api) as client, new_database(postgres) as url:
            began = time.monotonic()
            run = Server(client).start(deployment)
            try:
                execute(shop, api, run).wait(RUN_TIMEOUT_SECONDS)
            finally:
                kill_run_processes(run)
            return cls(time.monotonic() - began, tables(functools.partial(rows_of, url)))


@dataclass(frozen=True)
class Outcome:
    """What an ended run and its retry left.

    Args:
        way: `killed` or `cancelled`.
        moment: seconds from the start of the run to its kill or cancellation.
        done: number of nodes that were recorded as done before the retry.
        sql_seconds: seconds after which no SQL of the run was left.
        state: type of the run's state before the retry.
        is_same: whether the retry left what an undisturbed run leaves.
    """

    way: str
    moment: float
    done: int
    sql_seconds: float
    state: str
    is_same: bool

    @property
    def is_good(self) -> bool:
        """Whether the retry completed the run, and its SQL ended in time."""
        # Nothing reports a kill to the server: the last reported state stays.
        states = {"cancelled": ("CANCELLED",), "killed": ("SCHEDULED", "PENDING", "RUNNING")}[self.way]
        return self.is_same and self.sql_seconds <= SQL_END_SECONDS and self.state in (*states, "COMPLETED")


def _end(way: str, process: "subprocess.Popen[bytes]", server: Server, run: str) -> None:
    """Kill the processes of the run except dbt, or set the run Cancelling."""
    import psutil

    if way == "cancelled":
        if server.state(run)["type"] not in ENDED:
            server.set_state(run, "CANCELLING", "Cancelling")
        return
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        # dbt has to detect that its parent is gone.
        with contextlib.suppress(psutil.NoSuchProcess):  # the process has ended, perhaps after another one
            if not any(argument.endswith("dbt/child") for argument in member.cmdline()):
                member.send_signal(signal.SIGKILL)


def end_at_random(
    way: str, postgres: str, api: str, server: Server, undisturbed: Baseline, folder: Path, chance: random.Random
) -> Outcome:
    """End a run at a random moment, and retry it."""
    moment = chance.uniform(0, undisturbed.seconds)
    shop = _project(folder / f"{way} {moment}")
    deployment = deploy(api)
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
                execute(shop, api, run).wait(RETRY_TIMEOUT_SECONDS)
        finally:
            kill_run_processes(run)
        is_same = server.state(run)["type"] == "COMPLETED" and tables(query) == undisturbed.tables
        return Outcome(way, moment, done, sql_seconds, state, is_same)


def run(parameters: Parameters) -> Findings:
    """Kill `ROUNDS` runs and cancel as many, at the moments that `SEED` draws."""
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
                verdict = "ok" if outcome.is_good else f"WRONG {outcome}"
                print(
                    f"{number} of {rounds}: {way} after {outcome.moment:.1f} s, {outcome.done} nodes done, "
                    f"SQL gone after {outcome.sql_seconds:.1f} s, {verdict}",
                    flush=True,
                )
    figures: dict[str, str | float] = {"seconds of an undisturbed run": round(undisturbed.seconds, 1)}
    for way in WAYS:
        ended = [outcome for outcome in outcomes if outcome.way == way]
        moments, done = [outcome.moment for outcome in ended], [outcome.done for outcome in ended]
        figures |= {
            f"{way}: runs": len(ended),
            f"{way}: moment: min, median, max (s)": f"{min(moments):.1f}, {statistics.median(moments):.1f}, "
            f"{max(moments):.1f}",
            f"{way}: nodes done: min, median, max": f"{min(done)}, {statistics.median(done):.0f}, {max(done)}",
            f"{way}: SQL gone after, at most (s)": round(max(outcome.sql_seconds for outcome in ended), 1),
            f"{way}: retries that left other tables than an undisturbed run": sum(
                not outcome.is_same for outcome in ended
            ),
        }
    return Findings(figures, [str(outcome) for outcome in outcomes if not outcome.is_good])
