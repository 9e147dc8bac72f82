"""Faults of the reconciler: killed, absent, two active at once, with a wrong clock, in order.

The pool has no reconciler until the first test that uses the fixture `reconcilers`.
"""

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

from orchestration.errors import PipelineError
from orchestration.health import Pulse
from orchestration.prefect_api import Server
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.loop import Reconciler
from orchestration.reconciler.model import Policy
from tests.cluster.namespace import Namespace, proxied
from tests.e2e.faults.victims import (
    DETECTION_SECONDS,
    POOL_RELEASE,
    assert_completed_by_one_retry,
    assert_state_within,
    deploy_victim,
    find_state,
    force_delete,
    is_ending,
    kill_pod,
    leader_pod,
    list_pods,
    list_states,
    scaled_to_zero,
    seconds_between,
    start_running,
    wait_for_state,
    wait_until_completed,
)
from tests.e2e.release import Object, Pool, Release, install_pool
from tests.e2e.runs import get_run, read_log, start_run
from tests.parts import wait_until

ROUNDS_METRIC = "reconciler_round_seconds_count"


CLOCK_AHEAD = {"LD_PRELOAD": "/faketime/libfaketime.so.1", "FAKETIME": "+300"}
"""Environment variables that set a process's clock five minutes ahead."""


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    changed = copy.deepcopy(values)
    changed["reconciler"]["replicas"] = 0
    for component in (changed["runs"], changed["reconciler"]):
        pod = component.setdefault("pod", {})
        pod["volumes"] = [*pod.get("volumes", []), {"name": "faketime", "configMap": {"name": "faketime"}}]
        pod["volumeMounts"] = [*pod.get("volumeMounts", []), {"name": "faketime", "mountPath": "/faketime"}]
    return changed


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
    return install_pool(server, pool_namespace, values, probe)


@pytest.fixture(scope="module")
def reconcilers(pool: Pool) -> str:
    """Start two reconcilers, and return the name of their Deployment."""
    name = f"deployment/{POOL_RELEASE}-reconciler"
    pool.namespace.kubectl("scale", name, "--replicas=2")
    pool.namespace.kubectl("rollout", "status", name, "--timeout=300s")
    return name


class _KilledError(BaseException):
    """Ends an in-process reconciler as a kill would: no handler of `Exception` catches it."""


@contextlib.asynccontextmanager
async def reconciler_in_process(
    pool: Pool, api: httpx.Client, kubernetes: str, dies_at: int = 0
) -> AsyncIterator[Reconciler]:
    """Yield a reconciler of the pool that runs in this process, without a Lease.

    Args:
        pool: the release of the work pool.
        api: client of the Prefect API.
        kubernetes: the URL of the Kubernetes API.
        dies_at: number of the writing request at which the reconciler dies: before an odd one is sent, after an even
            one is answered. 0 for never.
    """
    changes, dead = 0, False

    def is_read(request: httpx.Request) -> bool:
        return request.method == "GET" or request.url.path.endswith(("/filter", "/count"))

    async def before(request: httpx.Request) -> None:
        nonlocal changes, dead
        changes += not is_read(request)
        dead = dead or (dies_at % 2 == 1 and changes == dies_at)
        if dead:
            raise _KilledError

    async def after(response: httpx.Response) -> None:
        nonlocal dead
        dead = dead or (dies_at % 2 == 0 and 0 < dies_at == changes and not is_read(response.request))
        if dead:
            raise _KilledError

    hooks: dict[str, list[Any]] = {"request": [before], "response": [after]}
    async with (
        httpx.AsyncClient(base_url=api.base_url, auth=api.auth, timeout=30, event_hooks=hooks) as prefect,
        httpx.AsyncClient(base_url=kubernetes, timeout=30, event_hooks=hooks) as client,
    ):
        cluster = Cluster(client, pool.namespace.name)
        yield Reconciler(Server(prefect, str(api.base_url)), [cluster], pool.work_pool, Policy(), None, Pulse(60))


@pytest.fixture
def kubernetes(pool: Pool) -> Iterator[str]:
    with proxied(pool.namespace.context) as url:
        yield url


