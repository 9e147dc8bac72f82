"""Runs whose pods do not start, and runs that are no longer wanted."""

import json
import re
from datetime import UTC, datetime

import httpx
import pytest

from tests.e2e.faults.victims import (
    SEEN,
    completed,
    ending,
    in_time,
    is_settled,
    pods,
    said_in_time,
    seconds_between,
    shown,
    state_named,
    under_way,
    victim,
)
from tests.e2e.pace import CAPACITY_TIMEOUT_SECONDS, GRACE_SECONDS, PENDING_TIMEOUT_SECONDS
from tests.e2e.release import Object, Pool
from tests.e2e.runs import ended, run_of, start
from tests.parts import wait_until

GIVEN_UP = PENDING_TIMEOUT_SECONDS + 45
"""Seconds within which a run that does not start is given up, at the most."""


@pytest.fixture(scope="module")
def pool(shared_pool: Pool, api: httpx.Client) -> Pool:
    # The bounds are those of a pool at work, not of one that was installed a moment ago.
    completed(api, start(api, victim(api, shared_pool)))
    return shared_pool


@pytest.mark.parametrize(
    ("variables", "word", "said", "patience"),
    [
        ({"image": "localhost:5000/absent:1"}, "ImagePullBackOff", "absent:1", PENDING_TIMEOUT_SECONDS),
        ({"cpu_request": "1000"}, "Unschedulable", "Insufficient cpu", CAPACITY_TIMEOUT_SECONDS),
        ({"secret": "absent"}, "CreateContainerConfigError", 'secret "absent" not found', PENDING_TIMEOUT_SECONDS),
    ],
)
def test_run_that_cannot_start_shows_why_and_is_given_up(
    pool: Pool, api: httpx.Client, variables: Object, word: str, said: str, patience: int
) -> None:
    run = start(api, victim(api, pool, job_variables=variables))

    def waits() -> list[Object]:
        found = pods(pool, run)
        # The first of failed pulls has a word of its own.
        return found if re.search(f"{word}|ErrImagePull", json.dumps(found)) else []

    [pod] = wait_until(waits, f"{word} of its pod", 120)
    created = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
    assert said in said_in_time(api, run, word, shown(created, datetime.now(UTC)))["message"]
    crashed = state_named(api, run, "Crashed", patience + 45)
    assert int(crashed["message"].partition("Given up after ")[2].split()[0]) >= patience
    assert ended(api, run)["state_type"] == "CRASHED"
    wait_until(lambda: not pods(pool, run), "its pod to go", 60)
    wait_until(lambda: is_settled(api, run), "the verdict: no retry can help", 30)
    assert run_of(api, run)["state_type"] == "CRASHED"


def test_given_up_run_releases_its_deployment_slot(pool: Pool, api: httpx.Client) -> None:
    """The deployment's limit of one lets the next run in once it is given up."""
    made = victim(api, pool, concurrency_limit=1, concurrency_options={"collision_strategy": "ENQUEUE"})
    stuck = start(api, made, job_variables={"image": "localhost:5000/absent:1"})
    state_named(api, stuck, "ImagePullBackOff", 60)
    waiting = start(api, made)
    state_named(api, stuck, "Crashed", GIVEN_UP)
    completed(api, waiting)
    assert run_of(api, waiting)["run_count"] == 1


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        (
            "LimitRange",
            {"limits": [{"type": "Container", "max": {"memory": "4Gi"}}]},
            "maximum memory usage per Container is 4Gi",
        ),
        ("ResourceQuota", {"hard": {"requests.storage": "1Ti", "limits.memory": "90Gi"}}, "exceeded quota: small"),
    ],
)
def test_refused_pod_shows_the_refusal(pool: Pool, api: httpx.Client, kind: str, spec: Object, said: str) -> None:
    pool.namespace.apply({"apiVersion": "v1", "kind": kind, "metadata": {"name": "small"}, "spec": spec})
    try:
        run = start(api, victim(api, pool, job_variables={"memory_limit": "99Gi"}))
        made = state_named(api, run, "Submitting", 60)
        stuck = state_named(api, run, "PodRefused", 60)
        assert said in stuck["message"]
        assert seconds_between(made, stuck) < SEEN
        assert "Given up after" in state_named(api, run, "Crashed", GIVEN_UP)["message"]
    finally:
        pool.namespace.kubectl("delete", kind, "small")


def test_pod_of_a_deleted_run_is_ended(pool: Pool, api: httpx.Client) -> None:
    made = victim(api, pool)
    deleted, _ = under_way(api, pool, made, seconds=300)
    began = datetime.now(UTC)
    api.delete(f"/flow_runs/{deleted}").raise_for_status()
    wait_until(lambda: all(ending(each) for each in pods(pool, deleted)), "its pod to be told", 60)
    in_time("its pod is told to end", began, datetime.now(UTC), 30)
    wait_until(lambda: not pods(pool, deleted), "the pod of a deleted run to go", 90)


def test_run_of_a_deleted_deployment_is_cancelled(pool: Pool, api: httpx.Client) -> None:
    made = victim(api, pool)
    run, _ = under_way(api, pool, made, seconds=300)
    began = datetime.now(UTC)
    api.delete(f"/deployments/{made}").raise_for_status()
    said_in_time(api, run, "Cancelling", began)
    assert ended(api, run, 120)["state_type"] == "CANCELLED"
    assert "deployment was deleted" in state_named(api, run, "Cancelling")["message"]
    wait_until(lambda: all(map(ending, pods(pool, run))), "its pod to end", 30)


def test_run_that_ignores_sigterm_is_cancelled(pool: Pool, api: httpx.Client) -> None:
    run, _ = under_way(api, pool, victim(api, pool), seconds=300, deaf=True)
    began = datetime.now(UTC)
    api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    said_in_time(api, run, "Cancelled", began, GRACE_SECONDS + SEEN)
    wait_until(lambda: all(map(ending, pods(pool, run))), "its pod to end", SEEN)
