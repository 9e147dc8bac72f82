"""Tests of the timeline that `orchestrate why` prints, on a real server."""

import asyncio
import base64
import logging
from datetime import UTC, datetime, timedelta
from unittest.mock import patch
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.events.clients import get_events_client
from prefect.events.worker import EventsWorker
from prefect.workers.base import BaseJobConfiguration
from prefect_kubernetes import observer
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerResult

from orchestration.__main__ import main
from orchestration.diagnoses import title
from orchestration.reconciler.model import End, Pod, Run
from orchestration.reconciler.pod_records import build_pod_ended_event
from tests.orchestration.inspection.work_pool import Json, WorkPool, why
from tests.parts import wait_until


def format_time(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def timeline_of(run: Json, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines of a run's timeline without their times, after a check that they are sorted."""
    entries = why(run, capsys)["timeline"]
    assert [entry["at"] for entry in entries] == sorted(entry["at"] for entry in entries)
    return [f"{entry['who']}: {entry['text']}" for entry in entries]


class ObservedPod:
    """Sends the events of a run's pod through Prefect's own observer."""

    def __init__(self, pool: WorkPool, run: Json, name: str, created: datetime) -> None:
        self.name, self.created, self.uid = name, created, uuid4().hex
        self.labels = {"prefect.io/flow-run-id": run["id"], "prefect.io/flow-run-name": run["name"]}
        self.labels |= {"prefect.io/deployment-id": pool.deployment, "prefect.io/deployment-name": "d"}
        self.labels["prefect.io/worker-name"] = "worker-1"

    def observe(self, *statuses: Json) -> None:
        """Pass statuses to the observer, each as a change from Kubernetes' watch."""

        async def send() -> None:
            async with get_events_client(checkpoint_every=1) as client:
                with patch.object(observer, "events_client", client):
                    for status in statuses:
                        raw = {"metadata": {"creationTimestamp": self.created.isoformat()}, "status": status}
                        await observer._replicate_pod_event(
                            event={"type": "MODIFIED", "object": raw}, uid=self.uid, name=self.name, namespace="ns",
                            labels=self.labels, status=status, logger=logging.getLogger("observer"),
                        )  # fmt: skip

        asyncio.run(send())


def status(phase: str, **state: Json) -> Json:
    return {"phase": phase, "containerStatuses": [{"name": "prefect-job", "state": state}]}


class Submission:
    """Sends the events of Prefect's worker about a run that the worker has claimed."""

    def __init__(self, pool: WorkPool, run: Json) -> None:
        self.worker: KubernetesWorker = KubernetesWorker(work_pool_name=pool.name, name="worker-1")
        self.configuration = BaseJobConfiguration()
        flow_run = FlowRun(id=UUID(run["id"]), name=run["name"], flow_id=UUID(run["flow_id"]))
        self.configuration._related_objects = {"flow-run": flow_run}
        self.event = self.worker._emit_flow_run_submitted_event(self.configuration)

    def create_job(self, job: str) -> None:
        result = KubernetesWorkerResult(identifier=f"ns:{job}", status_code=0)
        self.worker._emit_flow_run_executed_event(result, self.configuration, self.event)


def test_timeline_has_no_entry_twice(pool: WorkPool, capsys: pytest.CaptureFixture[str]) -> None:
    """A claim has its worker's line and no Pending line, and what a pod waits for has the pod's line alone."""
    run = pool.run(state={"type": "SCHEDULED", "message": "Run from the Prefect UI"})
    due = datetime.fromisoformat(run["expected_start_time"])

    def set_state(type_: str, name: str = "", message: str = "") -> None:
        body = {"type": type_, "name": name or type_.title(), "message": message}
        pool.post(f"/flow_runs/{run['id']}/set_state", state=body, force=True)

    def log(message: str, name: str = "prefect.flow_runs") -> None:
        now = datetime.now(UTC).isoformat()
        line = {"name": name, "level": 20, "message": message, "timestamp": now, "flow_run_id": run["id"]}
        pool.ask("POST", "/logs/", [line])

    set_state("PENDING")
    log("Worker 'worker-1' submitting flow run", "prefect.flow_runs.worker")
    # By a connection of their own: that of an earlier test may lead to a server that was stopped or has ended.
    with patch.object(EventsWorker, "_instances", {}):
        submission = Submission(pool, run)
        set_state("PENDING", "Submitting")
        submission.create_job("heron-1")
        EventsWorker.drain_all(timeout=60)
    pod = ObservedPod(pool, run, "heron-1-pod", datetime.now(UTC))
    pod.observe({"phase": "Pending"}, {"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "Insufficient cpu",
    }]})  # fmt: skip
    set_state("PENDING", "InfrastructurePending", "Kubernetes pod is pending.")
    pod.observe(status("Running", running={"startedAt": datetime.now(UTC).isoformat()}))
    set_state("RUNNING")
    log("a line\nand more")
    log("the last line")
    end = {"exitCode": 137, "reason": "OOMKilled", "finishedAt": datetime.now(UTC).isoformat()}
    pod.observe(status("Failed", terminated=end))
    tail = "12:00:00.000 | INFO    | Flow run 'heron' - the last line"
    set_state("CRASHED", message=f"Pod heron-1-pod was killed. The end of its log:\n{tail}")

    wait_until(lambda: len([entry for entry in timeline_of(run, capsys) if entry.startswith("pod")]) == 4, "the events")
    wait_until(lambda: any(entry.startswith("job") for entry in timeline_of(run, capsys)), "the worker's events")

    def resolutions() -> list[str]:
        """Return the lines that the observer logs about a pod that it diagnoses."""
        return [entry for entry in timeline_of(run, capsys) if entry.startswith("log: ") and "Resolution: " in entry]

    wait_until(lambda: len(resolutions()) == 2, "the observer's log")
    found = timeline_of(run, capsys)
    assert sorted(set(found) - set(resolutions())) == sorted([
        "run: created by a person or a program, by the API of deployment d, "
        f"due at {format_time(due)}: Run from the Prefect UI",
        "worker: worker-1 claimed it",
        "job: heron-1 created in namespace ns",
        "pod: heron-1-pod created",
        "pod: heron-1-pod does not start: Unschedulable.InsufficientResources",
        "pod: heron-1-pod started",
        "state: Running",
        "log: a line\nand more",
        "pod: heron-1-pod ended: OOMKilled",
        f"state: Crashed: Pod heron-1-pod was killed. The end of its log:\n{tail}",
    ])  # fmt: skip
    assert main(["why", run["name"]]) == 0
    shown = capsys.readouterr().out
    assert "  log     a line\n" in shown
    assert shown.endswith(
        f"It is Crashed: Pod heron-1-pod was killed.\n{title('crash')}. "
        "See docs/diagnoses/crash.md, or run: orchestrate explain crash\n"
    )


