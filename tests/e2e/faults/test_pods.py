"""Runs whose pods die: the API shows the cause within seconds, and the run is retried within its budget."""

import contextlib
from datetime import UTC, datetime

import httpx
import pytest

from orchestration.errors import ClusterError
from tests.e2e.faults.victims import (
    SEEN,
    completed,
    completed_by_a_retry,
    death,
    ending,
    evicted,
    force_deleted,
    is_settled,
    killed,
    nothing_is_repeated,
    pods,
    said_in_time,
    scarce,
    seconds_between,
    sidecars,
    state_named,
    states,
    taken,
    under_way,
    victim,
)
from tests.e2e.release import Object, Pool
from tests.e2e.runs import deployment, logged, run_of, start
from tests.parts import wait_until


@pytest.fixture(scope="module")
def pool(shared_pool: Pool) -> Pool:
    return shared_pool


def test_killed_pod_is_retried(pool: Pool, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api, pool), seconds=60)
    [found] = pods(pool, run)
    crashed = said_in_time(api, run, "Crashed", killed(pool, pod))
    assert f"Pod {pod} on {found['spec']['nodeName']} ended with exit code 137 (SIGKILL)" in crashed["message"]
    assert "execution 1" in crashed["message"], "the end of its log"
    listed = completed_by_a_retry(api, run)
    again = next(each for each in listed if each["name"] == "AwaitingRetry")
    assert again["message"].startswith("Retry 1 of 2 after a crash")
    assert seconds_between(crashed, again) < SEEN


def test_retry_repeats_no_finished_task(pool: Pool, api: httpx.Client) -> None:
    nothing_is_repeated(api, pool)


def test_old_results_are_removed(pool: Pool, api: httpx.Client) -> None:
    [pod] = pool.pods("results")

    def run(script: str) -> str:
        return pool.namespace.kubectl("exec", pod["metadata"]["name"], "--", "sh", "-c", script)

    def kept() -> list[str]:
        with contextlib.suppress(ClusterError):  # its pod may be gone, and not yet be there again
            return run("ls /results").split()
        return []

    run("touch -d '8 days ago' /results/old; touch -d '6 days ago' /results/new")
    pool.namespace.kubectl("delete", "pod", pod["metadata"]["name"])
    wait_until(lambda: "new" in (found := kept()) and "old" not in found, "the old one to go, and no other", 120)


def of_itself(api: httpx.Client, pool: Pool, run: str) -> datetime:
    """The death of a run's first pod, which is its own doing."""
    state_named(api, run, "Running", 120)
    first = min(pods(pool, run), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    return death(pool, first["metadata"]["name"])


def test_force_deleted_pod_is_retried(pool: Pool, api: httpx.Client) -> None:
    """The retry needs the slot that it held, and waits in vain if nobody has given it back."""
    slot = scarce(api, "force-deleted")
    run, pod = under_way(api, pool, victim(api, pool), seconds=60, slot=slot)
    wait_until(lambda: taken(api, slot) == 1, "the slot to be taken")
    began = datetime.now(UTC)
    force_deleted(pool.namespace, pod)
    said_in_time(api, run, "AwaitingRetry", began)
    completed_by_a_retry(api, run)


def test_killed_process_is_retried(pool: Pool, api: httpx.Client) -> None:
    run = start(api, victim(api, pool), parameters={"killed": True})
    said_in_time(api, run, "Crashed", of_itself(api, pool, run))
    completed_by_a_retry(api, run)


def test_oom_killed_run_gets_more_memory(pool: Pool, api: httpx.Client) -> None:
    made = victim(api, pool, job_variables={"memory_limit": "300Mi", "memory_growth": 2})
    run = start(api, made, parameters={"memory": 320})
    said_in_time(api, run, "Crashed", of_itself(api, pool, run))
    completed(api, run)
    listed = states(api, run)
    again = next(each for each in listed if each["name"] == "AwaitingRetry")
    assert "with 600Mi of memory in place of 300Mi" in again["message"]
    assert "OOMKilled" in again["message"]
    assert "it used at most 300 MiB" in again["message"]
    assert run_of(api, run)["job_variables"]["memory_limit"] == "600Mi"
    wait_until(lambda: run_of(api, run)["labels"].get("reconciler.exceeded") == 300 * 2**20, "the limit to be noted")


def test_evicted_run_keeps_its_crash_budget(pool: Pool, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api, pool, job_variables={"crash_retries": 0}), seconds=60)
    began = datetime.now(UTC)
    evicted(pool.namespace, pod)
    said_in_time(api, run, "AwaitingRetry", began)
    completed(api, run)
    assert run_of(api, run)["run_count"] == 2
    assert not run_of(api, run)["labels"].get("reconciler.crashes")


