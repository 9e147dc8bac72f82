"""Compare `orchestrate plan` and `orchestrate sync` with `prefect deploy --all` of the same file.

    python -m tests.benchmarks.deployments --pairs 7     # or: make bench-deployments

The file has 500 deployments with 800 schedules of 40 flows in 20 scripts. Each pair has new servers, so that the first
deploy meets an empty server. Whole processes are timed from exec to exit. Between them the benchmark waits until the
server has scheduled the runs of new deployments. The table is printed and appended to results.md.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.benchmarks.processes import BIN, measure_seconds, time_command
from tests.benchmarks.table import Figure, results_table
from tests.parts import new_database, prefect_server, rows_of, settings_of, wait_until

ORCHESTRATE = str(BIN / "orchestrate")

DEPLOY = (str(BIN / "prefect"), "--no-prompt", "deploy")

SCRIPTS = 20

POOL = "bench"

QUIET_SECONDS = 12
"""Seconds without a new run after which the server has scheduled all deployments. Its scheduler looks every 5 s."""

SCRIPT = '''
from datetime import date
from typing import Literal

from prefect import flow, task
from pydantic import BaseModel, Field


class Source(BaseModel):
    """The source of the rows."""

    host: str
    port: int = Field(5432, gt=0)
    tables: list[str] = []


@task
def rows(source: Source, day: date | None) -> int:
    return len(source.tables)


@flow(name="load-{number:02}")
def load(source: Source, day: date | None = None, mode: Literal["append", "replace"] = "append") -> int:
    """Loads a day."""
    return rows(source, day)


@flow(name="report-{number:02}")
def report(title: str, recipients: list[str], days: int = 7) -> None:
    """Sends what was loaded."""
'''

SCHEDULES: Sequence[dict[str, Any]] = (
    {"cron": "0 6 * * *", "timezone": "Europe/Berlin"},
    {"cron": "30 5 * * 1-5"},
    {"interval": 21600},
    {"cron": "15 */4 * * *", "timezone": "America/New_York", "slug": "hours"},
    {"rrule": "FREQ=WEEKLY;BYDAY=MO,TH;BYHOUR=7;BYMINUTE=0;BYSECOND=0", "timezone": "Asia/Tokyo"},
)


def _schedules(number: int) -> list[dict[str, Any]]:
    """Return the schedules of a deployment: one, and in three of five deployments a second one."""
    first = {**SCHEDULES[number % 3]}
    return [first] if number % 5 > 2 else [first, {**SCHEDULES[3 + number % 2]}]


def write_project(folder: Path, deployments: int) -> int:
    """Write the scripts and a prefect.yaml that both programs read, and return its number of schedules."""
    for number in range(SCRIPTS):
        script = folder / "flows" / f"script_{number:02}.py"
        script.parent.mkdir(exist_ok=True)
        script.write_text(SCRIPT.replace("{number:02}", f"{number:02}"))
    listed: list[dict[str, Any]] = []
    for number in range(deployments):
        loads = number // SCRIPTS % 2 == 0
        source = {"host": f"db-{number}.example.com", "tables": ["orders", "customers"]}
        mails = {"title": f"Report {number}", "recipients": ["data@example.com"]}
        listed.append(
            {
                "name": f"deployment-{number:03}",
                "description": f"The deployment number {number}.",
                "version": "1",
                "tags": ["bench", f"team-{number % 7}"],
                "entrypoint": f"flows/script_{number % SCRIPTS:02}.py:{'load' if loads else 'report'}",
                "parameters": {"source": source} if loads else mails,
                "work_pool": {"name": POOL, "job_variables": {"env": {"REGION": "eu"}}},
                "schedules": _schedules(number),
            }
        )
    document = {"name": "bench", "deployments": listed}
    (folder / "prefect.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return sum(len(deployment["schedules"]) for deployment in listed)


def change_one_deployment(folder: Path) -> str:
    """Change the parameters of one deployment in the file, and return the deployment's name."""
    file = folder / "prefect.yaml"
    document = yaml.safe_load(file.read_text())
    changed = document["deployments"][0]
    source = changed["parameters"]["source"]
    source["port"] = source.get("port", 5432) + 1
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return str(changed["name"])


