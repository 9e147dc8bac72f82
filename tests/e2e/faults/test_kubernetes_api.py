"""Outages of the Kubernetes API. No other test can use the cluster meanwhile."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime

import httpx
import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import node_components, node_faults, node_layout
from tests.e2e.faults.victims import (
    POD_START_SECONDS,
    RECOVERY_SECONDS,
    assert_completed_by_one_retry,
    assert_state_within,
    assert_within,
    deploy_victim,
    end_ticking,
    list_pods,
    record_duration,
    start_running,
    wait_for_death,
    wait_for_state,
    wait_until_completed,
)
from tests.e2e.light_runs import LIGHT_RUN
from tests.e2e.pace import KUBERNETES_OUTAGE_SECONDS
from tests.e2e.release import Pool, Release
from tests.e2e.runs import create_deployment, get_run, start_run, wait_until_ended
from tests.parts import client_of, find_run_processes, wait_until

pytestmark = pytest.mark.alone


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


@pytest.mark.parametrize("outage", [node_faults.without_api, node_faults.with_silent_api], ids=["refuses", "hangs"])
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
