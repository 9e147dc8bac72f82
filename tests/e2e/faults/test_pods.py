"""Runs whose pods die: the state shows the cause within seconds, and the reconciler retries within the retry budget."""

import contextlib
from datetime import UTC, datetime

import httpx
import pytest

from orchestration.errors import ClusterError
from tests.e2e.faults.victims import (
    DETECTION_SECONDS,
    RELEASE_SECONDS,
    assert_completed_by_one_retry,
    assert_no_task_is_repeated,
    assert_state_within,
    count_taken_slots,
    create_limit,
    deploy_victim,
    evict,
    find_state,
    force_delete,
    is_ending,
    is_settled,
    kill_pod,
    list_pods,
    list_states,
    seconds_between,
    sidecars,
    start_running,
    start_stepwise,
    wait_for_death,
    wait_for_state,
    wait_until_completed,
)
from tests.e2e.pace import GRACE_SECONDS, PENDING_TIMEOUT_SECONDS
from tests.e2e.release import Object, Pool
from tests.e2e.runs import create_deployment, get_run, read, start_run, wait_for_log
from tests.parts import wait_until


@pytest.fixture(scope="module")
def pool(shared_pool: Pool) -> Pool:
    return shared_pool


def test_killed_pod_is_retried(pool: Pool, api: httpx.Client) -> None:
    run, pod = start_running(api, pool, deploy_victim(api, pool), seconds=300)
    [found] = list_pods(pool, run)
    crashed = assert_state_within(api, run, "Crashed", kill_pod(pool, pod))
    assert f"Pod {pod} on {found['spec']['nodeName']} ended with exit code 137 (SIGKILL)" in crashed["message"]
    assert "attempt 1 in" in crashed["message"], "the end of its log"
    listed = assert_completed_by_one_retry(api, run)
    retry = next(state for state in listed if state["name"] == "AwaitingRetry")
    assert retry["message"].startswith("Retry 1 of 2 after a crash")
    assert seconds_between(crashed, retry) < DETECTION_SECONDS


def test_old_results_are_removed(pool: Pool, api: httpx.Client) -> None:
    pod = f"{pool.name}-results-0"

    def run_shell(script: str) -> str:
        return pool.runs_namespace.kubectl("exec", pod, "--", "sh", "-c", script)

    def list_results() -> list[str]:
        with contextlib.suppress(ClusterError):  # the pod is being replaced
            return run_shell("ls /results").split()
        return []

    run_shell("touch -d '8 days ago' /results/old; touch -d '6 days ago' /results/new")
    pool.runs_namespace.kubectl("delete", "pod", pod)
    wait_until(
        lambda: "new" in (found := list_results()) and "old" not in found, "only the old result to be removed", 120
    )


