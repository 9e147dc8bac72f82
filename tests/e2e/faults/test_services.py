"""What becomes of runs while workers, reconcilers, the server or its database are away, or see another time."""

import asyncio
import base64
import contextlib
import copy
import hashlib
import json
import shlex
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestration.api import Server
from orchestration.reconciler.cluster import Cluster
from orchestration.reconciler.facts import Policy
from orchestration.reconciler.loop import Reconciler
from orchestration.serving import Pulse
from tests.cluster.namespace import proxied
from tests.cluster.progress import ClusterError
from tests.e2e.faults.victims import (
    BACK,
    GRACE,
    NAME,
    SEEN,
    START,
    claimed,
    completed,
    completed_by_a_retry,
    ending,
    in_time,
    killed,
    pods,
    said_in_time,
    seconds_between,
    state_named,
    states,
    took,
    under_way,
    victim,
    without,
)
from tests.e2e.release import Object, Release
from tests.e2e.runs import deployment, ended, lines, logged, run_of, start
from tests.parts import wait_until

LOOKED = "reconciler_round_seconds_count"

FAKE = {"LD_PRELOAD": "/faketime/libfaketime.so.1", "FAKETIME": "+300"}
"""The environment of a process whose clock is five minutes ahead."""


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    made = copy.deepcopy(values)
    for component in (made["runs"], made["reconciler"]):
        pod = component.setdefault("pod", {})
        pod["volumes"] = [*pod.get("volumes", []), {"name": "faketime", "configMap": {"name": "faketime"}}]
        pod["volumeMounts"] = [*pod.get("volumeMounts", []), {"name": "faketime", "mountPath": "/faketime"}]
    return made


@pytest.fixture(scope="module")
def pool(server: Release, values: Object, probe: Object) -> Release:
    [library] = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    content = base64.b64encode(library.read_bytes()).decode()
    server.namespace.apply(probe)
    server.namespace.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "faketime"},
            "binaryData": {library.name: content},
        }
    )
    release = Release(NAME, NAME, server.namespace)
    release.deploy(values)
    return release


LIGHT = """
import base64, json, os, urllib.request
url = f"{os.environ['PREFECT_API_URL']}/flow_runs/{os.environ['PREFECT__FLOW_RUN_ID']}/set_state"
user = base64.b64encode(os.environ["PREFECT_API_AUTH_STRING"].encode()).decode()
headers = {"Authorization": f"Basic {user}", "Content-Type": "application/json"}
for type_ in ("RUNNING", "COMPLETED"):
    body = json.dumps({"state": {"type": type_}}).encode()
    urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60)
"""
"""What executes a run without an import of Prefect, which for fifty would take minutes of a small machine."""


