"""Private interfaces of Prefect, prefect-kubernetes and kopf for the worker."""

import abc
import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import kopf
import prefect
import prefect_kubernetes
from httpx import Timeout
from kubernetes_asyncio.client import ApiClient, V1Job
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from orchestration.prefect_compat import warn_if_untested
from orchestration.protocol import FINAL_STATES

warn_if_untested("prefect", prefect.__version__)
warn_if_untested("prefect-kubernetes", prefect_kubernetes.__version__)

_kopf_loop: asyncio.AbstractEventLoop | None = None


@kopf.on.startup()
async def _note_kopf_loop(**_: Any) -> None:
    """Keep the event loop in which kopf runs its watchers. It belongs to a thread that Prefect starts."""
    global _kopf_loop
    _kopf_loop = asyncio.get_running_loop()


def watched_kinds(kinds: Iterable[str]) -> set[str]:
    """Return which of these kinds, such as "pods", the observer's thread watches now.

    Replaces: kopf's task names ("watcher for pods.v1@prefect"), in the loop that a handler of `kopf.on.startup` notes
    Why: a watcher ends after repeated refusals, and the worker's health check does not notice
    Until: the worker's health check covers its observer
    """
    if _kopf_loop is None or not _kopf_loop.is_running():
        return set()
    names = [task.get_name() for task in asyncio.all_tasks(_kopf_loop)]
    return {kind for kind in kinds if any(name.startswith(f"watcher for {kind}.") for name in names)}