@contextlib.contextmanager
def new_server(postgres: str) -> Iterator[str]:
    """Run a new Prefect server with the work pool, and yield the URL of its API.

    Args:
        postgres: URL of a Postgres server for the database; empty for SQLite.
    """
    with tempfile.TemporaryDirectory() as home, contextlib.ExitStack() as stack:
        if postgres:
            database = stack.enter_context(new_database(postgres))
            url = database.replace("postgresql://", "postgresql+asyncpg://")
            stack.enter_context(settings_of(PREFECT_SERVER_DATABASE_CONNECTION_URL=url))
        api = stack.enter_context(prefect_server(Path(home)))
        httpx.post(f"{api}/work_pools/", json={"name": POOL, "type": "process"}, timeout=60).raise_for_status()
        _wait_until_scheduled(api)
        yield api


def _wait_until_scheduled(api: str) -> None:
    """Wait until the server has scheduled the runs of all deployments."""
    runs, since = -1, time.monotonic()

    def is_quiet() -> bool:
        nonlocal runs, since
        if (now := _count(api, "flow_runs")) != runs:
            runs, since = now, time.monotonic()
        return time.monotonic() - since > QUIET_SECONDS

    wait_until(is_quiet, "no new runs", 600)


def _count(api: str, kind: str) -> int:
    return int(httpx.post(f"{api}/{kind}/count", json={}, timeout=60).raise_for_status().json())


@dataclass
class Comparison:
    """Measures the seconds of both programs on one kind of server.

    Args:
        folder: the folder of the project.
        deployments: number of deployments in the project.
        limit: seconds after which `prefect deploy --all` is killed.
    """

    folder: Path
    deployments: int
    limit: float
    sync: list[float] = field(default_factory=list)
    plan: list[float] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    deploy: list[float] = field(default_factory=list)
    deploy_again: list[float] = field(default_factory=list)
    deploy_one: list[float] = field(default_factory=list)
    cut_off: int | None = None
    """The number of deployments that `prefect deploy --all` had created when it was killed; None if it ended."""

    def measure_orchestrate(self, api: str) -> None:
        """Measure `orchestrate` on a new server: the first sync, a plan without changes, a sync of one change.

        A further change of that deployment is then deployed by `prefect deploy`.
        """
        environment = {"PREFECT_API_URL": api}
        self.sync.append(measure_seconds([ORCHESTRATE, "sync"], environment, self.folder))
        self._check_count(api)
        _wait_until_scheduled(api)
        # The plan fails if there is a difference.
        self.plan.append(measure_seconds([ORCHESTRATE, "plan"], environment, self.folder))
        change_one_deployment(self.folder)
        seconds, output = time_command([ORCHESTRATE, "sync"], environment, self.folder)
        if "1 changed" not in output:
            raise RuntimeError(f"one deployment is changed, and orchestrate sync prints:\n{output}")
        self.change.append(seconds)
        _wait_until_scheduled(api)
        name = change_one_deployment(self.folder)
        self.deploy_one.append(measure_seconds([*DEPLOY, "--name", name], environment, self.folder))

    def measure_prefect(self, api: str) -> None:
        """Measure `prefect deploy --all` on a new server: the first deploy, and one without changes."""
        for seconds in (self.deploy, self.deploy_again):
            start = time.perf_counter()
            ended = self._deploy_all(api)
            seconds.append(time.perf_counter() - start)
            if not ended:
                self.cut_off = _count(api, "deployments")
                return
            self._check_count(api)
            _wait_until_scheduled(api)

    def _deploy_all(self, api: str) -> bool:
        """Run `prefect deploy --all`, and return whether it ended within the limit."""
        try:
            subprocess.run(
                [*DEPLOY, "--all"], cwd=self.folder, env=os.environ | {"PREFECT_API_URL": api},
                capture_output=True, check=True, timeout=self.limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"prefect deploy failed:\n{error.stdout.decode()}{error.stderr.decode()}") from None
        return True

    def _check_count(self, api: str) -> None:
        """Raise unless the server has all deployments of the project."""
        if (found := _count(api, "deployments")) != self.deployments:
            raise RuntimeError(f"{found} deployments are on the server and not {self.deployments}")

    def figures(self, schedules: int, database: str) -> list[Figure]:
        """Return the rows of the table that were measured."""
        things = f"{self.deployments} deployments with {schedules} schedules, {database}"
        note = (
            f"one killed after {self.limit:.0f} s with {self.cut_off} deployments created"
            if self.cut_off is not None
            else ""
        )
        figures = [
            Figure(f"first `orchestrate sync` of {things}", "s", self.sync, "at most 30"),
            Figure("`orchestrate plan`, nothing changed", "s", self.plan, "at most 3"),
            Figure("`orchestrate sync`, one deployment changed", "s", self.change, "at most 3"),
            Figure("`prefect deploy --name` of that deployment", "s", self.deploy_one),
            Figure(f"first `prefect deploy --all` of {things}", "s", self.deploy, note),
            Figure("`prefect deploy --all`, nothing changed", "s", self.deploy_again),
        ]
        return [figure for figure in figures if figure.values]


