"""Helpers of the fault tests: start runs, inject faults into them, and wait for their states."""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import images
from tests.cluster.namespace import RESTRICTED, Namespace
from tests.e2e.pace import GRACE_SECONDS, IS_SHIPPED
from tests.e2e.release import Object, Pool
from tests.e2e.runs import create_deployment, get_run, read, start_run, wait_for_log
from tests.parts import wait_until

POOL_RELEASE = "prefect-work-pool"

DETECTION_SECONDS = 15.0 if IS_SHIPPED else 120.0
"""Upper bound from an event to the state that reports it. At the shipped pace this is the documented bound. Next to
other tests a run takes a minute to end, but nothing else reports the event."""

RELEASE_SECONDS = 15.0 if IS_SHIPPED else 45.0
"""Upper bound from the end of a run attempt to the release of its slots. Their leases would expire after a minute."""

KUBELET_LAG = timedelta(seconds=5)
"""The share of `DETECTION_SECONDS` in which Kubernetes shows an event. A busy kubelet takes longer: then the bound
counts from this long before the kubelet's report."""

RECOVERY_SECONDS, POD_START_SECONDS = (30.0, 10.0) if IS_SHIPPED else (120.0, 40.0)
"""Upper bound from an API's return to the start of the runs that fell due during the outage, and the share of it that
the start of a pod takes. On a busy node workers poll later, and a pod takes longer to start."""

DURATIONS: list[str] = []
"""The durations that the current test measured, as sentences for its report."""

FLOW_FILE = Path(__file__).with_name("flow.py")

SIDECAR_VARIABLES, NATIVE_SIDECAR_VARIABLE = ("before", "after"), "native"
"""Job variables of the victims' pool: each adds a container to a run's pod, the last one to its init containers."""


def sidecars() -> Object:
    """Return job variables for two sidecars that outlive the main container, and for a native sidecar.

    Of the two, one sorts before the main container and one after it.
    """
    container = {
        "image": images.BASE, "command": ["sleep", "600"], "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "16Mi"}},
    }  # fmt: skip
    names = ("aaa-proxy", "zzz-proxy")
    regular = {variable: {"name": name} | container for variable, name in zip(SIDECAR_VARIABLES, names, strict=True)}
    return regular | {NATIVE_SIDECAR_VARIABLE: {"name": "native-proxy", "restartPolicy": "Always"} | container}


def fault_values(values: Object) -> Object:
    """Return the values of a pool that keeps results on a volume and runs neither sync nor drift detection."""
    changed = copy.deepcopy(values)
    changed["sync"] = {"files": []}
    changed["drift"] = {"enabled": False}
    changed["runs"]["terminationGracePeriodSeconds"] = GRACE_SECONDS
    changed["runs"]["results"] = {"storage": "volume", "volume": {"size": "100Mi"}}
    return changed


def deploy_victim(api: httpx.Client, pool: Pool, **fields: object) -> str:
    """Create a deployment of the flow `victim` and return its id."""
    return create_deployment(api, pool, entrypoint="/probe/flow.py:victim", **fields)


def list_states(api: httpx.Client, run: str) -> list[Object]:
    """Return the run's states, oldest first."""
    found = read(api, "GET", "/flow_run_states/", params={"flow_run_id": run})
    return sorted(found, key=lambda state: str(state["timestamp"]))


def find_state(api: httpx.Client, run: str, name: str) -> Object | None:
    """Return the run's first state with this name, or None."""
    return next((state for state in list_states(api, run) if state["name"] == name), None)


def wait_for_state(api: httpx.Client, run: str, name: str, seconds: float = DETECTION_SECONDS) -> Object:
    """Wait up to `seconds` for the run's first state with this name, and return the state."""
    state: Object = wait_until(lambda: find_state(api, run, name), f"{name} of {run}", seconds)
    return state


def assert_state_within(
    api: httpx.Client, run: str, name: str, since: datetime, seconds: float = DETECTION_SECONDS
) -> Object:
    """Return the run's first state with this name; assert that its timestamp is at most `seconds` after `since`."""
    state = wait_for_state(api, run, name, seconds + 60)
    assert_within(name, since, datetime.fromisoformat(str(state["timestamp"])), seconds)
    return state


def assert_within(what: str, since: datetime, until: datetime, seconds: float) -> None:
    """Record the duration from `since` to `until`, and assert that it is below `seconds`."""
    assert record_duration(what, since, until, f" (at most {seconds:.0f})") < seconds, DURATIONS


