"""Why a run is where it is, on a real server."""

import asyncio
import base64
import json
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.events.clients import get_events_client
from prefect.workers.base import BaseJobConfiguration
from prefect_kubernetes import observer
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerResult

from orchestration.__main__ import main
from orchestration.diagnoses import title
from orchestration.protocol import CAUSE_LABEL, LOST_LABEL, SETTLED_LABEL
from orchestration.reconciler import pod_records
from orchestration.reconciler.model import End, Pod, Run
from orchestration.reconciler.state_messages import DEADLINE_EXCEEDED, JOB_NOT_CREATED, NO_JOB_FOR_CLAIM, NODE_LOST
from orchestration.runs.supervisor import after_sigterm
from tests.parts import asked, client_of, wait_until

Json = dict[str, Any]


class Pool:
    """A work pool with a deployment of its own."""

    def __init__(self, api: httpx.Client) -> None:
        self.api = api
        self.name = f"timeline-{os.getpid()}-{uuid4().hex[:6]}"
        self.post("/work_pools/", name=self.name, type="kubernetes")
        flow = self.post("/flows/", name=self.name)["id"]
        self.deployment = self.post("/deployments/", name="d", flow_id=flow, work_pool_name=self.name)["id"]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        return asked(self.api, method, path, body, **headers)

    def post(self, path: str, **body: Any) -> Json:
        return dict(self.ask("POST", path, body) or {})

    def run(self, *states: Json, **fields: Any) -> Json:
        body = {"state": {"type": "SCHEDULED"}} | fields
        made = self.post(f"/deployments/{self.deployment}/create_flow_run", **body)
        for state in states:
            self.post(f"/flow_runs/{made['id']}/set_state", state=state, force=True)
        return made


@pytest.fixture
def pool(prefect_server: str) -> Iterator[Pool]:
    with client_of(prefect_server) as api:
        yield Pool(api)


def why(run: Json, capsys: pytest.CaptureFixture[str]) -> Json:
    capsys.readouterr()
    assert main(["why", run["id"], "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([{"type": "PENDING"}], "was claimed"),
        ([{"type": "PENDING", "name": "ImagePullBackOff", "message": "Pod x does not start"}], "Pod x does not start"),
        ([{"type": "RUNNING"}], "It runs since"),
        ([{"type": "RUNNING"}, {"type": "CANCELLING"}], "to be cancelled since"),
        ([{"type": "CRASHED", "message": "OOMKilled: pod x"}], "It is Crashed: OOMKilled: pod x."),
        ([{"type": "COMPLETED"}], "It is Completed."),
    ],
)
def test_the_diagnosis_of_a_state(
    pool: Pool, capsys: pytest.CaptureFixture[str], states: list[Json], said: str
) -> None:
    assert said in why(pool.run(*states), capsys)["diagnosis"]


