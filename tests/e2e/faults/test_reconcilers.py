"""Runs while reconcilers are killed, away, two without a leader, or see another time."""

import asyncio
import base64
import contextlib
import copy
import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestration.health import Pulse
from orchestration.prefect_api import Server
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.loop import Reconciler
from orchestration.reconciler.model import Policy
from tests.cluster.namespace import Namespace, proxied
from tests.e2e.faults.victims import (
    NAME,
    SEEN,
    completed,
    completed_by_a_retry,
    ending,
    force_deleted,
    killed,
    leader,
    pods,
    said_in_time,
    seconds_between,
    state_named,
    state_so_far,
    states,
    under_way,
    victim,
    without,
)
from tests.e2e.release import Object, Pool, Release, installed_pool
from tests.e2e.runs import lines, run_of, start
from tests.parts import wait_until

LOOKED = "reconciler_round_seconds_count"


FAKE = {"LD_PRELOAD": "/faketime/libfaketime.so.1", "FAKETIME": "+300"}
"""The environment of a process whose clock is five minutes ahead."""


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    made = copy.deepcopy(values)
    made["reconciler"]["replicas"] = 2
    for component in (made["runs"], made["reconciler"]):
        pod = component.setdefault("pod", {})
        pod["volumes"] = [*pod.get("volumes", []), {"name": "faketime", "configMap": {"name": "faketime"}}]
        pod["volumeMounts"] = [*pod.get("volumeMounts", []), {"name": "faketime", "mountPath": "/faketime"}]
    return made


@pytest.fixture(scope="module")
def pool(server: Release, pool_namespace: Namespace, values: Object, probe: Object) -> Pool:
    [library] = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    content = base64.b64encode(library.read_bytes()).decode()
    pool_namespace.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "faketime"},
            "binaryData": {library.name: content},
        }
    )
    return installed_pool(server, pool_namespace, values, probe)


class _KilledError(BaseException):
    """Kills a reconciler."""


@contextlib.asynccontextmanager
async def reconciler(pool: Pool, api: httpx.Client, kubernetes: str, dies_at: int = 0) -> AsyncIterator[Reconciler]:
    """One of the pool's, without a lease, in this process.

    Args:
        pool: whose.
        api: of Prefect.
        kubernetes: the URL of the Kubernetes API.
        dies_at: the request that changes something at which it dies, before that is sent or, where the number is even,
            after; 0 is never.
    """
    changes, dead = 0, False

    def reads(request: httpx.Request) -> bool:
        return request.method == "GET" or request.url.path.endswith(("/filter", "/count"))

    async def before(request: httpx.Request) -> None:
        nonlocal changes, dead
        changes += not reads(request)
        dead = dead or (dies_at % 2 == 1 and changes == dies_at)
        if dead:
            raise _KilledError

    async def after(response: httpx.Response) -> None:
        nonlocal dead
        dead = dead or (dies_at % 2 == 0 and 0 < dies_at == changes and not reads(response.request))
        if dead:
            raise _KilledError

    hooks: dict[str, list[Any]] = {"request": [before], "response": [after]}
    async with (
        httpx.AsyncClient(base_url=api.base_url, auth=api.auth, timeout=30, event_hooks=hooks) as prefect,
        httpx.AsyncClient(base_url=kubernetes, timeout=30, event_hooks=hooks) as client,
    ):
        cluster = Cluster(client, pool.namespace.name)
        yield Reconciler(Server(prefect, str(api.base_url)), cluster, pool.work_pool, Policy(), None, Pulse(60))


@pytest.fixture
def kubernetes(pool: Pool) -> Iterator[str]:
    with proxied(pool.namespace.context) as url:
        yield url


def dead_runs(pool: Pool, api: httpx.Client, number: int) -> list[str]:
    """Return runs whose pods were killed while no reconciler was there."""
    made = victim(api, pool)
    runs = [start(api, made, parameters={"seconds": 300}) for _ in range(number)]
    alive = set(runs)

    def begun() -> str | None:
        return next((run for run in alive if any(line.startswith("execution 1") for line in lines(api, run))), None)

    while alive:
        run = wait_until(begun, "another one to begin", 300)
        [pod] = pods(pool, run)
        killed(pool, pod["metadata"]["name"])
        alive.remove(run)
    assert all(run_of(api, run)["state_type"] == "RUNNING" for run in runs)
    return runs


def test_reconciler_killed_at_any_point_does_everything_once(pool: Pool, api: httpx.Client, kubernetes: str) -> None:
    async def until_nothing_is_left() -> int:
        deaths = 0
        while True:
            async with reconciler(pool, api, kubernetes, deaths + 1) as mortal:
                try:
                    while await mortal.round():
                        pass
                except _KilledError:
                    deaths += 1
                    continue
            found = [run_of(api, run) for run in runs]
            if all(each["state_type"] != "RUNNING" and each["labels"].get("reconciler.crashes") for each in found):
                return deaths
            await asyncio.sleep(0.5)

    with without(pool, "reconciler"):
        runs = dead_runs(pool, api, 3)
        deaths = asyncio.run(until_nothing_is_left())
    assert deaths > 3
    for run in runs:
        completed_by_a_retry(api, run)
        assert run_of(api, run)["labels"]["reconciler.crashes"] == 1


