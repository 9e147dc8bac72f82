"""Outages of the Kubernetes API, and of the shared Prefect server. No other test can use the cluster meanwhile."""

import contextlib
import json
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import node_components, node_faults, node_layout
from tests.e2e.faults.victims import (
    DETECTION_SECONDS,
    POD_START_SECONDS,
    RECOVERY_SECONDS,
    assert_completed_by_one_retry,
    assert_state_within,
    assert_within,
    deploy_victim,
    end_ticking,
    first_claim_time,
    is_ending,
    list_pods,
    record_duration,
    start_running,
    wait_for_death,
    wait_for_state,
    wait_until_completed,
)
from tests.e2e.light_runs import LIGHT_RUN
from tests.e2e.pace import GRACE_SECONDS, KUBERNETES_OUTAGE_SECONDS, SERVER_OUTAGE_SECONDS
from tests.e2e.release import Object, Pool, Release, merge_values
from tests.e2e.runs import create_deployment, get_run, read, start_run, wait_for_log, wait_until_ended
from tests.parts import client_of, find_run_processes, wait_until

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    """Return values by which no run is given up, also if the node is slow."""
    return merge_values(values, {"reconciler": {"pendingTimeoutSeconds": 600}})


def _is_kubernetes_back(address: str) -> bool:
    """Tell whether the Kubernetes API is ready, and pods reach it. Until then `kubectl` fails."""
    with contextlib.suppress(ClusterError):
        is_ready = node_components.kubectl("get", "--raw", "/readyz", "--request-timeout=2s") == "ok"
        return is_ready and node_components.accepts_connections(address, 443)
    return False


