"""Tests of the reconciler while nothing is live, on a Kubernetes API server without nodes and a real Prefect server."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestration.errors import ClusterError
from orchestration.health import Pulse
from orchestration.prefect_api import Server
from orchestration.protocol import CLUSTER_LABEL, POOL_LABEL, RUN_LABEL, SETTLED_LABEL
from orchestration.reconciler import kubernetes_client, loop
from orchestration.reconciler.decide import decide
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.leader_election import LeaderElection
from orchestration.reconciler.loop import IDLE_SECONDS, Reconciler
from orchestration.reconciler.model import End, Job, Pod, Policy, Run
from orchestration.reconciler.snapshot import Snapshot
from tests.cluster import apiserver
from tests.orchestration.inspection.work_pool import WorkPool
from tests.orchestration.reconciler.test_decide import NOW
from tests.parts import client_of, examples

NEVER = 3600.0
EVERY = 0.4


@pytest.fixture(scope="module")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[apiserver.ApiServer, ssl.SSLContext]]:
    """Yield a Kubernetes API server, and the credentials of its administrator."""
    folder = tmp_path_factory.mktemp("apiserver")
    with apiserver.alone(folder) as found:
        context = ssl.create_default_context(cafile=str(folder / "pki/ca.crt"))
        context.load_cert_chain(folder / "pki/admin.crt", folder / "pki/admin.key")
        yield found, context


class Part:
    """A reconciler that runs rounds, and the requests that it has sent.

    Args:
        pool: its work pool.
        reconciler: the reconciler.
        cluster: its cluster.
        requests: its requests, such as "PUT leases" and "GET work_pools", oldest first.
    """

    def __init__(self, pool: WorkPool, reconciler: Reconciler, cluster: Cluster, requests: list[str]) -> None:
        self.pool, self.reconciler, self.cluster, self.requests = pool, reconciler, cluster, requests

    @property
    def rounds(self) -> int:
        """Return how many rounds have begun."""
        return self.requests.count("GET work_pools")

    @property
    def renewals(self) -> int:
        """Return how often the Lease was written."""
        return self.requests.count("PUT leases")

    async def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition is true."""
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, f"{what}; requests: {self.requests[-50:]}"
            await asyncio.sleep(0.02)

    async def wait_until_idle(self) -> None:
        """Wait until an interval has had no round: each round renews the Lease once, and each interval once."""

        def is_idle() -> bool:
            newest = self.requests[::-1]
            return "GET work_pools" in newest and newest[: newest.index("GET work_pools")].count("PUT leases") > 2

        await self.wait_for(is_idle, "rounds go on")

    async def create_job(self, run: str) -> str:
        """Create a Job of a run, which no controller knows, and return its name."""
        pool = await asyncio.to_thread(self.pool.ask, "GET", f"/work_pools/{self.pool.name}")
        name = f"job-{uuid4().hex[:12]}"
        pod = {"restartPolicy": "Never", "containers": [{"name": "prefect-job", "image": "none"}]}
        job = {
            "metadata": {"name": name, "labels": {RUN_LABEL: run, POOL_LABEL: pool["id"]}},
            "spec": {"managedBy": "tests/idle", "backoffLimit": 0, "template": {"spec": pod}},
        }
        await self.cluster.ask("POST", f"/apis/batch/v1/namespaces/{self.cluster.namespace}/jobs", job)
        return name

    async def create_run(self, state: dict[str, Any], **fields: Any) -> str:
        """Create a run of this cluster in a state, and return its id."""
        labels = {CLUSTER_LABEL: await self.cluster.identity()}
        run = await asyncio.to_thread(self.pool.run, state=state, labels=labels)
        if fields:
            await asyncio.to_thread(self.pool.ask, "PATCH", f"/flow_runs/{run['id']}", fields)
        return str(run["id"])

    async def states(self, run: str) -> list[str]:
        """Return the names of a run's states."""
        found = await asyncio.to_thread(self.pool.ask, "GET", f"/flow_run_states/?flow_run_id={run}")
        return [state["name"] for state in found]


