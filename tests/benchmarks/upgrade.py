"""Measure the upgrade of a large database from the previous Prefect: seconds of each migration, and its locks.

    python -m tests.benchmarks.upgrade --runs 1000000 --events 10000000     # or: make bench-upgrade

A server of the previous version serves the database. Ten runs in progress post to it, and a worker starts runs that
fall due. The migrations run as in the chart's Job. Then a server of this version takes over, as in a rollout. The table
is printed and appended to results.md. The full size on an idle machine is recorded for a picture.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg

from orchestration.settings import ROOT
from tests.benchmarks import curves
from tests.benchmarks.server_history import TABLES, History, fill
from tests.benchmarks.table import Figure, results_table
from tests.parts import debian_postgres, end_process, free_port, new_database, rows_of, served, wait_until
from tests.versions.catalogue import PREVIOUS, locked_version, previous_release

IN_PROGRESS = 10
"""Runs that begin before the upgrade and end after it."""

DUE = 20
"""Runs that fall due during the upgrade."""

RETRIED = (408, 429, 502, 503)
"""The statuses after which Prefect's client repeats a request."""

APPLICATION = "migrations"
"""The name of the migrations' sessions in Postgres."""

SAMPLE_SECONDS = 0.02

NOTABLE_SECONDS = 1.0
"""A lock that is held longer has a row in the table."""

BLOCKS = {
    "ShareUpdateExclusiveLock": "blocks no reads or writes",
    "ShareLock": "blocks writes",
    "ShareRowExclusiveLock": "blocks writes",
    "ExclusiveLock": "blocks writes",
    "AccessExclusiveLock": "blocks reads and writes",
}
"""The statements that each lock on a table blocks, weakest first. Weaker locks are those of the server's statements."""


