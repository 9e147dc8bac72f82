"""The Kubernetes worker, with what Prefect's own lacks.

With `--namespace` its Jobs go there, whatever the pool says: beside the worker, where its Role covers them, so that
workers of several namespaces and clusters can share a pool.

Its health (`GET :8080/health`) covers the thread that watches pods and Jobs as well as polling: without that
thread a pod that dies is never seen. And a worker that is asked to end first finishes what it has claimed: no run
stays Pending because its worker went away between the claim and the Job. While the Prefect API is away it goes on
asking at the same pace, and is healthy: to end, as Prefect's does, brings nothing back, and a container that ended
often waits for minutes until it is started. A claim that the API's absence cuts off is let go: Prefect's worker would
end, or say much later, of a run that another has by then, that it crashed, or make a second Job for it.

A claim has one Job at most: its name ends with the claim's id, so that Kubernetes refuses a second one. A request for
the Job that Kubernetes answers too late, or never, may still create it when another worker has the run. Nothing is
executed in that Job (`orchestration.runs.supervisor`), and the reconciler deletes it.

Intervals are Prefect's settings: `PREFECT_WORKER_QUERY_SECONDS`, `PREFECT_WORKER_PREFETCH_SECONDS`,
`PREFECT_WORKER_HEARTBEAT_SECONDS`.
"""

import asyncio
import contextlib
import os
import sys
import time
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any
from uuid import UUID

import aiohttp
import anyio
from httpx import HTTPError, HTTPStatusError
from kubernetes_asyncio.client import ApiClient, BatchV1Api, V1Job
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import WorkerFlowRunResponse
from prefect.context import SettingsContext, get_settings_context
from prefect.exceptions import Abort, InfrastructureError, ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, get_current_settings
from prefect.states import Pending, Scheduled
from prefect.utilities.engine import propose_state
from prefect_kubernetes.settings import KubernetesSettings
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration, KubernetesWorkerResult

from orchestration.access.credentials import read_run_key, sign_run
from orchestration.diagnosis_table import JOB_REFUSED
from orchestration.errors import ClusterError
from orchestration.prefect_compat.workers import CompatibleWorker, watched_kinds
from orchestration.protocol import (
    CAUSE_LABEL,
    CLUSTER_LABEL,
    DEADLINE_VARIABLE,
    MAIN_CONTAINER,
    MAIN_CONTAINER_ANNOTATION,
    NAMESPACE_LABEL,
    REFUSAL_LABEL,
    claim_of,
)
from orchestration.reconciler import causes
from orchestration.reconciler.kubernetes_client import certificate_hash, connected
from orchestration.reconciler.model import Policy, Refusal
from orchestration.reconciler.state_messages import JOB_NOT_CREATED
from orchestration.worker import job_template
from orchestration.worker.job_template import RefusedVariableError

WATCHED = ("jobs", "pods")

RUN_CREDENTIALS_VARIABLE = "RUN_CREDENTIALS"
"""Names the folder with the key from which the worker derives the API credential of each flow run."""

AUTH_VARIABLE = "PREFECT_API_AUTH_STRING"

CONNECT = 5.0
"""Seconds in which the Prefect API must take a connection. What a network drops is sent again 1, 3, 7, 15 and 31 s
later: with Prefect's limit of a minute a worker may find an API that is back half a minute late."""

CLAIM = 45.0
"""Seconds in which a claimed run gets its Job, or none by this claim: after 60 the reconciler lets another claim it."""


AGAIN = 1.0
"""Seconds from a request for a Job that found no Kubernetes API to the next."""

LONGEST = 63
"""Letters of a Job's name; its pods have it as a label."""