# abc.ABC keeps this class out of Prefect's registry of workers, and __init_subclass__ its subclasses.
class CompatibleWorker(KubernetesWorker, abc.ABC):
    """Gives the steps of Prefect's Kubernetes worker from a poll to a Job public names.

    Replaces: the registration of workers by `BaseWorker.__init_subclass__`
    Why: a subclass would take the type "kubernetes" in Prefect's registry of workers
    Until: Prefect registers workers explicitly
    """

    def __init_subclass__(cls) -> None:
        pass

    @property
    def logger(self) -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
        """Return the worker's logger.

        Replaces: `BaseWorker._logger`
        Why: its lines name the worker, and reach the Prefect API
        Until: workers have a public logger
        """
        return self._logger

    @property
    def has_work_pool(self) -> bool:
        """Return whether the Prefect API has named the work pool.

        Replaces: `BaseWorker._work_pool`
        Why: the public property raises an error before the first answer
        Until: workers tell whether they know their pool
        """
        return self._work_pool is not None

    @property
    def has_synchronized(self) -> bool:
        """Return whether the worker has had an answer since it started.

        Replaces: `BaseWorker._has_successfully_synced`
        Why: a worker that started while the API was away asks at each poll, not at each heartbeat
        Until: workers synchronize at the pace of polls until they have
        """
        return self._has_successfully_synced

    @property
    def submitting(self) -> set[UUID]:
        """Return the ids of runs between the poll and the end of their submission, with a Job or without.

        Replaces: `BaseWorker._submitting_flow_run_ids`
        Why: a worker that drains waits until these runs have their Jobs
        Until: workers drain before they end
        """
        return self._submitting_flow_run_ids

    def record_poll(self) -> None:
        """Record for the health check that the worker has polled.

        Replaces: `BaseWorker._last_polled_time`
        Why: a poll that the API did not answer does not make the worker unhealthy
        Until: the health check tells an absent API from a hung worker
        """
        self._last_polled_time = datetime.now(UTC)

    def limit_connect_time(self, seconds: float) -> None:
        """Bound how long the worker's client waits for a connection.

        Replaces: `PrefectClient._client`
        Why: the worker's client is not given its options, and waits for a minute
        Until: a setting has the timeout of connections
        """
        client = self.client._client
        client.timeout = Timeout(**client.timeout.as_dict() | {"connect": seconds})

    def release(self, flow_run: FlowRun) -> None:
        """Forget a run that the worker was about to submit.

        Replaces: `BaseWorker._release_limit_slot`, `BaseWorker._cancelling_observer`
        Why: an error in the middle of a submission leaves the run's slot taken
        Until: `BaseWorker._submit_run` releases them in a finally block
        """
        self.submitting.discard(flow_run.id)
        if self._cancelling_observer is not None:
            self._cancelling_observer.remove_in_flight_flow_run_id(flow_run.id)
        self._release_limit_slot(flow_run.id)

    async def read_due_runs(self) -> list[WorkerFlowRunResponse]:
        """Read which runs of the pool are due.

        Replaces: `BaseWorker._get_scheduled_flow_runs`
        Why: this request has its own number of retries
        Until: workers take the client's options
        """
        return await super()._get_scheduled_flow_runs()

    async def read_later_due_runs(self, after: datetime) -> list[WorkerFlowRunResponse]:
        """Read which runs of the pool are due that became due after a moment.

        Replaces: `BaseWorker._get_scheduled_flow_runs`, `BaseWorker._prefetch_seconds`, `BaseWorker._work_queues`
        Why: the first runs in line may all wait for one deployment's slot, and the others would wait behind them
        Until: the server leaves out runs whose deployment has no free slot
        """
        body = {
            "work_queue_names": list(self._work_queues),
            "scheduled_before": str(datetime.now(UTC) + timedelta(seconds=int(self._prefetch_seconds))),
            "scheduled_after": str(after),
        }
        answer = await self.client.request(
            "POST",
            "/work_pools/{name}/get_scheduled_flow_runs",
            path_params={"name": self._work_pool_name},
            json=body,
        )
        return WorkerFlowRunResponse.model_validate_list(answer.json())

    async def _get_scheduled_flow_runs(self) -> list[WorkerFlowRunResponse]:
        return await self.read_due_runs()

    async def synchronize(self) -> None:
        """Send a heartbeat and read the pool.

        Replaces: `BaseWorker._sync_and_initialize`
        Why: the worker outlasts an API that does not answer
        Until: workers do not end when heartbeats fail
        """
        await super()._sync_and_initialize()

    async def _sync_and_initialize(self) -> None:
        await self.synchronize()

    async def watch_runs(self) -> AsyncGenerator[UUID | None, None]:
        """Yield the id of each run of the pool that becomes Scheduled, and None when a run has ended.

        The first item is None, as soon as the server reports events: what happened before was not reported.

        Replaces: `prefect.flow-run.*` events and their resources, `BaseWorker._work_pool_name`
        Why: the worker claims a run when the run becomes due, not at the next poll
        Until: the worker's channel announces due runs
        """
        # Imported late: the module's filters are built when it is imported.
        from prefect.events.clients import get_events_subscriber
        from prefect.events.filters import EventAnyResourceFilter, EventFilter, EventNameFilter, EventResourceFilter
        from prefect.events.schemas.events import ResourceSpecification

        of_pool = {"prefect.resource.role": "work-pool", "prefect.resource.name": self._work_pool_name}
        states = ["SCHEDULED", *sorted(FINAL_STATES)]
        # The server sets these states of runs that are not claimable now, or have been for a while.
        waiting = ["prefect.flow-run.AwaitingConcurrencySlot", "prefect.flow-run.Late"]
        subscriber = get_events_subscriber(
            EventFilter(
                event=EventNameFilter(prefix=["prefect.flow-run."], exclude_name=waiting),
                resource=EventResourceFilter(labels=ResourceSpecification({"prefect.state-type": states})),
                any_resource=EventAnyResourceFilter(labels=ResourceSpecification(of_pool)),
            ),
            reconnection_attempts=0,
        )
        async with subscriber:
            yield None
            async for event in subscriber:
                is_scheduled = event.resource["prefect.state-type"] == "SCHEDULED"
                yield UUID(event.resource.id.removeprefix("prefect.flow-run.")) if is_scheduled else None

    async def claim_and_submit(self, flow_run: FlowRun) -> None:
        """Claim a due run and make its Job.

        Replaces: `BaseWorker._submit_run`
        Why: an error before the claim ends Prefect's worker; here the next poll is the retry
        Until: workers survive the error of one submission
        """
        await super()._submit_run(flow_run)

    async def _submit_run(self, flow_run: FlowRun) -> None:
        await self.claim_and_submit(flow_run)

    async def claim(self, flow_run: FlowRun) -> bool:
        """Set a run Pending, which claims the run; return whether the claim was granted.

        Replaces: `BaseWorker._propose_pending_state`
        Why: the id of the Pending state is the fencing token, and the claim's age starts here
        Until: workers hand the Pending state on to `run`
        """
        return await super()._propose_pending_state(flow_run)

    async def _propose_pending_state(self, flow_run: FlowRun) -> bool:
        return await self.claim(flow_run)

    async def label_claimed_run(self, flow_run_id: UUID) -> None:
        """Label a claimed run with the worker that claimed the run.

        Replaces: `BaseWorker._give_worker_labels_to_flow_run`
        Why: the reconciler of a cluster acts on runs with that cluster's label
        Until: workers take labels for their runs
        """
        await super()._give_worker_labels_to_flow_run(flow_run_id)

    async def _give_worker_labels_to_flow_run(self, flow_run_id: UUID) -> None:
        await self.label_claimed_run(flow_run_id)

    async def report_submitting(self, flow_run: FlowRun) -> None:
        """Set a claimed run Submitting, before its Job is made.

        Replaces: `BaseWorker._propose_submitting_state`
        Why: a claim that is too old must not look like a new one
        Until: Prefect fences runs of stale claims
        """
        await super()._propose_submitting_state(flow_run)

    async def _propose_submitting_state(self, flow_run: FlowRun) -> None:
        await self.report_submitting(flow_run)

    async def report_refusal(self, flow_run: FlowRun, message: str, client: PrefectClient | None = None) -> None:
        """Set a run Crashed that gets no Job because of an error.

        Replaces: `BaseWorker._propose_crashed_state`
        Why: a refused Job is tried again, and a lost claim may be another worker's
        Until: workers have a hook for failed submissions
        """
        await super()._propose_crashed_state(flow_run, message, client)

    async def _propose_crashed_state(
        self, flow_run: FlowRun, message: str, client: PrefectClient | None = None
    ) -> None:
        await self.report_refusal(flow_run, message, client)

    async def create_job(self, configuration: KubernetesWorkerJobConfiguration, client: ApiClient) -> V1Job:
        """Create the Job of a run in Kubernetes.

        Replaces: `KubernetesWorker._create_job`
        Why: a request that Kubernetes did not answer is sent again, and its Job recognized
        Until: prefect-kubernetes names Jobs after claims and repeats the request
        """
        return await super()._create_job(configuration, client)

    async def _create_job(self, configuration: KubernetesWorkerJobConfiguration, client: ApiClient) -> V1Job:
        return await self.create_job(configuration, client)

    @contextlib.asynccontextmanager
    async def kubernetes_client(self, configuration: KubernetesWorkerJobConfiguration) -> AsyncIterator[ApiClient]:
        """Open a client of the cluster in which a run's Job is.

        Replaces: `KubernetesWorker._get_configured_kubernetes_client`
        Why: the worker reads a Job before it deletes the Job of a cancelled run
        Until: Prefect's worker checks whose Job it deletes
        """
        async with self._get_configured_kubernetes_client(configuration) as client:
            yield client


def run_of_configuration(configuration: KubernetesWorkerJobConfiguration) -> str:
    """Return the id of the run for which a job configuration was made.

    Replaces: `BaseJobConfiguration._related_objects`
    Why: a run's job variables can change the configuration's labels and environment
    Until: Prefect's worker checks whose Job it deletes
    """
    return str(configuration._related_objects["flow-run"].id)
