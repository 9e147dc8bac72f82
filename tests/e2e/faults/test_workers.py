"""Runs with several workers or none, and results in other storage."""

import contextlib
import copy
import json
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import httpx
import pytest

from orchestration.operations.local_cluster import binaries, images
from tests.cluster.namespace import Namespace
from tests.e2e.faults.victims import (
    DETECTION_SECONDS,
    POOL_RELEASE,
    RECOVERY_SECONDS,
    assert_completed_by_one_retry,
    assert_state_within,
    assert_within,
    deploy_victim,
    end_ticking,
    evict,
    is_ending,
    kill_pod,
    list_pods,
    list_states,
    record_duration,
    scaled_to_zero,
    start_running,
    wait_for_state,
    wait_until_completed,
)
from tests.e2e.light_runs import LIGHT_RUN
from tests.e2e.pace import GRACE_SECONDS, HEARTBEAT_SECONDS, PENDING_TIMEOUT_SECONDS, WORKER_OUTAGE_SECONDS
from tests.e2e.release import Object, Pool, Release, merge_values
from tests.e2e.runs import create_deployment, get_run, read, start_run, wait_until_ended
from tests.parts import wait_until

ROOM = "example.com/room"
"""A resource of the node, of which each of these runs takes one."""


def set_room(context: str, number: int) -> None:
    """Set how much of the resource `ROOM` the node has."""
    room = {ROOM: str(number)}
    patch = json.dumps({"status": {"capacity": room, "allocatable": room}})
    for node in binaries.kubectl("--context", context, "get", "nodes", "-o", "name").split():
        binaries.kubectl("--context", context, "patch", node, "--subresource=status", "--type=merge", "-p", patch)


@pytest.fixture(scope="module")
def values(values: Object, cluster: str) -> Iterator[Object]:
    set_room(cluster, 1000)
    heartbeat = {"worker": {"heartbeatSeconds": HEARTBEAT_SECONDS}}
    yield merge_values(values, heartbeat | {"runs": {"resources": {"limits": {ROOM: 1}}}})
    set_room(cluster, 0)


@pytest.mark.further
def test_two_workers_execute_each_run_once(pool: Pool, api: httpx.Client) -> None:
    number, at_once = 10, 6
    worker = f"deployment/{POOL_RELEASE}-worker"
    pool.namespace.kubectl("scale", worker, "--replicas=2")
    try:
        pool.namespace.kubectl("rollout", "status", worker, "--timeout=300s")
        # This test and the next one count the Jobs.
        deployment = deploy_victim(api, pool, job_variables=LIGHT_RUN | {"finished_job_ttl": 3600})
        runs: list[str] = []
        body = {
            "deployments": {"id": {"any_": [deployment]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}},
        }

        def start_as_room_permits() -> bool:
            # Not all at once: the node is small, and other tests use it.
            free = at_once - int(read(api, "POST", "/flow_runs/count", json=body))
            runs.extend(start_run(api, deployment) for _ in range(min(free, number - len(runs))))
            return len(runs) == number

        def find_workers() -> set[str]:
            return {str(get_run(api, run)["labels"].get("prefect.worker.name")) for run in runs} - {"None"}

        def have_both_claimed() -> bool:
            if len(find_workers()) < 2:
                runs.append(start_run(api, deployment))
                wait_until_ended(api, runs[-1])
            return len(find_workers()) == 2

        wait_until(start_as_room_permits, "all runs to be started", 600)
        # A worker on its own may have been the first each time.
        wait_until(have_both_claimed, "the other worker to claim a run", 300)
        for run in runs:
            assert (wait_until_ended(api, run)["state_type"], get_run(api, run)["run_count"]) == ("COMPLETED", 1)
            assert sum(state["type"] == "PENDING" for state in list_states(api, run)) <= 2  # Pending, Submitting
        jobs = json.loads(pool.namespace.kubectl("get", "jobs", "-o", "json"))["items"]
        executed = [job["metadata"]["labels"].get("prefect.io/flow-run-id") for job in jobs]
        assert sorted(run for run in executed if run in runs) == sorted(runs)
    finally:
        pool.namespace.kubectl("scale", worker, "--replicas=1")