class Worker(CompatibleWorker):
    """Prefect's Kubernetes worker, healthy only while it also watches, and drained before it ends.

    It claims no run while its earlier claims are not yet Pending, which is from where on limits count them.

    Args:
        namespace: where its Jobs go; None leaves that to the pool's base job template.
        template: the base job template of its release; None takes that of the server's pool.
        options: those of Prefect's worker.
    """

    def __init__(self, namespace: str | None = None, template: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        if template:
            self.job_configuration = job_template.configuration_of(template)
        self._namespace = namespace
        self._cluster = ""
        self._draining = False
        self._polling = asyncio.Lock()
        self._proposed: set[UUID] = set()
        self._claimed: dict[UUID, float] = {}
        self._claims: dict[UUID, UUID] = {}
        self._away = False
        self._warned: set[str] = set()
        self._own = get_settings_context()
        self._impatient = SettingsContext(
            profile=self._own.profile, settings=self._own.settings.copy_with_update({PREFECT_CLIENT_MAX_RETRIES: 0})
        )

    def is_worker_still_polling(self, query_interval_seconds: float) -> bool:
        """Whether the worker polls, and watches pods and Jobs if it is to; what its health check asks.

        Not before the server has answered for the first time: until then an older worker is not to go.
        """
        if not self.is_setup or not self.has_work_pool:
            return False
        # Prefect's thirty polls are a minute at a poll every two seconds: on a busy server some claims take that long.
        polls = super().is_worker_still_polling(max(query_interval_seconds, 10))
        missing = set(WATCHED) - watched_kinds(WATCHED) if KubernetesSettings().observer.enabled else set()
        if missing:
            self.logger.error("No longer watching %s: the worker has to start again.", " and ".join(sorted(missing)))
            return False
        return polls

    async def get_and_submit_flow_runs(self) -> list[FlowRun]:
        """One poll; none any more once the worker drains, and none while a claim of an earlier poll is under way.

        The server counts runs against the limits of pool and queue from Pending on: asked again before the last
        claims are Pending, it would hand out more than the limits allow.
        """
        async with self._polling:
            self._proposed &= self.submitting
            if self._draining or self.submitting - self._proposed:
                return []
            try:
                if self._away and not self.has_synchronized:
                    await super().synchronize()
                found = await super().get_and_submit_flow_runs()
            except HTTPError as error:
                self._note_absence(error)
                self.record_poll()
                return []
            if self._away:
                self.logger.info("The Prefect API answers again.")
                self._away = False
            return found

    async def read_due_runs(self) -> list[WorkerFlowRunResponse]:
        """Read which runs are due, without retries."""
        # The next poll is the retry: the client's own would let half a minute pass before it finds the API back.
        with self._impatient.model_copy():
            return await super().read_due_runs()

    async def synchronize(self) -> None:
        """Send a heartbeat and read the pool; an API that does not answer is asked again by the next poll."""
        self.limit_connect_time(CONNECT)
        try:
            await super().synchronize()
        except HTTPError as error:
            self._note_absence(error)

    def _note_absence(self, error: HTTPError) -> None:
        """Say once that nobody answers, or what: the next poll asks again. What is refused for good is an error."""
        if not _is_absence(error):
            raise error
        if not self._away:
            self.logger.warning("The Prefect API cannot be used: %s. Asking again.", error or type(error).__name__)
        self._away = True

    async def claim_and_submit(self, flow_run: FlowRun) -> None:
        """Claim a due run and make its Job, or let the claim go if the Prefect API does not answer."""
        # Here too the next poll is the retry, until the run is Pending: none is made before that.
        try:
            with self._impatient.model_copy():
                await super().claim_and_submit(flow_run)
        except HTTPError as error:
            self.release(flow_run)
            self._note_absence(error)
        finally:
            self._claimed.pop(flow_run.id, None)
            self._claims.pop(flow_run.id, None)

    async def report_refusal(self, flow_run: FlowRun, message: str, client: PrefectClient | None = None) -> None:
        """Say so, but not of a claim that was let go: by then the run may be another's."""
        error = sys.exception()
        if _is_absence(error) or isinstance(error, TimeoutError | ConnectionError | aiohttp.ClientError):
            self.logger.warning("The claim of run %s is let go: %s.", flow_run.name, error or type(error).__name__)
        elif error is None:
            await super().report_refusal(flow_run, message, client)
        elif isinstance(error, RefusedVariableError):
            with contextlib.suppress(Abort, ObjectNotFound, HTTPError):
                # The reconciler tries no run again that a person has to cure.
                await self.client.update_flow_run_labels(flow_run.id, {CAUSE_LABEL: "start"})
                await super().report_refusal(flow_run, f"{JOB_NOT_CREATED}{error}.", client)
        else:
            try:
                state = await self._refused(flow_run, error)
                if state:
                    await propose_state(self.client, state, flow_run_id=flow_run.id)
                else:
                    await super().report_refusal(flow_run, message, client)
            except (Abort, ObjectNotFound, HTTPError) as hindrance:
                self.logger.warning("The claim of run %s is let go: %s.", flow_run.name, hindrance)

    async def _refused(self, flow_run: FlowRun, error: BaseException) -> State[Any] | None:
        """Note since when the run has no Job; its state, which says why, or None if no worker is to claim it again.

        The reconciler lets a worker claim it again, or gives it up after a time. Without one it is Scheduled here.
        """
        answer = error
        while answer.__context__ and not hasattr(answer, "status"):
            answer = answer.__context__
        status = int(getattr(answer, "status", None) or 0)
        is_kubernetes = hasattr(answer, "status") or isinstance(answer, OSError)
        word = "" if error.__cause__ is answer else f"{getattr(answer, 'reason', None) or type(error).__name__}: "
        sentence = f"{JOB_NOT_CREATED}{word}{error}"
        found = await self.client.read_flow_run(flow_run.id)
        before = Refusal.read(found.labels)
        refusal = Refusal(
            before.since if before and before.attempts == found.run_count else datetime.now(UTC),
            is_kubernetes and causes.is_transient(status, sentence),
            found.run_count,
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
        """Set a run Pending, and note the claim's id and age; return whether the claim was granted."""
        self._claimed[flow_run.id] = time.monotonic()
        try:
            pending = await super().claim(flow_run)
            if pending:
                # Its id is the claim. Another name is of another worker's claim, which came after this one.
                state = (await self.client.read_flow_run(flow_run.id)).state
                pending = state is not None and state.name == "Pending"
                if state and pending:
                    self._claims[flow_run.id] = state.id
            return pending
        except ObjectNotFound:
            return False  # it was deleted meanwhile
        finally:
            self._proposed.add(flow_run.id)
            # For what follows in this task, until the block in `claim_and_submit` ends: to record a Job is worth some
            # patience, and whatever is set while a Job is made its run gets too.
            self._own.model_copy().__enter__()

    async def label_claimed_run(self, flow_run_id: UUID) -> None:
        """Mark a claimed run, for the reconciler of this cluster alone."""
        await super().label_claimed_run(flow_run_id)
        if not self._cluster:
            # Where it does not answer, the reconciler knows the cluster by the other mark as well.
            with contextlib.suppress(ClusterError):
                async with connected("") as cluster:
                    self._cluster = await cluster.identity()
        if marked := self._cluster or certificate_hash():
            await self.client.update_flow_run_labels(flow_run_id, {CLUSTER_LABEL: marked})
        if self._namespace:
            await self.client.update_flow_run_labels(flow_run_id, {NAMESPACE_LABEL: self._namespace})

    async def report_submitting(self, flow_run: FlowRun) -> None:
        """Set a claimed run Submitting, in the time that is left of the claim."""
        # Not of a claim that is too old: to the reconciler, which gives it away, it would be new again.
        async with asyncio.timeout(self._left(flow_run)):
            await super().report_submitting(flow_run)

    def _left(self, flow_run: FlowRun) -> float:
        """Seconds until the run's claim is too old for a Job.

        Raises:
            TimeoutError: it is.
        """
        now = time.monotonic()
        if (age := now - self._claimed.get(flow_run.id, now)) > CLAIM:
            raise TimeoutError(f"it is {age:.0f} s old, and the run may be another worker's by now")
        return CLAIM - age

    async def run(
        self,
        flow_run: FlowRun,
        configuration: KubernetesWorkerJobConfiguration,
        task_status: anyio.abc.TaskStatus[int] | None = None,
    ) -> KubernetesWorkerResult:
        """Make the run's Job.

        Raises:
            TimeoutError: the claim is too old for that.
        """
        left = self._left(flow_run)
        manifest = configuration.job_manifest
        if self._namespace:
            configuration.namespace = manifest["metadata"]["namespace"] = self._namespace
        template = manifest["spec"]["template"]
        # Prefect executes the run in the first. An injector may put others before it.
        main = {MAIN_CONTAINER_ANNOTATION: template["spec"]["containers"][0].get("name", MAIN_CONTAINER)}
        template["metadata"]["annotations"] = main | (template["metadata"].get("annotations") or {})
        environment = template["spec"]["containers"][0]["env"]
        if deadline := manifest["spec"].get("activeDeadlineSeconds") or template["spec"].get("activeDeadlineSeconds"):
            environment.append({"name": DEADLINE_VARIABLE, "value": str(deadline)})
        command = template["spec"]["containers"][0].get("command") or []
        if not any("supervisor.py" in each for each in command) and not KubernetesSettings().observer.enabled:
            # Prefect's own command would have the run tried again for ever. The reconciler has budgets.
            for each in environment:
                if each["name"] == "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR":
                    each["value"] = "relinquish"
        left_out = _leave_out_secrets(environment)
        if folder := os.environ.get(RUN_CREDENTIALS_VARIABLE):
            # A value, not a reference: it is worth nothing beyond this run, and needs no right to create Secrets.
            environment[:] = [entry for entry in environment if entry["name"] != AUTH_VARIABLE]
            environment.append({"name": AUTH_VARIABLE, "value": sign_run(read_run_key(folder), flow_run.id)})
            left_out.discard(AUTH_VARIABLE)
        if left_out - self._warned:
            self._warned |= left_out
            self.logger.warning(
                "Runs do not get %s, which a Job's manifest would show. Give it by reference: runs.env of the chart.",
                " and ".join(sorted(left_out)),
            )
        if claim := self._claims.get(flow_run.id):
            _name(manifest["metadata"], claim)
        async with asyncio.timeout(left):
            return await super().run(flow_run, configuration, task_status)

    async def create_job(self, configuration: KubernetesWorkerJobConfiguration, client: ApiClient) -> V1Job:
        """Create the claim's Job, or find the one that an unanswered request has created."""
        name = configuration.job_manifest["metadata"].get("name", "")
        if not claim_of(name):
            return await super().create_job(configuration, client)
        while True:
            try:
                return await super().create_job(configuration, client)
            except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
                self.logger.warning("The Kubernetes API does not answer: %s. Asking again.", error)
                await asyncio.sleep(AGAIN)
            except InfrastructureError as error:
                if getattr(error.__cause__, "status", 0) != HTTPStatus.CONFLICT:
                    raise
                return await BatchV1Api(client).read_namespaced_job(name, configuration.namespace)

    async def drain(self) -> None:
        """Claim nothing more, and wait until each claimed run has its Job."""
        self._draining = True
        async with self._polling:
            claimed = len(self.submitting)
        self.logger.info("Asked to end; claimed runs that are submitted first: %d.", claimed)
        while self.submitting:
            await asyncio.sleep(0.05)


def _leave_out_secrets(environment: list[dict[str, Any]]) -> set[str]:
    """Remove the worker's own secret settings from the environment of a run's Job; return their names.

    Prefect's worker copies its settings into each Job, and refers to key and password only where a Secret is named.
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
    found = {each["name"] for each in environment if each["name"] in secret - kept and "value" in each}
    environment[:] = [each for each in environment if each["name"] not in found or "value" not in each]
    return found


def _name(metadata: dict[str, Any], claim: UUID) -> None:
    """Name a Job after its claim; one that the pool names keeps its name."""
    if prefix := metadata.get("generateName"):
        end = f"-{str(claim)[-12:]}"
        metadata["name"] = prefix[: LONGEST - len(end)].rstrip("-.") + end


def _is_absence(error: BaseException | None) -> bool:
    """Whether the API did not answer, or not as itself: what it refuses it would refuse again."""
    refused = isinstance(error, HTTPStatusError) and error.response.status_code < 500
    return isinstance(error, HTTPError) and not refused
