"""Measure pages and retention on a large database: how long pages take, rows per second, states written meanwhile.

    python -m tests.benchmarks.retention --runs 1000000 --logs 20000000 --events 10000000     # or: make bench-retention

Databases with 1%, 10% and all of the history show how the pages of the UI and `orchestrate runs` grow. The history is
of 180 days. On the largest database retention deletes runs after 90, logs after 30, artifacts after 60, events after 7
days. Each kind of record is deleted for `--seconds`, not to its end: the rows per second are those of that time. The
table is printed and appended to results.md. The full size on an idle machine is recorded for a picture.
"""

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg

from orchestration.prefect_compat import expired_records
from orchestration.prefect_compat.background_services import database_answers
from orchestration.prefect_compat.expired_records import APPLICATION, Batch
from orchestration.prefect_compat.server_internals import database_interface
from orchestration.services.retention import Ages, Retention
from orchestration.settings import ROOT
from tests.benchmarks import curves
from tests.benchmarks.server_history import TABLES, History, fill
from tests.benchmarks.table import Figure, percentile, results_table
from tests.benchmarks.ui_pages import Loaded, Subject, load_pages
from tests.parts import asked, client_of, debian_postgres, new_database, prefect_server, rows_of, settings_of

AGES = Ages(runs=timedelta(days=90), logs=timedelta(days=30), artifacts=timedelta(days=60))

EVENTS_AGE = timedelta(days=7)

SHARES = (0.01, 0.1, 1)
"""The parts of the history on whose databases the pages are loaded."""

UNFINISHED = 10
"""How many runs are in progress while the pages are loaded, and how many are late."""

DELETIONS = ("delete_runs", "delete_task_runs", "delete_logs", "delete_artifacts")

OLD = {
    "delete_runs": ("flow_run", "end_time", AGES.runs),
    "delete_task_runs": ("task_run", "flow_run_id is null and end_time", AGES.runs),
    "delete_logs": ("log", "timestamp", AGES.logs),
    "delete_artifacts": ("artifact", "updated", AGES.artifacts),
    "event_resources": ("event_resources", "occurred", EVENTS_AGE),
    "events": ("events", "occurred", EVENTS_AGE),
}
"""The table, the time and the age of what each function or vacuum deletes."""

EVENTS_APPLICATION = "prefect-event-vacuum"
"""The name of the session of Prefect's vacuum in pg_stat_activity."""

REUSED_LINES = 1_000_000
"""How many log lines at most are written to show that the space of deleted lines is used again."""

Report = Callable[[list[Figure]], None]


class Traffic:
    """Writes states of new runs by the API, and watches how long the transactions of retention last.

    Attributes:
        writes: the seconds of each request.
        longest: the age in seconds of the oldest transaction of retention that was seen.
        errors: answers that did not accept a state, and requests that the server refused or failed.
    """

    def __init__(self, api: str, database: str, pause: float = 0) -> None:
        """Set what to write to.

        Args:
            api: the URL of the API.
            database: the URL of the database.
            pause: seconds between two runs.
        """
        self.api, self.database, self.pause = api, database, pause
        self.writes: list[float] = []
        self.longest = 0.0
        self.errors: list[str] = []
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._write, self._watch)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _write(self) -> None:
        with client_of(self.api) as client:
            while not self._ends.is_set():
                try:
                    self._write_a_run(client)
                    self._ends.wait(self.pause)
                except httpx.HTTPError as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                    self._ends.wait(1)

    def _write_a_run(self, client: httpx.Client) -> None:
        flow = asked(client, "POST", "/flows/", {"name": "traffic"})["id"]
        run = asked(client, "POST", "/flow_runs/", {"flow_id": flow})["id"]
        for type_ in ("RUNNING", "COMPLETED"):
            start = time.monotonic()
            answer = asked(client, "POST", f"/flow_runs/{run}/set_state", {"state": {"type": type_}})
            self.writes.append(time.monotonic() - start)
            if answer["status"] != "ACCEPT":
                self.errors.append(str(answer))

    def _watch(self) -> None:
        statement = (
            "select coalesce(max(extract(epoch from clock_timestamp() - xact_start)), 0) from pg_stat_activity "
            "where application_name = any(%s)"
        )
        with psycopg.connect(self.database, autocommit=True) as connection:
            while not self._ends.wait(0.02):
                [(seconds,)] = connection.execute(statement, [[APPLICATION, EVENTS_APPLICATION]]).fetchall()
                self.longest = max(self.longest, float(seconds))


