"""Tests of the records of ended pods, and of whole rounds, on a real cluster and a real server."""

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from orchestration import prefect_api as prefect
from orchestration.__main__ import main
from orchestration.errors import ClusterError
from orchestration.health import Pulse
from orchestration.operations.local_cluster import images
from orchestration.protocol import (
    CLUSTER_LABEL,
    EXCEEDED_LABEL,
    FENCED_LABEL_PREFIX,
    NOTED_ANNOTATION,
    PEAK_LABEL,
    POOL_LABEL,
    RUN_LABEL,
)
from orchestration.reconciler import kubernetes_client as kubernetes
from orchestration.reconciler import loop
from orchestration.reconciler.actions import carry_out
from orchestration.reconciler.decide import Crash
from orchestration.reconciler.loop import Reconciler
from orchestration.reconciler.model import End, Job, Pod, Policy, Run
from orchestration.reconciler.pod_records import PodRecord, build_pod_records, unrecorded_pods
from tests.cluster.namespace import RESTRICTED, Namespace
from tests.parts import asked, client_of, free_port, wait_until

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MIB = 2**20
RUN = Run("r", "COMPLETED", "Completed", "s", NOW, name="heron", job="heron-2")
JOBS = [Job("heron-1", "r", NOW), Job("heron-2", "r", NOW)]
ENDED = Pod("p", "r", "heron-2", NOW, memory="300Mi", end=End(NOW, 0, "Completed", peak=100 * MIB))
KILLED = replace(ENDED, name="k", job="heron-1", end=End(NOW, 137, "OOMKilled", oom=True))


def test_job_is_recorded_once_for_each_number_of_ended_pods() -> None:
    assert unrecorded_pods(JOBS, [ENDED, replace(ENDED, name="live", end=None)]) == {"heron-2": (ENDED,)}
    recorded = [replace(job, recorded_pods=1) for job in JOBS]
    assert unrecorded_pods(recorded, [ENDED, KILLED]) == {}
    again = replace(ENDED, name="again")
    assert unrecorded_pods(recorded, [ENDED, again]) == {"heron-2": (ENDED, again)}
    assert unrecorded_pods([], [ENDED]) == {}, "its Job is gone, so no annotation could mark the record"


@pytest.mark.parametrize(
    ("type_", "job", "recorded"),
    [
        ("COMPLETED", "heron-2", ["heron-1", "heron-2"]),
        ("CRASHED", "heron-2", ["heron-1", "heron-2"]),
        ("RUNNING", "heron-2", ["heron-1"]),  # the record of heron-2 would compete with a worker's labels
        ("RUNNING", "", []),
        ("SCHEDULED", "heron-1", []),
        ("PENDING", "heron-1", []),
    ],
)
def test_no_record_while_worker_may_write_labels(type_: str, job: str, recorded: list[str]) -> None:
    found = build_pod_records(replace(RUN, type=type_, job=job), JOBS, [ENDED, KILLED])
    assert sorted(record.job for record in found) == recorded


def test_job_of_deleted_run_is_recorded_without_run() -> None:
    assert [record.run for record in build_pod_records(None, JOBS, [ENDED])] == [None]


def test_labels_have_highest_memory_of_all_pods() -> None:
    assert PodRecord(RUN, "heron-2", (ENDED,)).labels == {PEAK_LABEL: 100 * MIB}
    assert PodRecord(RUN, "heron-1", (KILLED,)).labels == {PEAK_LABEL: 300 * MIB, EXCEEDED_LABEL: 300 * MIB}
    more = replace(RUN, labels={PEAK_LABEL: 400 * MIB})
    assert PodRecord(more, "heron-1", (ENDED, KILLED)).labels == {EXCEEDED_LABEL: 300 * MIB}
    unknown_peak = replace(ENDED, end=End(NOW, 137, "Error"))
    assert PodRecord(RUN, "heron-2", (unknown_peak,)).labels == {}


