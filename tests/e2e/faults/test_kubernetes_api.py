"""What becomes of runs while the Kubernetes API is away. Nothing else on the cluster can be tested meanwhile."""

import contextlib
import json
import os
import signal
import time
from datetime import UTC, datetime

import httpx
import pytest

from tests.cluster import images, node
from tests.cluster.namespace import RESTRICTED
from tests.e2e.faults.victims import (
    BACK,
    START,
    completed,
    completed_by_a_retry,
    in_time,
    processes,
    said_in_time,
    took,
    under_way,
    victim,
)
from tests.e2e.release import Release
from tests.e2e.runs import ended, run_of, start
from tests.parts import client_of, wait_until

pytestmark = pytest.mark.alone

CONTAINER = {"name": "main", "image": images.BASE, "command": ["true"], "securityContext": RESTRICTED}

NOTHING = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "nothing"},
    "spec": {"template": {"spec": {"containers": [CONTAINER], "restartPolicy": "Never"}}},
}
"""A Job of nobody's."""


def _is_reached(api: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return api.get("/health").is_success
    return False


def test_a_minute_without_the_kubernetes_api_loses_nothing(cluster: str, server: Release, pool: Release) -> None:
    """What runs goes on; what falls due begins and what dies is found dead within half a minute of its return.

    It is back when pods reach it by its service and Kubernetes itself takes a Job to its end. What watches it
    (kube-proxy, scheduler, controllers, kubelet) and was refused for a minute asks again after up to another one.
    """
    if cluster != node.CONTEXT:
        pytest.skip(f"{cluster} is not the node from packages, whose API can be taken away")
    with server.api() as api:
        made = victim(api)
        goes_on, _ = under_way(api, pool, made, seconds=150)
        dies, _ = under_way(api, pool, made, seconds=40)
        auth = api.auth
    # Not by the Kubernetes API, as `api` is.
    cluster_ip = ("-o", "jsonpath={.spec.clusterIP}")
    address = server.namespace.kubectl("get", "service", "prefect-server-api", *cluster_ip)
    of_kubernetes = server.namespace.kubectl("get", "service", "kubernetes", "--namespace=default", *cluster_ip)
    with client_of(f"http://{address}:4200/api", auth) as direct:
        with node.without_api():
            assert run_of(direct, dies)["state_type"] == "RUNNING"
            for pid in processes(dies):
                with contextlib.suppress(ProcessLookupError):  # the first to die takes the other with it
                    os.kill(pid, signal.SIGKILL)
            due = start(direct, made)
            time.sleep(60)
            assert run_of(direct, goes_on)["state_type"] == "RUNNING"
        wait_until(lambda: node.accepts(of_kubernetes, 443), "the API's service", 120)
        pool.namespace.apply(NOTHING)
        pool.namespace.kubectl("wait", "job/nothing", "--for=condition=Complete", "--timeout=150s")
        wait_until(lambda: _is_reached(direct), "the Prefect API's service, whose node was taken for lost", 150)
        back = datetime.now(UTC)
        crashed = said_in_time(direct, dies, "Crashed", back, BACK)
        assert "exit code 137" in crashed["message"]
        jobs = ("get", "jobs", "-l", f"prefect.io/flow-run-id={due}", "-o", "jsonpath={.items[*].metadata}")
        job = wait_until(lambda: pool.namespace.kubectl(*jobs), "the Job of what fell due")
        has = datetime.fromisoformat(json.loads(job)["creationTimestamp"])
        in_time("what fell due has its Job", back, has, BACK - START)
        completed(direct, due)
        took("it begins", back, datetime.fromisoformat(run_of(direct, due)["start_time"]))
        completed_by_a_retry(direct, dies)
        assert (ended(direct, goes_on)["state_type"], run_of(direct, goes_on)["run_count"]) == ("COMPLETED", 1)
        assert run_of(direct, due)["run_count"] == 1
