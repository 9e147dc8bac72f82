"""What becomes of a run whose pod dies, does not start or is no longer wanted. The API shows it within seconds."""

import contextlib
import copy
import json
import re
import time
from datetime import UTC, datetime

import httpx
import pytest

from tests.cluster import images
from tests.cluster.progress import ClusterError
from tests.e2e.faults.victims import (
    GRACE,
    SEEN,
    completed,
    completed_by_a_retry,
    death,
    ending,
    evicted,
    force_deleted,
    in_time,
    killed,
    leader,
    pods,
    said_in_time,
    scarce,
    seconds_between,
    shown,
    state_named,
    state_so_far,
    states,
    taken,
    under_way,
    victim,
    without,
)
from tests.e2e.release import Object, Release
from tests.e2e.runs import deployment, ended, logged, run_of, start
from tests.parts import wait_until


def test_a_killed_pod_is_tried_again(pool: Release, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api), seconds=60)
    [found] = pods(pool, run)
    crashed = said_in_time(api, run, "Crashed", killed(pool, pod))
    assert f"Pod {pod} on {found['spec']['nodeName']} ended with exit code 137 (SIGKILL)" in crashed["message"]
    assert "execution 1" in crashed["message"], "the end of its log"
    listed = completed_by_a_retry(api, run)
    again = next(each for each in listed if each["name"] == "AwaitingRetry")
    assert again["message"].startswith("Retry 1 of 2 after a crash")
    assert seconds_between(crashed, again) < SEEN


def nothing_is_repeated(api: httpx.Client) -> None:
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


def test_a_retry_does_not_repeat_what_had_finished(pool: Release, api: httpx.Client) -> None:
    nothing_is_repeated(api)


def test_old_results_are_removed(pool: Release, api: httpx.Client) -> None:
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


def of_itself(api: httpx.Client, pool: Release, run: str) -> datetime:
    """The death of a run's first pod, which is its own doing."""
    state_named(api, run, "Running", 120)
    first = min(pods(pool, run), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    return death(pool, first["metadata"]["name"])


def test_a_force_deleted_pod_is_tried_again(pool: Release, api: httpx.Client) -> None:
    """The retry needs the slot that it held, and waits in vain if nobody has given it back."""
    slot = scarce(api, "force-deleted")
    run, pod = under_way(api, pool, victim(api), seconds=60, slot=slot)
    wait_until(lambda: taken(api, slot) == 1, "the slot to be taken")
    began = datetime.now(UTC)
    force_deleted(pool.namespace, pod)
    said_in_time(api, run, "AwaitingRetry", began)
    completed_by_a_retry(api, run)


def test_a_killed_process_is_tried_again(pool: Release, api: httpx.Client) -> None:
    run = start(api, victim(api), parameters={"killed": True})
    said_in_time(api, run, "Crashed", of_itself(api, pool, run))
    completed_by_a_retry(api, run)


def test_what_runs_out_of_memory_gets_more(pool: Release, api: httpx.Client) -> None:
    made = victim(api, job_variables={"memory_limit": "300Mi", "memory_growth": 2})
    run = start(api, made, parameters={"memory": 320})
    said_in_time(api, run, "Crashed", of_itself(api, pool, run))
    completed(api, run)
    listed = states(api, run)
    again = next(each for each in listed if each["name"] == "AwaitingRetry")
    assert "with 600Mi of memory in place of 300Mi" in again["message"]
    assert "OOMKilled" in again["message"]
    assert "it used 300 MiB at the most" in again["message"]
    assert run_of(api, run)["job_variables"]["memory_limit"] == "600Mi"
    wait_until(lambda: run_of(api, run)["labels"].get("reconciler.exceeded") == 300 * 2**20, "the limit to be noted")


def test_an_eviction_leaves_the_crash_budget_alone(pool: Release, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api, job_variables={"crash_retries": 0}), seconds=60)
    began = datetime.now(UTC)
    evicted(pool.namespace, pod)
    said_in_time(api, run, "AwaitingRetry", began)
    completed(api, run)
    assert run_of(api, run)["run_count"] == 2
    assert not run_of(api, run)["labels"].get("reconciler.crashes")