@dataclass
class Deletion:
    """Holds what one function or vacuum has deleted.

    Attributes:
        old: how many rows were old enough.
        deleted: how many of them were deleted.
        seconds: of each batch; of the whole time of a vacuum.
    """

    old: int
    deleted: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Return the rows per second, without pauses."""
        return self.deleted / (sum(self.seconds) or 1)

    @property
    def note(self) -> str:
        """Return how much of what was old has been deleted, and how fast."""
        return f"{self.deleted:,} of {self.old:,}, {self.rate:,.0f} a second"


@contextlib.contextmanager
def _timed_batches(database: str, limit_seconds: float) -> Iterator[dict[str, Deletion]]:
    """Measure each batch, and end the walk over a kind of record when its time is over."""
    deletions: dict[str, Deletion] = {}

    def timed(name: str, delete: Callable[..., Awaitable[Batch]]) -> Callable[..., Awaitable[Batch]]:
        ends: list[float] = []

        async def run(*arguments: Any) -> Batch:
            if not ends:
                deletions[name] = Deletion(_count_old(database, name))
                ends.append(time.perf_counter() + limit_seconds)
            start = time.perf_counter()
            if start > ends[0]:
                return Batch(0, None)  # as if no record were left
            batch = await delete(*arguments)
            deletions[name].seconds.append(time.perf_counter() - start)
            deletions[name].deleted += batch.deleted
            return batch

        return run

    originals = {name: getattr(expired_records, name) for name in DELETIONS}
    for name, function in originals.items():
        setattr(expired_records, name, timed(name, function))
    try:
        yield deletions
    finally:
        for name, function in originals.items():
            setattr(expired_records, name, function)


async def _walk() -> None:
    await database_answers()  # the first batch does not pay for the connection
    async for _ in Retention(AGES).walk():
        pass


async def _delete_events(limit_seconds: float) -> dict[str, float]:
    """Run Prefect's vacuum of events, each of its two tables for half of the time; return the seconds of each table."""
    from prefect.server.services import db_vacuum
    from prefect.settings import PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_APPLICATION_NAME, temporary_settings

    original, seconds = db_vacuum._batch_delete, {}

    async def bounded(db: Any, model: Any, *arguments: Any) -> int:
        start, deleted = time.perf_counter(), 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds / 2):
                deleted = await original(db, model, *arguments)
        seconds[model.__tablename__] = time.perf_counter() - start
        return deleted

    db_vacuum._batch_delete = bounded  # type: ignore[assignment]
    try:
        with temporary_settings({PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_APPLICATION_NAME: EVENTS_APPLICATION}):
            await db_vacuum.vacuum_old_events(db=database_interface())
    finally:
        db_vacuum._batch_delete = original
    return seconds


def _count_old(database: str, name: str) -> int:
    table, column, age = OLD[name]
    [(count,)] = rows_of(database, f"select count(*) from {table} where {column} < now() - %s", age)
    return int(count)


def _megabytes(database: str, *tables: str) -> float:
    statement = "select sum(pg_total_relation_size(t)) from unnest(%s::regclass[]) t"
    [(size,)] = rows_of(database, statement, list(tables or TABLES))
    return float(size) / 1e6


def _choose_subjects(database: str, count: int) -> list[Subject]:
    """Return runs at random, whose pages are loaded."""
    rows = rows_of(
        database,
        "select id, deployment_id, flow_id, start_time, end_time from flow_run "
        "where end_time is not null and deployment_id is not null order by random() limit %s",
        count,
    )
    return [Subject(str(run), str(deployment), str(flow), *times) for run, deployment, flow, *times in rows]


def _add_unfinished_runs(api: str) -> None:
    """Create runs in progress, and late runs of a work pool, which `orchestrate runs` explains one by one."""
    due = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    states = ({"type": "RUNNING"}, {"type": "SCHEDULED", "state_details": {"scheduled_time": due}})
    with client_of(api) as client:
        flow = asked(client, "POST", "/flows/", {"name": "unfinished"})["id"]
        asked(client, "POST", "/work_pools/", {"name": "measured", "type": "process"})
        for state in UNFINISHED * states:
            run = {"flow_id": flow, "work_pool_name": "measured", "state": state}
            asked(client, "POST", "/flow_runs/", run)


def _seconds_of_command(api: str) -> float:
    """Return the seconds of `orchestrate runs`, from the start of its process to its end.

    Raises:
        AssertionError: the command does not print the unfinished runs.
    """
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "orchestration", "runs", "--json"],
        cwd=ROOT,
        env=os.environ | {"PREFECT_API_URL": api},
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    printed = done.stdout.count('"why"')
    assert printed == 2 * UNFINISHED, f"orchestrate runs printed {printed} runs"
    return seconds


