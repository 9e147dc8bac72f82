"""The Kubernetes worker: Prefect's worker with a complete health check, draining, and fenced claims.

- Due runs: the worker listens to the events of its pool, and polls when a run has become due or a slot free. It knows
  which runs become due before its next regular poll, and polls at that moment. After a missed event a run waits for the
  next regular poll.
- Namespace: with `--namespace` the worker creates its Jobs there, whatever the pool's template says. The worker's Role
  covers that namespace, so workers of several namespaces and clusters can share a pool.
- Health: `GET :8080/health` covers polling and the thread that watches pods and Jobs. Without that thread the
  death of a pod would go unnoticed.
- Draining: on SIGTERM the worker first makes the Jobs of its claims. No run stays Pending because its worker ended
  between the claim and the Job.
- While the Prefect API is down, the worker polls at the same interval and is healthy. Prefect's worker exits. An exit
  cures nothing, and Kubernetes waits for minutes before it restarts a container that exits often.
- If the API is down in the middle of a claim, the worker drops the claim. Prefect's worker would exit. Or it would
  report a crash much later of a run that another worker has by then, or make a second Job for that run.
- Warm pods: a run takes the Job of a warm pod if its own Job would be the same (`orchestration.worker.warm_pods`).
- Fencing: a claim has at most one Job. The Job's name ends with the claim's id, so Kubernetes refuses a second Job. If
  Kubernetes answers the request for a Job too late or never, it may still create the Job after another worker has taken
  the run. That Job executes nothing (`orchestration.runs.supervisor`), and the reconciler deletes it.

Prefect's settings have the intervals: `PREFECT_WORKER_QUERY_SECONDS`, `PREFECT_WORKER_PREFETCH_SECONDS`,
`PREFECT_WORKER_HEARTBEAT_SECONDS`.
"""

import asyncio
import contextlib
import copy
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import anyio
from httpx import HTTPError, HTTPStatusError
from kubernetes_asyncio.client import ApiClient, BatchV1Api, V1Job, V1ObjectMeta
from kubernetes_asyncio.client.exceptions import ApiException
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterNextScheduledStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import SettingsContext, get_settings_context
from prefect.exceptions import Abort, InfrastructureError, InfrastructureNotFound, ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings
from prefect.states import Pending, Scheduled
from prefect.utilities.engine import propose_state
from prefect_kubernetes.settings import KubernetesSettings
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration, KubernetesWorkerResult

from orchestration.access.credentials import AUTH_VARIABLE, run_credential
from orchestration.diagnosis_table import JOB_REFUSED, POD_REFUSED
from orchestration.errors import ClusterError, SettingsError
from orchestration.logs import RUN_ID
from orchestration.prefect_compat.workers import CompatibleWorker, run_of_configuration, watched_kinds
from orchestration.protocol import (
    CAUSE_LABEL,
    CLUSTER_LABEL,
    DEADLINE_VARIABLE,
    FORMER_SIGNING_KEYS_VARIABLE,
    MAIN_CONTAINER,
    MAIN_CONTAINER_ANNOTATION,
    NAMESPACE_LABEL,
    REFUSAL_LABEL,
    RUN_LABEL,
    SIGNING_KEY_VARIABLE,
    claim_of,
)
from orchestration.reconciler import causes
from orchestration.reconciler.kubernetes_client import certificate_hash, connected
from orchestration.reconciler.model import Policy, Refusal
from orchestration.reconciler.state_messages import JOB_NOT_CREATED
from orchestration.runs.result_signing import derive_key
from orchestration.worker import job_template, warm_pods
from orchestration.worker.job_template import RefusedVariableError
from orchestration.worker.poll_schedule import PollSchedule
from orchestration.worker.warm_pods import WarmPods

WATCHED_KINDS = ("jobs", "pods")

CONNECT_TIMEOUT_SECONDS = 5.0
"""How long the worker waits for a connection to the Prefect API.

A dropped packet is sent again 1, 3, 7, 15 and 31 s later. With Prefect's timeout of a minute the worker may find an API
that is back half a minute late.
"""