def test_a_budget_ends(pool: Release, api: httpx.Client) -> None:
    run, pod = under_way(api, pool, victim(api, job_variables={"crash_retries": 0}), seconds=60)
    said_in_time(api, run, "Crashed", killed(pool, pod))
    wait_until(lambda: is_settled(api, run), "the verdict", 30)
    assert run_of(api, run)["state_type"] == "CRASHED"
    assert len([each for each in states(api, run) if each["name"] == "AwaitingRetry"]) == 0


@pytest.mark.parametrize(
    ("variables", "word", "said"),
    [
        ({"image": "localhost:5000/absent:1"}, "ImagePullBackOff", "absent:1"),
        ({"cpu_request": "1000"}, "Unschedulable", "Insufficient cpu"),
        ({"secret": "absent"}, "CreateContainerConfigError", 'secret "absent" not found'),
    ],
)
def test_what_cannot_start_is_said_and_given_up(
    pool: Release, api: httpx.Client, variables: Object, word: str, said: str
) -> None:
    run = start(api, victim(api, job_variables=variables))

    def waits() -> list[Object]:
        found = pods(pool, run)
        # The first of failed pulls has a word of its own.
        return found if re.search(f"{word}|ErrImagePull", json.dumps(found)) else []

    [pod] = wait_until(waits, f"{word} of its pod", 120)
    created = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
    assert said in said_in_time(api, run, word, shown(created, datetime.now(UTC)))["message"]
    crashed = state_named(api, run, "Crashed", 90)
    assert "Given up after" in crashed["message"]
    assert ended(api, run)["state_type"] == "CRASHED"
    wait_until(lambda: not pods(pool, run), "its pod to go", 60)
    wait_until(lambda: is_settled(api, run), "the verdict: no retry can help", 30)
    assert run_of(api, run)["state_type"] == "CRASHED"


def is_settled(api: httpx.Client, run: str) -> bool:
    """Whether it was said that the run is not tried again."""
    return bool(run_of(api, run)["labels"].get("reconciler.settled"))


def test_a_run_that_cannot_start_keeps_its_slot_no_longer_than_that(pool: Release, api: httpx.Client) -> None:
    """The deployment's limit of one lets the next run in once it is given up."""
    made = victim(api, concurrency_limit=1, concurrency_options={"collision_strategy": "ENQUEUE"})
    stuck = start(api, made, job_variables={"image": "localhost:5000/absent:1"})
    state_named(api, stuck, "ImagePullBackOff", 60)
    waiting = start(api, made)
    state_named(api, stuck, "Crashed", 90)
    completed(api, waiting)
    assert run_of(api, waiting)["run_count"] == 1


def test_slots_are_given_back_with_the_execution_that_held_them(pool: Release, api: httpx.Client) -> None:
    """That of a tag and that of `concurrency`, by whoever gives up the run: the server's own leases of them end only a
    minute later, and five.
    """
    api.post("/concurrency_limits/", json={"tag": "scarce", "concurrency_limit": 1}).raise_for_status()
    limits = ["tag:scarce", scarce(api, "scarce")]
    run = start(api, deployment(api, entrypoint="/probe/flow.py:holding"))
    wait_until(lambda: [taken(api, each) for each in limits] == [1, 1], "the slots to be taken", 120)
    state_named(api, run, "AwaitingRetry", 60)
    # A pod of the retry, which takes them again, has yet to be made.
    assert [taken(api, each) for each in limits] == [0, 0]
    completed(api, run)