@contextlib.contextmanager
def exhausted_quota(pool: Pool, kind: str, name: str) -> Iterator[None]:
    """Limit the namespace to the current number of objects of a kind while the block lasts.

    Args:
        pool: the release of the work pool.
        kind: the kind of the objects, as kubectl takes it.
        name: the resource of the quota that limits this kind.
    """

    def list_unless_some_go() -> list[Object]:
        """Return the objects; none while some are terminating, as these would make room."""
        found: list[Object] = json.loads(pool.namespace.kubectl("get", kind, "-o", "json"))["items"]
        return [] if any("deletionTimestamp" in listed_object["metadata"] for listed_object in found) else found

    listed = wait_until(list_unless_some_go, f"no {kind} to be terminating")
    used = sum(found["status"].get("phase") not in ("Succeeded", "Failed") for found in listed)
    spec = {"hard": {name: str(used)}}
    pool.namespace.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"}, "spec": spec})
    try:
        read_usage = ("get", "resourcequota", "full", "-o", "jsonpath={.status.used}")
        wait_until(lambda: pool.namespace.kubectl(*read_usage), "the quota to count")
        yield
    finally:
        pool.namespace.kubectl("delete", "resourcequota", "full")


def test_runs_over_quota_wait_for_room(pool: Pool, api: httpx.Client) -> None:
    """The quota refuses the Job of the first run and the pod of the second. Neither run has a retry."""
    deployment = deploy_victim(api, pool, job_variables=LIGHT_RUN | {"crash_retries": 0})
    container = {"name": "main", "image": "none"}
    idle = {"parallelism": 0, "template": {"spec": {"containers": [container], "restartPolicy": "Never"}}}
    # With a quota of zero no Job would ever have room.
    pool.namespace.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "idle"}, "spec": idle})
    for kind, name, state in (("jobs", "count/jobs.batch", "JobRefused"), ("pods", "pods", "PodRefused")):
        with exhausted_quota(pool, kind, name):
            run = start_run(api, deployment)
            assert "exceeded quota: full" in wait_for_state(api, run, state, 180)["message"]
            time.sleep(PENDING_TIMEOUT_SECONDS + 5)
            assert get_run(api, run)["state_type"] == "PENDING"
        wait_until_completed(api, run)
        assert get_run(api, run)["run_count"] == 1
        assert not get_run(api, run)["labels"].get("reconciler.crashes")
        wait_until(lambda run=run: all(map(is_ending, list_pods(pool, run))), "its pod to end")  # type: ignore[misc]


