"""Tests that the main container alone decides about a pod into which an injector has put more containers."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.protocol import MAIN_CONTAINER_ANNOTATION, RUN_LABEL
from orchestration.reconciler import causes
from orchestration.reconciler.decide import Action, Cancelled, Crash, Explain, Retry, Stop, decide, is_steady
from orchestration.reconciler.kubernetes_objects import PodObject
from orchestration.reconciler.model import Job, Pod, Policy, Run
from tests.parts import examples

Json = dict[str, Any]

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
LEASE = "12345678-1234-5678-1234-567812345678"
MESSAGE = f'{{"leases": ["{LEASE}"], "peak": 1073741824}}'


def ago(seconds: float) -> str:
    return (NOW - timedelta(seconds=seconds)).isoformat()


def terminated(code: int, reason: str, message: str = "", seconds: float = 60) -> Json:
    times = {"startedAt": ago(3500), "finishedAt": ago(seconds)}
    return {"terminated": {"exitCode": code, "reason": reason, "message": message} | times}


RUNNING: Json = {"running": {"startedAt": ago(3500)}}
OOM = terminated(137, "OOMKilled", MESSAGE)
KILLED = terminated(137, "Error")
COMPLETED = terminated(0, "Completed", '{"peak": 1048576}')
ABSENT: Json = {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}}
CREATING: Json = {"waiting": {"reason": "PodInitializing"}}
MAIN = {"name": "prefect-job", "resources": {"limits": {"memory": "1Gi"}}}
MAIN_STATES = [RUNNING, OOM, KILLED, COMPLETED, ABSENT, CREATING]
SIDECAR_STATES = [
    RUNNING, terminated(0, "Completed"), terminated(137, "OOMKilled", '{"peak": 5, "leases": []}'),
    {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
]  # fmt: skip


def phase(main: Json, others: list[Json]) -> str:
    """Return the pod's phase as the kubelet computes it from its regular containers."""
    states = [main, *others]
    if any("waiting" in container_state for container_state in states):
        return "Pending"
    if any("running" in container_state for container_state in states):
        return "Running"
    return "Failed" if any(container_state["terminated"]["exitCode"] for container_state in states) else "Succeeded"


def pod(
    state: Json, regular: dict[str, Json] | None = None, native: dict[str, Json] | None = None,
    order: int = 0, main: Json = MAIN, annotations: dict[str, str] | None = None, **status: Any,
) -> Pod:  # fmt: skip
    """Read a pod with further containers next to the main container. The kubelet lists statuses by name.

    Args:
        state: the state of the main container.
        regular: states of further containers, by name.
        native: states of native sidecars, by name.
        order: how many of the further containers come before the main one in the pod's specification.
        main: the main container.
        annotations: the annotations of the pod.
        status: further fields of the pod's status.
    """
    regular, native = regular or {}, native or {}
    others = [{"name": name, "resources": {"limits": {"memory": "16Mi"}}} for name in regular]
    statuses = sorted((regular | {main["name"]: state}).items())
    raw = {
        "metadata": {
            "name": "heron-pod", "creationTimestamp": ago(3600), "annotations": annotations or {},
            "labels": {RUN_LABEL: "r", "job-name": "heron"},
        },
        "spec": {
            "containers": [*others[:order], main, *others[order:]], "nodeName": "node-1", "restartPolicy": "Never",
            "initContainers": [{"name": name, "restartPolicy": "Always"} for name in native],
        },
        "status": {
            "phase": phase(state, [*regular.values()]),
            "containerStatuses": [{"name": name, "state": value} for name, value in statuses],
            "initContainerStatuses": [{"name": name, "state": value} for name, value in native.items()],
        } | status,
    }  # fmt: skip
    return Pod.read(PodObject.model_validate(raw))


NAMES = st.sampled_from(["aaa-proxy", "istio-proxy", "prefect-jo", "prefect-job-agent", "zzz-log"])
INJECTED = st.dictionaries(NAMES, st.sampled_from(SIDECAR_STATES), max_size=3)


@given(st.sampled_from(MAIN_STATES), INJECTED, st.integers(0, 3))
@settings(max_examples=examples(2))
def test_pod_with_sidecars_is_read_like_pod_without(state: Json, injected: dict[str, Json], order: int) -> None:
    alone, together = pod(state), pod(state, injected, order=order)
    fields = ("has_started", "end", "waiting", "memory", "container", "started_at")
    assert [getattr(together, field) for field in fields] == [getattr(alone, field) for field in fields]
    is_sidecar_live = any("terminated" not in container_state for container_state in injected.values())
    assert together.has_live_sidecar == ("terminated" in state and is_sidecar_live)
    assert not alone.has_live_sidecar