def measure_pages(database: str, api: str, title: str, loads: int, report: Report) -> list[curves.Record]:
    """Load the pages of the UI, and run `orchestrate runs`.

    Args:
        database: URL of the filled database.
        api: URL of its API.
        title: the size of the history, for the table.
        loads: how often each page is loaded.
        report: prints figures.

    Returns:
        The name of each page with its percentiles in ms, for the picture.
    """
    _add_unfinished_runs(api)
    commands = [_seconds_of_command(api) for _ in range(loads + 1)][1:]
    pages = asyncio.run(load_pages(api, _choose_subjects(database, loads)))
    pages["orchestrate runs"] = [Loaded(seconds, seconds) for seconds in commands]
    found: list[curves.Record] = []
    for name, loaded in pages.items():
        shown, complete = ([1000 * getattr(load, part) for load in loaded] for part in ("shown", "complete"))
        record = {
            "name": name,
            "p50_ms": round(percentile(shown, 50)),
            "p95_ms": round(percentile(shown, 95)),
            "complete_p95_ms": round(percentile(complete, 95)),
        }
        note = f"p95 {record['p95_ms']:,}, at most {curves.PAGE_GOAL_MS:,}"
        if requests := _slowest_request(loaded):
            request, seconds = requests
            record |= {"slowest_request": request, "slowest_request_p95_ms": round(1000 * seconds)}
            note += f"; complete {record['complete_p95_ms']:,}; slowest: {request}, {1000 * seconds:,.0f}"
        report([Figure(f"{title}: {name}", "ms", shown, note)])
        found.append(record)
    return found


def _slowest_request(loaded: list[Loaded]) -> tuple[str, float] | None:
    """Return the request of a page whose p95 is the highest, and its seconds."""
    requests: dict[str, list[float]] = defaultdict(list)
    for load in loaded:
        for name, seconds in load.requests.items():
            requests[name] += seconds
    p95 = {name: percentile(seconds, 95) for name, seconds in requests.items()}
    return max(p95.items(), key=lambda item: item[1], default=None)


def measure_deletion(database: str, api: str, limit_seconds: float, report: Report) -> curves.Record:
    """Delete old records while states are written.

    Args:
        database: URL of the filled database.
        api: URL of its API.
        limit_seconds: how long each kind of record is deleted.
        report: prints figures.

    Returns:
        What was deleted, and the longest transactions, for the docs.
    """
    with Traffic(api, database) as quiet:
        time.sleep(30)
    with Traffic(api, database) as traffic, _timed_batches(database, limit_seconds) as deletions:
        asyncio.run(_walk())
    for name, deletion in deletions.items():
        report([Figure(f"a batch of {_titled(name)}", "s", deletion.seconds, deletion.note)])
    old_events = {table: _count_old(database, table) for table in ("event_resources", "events")}
    with Traffic(api, database) as during_events:
        of_tables = asyncio.run(_delete_events(limit_seconds))
    for table, seconds in of_tables.items():
        left = min(_count_old(database, table), old_events[table])  # some may have become old meanwhile
        deletion = deletions[table] = Deletion(old_events[table], old_events[table] - left, [seconds])
        ending = f"; ended after {limit_seconds / 2:g} s" if left else ""
        report([Figure(f"{_titled(table)}, by Prefect's vacuum", "s", [seconds], deletion.note + ending)])
    parts = (("without retention", quiet), ("during retention", traffic), ("during Prefect's vacuum", during_events))
    errors = [error for _, part in parts for error in part.errors]
    errors += [f"no state was written {title}" for title, part in parts if not part.writes]
    for title, part in parts:
        if part.writes:
            report([Figure(f"write a state, {title}", "ms", [1000 * write for write in part.writes])])
    for title, part in parts[1:]:
        report([Figure(f"the oldest transaction {title}", "s", [part.longest], "at most 1, seen every 20 ms")])
    for error in errors:
        print(f"A write failed: {error}", file=sys.stderr)
    report([Figure("writes that failed", "", [len(errors)], "goal 0")])
    return {
        "limit_seconds": limit_seconds,
        "deletions": [
            {"name": _titled(name), "old": found.old, "deleted": found.deleted, "per_second": round(found.rate)}
            for name, found in deletions.items()
            if found.old
        ],
        "transaction_seconds": {title: round(part.longest, 2) for title, part in parts[1:]},
        "write_p95_ms": {title: round(1000 * percentile(part.writes, 95)) for title, part in parts if part.writes},
    }