CLAIM_TIMEOUT_SECONDS = 45.0
"""How old a claim may be when its Job is created. After 60 s the reconciler gives the run to another worker."""

LISTEN_RETRY_SECONDS = 1.0
"""The pause before the worker asks again for events."""

SLOT_POLL_SECONDS = (0.1, 1.0)
"""How long after the end of a run the worker polls. The server sends the event before it commits the free slot."""

CLAIM_CHECK_SECONDS = 0.02
"""How often a poll that waits for claims in progress looks at them."""

NEXT_PAGE_SECONDS = 1.0
"""How soon the worker polls again after a poll that returned runs, and may not have returned all, or that failed."""

CLAIMS_PER_DEPLOYMENT = 10
"""How many runs of a deployment the worker claims at once. A claim that the server refuses takes as long as others."""

WAITING_STATE = "AwaitingConcurrencySlot"
"""The name of the state of a run whose deployment has reached its limit. The server sets the run's next due time."""

WAITING_POLL_SECONDS = 2.0
"""The least time between two polls for runs in that state."""

MAX_PAGES = 10
"""How many pages of due runs the worker reads at once."""

REGULAR_POLLS_AHEAD = 2.0
"""How far ahead the worker looks for due times, in intervals of its regular polls, which Prefect varies by a third."""

CREATE_RETRY_SECONDS = 1.0
"""The pause before a Job is requested again because the Kubernetes API did not answer."""

STATES_WITHOUT_ROOM = ("Unschedulable", POD_REFUSED, JOB_REFUSED)
"""The states of runs to which warm pods give way. Reconciler and worker set them."""

JOB_NAME_MAX_LENGTH = 63
"""The length of a label's value: pods have the name of their Job as a label."""