def test_deadline_ends_the_run_without_a_retry(pool: Pool, api: httpx.Client) -> None:
    """Not even by the retries of the flow, whose process has no time for them."""
    made = victim(api, pool, job_variables={"active_deadline_seconds": 30})
    run = start(api, made, parameters={"seconds": 300}, empirical_policy={"retries": 2, "retry_delay": 0})
    found = state_named(api, run, "TimedOut", 120)
    assert found["type"] == "FAILED"
    assert "ran for longer than its activeDeadlineSeconds of 30" in found["message"]
    wait_until(lambda: all(map(ending, pods(pool, run))), "its pod to end", SEEN)
    assert run_of(api, run)["state_name"] == "TimedOut"
    assert [each["name"] for each in states(api, run)].count("Running") == 1


def test_crash_budget_of_zero_retries_nothing(pool: Pool, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api, pool, job_variables={"crash_retries": 0}), seconds=60)
    said_in_time(api, run, "Crashed", killed(pool, pod))
    wait_until(lambda: is_settled(api, run), "the verdict", 30)
    assert run_of(api, run)["state_type"] == "CRASHED"
    assert len([each for each in states(api, run) if each["name"] == "AwaitingRetry"]) == 0


def test_concurrency_slots_are_released_when_a_run_attempt_ends(pool: Pool, api: httpx.Client) -> None:
    """Those of a tag and of `concurrency`: the server's leases of them would end a minute and five minutes later.

    Without a retry, whose attempt would take them again.
    """
    api.post("/concurrency_limits/", json={"tag": "scarce", "concurrency_limit": 1}).raise_for_status()
    limits = ["tag:scarce", scarce(api, "scarce")]
    made = deployment(api, pool, entrypoint="/probe/flow.py:holding", job_variables={"crash_retries": 0})
    run = start(api, made)
    wait_until(lambda: [taken(api, each) for each in limits] == [1, 1], "the slots to be taken", 120)
    state_named(api, run, "Crashed", 60)
    wait_until(lambda: [taken(api, each) for each in limits] == [0, 0], "the slots to be released", SEEN)


def test_given_up_run_leaves_no_task_or_subflow_running(pool: Pool, api: httpx.Client) -> None:
    made = deployment(api, pool, entrypoint="/probe/flow.py:stepwise", job_variables={"crash_retries": 0})
    run = start(api, made)
    wait_until(lambda: is_settled(api, run), "the verdict", 120)
    body: Object = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
    called = api.post("/flow_runs/filter", json=body).raise_for_status().json()
    assert sorted(each["state_type"] for each in called) == ["COMPLETED", "CRASHED"]
    body = {"flow_runs": {"id": {"any_": [run, *(each["id"] for each in called)]}}}
    tasks = api.post("/task_runs/filter", json=body).raise_for_status().json()
    ends = {each["name"].partition("-")[0] + f" {each['state_type']}" for each in tasks}
    assert ends == {"step COMPLETED", "step CRASHED", "steps COMPLETED", "steps CRASHED"}


def test_main_container_alone_decides_next_to_sidecars(pool: Pool, api: httpx.Client) -> None:
    """With a sidecar before and one after it in the alphabet, both of which would run on; all runs at once."""
    of = {"crash_retries": 0, **sidecars()}
    bad = {"image": "localhost:5000/absent:1"}
    small = {"memory_limit": "300Mi"}
    runs = {
        "killed": start(api, victim(api, pool, job_variables=of), parameters={"seconds": 300}),
        "evicted": start(api, victim(api, pool, job_variables=of), parameters={"seconds": 300}),
        "cancelled": start(api, victim(api, pool, job_variables=of), parameters={"seconds": 300}),
        "oom": start(api, victim(api, pool, job_variables=of | small), parameters={"memory": 320}),
        "image": start(api, victim(api, pool, job_variables=of | bad)),
    }
    for each in ("killed", "evicted", "cancelled"):
        logged(api, runs[each], "execution 1", 300)
    [killed_pod], [evicted_pod] = pods(pool, runs["killed"]), pods(pool, runs["evicted"])
    names = [each["name"] for each in killed_pod["status"]["containerStatuses"]]
    assert names == ["aaa-proxy", "prefect-job", "zzz-proxy"]

    crashed = said_in_time(api, runs["killed"], "Crashed", killed(pool, killed_pod["metadata"]["name"]))
    assert "ended with exit code 137 (SIGKILL)" in crashed["message"]
    assert "execution 1" in crashed["message"], "the end of the main container's log"
    began = datetime.now(UTC)
    evicted(pool.namespace, evicted_pod["metadata"]["name"])
    api.post(f"/flow_runs/{runs['cancelled']}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    said_in_time(api, runs["evicted"], "AwaitingRetry", began)
    said_in_time(api, runs["cancelled"], "Cancelled", began)

    found = state_named(api, runs["oom"], "Crashed", 120)
    assert "exceeded its memory limit of 300Mi; it used at most 300 MiB" in found["message"]
    assert "absent:1" in state_named(api, runs["image"], "ImagePullBackOff", 60)["message"]
    completed(api, runs["evicted"])
    for each in runs.values():
        wait_until(lambda each=each: all(map(ending, pods(pool, each))), "the Job to be deleted", 60)  # type: ignore[misc]
    assert run_of(api, runs["evicted"])["run_count"] == 2
    assert state_named(api, runs["image"], "Crashed")["message"].count("Given up after") == 1