def test_two_workers_execute_each_run_once(pool: Release, api: httpx.Client) -> None:
    number, at_once = 50, 8
    worker = f"deployment/{NAME}-worker"
    pool.namespace.kubectl("scale", worker, "--replicas=2")
    try:
        pool.namespace.kubectl("rollout", "status", worker, "--timeout=300s")
        made = victim(api, job_variables={"command": f"python -I -S -c {shlex.quote(LIGHT)}"})
        runs: list[str] = []
        body = {
            "deployments": {"id": {"any_": [made]}},
            "flow_runs": {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING"]}}},
        }
        while len(runs) < number:
            # Not all at once: the node is small, and others are on it.
            free = at_once - int(api.post("/flow_runs/count", json=body).raise_for_status().json())
            runs += [start(api, made) for _ in range(min(free, number - len(runs)))]
            time.sleep(0.5)
        for run in runs:
            assert (ended(api, run)["state_type"], run_of(api, run)["run_count"]) == ("COMPLETED", 1)
            assert sum(each["type"] == "PENDING" for each in states(api, run)) <= 2  # Pending, Submitting
        jobs = json.loads(pool.namespace.kubectl("get", "jobs", "-o", "json"))["items"]
        of_run = [each["metadata"]["labels"].get("prefect.io/flow-run-id") for each in jobs]
        assert sorted(each for each in of_run if each in runs) == sorted(runs)
        by = {run_of(api, run)["labels"]["prefect.worker.name"] for run in runs}
        assert len(by) == 2, "one worker had them all"
    finally:
        pool.namespace.kubectl("scale", worker, "--replicas=1")


def test_runs_that_end_and_die_while_no_worker_is_there(pool: Release, api: httpx.Client) -> None:
    made = victim(api)
    ends, _ = under_way(api, pool, made, seconds=40)
    dies, pod = under_way(api, pool, made, seconds=300)
    began = time.monotonic()
    with without(pool, "worker"):
        died = killed(pool, pod)
        said_in_time(api, dies, "Crashed", died)
        said_in_time(api, dies, "AwaitingRetry", died, 2 * SEEN)
        due = start(api, made)
        assert ended(api, ends)["state_type"] == "COMPLETED"
        time.sleep(max(0, 180 - (time.monotonic() - began)))
    back = datetime.now(UTC)
    for run in (dies, due):
        completed(api, run)
        begun = max(datetime.fromisoformat(each["timestamp"]) for each in states(api, run) if each["type"] == "RUNNING")
        in_time("it begins", back, begun, 60)
    completed_by_a_retry(api, dies)
    assert run_of(api, due)["run_count"] == run_of(api, ends)["run_count"] == 1


class _KilledError(BaseException):
    """What a reconciler dies of here."""


@contextlib.asynccontextmanager
async def reconciler(pool: Release, api: httpx.Client, kubernetes: str, dies_at: int = 0) -> AsyncIterator[Reconciler]:
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
    root = json.loads(pool.namespace.kubectl("get", "configmap", "kube-root-ca.crt", "-o", "json"))["data"]["ca.crt"]
    async with (
        httpx.AsyncClient(base_url=api.base_url, auth=api.auth, timeout=30, event_hooks=hooks) as prefect,
        httpx.AsyncClient(base_url=kubernetes, timeout=30, event_hooks=hooks) as client,
    ):
        cluster = Cluster(client, pool.namespace.name)
        cluster.identity = hashlib.sha256(root.encode()).hexdigest()[:16]
        yield Reconciler(Server(prefect, str(api.base_url)), cluster, "default", Policy(), None, Pulse(60))


@pytest.fixture
def kubernetes(pool: Release) -> Iterator[str]:
    with proxied(pool.namespace.context) as url:
        yield url


def dead_runs(pool: Release, api: httpx.Client, number: int) -> list[str]:
    """Runs whose pods were killed, and which nobody has noticed."""
    made = victim(api)
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


def test_a_reconciler_that_is_killed_at_any_point_does_all_once(
    pool: Release, api: httpx.Client, kubernetes: str
) -> None:
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


def test_a_death_is_heard_of_long_before_the_next_look(pool: Release, api: httpx.Client, kubernetes: str) -> None:
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
        run, pod = under_way(api, pool, victim(api), seconds=300)
        asyncio.run(listen())
    completed_by_a_retry(api, run)


def test_two_reconcilers_without_a_leader_do_all_once(pool: Release, api: httpx.Client, kubernetes: str) -> None:
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


def is_ahead(pool: Release, pod: str) -> bool:
    """Whether a pod's clock is five minutes ahead."""
    shown = pool.namespace.kubectl("exec", pod, "--", "python", "-c", "import time; print(time.time())")
    return 280 < float(shown) - time.time() < 320


def test_a_run_whose_clock_is_five_minutes_ahead(pool: Release, api: httpx.Client) -> None:
    run = start(api, victim(api, job_variables={"env": FAKE}), parameters={"seconds": 300})
    state_named(api, run, "Running", 300)
    [pod] = [each["metadata"]["name"] for each in pods(pool, run)]
    assert is_ahead(pool, pod)
    crashed = said_in_time(api, run, "Crashed", killed(pool, pod))
    again = state_named(api, run, "AwaitingRetry")
    assert seconds_between(crashed, again) < SEEN
    completed(api, run)
    assert run_of(api, run)["run_count"] == 2
    assert sum(each["name"] == "AwaitingRetry" for each in states(api, run)) == 1


def test_a_reconciler_whose_clock_is_five_minutes_ahead(pool: Release, api: httpx.Client) -> None:
    deployed = f"deployment/{NAME}-reconciler"
    settings = [f"{name}={value}" for name, value in FAKE.items()]
    pool.namespace.kubectl("set", "env", deployed, *settings)
    try:
        pool.namespace.kubectl("rollout", "status", deployed, "--timeout=300s")
        for each in pool.pods("reconciler"):
            assert is_ahead(pool, each["metadata"]["name"])
        run, pod = under_way(api, pool, victim(api), seconds=300)
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


def test_a_run_is_cancelled_though_the_server_goes_in_between(server: Release, pool: Release) -> None:
    """From here on `api` is of no use: it goes by the server's pod."""
    with server.api() as api:
        run, _ = under_way(api, pool, victim(api), seconds=300)
        api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    with without_server(pool):
        time.sleep(30)
    back = datetime.now(UTC)
    with server.api() as api:
        said_in_time(api, run, "Cancelled", back, GRACE + SEEN)
        wait_until(lambda: all(map(ending, pods(pool, run))), "its pod to end", SEEN)


@contextlib.contextmanager
def without_server(pool: Release) -> Iterator[None]:
    """The namespace without its Prefect API, which is killed, while the block lasts."""
    pool.namespace.kubectl("scale", "deployment/prefect-server-api", "--replicas=0")
    pool.namespace.kubectl(
        "delete", "pod", "-l", "app.kubernetes.io/component=api", "--force", "--grace-period=0", "--wait=false"
    )
    try:
        yield
    finally:
        pool.namespace.kubectl("scale", "deployment/prefect-server-api", "--replicas=1")
        pool.namespace.kubectl("rollout", "status", "deployment/prefect-server-api", "--timeout=300s")


def test_a_server_that_is_away_and_a_database_that_is_killed_lose_nothing(server: Release, pool: Release) -> None:
    """A run under way completes in its first execution with its whole log; what fell due meanwhile is executed once.

    Like the one before it has clients of its own: `api` goes by the server's pod.
    """
    namespace, times, away = pool.namespace, 110, 120
    with server.api() as api:
        minutely = victim(api, schedules=[{"schedule": {"cron": "* * * * *"}}])
        run = start(api, deployment(api, entrypoint="/probe/flow.py:ticking"), parameters={"times": times})
        logged(api, run, "tick 5", 120)
    # Not while a run of the schedule is claimed: what is cut off then is let go, and another claims it a minute later.
    wait_until(lambda: 10 < datetime.now(UTC).second < 35, "a moment between two of the schedule")
    began = datetime.now(UTC)
    with without_server(pool):
        time.sleep(away)
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
            180,
        )
        for each in (each for moment in missed for each in of_the_schedule(api)[moment]):
            in_time("a missed run is claimed", back, claimed(api, each["id"]), BACK - START)
            took("it begins", back, datetime.fromisoformat(each["start_time"]))
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
    namespace.kubectl("wait", database, "--for=condition=Ready", "--timeout=300s")

    def answers_again() -> bool:
        # 500 while the database is away, and until the cluster's DNS has its new address; connections may break.
        with contextlib.suppress(httpx.HTTPError, ClusterError), server.api() as api:
            return api.get(f"/flow_runs/{run}").is_success
        return False

    wait_until(answers_again, "the API to have its database again", 90)
    with server.api() as api:
        found = ended(api, run, 2 * times)
        assert (found["state_type"], found["run_count"]) == ("COMPLETED", 1)
        ticks = [line.split()[1] for line in logged(api, run, "the end", 90) if line.startswith("tick")]
        # A client that had no answer from a database that was killed sends its lines again.
        assert {*map(int, ticks)} == {*range(times)}
        for moment in missed:
            [once] = of_the_schedule(api)[moment]
            assert (ended(api, once["id"])["state_type"], once["run_count"]) == ("COMPLETED", 1)