def start_and_kill(pool: Pool, api: httpx.Client, number: int) -> list[str]:
    """Start runs and kill their pods while there is no reconciler; return the runs."""
    deployment = deploy_victim(api, pool)
    runs = [start_run(api, deployment, parameters={"seconds": 300}) for _ in range(number)]
    alive = set(runs)

    def find_begun() -> str | None:
        return next((run for run in alive if any(line.startswith("attempt 1 in") for line in read_log(api, run))), None)

    while alive:
        run = wait_until(find_begun, "another run to begin", 300)
        [pod] = list_pods(pool, run)
        kill_pod(pool, pod["metadata"]["name"])
        alive.remove(run)
    assert all(get_run(api, run)["state_type"] == "RUNNING" for run in runs)
    return runs


def test_reconciler_killed_at_any_request_retries_each_run_once(pool: Pool, api: httpx.Client, kubernetes: str) -> None:
    async def reconcile_until_done() -> int:
        deaths = 0
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            async with reconciler_in_process(pool, api, kubernetes, deaths + 1) as mortal:
                try:
                    while await mortal.round():
                        pass
                except _KilledError:
                    deaths += 1
                    continue
                except PipelineError:  # on a busy node an API may be late
                    continue
            found = [get_run(api, run) for run in runs]
            if all(run["state_type"] != "RUNNING" and run["labels"].get("reconciler.crashes") for run in found):
                return deaths
            await asyncio.sleep(0.5)
        raise AssertionError(
            f"the runs are not retried after {deaths} deaths: {[list_states(api, run) for run in runs]}"
        )

    runs = start_and_kill(pool, api, 3)
    deaths = asyncio.run(reconcile_until_done())
    assert deaths > 3
    for run in runs:
        assert_completed_by_one_retry(api, run)
        assert get_run(api, run)["labels"]["reconciler.crashes"] == 1


@pytest.mark.further
def test_pod_death_between_two_rounds_is_handled_at_once(pool: Pool, api: httpx.Client, kubernetes: str) -> None:
    async def listen() -> None:
        async with reconciler_in_process(pool, api, kubernetes) as reconciler:
            loop = asyncio.create_task(reconciler.run(150))
            read_metric = reconciler.pulse.registry.get_sample_value
            # The reconciler watches from its second round on.
            await asyncio.to_thread(wait_until, lambda: read_metric(ROUNDS_METRIC) == 2, "the second round")
            kill_pod(pool, pod)
            try:
                await asyncio.to_thread(wait_for_state, api, run, "AwaitingRetry", 120)
            finally:
                loop.cancel()
                await asyncio.wait([loop])

    run, pod = start_running(api, pool, deploy_victim(api, pool), seconds=300)
    asyncio.run(listen())
    assert_completed_by_one_retry(api, run)


@pytest.mark.further
def test_two_active_reconcilers_retry_each_run_once(pool: Pool, api: httpx.Client, kubernetes: str) -> None:
    async def look(reconciler: Reconciler) -> None:
        with contextlib.suppress(PipelineError):  # on a busy node an API may be late
            await reconciler.round()

    async def run_both() -> None:
        async with (
            reconciler_in_process(pool, api, kubernetes) as one,
            reconciler_in_process(pool, api, kubernetes) as other,
        ):
            for number in range(100):
                await asyncio.gather(look(one), look(other))
                if number >= 7 and all(find_state(api, run, "AwaitingRetry") for run in runs):
                    return
                await asyncio.sleep(0.5)

    runs = start_and_kill(pool, api, 2)
    with scaled_to_zero(pool, "worker"):  # no retry starts before both reconcilers have decided
        asyncio.run(run_both())
    for run in runs:
        assert_completed_by_one_retry(api, run)
        assert get_run(api, run)["labels"]["reconciler.crashes"] == 1


