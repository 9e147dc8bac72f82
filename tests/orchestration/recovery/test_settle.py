"""Settling runs after a restore: a real Postgres, a real Prefect server, and a worker that keeps a ledger."""

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from orchestration.protocol import CLUSTER_LABEL, MAIN_CONTAINER, POOL_LABEL, RUN_LABEL
from orchestration.recovery import executions, settle
from orchestration.settings import ROOT
from tests import server_forks
from tests.parts import asked, client_of, debian_postgres, free_port, new_database, rows_of, served, wait_until
from tests.server_schema import create_schema

Object = dict[str, Any]

POOL = "pods"
CLUSTER = "11111111-2222-3333-4444-555555555555"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with debian_postgres() as url:
        rows_of(url, "create database migrated")
        create_schema(url.replace("/postgres?", "/migrated?"))
        yield url


def _environment(url: str, database: str) -> dict[str, str]:
    url = url.replace("postgresql://", "postgresql+asyncpg://").replace("/postgres?", f"/{database}?")
    return os.environ | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}


@dataclass
class Worker:
    """Claims runs as a worker does, and executes them without a pod. The ledger counts executions by run.

    Args:
        api: a client of the Prefect API.
    """

    api: httpx.Client
    ledger: Counter[str] = field(default_factory=Counter)
    jobs: dict[str, str] = field(default_factory=dict)

    def poll(self, until: timedelta = timedelta()) -> list[Object]:
        """Return the runs that the server hands to workers, by due time."""
        before = (datetime.now(UTC) + until).isoformat()
        body = {"scheduled_before": before, "limit": 200}
        found = asked(self.api, "POST", f"/work_pools/{POOL}/get_scheduled_flow_runs", body)
        return [response["flow_run"] for response in found]

    def set_state(self, run: Object, type_: str) -> str:
        answer = asked(self.api, "POST", f"/flow_runs/{run['id']}/set_state", {"state": {"type": type_}})
        assert answer["status"] == "ACCEPT", answer
        return str(answer["state"]["id"])

    def claim(self, run: Object) -> None:
        claim = self.set_state(run, "PENDING")
        self.jobs[run["id"]] = f"{run['name']}-{claim[-12:]}"
        body = {"infrastructure_pid": f"prefect:{self.jobs[run['id']]}"}
        asked(self.api, "PATCH", f"/flow_runs/{run['id']}", body)

    def begin(self, run: Object) -> None:
        self.claim(run)
        self.set_state(run, "RUNNING")
        self.ledger[run["id"]] += 1

    def execute(self, run: Object, end: str = "COMPLETED") -> None:
        self.begin(run)
        self.set_state(run, end)


@dataclass
class Cluster:
    """Builds the Jobs and pods that a cluster would show.

    Args:
        worker: the worker, with the names of its Jobs.
        labels: labels of every Job.
    """

    worker: Worker
    labels: dict[str, str]
    objects: list[Object] = field(default_factory=list)

    def show(self, run: Object, state: Object, phase: str = "Running") -> None:
        """Add the Job of a run, and its pod with this state of the main container."""
        job, now = self.worker.jobs[run["id"]], datetime.now(UTC).isoformat()
        labels = self.labels | {RUN_LABEL: run["id"], "prefect.io/flow-run-name": run["name"]}
        condition = [{"type": "Complete" if phase == "Succeeded" else "Failed", "status": "True"}]
        meta = {"namespace": "prefect", "creationTimestamp": now}
        spec: Object = {"backoffLimit": 0, "template": {}}
        self.objects += [
            {
                "kind": "Job",
                "metadata": meta | {"name": job, "labels": labels},
                "spec": spec,
                "status": {"conditions": condition if phase in ("Succeeded", "Failed") else []},
            },
            {
                "kind": "Pod",
                "metadata": meta | {"name": f"{job}-x", "labels": labels | {"job-name": job}},
                "spec": {"containers": [{"name": MAIN_CONTAINER, "env": [{"name": "SECRET", "value": "s3cret"}]}]},
                "status": {"phase": phase, "containerStatuses": [{"name": MAIN_CONTAINER, "state": state}]},
            },
        ]


def _ended(code: int) -> tuple[Object, str]:
    now = datetime.now(UTC).isoformat()
    state = {"terminated": {"exitCode": code, "startedAt": now, "finishedAt": now}}
    return state, "Failed" if code else "Succeeded"


RUNNING: Object = {"running": {"startedAt": "2026-11-29T12:00:00Z"}}