def record_duration(what: str, since: datetime, until: datetime, bound: str = "") -> float:
    """Return the seconds from `since` to `until`, and add them to the test's report."""
    seconds = (until - since).total_seconds()
    DURATIONS.append(f"{what} after {seconds:.1f} s{bound}")
    return seconds


def create_limit(api: httpx.Client, name: str) -> str:
    """Create a concurrency limit of one slot and return its name."""
    api.post("/v2/concurrency_limits/", json={"name": name, "limit": 1}).raise_for_status()
    return name


def count_taken_slots(api: httpx.Client, limit: str) -> int:
    """Return how many slots of a limit are taken. The limit of a tag has the name `tag:` and the tag."""
    return int(read(api, "GET", f"/v2/concurrency_limits/{limit}")["active_slots"])


def list_pods(pool: Pool, run: str) -> list[Object]:
    """Return the run's pods."""
    listed = pool.runs_namespace.kubectl("get", "pods", "-l", f"prefect.io/flow-run-id={run}", "-o", "json")
    found: list[Object] = json.loads(listed)["items"]
    return found


def start_running(api: httpx.Client, pool: Pool, deployment_id: str, **parameters: object) -> tuple[str, str]:
    """Start a run, wait until its flow logs, and return the run's id and its pod's name."""
    run = start_run(api, deployment_id, parameters=parameters)
    wait_for_log(api, run, "attempt 1 in", 300)
    [pod] = list_pods(pool, run)
    return run, str(pod["metadata"]["name"])


def end_ticking(pool: Pool, pod: str) -> None:
    """Let the flow `ticking` in a pod come to its end."""

    def is_written() -> bool:
        with contextlib.suppress(ClusterError):  # on a busy node `kubectl exec` may fail
            pool.runs_namespace.kubectl("exec", pod, "--", "touch", "/tmp/enough")  # noqa: S108 - in the pod
            return True
        return False

    wait_until(is_written, f"kubectl exec in {pod}")


def is_ending(pod: Object) -> bool:
    """Tell whether a pod is terminating or has ended."""
    return "deletionTimestamp" in pod["metadata"] or pod["status"]["phase"] in ("Succeeded", "Failed")


def first_claim_time(api: httpx.Client, run: str) -> datetime:
    """Return when a worker first claimed the run."""
    states = list_states(api, run)
    return datetime.fromisoformat(next(state["timestamp"] for state in states if state["type"] == "PENDING"))


def seconds_between(earlier: Object, later: Object) -> float:
    """Return the seconds from one state to another."""
    first, second = (datetime.fromisoformat(str(state["timestamp"])) for state in (earlier, later))
    return (second - first).total_seconds()


@contextlib.contextmanager
def scaled_to_zero(pool: Pool, component: str) -> Iterator[None]:
    """Scale a component of the release to zero replicas while the block lasts."""
    name = f"deployment/{POOL_RELEASE}-{component}"
    replicas = pool.namespace.kubectl("get", name, "-o", "jsonpath={.spec.replicas}")
    pool.namespace.kubectl("scale", name, "--replicas=0")
    # A terminating pod may not have received its signal yet, and works until then.
    wait_until(lambda: not pool.pods(component, terminating=True), f"{component} to be gone", 150)
    try:
        yield
    finally:
        pool.namespace.kubectl("scale", name, f"--replicas={replicas}")
        pool.namespace.kubectl("rollout", "status", name, "--timeout=300s")


def wait_until_completed(api: httpx.Client, run: str, seconds: float = 240) -> None:
    """Wait until the run is Completed; a crash before that does not end the wait.

    A slot that a run attempt has left behind would be free after five minutes.
    """
    wait_until(lambda: get_run(api, run)["state_type"] == "COMPLETED", f"run {run} to complete", seconds)


def assert_completed_by_one_retry(api: httpx.Client, run: str) -> list[Object]:
    """Assert that the run completes in its second run attempt, after exactly one retry, and return its states."""
    wait_until_completed(api, run)
    assert get_run(api, run)["run_count"] == 2
    listed = list_states(api, run)
    assert sum(state["name"] == "AwaitingRetry" for state in listed) == 1
    attempts = [line for line in wait_for_log(api, run, "the end") if line.startswith("attempt")]
    assert [line.split()[1] for line in attempts] == ["1", "2"]
    return listed


