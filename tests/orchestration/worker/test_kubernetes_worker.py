"""The worker's claims, on a real Prefect server; its Jobs are tested on the real cluster (`tests/e2e`)."""

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch
from uuid import UUID, uuid4

import pytest
from httpx import ConnectError
from kubernetes_asyncio.client import ApiClient, BatchV1Api
from kubernetes_asyncio.client.exceptions import ApiException
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_LOGGING_TO_API_ENABLED,
    PREFECT_WORKER_QUERY_SECONDS,
    temporary_settings,
)
from prefect.states import Scheduled
from prefect.workers.base import BaseWorker
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerResult

from orchestration.access.credentials import sign_run
from orchestration.protocol import MAIN_CONTAINER_ANNOTATION
from orchestration.reconciler import state_messages
from orchestration.reconciler.model import Refusal
from orchestration.worker import kubernetes_worker
from tests.parts import free_port
from tests.relay import relayed, silent


@flow
def nothing() -> None:
    """What the runs would do; none of them gets to it."""


pytestmark = pytest.mark.usefixtures("closed_worker_channels")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Workers that watch no cluster, and whose logs stay here."""
    with (
        patch.dict("os.environ", PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED="false"),
        temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}),
    ):
        yield


class _WithoutJobs(kubernetes_worker.Worker):
    """Claims as the worker does, and makes no Job, which would need a cluster."""

    async def run(self, *_: Any, **__: Any) -> KubernetesWorkerResult:
        return KubernetesWorkerResult(identifier="none", status_code=0)


async def _states(client: PrefectClient, runs: list[UUID]) -> Counter[str]:
    found = await client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=runs)))
    return Counter(str(run.state_type.value) for run in found if run.state_type)


async def _deployment(client: PrefectClient, pool: str, limit: int | None = None) -> UUID:
    """Of the flow, in a new pool of that name with that limit."""
    await client.create_work_pool(WorkPoolCreate(name=pool, type="kubernetes", concurrency_limit=limit))
    return await client.create_deployment(
        flow_id=await client.create_flow(nothing), name="nothing", work_pool_name=pool
    )


async def _claims_of_hasty_polls(pool: str, limit: int) -> tuple[Counter[str], Counter[str]]:
    """The runs' states after polls in a row while the server has not heard of a claim; and at rest."""
    heard = asyncio.Event()
    propose = BaseWorker._propose_pending_state

    async def late(self: Any, flow_run: Any) -> bool:
        await heard.wait()
        return bool(await propose(self, flow_run))

    async with get_client() as client:
        made = await _deployment(client, pool, limit)

        async def start(ago: float) -> UUID:
            when = datetime.now(UTC) - timedelta(minutes=ago)
            return (await client.create_flow_run_from_deployment(made, state=Scheduled(scheduled_time=when))).id

        runs = [await start(ago=0) for _ in range(limit)]
        with patch.object(BaseWorker, "_propose_pending_state", late):
            async with _WithoutJobs(work_pool_name=pool, create_pool_if_not_found=False) as polled:
                await polled.sync_with_backend()
                await polled.get_and_submit_flow_runs()
                # Before those in the server's order, as any run is while another one's claim is in the database.
                runs += [await start(ago=5) for _ in range(limit)]
                await polled.get_and_submit_flow_runs()
                during = await _states(client, runs)
                heard.set()
                # A server on SQLite refuses what meets another transaction; the worker claims it by its next poll.
                for _ in range(20):
                    while polled.submitting:
                        await asyncio.sleep(0.05)
                    at_rest = await _states(client, runs)
                    if at_rest["PENDING"] >= limit:
                        break
                    await polled.get_and_submit_flow_runs()
        return during, at_rest


@pytest.mark.usefixtures("prefect_server")
def test_no_more_runs_are_claimed_than_the_pools_limit_however_slow_the_server() -> None:
    """The server counts from Pending on; a poll before that would get the same room a second time."""
    pool = f"limited-{uuid4().hex[:6]}"
    during, at_rest = asyncio.run(_claims_of_hasty_polls(pool, limit=2))
    assert during == {"SCHEDULED": 4}
    assert at_rest == {"PENDING": 2, "SCHEDULED": 2}