def test_nothing_of_a_run_that_is_given_up_says_that_it_goes_on(pool: Release, api: httpx.Client) -> None:
    made = deployment(api, entrypoint="/probe/flow.py:stepwise", job_variables={"crash_retries": 0})
    run = start(api, made)
    wait_until(lambda: is_settled(api, run), "the verdict", 120)
    body: Object = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
    called = api.post("/flow_runs/filter", json=body).raise_for_status().json()
    assert sorted(each["state_type"] for each in called) == ["COMPLETED", "CRASHED"]
    body = {"flow_runs": {"id": {"any_": [run, *(each["id"] for each in called)]}}}
    tasks = api.post("/task_runs/filter", json=body).raise_for_status().json()
    ends = {each["name"].partition("-")[0] + f" {each['state_type']}" for each in tasks}
    assert ends == {"step COMPLETED", "step CRASHED", "steps COMPLETED", "steps CRASHED"}


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        (
            "LimitRange",
            {"limits": [{"type": "Container", "max": {"memory": "4Gi"}}]},
            "maximum memory usage per Container is 4Gi",
        ),
        ("ResourceQuota", {"hard": {"requests.storage": "1Ti", "limits.memory": "8Gi"}}, "exceeded quota: small"),
    ],
)
def test_what_is_not_allowed_is_said(pool: Release, api: httpx.Client, kind: str, spec: Object, said: str) -> None:
    pool.namespace.apply({"apiVersion": "v1", "kind": kind, "metadata": {"name": "small"}, "spec": spec})
    try:
        run = start(api, victim(api, job_variables={"memory_limit": "9Gi"}))
        made = state_named(api, run, "Submitting", 60)
        stuck = state_named(api, run, "PodRefused", 60)
        assert said in stuck["message"]
        assert seconds_between(made, stuck) < SEEN
        assert "Given up after" in state_named(api, run, "Crashed", 60)["message"]
    finally:
        pool.namespace.kubectl("delete", kind, "small")


def test_what_nobody_wants_any_more_is_ended(pool: Release, api: httpx.Client) -> None:
    made = victim(api)
    deleted, _ = under_way(api, pool, made, seconds=300)
    began = datetime.now(UTC)
    api.delete(f"/flow_runs/{deleted}").raise_for_status()
    wait_until(lambda: all(ending(each) for each in pods(pool, deleted)), "its pod to be told", 60)
    in_time("its pod is told to end", began, datetime.now(UTC), 30)
    wait_until(lambda: not pods(pool, deleted), "the pod of a deleted run to go", 90)


def test_a_run_whose_deployment_is_deleted_is_ended(pool: Release, api: httpx.Client) -> None:
    made = victim(api)
    run, _ = under_way(api, pool, made, seconds=300)
    began = datetime.now(UTC)
    api.delete(f"/deployments/{made}").raise_for_status()
    said_in_time(api, run, "Cancelling", began)
    assert ended(api, run, 120)["state_type"] == "CANCELLED"
    assert "deployment was deleted" in state_named(api, run, "Cancelling")["message"]
    wait_until(lambda: all(map(ending, pods(pool, run))), "its pod to end", 30)


def test_a_run_that_does_not_hear_sigterm_is_cancelled(pool: Release, api: httpx.Client) -> None:
    run, _ = under_way(api, pool, victim(api), seconds=300, deaf=True)
    began = datetime.now(UTC)
    api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    said_in_time(api, run, "Cancelled", began, GRACE + SEEN)
    wait_until(lambda: all(map(ending, pods(pool, run))), "its pod to end", SEEN)


def test_a_cancelled_run_ends_without_a_worker(pool: Release, api: httpx.Client) -> None:
    run, _ = under_way(api, pool, victim(api), seconds=300)
    with without(pool, "worker"):
        began = datetime.now(UTC)
        api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
        said_in_time(api, run, "Cancelled", began, GRACE + SEEN)
        wait_until(lambda: all(map(ending, pods(pool, run))), "its pod to end", 30)


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
    leads = leader(pool)
    assert leads in [pod["metadata"]["name"] for pod in pool.pods("reconciler")]
    run, pod = under_way(api, pool, victim(api), seconds=60)
    force_deleted(pool.namespace, leads)
    killed(pool, pod)
    state_named(api, run, "Crashed", 45)
    completed_by_a_retry(api, run)


