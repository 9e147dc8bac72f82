"""What becomes of a run whose pod dies, does not start or is no longer wanted, or whose server is away.

The API shows it within seconds.
"""

import contextlib
import copy
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from tests.cluster.progress import ClusterError
from tests.e2e.release import SMALL, Object, Release
from tests.e2e.runs import deployment, ended, logged, run_of, start
from tests.parts import wait_until

NAME = "prefect-work-pool"

SEEN = 15.0
"""Seconds within which the API says what has happened."""


@pytest.fixture(scope="module")
def probe() -> Object:
    flow = Path(__file__).with_name("flow.py").read_text()
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "probe"}, "data": {"flow.py": flow}}


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    made = copy.deepcopy(values)
    made["sync"] = {"files": []}
    made["drift"] = {"enabled": False}
    made["runs"]["results"] = {"storage": "volume", "volume": {"size": "100Mi"}}
    made["reconciler"] = {
        "everySeconds": 1,
        "pendingTimeoutSeconds": 30,
        "resources": {"requests": dict(SMALL), "limits": {"memory": "256Mi"}},
    }
    return made


def victim(api: httpx.Client, **fields: object) -> str:
    """A deployment of the flow; its id."""
    return deployment(api, entrypoint="/probe/flow.py:victim", **fields)


def states(api: httpx.Client, run: str) -> list[Object]:
    """The run's states, the first one first."""
    found = api.get("/flow_run_states/", params={"flow_run_id": run}).raise_for_status().json()
    return sorted(found, key=lambda each: str(each["timestamp"]))


def state_named(api: httpx.Client, run: str, name: str, seconds: float = SEEN) -> Object:
    """The run's first state of that name, within some seconds."""

    def found() -> Object | None:
        return next((each for each in states(api, run) if each["name"] == name), None)

    made: Object = wait_until(found, f"{name} of {run}", seconds)
    return made


def pods(pool: Release, run: str) -> list[Object]:
    listed = pool.namespace.kubectl("get", "pods", "-l", f"prefect.io/flow-run-id={run}", "-o", "json")
    found: list[Object] = json.loads(listed)["items"]
    return found


def under_way(api: httpx.Client, pool: Release, deployment_id: str, **parameters: object) -> tuple[str, str]:
    """A run that logs already; its id and its pod."""
    run = start(api, deployment_id, parameters=parameters)
    logged(api, run, "execution 1", 120)
    [pod] = pods(pool, run)
    return run, str(pod["metadata"]["name"])


def _ending(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"] or pod["status"]["phase"] in ("Succeeded", "Failed")


def seconds_between(earlier: Object, later: Object) -> float:
    first, second = (datetime.fromisoformat(str(each["timestamp"])) for each in (earlier, later))
    return (second - first).total_seconds()


@contextlib.contextmanager
def without(pool: Release, component: str) -> Iterator[None]:
    """The release without the pods of a component, while the block lasts."""
    name = f"deployment/{NAME}-{component}"
    replicas = pool.namespace.kubectl("get", name, "-o", "jsonpath={.spec.replicas}")
    pool.namespace.kubectl("scale", name, "--replicas=0")
    wait_until(lambda: not pool.pods(component), f"{component} to be gone", 90)
    try:
        yield
    finally:
        pool.namespace.kubectl("scale", name, f"--replicas={replicas}")
        pool.namespace.kubectl("rollout", "status", name, "--timeout=120s")


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


def killed(pool: Release, pod: str) -> None:
    """All of a pod's processes by SIGKILL, as when a node is in need: nothing of it can say so."""
    with contextlib.suppress(ClusterError):  # it kills itself too
        pool.namespace.kubectl("exec", pod, "--", "python", "-c", "import os; os.kill(-1, 9)")


def test_a_killed_pod_is_tried_again(pool: Release, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api), seconds=20)
    killed(pool, pod)
    crashed = state_named(api, run, "Crashed")
    assert f"Pod {pod} ended with exit code 137 (SIGKILL)" in crashed["message"]
    assert "execution 1" in crashed["message"], "the end of its log"
    listed = completed_by_a_retry(api, run)
    again = next(each for each in listed if each["name"] == "AwaitingRetry")
    assert again["message"].startswith("Retry 1 of 2 after a crash")
    assert seconds_between(crashed, again) < SEEN


def test_a_retry_does_not_repeat_what_had_finished(pool: Release, api: httpx.Client) -> None:
    """Not even in a flow that the flow had called; what was half done is done again, with the same key."""
    run = start(api, deployment(api, entrypoint="/probe/flow.py:stepwise"))
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


def test_old_results_are_removed(pool: Release, api: httpx.Client) -> None:
    [pod] = pool.pods("results")

    def run(script: str) -> str:
        return pool.namespace.kubectl("exec", pod["metadata"]["name"], "--", "sh", "-c", script)

    run("touch -d '8 days ago' /results/old; touch -d '6 days ago' /results/new")
    pool.namespace.kubectl("delete", "pod", pod["metadata"]["name"])
    pool.namespace.kubectl("rollout", "status", f"statefulset/{NAME}-results", "--timeout=120s")
    wait_until(lambda: "old" not in run("ls /results").split(), "the old one to go")
    assert "new" in run("ls /results").split()


