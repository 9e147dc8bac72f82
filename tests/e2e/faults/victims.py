"""Runs that something happens to, and what is seen of it."""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import psutil

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import images
from tests.cluster.namespace import RESTRICTED, Namespace
from tests.e2e.pace import GRACE_SECONDS, IS_SHIPPED
from tests.e2e.release import Object, Pool
from tests.e2e.runs import deployment, logged, run_of, start
from tests.parts import wait_until

NAME = "prefect-work-pool"

SEEN = 15.0 if IS_SHIPPED else 45.0
"""Most seconds from an event to the state that reports it: the documented bound at the shipped pace. Beside other tests
it is a longer one, still shorter than a lease or a claim, which would otherwise end the run."""

LAG = timedelta(seconds=5)
"""What Kubernetes has of that to show it. A busy kubelet takes longer, and then it counts from so long before."""

BACK, START = (30.0, 10.0) if IS_SHIPPED else (60.0, 20.0)
"""Seconds from an API's return to when what fell due meanwhile has begun, at the most; and what its pod's start has of
that, which on a busy node takes longer."""

TOOK: list[str] = []
"""How soon it was said what happened in this test."""

FLOWS = Path(__file__).with_name("flow.py")

PLACES = ("before", "after")
"""Variables of the victims' pool: further containers of a run's pod."""


def sidecars() -> Object:
    """Return job variables for two sidecars that outlive the main container, whichever way the alphabet goes."""
    container = {
        "image": images.BASE, "command": ["sleep", "600"], "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "16Mi"}},
    }  # fmt: skip
    return {place: {"name": name} | container for place, name in zip(PLACES, ("aaa-proxy", "zzz-proxy"), strict=True)}


def watched(values: Object) -> Object:
    """Return the values of a pool whose runs keep their results, without what they do not need."""
    made = copy.deepcopy(values)
    made["sync"] = {"files": []}
    made["drift"] = {"enabled": False}
    made["runs"]["terminationGracePeriodSeconds"] = GRACE_SECONDS
    made["runs"]["results"] = {"storage": "volume", "volume": {"size": "100Mi"}}
    return made


def victim(api: httpx.Client, pool: Pool, **fields: object) -> str:
    """A deployment of the flow; its id."""
    return deployment(api, pool, entrypoint="/probe/flow.py:victim", **fields)


def states(api: httpx.Client, run: str) -> list[Object]:
    """The run's states, the first one first."""
    found = api.get("/flow_run_states/", params={"flow_run_id": run}).raise_for_status().json()
    return sorted(found, key=lambda each: str(each["timestamp"]))


def state_so_far(api: httpx.Client, run: str, name: str) -> Object | None:
    """The run's first state of that name, if it has had one."""
    return next((each for each in states(api, run) if each["name"] == name), None)


def state_named(api: httpx.Client, run: str, name: str, seconds: float = SEEN) -> Object:
    """The run's first state of that name, within some seconds."""
    made: Object = wait_until(lambda: state_so_far(api, run, name), f"{name} of {run}", seconds)
    return made


def said_in_time(api: httpx.Client, run: str, name: str, since: datetime, seconds: float = SEEN) -> Object:
    """The run's first state of that name, which has to be at most so many seconds younger than that."""
    made = state_named(api, run, name, 120)
    in_time(name, since, datetime.fromisoformat(str(made["timestamp"])), seconds)
    return made


def in_time(what: str, since: datetime, until: datetime, seconds: float) -> None:
    """As `took`, and at most so many seconds."""
    assert took(what, since, until, f" (at most {seconds:.0f})") < seconds, TOOK


def took(what: str, since: datetime, until: datetime, bound: str = "") -> float:
    """Seconds from one time to the other, which the report of the test says too."""
    seconds = (until - since).total_seconds()
    TOOK.append(f"{what} after {seconds:.1f} s{bound}")
    return seconds


def scarce(api: httpx.Client, name: str) -> str:
    """A new limit of one slot; its name."""
    api.post("/v2/concurrency_limits/", json={"name": name, "limit": 1}).raise_for_status()
    return name


def taken(api: httpx.Client, limit: str) -> int:
    """How many of a limit's slots are; for that of a tag, `tag:` and the tag."""
    return int(api.get(f"/v2/concurrency_limits/{limit}").raise_for_status().json()["active_slots"])


def pods(pool: Pool, run: str) -> list[Object]:
    """The run's pods."""
    listed = pool.namespace.kubectl("get", "pods", "-l", f"prefect.io/flow-run-id={run}", "-o", "json")
    found: list[Object] = json.loads(listed)["items"]
    return found


def under_way(api: httpx.Client, pool: Pool, deployment_id: str, **parameters: object) -> tuple[str, str]:
    """A run that logs already; its id and its pod."""
    run = start(api, deployment_id, parameters=parameters)
    logged(api, run, "execution 1", 300)
    [pod] = pods(pool, run)
    return run, str(pod["metadata"]["name"])


def ending(pod: Object) -> bool:
    """Whether a pod was told to end, or has."""
    return "deletionTimestamp" in pod["metadata"] or pod["status"]["phase"] in ("Succeeded", "Failed")


def claimed(api: httpx.Client, run: str) -> datetime:
    """When a worker took the run first."""
    return datetime.fromisoformat(next(each["timestamp"] for each in states(api, run) if each["type"] == "PENDING"))


def seconds_between(earlier: Object, later: Object) -> float:
    """From one state to another."""
    first, second = (datetime.fromisoformat(str(each["timestamp"])) for each in (earlier, later))
    return (second - first).total_seconds()