def variables_of(database: str) -> dict[str, str]:
    """Return the environment of a process of the Prefect server, of any version, on a database."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return variables | {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.replace("postgresql://", "postgresql+asyncpg://"),
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "orphans",  # it would delete the history's old events
        "PREFECT_UI_ENABLED": "false",
    }


def create_previous_schema(database: str) -> None:
    """Create the schema of the previous Prefect in an empty database."""
    python, checkout = previous_release()
    command = [str(python), "-m", "orchestration.migrations", "upgrade"]
    subprocess.run(command, cwd=checkout, env=variables_of(database), check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def previous_server(database: str) -> Iterator[str]:
    """Run a server of the previous Prefect on a database, and yield the URL of its API."""
    python, _ = previous_release()
    with (
        tempfile.TemporaryDirectory() as home,
        served(Path(home), free_port(), python, variables_of(database)) as url,
    ):
        yield url


@contextlib.contextmanager
def newer_server(database: str) -> Iterator[str]:
    """Run a server of this checkout on a database, and yield the URL of its API."""
    variables = variables_of(database) | {"PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryDirectory() as home,
        served(Path(home), free_port(), sys.executable, variables, "orchestration.server_process") as url,
    ):
        yield url


class Clients:
    """Posts what runs in progress and a worker post, and repeats requests as Prefect's client does.

    Attributes:
        url: the URL of the API, which may change.
        seconds: how long each request took, with its repetitions.
        repeated: how many answers or failures made a client repeat a request.
        errors: answers that would have failed a run.
        late: seconds from a run's due time until the worker started it.
    """

    def __init__(self, url: str, beat_seconds: float) -> None:
        self.url, self.beat_seconds = url, beat_seconds
        self.seconds: list[float] = []
        self.repeated = 0
        self.errors: list[str] = []
        self.late: list[float] = []
        self.due: dict[str, datetime] = {}
        self.started: Counter[str] = Counter()
        self.posted: Counter[str] = Counter()
        self.runs: list[str] = []
        self._ends, self._beat = threading.Event(), threading.Condition()
        self._is_interrupted = False
        self._http = httpx.Client(timeout=300, limits=httpx.Limits(keepalive_expiry=2))
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Clients":
        flow = self._post("/flows/", {"name": "upgraded"})["id"]
        self._post("/work_pools/", {"name": "upgraded", "type": "process"})
        body = {"name": "due", "flow_id": flow, "work_pool_name": "upgraded"}
        self.deployment = self._post("/deployments/", body)["id"]
        for _ in range(IN_PROGRESS):
            run = self._post("/flow_runs/", {"flow_id": flow, "state": {"type": "PENDING"}})["id"]
            self._set_state(run, "RUNNING")
            self.runs.append(run)
        works: list[Callable[[], None]] = [lambda run=run: self._execute(run) for run in self.runs]  # type: ignore[misc]
        self._threads = [threading.Thread(target=self._guarded, args=[work]) for work in [*works, self._work]]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._is_interrupted = error is not None
        self._ends.set()
        self._post_now()
        for thread in self._threads:
            thread.join()
        self._http.close()

    def schedule(self, seconds: float) -> None:
        """Create runs that fall due one after the other within some seconds from now."""
        now = datetime.now(UTC)
        for number in range(DUE):
            due = now + timedelta(seconds=(number + 1) * seconds / DUE)
            state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due.isoformat()}}
            run = self._post(
                f"/deployments/{self.deployment}/create_flow_run", {"state": state, "idempotency_key": str(uuid4())}
            )["id"]
            self.due[run] = due

    def wait_for_due_runs(self) -> None:
        """Wait until the worker has executed all runs that fall due, or a client has failed."""
        wait_until(lambda: self.errors or len(self.late) == len(self.due), "all due runs to be executed", 600)

    def wait_for_requests(self) -> None:
        """Let the clients post, and wait until they have had as many answers as there are clients."""
        count = len(self.seconds) + IN_PROGRESS
        self._post_now()
        wait_until(lambda: self.errors or len(self.seconds) >= count, "answers to the clients", 600)

    def losses(self, database: str) -> list[str]:
        """Return what the clients have posted and the database lacks, and the due runs not executed exactly once."""
        ids = [*self.runs, *self.due]
        states = rows_of(database, "select id, state_type from flow_run where id = any(%s::uuid[])", ids)
        found = [f"run {id_} is {state}" for id_, state in states if state != "COMPLETED"]
        found += [f"run {run} was executed {self.started[run]} times" for run in self.due if self.started[run] != 1]
        for table, where in (("log", "true"), ("task_run", "state_type = 'COMPLETED'")):
            statement = f"select count(*) from {table} where flow_run_id = any(%s::uuid[]) and {where}"
            [(count,)] = rows_of(database, statement, ids)
            if len(states) != len(ids) or count < self.posted[table]:
                found.append(f"{count} of {self.posted[table]} rows of {table}, {len(states)} of {len(ids)} runs")
        return found

    def _post_now(self) -> None:
        with self._beat:
            self._beat.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            self.errors.append(repr(error))

    def _post(self, path: str, body: Any) -> Any:
        began = time.monotonic()
        while True:
            with contextlib.suppress(httpx.TransportError):
                answer = self._http.post(self.url + path, json=body)
                if answer.status_code not in RETRIED:
                    break
            self.repeated += 1
            if self._is_interrupted or time.monotonic() - began > 300:
                raise TimeoutError(f"no answer to {path} in {time.monotonic() - began:.0f} s")
            time.sleep(0.5)
        self.seconds.append(time.monotonic() - began)
        if answer.is_error:
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text[:200]}")
        return answer.json() if answer.content else None

    def _set_state(self, run: str, type_: str, kind: str = "flow_runs") -> bool:
        """Propose a state; return whether the run has it.

        By the id of a transition the server recognises a request that is repeated because its answer was lost.
        """
        transition = str(uuid4())
        state = {"type": type_, "state_details": {"transition_id": transition}}
        answer = self._post(f"/{kind}/{run}/set_state", {"state": state})
        details = (answer.get("state") or {}).get("state_details") or {}
        return bool(answer["status"] == "ACCEPT" or details.get("transition_id") == transition)

    def _execute(self, run: str) -> None:
        """Send a heartbeat, a log line and a task run at each beat, and complete the run in the end."""
        number = 0
        while not self._ends.is_set():
            number += 1
            now = datetime.now(UTC).isoformat()
            resource = {"prefect.resource.id": f"prefect.flow-run.{run}"}
            event = {"id": str(uuid4()), "occurred": now, "event": "prefect.flow-run.heartbeat", "resource": resource}
            self._post("/events", [event])
            line = {"name": "upgrade", "level": 20, "message": f"beat {number}", "timestamp": now, "flow_run_id": run}
            self._post("/logs/", [line])
            self.posted["log"] += 1
            task = {"flow_run_id": run, "task_key": "beat", "dynamic_key": str(number), "state": {"type": "RUNNING"}}
            id_ = self._post("/task_runs/", task)["id"]
            self._set_state(id_, "COMPLETED", "task_runs")
            self.posted["task_run"] += 1
            with self._beat:
                if not self._ends.is_set():
                    self._beat.wait(self.beat_seconds)
        self._set_state(run, "COMPLETED")

    def _work(self) -> None:
        """Execute the runs that are due, as a worker does."""
        while not self._ends.wait(min(self.beat_seconds / 2, 2)):
            body = {"scheduled_before": datetime.now(UTC).isoformat()}
            for found in self._post("/work_pools/upgraded/get_scheduled_flow_runs", body):
                run = found["flow_run"]["id"]
                if self._set_state(run, "PENDING"):
                    self.started[run] += 1
                    self._set_state(run, "RUNNING")
                    self._set_state(run, "COMPLETED")
                    self.late.append((datetime.now(UTC) - self.due[run]).total_seconds())


class LockWatch:
    """Samples the locks of the migrations' sessions, and who waits for them.

    Attributes:
        phase: the migration that runs; empty between migrations.
        held: the longest time that a lock was seen, by phase, table or index, and mode.
        waits: the longest wait of another session that the migrations blocked, by table and mode of its lock.
        indexes: how long each statement was seen that creates an index after the migrations.
    """

    _SAMPLE = """
        with mine as (select pid, query, query_start from pg_stat_activity where application_name = %s)
        select 'held', pid, c.relname, l.mode, 0
          from pg_locks l join mine using (pid) join pg_class c on c.oid = l.relation
         where l.granted and c.relnamespace = 'public'::regnamespace
        union all
        select 'waits', l.pid, coalesce(l.relation::regclass::text, l.locktype), l.mode,
               extract(epoch from clock_timestamp() - l.waitstart)
          from pg_locks l where not l.granted and pg_blocking_pids(l.pid) && (select array_agg(pid) from mine)
        union all
        select 'creates', pid, substring(query from '(?i)^create (?:unique )?index (?:concurrently )?(?:if not exists )?([^ ]+)'), '',
               extract(epoch from clock_timestamp() - query_start) from mine
         where query ~* '^create (unique )?index'
    """  # noqa: E501

    def __init__(self, database: str) -> None:
        self.database = database
        self.phase = ""
        self.held: dict[tuple[str, str, str], float] = {}
        self.waits: dict[tuple[str, str], float] = {}
        self.indexes: dict[str, float] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "LockWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def longest(self, phase: str) -> str:
        """Return the longest lock of a migration that blocks anything, as text."""
        found = [
            (seconds, f"{mode} on {relation}, {seconds:.2f} s: {BLOCKS[mode]}")
            for (of, relation, mode), seconds in self.held.items()
            if of == phase and mode in BLOCKS
        ]
        return max(found)[1] if found else f"no lock seen in samples of {1000 * SAMPLE_SECONDS:.0f} ms"

    def longest_blocking(self, phase: str) -> float:
        """Return the seconds of a migration's longest lock that blocks writes or reads."""
        return max(
            (
                seconds
                for (of, _, mode), seconds in self.held.items()
                if of == phase and BLOCKS.get(mode, "").startswith("blocks") and "no reads" not in BLOCKS[mode]
            ),
            default=0.0,
        )

    def _watch(self) -> None:
        since: dict[tuple[int, str, str], float] = {}
        with psycopg.connect(self.database, autocommit=True) as connection:
            while not self._ends.wait(SAMPLE_SECONDS):
                now, phase = time.monotonic(), self.phase
                rows = connection.execute(self._SAMPLE, [APPLICATION]).fetchall()
                locks = {(pid, name, mode) for kind, pid, name, mode, _ in rows if kind == "held"}
                since = {lock: since.get(lock, now) for lock in locks}
                for lock, began in since.items():
                    _keep_longest(self.held, (phase, *lock[1:]), now - began)
                for kind, _, name, mode, seconds in rows:
                    if kind == "waits":
                        _keep_longest(self.waits, (name, mode), float(seconds or 0))
                    elif kind == "creates" and name and not phase:
                        _keep_longest(self.indexes, name, float(seconds))