class Pool:
    """Creates a work pool, and runs with Jobs in a namespace.

    No node executes their pods. The methods write the status of a pod to the Kubernetes API, as a kubelet does.
    """

    def __init__(self, api: httpx.Client, namespace: Namespace, proxy: str) -> None:
        self.api, self.namespace, self.proxy = api, namespace, proxy
        self.name = f"ends-{uuid4().hex[:6]}"
        self.cluster = namespace.kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}")
        """The identity of the cluster, which its worker writes into the labels of runs."""
        self.id = self.ask("POST", "/work_pools/", name=self.name, type="kubernetes")["id"]
        flow = self.ask("POST", "/flows/", name=self.name)["id"]
        made = self.ask("POST", "/deployments/", name="d", flow_id=flow, work_pool_name=self.name)
        self.deployment = made["id"]

    def ask(self, method: str, path: str, **body: Any) -> Any:
        return asked(self.api, method, path, body)

    def run(self, *states: str) -> dict[str, Any]:
        made = self.ask("POST", f"/deployments/{self.deployment}/create_flow_run", state={"type": "SCHEDULED"})
        for type_ in states:
            self.ask("POST", f"/flow_runs/{made['id']}/set_state", state={"type": type_}, force=True)
        self.ask("PATCH", f"/flow_runs/{made['id']}/labels", **{CLUSTER_LABEL: self.cluster})
        return dict(made)

    def labels(self, run: dict[str, Any]) -> dict[str, Any]:
        return dict(self.ask("GET", f"/flow_runs/{run['id']}")["labels"])

    def job(self, run: dict[str, Any], number: int = 1) -> str:
        """Create a Job as a worker does, and return its name once its pod exists."""
        name = f"{run['id']}-{number}"
        labels = {RUN_LABEL: run["id"], POOL_LABEL: self.id}
        container = {
            "name": "prefect-job", "image": images.BASE, "command": ["true"], "securityContext": RESTRICTED,
            "resources": {"requests": {"cpu": "10m"}, "limits": {"memory": "300Mi"}},
        }  # fmt: skip
        spec = {"containers": [container], "restartPolicy": "Never", "nodeSelector": {"no": "node"}}
        template = {"metadata": {"labels": labels}, "spec": spec}
        self.namespace.apply(
            {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": name, "labels": labels},
                "spec": {"backoffLimit": 0, "template": template},
            }
        )
        wait_until(lambda: self._pods(name), f"the pod of {name}")
        return name

    def _pods(self, job: str) -> list[str]:
        return self.namespace.kubectl("get", "pods", "-l", f"job-name={job}", "-o", "name").split()

    def end_pod(self, job: str, code: int, reason: str, **report: int | str) -> str:
        """End the pod of a Job as a kubelet does, and wait for the end of the Job. Return the pod's name."""
        # The time has no fractions. A pod that ends in the second in which its run began would have an unknown order.
        now = f"{datetime.now(UTC) + timedelta(seconds=1):%Y-%m-%dT%H:%M:%SZ}"
        message = json.dumps(report) if report else ""
        end = {"exitCode": code, "reason": reason, "startedAt": now, "finishedAt": now, "message": message}
        return self._set_final_status(job, "Failed" if code else "Succeeded", {"terminated": end})

    def lose_node(self, job: str) -> None:
        """Fail the pod of a Job as the control plane does when its node is gone."""
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        target = {
            "type": "DisruptionTarget", "status": "True", "reason": "DeletionByPodGC", "message": "PodGC: node is gone",
            "lastTransitionTime": now,
        }  # fmt: skip
        self._set_final_status(job, "Failed", {"running": {"startedAt": now}}, conditions=[target])

    def start_pod(self, job: str) -> None:
        """Start the pod of a Job as a kubelet does."""
        self._set_status(job, "Running", {"running": {"startedAt": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"}})

    def _set_final_status(self, job: str, phase: str, state: dict[str, Any], **status: Any) -> str:
        pod = self._set_status(job, phase, state, **status)
        over = 'jsonpath={.status.conditions[?(@.status=="True")].type}'
        wait_until(
            lambda: {"Failed", "Complete"} & {*self.namespace.kubectl("get", "job", job, "-o", over).split()},
            f"{job} to be finished",
        )
        return pod

    def _set_status(self, job: str, phase: str, state: dict[str, Any], **status: Any) -> str:
        [pod] = self._pods(job)
        container = {"name": "prefect-job", "image": "i", "imageID": "i", "ready": False, "restartCount": 0}
        status |= {"phase": phase, "containerStatuses": [container | {"state": state}]}
        patch = json.dumps({"status": status})
        self.namespace.kubectl("patch", pod, "--subresource=status", "--type=merge", "-p", patch)
        return pod.removeprefix("pod/")

    def recorded(self, job: str) -> str:
        found = json.loads(self.namespace.kubectl("get", "job", job, "-o", "json"))
        return str(found["metadata"].get("annotations", {}).get(NOTED_ANNOTATION, ""))

    def round(self, policy: Policy | None = None) -> list[str]:
        """Run one round of a new reconciler, and return its requests to the Prefect API."""
        return self.rounds(lambda: None, policy=policy)[0]

    def rounds(self, *after: Callable[[], object], policy: Policy | None = None) -> list[list[str]]:
        """Run rounds of one reconciler, and return the requests of each round to the Prefect API.

        Args:
            after: what to do after each round.
            policy: of the reconciler; by default `Policy()`.
        """
        asked_for: list[list[str]] = []

        async def note(request: httpx.Request) -> None:
            asked_for[-1].append(f"{request.method} {request.url.path.removeprefix('/api')}")

        async def run_rounds() -> None:
            async with prefect.connected() as server, kubernetes.connected(self.namespace.name, self.proxy) as cluster:
                server.client.event_hooks["request"].append(note)
                reconciler = Reconciler(server, [cluster], self.name, policy or Policy(), None, Pulse(60))
                for action in after:
                    asked_for.append([])
                    await reconciler.round()
                    await asyncio.to_thread(action)

        asyncio.run(run_rounds())
        return asked_for


@pytest.fixture
def pool(prefect_server: str, namespace: Namespace) -> Iterator[Pool]:
    port = free_port()
    proxy = subprocess.Popen(
        ["kubectl", "--context", namespace.context, "proxy", f"--port={port}"],
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{url}/version").is_success
        return False

    try:
        wait_until(answers, "kubectl proxy")
        with client_of(prefect_server) as api:
            yield Pool(api, namespace, url)
    finally:
        proxy.terminate()
        proxy.wait()


def test_ended_pods_are_recorded_once_and_cost_no_later_request(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    """That includes completed runs. A new reconciler knows what an earlier one has recorded."""
    idle = pool.round()
    runs = [pool.run("RUNNING", "COMPLETED") for _ in range(3)]
    jobs = [pool.job(run) for run in runs]
    pods = [pool.end_pod(job, 0, "Completed", peak=number * MIB) for number, job in enumerate(jobs, 100)]
    gone = pool.run("RUNNING", "COMPLETED")
    jobs.append(pool.job(gone))
    pool.end_pod(jobs[-1], 0, "Completed", peak=MIB)
    pool.ask("DELETE", f"/flow_runs/{gone['id']}")

    pool.round()
    assert [pool.labels(run)[PEAK_LABEL] for run in runs] == [100 * MIB, 101 * MIB, 102 * MIB]
    assert [pool.recorded(job) for job in jobs] == ["1"] * 4
    assert pool.round() == idle, "the requests of a round grow with the number of ended runs"

    capsys.readouterr()

    def lines() -> list[str]:
        assert main(["why", runs[0]["id"], "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["timeline"]
        return [entry["text"] for entry in found if entry["who"] == "pod"]

    wait_until(lines, "the event")
    assert lines() == [
        f"{pods[0]} created",
        f"{pods[0]} started",
        f"{pods[0]} ended: Completed, exit code 0, with at most 100 MiB of memory",
    ]


def test_oom_raises_memory_need_also_after_successful_retry(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    run = pool.run("RUNNING", "CRASHED")
    first = pool.job(run)
    pool.ask("PATCH", f"/flow_runs/{run['id']}", infrastructure_pid=f"{pool.namespace.name}:{first}")
    pool.end_pod(first, 137, "OOMKilled")
    asked_for = pool.round()
    found = pool.ask("GET", f"/flow_runs/{run['id']}")
    assert (found["state_name"], found["job_variables"]) == ("AwaitingRetry", {"memory_limit": "450Mi"})
    assert pool.recorded(first) == "1"
    retried_at = asked_for.index(f"POST /flow_runs/{run['id']}/set_state")
    assert asked_for.index("POST /events") < retried_at, "recorded after a worker may have claimed the run"
    assert pool.labels(run)[PEAK_LABEL] == pool.labels(run)[EXCEEDED_LABEL] == 300 * MIB
    pool.ask("POST", f"/flow_runs/{run['id']}/set_state", state={"type": "RUNNING"}, force=True)
    second = pool.job(run, 2)
    pool.end_pod(second, 0, "Completed", peak=100 * MIB)
    pool.ask("POST", f"/flow_runs/{run['id']}/set_state", state={"type": "COMPLETED"}, force=True)
    pool.round()
    assert pool.recorded(second) == "1"
    assert pool.labels(run)[PEAK_LABEL] == 300 * MIB
    capsys.readouterr()
    main(["memory", f"{pool.name}/d", "--json"])
    [found] = json.loads(capsys.readouterr().out)
    assert (found["killed"], found["most"]) == (1, 450 * MIB)


@pytest.mark.parametrize(
    ("states", "end"),
    [
        (["RUNNING"], "CRASHED"),
        pytest.param(["RUNNING", "CANCELLING"], "CANCELLED", marks=pytest.mark.further),
    ],
)
def test_run_of_lost_node_is_fenced(pool: Pool, states: list[str], end: str) -> None:
    """The pod of a lost node is Failed for some time before Kubernetes removes it."""
    run = pool.run(*states)
    job = pool.job(run)
    pool.lose_node(job)

    def ended() -> bool:
        pool.round()
        return str(pool.ask("GET", f"/flow_runs/{run['id']}")["state"]["type"]) == end

    wait_until(ended, f"the run to be {end}")
    assert pool.labels(run)[FENCED_LABEL_PREFIX + job] is True


def test_steady_run_is_not_read_until_it_changes(pool: Pool) -> None:
    runs = [pool.run("RUNNING") for _ in range(3)]
    jobs = [pool.job(started_run) for started_run in runs]
    for run, job in zip(runs, jobs, strict=True):
        pool.start_pod(job)
        pool.ask("PATCH", f"/flow_runs/{run['id']}", infrastructure_pid=f"{pool.namespace.name}:{job}")
    dies, retried, deleted = runs

    def state(run: dict[str, Any]) -> dict[str, Any]:
        return dict(pool.ask("GET", f"/flow_runs/{run['id']}")["state"])

    def pods_die() -> None:
        pool.end_pod(jobs[0], 137, "Error")
        # The engine retries within its run attempt. Then that run attempt dies too.
        pool.ask("POST", f"/flow_runs/{retried['id']}/set_state", state={"type": "RUNNING"}, force=True)
        pool.end_pod(jobs[1], 137, "Error")

    def crashed() -> None:
        assert state(dies)["type"] == "CRASHED"
        assert state(retried)["type"] == "RUNNING", "an action for a state that the run has left"

    def both() -> None:
        assert state(retried)["type"] == "CRASHED"
        pool.ask("DELETE", f"/flow_runs/{deleted['id']}")

    first, second, *_ = pool.rounds(lambda: None, pods_die, crashed, both, lambda: None)
    assert sorted(second) == sorted([*first, "POST /flow_runs/count"])
    with pytest.raises(ClusterError, match="not found"):
        pool.namespace.kubectl("get", "job", jobs[2])


@pytest.mark.parametrize("state", [pytest.param("AwaitingRetry", marks=pytest.mark.further), "Paused"])
def test_run_whose_process_waits_is_retried_without_its_pod(pool: Pool, state: str) -> None:
    """A process waits before it retries its flow, or for a person. Workers do not claim the run when it is gone."""
    run = pool.run("RUNNING")
    job = pool.job(run)
    pool.start_pod(job)
    path, policy = f"/flow_runs/{run['id']}", {"retries": 1, "retry_delay": 600}
    pool.ask("PATCH", path, infrastructure_pid=f"{pool.namespace.name}:{job}", empirical_policy=policy)
    given: dict[str, Any] = {"type": "FAILED"}
    if state == "Paused":
        given = {"type": "PAUSED", "state_details": {"pause_timeout": "2100-01-01T00:00:00Z"}}
    pool.ask("POST", f"{path}/set_state", state=given)

    def read() -> dict[str, Any]:
        return dict(pool.ask("GET", path))

    waiting = read()
    assert waiting["state"]["name"] == state
    pool.round()
    assert read()["state"]["id"] == waiting["state"]["id"]
    pool.namespace.kubectl("delete", "job", job)
    pool.namespace.kubectl("delete", "pods", "-l", f"job-name={job}", "--force", "--grace-period=0")

    def is_retried() -> bool:
        pool.round()
        return str(read()["state"]["message"]).startswith("Retry 1 of ")

    wait_until(is_retried, "the retry")
    assert read()["empirical_policy"]["retry_type"] == "reschedule"


def test_certificate_authority_is_rotated_during_a_run(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stays Running, and its end is still noticed, by the same reconciler and by a new one."""
    monkeypatch.setattr(kubernetes, "ACCOUNT", tmp_path)
    authority = tmp_path / "ca.crt"
    authority.write_text("old")
    runs = [pool.run("RUNNING") for _ in range(2)]
    jobs = [pool.job(started_run) for started_run in runs]
    for run, job in zip(runs, jobs, strict=True):
        pool.start_pod(job)
        pool.ask("PATCH", f"/flow_runs/{run['id']}", infrastructure_pid=f"{pool.namespace.name}:{job}")

    def states() -> list[str]:
        return [pool.ask("GET", f"/flow_runs/{run['id']}")["state"]["type"] for run in runs]

    def first_dies() -> None:
        assert states() == ["RUNNING", "RUNNING"]
        pool.end_pod(jobs[0], 137, "Error")

    pool.rounds(lambda: authority.write_text("new"), first_dies, lambda: None)
    assert states() == ["CRASHED", "RUNNING"]
    pool.end_pod(jobs[1], 137, "Error")
    pool.round()
    # The round has retried the first one.
    assert states() == ["SCHEDULED", "CRASHED"]


@pytest.mark.further
def test_run_with_unreadable_log_crashes(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an outage of the Kubernetes API, a kubelet may refuse that API's requests for half a minute."""

    async def refused(*_: object) -> str:
        raise ClusterError("The Kubernetes API answers 403 to GET /api/v1/namespaces/ns/pods/pod/log")

    monkeypatch.setattr(kubernetes.Cluster, "read_log_tail", refused)
    run = pool.run("RUNNING")
    pool.end_pod(pool.job(run), 137, "Error")
    pool.round()
    state = pool.ask("GET", f"/flow_runs/{run['id']}")["state"]
    assert state["type"] == "CRASHED"
    assert "exit code 137" in state["message"]


@pytest.mark.parametrize("lines", [5, pytest.param(0, marks=pytest.mark.further)])
def test_state_of_crashed_run_shows_log_lines_if_the_policy_allows(
    pool: Pool, monkeypatch: pytest.MonkeyPatch, lines: int
) -> None:
    async def read(_: object, __: Pod, number: int) -> str:
        return "\n".join(["customer 4711"] * number)

    monkeypatch.setattr(kubernetes.Cluster, "read_log_tail", read)  # no kubelet has a log of these pods
    run = pool.run("RUNNING")
    pool.end_pod(pool.job(run), 137, "Error")
    pool.round(Policy(log_lines=lines))
    message = pool.ask("GET", f"/flow_runs/{run['id']}")["state"]["message"]
    assert "exit code 137" in message
    assert message.count("customer 4711") == lines
    assert message.count("log") == bool(lines)


def test_hostile_objects_do_not_affect_other_runs(
    pool: Pool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user writes the annotation, the termination message, the run's labels and an invalid run id."""
    hostile = pool.run("RUNNING", "COMPLETED")
    job = pool.job(hostile)
    pool.namespace.kubectl("annotate", "job", job, f"{NOTED_ANNOTATION}=x")
    pool.ask("PATCH", f"/flow_runs/{hostile['id']}/labels", **{PEAK_LABEL: "x"})
    pool.end_pod(job, 0, "Completed", peak="x")
    pool.job({"id": "not-a-run"})
    crashing = pool.run("RUNNING", "CRASHED")
    pool.ask("PATCH", f"/flow_runs/{crashing['id']}/labels", **{"reconciler.crashes": "x"})
    dead = pool.run("RUNNING")
    pool.end_pod(pool.job(dead), 137, "Error")

    def state(run: dict[str, Any]) -> str:
        return str(pool.ask("GET", f"/flow_runs/{run['id']}")["state_name"])

    pool.round()
    assert [state(ended_run) for ended_run in (dead, crashing)] == ["Crashed", "AwaitingRetry"]
    assert pool.recorded(job) == "1"

    # The API refuses a request about one run.
    refused, dead = pool.run("RUNNING"), pool.run("RUNNING")
    for ended_run in (refused, dead):
        pool.end_pod(pool.job(ended_run), 137, "Error")

    async def refuse(server: Any, cluster: Any, action: Any, pods: list[Pod], lines: int) -> str:
        if isinstance(action, Crash) and action.run.id == refused["id"]:
            raise prefect.RefusedError("the server answers 422: labels: no", 422)
        return await carry_out(server, cluster, action, pods, lines)

    monkeypatch.setattr(loop, "carry_out", refuse)
    caplog.clear()
    pool.rounds(lambda: None, lambda: None)
    assert state(dead) in ("Crashed", "AwaitingRetry")
    assert state(refused) == "Running"
    shown = caplog.text
    assert shown.count(f"Run {refused['name']} is skipped in this round: the server answers 422: labels: no.") == 1