def test_a_force_deleted_pod_is_tried_again(pool: Release, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api), seconds=20)
    pool.namespace.kubectl("delete", "pod", pod, "--force", "--grace-period=0")
    state_named(api, run, "AwaitingRetry")
    completed_by_a_retry(api, run)


def test_a_killed_process_is_tried_again(pool: Release, api: httpx.Client) -> None:
    run = start(api, victim(api), parameters={"killed": True})
    state_named(api, run, "Crashed", 120)
    completed_by_a_retry(api, run)


def test_what_runs_out_of_memory_gets_more(pool: Release, api: httpx.Client) -> None:
    made = victim(api, job_variables={"memory_limit": "300Mi", "memory_growth": 2})
    run = start(api, made, parameters={"memory": 320})
    completed(api, run)
    listed = states(api, run)
    again = next(each for each in listed if each["name"] == "AwaitingRetry")
    assert "with 600Mi of memory in place of 300Mi" in again["message"]
    assert "OOMKilled" in again["message"]
    assert "it used 300 MiB at the most" in again["message"]
    assert run_of(api, run)["job_variables"]["memory_limit"] == "600Mi"


def test_an_eviction_leaves_the_crash_budget_alone(pool: Release, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api, job_variables={"crash_retries": 0}), seconds=20)
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": pool.namespace.name},
    }
    pool.namespace.kubectl(
        "create", "--raw", f"/api/v1/namespaces/{pool.namespace.name}/pods/{pod}/eviction", "-f", "-",
        text=json.dumps(eviction),
    )  # fmt: skip
    state_named(api, run, "AwaitingRetry")
    completed(api, run)
    assert run_of(api, run)["run_count"] == 2
    assert not run_of(api, run)["labels"].get("reconciler.crashes")


def test_a_budget_ends(pool: Release, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api, job_variables={"crash_retries": 0}), seconds=60)
    killed(pool, pod)
    state_named(api, run, "Crashed")
    wait_until(lambda: run_of(api, run)["labels"].get("reconciler.settled"), "the verdict", 30)
    assert run_of(api, run)["state_type"] == "CRASHED"
    assert len([each for each in states(api, run) if each["name"] == "AwaitingRetry"]) == 0


@pytest.mark.parametrize(
    ("variables", "word", "said"),
    [
        ({"image": "localhost:5000/absent:1"}, "ImagePullBackOff", "absent:1"),
        ({"cpu_request": "1000"}, "Unschedulable", "Insufficient cpu"),
    ],
)
def test_what_cannot_start_is_said_and_given_up(
    pool: Release, api: httpx.Client, variables: Object, word: str, said: str
) -> None:
    run = start(api, victim(api, job_variables=variables))
    made = state_named(api, run, "Submitting", 60)
    stuck = state_named(api, run, word)
    assert said in stuck["message"]
    assert seconds_between(made, stuck) < SEEN
    crashed = state_named(api, run, "Crashed", 60)
    assert "Given up after" in crashed["message"]
    assert ended(api, run)["state_type"] == "CRASHED"
    wait_until(lambda: not pods(pool, run), "its pod to go", 60)
    wait_until(lambda: run_of(api, run)["labels"].get("reconciler.settled"), "the verdict: no retry can help", 30)
    assert run_of(api, run)["state_type"] == "CRASHED"


def test_what_the_quota_refuses_is_said(pool: Release, api: httpx.Client) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "LimitRange",
        "metadata": {"name": "small"},
        "spec": {"limits": [{"type": "Container", "max": {"memory": "4Gi"}}]},
    }
    pool.namespace.apply(quota)
    try:
        run = start(api, victim(api, job_variables={"memory_limit": "5Gi"}))
        stuck = state_named(api, run, "PodRefused", 60)
        assert "maximum memory usage per Container is 4Gi" in stuck["message"]
        assert "Given up after" in state_named(api, run, "Crashed", 60)["message"]
    finally:
        pool.namespace.kubectl("delete", "limitrange", "small")


def test_what_nobody_wants_any_more_is_ended(pool: Release, api: httpx.Client) -> None:
    made = victim(api)
    deleted, _ = under_way(api, pool, made, seconds=300)
    api.delete(f"/flow_runs/{deleted}").raise_for_status()
    began = time.monotonic()
    wait_until(lambda: all(_ending(each) for each in pods(pool, deleted)), "its pod to be told", 30)
    assert time.monotonic() - began < 30
    wait_until(lambda: not pods(pool, deleted), "the pod of a deleted run to go", 90)


def test_a_cancelled_run_ends_without_a_worker(pool: Release, api: httpx.Client) -> None:
    run, _ = under_way(api, pool, victim(api), seconds=300)
    with without(pool, "worker"):
        began = time.monotonic()
        api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
        assert ended(api, run, 120)["state_type"] == "CANCELLED"
        assert time.monotonic() - began < 60 + 15 + SEEN
        wait_until(lambda: all(map(_ending, pods(pool, run))), "its pod to end", 30)