@contextlib.asynccontextmanager
async def running(
    prefect_server: str, kubernetes: tuple[apiserver.ApiServer, ssl.SSLContext], policy: Policy
) -> AsyncIterator[Part]:
    """Run rounds of a new work pool's reconciler, every `EVERY` seconds, while the block lasts."""
    requests: list[str] = []

    async def note(request: httpx.Request) -> None:
        parts = request.url.path.removeprefix("/api/").split("/")
        kind = next(part for part in ("leases", "jobs", "pods", *parts) if part in parts)
        requests.append(f"{request.method} {kind}" if "watch" not in request.url.params else f"watch {kind}")

    hooks: dict[str, list[Any]] = {"request": [note]}
    server, context = kubernetes
    async with (
        httpx.AsyncClient(base_url=prefect_server, timeout=75, event_hooks=hooks) as for_prefect,
        httpx.AsyncClient(
            base_url=server.client.base_url, verify=context, timeout=30, event_hooks=hooks
        ) as for_kubernetes,
    ):
        with client_of(prefect_server) as api:
            pool = WorkPool(api)
            cluster = Cluster(for_kubernetes, apiserver.NAMESPACE)
            election = LeaderElection(cluster, pool.name, "this one", duration=600)
            reconciler = Reconciler(
                Server(for_prefect, prefect_server), [cluster], pool.name, policy, election, Pulse(60)
            )
            task = asyncio.create_task(reconciler.run(EVERY))
            try:
                yield Part(pool, reconciler, cluster, requests)
            finally:
                task.cancel()
                await asyncio.wait([task])