def _settle(server: str, database: str, *arguments: str, replaced_url: str = "") -> tuple[int, list[Object]]:
    command = ["orchestration", "settle", "--json", *arguments]
    environment = _environment(server, database) | {"REPLACED_DATABASE_URL": replaced_url}
    done = server_forks.run(command, environment, ROOT)
    assert done.returncode in (0, 2), done.stderr
    return done.returncode, json.loads(done.stdout)


@dataclass
class Story:
    """What happened around a backup: the runs by what became of them, and what the cluster shows afterwards.

    Args:
        backup: the time of the backup.
        stopped: when the worker stopped.
        dump: the backup.
        file: the Jobs and pods.
        runs: the runs.
        ledger: how often each run was executed, by its id.
    """

    backup: datetime
    stopped: datetime
    dump: Path
    file: Path
    runs: dict[str, list[Object]]
    ledger: Counter[str]

    def ids(self, *names: str) -> set[str]:
        return {run["id"] for name in names for run in self.runs[name]}

    def in_state(self, url: str, *states: str) -> set[str]:
        """Return which runs of the story have one of the states in a database."""
        known = self.ids(*self.runs)
        found = rows_of(url, "select id::text from flow_run where state_name = any(%s)", list(states))
        return {run for (run,) in found} & known

    @property
    def options(self) -> list[str]:
        times = ["--backup", self.backup.isoformat(), "--stopped", self.stopped.isoformat()]
        return [*times, "--executions", str(self.file)]