@pytest.mark.parametrize("name", ["aaa-proxy", "zzz-proxy"])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("kind", ["regular", "native"])
@pytest.mark.parametrize(("state", "cause"), [(OOM, "oom"), (KILLED, "crash"), (terminated(0, "Completed"), "crash")])
def test_dead_main_container_crashes_run_and_its_job_is_deleted(
    name: str, order: int, kind: str, state: Json, cause: str
) -> None:
    ended = pod(state, **{kind: {name: RUNNING}}, order=order, phase="Running")  # type: ignore[arg-type]
    assert ended.has_live_sidecar
    job = Job("heron", "r", NOW - timedelta(seconds=3600), makes_one_pod=True, is_finished=True)
    [crash] = decided("RUNNING", job, ended)
    assert isinstance(crash, Crash)
    assert crash.cause.kind == cause
    assert crash.lost == (), "its end is confirmed"
    if cause == "oom":
        assert crash.cause.memory == "1Gi"
        assert "it used at most 1024 MiB" in crash.cause.sentence
        assert ended.end
        assert ended.end.leases == (LEASE,)
    assert {type(action) for action in decided("CRASHED", job, ended)} == {Retry, Stop}, "no container executes it"


@pytest.mark.parametrize("type_", ["COMPLETED", "FAILED", "CANCELLED", "SCHEDULED", "PAUSED", "CRASHED"])
def test_job_is_deleted_when_its_main_container_has_ended(type_: str) -> None:
    job = Job("heron", "r", NOW - timedelta(seconds=3600), makes_one_pod=True, is_finished=True)
    for name in ("aaa", "zzz"):
        held = pod(COMPLETED, {name: RUNNING})
        [stop] = [action for action in decided(type_, job, held) if isinstance(action, Stop)]
        assert (stop.job, stop.grace) == ("heron", None)
    fresh = pod(terminated(0, "Completed", seconds=1), native={"aaa": RUNNING}, phase="Running")
    assert not [action for action in decided(type_, job, fresh) if isinstance(action, Stop)], (
        "a native sidecar ends without help"
    )
    gone = pod(COMPLETED)
    assert not [action for action in decided(type_, job, gone) if isinstance(action, Stop)], (
        "its log is kept for a while"
    )


def test_job_that_kubernetes_retries_ends_with_a_pod_that_a_sidecar_holds_open() -> None:
    job = Job("heron", "r", NOW - timedelta(seconds=3600))
    [crash] = decided("RUNNING", job, pod(KILLED, {"zzz": RUNNING}))
    assert isinstance(crash, Crash)
    fresh = pod(terminated(137, "Error", seconds=1), {"zzz": RUNNING})
    [crash] = decided("RUNNING", Job("heron", "r", NOW - timedelta(seconds=3600), makes_one_pod=True), fresh)
    assert isinstance(crash, Crash), "Kubernetes makes no other pod"
    assert decided("RUNNING", job, fresh) == [], "the sidecar may be about to end, and Kubernetes to make another pod"


def test_cancelled_run_ends_though_its_sidecar_lives() -> None:
    job = Job("heron", "r", NOW - timedelta(seconds=3600), makes_one_pod=True, is_finished=True)
    [stop] = decided("CANCELLING", job, pod(KILLED, {"aaa": RUNNING}))
    assert isinstance(stop, Stop)
    deleted = Job("heron", "r", NOW - timedelta(seconds=3600), makes_one_pod=True, is_finished=True, is_deleted=True)
    [cancelled] = decided("CANCELLING", deleted, pod(KILLED, {"aaa": RUNNING}))
    assert isinstance(cancelled, Cancelled)


@pytest.mark.parametrize("name", ["aaa", "zzz"])
def test_bad_image_of_the_main_container_is_explained(name: str) -> None:
    job = Job("heron", "r", NOW - timedelta(seconds=60))
    stuck = pod(ABSENT, {name: RUNNING})
    assert not stuck.has_started
    [explain] = decided("PENDING", job, stuck)
    assert isinstance(explain, Explain)
    assert explain.state == "ImagePullBackOff"