@pytest.mark.further
def test_faults_without_a_reconciler_are_handled_once_there_is_one(
    pool: Pool, api: httpx.Client, request: pytest.FixtureRequest
) -> None:
    """Without a reconciler no run is retried or ended: the other fault tests observe the reconciler's work."""
    deployment = deploy_victim(api, pool)
    crashes = start_run(api, deployment, parameters={"killed": True})
    stuck = start_run(api, deploy_victim(api, pool, job_variables={"image": "localhost:5000/absent:1"}))
    dead, pod = start_running(api, pool, deployment, seconds=300)
    kill_pod(pool, pod)
    # On a busy node the force-deleted pod's process runs on for a while.
    gone, pod = start_running(api, pool, deployment, seconds=300)
    force_delete(pool.namespace, pod)
    unwanted, _ = start_running(api, pool, deployment, seconds=300)
    api.delete(f"/flow_runs/{unwanted}").raise_for_status()
    time.sleep(15)
    for run in (crashes, dead):
        assert get_run(api, run)["state_type"] == "RUNNING", list_states(api, run)
    # If the kubelet left its process the time, the supervisor itself reported the end, and the run was retried.
    assert not find_state(api, gone, "Crashed")
    assert "ImagePullBackOff" not in [state["name"] for state in list_states(api, stuck)]
    [unwanted_pod] = list_pods(pool, unwanted)
    assert not is_ending(unwanted_pod)
    request.getfixturevalue("reconcilers")
    for run in (crashes, dead, gone):
        assert_completed_by_one_retry(api, run)
    # By now the run has been pending for longer than its timeout.
    given_up = wait_for_state(api, stuck, "Crashed", 120)["message"]
    assert "absent:1" in given_up
    assert "Given up after" in given_up
    wait_until(
        lambda: all(map(is_ending, list_pods(pool, unwanted))),
        "the pod of a deleted run to be deleted",
        DETECTION_SECONDS,
    )


def has_clock_ahead(pool: Pool, pod: str) -> bool:
    """Tell whether a pod's clock is five minutes ahead."""
    shown = pool.namespace.kubectl("exec", pod, "--", "python", "-c", "import time; print(time.time())")
    return 280 < float(shown) - time.time() < 320


@pytest.mark.further
@pytest.mark.usefixtures("reconcilers")
def test_run_with_a_clock_five_minutes_ahead_is_retried(pool: Pool, api: httpx.Client) -> None:
    run = start_run(api, deploy_victim(api, pool, job_variables={"env": CLOCK_AHEAD}), parameters={"seconds": 300})
    wait_for_state(api, run, "Running", 300)
    [pod] = [listed_pod["metadata"]["name"] for listed_pod in list_pods(pool, run)]
    assert has_clock_ahead(pool, pod)
    crashed = assert_state_within(api, run, "Crashed", kill_pod(pool, pod))
    again = wait_for_state(api, run, "AwaitingRetry")
    assert seconds_between(crashed, again) < DETECTION_SECONDS
    wait_until_completed(api, run)
    assert get_run(api, run)["run_count"] == 2
    assert sum(state["name"] == "AwaitingRetry" for state in list_states(api, run)) == 1


@pytest.mark.usefixtures("reconcilers")
def test_killed_leader_is_replaced(pool: Pool, api: httpx.Client) -> None:
    names = [pod["metadata"]["name"] for pod in pool.pods("reconciler")]
    old_leader: str = wait_until(lambda: (found := leader_pod(pool)) in names and found, "a leader")
    run, pod = start_running(api, pool, deploy_victim(api, pool), seconds=300)
    force_delete(pool.namespace, old_leader)
    kill_pod(pool, pod)
    wait_for_state(api, run, "Crashed", 45 + DETECTION_SECONDS)
    assert_completed_by_one_retry(api, run)
    assert leader_pod(pool) != old_leader


@pytest.mark.further
def test_reconciler_with_a_clock_five_minutes_ahead_retries_once(
    pool: Pool, api: httpx.Client, reconcilers: str
) -> None:
    """The reconcilers keep their clock: no test follows in this file."""
    settings = [f"{name}={value}" for name, value in CLOCK_AHEAD.items()]
    pool.namespace.kubectl("set", "env", reconcilers, *settings)
    pool.namespace.kubectl("rollout", "status", reconcilers, "--timeout=300s")
    for reconciler_pod in pool.pods("reconciler"):
        assert has_clock_ahead(pool, reconciler_pod["metadata"]["name"])
    run, pod = start_running(api, pool, deploy_victim(api, pool), seconds=300)
    crashed = assert_state_within(api, run, "Crashed", kill_pod(pool, pod))
    listed = assert_completed_by_one_retry(api, run)
    again = next(state for state in listed if state["name"] == "AwaitingRetry")
    assert seconds_between(crashed, again) < DETECTION_SECONDS
    due = datetime.fromisoformat(again["state_details"]["scheduled_time"])
    assert abs(due - datetime.fromisoformat(again["timestamp"])) < timedelta(seconds=DETECTION_SECONDS)
    assert not [state for state in listed if "No worker made a Job" in (state["message"] or "")]