def wait_for_first_pod_death(api: httpx.Client, pool: Pool, run: str) -> datetime:
    """Wait until a run has ended its first pod itself; return the time from which `DETECTION_SECONDS` counts."""
    wait_for_state(api, run, "Running", 300)
    first = min(list_pods(pool, run), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    return wait_for_death(pool, first["metadata"]["name"])


@pytest.mark.further
def test_force_deleted_pod_is_retried(pool: Pool, api: httpx.Client) -> None:
    """The retry needs the slot that the first attempt held, and would wait for it if nothing had released it."""
    slot = create_limit(api, "force-deleted")
    run, pod = start_running(api, pool, deploy_victim(api, pool), seconds=300, slot=slot)
    wait_until(lambda: count_taken_slots(api, slot) == 1, "the slot to be taken")
    began = datetime.now(UTC)
    force_delete(pool.runs_namespace, pod)
    assert_state_within(api, run, "AwaitingRetry", began)
    assert_completed_by_one_retry(api, run)


def test_killed_process_is_retried_and_repeats_no_finished_task(pool: Pool, api: httpx.Client) -> None:
    run = start_stepwise(api, pool)
    assert_state_within(api, run, "Crashed", wait_for_first_pod_death(api, pool, run))
    assert_no_task_is_repeated(api, run)
    assert get_run(api, run)["run_count"] == 2
    assert sum(state["name"] == "AwaitingRetry" for state in list_states(api, run)) == 1


def test_oom_killed_run_gets_more_memory(pool: Pool, api: httpx.Client) -> None:
    deployment = deploy_victim(api, pool, job_variables={"memory_limit": "300Mi", "memory_growth": 2})
    run = start_run(api, deployment, parameters={"memory": 320})
    assert_state_within(api, run, "Crashed", wait_for_first_pod_death(api, pool, run))
    wait_until_completed(api, run)
    listed = list_states(api, run)
    retry = next(state for state in listed if state["name"] == "AwaitingRetry")
    assert "with 600Mi of memory in place of 300Mi" in retry["message"]
    assert "OOMKilled" in retry["message"]
    assert "it used at most 300 MiB" in retry["message"]
    assert get_run(api, run)["job_variables"]["memory_limit"] == "600Mi"
    wait_until(lambda: get_run(api, run)["labels"].get("reconciler.exceeded") == 300 * 2**20, "the limit to be noted")


def test_evicted_run_keeps_its_crash_budget(pool: Pool, api: httpx.Client) -> None:
    run, pod = start_running(api, pool, deploy_victim(api, pool, job_variables={"crash_retries": 0}), seconds=300)
    began = datetime.now(UTC)
    evict(pool.runs_namespace, pod)
    assert_state_within(api, run, "AwaitingRetry", began)
    wait_until_completed(api, run)
    assert get_run(api, run)["run_count"] == 2
    assert not get_run(api, run)["labels"].get("reconciler.crashes")


@pytest.mark.further
def test_deadline_ends_the_run_without_a_retry(pool: Pool, api: httpx.Client) -> None:
    """The flow's own retries do not extend the deadline either.

    The deadline counts from the start of the Job, and a run may take minutes to begin: the test shortens the deadline.
    """
    deployment = deploy_victim(api, pool, job_variables={"active_deadline_seconds": 900})
    run = start_run(api, deployment, parameters={"seconds": 600}, empirical_policy={"retries": 2, "retry_delay": 0})
    wait_for_log(api, run, "attempt 1 in", 300)
    jobs = ("jobs", "-l", f"prefect.io/flow-run-id={run}")
    deadline = pool.runs_namespace.kubectl("get", *jobs, "-o", "jsonpath={.items[*].spec.activeDeadlineSeconds}")
    assert deadline == "900"
    name = pool.runs_namespace.kubectl("get", *jobs, "-o", "name").strip()
    pool.runs_namespace.kubectl("patch", name, "--patch", '{"spec": {"activeDeadlineSeconds": 1}}')
    found = wait_for_state(api, run, "TimedOut", 180)
    assert found["type"] == "FAILED"
    assert "ran for longer than its activeDeadlineSeconds of 1." in found["message"]
    wait_until(lambda: all(map(is_ending, list_pods(pool, run))), "its pod to end", DETECTION_SECONDS)
    assert get_run(api, run)["state_name"] == "TimedOut"
    assert [state["name"] for state in list_states(api, run)].count("Running") == 1


def test_crash_budget_of_zero_retries_nothing_and_slots_are_released(pool: Pool, api: httpx.Client) -> None:
    """The slots are those of a tag and of `concurrency`. Their leases would expire after one and five minutes.

    A retry would take the slots again.
    """
    api.post("/concurrency_limits/", json={"tag": "scarce", "concurrency_limit": 1}).raise_for_status()
    limits = ["tag:scarce", create_limit(api, "scarce")]
    holding = create_deployment(api, pool, entrypoint="/probe/flow.py:holding", job_variables={"crash_retries": 0})
    run = start_run(api, holding)
    wait_until(lambda: [count_taken_slots(api, limit) for limit in limits] == [1, 1], "the slots to be taken", 300)
    [pod] = list_pods(pool, run)
    assert_state_within(api, run, "Crashed", kill_pod(pool, pod["metadata"]["name"]))
    wait_until(
        lambda: [count_taken_slots(api, limit) for limit in limits] == [0, 0],
        "the slots to be released",
        RELEASE_SECONDS,
    )
    wait_until(lambda: is_settled(api, run), "the decision not to retry")
    assert get_run(api, run)["state_type"] == "CRASHED"
    assert not find_state(api, run, "AwaitingRetry")


@pytest.mark.further
def test_given_up_run_leaves_no_task_or_subflow_running(pool: Pool, api: httpx.Client) -> None:
    stepwise = create_deployment(api, pool, entrypoint="/probe/flow.py:stepwise", job_variables={"crash_retries": 0})
    run = start_run(api, stepwise)
    wait_until(lambda: is_settled(api, run), "the decision not to retry", 400)
    body: Object = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
    subflows = read(api, "POST", "/flow_runs/filter", json=body)
    assert sorted(subflow["state_type"] for subflow in subflows) == ["COMPLETED", "CRASHED"]
    body = {"flow_runs": {"id": {"any_": [run, *(subflow["id"] for subflow in subflows)]}}}
    tasks = read(api, "POST", "/task_runs/filter", json=body)
    ends = {task["name"].partition("-")[0] + f" {task['state_type']}" for task in tasks}
    assert ends == {"step COMPLETED", "step CRASHED", "steps COMPLETED", "steps CRASHED"}


@pytest.mark.further
def test_main_container_decides_despite_sidecars(pool: Pool, api: httpx.Client) -> None:
    """Two sidecars and a native one outlive the main container. All runs are in parallel."""
    variables = {"crash_retries": 0, **sidecars()}
    bad = {"image": "localhost:5000/absent:1"}
    small = {"memory_limit": "300Mi"}
    runs = {
        "killed": start_run(api, deploy_victim(api, pool, job_variables=variables), parameters={"seconds": 300}),
        "evicted": start_run(api, deploy_victim(api, pool, job_variables=variables), parameters={"seconds": 300}),
        "cancelled": start_run(api, deploy_victim(api, pool, job_variables=variables), parameters={"seconds": 300}),
        "oom": start_run(api, deploy_victim(api, pool, job_variables=variables | small), parameters={"memory": 320}),
        "image": start_run(api, deploy_victim(api, pool, job_variables=variables | bad)),
    }
    for case in ("killed", "evicted", "cancelled"):
        wait_for_log(api, runs[case], "attempt 1 in", 300)
    [killed_pod], [evicted_pod] = list_pods(pool, runs["killed"]), list_pods(pool, runs["evicted"])
    names = [status["name"] for status in killed_pod["status"]["containerStatuses"]]
    assert names == ["aaa-proxy", "prefect-job", "zzz-proxy"]
    [native] = killed_pod["status"]["initContainerStatuses"]
    assert native["name"] == "native-proxy"
    assert native["state"].get("running")

    crashed = assert_state_within(api, runs["killed"], "Crashed", kill_pod(pool, killed_pod["metadata"]["name"]))
    assert "ended with exit code 137 (SIGKILL)" in crashed["message"]
    assert "attempt 1 in" in crashed["message"], "the end of the main container's log"
    began = datetime.now(UTC)
    evict(pool.runs_namespace, evicted_pod["metadata"]["name"])
    api.post(f"/flow_runs/{runs['cancelled']}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    assert_state_within(api, runs["evicted"], "AwaitingRetry", began)
    assert_state_within(api, runs["cancelled"], "Cancelled", began, GRACE_SECONDS + DETECTION_SECONDS)

    found = wait_for_state(api, runs["oom"], "Crashed", 180)
    assert "exceeded its memory limit of 300Mi; it used at most 300 MiB" in found["message"]
    given_up = wait_for_state(api, runs["image"], "Crashed", PENDING_TIMEOUT_SECONDS + 150)["message"]
    assert "absent:1" in given_up
    assert given_up.count("Given up after") == 1
    wait_until_completed(api, runs["evicted"])
    for run in runs.values():
        wait_until(lambda run=run: all(map(is_ending, list_pods(pool, run))), "the Job to be deleted")  # type: ignore[misc]
    assert get_run(api, runs["evicted"])["run_count"] == 2


@pytest.mark.further
def test_kubernetes_retries_the_pod_of_a_run_with_a_backoff_limit(pool: Pool, api: httpx.Client) -> None:
    """The reconciler leaves the run alone until its Job is finished, and no retry budget is used."""
    variables = {"backoff_limit": 1, "crash_retries": 0}
    run = start_run(api, deploy_victim(api, pool, job_variables=variables), parameters={"killed": True})
    wait_until_completed(api, run, 400)
    assert get_run(api, run)["run_count"] == 2
    assert {"Crashed", "AwaitingRetry"}.isdisjoint(state["name"] for state in list_states(api, run))
    first, second = list_pods(pool, run)
    assert first["metadata"]["labels"]["job-name"] == second["metadata"]["labels"]["job-name"]