def _keep_longest(found: dict[Any, float], key: Any, seconds: float) -> None:
    found[key] = max(found.get(key, 0.0), seconds)


@dataclass
class Migrations:
    """A run of the migrations.

    Attributes:
        status: the exit status of the process.
        lines: the messages of its log.
        total: seconds from its start to its end.
        seconds: of each migration that succeeded, by revision.
    """

    status: int = 0
    lines: list[str] = field(default_factory=list)
    total: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


def migrate(database: str, watch: LockWatch | None = None) -> Migrations:
    """Run the command of the chart's Job, and let `watch` know which migration runs."""
    name = {"PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_APPLICATION_NAME": APPLICATION}
    made, began = Migrations(), time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "orchestration.migrations", "upgrade"],
        cwd=ROOT, env=variables_of(database) | {"PYTHONPATH": str(ROOT)} | name,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process, _ended(process):  # fmt: skip
        for line in process.stdout or ():
            made.lines.append(re.sub(r"^\S+Z [A-Z]+ ", "", line.rstrip()))
            begins, took = (re.search(rf"Migration (\w+) {text}", line) for text in ("begins", r"took ([\d.]+) s"))
            if took:
                made.seconds[took[1]] = float(took[2])
            if watch and (begins or took):
                watch.phase = begins[1] if begins else ""
    made.status, made.total = process.returncode, time.monotonic() - began
    return made