@contextlib.contextmanager
def without(pool: Pool, component: str) -> Iterator[None]:
    """The release without the pods of a component, while the block lasts."""
    name = f"deployment/{NAME}-{component}"
    replicas = pool.namespace.kubectl("get", name, "-o", "jsonpath={.spec.replicas}")
    pool.namespace.kubectl("scale", name, "--replicas=0")
    # Also those that are told to go: they may not have heard of it.
    wait_until(lambda: not pool.pods(component, ending=True), f"{component} to be gone", 150)
    try:
        yield
    finally:
        pool.namespace.kubectl("scale", name, f"--replicas={replicas}")
        pool.namespace.kubectl("rollout", "status", name, "--timeout=300s")


def completed(api: httpx.Client, run: str) -> None:
    """A crash in between is not the end."""
    wait_until(lambda: run_of(api, run)["state_type"] == "COMPLETED", f"run {run} to complete", 180)


def completed_by_a_retry(api: httpx.Client, run: str) -> list[Object]:
    """The states of a run that completed in its second execution, and of nothing else."""
    completed(api, run)
    assert run_of(api, run)["run_count"] == 2
    listed = states(api, run)
    assert sum(each["name"] == "AwaitingRetry" for each in listed) == 1
    executions = [line for line in logged(api, run, "the end") if line.startswith("execution")]
    assert [line.split()[1] for line in executions] == ["1", "2"]
    return listed


def force_deleted(namespace: Namespace, *pods: str) -> None:
    """Pods gone at once; their containers are killed."""
    namespace.kubectl("delete", "pod", *pods, "--force", "--grace-period=0", "--wait=false")


def evicted(namespace: Namespace, pod: str) -> None:
    """A pod asked to go by the API, as by a drain of its node."""
    metadata = {"name": pod, "namespace": namespace.name}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
    path = f"/api/v1/namespaces/{namespace.name}/pods/{pod}/eviction"
    namespace.kubectl("create", "--raw", path, "-f", "-", text=json.dumps(eviction))


def leader(pool: Pool) -> str:
    """The reconciler's pod that acts."""
    lease = json.loads(pool.namespace.kubectl("get", "lease", f"{NAME}-reconciler", "-o", "json"))
    return str(lease["spec"]["holderIdentity"])


def shown(happened: datetime, seen: datetime) -> datetime:
    """From when `SEEN` counts for what happened then and is seen in the Kubernetes API since then."""
    return max(happened, seen - LAG)


def death(pool: Pool, pod: str) -> datetime:
    """From when `SEEN` counts for the end of a pod, which the kubelet has told or is about to."""

    def told() -> datetime | None:
        command = ("get", "pod", pod, "--ignore-not-found", "--show-managed-fields", "-o", "json")
        found = pool.namespace.kubectl(*command)
        if not found:  # somebody has deleted it meanwhile
            return datetime.now(UTC)
        made: Object = json.loads(found)
        for each in made["status"].get("containerStatuses", []):
            if each["name"] == "prefect-job" and (terminated := each["state"].get("terminated")):
                wrote = [by["time"] for by in made["metadata"]["managedFields"] if by["manager"] == "kubelet"]
                return shown(*map(datetime.fromisoformat, (terminated["finishedAt"], max(wrote))))
        return None

    ended: datetime = wait_until(told, f"the end of {pod}", 120)
    return ended


def killed(pool: Pool, pod: str) -> datetime:
    """All of a pod's processes by SIGKILL, as when a node is in need: nothing of it can say so. Its `death`."""

    def dead() -> bool:
        try:
            pool.namespace.kubectl("exec", pod, "--", "python", "-c", "import os; os.kill(-1, 9)")
        except ClusterError as error:
            # What kills is a process of the pod as well; and what did not get there kills nobody.
            return bool(re.search("exit code 137|not found|completed pod|stopped", str(error)))
        return True

    wait_until(dead, f"kubectl exec in {pod}")
    return death(pool, pod)


def processes(run: str, job: str = "") -> list[int]:
    """Processes of this machine that execute a run, where the cluster is this machine; in a pod of that Job or any."""
    found = []
    for each in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = each.environ()
            if environment.get("PREFECT__FLOW_RUN_ID") == run and job in ("", environment.get("KUBERNETES_JOB")):
                found.append(each.pid)
    return found


def is_settled(api: httpx.Client, run: str) -> bool:
    """Whether it was said that the run is not tried again."""
    return bool(run_of(api, run)["labels"].get("reconciler.settled"))


def nothing_is_repeated(api: httpx.Client, pool: Pool) -> None:
    """Not even in a flow that the flow had called; what was half done is done again, with the same key."""
    run = start(api, deployment(api, pool, entrypoint="/probe/flow.py:stepwise"))
    completed(api, run)
    body: Object = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
    called = api.post("/flow_runs/filter", json=body).raise_for_status().json()
    assert len(called) == 2
    assert {each["state_type"] for each in called} == {"COMPLETED"}
    [end] = [line for line in logged(api, run, "the end") if line.startswith("the end")]
    assert end == "the end: ['1 by 1', '2 by 1', '3 by 1', '4 by 2', '5 by 2']"
    body = {"logs": {"flow_run_id": {"any_": [run, *(each["id"] for each in called)]}}, "limit": 200}
    lines = [str(each["message"]).split() for each in api.post("/logs/filter", json=body).raise_for_status().json()]
    taken = {(line[1], line[4]): line[-1] for line in lines if line[0] == "step"}
    assert sorted(taken) == [("1", "1"), ("2", "1"), ("3", "1"), ("4", "1"), ("4", "2"), ("5", "2")]
    assert taken["4", "1"] == taken["4", "2"]