def test_bad_image_of_a_sidecar_does_not_keep_the_run_from_running() -> None:
    running = pod(RUNNING, {"aaa": ABSENT})
    assert running.has_started
    job = Job("heron", "r", NOW - timedelta(seconds=60))
    assert decided("PENDING", job, running) == []
    assert is_steady(run("RUNNING"), [job], [running])


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (ABSENT, "ImagePullBackOff"),
        (
            {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off restarting failed container"}},
            "CrashLoopBackOff",
        ),
    ],
)
def test_native_sidecar_that_does_not_start_is_explained(state: Json, word: str) -> None:
    """The main container waits for it."""
    for native in ({"aaa": state}, {"aaa": RUNNING, "bbb": state}, {"aaa": CREATING, "bbb": state}):
        stuck = pod(CREATING, native=native)
        [explain] = decided("PENDING", Job("heron", "r", NOW - timedelta(seconds=60)), stuck)
        assert isinstance(explain, Explain)
        assert explain.state == word


def test_init_container_that_fails_is_named() -> None:
    failed = pod(CREATING, native={"fetch": terminated(3, "Error")}, phase="Failed")
    assert "init container fetch ended with exit code 3" in causes.cause_of_end([failed]).sentence


VARIABLE: Json = {"env": [{"name": "HOME", "value": "/"}, {"name": "PREFECT__FLOW_RUN_ID", "value": "r"}]}


@pytest.mark.parametrize(
    ("main", "annotations"),
    [
        (MAIN | {"name": "renamed"} | VARIABLE, {}),
        (MAIN | {"name": "renamed"} | VARIABLE, {MAIN_CONTAINER_ANNOTATION: "zzz"}),
        (MAIN | {"name": "other"}, {MAIN_CONTAINER_ANNOTATION: "other"}),
        (MAIN, {MAIN_CONTAINER_ANNOTATION: "zzz"}),
        (MAIN, {}),
    ],
)
def test_renamed_main_container_is_found(main: Json, annotations: dict[str, str]) -> None:
    for order in range(3):
        found = pod(OOM, {"aaa": RUNNING, "zzz": RUNNING}, order=order, main=main, annotations=annotations)
        assert found.container == main["name"]
        assert found.memory == "1Gi"
        assert found.end
        assert found.end.oom


def test_first_container_is_main_container_without_other_evidence() -> None:
    assert pod(RUNNING, {"aaa": RUNNING}, main=MAIN | {"name": "flow"}).container == "flow"


def test_container_that_is_restarted_in_its_pod_has_not_ended() -> None:
    raw: Json = {
        "metadata": {"name": "p", "creationTimestamp": ago(9), "labels": {RUN_LABEL: "r"}},
        "spec": {"containers": [MAIN], "restartPolicy": "OnFailure"},
        "status": {"phase": "Running", "containerStatuses": [{"name": "prefect-job", "state": KILLED}]},
    }
    assert Pod.read(PodObject.model_validate(raw)).is_live
    raw["status"]["containerStatuses"][0]["state"] = COMPLETED
    assert not Pod.read(PodObject.model_validate(raw)).is_live
    raw["status"]["containerStatuses"][0]["state"] = KILLED
    del raw["spec"]["restartPolicy"]
    assert not Pod.read(PodObject.model_validate(raw)).is_live, (
        "a Job's pod has no other policy than OnFailure and Never"
    )


def run(type_: str) -> Run:
    since = NOW - timedelta(seconds=30 if type_ == "RUNNING" else 20)
    return Run("r", type_, type_.title(), "s", since, name="heron", deployment="d", namespace="ns", job="heron")


def decided(type_: str, job: Job, pod: Pod) -> list[Action]:
    return decide(run(type_), [job], [pod], NOW, Policy())


@pytest.mark.parametrize(
    "reason",
    ["OutOfcpu", "OutOfmemory", "OutOfpods", "OutOfnvidia.com/gpu", "NodeAffinity", "UnexpectedAdmissionError"],
)
def test_pod_that_the_kubelet_refuses_has_not_begun(reason: str) -> None:
    """What never started draws on no crash budget."""
    refused: Json = {"phase": "Failed", "reason": reason, "message": "Pod was rejected", "containerStatuses": []}
    found = pod(CREATING, **refused)
    assert causes.cause_of_end([found]).kind == "disruption"
    failed = {"name": "init", "state": terminated(1, "Error")}
    found = pod(CREATING, **refused, initContainerStatuses=[failed])
    assert causes.cause_of_end([found]).kind == "crash"


def test_run_attempt_that_got_no_answer_of_the_api_has_not_begun() -> None:
    found = pod(terminated(137, "Error", '{"not_begun": 1, "peak": 1048576}'))
    assert causes.cause_of_end([found]).kind == "disruption"
