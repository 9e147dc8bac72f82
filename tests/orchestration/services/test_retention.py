"""Retention on a real Postgres, in the process of a real Prefect server that takes requests at the same time."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from orchestration.errors import SettingsError
from orchestration.services.retention import Ages, read_ages
from orchestration.settings import ROOT
from tests import server_forks
from tests.benchmarks.retention import Traffic
from tests.benchmarks.server_history import History, fill
from tests.parts import SERVERS, debian_postgres, free_port, new_database, rows_of, served, wait_until
from tests.server_schema import create_schema

RUNS_DAYS, LOGS_DAYS, ARTIFACTS_DAYS, EVENTS_DAYS = 90, 30, 60, 20

HISTORY = History(runs=2000, logs=12000, events=1000, days=181, deployments=20)

LOCK_LIMIT_SECONDS = 10
"""How long a transaction of retention may last on a busy machine. `make bench-retention` measures how long it lasts.

The limit of a second is that of `test_batches_of_slow_rows_hold_no_lock_for_a_second`.
"""

PAUSE_SECONDS = 0.5
"""Between two runs of the traffic, which would keep a processor busy."""

SCHEMA = """
select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint where conrelid <> 0
union all select indrelid::regclass::text, indexrelid::regclass::text, pg_get_indexdef(indexrelid) from pg_index
order by 1, 2, 3
"""
"""Reads the constraints and indexes of a database."""

TABLES = ("flow_run", "task_run", "log", "artifact", "events", "event_resources", "artifact_collection")


SLOW_ROWS, ROW_SECONDS = 1000, 0.003
"""How many rows the test of the size of batches deletes, and how long each takes at least."""

WALK = """
import asyncio
from datetime import timedelta
from orchestration.services.retention import Ages, Retention

async def main():
    async for _ in Retention(Ages(logs=timedelta(days=1))).walk():
        pass

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with debian_postgres() as url:
        yield url


@pytest.fixture(scope="module")
def database(postgres: str) -> Iterator[str]:
    with new_database(postgres) as url:
        create_schema(url)
        schema = rows_of(url, SCHEMA)
        fill(url, HISTORY)
        assert rows_of(url, SCHEMA) == schema, "constraints and indexes that were dropped for COPY"
        assert rows_of(url, "select name from pg_settings where sourcefile like '%%postgresql.auto.conf'") == []
        yield url


def _variables(url: str) -> dict[str, str]:
    return {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url.replace("postgresql://", "postgresql+asyncpg://")}