def test_reconciler_hears_of_a_death_long_before_its_next_round(pool: Pool, api: httpx.Client, kubernetes: str) -> None:
    async def listen() -> None:
        async with reconciler(pool, api, kubernetes) as one:
            looking = asyncio.create_task(one.run(60))
            looks = one.pulse.registry.get_sample_value
            # The second one comes when it listens.
            await asyncio.to_thread(wait_until, lambda: looks(LOOKED) == 2, "the second look")
            killed(pool, pod)
            try:
                await asyncio.to_thread(state_named, api, run, "AwaitingRetry", 45)
            finally:
                looking.cancel()
                await asyncio.wait([looking])

    with without(pool, "reconciler"):
        run, pod = under_way(api, pool, victim(api, pool), seconds=300)
        asyncio.run(listen())
    completed_by_a_retry(api, run)


def test_two_reconcilers_without_a_leader_do_everything_once(pool: Pool, api: httpx.Client, kubernetes: str) -> None:
    async def both() -> None:
        async with reconciler(pool, api, kubernetes) as one, reconciler(pool, api, kubernetes) as other:
            for _ in range(8):
                await asyncio.gather(one.round(), other.round())
                await asyncio.sleep(0.5)

    with without(pool, "reconciler"):
        runs = dead_runs(pool, api, 3)
        with without(pool, "worker"):  # no run goes on before both have said what is to become of it
            asyncio.run(both())
    for run in runs:
        completed_by_a_retry(api, run)
        assert run_of(api, run)["labels"]["reconciler.crashes"] == 1


def is_ahead(pool: Pool, pod: str) -> bool:
    """Whether a pod's clock is five minutes ahead."""
    shown = pool.namespace.kubectl("exec", pod, "--", "python", "-c", "import time; print(time.time())")
    return 280 < float(shown) - time.time() < 320


def test_run_with_a_clock_five_minutes_ahead_is_retried(pool: Pool, api: httpx.Client) -> None:
    run = start(api, victim(api, pool, job_variables={"env": FAKE}), parameters={"seconds": 300})
    state_named(api, run, "Running", 300)
    [pod] = [each["metadata"]["name"] for each in pods(pool, run)]
    assert is_ahead(pool, pod)
    crashed = said_in_time(api, run, "Crashed", killed(pool, pod))
    again = state_named(api, run, "AwaitingRetry")
    assert seconds_between(crashed, again) < SEEN
    completed(api, run)
    assert run_of(api, run)["run_count"] == 2
    assert sum(each["name"] == "AwaitingRetry" for each in states(api, run)) == 1


def test_reconciler_with_a_clock_five_minutes_ahead_retries_once(pool: Pool, api: httpx.Client) -> None:
    deployed = f"deployment/{NAME}-reconciler"
    settings = [f"{name}={value}" for name, value in FAKE.items()]
    pool.namespace.kubectl("set", "env", deployed, *settings)
    try:
        pool.namespace.kubectl("rollout", "status", deployed, "--timeout=300s")
        for each in pool.pods("reconciler"):
            assert is_ahead(pool, each["metadata"]["name"])
        run, pod = under_way(api, pool, victim(api, pool), seconds=300)
        crashed = said_in_time(api, run, "Crashed", killed(pool, pod))
        listed = completed_by_a_retry(api, run)
        again = next(each for each in listed if each["name"] == "AwaitingRetry")
        assert seconds_between(crashed, again) < SEEN
        due = datetime.fromisoformat(again["state_details"]["scheduled_time"])
        assert abs(due - datetime.fromisoformat(again["timestamp"])) < timedelta(seconds=SEEN)
        assert not [each for each in listed if "No worker made a Job" in (each["message"] or "")]
    finally:
        pool.namespace.kubectl("set", "env", deployed, *(f"{name}-" for name in FAKE))
        pool.namespace.kubectl("rollout", "status", deployed, "--timeout=300s")


def test_killed_leader_is_replaced(pool: Pool, api: httpx.Client) -> None:
    names = [pod["metadata"]["name"] for pod in pool.pods("reconciler")]
    leads: str = wait_until(lambda: (found := leader(pool)) in names and found, "one of them to lead")
    run, pod = under_way(api, pool, victim(api, pool), seconds=60)
    force_deleted(pool.namespace, leads)
    killed(pool, pod)
    state_named(api, run, "Crashed", 45)
    completed_by_a_retry(api, run)


def test_without_a_reconciler_nothing_is_retried_or_ended(pool: Pool, api: httpx.Client) -> None:
    """The reconciler does what the tests above see."""
    made = victim(api, pool)
    with without(pool, "reconciler"):
        crashes = start(api, made, parameters={"killed": True})
        stuck = start(api, victim(api, pool, job_variables={"image": "localhost:5000/absent:1"}))
        dead, pod = under_way(api, pool, made, seconds=60)
        killed(pool, pod)
        # On a busy node its process goes on for a while.
        gone, pod = under_way(api, pool, made, seconds=60)
        force_deleted(pool.namespace, pod)
        unwanted, _ = under_way(api, pool, made, seconds=300)
        api.delete(f"/flow_runs/{unwanted}").raise_for_status()
        time.sleep(15)
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