def test_idle_reconciler_renews_its_lease_and_leaves_out_rounds(
    prefect_server: str, kubernetes: tuple[apiserver.ApiServer, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "IDLE_SECONDS", 10 * EVERY)
    monkeypatch.setattr(
        kubernetes_client, "WATCH_SECONDS", int(NEVER)
    )  # a watch that begins again would be another request

    async def observe() -> None:
        async with running(prefect_server, kubernetes, Policy()) as part:
            await part.wait_until_idle()
            del part.requests[:]
            await part.wait_for(lambda: part.rounds == 4, "idle rounds")
            # Each interval renews the Lease by one request, and each round once more.
            assert part.renewals >= 3 * 3
            others = [request for request in part.requests if request != "PUT leases"]
            of_round = ["GET work_pools", "POST flow_runs", "GET jobs", "POST flow_runs", "GET pods"]
            assert sorted(others[: 3 * 5]) == sorted(3 * of_round)

    asyncio.run(observe())


def test_run_that_becomes_live_is_seen_as_soon_as_it_has_a_job(
    prefect_server: str, kubernetes: tuple[apiserver.ApiServer, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the watch on Jobs, the reconciler would sleep here."""
    monkeypatch.setattr(loop, "IDLE_SECONDS", NEVER)

    async def observe() -> None:
        async with running(prefect_server, kubernetes, Policy(settle_seconds=0.5)) as part:
            await part.wait_until_idle()
            run = await part.create_run({"type": "PENDING"})
            job = await part.create_job(run)
            before = part.renewals
            rounds = part.rounds
            await part.wait_for(lambda: part.rounds > rounds, "a round after the Job's creation")
            # An interval may have begun before. The next one has a round, as it had without idle times. On a busy
            # machine the watch is late.
            assert part.renewals - before <= 5
            await part.wait_for(lambda: part.reconciler.namespaces[0].live_runs == 1, "the live run is seen")

            # The run begins, its Job is lost, and no watch tells: a run that is live has rounds in each interval.
            body = {"state": {"type": "RUNNING"}, "force": True}
            await asyncio.to_thread(part.pool.ask, "POST", f"/flow_runs/{run}/set_state", body)
            before, rounds = part.renewals, part.rounds
            await part.wait_for(lambda: part.rounds - rounds >= 5, "rounds of a live run")
            assert part.renewals - before <= 2 * 5 + 2, "an interval without a round"
            await part.cluster.delete_job(job, None)
            deadline = time.monotonic() + 60
            while "AwaitingRetry" not in (states := await part.states(run)):
                assert time.monotonic() < deadline, states
                await asyncio.sleep(0.1)
            assert states.index("Crashed") < states.index("AwaitingRetry")

            # The run waits for a worker, and nothing is live.
            await part.wait_until_idle()

    asyncio.run(observe())


def test_round_follows_an_interval_that_failed(
    prefect_server: str,
    kubernetes: tuple[apiserver.ApiServer, ssl.SSLContext],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The interval may have been woken by the end of a pod, which no watch reports again."""
    monkeypatch.setattr(loop, "IDLE_SECONDS", NEVER)

    async def observe() -> None:
        async with running(prefect_server, kubernetes, Policy()) as part:
            await part.wait_until_idle()
            cluster, rounds, before = part.cluster, part.rounds, part.renewals
            ask = cluster.ask

            async def fail(*_: Any, **__: Any) -> None:
                monkeypatch.setattr(cluster, "ask", ask)
                raise ClusterError("The Kubernetes API does not answer")

            monkeypatch.setattr(cluster, "ask", fail)
            await part.wait_for(lambda: part.rounds > rounds, "a round after the failure")
            assert part.renewals - before <= 5

    asyncio.run(observe())


def test_claim_without_a_job_is_given_away_in_time(
    prefect_server: str, kubernetes: tuple[apiserver.ApiServer, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No watch tells of such a claim. An idle round finds it long before it is due."""
    assert Policy().claim_seconds / 3 > IDLE_SECONDS
    monkeypatch.setattr(loop, "IDLE_SECONDS", 5 * EVERY)

    async def observe() -> list[str]:
        async with running(prefect_server, kubernetes, Policy(claim_seconds=5)) as part:
            await part.wait_until_idle()
            run = await part.create_run({"type": "PENDING"})
            before = part.renewals
            await part.wait_for(lambda: part.reconciler.namespaces[0].live_runs == 1, "the claim is seen")
            # The intervals until the next idle round, the renewals of two rounds, and some of a busy machine.
            assert part.renewals - before <= 6 + 2 + 4
            deadline = time.monotonic() + 60
            while "ClaimLost" not in (states := await part.states(run)) or states[-1] != "Scheduled":
                assert time.monotonic() < deadline, states
                await asyncio.sleep(0.1)
            await part.wait_until_idle()
            return states

    assert asyncio.run(observe()) == ["Pending", "ClaimLost", "Scheduled"]


def test_refused_watch_on_jobs_keeps_the_pace() -> None:
    """A Role of one's own may lack the permission to watch Jobs."""

    async def count_settings() -> int:
        changes = 0

        def refuse(_: httpx.Request) -> httpx.Response:
            return httpx.Response(403, json={"kind": "Status", "code": 403})

        job_changed = asyncio.Event()
        async with httpx.AsyncClient(base_url="http://kubernetes", transport=httpx.MockTransport(refuse)) as client:
            watching = asyncio.create_task(Cluster(client, "prefect").watch_jobs(job_changed))
            for _ in range(3):
                await asyncio.wait_for(job_changed.wait(), 30)
                job_changed.clear()
                changes += 1
            watching.cancel()
            await asyncio.wait([watching])
        return changes

    assert asyncio.run(count_settings()) == 3


RUN = Run("r", "COMPLETED", "Completed", "s", NOW)
JOB = Job("job", "r", NOW, is_finished=True)
POD = Pod("pod", "r", "job", NOW, end=End(NOW, 0, "Completed"))


@pytest.mark.parametrize(
    ("run", "job", "pod", "is_live"),
    [
        (RUN, JOB, POD, False),
        (None, JOB, POD, False),
        (replace(RUN, type="CRASHED"), JOB, POD, False),
        (replace(RUN, type="SCHEDULED", state="AwaitingRetry"), JOB, POD, False),
        *((replace(RUN, type=live), JOB, POD, True) for live in ("PENDING", "RUNNING", "CANCELLING")),
        (RUN, replace(JOB, is_finished=False), POD, True),
        (None, replace(JOB, is_finished=False, is_deleted=True), POD, True),
        (RUN, JOB, replace(POD, end=None), True),
        (RUN, JOB, replace(POD, has_live_sidecar=True), True),
    ],
)
def test_snapshot_is_live_with_a_live_run_job_or_pod(run: Run | None, job: Job, pod: Pod, is_live: bool) -> None:
    assert Snapshot({"r": run}, {"r": [job]}, {"r": [pod]}).is_live == is_live
    assert not Snapshot({}, {}, {}).is_live


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


TIMES = st.sampled_from([0, 2, 4, 10, 100]).map(ago)
ENDS = st.builds(End, TIMES, st.sampled_from([0, 1, None]), st.just("Error"), is_confirmed=st.booleans())
RUNS = st.builds(
    Run,
    st.just("r"),
    st.sampled_from(["SCHEDULED", "PAUSED", "COMPLETED", "FAILED", "CANCELLED", "CRASHED", "RUNNING"]),
    st.just("state"),
    st.just("s"),
    TIMES,
    deployment=st.sampled_from(["", "d"]),
    job=st.sampled_from(["", "job-0", "job-1"]),
    labels=st.sampled_from([{}, {SETTLED_LABEL: "s"}, {SETTLED_LABEL: "earlier"}]),
    is_deployment_deleted=st.booleans(),
)
JOBS = st.lists(
    st.builds(
        Job,
        st.sampled_from(["job-0", "job-1"]),
        st.just("r"),
        TIMES,
        is_finished=st.sampled_from([True, True, True, False]),
        is_deleted=st.booleans(),
        makes_one_pod=st.booleans(),
        exceeded_deadline=st.sampled_from([None, 60]),
        is_given_away=st.booleans(),
    ),
    max_size=2,
    unique_by=lambda job: job.name,
)
PODS = st.lists(
    st.builds(
        Pod,
        st.just("pod"),
        st.just("r"),
        st.sampled_from(["job-0", "job-1"]),
        TIMES,
        deleted_at=st.none() | TIMES,
        end=ENDS | ENDS | ENDS | st.none(),
        has_live_sidecar=st.sampled_from([False, False, False, True]),
    ),
    max_size=2,
)


@settings(max_examples=examples(3))
@given(st.none() | RUNS, JOBS, PODS, st.floats(0, 100_000))
def test_time_alone_requires_no_action_while_nothing_is_live(
    run: Run | None, jobs: list[Job], pods: list[Pod], seconds: float
) -> None:
    """A round that has found nothing live and nothing to do can be followed by a pause of any length."""
    assume(not Snapshot({"r": run}, {"r": jobs}, {"r": pods}).is_live)
    if not decide(run, jobs, pods, NOW, Policy()):
        assert decide(run, jobs, pods, NOW + timedelta(seconds=seconds), Policy()) == []


def test_leader_renews_without_reading_and_notices_a_successor(
    kubernetes: tuple[apiserver.ApiServer, ssl.SSLContext],
) -> None:
    server, context = kubernetes
    requests: list[str] = []

    async def note(request: httpx.Request) -> None:
        requests.append(request.method)

    async def compete() -> None:
        async with httpx.AsyncClient(
            base_url=server.client.base_url, verify=context, timeout=30, event_hooks={"request": [note]}
        ) as client:
            cluster = Cluster(client, apiserver.NAMESPACE)
            first, second = (LeaderElection(cluster, "successor", name, duration=600) for name in ("a", "b"))
            assert await first.acquire_or_renew()
            del requests[:]
            assert [await first.acquire_or_renew() for _ in range(3)] == [True] * 3
            assert requests == ["PUT"] * 3
            assert not await second.acquire_or_renew()
            second.duration = 1
            await asyncio.sleep(1.1)  # the first has not renewed the Lease for as long as it lasts
            assert await second.acquire_or_renew()
            assert not await first.acquire_or_renew()
            assert not first.is_leader
            second.duration = 600
            assert await second.acquire_or_renew()
            assert not await first.acquire_or_renew()

            await cluster.ask("DELETE", f"{second.path}/successor")
            assert await second.acquire_or_renew(), "a deleted Lease is created again"
            assert not await first.acquire_or_renew()

    asyncio.run(compete())
