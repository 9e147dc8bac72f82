"""Fill the database of a Prefect server with a history of runs, logs, events and artifacts, by COPY.

The API would take days for what COPY writes in minutes. The database has Prefect's schema and no rows.
"""

import contextlib
import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import psycopg

Row = Sequence[object]

ROWS_PER_WRITE = 2000

ROWS_PER_REPORT = 1_000_000

TABLES = ("flow_run", "flow_run_state", "task_run", "task_run_state", "log", "artifact", "events", "event_resources")

FINAL = ("COMPLETED",) * 18 + ("FAILED", "CRASHED")
"""The final states of runs, as often as they occur."""

TASKS = 2
"""Task runs of each run."""


FILLING = {"full_page_writes": "off", "max_wal_size": "4GB", "checkpoint_timeout": "1h"}
"""Settings of Postgres while a database is filled. A crash would lose the database."""


@dataclass(frozen=True)
class History:
    """Describes the rows, which are spread evenly over the days until now.

    Attributes:
        runs: flow runs in a final state. Each has two task runs; every fifth has a Markdown artifact.
        logs: log lines of the runs.
        events: events of the runs, each with two resources.
        days: the age of the oldest run.
        deployments: how many deployments the runs belong to in turn.
    """

    runs: int
    logs: int
    events: int
    days: float = 180
    deployments: int = 50