def _is_reachable(api: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return api.get("/health").is_success
    return False


def _read_start_stages(pool: Pool, run: str) -> list[tuple[str, datetime]]:
    """Return when each component of Kubernetes finished its part of the start of the run's pod, in order."""
    [pod] = list_pods(pool, run)
    [scheduled] = [condition for condition in pod["status"]["conditions"] if condition["type"] == "PodScheduled"]
    [container] = pod["status"]["containerStatuses"]
    [state] = container["state"].values()  # running, or terminated if the kubelet has reported the end
    times = {
        "the controller manager creates the pod": pod["metadata"]["creationTimestamp"],
        "the scheduler binds the pod": scheduled["lastTransitionTime"],
        "the kubelet accepts the pod": pod["status"]["startTime"],
        "the container starts": state["startedAt"],
    }
    return [(stage, datetime.fromisoformat(moment)) for stage, moment in times.items()]


@pytest.mark.parametrize(
    "outage",
    [
        pytest.param(node_faults.without_api, id="refuses"),
        pytest.param(node_faults.with_silent_api, id="hangs", marks=pytest.mark.further),
    ],
)
def test_kubernetes_api_outage_loses_no_run(
    outage: Callable[[], AbstractContextManager[None]], cluster: str, server: Release, pool: Pool
) -> None:
    """Running runs continue. Within half a minute of the API's return, killed runs are Crashed and due runs begin.

    The API has returned when pods reach it and the Prefect API by their services. A death counts from the kubelet's
    report. After an outage the controller manager, the scheduler and the kubelet retry only after up to a minute (by
    client-go's reflector). The time that they take to start the Job's pod is reported and not counted, as no chart can
    shorten it.
    """
    if cluster != node_layout.CONTEXT:
        pytest.skip(f"{cluster} is not the node from packages, whose API can be stopped")
    with server.api() as api:
        deployment = deploy_victim(api, pool)
        ticking = create_deployment(api, pool, entrypoint="/probe/flow.py:ticking")
        surviving, surviving_pod = start_running(api, pool, ticking, times=600)
        killed, victim_pod = start_running(api, pool, deployment, seconds=300)
        light = deploy_victim(api, pool, job_variables=LIGHT_RUN)
        auth = api.auth
    # Reach the Prefect API by its cluster IP: `api` is forwarded by the Kubernetes API.
    cluster_ip = ("-o", "jsonpath={.spec.clusterIP}")
    address = server.namespace.kubectl("get", "service", "prefect-server-api", *cluster_ip)
    kubernetes = server.namespace.kubectl("get", "service", "kubernetes", "--namespace=default", *cluster_ip)
    with client_of(f"http://{address}:4200/api", auth) as direct:
        with outage():
            assert get_run(direct, killed)["state_type"] == "RUNNING"
            for pid in find_run_processes(killed):
                with contextlib.suppress(ProcessLookupError):  # the first process that dies ends the other one
                    os.kill(pid, signal.SIGKILL)
            due = start_run(direct, light)
            time.sleep(KUBERNETES_OUTAGE_SECONDS)
            assert get_run(direct, surviving)["state_type"] == "RUNNING"
        wait_until(lambda: _is_kubernetes_back(kubernetes), "the Kubernetes API's service", 120)
        accepts = datetime.now(UTC)
        wait_until(lambda: _is_reachable(direct), "the Prefect API's service, whose node was considered lost", 150)
        back = datetime.now(UTC)
        record_duration("the Prefect API is reached", accepts, back)
        crashed = assert_state_within(
            direct, killed, "Crashed", max(back, wait_for_death(pool, victim_pod)), RECOVERY_SECONDS
        )
        assert "exit code 137" in crashed["message"]
        jobs = ("get", "jobs", "-l", f"prefect.io/flow-run-id={due}", "-o", "jsonpath={.items[*].metadata}")
        job = wait_until(lambda: pool.runs_namespace.kubectl(*jobs), "the Job of the due run")
        has_job = datetime.fromisoformat(json.loads(job)["creationTimestamp"])
        assert_within("the due run has its Job", back, has_job, RECOVERY_SECONDS - POD_START_SECONDS)
        wait_until_completed(direct, due)
        stages = _read_start_stages(pool, due)
        for stage, moment in stages:
            record_duration(stage, back, moment)
        kubernetes_share = stages[-1][1] - has_job
        begun = datetime.fromisoformat(wait_for_state(direct, due, "Running")["timestamp"])
        record_duration("the due run begins", back, begun)
        assert_within("without the share of Kubernetes it begins", back + kubernetes_share, begun, RECOVERY_SECONDS)
        assert_completed_by_one_retry(direct, killed)
        end_ticking(pool, surviving_pod)
        assert (wait_until_ended(direct, surviving)["state_type"], get_run(direct, surviving)["run_count"]) == (
            "COMPLETED",
            1,
        )
        assert get_run(direct, due)["run_count"] == 1


@contextlib.contextmanager
def server_down(server: Release) -> Iterator[None]:
    """Kill the Prefect API and keep it at zero replicas while the block lasts."""
    server.namespace.kubectl("scale", "deployment/prefect-server-api", "--replicas=0")
    server.namespace.kubectl(
        "delete", "pod", "-l", "app.kubernetes.io/component=api", "--force", "--grace-period=0", "--wait=false"
    )
    try:
        yield
    finally:
        server.namespace.kubectl("scale", "deployment/prefect-server-api", "--replicas=1")
        server.namespace.kubectl("rollout", "status", "deployment/prefect-server-api", "--timeout=300s")


def test_server_outage_and_killed_database_lose_no_run(server: Release, pool: Pool) -> None:
    """A run in progress completes in its first attempt with its whole log; runs that fell due are executed once.

    A run that is being cancelled when the outage begins is Cancelled after the outage.

    Each part opens its own client, because a client is forwarded to one pod of the server.
    """
    namespace = server.namespace
    with server.api() as api:
        every_minute = [{"schedule": {"cron": "* * * * *"}}]
        minutely = deploy_victim(api, pool, schedules=every_minute, job_variables=LIGHT_RUN)
        ticking = create_deployment(api, pool, entrypoint="/probe/flow.py:ticking")
        run = start_run(api, ticking, parameters={"times": 600})
        unwanted, _ = start_running(api, pool, deploy_victim(api, pool), seconds=900)
        wait_for_log(api, run, "tick 5", 300)
        # Not while a worker claims a scheduled run: a claim that is cut off is released and takes a minute longer.
        wait_until(lambda: 25 < datetime.now(UTC).second < 45, "a moment between two scheduled runs", 90)
        api.post(f"/flow_runs/{unwanted}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    began = datetime.now(UTC)
    with server_down(server):
        time.sleep(SERVER_OUTAGE_SECONDS)
    back = datetime.now(UTC)
    missed = {
        moment
        for number in range(1, SERVER_OUTAGE_SECONDS // 60 + 3)
        if began < (moment := began.replace(second=0, microsecond=0) + timedelta(minutes=number)) < back
    }
    assert missed

    def scheduled_runs(api: httpx.Client) -> dict[datetime, list[Object]]:
        body = {"deployments": {"id": {"any_": [minutely]}}, "limit": 200}
        by_time: dict[datetime, list[Object]] = defaultdict(list)
        for found in read(api, "POST", "/flow_runs/filter", json=body):
            by_time[datetime.fromisoformat(found["expected_start_time"])].append(found)
        return by_time

    def all_missed_have_begun() -> bool:
        by_time = scheduled_runs(api)
        return all(
            by_time[moment] and all(scheduled_run["start_time"] for scheduled_run in by_time[moment])
            for moment in missed
        )

    claim_seconds = RECOVERY_SECONDS - POD_START_SECONDS
    with server.api() as api:
        assert_state_within(api, unwanted, "Cancelled", back, GRACE_SECONDS + DETECTION_SECONDS)
        wait_until(lambda: all(map(is_ending, list_pods(pool, unwanted))), "its pod to end", DETECTION_SECONDS)
        wait_until(all_missed_have_begun, "the missed runs to begin", 300)
        # Further runs would take the processor from other tests.
        api.patch(f"/deployments/{minutely}", json={"paused": True}).raise_for_status()
        for missed_run in (found for moment in missed for found in scheduled_runs(api)[moment]):
            assert_within("a missed run is claimed", back, first_claim_time(api, missed_run["id"]), claim_seconds)
            record_duration("the missed run begins", back, datetime.fromisoformat(missed_run["start_time"]))
        assert get_run(api, run)["state_type"] == "RUNNING"
    database = "pod/prefect-server-database-0"
    before = namespace.kubectl("get", database, "-o", "jsonpath={.metadata.uid}")
    # Not by --force: the next pod could start while the killed Postgres still writes to the volume.
    namespace.kubectl("delete", database, "--grace-period=1")
    wait_until(
        lambda: (
            namespace.kubectl("get", database, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}")
            not in ("", before)
        ),
        "a new pod of the database",
    )
    namespace.kubectl("wait", database, "--for=condition=Ready", "--timeout=300s")

    def has_database() -> bool:
        # The API answers 500 until the cluster's DNS has the database's new address; connections may break.
        with contextlib.suppress(httpx.HTTPError, ClusterError), server.api() as api:
            return api.get(f"/flow_runs/{run}").is_success
        return False

    wait_until(has_database, "the API to reach its database")
    with server.api() as api:
        [pod] = list_pods(pool, run)
        end_ticking(pool, pod["metadata"]["name"])
        found = wait_until_ended(api, run)
        assert (found["state_type"], found["run_count"]) == ("COMPLETED", 1)
        ticks = [int(line.split()[1]) for line in wait_for_log(api, run, "the end", 180) if line.startswith("tick")]
        # A client whose request met the killed database sends its lines again, so lines may be doubled.
        assert {*ticks} == {*range(max(ticks) + 1)}
        assert 2 * max(ticks) > SERVER_OUTAGE_SECONDS
        for moment in missed:
            [once] = scheduled_runs(api)[moment]
            assert (wait_until_ended(api, once["id"])["state_type"], once["run_count"]) == ("COMPLETED", 1)