def test_a_claim_whose_worker_died_is_taken_again(pool: Release, api: httpx.Client) -> None:
    """As if the worker had died right after its claim: nobody makes a Job."""
    with without(pool, "worker"):
        run = start(api, victim(api))
        pending = {"state": {"type": "PENDING"}}
        api.post(f"/flow_runs/{run}/set_state", json=pending).raise_for_status()

        def taken_back() -> bool:
            newest = run_of(api, run)["state"]
            return newest["type"] == "SCHEDULED" and "No worker made a Job" in (newest["message"] or "")

        wait_until(taken_back, "the claim to be taken back", 60 + SEEN)
    completed(api, run)
    assert run_of(api, run)["run_count"] == 1


def test_the_reconciler_s_leader_is_replaced(pool: Release, api: httpx.Client) -> None:
    lease = json.loads(pool.namespace.kubectl("get", "lease", f"{NAME}-reconciler", "-o", "json"))
    leader = lease["spec"]["holderIdentity"]
    assert leader in [pod["metadata"]["name"] for pod in pool.pods("reconciler")]
    run, pod = under_way(api, pool, victim(api), seconds=20)
    pool.namespace.kubectl("delete", "pod", leader, "--force", "--grace-period=0")
    killed(pool, pod)
    state_named(api, run, "Crashed", 45)
    completed_by_a_retry(api, run)


def test_nothing_of_it_works_without_the_reconciler(pool: Release, api: httpx.Client) -> None:
    """What the tests above see is its doing."""
    with without(pool, "reconciler"):
        run, pod = under_way(api, pool, victim(api), seconds=20)
        killed(pool, pod)
        time.sleep(2 * SEEN)
        assert run_of(api, run)["state_type"] == "RUNNING"
    # And what happened while it was away is found when it is back.
    completed_by_a_retry(api, run)


def test_a_server_that_is_away_and_a_database_that_is_killed_lose_nothing(server: Release, pool: Release) -> None:
    """A run under way completes in its first execution with its whole log; what fell due meanwhile is executed once.

    It comes last: `api` goes by the server's pod.
    """
    namespace, times, away = pool.namespace, 110, 120
    with server.api() as api:
        minutely = victim(api, schedules=[{"schedule": {"cron": "* * * * *"}}])
        run = start(api, deployment(api, entrypoint="/probe/flow.py:ticking"), parameters={"times": times})
        logged(api, run, "tick 5", 120)
    began = datetime.now(UTC)
    namespace.kubectl("scale", "deployment/prefect-server-api", "--replicas=0")
    namespace.kubectl(
        "delete", "pod", "-l", "app.kubernetes.io/component=api", "--force", "--grace-period=0", "--wait=false"
    )
    time.sleep(away)
    namespace.kubectl("scale", "deployment/prefect-server-api", "--replicas=1")
    namespace.kubectl("rollout", "status", "deployment/prefect-server-api", "--timeout=120s")
    back = datetime.now(UTC)
    missed = {
        moment
        for number in range(1, away // 60 + 3)
        if began < (moment := began.replace(second=0, microsecond=0) + timedelta(minutes=number)) < back
    }

    def of_the_schedule(api: httpx.Client) -> dict[datetime, list[Object]]:
        body = {"deployments": {"id": {"any_": [minutely]}}, "limit": 200}
        made: dict[datetime, list[Object]] = defaultdict(list)
        for each in api.post("/flow_runs/filter", json=body).raise_for_status().json():
            made[datetime.fromisoformat(each["expected_start_time"])].append(each)
        return made

    with server.api() as api:
        wait_until(
            lambda: all(each["start_time"] for moment in missed for each in of_the_schedule(api)[moment]),
            "the missed runs to begin",
            60,
        )
    database = "pod/prefect-server-database-0"
    before = namespace.kubectl("get", database, "-o", "jsonpath={.metadata.uid}")
    namespace.kubectl("delete", database, "--force", "--grace-period=0")
    wait_until(
        lambda: (
            namespace.kubectl("get", database, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}")
            not in ("", before)
        ),
        "another pod of the database",
    )
    namespace.kubectl("wait", database, "--for=condition=Ready", "--timeout=120s")

    def answers_again() -> bool:
        # 500 while the database is away, and until the cluster's DNS has its new address; connections may break.
        with contextlib.suppress(httpx.HTTPError), server.api() as api:
            return api.get(f"/flow_runs/{run}").is_success
        return False

    wait_until(answers_again, "the API to have its database again", 90)
    with server.api() as api:
        found = ended(api, run, 2 * times)
        assert (found["state_type"], found["run_count"]) == ("COMPLETED", 1)
        lines = [line.split()[1] for line in logged(api, run, "the end") if line.startswith("tick")]
        assert sorted(map(int, lines)) == [*range(times)]
        for moment in missed:
            [once] = of_the_schedule(api)[moment]
            assert (ended(api, once["id"])["state_type"], once["run_count"]) == ("COMPLETED", 1)
            assert datetime.fromisoformat(once["start_time"]) - back < timedelta(seconds=30)
