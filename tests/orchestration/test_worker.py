"""The worker's claims, on a real Prefect server; its Jobs are tested on the real cluster (`tests/e2e`)."""

import abc
import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings
from prefect.states import Scheduled
from prefect.workers.base import BaseWorker
from prefect_kubernetes.worker import KubernetesWorkerResult

from orchestration import worker


@flow
def nothing() -> None:
    """What the runs would do; none of them gets to it."""


class _WithoutJobs(worker.Worker, abc.ABC):
    """Claims as the worker does, and makes no Job, which would need a cluster."""

    async def run(self, *_: Any, **__: Any) -> KubernetesWorkerResult:
        return KubernetesWorkerResult(identifier="none", status_code=0)


async def _states(client: PrefectClient, runs: list[UUID]) -> Counter[str]:
    found = await client.read_flow_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=runs)))
    return Counter(str(run.state_type.value) for run in found if run.state_type)


async def _claims_of_hasty_polls(pool: str, limit: int) -> tuple[Counter[str], Counter[str]]:
    """The runs' states after polls in a row while the server has not heard of a claim; and at rest."""
    heard = asyncio.Event()
    propose = BaseWorker._propose_pending_state

    async def late(self: Any, flow_run: Any) -> bool:
        await heard.wait()
        return bool(await propose(self, flow_run))

    async with get_client() as client:
        await client.create_work_pool(WorkPoolCreate(name=pool, type="kubernetes", concurrency_limit=limit))
        made = await client.create_deployment(
            flow_id=await client.create_flow(nothing), name="nothing", work_pool_name=pool
        )

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
                await polled.drain()
        return during, await _states(client, runs)


@pytest.mark.usefixtures("prefect_server")
def test_no_more_runs_are_claimed_than_the_pools_limit_however_slow_the_server() -> None:
    """The server counts from Pending on; a poll before that would get the same room a second time."""
    pool = f"limited-{uuid4().hex[:6]}"
    with (
        patch.dict("os.environ", PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED="false"),
        temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False}),
    ):
        during, at_rest = asyncio.run(_claims_of_hasty_polls(pool, limit=2))
    assert during == {"SCHEDULED": 4}
    assert at_rest == {"PENDING": 2, "SCHEDULED": 2}
