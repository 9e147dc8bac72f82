"""Runs whose pods do not start, and pods of runs that were deleted or cancelled."""

import json
import re
from datetime import UTC, datetime

import httpx
import pytest

from tests.e2e.faults.victims import (
    DETECTION_SECONDS,
    assert_state_within,
    assert_within,
    deploy_victim,
    is_ending,
    is_settled,
    list_pods,
    seconds_between,
    start_running,
    visible_since,
    wait_for_state,
    wait_until_completed,
)
from tests.e2e.light_runs import LIGHT_RUN
from tests.e2e.pace import CAPACITY_TIMEOUT_SECONDS, GRACE_SECONDS, PENDING_TIMEOUT_SECONDS
from tests.e2e.release import Object, Pool
from tests.e2e.runs import get_run, start_run, wait_until_ended
from tests.parts import wait_until

GIVE_UP_SECONDS = PENDING_TIMEOUT_SECONDS + 45 + DETECTION_SECONDS
"""Upper bound for giving up a run whose pod does not start."""


@pytest.fixture(scope="module")
def pool(shared_pool: Pool, api: httpx.Client) -> Pool:
    # The bounds hold for a pool that has executed a run, not for one that was just installed.
    wait_until_completed(api, start_run(api, deploy_victim(api, shared_pool, job_variables=LIGHT_RUN)))
    return shared_pool


@pytest.mark.parametrize(
    ("variables", "state", "cause", "timeout"),
    [
        ({"image": "localhost:5000/absent:1"}, "ImagePullBackOff", "absent:1", PENDING_TIMEOUT_SECONDS),
        pytest.param(
            {"cpu_request": "1000"},
            "Unschedulable",
            "Insufficient cpu",
            CAPACITY_TIMEOUT_SECONDS,
            marks=pytest.mark.further,
        ),
        pytest.param(
            {"secret": "absent"},
            "CreateContainerConfigError",
            'secret "absent" not found',
            PENDING_TIMEOUT_SECONDS,
            marks=pytest.mark.further,
        ),
    ],
)
def test_run_that_cannot_start_shows_why_and_is_given_up(
    pool: Pool, api: httpx.Client, variables: Object, state: str, cause: str, timeout: int
) -> None:
    run = start_run(api, deploy_victim(api, pool, job_variables=variables))

    def find_stuck_pods() -> list[Object]:
        found = list_pods(pool, run)
        # Kubernetes calls the first failed pull ErrImagePull.
        return found if re.search(f"{state}|ErrImagePull", json.dumps(found)) else []

    [pod] = wait_until(find_stuck_pods, f"{state} of its pod")
    created = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
    assert cause in assert_state_within(api, run, state, visible_since(created, datetime.now(UTC)))["message"]
    crashed = wait_for_state(api, run, "Crashed", timeout + 45 + DETECTION_SECONDS)
    assert int(crashed["message"].partition("Given up after ")[2].split()[0]) >= timeout
    assert wait_until_ended(api, run)["state_type"] == "CRASHED"
    wait_until(lambda: not list_pods(pool, run), "its pod to be gone")
    wait_until(lambda: is_settled(api, run), "the decision not to retry")
    assert get_run(api, run)["state_type"] == "CRASHED"


@pytest.mark.further
def test_given_up_run_releases_its_deployment_slot(pool: Pool, api: httpx.Client) -> None:
    """The next run of a deployment with a concurrency limit of one starts once the stuck run is given up."""
    deployment = deploy_victim(api, pool, concurrency_limit=1, concurrency_options={"collision_strategy": "ENQUEUE"})
    stuck = start_run(api, deployment, job_variables={"image": "localhost:5000/absent:1"})
    wait_for_state(api, stuck, "ImagePullBackOff", 180)
    waiting = start_run(api, deployment)
    wait_for_state(api, stuck, "Crashed", GIVE_UP_SECONDS)
    wait_until_completed(api, waiting)
    assert get_run(api, waiting)["run_count"] == 1


@pytest.mark.further
@pytest.mark.parametrize(
    ("kind", "spec", "cause"),
    [
        (
            "LimitRange",
            {"limits": [{"type": "Container", "max": {"memory": "4Gi"}}]},
            "maximum memory usage per Container is 4Gi",
        ),
        ("ResourceQuota", {"hard": {"requests.storage": "1Ti", "limits.memory": "90Gi"}}, "exceeded quota: small"),
    ],
)
def test_run_with_a_refused_pod_shows_the_cause(
    pool: Pool, api: httpx.Client, kind: str, spec: Object, cause: str
) -> None:
    pool.runs_namespace.apply({"apiVersion": "v1", "kind": kind, "metadata": {"name": "small"}, "spec": spec})
    try:
        if kind == "ResourceQuota":
            read_usage = ("get", kind, "small", "-o", "jsonpath={.status.used}")
            wait_until(lambda: pool.runs_namespace.kubectl(*read_usage), "the quota to count")
        run = start_run(api, deploy_victim(api, pool, job_variables={"memory_limit": "99Gi"}))
        submitted = wait_for_state(api, run, "Submitting", 180)
        stuck = wait_for_state(api, run, "PodRefused", 180)
        assert cause in stuck["message"]
        assert seconds_between(submitted, stuck) < DETECTION_SECONDS
        assert "Given up after" in wait_for_state(api, run, "Crashed", GIVE_UP_SECONDS)["message"]
    finally:
        pool.runs_namespace.kubectl("delete", kind, "small")


def test_pod_of_a_deleted_run_is_deleted(pool: Pool, api: httpx.Client) -> None:
    deployment = deploy_victim(api, pool)
    deleted, _ = start_running(api, pool, deployment, seconds=300)
    began = datetime.now(UTC)
    api.delete(f"/flow_runs/{deleted}").raise_for_status()
    wait_until(lambda: all(map(is_ending, list_pods(pool, deleted))), "its pod to be terminating")
    assert_within("its pod is terminating", began, datetime.now(UTC), 2 * DETECTION_SECONDS)
    wait_until(lambda: not list_pods(pool, deleted), "the pod of a deleted run to be gone")


@pytest.mark.further
def test_run_of_a_deleted_deployment_is_cancelled(pool: Pool, api: httpx.Client) -> None:
    deployment = deploy_victim(api, pool)
    run, _ = start_running(api, pool, deployment, seconds=300)
    began = datetime.now(UTC)
    api.delete(f"/deployments/{deployment}").raise_for_status()
    assert_state_within(api, run, "Cancelling", began)
    assert wait_until_ended(api, run, 300)["state_type"] == "CANCELLED"
    assert "deployment was deleted" in wait_for_state(api, run, "Cancelling")["message"]
    wait_until(lambda: all(map(is_ending, list_pods(pool, run))), "its pod to end")


@pytest.mark.further
def test_run_that_ignores_sigterm_is_cancelled(pool: Pool, api: httpx.Client) -> None:
    run, _ = start_running(api, pool, deploy_victim(api, pool), seconds=300, deaf=True)
    began = datetime.now(UTC)
    api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    assert_state_within(api, run, "Cancelled", began, GRACE_SECONDS + DETECTION_SECONDS)
    wait_until(lambda: all(map(is_ending, list_pods(pool, run))), "its pod to end", DETECTION_SECONDS)
