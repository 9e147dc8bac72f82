"""Runs that only the replaced database has are settled: a real Postgres, with the databases as servers leave them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestration.prefect_compat import server_records
from orchestration.protocol import CLUSTER_LABEL, MAIN_CONTAINER, POOL_LABEL, RUN_LABEL
from orchestration.recovery import executions
from orchestration.settings import ROOT
from tests import server_forks
from tests.parts import debian_postgres, new_database, rows_of
from tests.server_schema import create_schema

Object = dict[str, Any]

BACKUP = datetime.now(UTC) - timedelta(hours=1)
TOMORROW = datetime.now(UTC) + timedelta(days=1)


@dataclass
class Records:
    """Writes the records of a server.

    Args:
        url: the database.
    """

    url: str

    def pool(self, name: str, type_: str = "kubernetes") -> tuple[str, str]:
        """Create a work pool; return its id and that of its default queue."""
        pool, queue = self._insert("work_pool", name=name, type=type_), ""
        queue = self._insert("work_queue", name="default", work_pool_id=pool)
        rows_of(self.url, "update work_pool set default_queue_id = %s where id = %s", queue, pool)
        return pool, queue

    def deployment(self, name: str, queue: str) -> str:
        flow = self._insert("flow", name=f"flow of {name}")
        return self._insert("deployment", name=name, flow_id=flow, work_queue_id=queue)

    def schedule(self, deployment: str, form: Object) -> str:
        return self._insert("deployment_schedule", deployment_id=deployment, schedule=json.dumps(form), active=True)

    def run(self, deployment: str, queue: str, type_: str, name: str = "", **columns: Any) -> str:
        """Create a run in a state; return its id."""
        [(flow,)] = rows_of(self.url, "select flow_id from deployment where id = %s", deployment)
        details = columns.pop("details", {})
        run = self._insert(
            "flow_run", name=name or type_.lower(), flow_id=flow, deployment_id=deployment, work_queue_id=queue,
            state_type=type_, state_name=name or type_.capitalize(), parameters=json.dumps({"day": "2013-02-08"}),
            expected_start_time=datetime.now(UTC), **columns,
        )  # fmt: skip
        state = self._insert(
            "flow_run_state", flow_run_id=run, type=type_, name=name or type_.capitalize(), message="",
            state_details=json.dumps(details),
        )  # fmt: skip
        rows_of(self.url, "update flow_run set state_id = %s where id = %s", state, run)
        return run

    def _insert(self, table: str, **columns: Any) -> str:
        columns = {"id": str(uuid4())} | columns
        places = ", ".join("%s" for _ in columns)
        rows_of(self.url, f"insert into {table} ({', '.join(columns)}) values ({places})", *columns.values())
        return str(columns["id"])

    def states(self) -> dict[str, str]:
        return dict(rows_of(self.url, "select id::text, state_name from flow_run"))


@pytest.fixture
def databases() -> Iterator[tuple[Records, str, str]]:
    """Yield the records of the server, and the URLs of the database `postgres` and of the restored one, a copy."""
    with debian_postgres() as server, new_database(server, "prefect") as url:
        create_schema(url)
        yield Records(url), server, url.replace("/prefect?", "/prefect_restored?")


def _settle(restored: str, *arguments: str) -> dict[str, Object]:
    environment = os.environ | {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": restored.replace("postgresql://", "postgresql+asyncpg://")
    }
    options = ["--backup", BACKUP.isoformat(), "--replaced", "prefect", *arguments]
    done = server_forks.run(["orchestration", "settle", "--json", *options], environment, ROOT)
    assert done.returncode in (0, 2), done.stderr
    return {settlement["run"] or settlement["name"]: settlement for settlement in json.loads(done.stdout)}


def _executions(folder: Path, pool: str, run: str) -> Path:
    """Write a file with one Job, whose pod runs."""
    labels = {RUN_LABEL: run, POOL_LABEL: pool, "job-name": "job", "prefect.io/flow-id": str(uuid4())}
    meta = {"namespace": "prefect", "labels": labels, "creationTimestamp": datetime.now(UTC).isoformat()}
    status = {"name": MAIN_CONTAINER, "state": {"running": {"startedAt": datetime.now(UTC).isoformat()}}}
    pod = {
        "kind": "Pod", "metadata": meta | {"name": "pod"}, "spec": {"containers": [{"name": MAIN_CONTAINER}]},
        "status": {"phase": "Running", "containerStatuses": [status]},
    }  # fmt: skip
    job = {"kind": "Job", "metadata": meta | {"name": "job"}, "spec": {"backoffLimit": 0}, "status": {}}
    file = folder / "executions"
    file.write_bytes(executions.pack(["own"], [job, pod]))
    return file


def test_no_run_of_the_replaced_database_is_forgotten(databases: tuple[Records, str, str], tmp_path: Path) -> None:
    """Runs that were created after the backup are created again with their state, or listed for a person."""
    server, postgres, restored_url = databases
    pool, queue = server.pool("pods")
    _, docker = server.pool("containers", "docker")
    deployment, other = server.deployment("etl", queue), server.deployment("other", docker)
    failed = server.run(deployment, queue, "FAILED")
    rows_of(postgres, "create database prefect_restored template prefect")
    rows_of(
        server.url, "update flow_run set state_type = 'SCHEDULED', state_name = 'AwaitingRetry' where id = %s", failed
    )
    pause = {"pause_reschedule": True, "pause_key": "1"}
    lost = {
        "Scheduled": server.run(deployment, queue, "SCHEDULED", details={"scheduled_time": TOMORROW.isoformat()}),
        "Late": server.run(deployment, queue, "SCHEDULED", "Late"),
        "Suspended": server.run(deployment, queue, "PAUSED", "Suspended", details=pause),
        "Running": server.run(other, docker, "RUNNING"),
        "Held": server.run(deployment, queue, "RUNNING"),
        "AwaitingRetry": failed,
    }
    elsewhere = server.run(deployment, queue, "RUNNING", labels=json.dumps({CLUSTER_LABEL: "another"}))
    completed = server.run(deployment, queue, "COMPLETED")
    new_pool, new_queue = server.pool("new")
    new = server.run(server.deployment("new", new_queue), new_queue, "SCHEDULED", "Newest")
    live = server.run(deployment, new_queue, "RUNNING", "Live")
    file = _executions(tmp_path, new_pool, live)

    found = _settle(restored_url, "--executions", str(file))
    restored = Records(restored_url)
    states = restored.states()
    assert {name: states.get(run) for name, run in lost.items()} == {name: name for name in lost}
    assert (states[elsewhere], states[live]) == ("Running", "Running")
    assert completed not in states
    assert {run for run, settlement in found.items() if settlement["needs_person"]} == {
        lost["Running"], lost["Held"], elsewhere, new, live
    }  # fmt: skip
    assert "its deployment is not in the backup" in found[new]["reason"]
    assert "Its work pool is not in the backup" in found[live]["reason"]
    created = "select parameters, work_queue_id::text, next_scheduled_start_time from flow_run where id = %s"
    [(parameters, used, due)] = rows_of(restored_url, created, lost["Scheduled"])
    assert (parameters, used, due) == ({"day": "2013-02-08"}, queue, TOMORROW)
    details = "select state_details->>'pause_key' from flow_run_state where flow_run_id = %s"
    assert rows_of(restored_url, details, lost["Suspended"]) == [("1",)]
    assert pool


def test_pool_that_was_made_again_is_found_by_its_name(databases: tuple[Records, str, str], tmp_path: Path) -> None:
    server, postgres, restored_url = databases
    _, queue = server.pool("pods")
    deployment = server.deployment("etl", queue)
    rows_of(postgres, "create database prefect_restored template prefect")
    rows_of(server.url, "update work_pool set name = 'old' where name = 'pods'")
    pool, new_queue = server.pool("pods")
    live, late = server.run(deployment, new_queue, "RUNNING"), server.run(deployment, new_queue, "SCHEDULED", "Late")
    found = _settle(restored_url, "--executions", str(_executions(tmp_path, pool, live)))
    assert {run: settlement["needs_person"] for run, settlement in found.items()} == {live: False, late: False}
    queues = rows_of(restored_url, "select work_queue_id::text from flow_run where id = any(%s::uuid[])", [live, late])
    assert queues == [(queue,)] * 2


def test_a_month_of_a_schedule_of_minutes_is_looked_at(databases: tuple[Records, str, str]) -> None:
    """Postgres takes 32,767 parameters. A time is known if its run has ended, or is in the restored database."""
    server, postgres, restored_url = databases
    _, queue = server.pool("pods")
    deployment = server.deployment("frequent", queue)
    schedule = server.schedule(deployment, {"interval": 60, "anchor_date": "2026-01-01T00:00:00Z", "timezone": "UTC"})
    rows_of(postgres, "create database prefect_restored template prefect")
    minute = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=5)
    for type_, date in (("COMPLETED", minute), ("SCHEDULED", minute + timedelta(minutes=1))):
        key = server_records.schedule_key(deployment, schedule, date)
        server.run(deployment, queue, type_, idempotency_key=key)
    backup = (minute - timedelta(days=30)).isoformat()
    stopped = (minute + timedelta(minutes=2)).isoformat()
    found = _settle(restored_url, "--backup", backup, "--stopped", stopped)
    [times] = [settlement for settlement in found.values() if not settlement["run"]]
    count = int(times["reason"].split()[0])
    assert count in (30 * 24 * 60, 30 * 24 * 60 + 1), "of all times two have a run"