@contextlib.contextmanager
def _ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    """End a process if the block is interrupted. Without its database it would wait for a quarter of an hour."""
    try:
        yield
    except BaseException:
        end_process(process)
        raise


def count_history(database: str, until: datetime) -> dict[str, int]:
    """Return how many rows each table has that were created until then."""
    with psycopg.connect(database) as connection:
        counts = ((table, f"select count(*) from {table} where created <= %s") for table in TABLES)
        return {table: int(connection.execute(text, [until]).fetchall()[0][0]) for table, text in counts}


class Measurements:
    """Collects the figures of the rounds, and reports them.

    Attributes:
        steps: the migrations and the indexes of the newest round, for the picture.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._values: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._notes: dict[str, str] = {}

    def add(self, name: str, unit: str, values: Iterable[float], note: str = "") -> None:
        """Add values of a figure, with the note of the round with the largest value."""
        new, all_ = list(values), self._values[name, unit]
        if new and (not all_ or max(new) >= max(all_)):
            self._notes[name] = note
        all_ += new

    def figures(self) -> list[Figure]:
        """Return the figures that have values."""
        return [
            Figure(name, unit, values, self._notes[name]) for (name, unit), values in self._values.items() if values
        ]


def measure(database: str, beat_seconds: float, window_seconds: float, found: Measurements) -> list[str]:
    """Upgrade a database next to clients, and add the figures.

    Args:
        database: the URL of a database with the previous schema and a history.
        beat_seconds: how often each run in progress posts.
        window_seconds: within how many seconds from the begin of the migrations runs fall due.
        found: gets the figures.

    Returns:
        What was lost: rows of the history, posts of clients, runs.
    """
    [(now,)] = rows_of(database, "select now()")
    before = count_history(database, now)
    with contextlib.ExitStack() as new, contextlib.ExitStack() as old:
        url = old.enter_context(previous_server(database))
        with Clients(url, beat_seconds) as clients:
            clients.wait_for_requests()
            quiet = len(clients.seconds)
            clients.schedule(window_seconds)
            _say("upgrading the schema")
            with LockWatch(database) as watch:
                migrations = migrate(database, watch)
            during = clients.seconds[quiet:]
            if migrations.status:
                return migrations.lines
            clients.wait_for_requests()
            _say(f"starting Prefect {locked_version()}")
            clients.url = new.enter_context(newer_server(database))
            clients.wait_for_requests()
            old.close()
            clients.wait_for_due_runs()
    steps = [*migrations.seconds.items(), ("", sum(watch.indexes.values()))]
    found.steps = [
        {
            "name": f"migration {phase}" if phase else "indexes of this project",
            "seconds": round(seconds, 2),
            "lock_seconds": round(watch.longest_blocking(phase), 2),
        }
        for phase, seconds in steps
    ]
    for revision, seconds in migrations.seconds.items():
        found.add(f"migration {revision}", "s", [seconds], watch.longest(revision))
    for index, seconds in watch.indexes.items():
        found.add(f"index {index}", "s", [seconds], watch.longest(""))
    found.add("the migrations' Job, without its pod", "s", [migrations.total])
    for (_, relation, mode), seconds in watch.held.items():
        if seconds > NOTABLE_SECONDS and mode in BLOCKS:
            found.add(f"{mode} on {relation}", "s", [seconds], BLOCKS[mode])
    for (relation, mode), seconds in watch.waits.items():
        found.add(f"another session waited for {mode} on {relation}", "s", [seconds])
    found.add("a request before the migrations", "ms", [1000 * value for value in clients.seconds[:quiet]])
    found.add("a request during the migrations", "ms", [1000 * value for value in during])
    note = f"{len(clients.seconds):,} requests, {len(clients.errors)} failed for good"
    found.add("requests that clients repeated", "", [clients.repeated], note)
    found.add("a due run, late by", "s", clients.late, f"{len(clients.late)} of {len(clients.due)} executed")
    _say("counting the rows")
    after = count_history(database, now)
    lost = [
        f"{table}: {count:,} rows before, {after[table]:,} after"
        for table, count in before.items()
        if after[table] != count
    ]
    return [*clients.errors, *clients.losses(database), *lost]


def _say(what: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {what}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if something was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.upgrade", description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="flow runs")
    parser.add_argument("--logs", type=int, default=0, help="log lines; the migrations do not touch their table")
    parser.add_argument("--events", type=int, default=10_000_000, help="events")
    parser.add_argument("--pairs", type=int, default=1, help="upgrades; each but the last on a copy of the database")
    options = parser.parse_args(arguments)
    history = History(options.runs, options.logs, options.events)
    lost: list[str] = []
    found = Measurements()
    load_before = os.getloadavg()[0]
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(debian_postgres())
        filled = stack.enter_context(new_database(postgres, "filled"))
        [(version,)] = rows_of(postgres, "show server_version")
        parts = (
            f"Prefect {PREVIOUS} to {locked_version()}, Postgres {version}, {history.runs:,} runs, "
            f"{history.logs:,} log lines, {history.events:,} events"
        )
        report = stack.enter_context(results_table(parts))
        stack.callback(lambda: report(found.figures()))  # also after Ctrl-C
        _say(f"creating the schema of Prefect {PREVIOUS}")
        create_previous_schema(filled)
        began = time.monotonic()
        fill(filled, history, _say)
        report([Figure("fill the database by COPY", "s", [time.monotonic() - began])])
        [(size,)] = rows_of(filled, "select pg_database_size('filled')")
        report([Figure("database", "MB", [size / 1e6])])
        for number in range(options.pairs):
            _say(f"upgrade {number + 1} of {options.pairs}")
            if number + 1 == options.pairs:
                lost += measure(filled, 1, 30, found)
            else:
                with new_database(postgres, "copied", "filled") as copied:
                    lost += measure(copied, 1, 30, found)
    for line in lost:
        print(line, file=sys.stderr)
    if not lost and all(getattr(options, name) >= parser.get_default(name) for name in ("runs", "events")):
        size = {"runs": history.runs, "events": history.events, "versions": [PREVIOUS, locked_version()]}
        curves.record(curves.UPGRADE, size | {"steps": found.steps}, load_before)
    return int(bool(lost))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted. The figures so far are in tests/benchmarks/results.md.")