def _titled(name: str) -> str:
    """Return the kind of record that a function deletes, or that a table has."""
    return name.removeprefix("delete_").replace("_", " ")


def measure_space(database: str, deleted_lines: int, report: Report) -> None:
    """Write as many log lines as were deleted, and report how much their table grows, and what VACUUM FULL returns."""
    rows_of(database, "vacuum analyze log")
    before = _megabytes(database, "log")
    lines = min(deleted_lines, REUSED_LINES)
    [(rows,)] = rows_of(database, "select count(*) from log")
    rows_of(
        database,
        "with written as (insert into log (id, created, updated, name, level, flow_run_id, message, timestamp) select "
        "gen_random_uuid(), now(), now(), name, level, flow_run_id, message, now() from log limit %s returning 0) "
        "select count(*) from written",
        lines,
    )
    alone = before * lines / (rows + deleted_lines)
    new = f"{lines:,} new lines after {deleted_lines:,} were deleted; {alone:,.0f} without that"
    full = _megabytes(database, "log")
    report([Figure("log with its indexes, grown by", "MB", [full - before], new)])
    start = time.perf_counter()
    rows_of(database, "vacuum full log")
    seconds = time.perf_counter() - start
    report([Figure("VACUUM FULL log", "s", [seconds], f"from {full:,.0f} to {_megabytes(database, 'log'):,.0f} MB")])


def measure_size(
    postgres: str, history: History, is_whole: bool, options: argparse.Namespace, report: Report
) -> curves.Record:
    """Fill a database, load the pages, and delete from the whole history; return what the picture shows."""
    title = f"{history.runs:,} runs"
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(new_database(postgres))
        variables = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.replace("postgresql://", "postgresql+asyncpg://"),
            "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"P{EVENTS_AGE.days}D",
            # No vacuum: that of orphans, which the chart adds, would delete the lines of deleted runs meanwhile.
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": ",",
        }
        stack.enter_context(settings_of(**variables))
        subprocess.run([sys.executable, "-m", "orchestration.migrations", "upgrade"], cwd=ROOT, check=True)
        start = time.perf_counter()
        fill(database, history, _say)
        report([Figure(f"{title}: fill the database by COPY", "s", [time.perf_counter() - start])])
        size = _megabytes(database)
        report([Figure(f"{title}: tables with indexes", "MB", [size])])
        home = stack.enter_context(tempfile.TemporaryDirectory())
        api = stack.enter_context(prefect_server(Path(home)))
        _say(f"{title}: loading pages")
        pages = measure_pages(database, api, title, options.loads, report)
        found: curves.Record = {"sizes": [{"runs": history.runs, "megabytes": round(size), "pages": pages}]}
        if is_whole:
            _say("deleting old records")
            found |= measure_deletion(database, api, options.seconds, report)
            _say("using the space of deleted lines again")
            deleted = sum(kind["deleted"] for kind in found["deletions"] if kind["name"] == "logs")
            measure_space(database, deleted, report)
    return found


def _say(what: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure pages and retention on a large database.")
    parser.add_argument("--runs", type=int, default=1_000_000, help="flow runs")
    parser.add_argument("--logs", type=int, default=20_000_000, help="log lines")
    parser.add_argument("--events", type=int, default=10_000_000, help="events")
    parser.add_argument("--loads", type=int, default=20, help="how often each page is loaded")
    parser.add_argument("--seconds", type=float, default=240, help="how long each kind of record is deleted")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    found: curves.Record = {
        "runs": options.runs,
        "logs": options.logs,
        "events": options.events,
        "loads": options.loads,
    }
    sizes: list[curves.Record] = []
    with debian_postgres() as postgres:
        [(version,)] = rows_of(postgres, "show server_version")
        parts = (
            f"Postgres {version}, {options.runs:,} runs, {options.logs:,} log lines, {options.events:,} events, load "
            f"{load_before:.1f} before"
        )
        with results_table(parts) as report:
            for share in SHARES:
                history = History(*(round(share * count) for count in (options.runs, options.logs, options.events)))
                found |= measure_size(postgres, history, share == SHARES[-1], options, report)
                sizes += found["sizes"]
    if all(
        getattr(options, name) >= parser.get_default(name) for name in ("runs", "logs", "events", "loads", "seconds")
    ):
        curves.record(curves.RETENTION, found | {"sizes": sizes}, load_before)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. The figures so far are in tests/benchmarks/results.md.")