async def _claimed_around_absences(
    url: str, port: int, absent: Callable[[int], contextlib.AbstractContextManager[None]]
) -> int:
    """How often a worker polled a port where, in turns, nobody answers, in that way, and the server at `url`."""
    pool, seconds = f"away-{uuid4().hex[:6]}", 0.1
    away = {PREFECT_API_URL: f"http://127.0.0.1:{port}/api", PREFECT_WORKER_QUERY_SECONDS: seconds}
    polls = 0

    class Counting(_WithoutJobs):
        async def get_and_submit_flow_runs(self) -> list[FlowRun]:
            nonlocal polls
            polls += 1
            return await super().get_and_submit_flow_runs()

    async def until(condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(60):
            while not await condition():
                assert not working.done(), working.exception()
                await asyncio.sleep(seconds)

    async with get_client() as client:
        made = await _deployment(client, pool)
        with temporary_settings(away):
            tested = Counting(work_pool_name=pool, create_pool_if_not_found=False)
            working = asyncio.create_task(tested.start())
            try:
                # Before its first answer it asks for more, and that takes longer.
                for number, absence in ((2, contextlib.nullcontext), (13, absent)):
                    end = polls + number

                    async def missed(end: int = end) -> bool:
                        return polls >= end

                    with absence(port):
                        await until(missed)
                    assert tested.is_worker_still_polling(seconds) == (number == 13), "not before the first answer"
                    with relayed(port, url):
                        run = (await client.create_flow_run_from_deployment(made, state=Scheduled())).id

                        async def claimed(run: UUID = run) -> bool:
                            return await _states(client, [run]) == {"PENDING": 1}

                        await until(claimed)
            finally:
                working.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await working
    return polls


@pytest.mark.parametrize("absent", [contextlib.nullcontext, silent])
def test_a_worker_outlasts_an_api_that_is_away(
    prefect_server: str,
    absent: Callable[[int], contextlib.AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefect's own ends after a dozen polls in vain, and its container is started again ever later.

    Where a network drops what it sends a poll of its own takes a minute, in which it asks at ever longer intervals.
    """
    monkeypatch.setattr(kubernetes_worker, "CONNECT_TIMEOUT_SECONDS", 0.2)
    assert asyncio.run(_claimed_around_absences(prefect_server, free_port(), absent)) >= 15


IMPATIENT = {
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_CREATE_JOB_RETRY_MAX_RETRIES": "1",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_CREATE_JOB_RETRY_JITTER_MAX_SECONDS": "0",
}


class _Unconnected(kubernetes_worker.Worker):
    """A worker with a client of no cluster."""

    @contextlib.asynccontextmanager
    async def _get_configured_kubernetes_client(self, *_: Any) -> AsyncIterator[ApiClient]:
        async with ApiClient() as client:
            yield client


def _nothing(*_: Any) -> None:
    pass


async def _claim(
    url: str,
    polling: Callable[[], None] = _nothing,
    claiming: Callable[[], None] = _nothing,
    submitting: Callable[[kubernetes_worker.Worker, UUID], None] = _nothing,
) -> tuple[str, int]:
    """A run's state by name, and how many Jobs of it were made, after two polls of a worker to which that happens."""
    pool, jobs = f"cut-{uuid4().hex[:6]}", 0

    class Cut(kubernetes_worker.Worker):
        async def claim_and_submit(self, flow_run: FlowRun) -> None:
            claiming()
            await super().claim_and_submit(flow_run)

        async def claim(self, flow_run: FlowRun) -> bool:
            assert PREFECT_CLIENT_MAX_RETRIES.value() == 0
            pending = await super().claim(flow_run)
            assert PREFECT_CLIENT_MAX_RETRIES.value() == 5, "to record the Job is worth a while"
            return pending

        async def label_claimed_run(self, flow_run_id: UUID) -> None:
            submitting(self, flow_run_id)

    async def make(_: Any, run: FlowRun, configuration: Any, task_status: Any) -> KubernetesWorkerResult:
        nonlocal jobs
        assert "PREFECT_CLIENT_MAX_RETRIES" not in configuration.env, "runs have more patience than their worker"
        metadata = configuration.job_manifest["spec"]["template"]["metadata"]
        assert metadata["annotations"] == {MAIN_CONTAINER_ANNOTATION: "prefect-job"}
        given = configuration.job_manifest["spec"]["template"]["spec"]["containers"][0]["env"]
        environment = {each["name"]: each.get("value") for each in given}
        assert "ACTIVE_DEADLINE_SECONDS" not in environment
        assert environment["PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR"] == "relinquish", "without the supervisor"
        jobs += 1
        task_status.started("namespace:job")
        return KubernetesWorkerResult(identifier="namespace:job", status_code=0)

    async with get_client() as client:
        made = await _deployment(client, pool)
        with temporary_settings({PREFECT_API_URL: url}), patch.object(KubernetesWorker, "run", make):
            async with Cut(work_pool_name=pool, create_pool_if_not_found=False) as tested:
                await tested.sync_with_backend()
                run = (await client.create_flow_run_from_deployment(made, state=Scheduled())).id
                for _ in range(2):
                    polling()
                    await tested.get_and_submit_flow_runs()
                    while tested.submitting:
                        await asyncio.sleep(0.05)
        return str((await client.read_flow_run(run)).state_name), jobs


def _raise(error: Exception) -> Callable[..., None]:
    def it(*_: Any) -> None:
        raise error

    return it


def _grow_old(claiming: kubernetes_worker.Worker, run: UUID) -> None:
    claiming._claim_times[run] -= kubernetes_worker.CLAIM_TIMEOUT_SECONDS


def _grow_nearly_too_old(claiming: kubernetes_worker.Worker, run: UUID) -> None:
    claiming._claim_times[run] -= kubernetes_worker.CLAIM_TIMEOUT_SECONDS - 0.5


@pytest.mark.parametrize(
    ("happens", "state", "jobs"),
    [
        (_nothing, "Submitting", 1),
        (_grow_old, "Pending", 0),
        (_raise(ConnectError("nobody there")), "Pending", 0),
        (_raise(ValueError("no such thing")), "JobRefused", 0),
    ],
    ids=["nothing", "it is too old", "the API goes", "an error"],
)
def test_a_claim_that_was_cut_off_makes_no_job_and_says_nothing_of_what_may_be_another_s(
    prefect_server: str, happens: Callable[[kubernetes_worker.Worker, UUID], None], state: str, jobs: int
) -> None:
    """Not even that it is submitted, from when on it would be a new claim to the reconciler."""
    assert asyncio.run(_claim(prefect_server, submitting=happens)) == (state, jobs)


def test_a_claim_is_let_go_though_the_api_does_not_answer(prefect_server: str) -> None:
    async def unanswered(*_: Any) -> None:
        await asyncio.Event().wait()

    claiming = _claim(prefect_server, submitting=_grow_nearly_too_old)
    with patch.object(BaseWorker, "_propose_submitting_state", unanswered):
        assert asyncio.run(asyncio.wait_for(claiming, 120)) == ("Pending", 0)


def test_an_api_that_goes_before_a_run_is_claimed_costs_a_poll(prefect_server: str) -> None:
    """Prefect's own worker ends of it, with its other claims, after a minute in which it does not poll."""
    port = free_port()
    with contextlib.ExitStack() as there:
        claims = 0

        def come() -> None:
            there.close()
            there.enter_context(relayed(port, prefect_server))

        def go() -> None:
            nonlocal claims
            claims += 1
            if claims == 1:
                there.close()

        come()
        found = asyncio.run(_claim(f"http://127.0.0.1:{port}/api", come, go))
    assert found == ("Submitting", 1)
    assert claims == 2


def _api_error(status: int, reason: str, body: str) -> ApiException:
    error: Any = ApiException(status=status, reason=reason)
    error.body = body
    return cast("ApiException", error)


OVER_QUOTA = json.dumps(
    {
        "message": 'jobs.batch "x" is forbidden: exceeded quota: objects, requested: count/jobs.batch=1, '
        "used: count/jobs.batch=2, limited: count/jobs.batch=2"
    }
)
DENIED = json.dumps({"message": 'admission webhook "policy" denied the request: not now'})
INVALID = json.dumps({"message": 'Job.batch "x" is invalid: spec.template.spec.containers[0].image: Required value'})


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        pytest.param(
            _api_error(403, "Forbidden", OVER_QUOTA), "capacity", "exceeded quota: objects", id="without a reconciler"
        ),
        (_api_error(403, "Forbidden", OVER_QUOTA), "capacity", "exceeded quota: objects"),
        (_api_error(400, "Bad Request", DENIED), "capacity", "denied the request: not now"),
        (
            _api_error(500, "Internal Server Error", '{"message": "etcdserver: leader changed"}'),
            "capacity",
            "leader changed",
        ),
        (_api_error(503, "Service Unavailable", "<html>"), "capacity", "Service Unavailable"),
        (_api_error(422, "Unprocessable Entity", INVALID), "cure", "Required value"),
    ],
)
def test_refused_job_does_not_crash_the_run(
    request: pytest.FixtureRequest, prefect_server: str, error: Exception, kind: str, said: str
) -> None:
    """It says why, since when and how long that may take, the second time as of the first."""
    alone = "without a reconciler" in request.node.name

    async def refuse(*_: Any, **__: Any) -> None:
        raise error

    async def claim() -> None:
        pool = f"refused-{uuid4().hex[:6]}"
        async with get_client() as client:
            made = await _deployment(client, pool)
            run = (await client.create_flow_run_from_deployment(made, state=Scheduled())).id
            labels = []
            with patch.object(BatchV1Api, "create_namespaced_job", refuse), patch.dict("os.environ", IMPATIENT):
                async with _Unconnected(work_pool_name=pool, create_pool_if_not_found=False) as tested:
                    await tested.sync_with_backend()
                    os.environ["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED"] = str(alone).lower()
                    for _ in range(2):
                        await tested.get_and_submit_flow_runs()
                        while (await client.read_flow_run(run)).state_name != "JobRefused":
                            await asyncio.sleep(0.05)
                        found = await client.read_flow_run(run)
                        assert found.state
                        assert found.state.type.value == ("SCHEDULED" if alone else "PENDING")
                        assert found.state.message
                        assert found.state.message.startswith(state_messages.JOB_NOT_CREATED)
                        assert said in found.state.message
                        labels.append(Refusal.read(found.labels))
                        await client.set_flow_run_state(run, Scheduled(), force=True)
                    os.environ["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED"] = "false"
            [first, second] = labels
            assert first
            assert first.waits_for_capacity == (kind == "capacity")
            assert first == second

    with temporary_settings({PREFECT_API_URL: prefect_server}):
        asyncio.run(asyncio.wait_for(claim(), 120))


def test_job_has_the_credential_of_its_run_and_not_the_workers(prefect_server: str, tmp_path: Path) -> None:
    (tmp_path / "run-key").write_text("k" * 32)
    manifests: dict[UUID, Any] = {}

    async def make(_: Any, run: FlowRun, configuration: Any, task_status: Any) -> KubernetesWorkerResult:
        manifests[run.id] = configuration.job_manifest
        task_status.started("namespace:job")
        return KubernetesWorkerResult(identifier="namespace:job", status_code=0)

    async def claim_two_runs() -> None:
        pool = f"credentials-{uuid4().hex[:6]}"
        async with get_client() as client:
            made = await _deployment(client, pool)
            runs = [(await client.create_flow_run_from_deployment(made, state=Scheduled())).id for _ in range(2)]
            async with _Unconnected(work_pool_name=pool, create_pool_if_not_found=False) as tested:
                await tested.sync_with_backend()
                while set(manifests) != set(runs):
                    await tested.get_and_submit_flow_runs()
                    await asyncio.sleep(0.05)

    credentials = {"RUN_CREDENTIALS": str(tmp_path)}
    settings = {PREFECT_API_URL: prefect_server, PREFECT_API_AUTH_STRING: "worker:secret"}
    with (
        temporary_settings(settings),
        patch.dict("os.environ", credentials),
        patch.object(KubernetesWorker, "run", make),
    ):
        asyncio.run(asyncio.wait_for(claim_two_runs(), 120))
    for run, manifest in manifests.items():
        [container] = manifest["spec"]["template"]["spec"]["containers"]
        given = [entry for entry in container["env"] if entry["name"] == "PREFECT_API_AUTH_STRING"]
        assert given == [{"name": "PREFECT_API_AUTH_STRING", "value": sign_run("k" * 32, run)}]
        assert "worker:secret" not in json.dumps(manifest)