@pytest.fixture(scope="module")
def story(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Execute runs of a schedule around a backup: 20 are due, 10 are due in the next minutes."""
    folder = tmp_path_factory.mktemp("story")
    with (
        new_database(server, "original", "migrated") as url,
        served(folder, free_port(), sys.executable, _environment(server, "original")) as api_url,
        client_of(api_url) as api,
    ):
        yield _tell(api, url, folder)


def _tell(api: httpx.Client, url: str, folder: Path) -> Story:
    pool = asked(api, "POST", "/work_pools/", {"name": POOL, "type": "kubernetes"})
    flow = asked(api, "POST", "/flows/", {"name": "etl"})["id"]
    # The 20th run was due 15 s ago, and the next one is due in nearly five minutes, when all of this has long happened.
    anchor = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=95, seconds=15)
    schedule = {"interval": 300, "anchor_date": anchor.isoformat(), "timezone": "UTC"}
    body = {"name": "frequent", "flow_id": flow, "work_pool_name": POOL, "concurrency_limit": 50}
    deployment = asked(api, "POST", "/deployments/", body)["id"]
    asked(api, "POST", f"/deployments/{deployment}/schedules", [{"schedule": schedule, "active": True}])
    span = {"start_time": anchor.isoformat(), "min_runs": 30, "max_runs": 30}
    asked(api, "POST", f"/deployments/{deployment}/schedule", span)
    worker = Worker(api)
    queued = worker.poll(timedelta(minutes=55))[:30]
    assert len(queued) == 30
    labels = {POOL_LABEL: pool["id"], "prefect.io/flow-id": flow, "prefect.io/flow-name": "etl"}
    cluster = Cluster(worker, labels | {"prefect.io/deployment-id": deployment})
    names = {"done": 4, "failed": 1, "ending": 1, "continuing": 1, "claimed": 1, "completed": 3, "gone": 2,
             "broken": 1, "running": 1, "waiting": 1, "never": 4, "soon": 10}  # fmt: skip
    runs = {name: [queued.pop(0) for _ in range(number)] for name, number in names.items()}
    for run in runs["done"]:
        worker.execute(run)
    worker.execute(runs["failed"][0], "FAILED")
    for run in [*runs["ending"], *runs["continuing"]]:
        worker.begin(run)
    worker.claim(runs["claimed"][0])

    backup, dump = datetime.now(UTC), folder / "dump"
    subprocess.run(["pg_dump", "--format=custom", f"--file={dump}", url], check=True)

    worker.set_state(runs["ending"][0], "COMPLETED")
    cluster.show(runs["ending"][0], *_ended(0))
    cluster.show(runs["continuing"][0], RUNNING)
    worker.ledger[runs["claimed"][0]["id"]] += 1
    for type_ in ("RUNNING", "COMPLETED"):
        worker.set_state(runs["claimed"][0], type_)
    for run in [*runs["completed"], *runs["gone"]]:
        worker.execute(run)
    for run in runs["completed"]:
        cluster.show(run, *_ended(0))
    worker.execute(runs["broken"][0], "FAILED")
    cluster.show(runs["broken"][0], *_ended(1))
    worker.begin(runs["running"][0])
    worker.claim(runs["waiting"][0])
    created = {"parameters": {"day": "2013-02-08"}, "enforce_parameter_schema": False, "state": {"type": "SCHEDULED"}}
    for name in ("new", "new_waiting"):
        runs[name] = [asked(api, "POST", f"/deployments/{deployment}/create_flow_run", created)]
    worker.begin(runs["new"][0])
    worker.claim(runs["new_waiting"][0])
    # A person retries the run that failed before the backup.
    worker.set_state(runs["failed"][0], "SCHEDULED")
    worker.begin(runs["failed"][0])
    for name in ("running", "new", "failed"):
        cluster.show(runs[name][0], RUNNING)
    for name in ("waiting", "new_waiting"):
        cluster.show(runs[name][0], {"waiting": {"reason": "ContainerCreating"}}, "Pending")
    file = folder / "executions.json.gz"
    file.write_bytes(executions.pack([CLUSTER], cluster.objects))
    return Story(backup, datetime.now(UTC), dump, file, runs, worker.ledger)


@pytest.fixture
def restored(server: str, story: Story) -> Iterator[str]:
    """Restore the backup into a new database, and yield its URL."""
    with new_database(server, "restored") as url:
        subprocess.run(["pg_restore", "--exit-on-error", f"--dbname={url}", str(story.dump)], check=True)
        yield url


EXECUTED = ("done", "ending", "claimed", "completed", "gone", "broken", "continuing", "running", "new", "failed")


def test_after_a_restore_nothing_is_executed_twice(server: str, story: Story, restored: str, tmp_path: Path) -> None:
    """Without the replaced database, what shows no trace is held, and a person's answer lets the rest run."""
    status, found = _settle(server, "restored", *story.options)
    assert status == 2, "a person has to look"
    held = story.ids("claimed", "gone", "never")
    assert {settlement["run"] for settlement in found if settlement["needs_person"]} == held | story.ids(
        "broken", "new_waiting"
    )
    assert story.in_state(restored, "Held") == held
    assert story.in_state(restored, "Completed") == story.ids("done", "ending", "completed")
    assert story.in_state(restored, "Failed") == story.ids("broken")
    assert story.in_state(restored, "Running") == story.ids("continuing", "running", "new", "failed")
    assert story.in_state(restored, "Pending") == story.ids("waiting")
    assert story.in_state(restored, "Scheduled") == story.ids("soon")
    states = rows_of(restored, "select id, state_id from flow_run order by id")
    _settle(server, "restored", *story.options)
    assert rows_of(restored, "select id, state_id from flow_run order by id") == states, "a second time changes nothing"
    slots = rows_of(restored, "select active_slots from concurrency_limit_v2")
    assert slots == [(5,)], "those of the live runs of the deployment"
    [(labels, job)] = rows_of(
        restored, "select labels, infrastructure_pid from flow_run where id = %s", story.runs["new"][0]["id"]
    )
    assert labels[CLUSTER_LABEL] == CLUSTER
    assert job.startswith(f"prefect:{story.runs['new'][0]['name']}-")
    environment = _environment(server, "restored")
    with served(tmp_path, free_port(), sys.executable, environment) as url, client_of(url) as api:
        worker = Worker(api, Counter(story.ledger))
        # The services run by now: the scheduler makes runs an hour ahead.
        last = "select max(next_scheduled_start_time) > now() + interval '59 minutes' from flow_run"
        wait_until(lambda: rows_of(restored, last) == [(True,)], "the scheduler to make runs")
        assert story.ids("soon") <= {run["id"] for run in worker.poll(timedelta(minutes=55))}
        assert asked(api, "POST", f"/flow_runs/{story.runs['never'][0]['id']}/resume")["status"] == "ACCEPT"
        for run in worker.poll(timedelta(minutes=55)):
            worker.claim(run)  # its pod waits for the due time
            worker.ledger[run["id"]] += 1
    again = {run: times for run, times in worker.ledger.items() if times > 1}
    assert set(again) == story.ids("failed"), "a person retried it before the restore"
    assert worker.ledger[story.runs["never"][0]["id"]] == 1
    by_time = Counter(rows_of(restored, "select idempotency_key from flow_run where idempotency_key is not null"))
    assert set(by_time.values()) == {1}, "each scheduled time has one run"


def test_replaced_database_tells_how_runs_ended(server: str, story: Story, restored: str) -> None:
    """As after a recovery into another database server: its URL is given, and the time of the backup is not."""
    options = [option for option in story.options if option not in ("--backup", story.backup.isoformat())]
    assert "--backup" in story.options
    assert len(options) == len(story.options) - 2
    replaced_url = server.replace("/postgres?", "/original?")
    status, found = _settle(server, "restored", *options, replaced_url=replaced_url)
    assert (status, [settlement for settlement in found if settlement["needs_person"]]) == (0, [])
    assert story.in_state(restored, "Completed") == story.ids("done", "ending", "claimed", "completed", "gone")
    assert story.in_state(restored, "Failed") == story.ids("broken")
    assert story.in_state(restored, "Scheduled", "Late") == story.ids("never", "soon"), "what was never executed starts"
    assert story.in_state(restored, "Pending") == story.ids("waiting", "new_waiting")
    created = "select parameters from flow_run where id = any(%s::uuid[])"
    parameters = rows_of(restored, created, list(story.ids("new", "new_waiting")))
    assert parameters == [({"day": "2013-02-08"},)] * 2


def test_unknown_runs_start_if_asked_and_times_without_a_run_are_listed(
    server: str, story: Story, restored: str
) -> None:
    """The scheduler makes runs an hour ahead, and none for the past. Here the workers stopped a day later."""
    late = (datetime.now(UTC) + timedelta(hours=24)).isoformat()
    _, found = _settle(server, "restored", *story.options, "--stopped", late, "--start-unknown")
    assert story.in_state(restored, "Scheduled", "Late") == story.ids("gone", "never", "soon")
    assert story.in_state(restored, "Held") == story.ids("claimed"), "it was Pending at the backup"
    assert story.ids("gone", "never") <= {settlement["run"] for settlement in found if settlement["needs_person"]}
    [times] = [settlement for settlement in found if not settlement["run"]]
    assert times["name"] == "etl/frequent"
    assert "scheduled times from" in times["reason"]
    assert int(times["reason"].split()[0]) > 200


@pytest.mark.parametrize(
    "form",
    [
        {"cron": "* * * * *", "timezone": "UTC"},
        {"interval": 60, "anchor_date": "2026-02-28T00:00:00Z", "timezone": "UTC"},
        {"rrule": "DTSTART:20260228T000000Z\nRRULE:FREQ=MINUTELY", "timezone": "UTC"},
    ],
)
def test_each_date_of_a_schedule_since_the_backup_is_read(form: Object) -> None:
    start = datetime(2026, 3, 1, tzinfo=UTC)
    dates = settle.read_dates(form, start, start + timedelta(days=2))
    assert len({*dates}) == len(dates)
    assert [date - dates[0] for date in dates] == [timedelta(minutes=minute) for minute in range(len(dates))]
    assert len(dates) in (2_880, 2_881), "the end may count"


def test_file_has_no_environment_of_pods(story: Story) -> None:
    assert "s3cret" not in gzip.decompress(story.file.read_bytes()).decode()


def test_restored_database_replaces_that_of_the_server(server: str, story: Story, tmp_path: Path) -> None:
    """The backup's pod does this once the script has restored the dump, while no process of the server runs."""
    serving, waiting = (server.replace("/postgres?", f"/{name}?") for name in ("serving", "serving_restored"))

    def finish() -> "subprocess.CompletedProcess[str]":
        options = ["--to", f"file://{tmp_path}", "--name", f"{story.backup:%Y%m%dT%H%M%SZ}"]
        options += ["--executions", str(story.file)]
        options += ["--stopped", story.stopped.isoformat()]
        command = ["orchestration.recovery", "finish", *options]
        return server_forks.run(command, _environment(server, "serving"), ROOT)

    rows_of(server, "create database serving")
    rows_of(serving, "create table kept (id int)")
    failed = finish()
    assert failed.returncode == 1, "there is no restored database yet"
    assert "The server's database is unchanged" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert rows_of(serving, "select to_regclass('kept') is not null") == [(True,)]
    rows_of(server, "create database serving_restored")
    subprocess.run(["pg_restore", "--exit-on-error", f"--dbname={waiting}", str(story.dump)], check=True)
    with psycopg.connect(serving):  # a session that does not end by itself
        done = finish()
    assert done.returncode == 0, done.stderr
    # The replaced database is none of a server, so the Jobs and pods are the only evidence.
    assert "The replaced database cannot be read, and is no evidence" in done.stderr
    assert story.in_state(serving, "Held") == story.ids("claimed", "gone", "never")
    databases = {name for (name,) in rows_of(server, "select datname from pg_database where datname like 'serving%%'")}
    [replaced] = databases - {"serving"}
    assert replaced.startswith("serving_replaced_2")
    assert rows_of(server.replace("/postgres?", f"/{replaced}?"), "select to_regclass('kept') is not null") == [(True,)]
    for name in databases:
        rows_of(server, f"drop database {name}")