def test_record_of_reconciler_replaces_events_of_pod(pool: WorkPool, capsys: pytest.CaptureFixture[str]) -> None:
    """The record names the node, and a record that is sent twice counts once."""
    run = pool.run({"type": "RUNNING"}, {"type": "COMPLETED"})
    now = datetime.now(UTC)
    end = End(now, 0, "Completed", peak=100 * 2**20)
    times: Json = {
        moment: now - timedelta(seconds=seconds)
        for moment, seconds in (("created_at", 9), ("scheduled_at", 8), ("started_at", 3))
    }
    pod = Pod("heron-1-pod", run["id"], "heron-1", has_started=True, end=end, node="node-1", **times)
    ObservedPod(pool, run, pod.name, now).observe({"phase": "Pending"}, status("Running", running={}))
    event = build_pod_ended_event(Run.read(pool.ask("GET", f"/flow_runs/{run['id']}")), pod)
    pool.ask("POST", "/events", [event])
    pool.ask("POST", "/events", [event])

    def pod_lines() -> list[str]:
        return [entry for entry in timeline_of(run, capsys) if entry.startswith("pod")]

    expected = [
        "pod: heron-1-pod created",
        "pod: heron-1-pod scheduled on node-1",
        "pod: heron-1-pod started",
        "pod: heron-1-pod ended: Completed, exit code 0, with at most 100 MiB of memory",
    ]
    wait_until(lambda: pod_lines() == expected, "the reconciler's event")


def test_first_entry_names_creator_and_due_time(pool: WorkPool, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = {"schedule": {"cron": "0 6 * * *", "timezone": "Europe/Berlin"}, "slug": "daily", "active": True}
    pool.ask("POST", f"/deployments/{pool.deployment}/schedules", [schedule])
    pool.post(f"/deployments/{pool.deployment}/schedule", max_runs=1)
    [run, *_] = pool.ask("POST", "/flow_runs/filter", {"deployments": {"id": {"any_": [pool.deployment]}}})
    [line] = timeline_of(run, capsys)
    due = format_time(datetime.fromisoformat(run["expected_start_time"]))
    assert line == f"run: created by schedule daily (0 6 * * *, Europe/Berlin) of deployment d, due at {due}"
    pool.ask("DELETE", f"/deployments/{pool.deployment}/schedules/{run['created_by']['id']}")
    name = base64.b64encode(b"after etl").decode()
    headers = {"prefect-automation-id": str(uuid4()), "prefect-automation-name": name}
    path = f"/deployments/{pool.deployment}/create_flow_run"
    made = pool.ask("POST", path, {"state": {"type": "SCHEDULED"}}, **headers)
    assert timeline_of(made, capsys)[0].startswith("run: created by automation after etl of deployment d, due at ")


def test_claim_without_event_of_worker_is_state_entry(pool: WorkPool, capsys: pytest.CaptureFixture[str]) -> None:
    """The Job that the reconciler has recorded on the run has an entry too."""
    run = pool.run({"type": "PENDING"})
    pool.ask("PATCH", f"/flow_runs/{run['id']}", {"infrastructure_pid": "ns:heron-2"})
    labels = {"prefect.worker.type": "kubernetes"}
    pool.ask("PATCH", f"/flow_runs/{run['id']}/labels", labels)
    assert timeline_of(run, capsys)[1:] == ["state: Pending", "job: heron-2 created in namespace ns"]


def test_all_pages_of_events_are_read_and_retry_has_due_time(
    pool: WorkPool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pool.run({"type": "RUNNING"}, {"type": "CRASHED"})
    due = datetime.now(UTC) + timedelta(minutes=5)
    retry: Json = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry 1 of 2"}
    retry["state_details"] = {"scheduled_time": due.isoformat()}
    pool.post(f"/flow_runs/{run['id']}/set_state", state=retry, force=True)
    for number in range(60):
        ObservedPod(pool, run, f"pod-{number}", datetime.now(UTC)).observe({"phase": "Pending"})
    wait_until(lambda: "pod: pod-59 created" in timeline_of(run, capsys), "the last event")
    found = timeline_of(run, capsys)
    assert len([entry for entry in found if entry.startswith("pod")]) == 60
    assert f"state: AwaitingRetry, due at {format_time(due)}: Retry 1 of 2" in found


def test_why_fails_for_unknown_run(pool: WorkPool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "absent"]) == 1
    assert "There is no run absent" in capsys.readouterr().err