def force_delete(namespace: Namespace, *pods: str) -> None:
    """Delete pods without a grace period: their containers are killed."""
    namespace.kubectl("delete", "pod", *pods, "--force", "--grace-period=0", "--wait=false")


def evict(namespace: Namespace, pod: str) -> None:
    """Evict a pod by the Eviction API, as `kubectl drain` does."""
    metadata = {"name": pod, "namespace": namespace.name}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{namespace.name}/pods/{pod}/eviction"
    namespace.kubectl("create", "--raw", path, "-f", "-", text=json.dumps(eviction))


def leader_pod(pool: Pool) -> str:
    """Return the name of the reconciler's pod that holds the Lease; empty before the first one does."""
    lease = ("get", "lease", f"{POOL_RELEASE}-reconciler", "--ignore-not-found")
    return pool.namespace.kubectl(*lease, "-o", "jsonpath={.spec.holderIdentity}")


def visible_since(happened: datetime, seen: datetime) -> datetime:
    """Return the time from which `DETECTION_SECONDS` counts.

    Args:
        happened: the time of the event.
        seen: the time since which the Kubernetes API shows the event.
    """
    return max(happened, seen - KUBELET_LAG)


def wait_for_death(pool: Pool, pod: str) -> datetime:
    """Wait until the kubelet reports the end of a pod; return the time from which `DETECTION_SECONDS` counts."""

    def death() -> datetime | None:
        command = ("get", "pod", pod, "--ignore-not-found", "--show-managed-fields", "-o", "json")
        found = pool.runs_namespace.kubectl(*command)
        if not found:  # the pod was deleted before this look
            return datetime.now(UTC)
        read: Object = json.loads(found)
        for status in read["status"].get("containerStatuses", []):
            if status["name"] == "prefect-job" and (terminated := status["state"].get("terminated")):
                written = [
                    entry["time"] for entry in read["metadata"]["managedFields"] if entry["manager"] == "kubelet"
                ]
                return visible_since(*map(datetime.fromisoformat, (terminated["finishedAt"], max(written))))
        return None

    died: datetime = wait_until(death, f"the end of {pod}")
    return died


def kill_pod(pool: Pool, pod: str) -> datetime:
    """Kill all processes of a pod by SIGKILL, as the kernel does when a node is out of memory.

    No process of the pod can report its end.

    Returns:
        The time from which `DETECTION_SECONDS` counts.
    """

    def is_killed() -> bool:
        try:
            pool.runs_namespace.kubectl("exec", pod, "--", "python", "-c", "import os; os.kill(-1, 9)")
        except ClusterError as error:
            # The signal also ends the process that sends it. Any other failure means that nothing was killed.
            return bool(re.search("exit code 137|not found|completed pod|stopped", str(error)))
        return True

    wait_until(is_killed, f"kubectl exec in {pod}")
    return wait_for_death(pool, pod)


def is_settled(api: httpx.Client, run: str) -> bool:
    """Tell whether the reconciler decided not to retry the run."""
    return bool(get_run(api, run)["labels"].get("reconciler.settled"))


def start_stepwise(api: httpx.Client, pool: Pool) -> str:
    """Start a run of the flow `stepwise`, whose first attempt kills its process, and return the run."""
    return start_run(api, create_deployment(api, pool, entrypoint="/probe/flow.py:stepwise"))


def assert_no_task_is_repeated(api: httpx.Client, run: str) -> None:
    """Assert that the retry of a run of `stepwise` repeats no finished task, also not in subflows.

    The retry repeats the task that was interrupted, with the same idempotency key.
    """
    wait_until_completed(api, run, 480)
    body: Object = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
    subflows = read(api, "POST", "/flow_runs/filter", json=body)
    assert len(subflows) == 2
    assert {subflow["state_type"] for subflow in subflows} == {"COMPLETED"}
    [end] = [line for line in wait_for_log(api, run, "the end") if line.startswith("the end")]
    assert end == "the end: ['1 by 1', '2 by 1', '3 by 1', '4 by 2', '5 by 2']"
    body = {"logs": {"flow_run_id": {"any_": [run, *(subflow["id"] for subflow in subflows)]}}, "limit": 200}
    lines = [str(log["message"]).split() for log in read(api, "POST", "/logs/filter", json=body)]
    keys = {(line[1], line[4]): line[-1] for line in lines if line[0] == "step"}
    assert sorted(keys) == [("1", "1"), ("2", "1"), ("3", "1"), ("4", "1"), ("4", "2"), ("5", "2")]
    assert keys["4", "1"] == keys["4", "2"]
