"""The worker's claims, with a real Prefect server. Tests of its Jobs need a cluster and are in `tests/e2e`."""

import asyncio
import contextlib
import json
import os
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch
from uuid import UUID, uuid4

import pytest
from httpx import ConnectError, HTTPStatusError, Request, Response
from kubernetes_asyncio.client import ApiClient, BatchV1Api
from kubernetes_asyncio.client.exceptions import ApiException
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_LOGGING_TO_API_ENABLED,
    PREFECT_WORKER_QUERY_SECONDS,
    temporary_settings,
)
from prefect.states import Completed, Scheduled
from prefect.workers.base import BaseWorker
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerResult

from orchestration.access.credentials import sign_run
from orchestration.protocol import MAIN_CONTAINER_ANNOTATION
from orchestration.reconciler import state_messages
from orchestration.reconciler.model import Refusal
from orchestration.worker import kubernetes_worker, poll_schedule
from tests.parts import free_port
from tests.relay import relayed, silent


@flow
def nothing() -> None:
    """Do nothing: no run of this flow is executed."""


pytestmark = pytest.mark.usefixtures("closed_worker_channels")


@pytest.fixture(autouse=True)
def without_cluster() -> Iterator[None]:
    """Let workers watch no cluster, and keep their logs off the Prefect API."""
    with (
        patch.dict("os.environ", PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED="false"),
        temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}),
    ):
        yield


class _WithoutJobs(kubernetes_worker.Worker):
    """Claims runs as the worker does, and makes no Jobs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.is_listening = asyncio.Event()

    async def watch_runs(self) -> AsyncGenerator[UUID | None, None]:
        async with contextlib.aclosing(super().watch_runs()) as runs:
            async for run in runs:
                self.is_listening.set()
                yield run

    async def run(self, *_: Any, **__: Any) -> KubernetesWorkerResult:
        return KubernetesWorkerResult(identifier="none", status_code=0)


async def _states(client: PrefectClient, runs: list[UUID]) -> Counter[str]:
    found = await client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=runs)))
    return Counter(str(run.state_type.value) for run in found if run.state_type)


async def _deployment(client: PrefectClient, pool: str, limit: int | None = None) -> UUID:
    """Create a deployment of the flow in a new pool with this name and concurrency limit."""
    await client.create_work_pool(WorkPoolCreate(name=pool, type="kubernetes", concurrency_limit=limit))
    return await client.create_deployment(
        flow_id=await client.create_flow(nothing), name="nothing", work_pool_name=pool
    )


async def _claim_in_two_quick_polls(pool: str, limit: int) -> tuple[Counter[str], Counter[str]]:
    """Poll twice while the claims have not reached the server; return the runs' states then, and at the end."""
    may_claim = asyncio.Event()
    propose = BaseWorker._propose_pending_state

    async def propose_late(self: Any, flow_run: Any) -> bool:
        await may_claim.wait()
        return bool(await propose(self, flow_run))

    async with get_client() as client:
        made = await _deployment(client, pool, limit)

        async def start(ago: float) -> UUID:
            when = datetime.now(UTC) - timedelta(minutes=ago)
            return (await client.create_flow_run_from_deployment(made, state=Scheduled(scheduled_time=when))).id

        runs = [await start(ago=0) for _ in range(limit)]
        with patch.object(BaseWorker, "_propose_pending_state", propose_late):
            async with _WithoutJobs(work_pool_name=pool, create_pool_if_not_found=False) as polled:
                await polled.sync_with_backend()
                await polled.get_and_submit_flow_runs()
                # These runs come first in the server's order, as any run may while another claim is in progress.
                runs += [await start(ago=5) for _ in range(limit)]
                await polled.get_and_submit_flow_runs()
                during = await _states(client, runs)
                may_claim.set()
                # A server on SQLite refuses a claim during another transaction. The next poll claims that run.
                for _ in range(20):
                    while polled.submitting:
                        await asyncio.sleep(0.05)
                    at_rest = await _states(client, runs)
                    if at_rest["PENDING"] >= limit:
                        break
                    await polled.get_and_submit_flow_runs()
        return during, at_rest


