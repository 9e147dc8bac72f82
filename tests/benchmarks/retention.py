"""Measure retention on a large database: rows per second, how long batches last, states written meanwhile, disk space.

    python -m tests.benchmarks.retention --runs 1000000 --logs 20000000 --events 10000000     # or: make bench-retention

The history is of 180 days. Runs are deleted after 90, logs after 30, artifacts after 60, events after 7 days. The table
is printed and appended to results.md.
"""

import argparse
import asyncio
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
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
from tests.benchmarks.server_history import TABLES, History, fill
from tests.benchmarks.table import Figure, results_table
from tests.parts import asked, client_of, debian_postgres, new_database, prefect_server, rows_of, settings_of

AGES = Ages(runs=timedelta(days=90), logs=timedelta(days=30), artifacts=timedelta(days=60))

EVENTS_AGE = "P7D"

DELETIONS = ("delete_runs", "delete_task_runs", "delete_logs", "delete_artifacts")


class Traffic:
    """Writes states of new runs by the API, and watches how long the transactions of retention last.

    Attributes:
        writes: the seconds of each request.
        longest: the age in seconds of the oldest transaction of retention that was seen.
        errors: answers that did not accept a state.
    """

    def __init__(self, api: str, database: str) -> None:
        self.api, self.database = api, database
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
        with client_of(self.api) as client, contextlib.suppress(httpx.TransportError):
            flow = asked(client, "POST", "/flows/", {"name": "traffic"})["id"]
            while not self._ends.is_set():
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
            f"where application_name = '{APPLICATION}'"
        )
        with psycopg.connect(self.database, autocommit=True) as connection:
            while not self._ends.wait(0.02):
                [(seconds,)] = connection.execute(statement).fetchall()
                self.longest = max(self.longest, float(seconds))


@contextlib.contextmanager
def _timed_batches() -> Iterator[dict[str, list[tuple[float, int]]]]:
    """Yield the seconds and the deleted records of each batch, by the name of its function."""
    batches: dict[str, list[tuple[float, int]]] = defaultdict(list)

    def timed(name: str, delete: Callable[..., Awaitable[Batch]]) -> Callable[..., Awaitable[Batch]]:
        async def run(*arguments: Any) -> Batch:
            start = time.perf_counter()
            batch = await delete(*arguments)
            batches[name].append((time.perf_counter() - start, batch.deleted))
            return batch

        return run

    originals = {name: getattr(expired_records, name) for name in DELETIONS}
    for name, function in originals.items():
        setattr(expired_records, name, timed(name, function))
    try:
        yield batches
    finally:
        for name, function in originals.items():
            setattr(expired_records, name, function)


async def _walk() -> None:
    await database_answers()  # the first batch does not pay for the connection
    async for _ in Retention(AGES).walk():
        pass


async def _delete_events() -> None:
    from prefect.server.services.db_vacuum import vacuum_old_events

    await vacuum_old_events(db=database_interface())


def _megabytes(database: str) -> float:
    [(size,)] = rows_of(database, "select sum(pg_total_relation_size(t)) from unnest(%s::regclass[]) t", list(TABLES))
    return float(size) / 1e6


def measure(database: str, history: History, report: Callable[[list[Figure]], None]) -> None:
    """Fill the database, and measure what is deleted from it.

    Args:
        database: URL of an empty database of a superuser.
        history: what the database is filled with.
        report: prints figures.
    """
    subprocess.run([sys.executable, "-m", "orchestration.migrations", "upgrade"], cwd=ROOT, check=True)
    start = time.perf_counter()
    fill(database, history)
    report([Figure("fill the database by COPY", "s", [time.perf_counter() - start])])
    report([Figure("tables with indexes, before", "MB", [_megabytes(database)])])
    with tempfile.TemporaryDirectory() as home, prefect_server(Path(home)) as api:
        with Traffic(api, database) as quiet:
            time.sleep(10)
        with Traffic(api, database) as traffic, _timed_batches() as batches:
            start = time.perf_counter()
            asyncio.run(_walk())
            seconds = time.perf_counter() - start
        for name, found in batches.items():
            deleted = sum(count for _, count in found)
            title = name.replace("_", " ")
            rate = deleted / sum(seconds for seconds, _ in found)
            report(
                [
                    Figure(
                        f"a batch of {title}",
                        "s",
                        [seconds for seconds, _ in found],
                        f"{deleted:,}, {rate:,.0f} a second",
                    )
                ]
            )
        report([Figure("the whole walk, pauses among it", "s", [seconds])])
        report([Figure("the oldest transaction of retention", "s", [traffic.longest], "at most 1")])
        report([Figure("write a state, without retention", "ms", [1000 * write for write in quiet.writes])])
        report([Figure("write a state, during retention", "ms", [1000 * write for write in traffic.writes])])
        start = time.perf_counter()
        asyncio.run(_delete_events())
        report([Figure("events, by Prefect's vacuum", "s", [time.perf_counter() - start])])
    rows_of(database, "vacuum analyze")
    report([Figure("tables with indexes, after autovacuum's work", "MB", [_megabytes(database)])])
    start = time.perf_counter()
    rows_of(database, f"vacuum full {', '.join(TABLES)}")
    report([Figure("VACUUM FULL", "s", [time.perf_counter() - start])])
    report([Figure("tables with indexes, after VACUUM FULL", "MB", [_megabytes(database)])])


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure retention on a large database.")
    parser.add_argument("--runs", type=int, default=1_000_000, help="flow runs")
    parser.add_argument("--logs", type=int, default=20_000_000, help="log lines")
    parser.add_argument("--events", type=int, default=10_000_000, help="events")
    options = parser.parse_args()
    history = History(options.runs, options.logs, options.events)
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(new_database(stack.enter_context(debian_postgres())))
        url = database.replace("postgresql://", "postgresql+asyncpg://")
        variables = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": url,
            "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": EVENTS_AGE,
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "orphans",
        }
        stack.enter_context(settings_of(**variables))
        [(version,)] = rows_of(database, "show server_version")
        parts = f"Postgres {version}, {history.runs:,} runs, {history.logs:,} log lines, {history.events:,} events"
        report = stack.enter_context(results_table(parts))
        measure(database, history, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