class Worker(CompatibleWorker):
    """Claims due runs of a work pool and creates a Kubernetes Job for each claim.

    The worker claims no run while an earlier claim is not Pending: concurrency limits count runs from Pending on.

    Args:
        namespace: the namespace of the Jobs; None to use that of the pool's base job template.
        template: the base job template of the worker's release; None to use that of the pool on the server.
        signing_keys: the master key of stored results, then former ones; empty if runs do not sign results.
        warm_replicas: how many warm pods wait for runs.
        warm_max_age_seconds: after how long a waiting warm pod is replaced.
        options: the options of Prefect's worker.
    """

    def __init__(
        self,
        namespace: str | None = None,
        template: dict[str, Any] | None = None,
        signing_keys: Sequence[bytes] = (),
        warm_replicas: int = 0,
        warm_max_age_seconds: float = 600,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if template:
            self.job_configuration = job_template.configuration_of(template, KubernetesWorkerJobConfiguration)
        self._namespace = namespace
        self._warm = WarmPods(warm_replicas, warm_max_age_seconds, self.logger) if warm_replicas else None
        self._signing_keys = tuple(signing_keys)
        self._cluster = ""
        self._is_draining = False
        self._poll_lock = asyncio.Lock()
        self._retry_seconds = NEXT_PAGE_SECONDS
        self._polls = PollSchedule()
        self._polled: set[UUID] = set()
        """The runs that the newest poll returned."""
        self._answered_claims: set[UUID] = set()
        """Runs whose claim the server has granted or refused."""
        self._claim_times: dict[UUID, float] = {}
        """When each claim began, by run, on the clock of `time.monotonic`."""
        self._claims: dict[UUID, UUID] = {}
        """The id of each granted claim, by run."""
        self._signing_scopes: dict[UUID, str] = {}
        """Which runs share a run's key of stored results, by run."""
        self._is_api_down = False
        self._hidden_secrets: set[str] = set()
        """Names of secret variables that a warning has named."""
        self._settings = get_settings_context()
        self._settings_without_retries = SettingsContext(
            profile=self._settings.profile,
            settings=self._settings.settings.copy_with_update({PREFECT_CLIENT_MAX_RETRIES: 0}),
        )

    def is_worker_still_polling(self, query_interval_seconds: float) -> bool:
        """Return whether the worker is healthy: it polls, and watches pods and Jobs if its settings say so.

        A worker is not healthy before the server's first answer: until then a rollout must keep the old worker.
        """
        if not self.is_setup or not self.has_work_pool:
            return False
        # Prefect allows 30 intervals without a poll: a minute at 2 s. On a busy server some claims take that long.
        is_polling = super().is_worker_still_polling(max(query_interval_seconds, 10))
        missing = set(WATCHED_KINDS) - watched_kinds(WATCHED_KINDS) if KubernetesSettings().observer.enabled else set()
        if missing:
            self.logger.error("No longer watching %s: the worker has to start again.", " and ".join(sorted(missing)))
            return False
        return is_polling

    async def start(self, *args: Any, **options: Any) -> None:
        """Poll regularly, and whenever a run may have become due, until the worker is cancelled."""
        coroutines = [self._listen(), self._poll_on_schedule()]
        if self._warm:
            coroutines.append(self._keep_warm_pods(self._warm))
        others = [asyncio.create_task(coroutine) for coroutine in coroutines]
        try:
            await super().start(*args, **options)
        finally:
            for task in others:
                task.cancel()
            await asyncio.wait(others)

    async def _listen(self) -> None:
        """Schedule a poll at each event of the pool that makes a run claimable. Connect again after each failure."""
        has_warned = False
        while True:
            try:
                async with contextlib.aclosing(self.watch_runs()) as runs:
                    async for run in runs:
                        has_warned = False
                        if run:
                            self._polls.expect(run)
                        for pause in (0.0,) if run else SLOT_POLL_SECONDS:
                            self._polls.add(datetime.now(UTC) + timedelta(seconds=pause))
            except Exception as error:
                if not has_warned:
                    self.logger.warning("The Prefect API sends no events: %s. Regular polls go on.", error)
                has_warned = True
            await asyncio.sleep(LISTEN_RETRY_SECONDS)

    async def _poll_on_schedule(self) -> None:
        """Poll at each moment of the schedule."""
        while True:
            await self._polls.wait()
            while self.submitting - self._answered_claims:
                await asyncio.sleep(CLAIM_CHECK_SECONDS)
            try:
                await self._poll()
            except Exception as error:  # the next regular poll raises it, if it lasts
                self.logger.warning("A poll has failed: %s.", error)
                await asyncio.sleep(LISTEN_RETRY_SECONDS)

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """Poll once, and schedule polls for the runs that become due before the next regular poll."""
        return await self._poll(is_regular=True)

    async def _poll(self, *, is_regular: bool = False) -> list[FlowRun]:
        """Poll once, unless the worker drains or a claim of an earlier poll is in progress.

        The server counts runs against the limits of pool and queue from Pending on. A poll before the last claims are
        Pending would get more runs than the limits allow.
        """
        async with self._poll_lock:
            self._answered_claims &= self.submitting
            if self._is_draining or not self.is_setup or self.submitting - self._answered_claims:
                return []
            try:
                if self._is_api_down and not self.has_synchronized:
                    await super().synchronize()
                runs = await super().get_and_submit_flow_runs()
                self._polls.forget(self.submitting)
                ids = {run.id for run in runs}
                if ids - self._polled:
                    # There may be more: a poll returns as many runs as the limits of server and worker allow.
                    self._polls.add(datetime.now(UTC) + timedelta(seconds=NEXT_PAGE_SECONDS))
                self._polled = ids
                if is_regular or self._polls.is_expecting:
                    await self._schedule_polls()
            except HTTPError as error:
                self._handle_outage(error)
                self.record_poll()
                if not is_regular:
                    # What this poll was for has not been claimed, and the next regular poll may be far away.
                    self._polls.add(datetime.now(UTC) + timedelta(seconds=self._retry_seconds))
                    self._retry_seconds = min(2 * self._retry_seconds, get_current_settings().worker.query_seconds)
                return []
            self._retry_seconds = NEXT_PAGE_SECONDS
            if self._is_api_down:
                self.logger.info("The Prefect API answers again.")
                self._is_api_down = False
            return runs

    async def _schedule_polls(self) -> None:
        """Schedule a poll for each run that becomes due before the next regular poll, and for expected runs.

        Without retries: a poll waits for the answer, and no other poll begins meanwhile.
        """
        if not self.has_work_pool:
            return
        # Prefect's worker cuts the fraction off, too.
        prefetch = timedelta(seconds=int(self.get_status()["settings"]["prefetch_seconds"]))
        begin = datetime.now(UTC) + prefetch
        end = begin + timedelta(seconds=REGULAR_POLLS_AHEAD * get_current_settings().worker.query_seconds)
        with self._settings_without_retries.model_copy():
            runs = await self.client.read_flow_runs(
                flow_run_filter=FlowRunFilter(
                    state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
                    next_scheduled_start_time=FlowRunFilterNextScheduledStartTime(after_=begin, before_=end),
                ),
                work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self.work_pool.name])),
                sort=FlowRunSort.NEXT_SCHEDULED_START_TIME_ASC,
            )
        for run in runs:
            if not run.next_scheduled_start_time:
                continue
            due = run.next_scheduled_start_time.timestamp()
            if run.state_name == WAITING_STATE:
                # Of these there may be hundreds, most of which the server refuses again.
                due = math.ceil(due / WAITING_POLL_SECONDS) * WAITING_POLL_SECONDS
            self._polls.add(datetime.fromtimestamp(due, UTC) - prefetch)
        self._polls.forget({run.id for run in runs})
        if (pause := self._polls.next_retry()) is not None:
            self._polls.add(datetime.now(UTC) + timedelta(seconds=pause))

    async def read_due_runs(self) -> list[WorkerFlowRunResponse]:
        """Read which runs are due, without retries: at most `CLAIMS_PER_DEPLOYMENT` of each deployment.

        The server returns the runs that are due first, also those of a deployment whose limit is reached. It refuses
        their claims one by one, and returns each of them again half a minute later. So the runs in line are read
        further, until each deployment has had its share.
        """
        found: list[WorkerFlowRunResponse] = []
        shares: Counter[UUID | None] = Counter()
        # The next poll is the retry. The client's retries would find the API half a minute after it is back.
        with self._settings_without_retries.model_copy():
            page = await super().read_due_runs()
            limit = len(page)  # the server's page, or the free slots of pool and queue
            for _ in range(MAX_PAGES):
                left_out = set()
                for response in page:
                    shares[response.flow_run.deployment_id] += 1
                    if shares[response.flow_run.deployment_id] > CLAIMS_PER_DEPLOYMENT:
                        left_out.add(response.flow_run.id)
                    elif len(found) < limit:
                        found.append(response)
                self._polls.forget(left_out)
                last = page[-1].flow_run.next_scheduled_start_time if page else None
                if not left_out or last is None or len(found) >= limit:
                    break
                page = await self.read_later_due_runs(last + timedelta(microseconds=1))
        return found

    async def synchronize(self) -> None:
        """Send a heartbeat and read the pool. If the API does not answer, the next poll tries again."""
        self.limit_connect_time(CONNECT_TIMEOUT_SECONDS)
        try:
            await super().synchronize()
        except HTTPError as error:
            self._handle_outage(error)

    def _handle_outage(self, error: HTTPError) -> None:
        """Log an outage of the API once: the next poll tries again.

        Raises:
            HTTPError: the API refuses the request, and would refuse it again.
        """
        if not _is_outage(error):
            raise error
        if not self._is_api_down:
            self.logger.warning("The Prefect API cannot be used: %s. Asking again.", error or type(error).__name__)
        self._is_api_down = True

    async def claim_and_submit(self, flow_run: FlowRun) -> None:
        """Claim a due run and make its Job, or drop the claim if the Prefect API does not answer."""
        # Read the scope before Prefect builds the job configuration, which takes `env` out of the run's own variables.
        self._signing_scopes[flow_run.id] = job_template.signing_scope(flow_run)
        # A poll is the retry. Without retries here, no claim becomes Pending after a long wait.
        try:
            with self._settings_without_retries.model_copy():
                await super().claim_and_submit(flow_run)
        except HTTPError as error:
            self.release(flow_run)
            self._polls.add(datetime.now(UTC) + timedelta(seconds=NEXT_PAGE_SECONDS))
            self._handle_outage(error)
        finally:
            self._claim_times.pop(flow_run.id, None)
            self._claims.pop(flow_run.id, None)
            self._signing_scopes.pop(flow_run.id, None)

    async def report_refusal(self, flow_run: FlowRun, message: str, client: PrefectClient | None = None) -> None:
        """Set the state of a run that gets no Job, unless the claim is dropped: another worker may have the run."""
        error = sys.exception()
        if _is_outage(error) or isinstance(error, TimeoutError | ConnectionError | aiohttp.ClientError):
            self._log_dropped_claim(flow_run, error or type(error).__name__)
        elif error is None:
            await super().report_refusal(flow_run, message, client)
        elif isinstance(error, RefusedVariableError):
            with contextlib.suppress(Abort, ObjectNotFound, HTTPError):
                # With this cause the reconciler does not retry the run: only a person can correct the variable.
                await self.client.update_flow_run_labels(flow_run.id, {CAUSE_LABEL: "start"})
                await super().report_refusal(flow_run, f"{JOB_NOT_CREATED}{error}.", client)
        else:
            try:
                state = await self._record_refusal(flow_run, error)
                if state:
                    await propose_state(self.client, state, flow_run_id=flow_run.id)
                else:
                    await super().report_refusal(flow_run, message, client)
            except (Abort, ObjectNotFound, HTTPError) as cause:
                self._log_dropped_claim(flow_run, cause)

    def _log_dropped_claim(self, flow_run: FlowRun, cause: object) -> None:
        self.logger.warning(
            "The claim of run %s is dropped: %s.", flow_run.name, cause, extra={RUN_ID: str(flow_run.id)}
        )

    async def _record_refusal(self, flow_run: FlowRun, error: BaseException) -> State[Any] | None:
        """Label the run with the time since which Kubernetes refuses its Job.

        With a reconciler the run is Pending: the reconciler lets a worker claim the run again, or gives the run up.
        Without a reconciler the run is Scheduled.

        Returns:
            The run's state, whose message has the reason; None if no worker is to claim the run again.
        """
        answer = error
        while answer.__context__ and not hasattr(answer, "status"):
            answer = answer.__context__
        status = int(getattr(answer, "status", None) or 0)
        is_from_kubernetes = hasattr(answer, "status") or isinstance(answer, OSError)
        reason = "" if error.__cause__ is answer else f"{getattr(answer, 'reason', None) or type(error).__name__}: "
        sentence = f"{JOB_NOT_CREATED}{reason}{error}"
        run = await self.client.read_flow_run(flow_run.id)
        earlier = Refusal.read(run.labels)
        refusal = Refusal(
            earlier.since if earlier and earlier.attempts == run.run_count else datetime.now(UTC),
            is_from_kubernetes and causes.is_transient(status, sentence),
            run.run_count,
        )
        await self.client.update_flow_run_labels(flow_run.id, {REFUSAL_LABEL: refusal.label})
        if not KubernetesSettings().observer.enabled:
            return Pending(name=JOB_REFUSED, message=sentence)
        now, policy = datetime.now(UTC), Policy()
        if not refusal.waits_for_capacity or (now - refusal.since).total_seconds() > policy.capacity_seconds:
            return None
        due = now + timedelta(seconds=policy.claim_seconds)
        return Scheduled(scheduled_time=due, name=JOB_REFUSED, message=sentence)

    async def claim(self, flow_run: FlowRun) -> bool:
        """Set a run Pending, and keep the claim's id and time; return whether the claim was granted."""
        self._claim_times[flow_run.id] = time.monotonic()
        try:
            is_granted = await super().claim(flow_run)
            if is_granted:
                # The state's id is the claim. A state with another name belongs to another worker's later claim.
                state = (await self.client.read_flow_run(flow_run.id)).state
                is_granted = state is not None and state.name == "Pending"
                if state and is_granted:
                    self._claims[flow_run.id] = state.id
            return is_granted
        except ObjectNotFound:
            return False  # the run was deleted meanwhile
        finally:
            self._answered_claims.add(flow_run.id)
            # From here until the block in `claim_and_submit` ends, requests are retried: the Job must be recorded. And
            # the run's container gets the settings that hold while its Job is made.
            self._settings.model_copy().__enter__()

    async def label_claimed_run(self, flow_run_id: UUID) -> None:
        """Label a claimed run with this cluster and namespace, so that this cluster's reconciler alone acts on it."""
        await super().label_claimed_run(flow_run_id)
        if not self._cluster:
            # If Kubernetes does not answer, the hash of the certificate identifies the cluster to the reconciler, too.
            with contextlib.suppress(ClusterError):
                async with connected("") as cluster:
                    self._cluster = await cluster.identity()
        if identity := self._cluster or certificate_hash():
            await self.client.update_flow_run_labels(flow_run_id, {CLUSTER_LABEL: identity})
        if self._namespace:
            await self.client.update_flow_run_labels(flow_run_id, {NAMESPACE_LABEL: self._namespace})

    async def report_submitting(self, flow_run: FlowRun) -> None:
        """Set a claimed run Submitting before the claim's timeout."""
        # The new state would make a claim look new that the reconciler is about to give away.
        async with asyncio.timeout(self._remaining_seconds(flow_run)):
            await super().report_submitting(flow_run)

    def _remaining_seconds(self, flow_run: FlowRun) -> float:
        """Return how many seconds are left in which the run's claim may get a Job.

        Raises:
            TimeoutError: none.
        """
        now = time.monotonic()
        if (age := now - self._claim_times.get(flow_run.id, now)) > CLAIM_TIMEOUT_SECONDS:
            raise TimeoutError(f"it is {age:.0f} s old, and another worker may have claimed the run")
        return CLAIM_TIMEOUT_SECONDS - age

    async def run(
        self,
        flow_run: FlowRun,
        configuration: KubernetesWorkerJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> KubernetesWorkerResult:
        """Make the run's Job.

        Raises:
            TimeoutError: the claim is too old for a Job.
        """
        remaining = self._remaining_seconds(flow_run)
        self._complete_manifest(flow_run.id, configuration)
        async with asyncio.timeout(remaining):
            return await super().run(flow_run, configuration, task_status)

    def _complete_manifest(self, run: UUID, configuration: KubernetesWorkerJobConfiguration) -> None:
        """Add to the manifest of a run's Job what Prefect's worker does not know, and remove secrets."""
        manifest = configuration.job_manifest
        if self._namespace:
            configuration.namespace = manifest["metadata"]["namespace"] = self._namespace
        template = manifest["spec"]["template"]
        # Prefect executes the run in the first container. An injector may put other containers before it.
        main = {MAIN_CONTAINER_ANNOTATION: template["spec"]["containers"][0].get("name", MAIN_CONTAINER)}
        template["metadata"]["annotations"] = main | (template["metadata"].get("annotations") or {})
        environment = template["spec"]["containers"][0]["env"]
        if deadline := manifest["spec"].get("activeDeadlineSeconds") or template["spec"].get("activeDeadlineSeconds"):
            environment.append({"name": DEADLINE_VARIABLE, "value": str(deadline)})
        command = template["spec"]["containers"][0].get("command") or []
        if not any("execution.py" in word for word in command) and not KubernetesSettings().observer.enabled:
            # On SIGTERM Prefect's own command would reschedule the run without end. The reconciler has retry budgets.
            for variable in environment:
                if variable["name"] == "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR":
                    variable["value"] = "relinquish"
        removed = _remove_secrets(environment)
        if credential := run_credential(run):
            # A value, not a reference: it is worth nothing beyond this run, and needs no right to create Secrets.
            environment[:] = [entry for entry in environment if entry["name"] != AUTH_VARIABLE]
            environment.append({"name": AUTH_VARIABLE, "value": credential})
            removed.discard(AUTH_VARIABLE)
        elif (own := KubernetesSettings().worker).api_auth_string_secret_name and own.api_auth_string_secret_key:
            # Prefect's worker does so when it creates the Job. Whether a warm pod fits is decided before.
            key = {"name": own.api_auth_string_secret_name, "key": own.api_auth_string_secret_key}
            reference = {"name": AUTH_VARIABLE, "valueFrom": {"secretKeyRef": key}}
            environment[:] = [reference if entry["name"] == AUTH_VARIABLE else entry for entry in environment]
        if removed - self._hidden_secrets:
            self._hidden_secrets |= removed
            self.logger.warning(
                "Runs do not get %s, which a Job's manifest would show. Give it by reference: runs.env of the chart.",
                " and ".join(sorted(removed)),
            )
        # A job variable must not choose a key by which a run trusts stored results.
        of_signing = (SIGNING_KEY_VARIABLE, FORMER_SIGNING_KEYS_VARIABLE)
        environment[:] = [entry for entry in environment if entry["name"] not in of_signing]
        scope = self._signing_scopes.get(run, f"flow-run/{run}")
        if keys := [derive_key(master, scope) for master in self._signing_keys]:
            # Also without former keys: the entry overrides a variable of that name in the image or in runs.envFrom.
            values = (keys[0], " ".join(keys[1:]))
            environment += [{"name": name, "value": value} for name, value in zip(of_signing, values, strict=True)]
        if claim := self._claims.get(run):
            _name_after_claim(manifest["metadata"], claim)

    async def create_job(self, configuration: KubernetesWorkerJobConfiguration, client: ApiClient) -> V1Job:
        """Create the claim's Job. Return it, the Job of an unanswered request, or that of a warm pod."""
        if self._warm and (claim := self._claims.get(UUID(run_of_configuration(configuration)))):
            taken = await self._warm.take(configuration.job_manifest, claim)
            if taken:
                return V1Job(metadata=V1ObjectMeta(name=taken, namespace=configuration.namespace))
        name = configuration.job_manifest["metadata"].get("name", "")
        if not claim_of(name):
            return await super().create_job(configuration, client)
        while True:
            try:
                return await super().create_job(configuration, client)
            except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
                self.logger.warning("The Kubernetes API does not answer: %s. Asking again.", error)
                await asyncio.sleep(CREATE_RETRY_SECONDS)
            except InfrastructureError as error:
                if getattr(error.__cause__, "status", 0) != HTTPStatus.CONFLICT:
                    raise
                return await BatchV1Api(client).read_namespaced_job(name, configuration.namespace)

    async def _keep_warm_pods(self, warm: WarmPods) -> None:
        """Keep the number of warm pods. A worker that drains leaves them to the next worker."""
        has_warned = False
        async with connected(self._namespace or "") as cluster:
            warm.connect(cluster)
            while True:
                try:
                    if self.has_work_pool and not self._is_draining:
                        await self._replace_warm_pods(warm)
                    has_warned = False
                except Exception as error:
                    if not has_warned:
                        self.logger.warning("Warm pods cannot be kept: %s. Trying again.", error)
                    has_warned = True
                await warm.wait()

    async def _replace_warm_pods(self, warm: WarmPods) -> None:
        """Delete the warm pods that no run may take, and create those that are missing."""
        configuration = await self._read_warm_configuration()
        manifest = configuration.job_manifest
        shape = warm_pods.shape_of(manifest)
        is_room_needed = await self.count_runs(STATES_WITHOUT_ROOM) > 0
        missing = await warm.keep(str(self.work_pool.id), shape, is_room_needed=is_room_needed)
        if not missing:
            return
        if reason := warm_pods.explain_unfit(manifest):
            raise SettingsError(f"in the base job template, {reason}")
        async with self.kubernetes_client(configuration) as client:
            for _ in range(missing):
                made = warm.annotate(warm_pods.warm_manifest(manifest, warm.max_wait_seconds), shape)
                await super().create_job(configuration.model_copy(update={"job_manifest": made}), client)

    async def _read_warm_configuration(self) -> KubernetesWorkerJobConfiguration:
        """Return the job configuration of a run with the default job variables."""
        # Each time again: a value may be that of a variable or block of Prefect.
        configuration: KubernetesWorkerJobConfiguration = await self.job_configuration.from_template_and_values(
            base_job_template=copy.deepcopy(self.work_pool.base_job_template), values={}, client=self.client
        )
        sample = FlowRun(id=uuid4(), flow_id=uuid4(), name=warm_pods.NAME)
        configuration.prepare_for_flow_run(
            sample, work_pool=self.work_pool, worker_name=self.name, worker_id=self.backend_id
        )
        self._complete_manifest(sample.id, configuration)
        return configuration

    async def count_runs(self, states: Sequence[str]) -> int:
        """Return how many runs of the pool wait in a state with one of these names. A flow may end in such a state."""
        body = {
            "flow_runs": {"state": {"name": {"any_": [*states]}, "type": {"any_": ["PENDING", "SCHEDULED"]}}},
            "work_pools": {"name": {"any_": [self.work_pool.name]}},
        }
        answer = await self.client.request("POST", "/flow_runs/count", json=body)
        return int(answer.json())

    async def kill_infrastructure(
        self, infrastructure_pid: str, configuration: KubernetesWorkerJobConfiguration, grace_seconds: int = 30
    ) -> None:
        """Delete the Job of a cancelled run that has not started.

        Raises:
            InfrastructureNotFound: the Job is absent, or that of another run. A run can name any Job as its own.
        """
        namespace, _, name = infrastructure_pid.partition(":")
        run = run_of_configuration(configuration)
        async with self.kubernetes_client(configuration) as client:
            try:
                job = await BatchV1Api(client).read_namespaced_job(name, namespace)
            except ApiException as error:
                if error.status != HTTPStatus.NOT_FOUND:
                    raise
                raise InfrastructureNotFound(f"Job {name} is not in namespace {namespace}") from error
        if (job.metadata.labels or {}).get(RUN_LABEL) != run:
            message = f"Job {name} is not deleted: it is not the Job of the cancelled run"
            self.logger.warning("%s.", message, extra={RUN_ID: run})
            raise InfrastructureNotFound(message)
        await super().kill_infrastructure(infrastructure_pid, configuration, grace_seconds)

    async def drain(self) -> None:
        """Stop claiming runs, and wait until each claimed run has its Job."""
        self._is_draining = True
        async with self._poll_lock:
            claimed = len(self.submitting)
        self.logger.info("Shutting down. Claimed runs to submit first: %d.", claimed)
        while self.submitting:
            await asyncio.sleep(0.05)


def _remove_secrets(environment: list[dict[str, Any]]) -> set[str]:
    """Remove the worker's secret settings from the environment of a run's Job; return their names.

    Prefect's worker copies its settings into each Job. It refers to a Secret only for the API's key and password, and
    only if its settings name a Secret.
    """
    settings, by_reference = get_current_settings(), KubernetesSettings().worker
    kept = set()
    if by_reference.api_key_secret_name or by_reference.create_secret_for_api_key:
        kept.add("PREFECT_API_KEY")
    if by_reference.api_auth_string_secret_name:
        kept.add(AUTH_VARIABLE)
    shown = settings.to_environment_variables(exclude_unset=True)
    hidden = settings.to_environment_variables(exclude_unset=True, include_secrets=False)
    secret = {name for name, value in shown.items() if hidden.get(name) != value} | {"PREFECT_CLIENT_CUSTOM_HEADERS"}
    removed = {item["name"] for item in environment if item["name"] in secret - kept and "value" in item}
    environment[:] = [item for item in environment if item["name"] not in removed or "value" not in item]
    return removed


def _name_after_claim(metadata: dict[str, Any], claim: UUID) -> None:
    """Name a Job after its claim, unless the pool's template has a fixed name."""
    if prefix := metadata.get("generateName"):
        suffix = f"-{str(claim)[-12:]}"
        metadata["name"] = prefix[: JOB_NAME_MAX_LENGTH - len(suffix)].rstrip("-.") + suffix


def _is_outage(error: BaseException | None) -> bool:
    """Return whether the API did not answer, or failed with a 5xx. A retry may succeed then."""
    is_refused = isinstance(error, HTTPStatusError) and error.response.status_code < 500
    return isinstance(error, HTTPError) and not is_refused