def test_what_keeps_a_run_from_being_claimed(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    due = {"state_details": {"scheduled_time": (datetime.now(UTC) - timedelta(minutes=5)).isoformat()}}
    late = pool.run(state={"type": "SCHEDULED"} | due)
    found = why(late, capsys)
    assert f"It is late by 5 min: work pool {pool.name} has no worker" in found["diagnosis"]
    assert found["see"] == ["docs/diagnoses/late.md"]
    pool.ask("PATCH", f"/work_pools/{pool.name}", {"is_paused": True})
    assert f"prefect work-pool resume {pool.name}" in why(late, capsys)["diagnosis"]
    assert main(["runs", "--stuck", "--json"]) == 2
    [found] = [each for each in json.loads(capsys.readouterr().out) if each["id"] == late["id"]]
    assert "is paused" in found["why"]
    pool.post(f"/flow_runs/{late['id']}/set_state", state={"type": "RUNNING"}, force=True)
    main(["runs", "--stuck", "--json"])
    assert late["id"] not in capsys.readouterr().out, "it runs"
    again = {"type": "SCHEDULED", "name": "AwaitingRetry", "state_details": TOMORROW}
    pool.post(f"/flow_runs/{late['id']}/set_state", state=again, force=True)
    main(["runs", "--stuck", "--json"])
    assert late["id"] not in capsys.readouterr().out, "it was due, and is again tomorrow"
    pool.post(f"/flow_runs/{late['id']}/set_state", state={"type": "RUNNING"}, force=True)
    main(["runs"])
    assert f"{late['name']}  " in capsys.readouterr().out


def test_commands_print_control_characters_of_runs_as_escapes(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{pool.name}\x1b[2J\nheron"
    run = pool.run({"type": "CRASHED", "message": "\x1b]0;title\x07"}, name=name)
    pool.run({"type": "RUNNING"}, name=name)
    capsys.readouterr()
    main(["runs"])
    main(["why", run["id"]])
    shown = "".join(capsys.readouterr())
    assert f"{pool.name}\\x1b[2J\\nheron  Running" in shown
    assert "\\x1b]0;title\\x07" in shown
    assert not set(shown) & {"\x1b", "\x07"}


DEAD = "Pod x on n ended with exit code 137 (SIGKILL). The end of its log:\nOOMKilled: as a line of a log"
TOMORROW = {"scheduled_time": (datetime.now(UTC) + timedelta(days=1)).isoformat()}


@pytest.mark.parametrize(
    ("state", "labels", "diagnoses"),
    [
        ({"type": "CRASHED", "message": DEAD}, {}, ["crash"]),
        ({"type": "CRASHED", "message": "Execution was interrupted"}, {CAUSE_LABEL: "disruption"}, ["disruption"]),
        (
            {"type": "CRASHED", "message": "OOMKilled: pod x exceeded"},
            {CAUSE_LABEL: "oom", SETTLED_LABEL: "-"},
            ["oom"],
        ),
        ({"type": "CRASHED", "message": DEAD}, {SETTLED_LABEL: "of this state"}, ["crash", "given-up"]),
        (
            {"type": "CRASHED", "message": "Its pod is gone: somebody deleted it"},
            {CAUSE_LABEL: "crash", LOST_LABEL: True},
            ["pod-gone", "fenced"],
        ),
        (
            {
                "type": "SCHEDULED",
                "name": "AwaitingRetry",
                "message": f"Retry 1 of 10 after a disruption. {NODE_LOST}",
                "state_details": TOMORROW,
            },
            {LOST_LABEL: True},
            ["disruption", "fenced"],
        ),
        ({"type": "SCHEDULED", "name": "AwaitingRetry", "state_details": TOMORROW}, {}, []),
        ({"type": "PENDING", "name": "ClaimLost", "message": f"{NO_JOB_FOR_CLAIM} within 61 s"}, {}, ["claim-lost"]),
        (
            {"type": "SCHEDULED", "message": f"{NO_JOB_FOR_CLAIM} within 61 s", "state_details": TOMORROW},
            {},
            ["claim-lost"],
        ),
        ({"type": "PENDING", "name": "ErrImageNeverPull", "message": "Pod x does not start"}, {}, ["image"]),
        ({"type": "PENDING", "name": "PodRefused", "message": "Job x cannot make its pod"}, {}, ["refused"]),
        ({"type": "PENDING", "name": "JobRefused", "message": f"{JOB_NOT_CREATED}Forbidden"}, {}, ["refused"]),
        ({"type": "SCHEDULED", "message": f"{JOB_NOT_CREATED}Forbidden", "state_details": TOMORROW}, {}, ["refused"]),
        ({"type": "FAILED", "name": "TimedOut", "message": f"Job x{DEADLINE_EXCEEDED}its deadline"}, {}, ["deadline"]),
        ({"type": "FAILED", "message": "Flow run encountered an exception"}, {}, []),
        (after_sigterm(1, 10, datetime.now(UTC) + timedelta(days=1)), {}, ["disruption"]),
        (after_sigterm(11, 10, datetime.now(UTC)), {CAUSE_LABEL: "disruption"}, ["disruption"]),
        ({"type": "PENDING"}, {}, []),
        ({"type": "CANCELLING"}, {}, ["cancelling"]),
        ({"type": "COMPLETED", "message": "OOMKilled: no"}, {}, []),
    ],
)
def test_the_pages_of_a_diagnosis(
    pool: Pool, capsys: pytest.CaptureFixture[str], state: Json, labels: Json, diagnoses: list[str]
) -> None:
    run = pool.run({"type": "RUNNING"}, state)
    if labels.get(SETTLED_LABEL) == "of this state":
        labels = {SETTLED_LABEL: pool.ask("GET", f"/flow_runs/{run['id']}")["state_id"]}
    pool.ask("PATCH", f"/flow_runs/{run['id']}/labels", labels)
    pages = [f"docs/diagnoses/{each}.md" for each in diagnoses]
    assert why(run, capsys)["see"] == pages
    main(["why", run["id"]])
    shown = capsys.readouterr().out
    see = [f"{title(each)}. See docs/diagnoses/{each}.md, or run: orchestrate explain {each}" for each in diagnoses]
    assert shown.splitlines()[len(shown.splitlines()) - len(see) :] == see
    assert shown.count("orchestrate explain") == len(see)


def clock(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def told(run: Json, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The timeline's lines, without their times."""
    found = why(run, capsys)["timeline"]
    assert [each["at"] for each in found] == sorted(each["at"] for each in found)
    return [f"{each['who']}: {each['text']}" for each in found]


class Observed:
    """A pod of a run, told by the worker's own observer as Kubernetes would tell of it."""

    def __init__(self, pool: Pool, run: Json, name: str, created: datetime) -> None:
        self.name, self.created, self.uid = name, created, uuid4().hex
        self.labels = {"prefect.io/flow-run-id": run["id"], "prefect.io/flow-run-name": run["name"]}
        self.labels |= {"prefect.io/deployment-id": pool.deployment, "prefect.io/deployment-name": "d"}
        self.labels["prefect.io/worker-name"] = "worker-1"

    def tell(self, *statuses: Json) -> None:
        """Each as of a change that Kubernetes' watch gives."""

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
    """What Prefect's worker says of a run that it has claimed."""

    def __init__(self, pool: Pool, run: Json) -> None:
        self.worker: KubernetesWorker = KubernetesWorker(work_pool_name=pool.name, name="worker-1")
        self.configuration = BaseJobConfiguration()
        flow_run = FlowRun(id=UUID(run["id"]), name=run["name"], flow_id=UUID(run["flow_id"]))
        self.configuration._related_objects = {"flow-run": flow_run}
        self.event = self.worker._emit_flow_run_submitted_event(self.configuration)

    def made(self, job: str) -> None:
        result = KubernetesWorkerResult(identifier=f"ns:{job}", status_code=0)
        self.worker._emit_flow_run_executed_event(result, self.configuration, self.event)


def test_the_whole_way_of_a_run(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    """Each line says what no other says: a claim is its worker's line and not Pending, a pod's start not Running."""
    run = pool.run(state={"type": "SCHEDULED", "message": "Run from the Prefect UI"})
    due = datetime.fromisoformat(run["expected_start_time"])

    def state(type_: str, name: str = "", message: str = "") -> None:
        body = {"type": type_, "name": name or type_.title(), "message": message}
        pool.post(f"/flow_runs/{run['id']}/set_state", state=body, force=True)

    def log(message: str, name: str = "prefect.flow_runs") -> None:
        now = datetime.now(UTC).isoformat()
        line = {"name": name, "level": 20, "message": message, "timestamp": now, "flow_run_id": run["id"]}
        pool.ask("POST", "/logs/", [line])

    state("PENDING")
    log("Worker 'worker-1' submitting flow run", "prefect.flow_runs.worker")
    submission = Submission(pool, run)
    state("PENDING", "Submitting")
    submission.made("heron-1")
    pod = Observed(pool, run, "heron-1-pod", datetime.now(UTC))
    pod.tell({"phase": "Pending"}, {"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "Insufficient cpu",
    }]})  # fmt: skip
    state("PENDING", "InfrastructurePending", "Kubernetes pod is pending.")
    pod.tell(status("Running", running={"startedAt": datetime.now(UTC).isoformat()}))
    state("RUNNING")
    log("a line\nand more")
    log("the last line")
    end = {"exitCode": 137, "reason": "OOMKilled", "finishedAt": datetime.now(UTC).isoformat()}
    pod.tell(status("Failed", terminated=end))
    tail = "12:00:00.000 | INFO    | Flow run 'heron' - the last line"
    state("CRASHED", message=f"Pod heron-1-pod was killed. The end of its log:\n{tail}")

    wait_until(lambda: len([each for each in told(run, capsys) if each.startswith("pod")]) == 4, "the events")
    wait_until(lambda: any(each.startswith("job") for each in told(run, capsys)), "the worker's events")

    def cures() -> list[str]:
        """What the observer logs of a pod that it diagnoses."""
        return [each for each in told(run, capsys) if each.startswith("log: ") and "Resolution: " in each]

    wait_until(lambda: len(cures()) == 2, "the observer's log")
    found = told(run, capsys)
    assert sorted(set(found) - set(cures())) == sorted([
        "run: created by a person or a program, by the API of deployment d, "
        f"due at {clock(due)}: Run from the Prefect UI",
        "worker: worker-1 claimed it",
        "job: heron-1 made in namespace ns",
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


def test_a_pod_that_the_reconciler_saw_ended_is_told_by_it_alone(
    pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    """With its node, and the same pod once, though it is told of again."""
    run = pool.run({"type": "RUNNING"}, {"type": "COMPLETED"})
    now = datetime.now(UTC)
    end = End(now, 0, "Completed", peak=100 * 2**20)
    times: Json = {
        name: now - timedelta(seconds=each) for name, each in (("created", 9), ("scheduled", 8), ("began", 3))
    }
    pod = Pod("heron-1-pod", run["id"], "heron-1", started=True, end=end, node="node-1", **times)
    Observed(pool, run, pod.name, now).tell({"phase": "Pending"}, status("Running", running={}))
    event = pod_records._event(Run.read(pool.ask("GET", f"/flow_runs/{run['id']}")), pod)
    pool.ask("POST", "/events", [event])
    pool.ask("POST", "/events", [event])

    def lines() -> list[str]:
        return [each for each in told(run, capsys) if each.startswith("pod")]

    expected = [
        "pod: heron-1-pod created",
        "pod: heron-1-pod put on node-1",
        "pod: heron-1-pod started",
        "pod: heron-1-pod ended: Completed, exit code 0, with at most 100 MiB of memory",
    ]
    wait_until(lambda: lines() == expected, "the reconciler's event")


def test_who_created_a_run_and_for_when(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    schedule = {"schedule": {"cron": "0 6 * * *", "timezone": "Europe/Berlin"}, "slug": "daily", "active": True}
    pool.ask("POST", f"/deployments/{pool.deployment}/schedules", [schedule])
    pool.post(f"/deployments/{pool.deployment}/schedule", max_runs=1)
    [run, *_] = pool.ask("POST", "/flow_runs/filter", {"deployments": {"id": {"any_": [pool.deployment]}}})
    [line] = told(run, capsys)
    due = clock(datetime.fromisoformat(run["expected_start_time"]))
    assert line == f"run: created by schedule daily (0 6 * * *, Europe/Berlin) of deployment d, due at {due}"
    pool.ask("DELETE", f"/deployments/{pool.deployment}/schedules/{run['created_by']['id']}")
    name = base64.b64encode(b"after etl").decode()
    headers = {"prefect-automation-id": str(uuid4()), "prefect-automation-name": name}
    path = f"/deployments/{pool.deployment}/create_flow_run"
    made = pool.ask("POST", path, {"state": {"type": "SCHEDULED"}}, **headers)
    assert told(made, capsys)[0].startswith("run: created by automation after etl of deployment d, due at ")


def test_a_claim_of_which_no_worker_has_said_anything_is_a_state(
    pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    """And of a Job that the reconciler has recorded for it, the name is told."""
    run = pool.run({"type": "PENDING"})
    pool.ask("PATCH", f"/flow_runs/{run['id']}", {"infrastructure_pid": "ns:heron-2"})
    labels = {"prefect.worker.type": "kubernetes"}
    pool.ask("PATCH", f"/flow_runs/{run['id']}/labels", labels)
    assert told(run, capsys)[1:] == ["state: Pending", "job: heron-2 made in namespace ns"]


def test_a_retry_says_when_it_is_due_and_more_events_than_a_page_are_read(
    pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pool.run({"type": "RUNNING"}, {"type": "CRASHED"})
    at = datetime.now(UTC) + timedelta(minutes=5)
    again: Json = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry 1 of 2"}
    again["state_details"] = {"scheduled_time": at.isoformat()}
    pool.post(f"/flow_runs/{run['id']}/set_state", state=again, force=True)
    for number in range(60):
        Observed(pool, run, f"pod-{number}", datetime.now(UTC)).tell({"phase": "Pending"})
    wait_until(lambda: "pod: pod-59 created" in told(run, capsys), "the last event")
    found = told(run, capsys)
    assert len([each for each in found if each.startswith("pod")]) == 60
    assert f"state: AwaitingRetry, due at {clock(at)}: Retry 1 of 2" in found


def test_a_run_that_is_not_there(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "nobody"]) == 1
    assert "There is no run nobody" in capsys.readouterr().err