class Special:
    """Adds runs that each rule of retention is about. All begin before every age."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ended = datetime.now(UTC) - timedelta(days=170)
        [(self.flow,)] = rows_of(url, "select id from flow")
        self.stay: set[UUID] = set()
        self.go: set[UUID] = set()

    def run(self, type_: str | None, stays: bool, **columns: Any) -> UUID:
        """Add a run that ended, or has not, and is expected to stay or to go."""
        id_ = uuid4()
        (self.stay if stays else self.go).add(id_)
        ended = columns.pop("end_time", self.ended if type_ in ("COMPLETED", "FAILED") else None)
        names = ["id", "name", "flow_id", "state_type", "state_name", "end_time", *columns]
        values = [id_, "special", self.flow, type_, type_, ended, *columns.values()]
        rows_of(
            self.url, f"insert into flow_run ({', '.join(names)}) values ({', '.join(['%s'] * len(names))})", *values
        )
        self.log(id_)
        return id_

    def log(self, run: UUID | None) -> None:
        """Add an old log line of a run."""
        columns = "name, level, message, timestamp, flow_run_id"
        rows_of(self.url, f"insert into log ({columns}) values ('n', 20, 'special', %s, %s)", self.ended, run)

    def task(self, run: UUID | None, type_: str = "COMPLETED", count: int = 1) -> UUID:
        """Add old task runs of a run, and return the id of one of them."""
        columns = "task_key, dynamic_key, name, flow_run_id, state_type, end_time"
        statement = f"insert into task_run ({columns}) select 't', n::text, 'special', %s, %s, %s"
        ended = self.ended if type_ == "COMPLETED" else None
        rows = rows_of(self.url, f"{statement} from generate_series(1, %s) n returning id", run, type_, ended, count)
        return UUID(str(rows[0][0]))

    def deployment(self, exists: bool = True) -> UUID:
        """Return the id of a new deployment."""
        id_ = uuid4()
        if exists:
            statement = "insert into deployment (id, name, flow_id) values (%s, %s, %s)"
            rows_of(self.url, statement, id_, str(id_), self.flow)
        return id_


@pytest.fixture(scope="module")
def special(database: str) -> Special:
    special = Special(database)
    for unfinished in ("RUNNING", "PAUSED", "SCHEDULED", "CANCELLING", "PENDING", None):
        special.run(unfinished, stays=True)
    retired = special.deployment()
    special.run("COMPLETED", stays=False, deployment_id=retired)
    kept = special.run("COMPLETED", stays=True, deployment_id=retired, end_time=special.ended + timedelta(days=1))
    special.run("FAILED", stays=False, deployment_id=retired, end_time=special.ended + timedelta(days=2))
    special.run("COMPLETED", stays=False, deployment_id=special.deployment(exists=False))
    parent = special.run("COMPLETED", stays=False)
    special.run("COMPLETED", stays=False, parent_task_run_id=special.task(parent))
    special.run("RUNNING", stays=True, parent_task_run_id=special.task(special.run("COMPLETED", stays=False)))
    of_running = special.task(special.run("RUNNING", stays=True))
    special.run("COMPLETED", stays=True, parent_task_run_id=of_running)
    special.task(special.run("COMPLETED", stays=False), count=2500)
    special.task(None)
    special.task(None, "RUNNING")
    special.log(None)
    [(result,)] = rows_of(
        database,
        "insert into artifact (key, type, flow_run_id, created, updated) values ('result', 'result', %s, %s, %s) "
        "returning id",
        kept, special.ended, special.ended,
    )  # fmt: skip
    state = "insert into flow_run_state (type, name, flow_run_id, result_artifact_id) values ('COMPLETED', 'C', %s, %s)"
    rows_of(database, state, kept, result)
    for key, *times in (("gone", 100), ("older", 100, 50), ("stale", 10, 100)):
        for days in times:
            columns = "insert into artifact (key, type, created, updated) values (%s, 'markdown', %s, %s)"
            at = datetime.now(UTC) - timedelta(days=days)
            rows_of(database, columns, key, at, at)
    rows_of(database, "delete from artifact_collection")
    rows_of(
        database,
        "insert into artifact_collection (key, latest_id) "
        "select distinct on (key) key, id from artifact order by key, created",  # the oldest, which is going to go
    )
    return special


@contextlib.contextmanager
def _server(home: Path, database: str) -> Iterator[str]:
    """Run API and services in one process, with retention."""
    ages = {"RUNS": RUNS_DAYS, "LOGS": LOGS_DAYS, "ARTIFACTS": ARTIFACTS_DAYS}
    variables = _variables(database) | {f"RETENTION_{kind}_DAYS": str(days) for kind, days in ages.items()} | {
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,orphans",
        "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"P{EVENTS_DAYS}D",
        "PREFECT_UI_ENABLED": "false",
    }  # fmt: skip
    with served(home, free_port(), sys.executable, os.environ | variables, "orchestration.server_process") as api:
        yield api


@contextlib.contextmanager
def _slow_deletion(database: str) -> Iterator[None]:
    """Let the deletion of each run take 50 ms while the block lasts, so that a kill does not come after the last."""
    sleep = "begin perform pg_sleep(0.05); return old; end"
    rows_of(database, f"create function sleep() returns trigger language plpgsql as '{sleep}'")
    rows_of(database, "create trigger slow before delete on flow_run for each row execute function sleep()")
    try:
        yield
    finally:
        rows_of(database, "drop function sleep cascade")


def _expected(database: str, special: Special) -> dict[str, set[Any]]:
    """Return the ids that have to be left of each kind, in a history whose deployments all have a young success."""
    is_old = "select id, end_time < now() - %s * interval '1 day' from flow_run where name <> 'special'"
    history = rows_of(database, is_old, RUNS_DAYS)
    runs = special.stay | {id_ for id_, old in history if not old}
    logs = rows_of(
        database,
        "select log.id from log left join flow_run run on run.id = log.flow_run_id where log.timestamp > now() - "
        "%s * interval '1 day' or log.flow_run_id is not null and (run.state_type is null "
        "or run.state_type not in ('COMPLETED', 'FAILED', 'CRASHED', 'CANCELLED'))",
        LOGS_DAYS,
    )
    artifacts = "select id from artifact where updated > now() - %s * interval '1 day' or type = 'result'"
    events = "select id from events where occurred > now() - %s * interval '1 day'"
    return {
        "flow_run": runs,
        "log": {id_ for (id_,) in logs},
        "artifact": {id_ for (id_,) in rows_of(database, artifacts, ARTIFACTS_DAYS)},
        "events": {id_ for (id_,) in rows_of(database, events, EVENTS_DAYS)},
    }


def _left(database: str, table: str, known: set[Any]) -> set[Any]:
    """Return the ids in a table, of those that were there before the server started."""
    return {id_ for (id_,) in rows_of(database, f"select id from {table}")} & known


def test_exactly_the_old_records_go_while_states_are_written(database: str, special: Special, tmp_path: Path) -> None:
    before = {table: {id_ for (id_,) in rows_of(database, f"select id from {table}")} for table in TABLES}
    expected = _expected(database, special)
    old_runs = before["flow_run"] - expected["flow_run"]

    def old_runs_left() -> int:
        return len(_left(database, "flow_run", old_runs))

    with (
        _slow_deletion(database),
        contextlib.suppress(httpx.TransportError),
        _server(tmp_path, database) as api,
        Traffic(api, database, PAUSE_SECONDS) as interrupted,
    ):
        server = SERVERS[-1].pid
        wait_until(lambda: old_runs_left() < len(old_runs), "the first batch", 300)
        os.kill(server, 9)
        wait_until(lambda: interrupted.errors, "a write that the killed server does not answer", 100)
    assert old_runs_left(), "the server was killed after the last batch"
    halves = rows_of(
        database,
        "select run.id from flow_run run where run.name like 'run-%%' and 2 <> "
        "(select count(*) from task_run where flow_run_id = run.id) or run.name like 'run-%%' and 3 <> "
        "(select count(*) from flow_run_state where flow_run_id = run.id)",
    )
    assert halves == []

    with _server(tmp_path, database) as api, Traffic(api, database, PAUSE_SECONDS) as traffic:
        for table, ids in expected.items():
            wait_until(lambda: _left(database, table, before[table]) <= ids, f"the old rows of {table} to go", 300)  # noqa: B023
    print(f"{len(traffic.writes)} writes, up to {max(traffic.writes):.2f} s, batches up to {traffic.longest:.2f} s")
    for table, ids in expected.items():
        assert _left(database, table, before[table]) == ids, table
    assert traffic.errors == []
    assert traffic.writes
    assert traffic.longest < LOCK_LIMIT_SECONDS

    tasks = rows_of(database, "select name, state_type, flow_run_id is null, count(*) from task_run group by 1, 2, 3")
    assert ("special", "COMPLETED", True, 1) not in tasks
    assert ("special", "RUNNING", True, 1) in tasks
    keys = dict(rows_of(database, "select c.key, a.created = (select max(created) from artifact where key = c.key) "
                                  "from artifact_collection c join artifact a on a.id = c.latest_id"))  # fmt: skip
    assert "gone" not in keys
    assert keys["older"] is keys["stale"] is keys["result"] is True
    assert len(keys) == rows_of(database, "select count(*) from artifact_collection")[0][0]


def test_batches_of_slow_rows_hold_no_lock_for_a_second(postgres: str, tmp_path: Path) -> None:
    """Counts the rows of each batch: on a busy machine a batch takes longer, and the next ones have fewer rows."""
    with new_database(postgres, "slow_rows") as url:
        create_schema(url)
        columns, values = "name, level, message, timestamp", "'n', 20, 'old', now() - interval '9 days'"
        rows_of(url, f"insert into log ({columns}) select {values} from generate_series(1, %s)", SLOW_ROWS)
        rows_of(url, "create table batch (rows int)")
        rows = "(select count(*) from gone)"
        body = f"begin perform pg_sleep({ROW_SECONDS} * {rows}); insert into batch values ({rows}); return null; end"
        rows_of(url, f"create function sleep() returns trigger language plpgsql as '{body}'")
        trigger = "after delete on log referencing old table as gone for each statement execute function sleep()"
        rows_of(url, f"create trigger slow {trigger}")
        (tmp_path / "code_of_test.py").write_text(WALK)
        done = server_forks.run(["code_of_test"], os.environ | _variables(url), tmp_path)
        assert done.returncode == 0, done.stderr
        batches = [rows for (rows,) in rows_of(url, "select rows from batch")]
    assert sum(batches) == SLOW_ROWS
    assert max(batches) * ROW_SECONDS < 1, batches


def test_ages_are_read_from_the_environment() -> None:
    assert not read_ages({"RETENTION_RUNS_DAYS": "0", "RETENTION_LOGS_DAYS": ""}).any()
    assert read_ages({"RETENTION_LOGS_DAYS": "30"}) == Ages(logs=timedelta(days=30))


@pytest.mark.parametrize("text", ["ninety", "-1", "nan", "inf", "99999999"])
def test_age_that_is_no_number_of_days_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"^RETENTION_RUNS_DAYS=\S+ is no number of days from 0 to 36500\. Set "):
        read_ages({"RETENTION_RUNS_DAYS": text})


@pytest.mark.further
def test_ages_on_sqlite_end_the_start_with_a_message(tmp_path: Path) -> None:
    variables = {"PREFECT_HOME": str(tmp_path), "RETENTION_RUNS_DAYS": "90"}
    done = subprocess.run(
        [sys.executable, "-m", "orchestration.server_process", "version"],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("RETENTION_RUNS_DAYS cannot be used: the server's database is not a Postgres.")
    assert "Traceback" not in done.stderr