def compare_with_prefect_deploy(
    postgres: str, deployments: int, pairs: int, deploys: int, limit: float, database: str
) -> list[Figure]:
    """Measure `orchestrate` in all pairs, and `prefect deploy --all`, which takes minutes, in the first pairs.

    Args:
        postgres: URL of a Postgres server for the databases; empty for SQLite.
        deployments: number of deployments.
        pairs: number of pairs.
        deploys: number of pairs in which `prefect deploy --all` is measured.
        limit: seconds after which `prefect deploy --all` is killed.
        database: the kind of database, for the table.
    """
    with tempfile.TemporaryDirectory() as folder:
        schedules = write_project(Path(folder), deployments)
        both = Comparison(Path(folder), deployments, limit)
        for number in range(pairs):
            with new_server(postgres) as api:
                both.measure_orchestrate(api)
            if number < deploys:
                with new_server(postgres) as api:
                    both.measure_prefect(api)
    return both.figures(schedules, database)


def postgres_version(postgres: str) -> str:
    """Return the version of a Postgres server, for the table."""
    return f"PostgreSQL {rows_of(postgres, 'show server_version')[0][0].split()[0]}"


def measure_help(pairs: int) -> list[Figure]:
    """Time `orchestrate --help` and `prefect --help`."""
    ours, prefects = [], []
    for _ in range(pairs):
        ours.append(measure_seconds([ORCHESTRATE, "--help"], {}))
        prefects.append(measure_seconds([str(BIN / "prefect"), "--help"], {}))
    return [
        Figure("`orchestrate --help`", "s", ours, "at most 0.5"),
        Figure("`prefect --help`", "s", prefects),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare both programs, and return the exit status."""
    parser = argparse.ArgumentParser(description="Compare deployments as desired state with prefect deploy.")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--deployments", type=int, default=500)
    parser.add_argument(
        "--deploys", type=int, default=1, help="number of pairs with prefect deploy --all, which takes minutes"
    )
    parser.add_argument("--limit", type=float, default=1800, help="seconds after which prefect deploy --all is killed")
    parser.add_argument(
        "--postgres", metavar="URL", help="of a Postgres with pg_trgm: measure also with Prefect's servers on it"
    )
    options = parser.parse_args(arguments)
    databases = {"SQLite": ""} | ({postgres_version(options.postgres): options.postgres} if options.postgres else {})
    parts = f"Prefect's server on {' and on '.join(databases)}, load {os.getloadavg()[0]:.1f} before"
    with results_table(parts) as report, tempfile.TemporaryDirectory() as home:
        os.environ |= {"PREFECT_HOME": home, "DO_NOT_TRACK": "1"}
        report(measure_help(options.pairs))
        for database, url in databases.items():
            count, pairs, deploys = options.deployments, options.pairs, options.deploys
            report(compare_with_prefect_deploy(url, count, pairs, deploys, options.limit, f"on {database}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
