"""What becomes of runs while the Kubernetes API is away. Nothing else on the cluster can be tested meanwhile."""

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

from orchestration.operations.local_cluster import node_components, node_faults, node_layout
from tests.e2e.faults.victims import (
    POD_START_SECONDS,
    RECOVERY_SECONDS,
    assert_completed_by_one_retry,
    assert_state_within,
    assert_within,
    deploy_victim,
    list_pods,
    record_duration,
    start_running,
    wait_for_death,
    wait_for_state,
    wait_until_completed,
)
from tests.e2e.pace import KUBERNETES_OUTAGE_SECONDS
from tests.e2e.release import Pool, Release
from tests.e2e.runs import create_deployment, get_run, start_run, wait_until_ended
from tests.parts import client_of, find_run_processes, wait_until

pytestmark = pytest.mark.alone


def _is_reached(api: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return api.get("/health").is_success
    return False


def _stages(pool: Pool, run: str) -> list[tuple[str, datetime]]:
    """When each part of Kubernetes had done what the run's pod needs of it, the last one last."""
    [pod] = list_pods(pool, run)
    [scheduled] = [each for each in pod["status"]["conditions"] if each["type"] == "PodScheduled"]
    [container] = pod["status"]["containerStatuses"]
    [state] = container["state"].values()  # it is not always told yet that it has ended
    times = {
        "the controller manager makes its pod": pod["metadata"]["creationTimestamp"],
        "the scheduler binds it": scheduled["lastTransitionTime"],
        "the kubelet has it": pod["status"]["startTime"],
        "its container starts": state["startedAt"],
    }
    return [(stage, datetime.fromisoformat(at)) for stage, at in times.items()]


@pytest.mark.parametrize("away", [node_faults.without_api, node_faults.with_silent_api], ids=["refuses", "hangs"])
def test_kubernetes_api_outage_loses_no_run(
    away: Callable[[], AbstractContextManager[None]], cluster: str, server: Release, pool: Pool
) -> None:
    """What runs goes on; what died is Crashed, and what falls due begins, within half a minute of its return.

    It is back when pods reach it by its service, and Prefect's API; a death counts from when the kubelet has told it.
    The controller manager, the scheduler and the kubelet, refused for a while, ask again after up to a minute (by
    client-go's reflector), and what they take to start the Job's pod is reported but not counted: no chart hastens it.
    """
    if cluster != node_layout.CONTEXT:
        pytest.skip(f"{cluster} is not the node from packages, whose API can be taken away")
    with server.api() as api:
        made = deploy_victim(api, pool)
        ticking = create_deployment(api, pool, entrypoint="/probe/flow.py:ticking")
        goes_on, pod_that_goes_on = start_running(api, pool, ticking, times=600)
        dies, victim_pod = start_running(api, pool, made, seconds=40)
        auth = api.auth
    # Not by the Kubernetes API, as `api` is.
    cluster_ip = ("-o", "jsonpath={.spec.clusterIP}")
    address = server.namespace.kubectl("get", "service", "prefect-server-api", *cluster_ip)
    kubernetes = server.namespace.kubectl("get", "service", "kubernetes", "--namespace=default", *cluster_ip)
    with client_of(f"http://{address}:4200/api", auth) as direct:
        with away():
            assert get_run(direct, dies)["state_type"] == "RUNNING"
            for pid in find_run_processes(dies):
                with contextlib.suppress(ProcessLookupError):  # the first to die takes the other with it
                    os.kill(pid, signal.SIGKILL)
            due = start_run(direct, made)
            time.sleep(KUBERNETES_OUTAGE_SECONDS)
            assert get_run(direct, goes_on)["state_type"] == "RUNNING"
        wait_until(lambda: node_components.accepts_connections(kubernetes, 443), "the API's service", 120)
        accepts = datetime.now(UTC)
        wait_until(lambda: _is_reached(direct), "the Prefect API's service, whose node was taken for lost", 150)
        back = datetime.now(UTC)
        record_duration("Prefect's API is reached", accepts, back)
        crashed = assert_state_within(
            direct, dies, "Crashed", max(back, wait_for_death(pool, victim_pod)), RECOVERY_SECONDS
        )
        assert "exit code 137" in crashed["message"]
        jobs = ("get", "jobs", "-l", f"prefect.io/flow-run-id={due}", "-o", "jsonpath={.items[*].metadata}")
        job = wait_until(lambda: pool.namespace.kubectl(*jobs), "the Job of what fell due")
        has_job = datetime.fromisoformat(json.loads(job)["creationTimestamp"])
        assert_within("what fell due has its Job", back, has_job, RECOVERY_SECONDS - POD_START_SECONDS)
        wait_until_completed(direct, due)
        stages = _stages(pool, due)
        for stage, at in stages:
            record_duration(stage, back, at)
        of_kubernetes = stages[-1][1] - has_job
        begun = datetime.fromisoformat(wait_for_state(direct, due, "Running")["timestamp"])
        record_duration("it begins", back, begun)
        assert_within("without Kubernetes' own part it begins", back + of_kubernetes, begun, RECOVERY_SECONDS)
        assert_completed_by_one_retry(direct, dies)
        pool.namespace.kubectl("exec", pod_that_goes_on, "--", "touch", "/tmp/enough")  # noqa: S108 - in the pod
        assert (wait_until_ended(direct, goes_on)["state_type"], get_run(direct, goes_on)["run_count"]) == (
            "COMPLETED",
            1,
        )
        assert get_run(direct, due)["run_count"] == 1