@pytest.mark.usefixtures("prefect_server")
def test_slow_server_gets_no_more_claims_than_the_limit_of_the_pool() -> None:
    """The server counts runs from Pending on. A poll before that would get the same slots again."""
    pool = f"limited-{uuid4().hex[:6]}"
    during, at_rest = asyncio.run(_claim_in_two_quick_polls(pool, limit=2))
    assert during == {"SCHEDULED": 4}
    assert at_rest == {"PENDING": 2, "SCHEDULED": 2}


async def _count_polls_with_outages(
    url: str, port: int, absent: Callable[[int], contextlib.AbstractContextManager[None]]
) -> int:
    """Let a worker claim a run after each of two outages; return how often the worker polled.

    Args:
        url: the URL of the server, which a relay brings to the port between the outages.
        port: the port at which the worker polls.
        absent: simulates an outage at the port.
    """
    pool, seconds = f"away-{uuid4().hex[:6]}", 0.1
    settings = {PREFECT_API_URL: f"http://127.0.0.1:{port}/api", PREFECT_WORKER_QUERY_SECONDS: seconds}
    polls = 0

    class Counting(_WithoutJobs):
        async def get_and_submit_flow_runs(self) -> list[FlowRun]:
            nonlocal polls
            polls += 1
            return await super().get_and_submit_flow_runs()

    async def until(condition: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(240):
            while not await condition():
                assert not working.done(), working.exception()
                await asyncio.sleep(seconds)

    async with get_client() as client:
        made = await _deployment(client, pool)
        with temporary_settings(settings):
            tested = Counting(work_pool_name=pool, create_pool_if_not_found=False)
            working = asyncio.create_task(tested.start())
            try:
                # Before its first answer the worker sends more requests, and each poll takes longer.
                for number, outage in ((2, contextlib.nullcontext), (13, absent)):
                    end = polls + number

                    async def has_polled(end: int = end) -> bool:
                        return polls >= end

                    with outage(port):
                        await until(has_polled)
                    assert tested.is_worker_still_polling(seconds) == (number == 13), (
                        "a worker is not healthy before the first answer"
                    )
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


@pytest.mark.parametrize("absent", [pytest.param(contextlib.nullcontext, marks=pytest.mark.further), silent])
def test_worker_survives_an_outage_of_the_api(
    prefect_server: str,
    absent: Callable[[int], contextlib.AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefect's worker exits after a dozen failed polls, and Kubernetes restarts its container later each time.

    In a network that drops packets a poll of Prefect's worker takes a minute, with ever longer pauses between retries.
    """
    monkeypatch.setattr(kubernetes_worker, "CONNECT_TIMEOUT_SECONDS", 0.2)
    assert asyncio.run(_count_polls_with_outages(prefect_server, free_port(), absent)) >= 15


def _claims_of_a_worker_that_hardly_polls(
    url: str,
    steps: Callable[[PrefectClient, UUID, Callable[[UUID], Awaitable[State]]], Awaitable[None]],
    **options: Any,
) -> None:
    """Run a worker whose regular polls are minutes apart, and take the steps of a test.

    The worker polls once more after each event than usual. On a busy machine the server may commit later than the usual
    polls, and a regular poll would find the run seconds later.

    Args:
        url: the URL of the API for the worker.
        steps: called with a client, the id of a deployment in the worker's pool, and a function that waits until a run
            is claimed and returns the state.
        options: options of the worker; `pool_limit` is the concurrency limit of the pool, `kind` the worker's class.
    """
    pool, pool_limit = f"due-{uuid4().hex[:6]}", options.pop("pool_limit", None)
    kind: type[_WithoutJobs] = options.pop("kind", _WithoutJobs)

    async def run() -> None:
        async with get_client() as client:
            made = await _deployment(client, pool, pool_limit)

            async def claimed(run: UUID) -> State:
                while True:
                    states = await client.read_flow_run_states(run)
                    if found := [state for state in states if state.name == "Pending"]:
                        return found[0]
                    await asyncio.sleep(0.05)

            with (
                temporary_settings({PREFECT_API_URL: url, PREFECT_WORKER_QUERY_SECONDS: 300}),
                patch.object(kubernetes_worker, "SLOT_POLL_SECONDS", (*kubernetes_worker.SLOT_POLL_SECONDS, 20.0)),
                patch.object(poll_schedule, "RETRY_SECONDS", (*poll_schedule.RETRY_SECONDS, 20.0)),
            ):
                tested = kind(work_pool_name=pool, create_pool_if_not_found=False, **options)
                working = asyncio.create_task(tested.start())
                try:
                    async with asyncio.timeout(240):
                        await tested.is_listening.wait()
                        await steps(client, made, claimed)
                finally:
                    working.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await working

    asyncio.run(run())


async def _start(client: PrefectClient, deployment: UUID, seconds: float = 0) -> UUID:
    """Schedule a run that becomes due after some seconds."""
    due: State[Any] = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(seconds=seconds))
    return (await client.create_flow_run_from_deployment(deployment, state=due)).id


async def _wait_until_submitting(client: PrefectClient, run: UUID) -> None:
    """Wait until the worker has written its last state of a run: it would replace the state of the run's end."""
    while "Submitting" not in [state.name for state in await client.read_flow_run_states(run)]:
        await asyncio.sleep(0.05)


def test_worker_claims_a_run_when_it_becomes_due(prefect_server: str) -> None:
    async def steps(client: PrefectClient, made: UUID, claimed: Callable[[UUID], Awaitable[State]]) -> None:
        for seconds in (0, 2.5):
            run = await _start(client, made, seconds)
            state = await claimed(run)
            due: datetime | None = (await client.read_flow_run(run)).expected_start_time
            assert due
            assert state.timestamp >= due - timedelta(seconds=1)

    _claims_of_a_worker_that_hardly_polls(prefect_server, steps, prefetch_seconds=1)


def test_worker_claims_due_runs_after_a_poll_that_failed(prefect_server: str, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the failure is: nothing else polls before the next regular poll."""
    failures: list[str] = []

    class Failing(_WithoutJobs):
        async def _poll(self, *, is_regular: bool = False) -> list[FlowRun]:
            if not is_regular and not failures:
                failures.append("the answer has no such field")
                raise KeyError(failures[0])
            return await super()._poll(is_regular=is_regular)

    async def steps(client: PrefectClient, made: UUID, claimed: Callable[[UUID], Awaitable[State]]) -> None:
        await _start(client, made)
        while not failures:
            await asyncio.sleep(0.05)
        await claimed(await _start(client, made))

    _claims_of_a_worker_that_hardly_polls(prefect_server, steps, kind=Failing)
    assert "A poll has failed: 'the answer has no such field'." in caplog.messages


@pytest.mark.further
def test_poll_that_loses_the_api_is_repeated_without_a_wait_for_retries(prefect_server: str) -> None:
    """The poll before a run's commit reads when it is to poll again. The API does not answer that."""
    retries: list[int] = []

    async def fail(*_: Any, **__: Any) -> None:
        retries.append(PREFECT_CLIENT_MAX_RETRIES.value())
        raise ConnectError("connection refused")

    class Cut(_WithoutJobs):
        async def read_due_runs(self) -> list[WorkerFlowRunResponse]:
            return await super().read_due_runs() if retries else []

        async def _schedule_polls(self) -> None:
            is_up = bool(retries) or not self._polls.is_expecting
            with contextlib.nullcontext() if is_up else patch.object(self.client, "read_flow_runs", fail):
                await super()._schedule_polls()

    async def steps(client: PrefectClient, made: UUID, claimed: Callable[[UUID], Awaitable[State]]) -> None:
        await claimed(await _start(client, made))

    _claims_of_a_worker_that_hardly_polls(prefect_server, steps, kind=Cut)
    assert retries == [0]


def test_worker_claims_a_run_when_a_slot_becomes_free(prefect_server: str) -> None:
    async def steps(client: PrefectClient, made: UUID, claimed: Callable[[UUID], Awaitable[State]]) -> None:
        first, second = await _start(client, made), await _start(client, made)
        await _wait_until_submitting(client, first)
        await asyncio.sleep(2)
        assert await _states(client, [first, second]) == {"PENDING": 1, "SCHEDULED": 1}
        await client.set_flow_run_state(first, Completed(), force=True)
        await claimed(second)

    _claims_of_a_worker_that_hardly_polls(prefect_server, steps, pool_limit=1)


@pytest.mark.further
def test_slot_that_becomes_free_after_the_poll_for_it_is_used(prefect_server: str) -> None:
    """The server sends the event of a run's end before the commit that frees the slot."""
    has_ended = False
    polls = 0

    class Early(_WithoutJobs):
        async def _poll(self, *, is_regular: bool = False) -> list[FlowRun]:
            nonlocal polls
            polls += has_ended
            return [] if polls == 1 else await super()._poll(is_regular=is_regular)

    async def steps(client: PrefectClient, made: UUID, claimed: Callable[[UUID], Awaitable[State]]) -> None:
        nonlocal has_ended
        first = await _start(client, made)
        await _wait_until_submitting(client, first)
        second = await _start(client, made)
        await asyncio.sleep(2)
        has_ended = True
        await client.set_flow_run_state(first, Completed(), force=True)
        await claimed(second)

    _claims_of_a_worker_that_hardly_polls(prefect_server, steps, pool_limit=1, kind=Early)
    assert polls >= 2


@pytest.mark.further
def test_worker_claims_a_run_again_whose_claim_the_server_could_not_answer(prefect_server: str) -> None:
    failures: list[UUID] = []

    class Failing(_WithoutJobs):
        async def claim(self, flow_run: FlowRun) -> bool:
            if len(failures) < 3:
                failures.append(flow_run.id)
                request = Request("POST", prefect_server)
                raise HTTPStatusError("503", request=request, response=Response(503, request=request))
            return await super().claim(flow_run)

    async def steps(client: PrefectClient, made: UUID, claimed: Callable[[UUID], Awaitable[State]]) -> None:
        await claimed(await _start(client, made))

    _claims_of_a_worker_that_hardly_polls(prefect_server, steps, kind=Failing)
    assert len(failures) == 3


@pytest.mark.further
def test_worker_claims_all_due_runs_with_a_limit_of_its_own(prefect_server: str) -> None:
    async def steps(client: PrefectClient, made: UUID, claimed: Callable[[UUID], Awaitable[State]]) -> None:
        for run in [await _start(client, made) for _ in range(3)]:
            await claimed(run)

    _claims_of_a_worker_that_hardly_polls(prefect_server, steps, limit=1)


def test_runs_that_wait_for_a_slot_do_not_delay_another_deployment(
    prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server returns the runs that became due first, as many as the pool has slots, and refuses them one by one."""
    monkeypatch.setattr(kubernetes_worker, "CLAIMS_PER_DEPLOYMENT", 2)
    claims: list[UUID | None] = []
    propose = BaseWorker._propose_pending_state

    async def propose_noted(self: Any, flow_run: FlowRun) -> bool:
        claims.append(flow_run.deployment_id)
        return bool(await propose(self, flow_run))

    async def steps(client: PrefectClient, made: UUID, claimed: Callable[[UUID], Awaitable[State]]) -> None:
        pool = str((await client.read_deployment(made)).work_pool_name)
        flow_id = await client.create_flow(nothing)
        limited = await client.create_deployment(flow_id, "limited", work_pool_name=pool, concurrency_limit=1)
        await claimed(await _start(client, limited))
        ends = await _start(client, made)
        await claimed(ends)
        await client.update_work_pool(pool, WorkPoolUpdate(is_paused=True))
        for _ in range(8):
            await _start(client, limited)
        other = await _start(client, made)
        claims.clear()
        await client.update_work_pool(pool, WorkPoolUpdate(is_paused=False))
        await client.set_flow_run_state(ends, Completed(), force=True)  # after which the worker polls
        await claimed(other)
        assert claims.index(made) <= 2, "at most two claims of the other deployment come first"

    with patch.object(BaseWorker, "_propose_pending_state", propose_noted):
        _claims_of_a_worker_that_hardly_polls(prefect_server, steps, pool_limit=5, prefetch_seconds=1)


def test_worker_claims_a_run_that_became_due_while_it_was_disconnected(prefect_server: str) -> None:
    port = free_port()
    with contextlib.ExitStack() as relay:
        relay.enter_context(relayed(port, prefect_server))

        async def steps(client: PrefectClient, made: UUID, claimed: Callable[[UUID], Awaitable[State]]) -> None:
            await claimed(await _start(client, made))
            relay.close()
            run = await _start(client, made)
            relay.enter_context(relayed(port, prefect_server))
            await claimed(run)

        _claims_of_a_worker_that_hardly_polls(f"http://127.0.0.1:{port}/api", steps)


ONE_RETRY = {
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_CREATE_JOB_RETRY_MAX_RETRIES": "1",
    "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_CREATE_JOB_RETRY_JITTER_MAX_SECONDS": "0",
}


class _WithoutCluster(kubernetes_worker.Worker):
    """Has a Kubernetes client that is connected to no cluster."""

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
    """Poll for a run until its claim has begun, and once more; return the name of its state, and the number of Jobs.

    Args:
        url: the URL of the API for the worker.
        polling: called before each poll.
        claiming: called before the claim.
        submitting: called between the claim and the Job.
    """
    pool, jobs, has_begun = f"cut-{uuid4().hex[:6]}", 0, False

    class Cut(kubernetes_worker.Worker):
        async def claim_and_submit(self, flow_run: FlowRun) -> None:
            nonlocal has_begun
            has_begun = True
            claiming()
            await super().claim_and_submit(flow_run)

        async def claim(self, flow_run: FlowRun) -> bool:
            assert PREFECT_CLIENT_MAX_RETRIES.value() == 0
            pending = await super().claim(flow_run)
            assert PREFECT_CLIENT_MAX_RETRIES.value() == 5, "the recording of the Job is retried"
            return pending

        async def label_claimed_run(self, flow_run_id: UUID) -> None:
            submitting(self, flow_run_id)

    async def make(_: Any, run: FlowRun, configuration: Any, task_status: Any) -> KubernetesWorkerResult:
        nonlocal jobs
        assert "PREFECT_CLIENT_MAX_RETRIES" not in configuration.env, "the number of retries is the worker's alone"
        metadata = configuration.job_manifest["spec"]["template"]["metadata"]
        assert metadata["annotations"] == {MAIN_CONTAINER_ANNOTATION: "prefect-job"}
        given = configuration.job_manifest["spec"]["template"]["spec"]["containers"][0]["env"]
        environment = {variable["name"]: variable.get("value") for variable in given}
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
                is_last = False
                while not is_last:
                    is_last = has_begun
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
        (_grow_old, "Pending", 0),
        *(
            pytest.param(*case, marks=pytest.mark.further)
            for case in (
                (_nothing, "Submitting", 1),
                (_raise(ConnectError("connection refused")), "Pending", 0),
                (_raise(ValueError("unknown")), "JobRefused", 0),
            )
        ),
    ],
    ids=["claim too old", "nothing", "API down", "error"],
)
def test_interrupted_claim_makes_no_job_and_keeps_the_state_of_the_run(
    prefect_server: str, happens: Callable[[kubernetes_worker.Worker, UUID], None], state: str, jobs: int
) -> None:
    """The state Submitting would make the claim look new to the reconciler."""
    assert asyncio.run(_claim(prefect_server, submitting=happens)) == (state, jobs)


def test_claim_is_dropped_while_the_api_does_not_answer(prefect_server: str) -> None:
    async def wait_for_ever(*_: Any) -> None:
        await asyncio.Event().wait()

    claiming = _claim(prefect_server, submitting=_grow_nearly_too_old)
    with patch.object(BaseWorker, "_propose_submitting_state", wait_for_ever):
        assert asyncio.run(asyncio.wait_for(claiming, 600)) == ("Pending", 0)


def test_outage_before_a_claim_costs_one_poll(prefect_server: str) -> None:
    """Prefect's worker exits with its other claims, after a minute without a poll."""
    port = free_port()
    with contextlib.ExitStack() as relay:
        claims = 0

        def start() -> None:
            relay.close()
            relay.enter_context(relayed(port, prefect_server))

        def stop() -> None:
            nonlocal claims
            claims += 1
            if claims == 1:
                relay.close()

        start()
        found = asyncio.run(_claim(f"http://127.0.0.1:{port}/api", start, stop))
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
    ("error", "kind", "reason"),
    [
        pytest.param(
            _api_error(403, "Forbidden", OVER_QUOTA),
            "capacity",
            "exceeded quota: objects",
            id="without a reconciler",
            marks=pytest.mark.further,
        ),
        (_api_error(403, "Forbidden", OVER_QUOTA), "capacity", "exceeded quota: objects"),
        *(
            pytest.param(_api_error(*error), "capacity", reason, marks=pytest.mark.further)
            for error, reason in (
                ((400, "Bad Request", DENIED), "denied the request: not now"),
                ((500, "Internal Server Error", '{"message": "etcdserver: leader changed"}'), "leader changed"),
                ((503, "Service Unavailable", "<html>"), "Service Unavailable"),
            )
        ),
        (_api_error(422, "Unprocessable Entity", INVALID), "cure", "Required value"),
    ],
)
def test_refused_job_does_not_crash_the_run(
    request: pytest.FixtureRequest, prefect_server: str, error: Exception, kind: str, reason: str
) -> None:
    """The run's state has the reason. The label keeps the time of the first refusal and whether a person has to act."""
    alone = "without a reconciler" in request.node.name

    async def refuse(*_: Any, **__: Any) -> None:
        raise error

    async def claim() -> None:
        pool = f"refused-{uuid4().hex[:6]}"
        async with get_client() as client:
            made = await _deployment(client, pool)
            run = (await client.create_flow_run_from_deployment(made, state=Scheduled())).id
            labels = []
            with patch.object(BatchV1Api, "create_namespaced_job", refuse), patch.dict("os.environ", ONE_RETRY):
                async with _WithoutCluster(work_pool_name=pool, create_pool_if_not_found=False) as tested:
                    await tested.sync_with_backend()
                    os.environ["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED"] = str(alone).lower()
                    for _ in range(2):
                        # A busy server may answer a poll or a claim by 503: the next poll is the retry.
                        while (await client.read_flow_run(run)).state_name != "JobRefused":
                            await tested.get_and_submit_flow_runs()
                            while tested.submitting:
                                await asyncio.sleep(0.05)
                        found = await client.read_flow_run(run)
                        assert found.state
                        assert found.state.type.value == ("SCHEDULED" if alone else "PENDING")
                        assert found.state.message
                        assert found.state.message.startswith(state_messages.JOB_NOT_CREATED)
                        assert reason in found.state.message
                        labels.append(Refusal.read(found.labels))
                        await client.set_flow_run_state(run, Scheduled(), force=True)
                    os.environ["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED"] = "false"
            [first, second] = labels
            assert first
            assert first.waits_for_capacity == (kind == "capacity")
            assert first == second

    with temporary_settings({PREFECT_API_URL: prefect_server}):
        asyncio.run(asyncio.wait_for(claim(), 600))


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
            async with _WithoutCluster(work_pool_name=pool, create_pool_if_not_found=False) as tested:
                await tested.sync_with_backend()
                while set(manifests) != set(runs):
                    await tested.get_and_submit_flow_runs()
                    # Each poll writes. On SQLite polls without a pause starve the labels of a claim, which the server
                    # reads before it writes them.
                    while tested.submitting:
                        await asyncio.sleep(0.05)

    credentials = {"RUN_CREDENTIALS": str(tmp_path)}
    settings = {PREFECT_API_URL: prefect_server, PREFECT_API_AUTH_STRING: "worker:secret"}
    with (
        temporary_settings(settings),
        patch.dict("os.environ", credentials),
        patch.object(KubernetesWorker, "run", make),
    ):
        asyncio.run(asyncio.wait_for(claim_two_runs(), 600))
    for run, manifest in manifests.items():
        [container] = manifest["spec"]["template"]["spec"]["containers"]
        given = [entry for entry in container["env"] if entry["name"] == "PREFECT_API_AUTH_STRING"]
        assert given == [{"name": "PREFECT_API_AUTH_STRING", "value": sign_run("k" * 32, run)}]
        assert "worker:secret" not in json.dumps(manifest)