def test_nothing_of_it_works_without_the_reconciler(pool: Release, api: httpx.Client) -> None:
    """What the tests above see is its doing."""
    made = victim(api)
    with without(pool, "reconciler"):
        crashes = start(api, made, parameters={"killed": True})
        stuck = start(api, victim(api, job_variables={"image": "localhost:5000/absent:1"}))
        dead, pod = under_way(api, pool, made, seconds=60)
        killed(pool, pod)
        # On a busy node its process goes on for a while.
        gone, pod = under_way(api, pool, made, seconds=60)
        force_deleted(pool.namespace, pod)
        unwanted, _ = under_way(api, pool, made, seconds=300)
        api.delete(f"/flow_runs/{unwanted}").raise_for_status()
        time.sleep(2 * SEEN)
        for each in (crashes, dead):
            assert run_of(api, each)["state_type"] == "RUNNING", states(api, each)
        # Where the kubelet gave it the time to, it has said itself that it is to be tried again, and was.
        assert not state_so_far(api, gone, "Crashed")
        assert "ImagePullBackOff" not in [each["name"] for each in states(api, stuck)]
        assert not any(map(ending, pods(pool, unwanted)))
    # And what happened while it was away is found when it is back.
    for each in (crashes, dead, gone):
        completed_by_a_retry(api, each)
    # By then that has been in vain for longer than it may be.
    given_up = state_named(api, stuck, "Crashed")["message"]
    assert "absent:1" in given_up
    assert "Given up after" in given_up
    wait_until(lambda: all(map(ending, pods(pool, unwanted))), "the pod of a deleted run to be told", SEEN)


def results_in(pool: Release, values: Object, service: Object, port: int, **results: object) -> None:
    """From now on results are there: in pods of these labels, which the runs may reach at that port."""
    runs = {"matchLabels": {"prefect.io/role": "flow-run"}}
    pool.namespace.apply(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": f"results-{port}"},
            "spec": {
                "podSelector": service,
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [{"podSelector": runs}], "ports": [{"port": port}]}],
            },
        },
    )
    values["runs"]["results"] = results
    values["networkPolicy"] = {"extraEgress": [{"to": [{"podSelector": service}], "ports": [{"port": port}]}]}
    pool.deploy(values)
    pool.one_worker()


def test_nor_does_it_where_results_are_in_a_redis(pool: Release, api: httpx.Client, values: Object) -> None:
    """The server's own, with another database of it. The results of all tests after this one are elsewhere."""
    password = pool.secret("prefect-server-redis", "password")
    url = f"redis://:{password}@prefect-server-redis:6379/1"
    pool.namespace.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "results"}, "stringData": {"url": url}}
    )
    redis = {"matchLabels": {"app.kubernetes.io/name": "prefect-server", "app.kubernetes.io/component": "redis"}}
    from_secret = {"existingSecret": "results", "key": "url"}
    results_in(pool, copy.deepcopy(values), redis, 6379, storage="redis", redis=from_secret, keepDays=1)
    nothing_is_repeated(api)


def test_nor_does_it_where_results_are_in_s3(pool: Release, api: httpx.Client, values: Object) -> None:
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
    # What is a folder in its own is a bucket.
    folders = {"metadata": "/metadata", "buckets": "/buckets", "results": "/buckets/results"}
    container = {
        "image": images.of_program("versitygw"),
        "command": ["/versitygw", "--port", ":7070", "posix", "--sidecar", "/metadata", "/buckets"],
        "env": [{"name": name, "valueFrom": secret[of]} for name, of in root.items()],
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in folders.items()],
        "readinessProbe": {"tcpSocket": {"port": 7070}, "periodSeconds": 1},
    }
    pool.namespace.pod("s3", container=container, volumes=[{"name": name, "emptyDir": {}} for name in folders])
    made = copy.deepcopy(values)
    made["runs"]["env"] += [{"name": name, "valueFrom": each} for name, each in secret.items()]
    s3 = {"bucket": "results", "endpoint": "http://s3:7070", "region": "us-east-1"}
    results_in(pool, made, {"matchLabels": {"app": "s3"}}, 7070, storage="s3", s3=s3)
    nothing_is_repeated(api)
    kept = re.findall(r"200 .* PUT \| /results/(\S+)/", pool.namespace.kubectl("logs", "s3"))
    assert set(kept) == {f"{pool.namespace.name}/{pool.name}"}