@pytest.mark.further
def test_scheduled_run_waits_until_a_full_cluster_has_room(pool: Pool, api: httpx.Client) -> None:
    """The run has no retry. It waits for longer than the pending timeout, which is for causes that a person cures."""
    minutely = {"schedule": {"interval": 60, "anchor_date": datetime.now(UTC).isoformat()}}
    deployment = deploy_victim(api, pool, schedules=[minutely], job_variables=LIGHT_RUN | {"crash_retries": 0})
    own = {"deployments": {"id": {"any_": [deployment]}}}
    first = own | {"sort": "EXPECTED_START_TIME_ASC", "limit": 1}
    started = own | {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING"]}}}}
    set_room(pool.namespace.context, 0)
    try:
        [found] = wait_until(lambda: read(api, "POST", "/flow_runs/filter", json=first), "the scheduled run")
        run = str(found["id"])
        assert f"Insufficient {ROOM}" in wait_for_state(api, run, "Unschedulable", 240)["message"]
        api.patch(f"/deployments/{deployment}", json={"paused": True}).raise_for_status()
        time.sleep(PENDING_TIMEOUT_SECONDS + 5)
        assert get_run(api, run)["state_type"] == "PENDING"
    finally:
        set_room(pool.namespace.context, 1000)
    wait_until_completed(api, run)
    assert get_run(api, run)["run_count"] == 1
    assert get_run(api, run)["auto_scheduled"]
    assert not get_run(api, run)["labels"].get("reconciler.crashes")
    # The schedule may have started more runs before it was paused.
    wait_until(lambda: not read(api, "POST", "/flow_runs/count", json=started), "its other runs to end", 300)


def test_runs_complete_crash_and_are_cancelled_while_no_worker_exists(pool: Pool, api: httpx.Client) -> None:
    """A worker that dies right after its claim leaves a run without a Job. The reconciler releases the claim."""
    deployment = deploy_victim(api, pool)
    ticking = create_deployment(api, pool, entrypoint="/probe/flow.py:ticking")
    completing, completing_pod = start_running(api, pool, ticking, times=600)
    killed, pod = start_running(api, pool, deployment, seconds=300)
    unwanted, _ = start_running(api, pool, deployment, seconds=900)
    began = time.monotonic()
    with scaled_to_zero(pool, "worker"):
        gone = datetime.now(UTC)
        end_ticking(pool, completing_pod)
        died = kill_pod(pool, pod)
        assert_state_within(api, killed, "Crashed", died)
        assert_state_within(api, killed, "AwaitingRetry", died, 2 * DETECTION_SECONDS)
        light = deploy_victim(api, pool, job_variables=LIGHT_RUN)
        due, claimed = start_run(api, light), start_run(api, light)
        api.post(f"/flow_runs/{claimed}/set_state", json={"state": {"type": "PENDING"}}).raise_for_status()
        cancelled = datetime.now(UTC)
        api.post(f"/flow_runs/{unwanted}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
        assert_state_within(api, unwanted, "Cancelled", cancelled, GRACE_SECONDS + DETECTION_SECONDS)
        wait_until(lambda: all(map(is_ending, list_pods(pool, unwanted))), "its pod to end")
        assert wait_until_ended(api, completing)["state_type"] == "COMPLETED"
        assert datetime.fromisoformat(get_run(api, completing)["end_time"]) > gone

        def is_released() -> bool:
            # The server calls the run Late soon afterwards.
            scheduled = [state for state in list_states(api, claimed) if state["type"] == "SCHEDULED"]
            return any("No worker made a Job" in (state["message"] or "") for state in scheduled)

        wait_until(is_released, "the claim to be released", 60 + 45 + DETECTION_SECONDS)
        time.sleep(max(0, WORKER_OUTAGE_SECONDS - (time.monotonic() - began)))
    back = datetime.now(UTC)
    for run in (killed, due):
        wait_until_completed(api, run)
        begun = max(
            datetime.fromisoformat(state["timestamp"]) for state in list_states(api, run) if state["type"] == "RUNNING"
        )
        assert_within("the run begins", back, begun, 2 * RECOVERY_SECONDS)
    wait_until_completed(api, claimed)
    assert_completed_by_one_retry(api, killed)
    for run in (completing, due, claimed):
        assert get_run(api, run)["run_count"] == 1


def wait_for_warm_pod(pool: Pool) -> str:
    """Wait until a warm pod waits for a run, and return its name."""

    def find_ready() -> list[str]:
        listed = pool.runs_namespace.kubectl("get", "pods", "-l", "reconciler.warm=waiting", "-o", "json")
        return [
            str(pod["metadata"]["name"])
            for pod in json.loads(listed)["items"]
            if {"type": "Ready", "status": "True"}.items() <= _ready_condition(pod).items()
        ]

    return str(wait_until(find_ready, "a warm pod", 300)[0])


def _ready_condition(pod: Object) -> Object:
    conditions: list[Object] = pod["status"].get("conditions", [])
    return next((condition for condition in conditions if condition["type"] == "Ready"), {})


@pytest.mark.further
def test_runs_in_warm_pods_survive_faults(pool: Pool, api: httpx.Client, values: Object) -> None:
    """Each run takes the pod that waits, and another pod takes its place. Other job variables need another pod.

    The next test deploys the pool without warm pods.
    """
    runs = {"warm": {"replicas": 1}, "resources": {"limits": {"memory": "300Mi"}}}
    pool.deploy(merge_values(values, {"runs": runs}))
    pool.wait_for_one_worker()
    victim = deploy_victim(api, pool)

    def start_warm(**parameters: object) -> tuple[str, str]:
        waiting = wait_for_warm_pod(pool)
        run, pod = start_running(api, pool, victim, **parameters)
        assert pod == waiting
        states = {state["name"]: datetime.fromisoformat(state["timestamp"]) for state in list_states(api, run)}
        record_duration("Running in a warm pod", states["Pending"], states["Running"])
        return run, pod

    run, pod = start_warm(seconds=300)
    crashed = assert_state_within(api, run, "Crashed", kill_pod(pool, pod))
    assert f"Pod {pod} on " in crashed["message"]
    assert "ended with exit code 137 (SIGKILL)" in crashed["message"]
    assert_completed_by_one_retry(api, run)

    run, pod = start_warm(seconds=300)
    began = datetime.now(UTC)
    evict(pool.runs_namespace, pod)
    assert_state_within(api, run, "AwaitingRetry", began)
    assert_completed_by_one_retry(api, run)
    assert not get_run(api, run)["labels"].get("reconciler.crashes")

    run, pod = start_warm(seconds=300)
    began = datetime.now(UTC)
    api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    assert_state_within(api, run, "Cancelled", began, GRACE_SECONDS + DETECTION_SECONDS)
    wait_until(lambda: all(is_ending(found) for found in list_pods(pool, run)), "the end of the pod")

    wait_for_warm_pod(pool)
    run = start_run(api, victim, parameters={"memory": 320})
    wait_until_completed(api, run)
    [retry] = [state for state in list_states(api, run) if state["name"] == "AwaitingRetry"]
    assert "OOMKilled" in retry["message"]
    names = {str(found["metadata"]["name"]).partition("-")[0] for found in list_pods(pool, run)}
    assert "warm" in names
    assert len(names) == 2, "the retry has more memory, and needs another pod"


def deploy_with_results(
    pool: Pool, values: Object, namespace: Namespace, labels: dict[str, str], port: int, **results: object
) -> None:
    """Deploy the pool with a results storage that runs in pods of the cluster.

    Args:
        pool: the release of the work pool.
        values: the values of the pool.
        namespace: the namespace of the storage.
        labels: labels of the storage's pods.
        port: port of the storage.
        results: the values of `runs.results`.
    """
    runs = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": pool.namespace.name}},
        "podSelector": {"matchLabels": {"prefect.io/role": "flow-run"}},
    }
    service = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace.name}},
        "podSelector": {"matchLabels": labels},
    }
    namespace.apply(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"results-{port}"},
            "spec": {
                "podSelector": service["podSelector"],
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [runs], "ports": [{"port": port}]}],
            },
        },
    )
    changed = copy.deepcopy(values)
    changed["runs"]["results"] = results
    changed["networkPolicy"]["extraEgress"] = [{"to": [service], "ports": [{"port": port}]}]
    pool.deploy(changed)
    pool.wait_for_one_worker()