class _Writer:
    """Yields the rows of a history, and copies them into their tables."""

    def __init__(
        self, connection: "psycopg.Connection[tuple[object, ...]]", history: History, say: Callable[[str], None]
    ) -> None:
        self.connection = connection
        self.say = say
        self.random = random.Random(history.runs)  # noqa: S311
        self.step = timedelta(days=history.days) / history.runs
        self.start = datetime.now(UTC) - timedelta(days=history.days)
        self.deployments = [self.new_id() for _ in range(history.deployments)]
        self.runs = [self.new_id() for _ in range(history.runs)]
        self.tasks = [self.new_id() for _ in range(history.runs * TASKS)]
        self.last_states = [self.new_id() for _ in range(history.runs * (1 + TASKS))]

    def new_id(self) -> str:
        """Return a random UUID, as Prefect gives to most rows."""
        return f"{self.random.getrandbits(128):032x}"

    def copy(self, table: str, columns: str, rows: Iterable[Row]) -> None:
        """Write rows into a table."""
        rows, written = iter(rows), 0
        with self.connection.cursor().copy(f"copy {table} ({columns}) from stdin") as writer:
            while part := list(itertools.islice(rows, ROWS_PER_WRITE)):
                writer.write("".join("\t".join(map(str, row)) + "\n" for row in part))
                written += len(part)
                if written % ROWS_PER_REPORT == 0:
                    self.say(f"{table}: {written:,} rows")

    def at(self, run: int, share: float) -> datetime:
        """Return a time in a run: 0 is its start, 1 its end after 30 s or less."""
        return self.start + run * self.step + min(timedelta(seconds=30), self.step) * share

    def final(self, run: int) -> str:
        """Return the final state of a run. Each deployment has runs in each of them."""
        return FINAL[(run // len(self.deployments)) % len(FINAL)]

    def flow_runs(self, flow: str) -> Iterator[Row]:
        """Yield the flow runs."""
        for run, id_ in enumerate(self.runs):
            begin, end, state = self.at(run, 0), self.at(run, 1), self.final(run)
            deployment = self.deployments[run % len(self.deployments)]
            yield (id_, begin, end, f"run-{run}", state, state.title(), self.last_states[run], end, 1, begin, begin,
                   end, flow, deployment, "default", f"scheduled {run}")  # fmt: skip

    def task_runs(self) -> Iterator[Row]:
        """Yield the task runs."""
        for task, id_ in enumerate(self.tasks):
            run, number = divmod(task, TASKS)
            begin, end, state = self.at(run, 0), self.at(run, 1), self.final(run)
            last = self.last_states[len(self.runs) + task]
            yield (id_, begin, end, f"load-{number}", state, state.title(), last, end, begin, begin, end,
                   self.runs[run], "load", number)  # fmt: skip

    def states(self, ids: Sequence[str], last: Sequence[str], ids_per_run: int) -> Iterator[Row]:
        """Yield three states of each run: Pending, Running and the final state."""
        for number, id_ in enumerate(ids):
            run = number // ids_per_run
            for place, name in enumerate(("PENDING", "RUNNING", self.final(run))):
                at = self.at(run, place / 2)
                yield last[number] if place == 2 else self.new_id(), at, at, name, name.title(), at, id_

    def spread(self, count: int) -> Iterator[tuple[int, datetime]]:
        """Yield `count` times the number of a run and a time in it, in the order of time."""
        for number in range(count):
            run, share = divmod(number * len(self.runs) / count, 1)
            yield int(run), self.at(int(run), share)

    def logs(self, count: int) -> Iterator[Row]:
        """Yield the log lines."""
        for number, (run, at) in enumerate(self.spread(count)):
            message = f"Loaded {number} rows of the day into the table of flights, in {number % 60} s"
            yield self.new_id(), at, at, "prefect.flow_runs", 20, self.runs[run], message, at

    def artifacts(self) -> Iterator[Row]:
        """Yield the artifacts, as versions of twenty keys."""
        for run in range(0, len(self.runs), 5):
            at = self.at(run, 1)
            yield self.new_id(), at, at, f"report-{run // 5 % 20}", "markdown", '"# Report"', self.runs[run]

    def events(self, ids: Sequence[str]) -> Iterator[Row]:
        """Yield the events."""
        for id_, (run, at) in zip(ids, self.spread(len(ids)), strict=True):
            resource = {"prefect.resource.id": self.resource(run), "prefect.resource.name": f"run-{run}"}
            related = f"prefect.deployment.{self.deployments[run % len(self.deployments)]}"
            yield (id_, at, at, at, at, at, f"prefect.flow-run.{self.final(run).title()}", self.resource(run),
                   json.dumps(resource), json.dumps([related]), "{}")  # fmt: skip

    def event_resources(self, ids: Sequence[str]) -> Iterator[Row]:
        """Yield the resources of the events: the run and its deployment."""
        for id_, (run, at) in zip(ids, self.spread(len(ids)), strict=True):
            deployment = f"prefect.deployment.{self.deployments[run % len(self.deployments)]}"
            for role, resource in (("", self.resource(run)), ("deployment", deployment)):
                yield self.new_id(), at, at, at, resource, role, json.dumps({"prefect.resource.id": resource}), id_

    def resource(self, run: int) -> str:
        """Return the id of a run as a resource of events."""
        return f"prefect.flow-run.{self.runs[run]}"


def fill(url: str, history: History, say: Callable[[str], None] = lambda _: None) -> None:
    """Write the rows of a history, and collect the statistics that autovacuum would collect.

    Args:
        url: a superuser's URL of the database: the rows refer to each other, so the foreign keys are not checked.
        history: what to write.
        say: called with the progress, for each million rows.
    """
    with _little_wal(url):
        with psycopg.connect(url) as connection:
            connection.execute("set session_replication_role = replica")
            with _without_indexes(connection, say):
                _write(_Writer(connection, history, say), history)
        with psycopg.connect(url, autocommit=True) as connection:
            say("collecting the statistics")
            connection.execute("vacuum analyze")
            connection.execute("checkpoint")  # what is measured afterwards does not write these rows to disk


@contextlib.contextmanager
def _little_wal(url: str) -> Iterator[None]:
    """Let Postgres write no whole pages to its log, and few checkpoints, while the block lasts."""
    with psycopg.connect(url, autocommit=True) as connection:
        try:
            for name, value in FILLING.items():
                connection.execute(f"alter system set {name} = '{value}'")
            connection.execute("select pg_reload_conf()")
            yield
        finally:
            for name in FILLING:
                connection.execute(f"alter system reset {name}")
            connection.execute("select pg_reload_conf()")


@contextlib.contextmanager
def _without_indexes(
    connection: "psycopg.Connection[tuple[object, ...]]", say: Callable[[str], None]
) -> Iterator[None]:
    """Drop the indexes that no foreign key needs, and create them again after the block, which takes less time."""
    indexes = connection.execute(
        "select indexrelid::regclass::text, pg_get_indexdef(indexrelid) from pg_index "
        "where indrelid = any(%s::regclass[]) and not exists (select from pg_constraint where conindid = indexrelid)",
        [list(TABLES)],
    ).fetchall()
    keys = connection.execute(
        "select conrelid::regclass::text, conname, pg_get_constraintdef(oid) from pg_constraint found "
        "where conrelid = any(%s::regclass[]) and contype in ('p', 'u') and not exists "
        "(select from pg_constraint where contype = 'f' and conindid = found.conindid)",
        [list(TABLES)],
    ).fetchall()
    for index, _ in indexes:
        connection.execute(f"drop index {index}")
    for table, name, _ in keys:
        connection.execute(f"alter table {table} drop constraint {name}")
    yield
    say(f"creating {len(indexes) + len(keys)} indexes")
    connection.execute("set maintenance_work_mem = '512MB'")
    for table, name, definition in keys:
        connection.execute(f"alter table {table} add constraint {name} {definition}")
    for _, definition in indexes:
        connection.execute(str(definition))


def _write(writer: _Writer, history: History) -> None:
    flow = writer.new_id()
    writer.copy("flow", "id, name", [(flow, "history")])
    named = [(id_, f"deployment-{number}", flow) for number, id_ in enumerate(writer.deployments)]
    writer.copy("deployment", "id, name, flow_id", named)
    run = "id, created, updated, name, state_type, state_name, state_id"
    writer.copy(
        "flow_run",
        f"{run}, state_timestamp, run_count, expected_start_time, start_time, end_time, flow_id, deployment_id, "
        "work_queue_name, idempotency_key",
        writer.flow_runs(flow),
    )
    writer.copy(
        "task_run",
        f"{run}, state_timestamp, expected_start_time, start_time, end_time, flow_run_id, task_key, dynamic_key",
        writer.task_runs(),
    )
    state = "id, created, updated, type, name, timestamp"
    of_runs, of_tasks = writer.last_states[: history.runs], writer.last_states[history.runs :]
    writer.copy("flow_run_state", f"{state}, flow_run_id", writer.states(writer.runs, of_runs, 1))
    writer.copy("task_run_state", f"{state}, task_run_id", writer.states(writer.tasks, of_tasks, TASKS))
    writer.copy("log", "id, created, updated, name, level, flow_run_id, message, timestamp", writer.logs(history.logs))
    writer.copy("artifact", "id, created, updated, key, type, data, flow_run_id", writer.artifacts())
    writer.connection.execute(
        "insert into artifact_collection (key, latest_id, type, data, flow_run_id)"
        " select distinct on (key) key, id, type, data, flow_run_id from artifact order by key, created desc"
    )
    events = [writer.new_id() for _ in range(history.events)]
    writer.copy(
        "events",
        "id, created, updated, occurred, received, recorded, event, resource_id, resource, related_resource_ids, "
        "payload",
        writer.events(events),
    )
    writer.copy(
        "event_resources",
        "id, created, updated, occurred, resource_id, resource_role, resource, event_id",
        writer.event_resources(events),
    )