def store_results(api: httpx.Client, pool: Pool) -> None:
    """Run a flow that stores the results of two tasks. tests/orchestration/runs/test_durable.py retries such runs."""
    fields = {"parameters": {"numbers": [1, 2]}, "job_variables": {"env": {"ATTEMPT": "1"}}}
    wait_until_completed(api, start_run(api, create_deployment(api, pool, entrypoint="/probe/flow.py:steps", **fields)))


@pytest.mark.further
def test_results_are_stored_in_redis(server: Release, pool: Pool, api: httpx.Client, values: Object) -> None:
    """The storage is another database of the server's Redis. The following tests keep their results elsewhere, too."""
    password = server.secret("prefect-server-redis", "password")
    url = f"redis://:{password}@prefect-server-redis.{server.namespace.name}:6379/1"
    pool.namespace.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "results"}, "stringData": {"url": url}}
    )
    redis = {"app.kubernetes.io/name": "prefect-server", "app.kubernetes.io/component": "redis"}
    from_secret = {"existingSecret": "results", "key": "url"}
    deploy_with_results(pool, values, server.namespace, redis, 6379, storage="redis", redis=from_secret, keepDays=1)
    pool.runs_namespace.kubectl("delete", "jobs", "-l", "reconciler.warm=waiting")
    store_results(api, pool)
    scan = ("sh", "-c", 'REDISCLI_AUTH="$REDIS_PASSWORD" valkey-cli -n 1 --scan')
    keys = server.namespace.kubectl("exec", "deployment/prefect-server-redis", "--", *scan).split()
    stored = f"{pool.namespace.name}/{pool.name}/results/"
    assert sum(key.startswith(stored) for key in keys) >= 2, keys


@pytest.mark.further
def test_results_are_stored_in_s3(pool: Pool, api: httpx.Client, values: Object) -> None:
    key = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret"}
    pool.namespace.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "stringData": key},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "s3"},
            "spec": {"selector": {"app": "s3"}, "ports": [{"port": 7070}]},
        },
    )
    secret = {name: {"secretKeyRef": {"name": "s3", "key": name}} for name in key}
    root = {"ROOT_ACCESS_KEY": "AWS_ACCESS_KEY_ID", "ROOT_SECRET_KEY": "AWS_SECRET_ACCESS_KEY"}
    # A folder in /buckets is a bucket.
    folders = {"metadata": "/metadata", "buckets": "/buckets", "results": "/buckets/results"}
    container = {
        "image": images.push_program_image("versitygw"),
        "command": ["/versitygw", "--port", ":7070", "posix", "--sidecar", "/metadata", "/buckets"],
        "env": [{"name": name, "valueFrom": secret[source]} for name, source in root.items()],
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in folders.items()],
        "readinessProbe": {"tcpSocket": {"port": 7070}, "periodSeconds": 1},
    }
    pool.namespace.pod("s3", container=container, volumes=[{"name": name, "emptyDir": {}} for name in folders])
    changed = copy.deepcopy(values)
    changed["runs"]["env"] += [{"name": name, "valueFrom": source} for name, source in secret.items()]
    s3 = {"bucket": "results", "endpoint": "http://s3:7070", "region": "us-east-1"}
    deploy_with_results(pool, changed, pool.namespace, {"app": "s3"}, 7070, storage="s3", s3=s3)
    store_results(api, pool)
    written = re.findall(r"200 .* PUT \| /results/(\S+)/", pool.namespace.kubectl("logs", "s3"))
    assert set(written) == {f"{pool.namespace.name}/{pool.name}"}
