"""The input of a decision: a run, its Jobs and pods as the APIs return them, and the policy."""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from orchestration.protocol import (
    CLAIM_ANNOTATION,
    CLUSTER_LABEL,
    NAMESPACE_LABEL,
    NOTED_ANNOTATION,
    REFUSAL_LABEL,
    RUN_LABEL,
    WARM_LABEL,
    WARM_TAKEN,
    claim_of,
    is_paused_in_process,
    is_retried_in_process,
    whole_number,
)
from orchestration.reconciler.kubernetes_objects import (
    Condition,
    Container,
    ContainerState,
    JobObject,
    PodObject,
    PodStatus,
)

USUAL_WAITING_REASONS = frozenset({"", "ContainerCreating", "PodInitializing"})
"""The reasons of a container that is about to start or waits for another container of its pod."""


@dataclass(frozen=True)
class Refusal:
    """Since when the Kubernetes API refuses a run's Job.

    Args:
        since: when the API refused the Job first.
        waits_for_capacity: whether, by the newest answer, the API will accept the Job without a cure.
        attempts: how many run attempts there were before. A refusal before another run attempt is a new refusal.
    """

    since: datetime
    waits_for_capacity: bool
    attempts: int

    @property
    def label(self) -> str:
        """Return the refusal as the value of the run's label."""
        return f"{self.since.isoformat()} {'capacity' if self.waits_for_capacity else 'cure'} {self.attempts}"

    @classmethod
    def read(cls, labels: Mapping[str, Any]) -> "Refusal | None":
        """Return the refusal in a run's labels; None if there is none."""
        parts = str(labels.get(REFUSAL_LABEL) or "").split()
        with suppress(ValueError):
            since, kind, attempts = parts
            refused = datetime.fromisoformat(since)
            return cls(refused, kind == "capacity", int(attempts)) if refused.tzinfo else None
        return None


@dataclass(frozen=True)
class Run:
    """A flow run, as the Prefect API returns it.

    Args:
        id: the run's id.
        type: the type of its state, such as RUNNING.
        state: the name of its state, such as AwaitingRetry.
        state_id: the id of its state. Each transition has a new id.
        since: when the run entered its state.
        message: the message of its state.
        name: the run's name.
        deployment: the id of its deployment; empty if it has none.
        namespace: the namespace of its recorded Job; empty if no Job is recorded.
        job: the name of its recorded Job; empty if no Job is recorded.
        labels: the run's labels. They count its retries.
        is_deployment_deleted: whether its deployment was deleted.
        waits_in_process: whether the process of its pod waits before it retries its flow, or until a person resumes
            it. No worker claims such a run.
        slot_lease: the id of the lease of its deployment's concurrency slot; empty if there is none.
    """

    id: str
    type: str
    state: str
    state_id: str
    since: datetime
    message: str = ""
    name: str = ""
    deployment: str = ""
    namespace: str = ""
    job: str = ""
    labels: Mapping[str, Any] = field(default_factory=dict)
    is_deployment_deleted: bool = False
    waits_in_process: bool = False
    slot_lease: str = ""

    def belongs_to(self, clusters: Collection[str], namespace: str) -> bool:
        """Return whether the run's pod is, or may be, in a namespace of a cluster.

        A claimed run that its worker has not labelled yet may belong to any cluster.

        Args:
            clusters: the identities of one cluster.
            namespace: the namespace with the cluster's Jobs.
        """
        cluster = self.labels.get(CLUSTER_LABEL)
        if cluster is None and not self.job:
            return self.type == "PENDING"
        # The label is that of the newest claim. The recorded Job of a run that is retried may be an earlier claim's.
        own_namespace = self.labels.get(NAMESPACE_LABEL) or self.namespace or namespace
        return cluster in clusters and own_namespace == namespace

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "Run":
        """Return the run that the Prefect API returned as JSON."""
        state = raw["state"]
        namespace, _, job = str(raw.get("infrastructure_pid") or "").rpartition(":")
        return cls(
            raw["id"],
            state["type"],
            state["name"],
            state["id"],
            datetime.fromisoformat(state["timestamp"]),
            state["message"] or "",
            raw["name"],
            raw["deployment_id"] or "",
            namespace,
            job,
            raw.get("labels") or {},
            waits_in_process=(state["type"] == "SCHEDULED" and is_retried_in_process(raw)) or is_paused_in_process(raw),
            slot_lease=str((state.get("state_details") or {}).get("deployment_concurrency_lease_id") or ""),
        )


@dataclass(frozen=True)
class End:
    """How a pod ended.

    Args:
        time: when it ended.
        code: the exit code of its main container; None if that container never ran.
        reason: Kubernetes' reason: Error, OOMKilled, Evicted, Completed.
        message: Kubernetes' message.
        disruption: the reason of its condition DisruptionTarget; empty if the cluster did not end the pod.
        oom: whether a process in it was killed for its memory.
        peak: the most memory that it used, in bytes; 0 if unknown.
        is_confirmed: whether the kubelet reported the termination. Otherwise the process may still be running on a node
            that is cut off.
        leases: the ids of the leases of the concurrency slots that its run attempt held.
        has_begun: whether its run attempt may have executed anything. The kubelet refused the pod if it has not, or
            the supervisor got no answer of the Prefect API.
    """

    time: datetime
    code: int | None
    reason: str
    message: str = ""
    disruption: str = ""
    oom: bool = False
    peak: int = 0
    is_confirmed: bool = True
    leases: tuple[str, ...] = ()
    has_begun: bool = True


@dataclass(frozen=True)
class Pod:
    """A pod of a run.

    Args:
        name: the pod's name.
        run: the run's id.
        job: the name of its Job.
        created_at: when it was created.
        has_started: whether its main container has started.
        deleted_at: when its deletion was requested; None if it was not.
        end: how it ended; None if it has not ended.
        waiting: Kubernetes' reason and message if the pod does not start.
        memory: the memory limit of its main container, as a Kubernetes quantity.
        node: the node on which it was scheduled.
        scheduled_at: when it was scheduled; None if it was not.
        started_at: when its main container started; None if it did not.
        container: the name of its main container.
        has_live_sidecar: whether other containers are still running after the main container has ended.
        uid: the pod's UID.
        phase: the pod's phase: Pending, Running, Succeeded, Failed.
        restarts: how often its containers were restarted.
        labels: the pod's labels.
    """

    name: str
    run: str
    job: str
    created_at: datetime
    has_started: bool = False
    deleted_at: datetime | None = None
    end: End | None = None
    waiting: tuple[str, str] | None = None
    memory: str = ""
    node: str = ""
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    container: str = ""
    has_live_sidecar: bool = False
    uid: str = ""
    phase: str = ""
    restarts: int = 0
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def is_live(self) -> bool:
        """Whether the main container is running or may still start."""
        return self.end is None

    @classmethod
    def read(cls, raw: PodObject, clock_offset: timedelta = timedelta()) -> "Pod":
        """Return the pod that the Kubernetes API returned.

        Args:
            raw: the pod, as the API returned it.
            clock_offset: what is added to its times, to have them on another clock.
        """
        meta, status, main = raw.metadata, raw.status, raw.main_container
        conditions = {condition.type: condition for condition in status.conditions}
        # The kubelet lists container statuses by name, not in the order of the specification.
        states = [container.state for container in status.container_statuses if container.name == main.name]
        state = states[0] if states else ContainerState()
        target = conditions.get("DisruptionTarget")
        created_at = meta.creation_timestamp + clock_offset
        end = None
        started_at = state.running.started_at if state.running else None
        terminated = state.terminated
        is_finished = status.phase in ("Succeeded", "Failed")
        if is_finished or (terminated and not _is_restarted(raw, main, terminated.exit_code)):
            started_at = terminated.started_at if terminated else None
            ended_at = (terminated and terminated.finished_at) or (target and target.last_transition_time)
            reason = status.reason or (terminated and terminated.reason) or status.phase
            message = terminated.message if terminated else ""
            report = _supervisor_report(message)
            end = End(
                ended_at + clock_offset if ended_at else created_at,
                terminated.exit_code if terminated else None,
                reason,
                status.message or ("" if report else message) or ("" if terminated else _failed_init_container(status)),
                target.reason if target and target.status == "True" else "",
                reason == "OOMKilled" or bool(report.get("oom_kills")),
                whole_number(report.get("peak")),
                terminated is not None or not (state.running or (target and target.reason == "DeletionByPodGC")),
                _valid_ids(report.get("leases")),
                not report.get("not_begun") and (terminated is not None or _has_begun(status)),
            )
        has_started = bool(state.running or terminated)
        statuses = [*status.init_container_statuses, *status.container_statuses]
        others = [other for other in statuses if other.name != main.name]
        scheduled = conditions.get("PodScheduled")
        scheduled_at = scheduled.last_transition_time if scheduled and scheduled.status == "True" else None
        return cls(
            meta.name,
            meta.labels[RUN_LABEL],
            meta.labels.get("job-name", ""),
            created_at,
            has_started,
            meta.deletion_timestamp + clock_offset if meta.deletion_timestamp else None,
            end,
            None if has_started else _waiting(status, state, scheduled),
            str(main.resources.limits.get("memory", "")),
            raw.spec.node_name,
            scheduled_at + clock_offset if scheduled_at else None,
            started_at + clock_offset if started_at else None,
            main.name,
            # The phase of a pod without sidecars is Running for a moment after its main container has ended.
            end is not None and not is_finished and any(not other.state.terminated for other in others),
            meta.uid,
            status.phase,
            sum(container.restart_count for container in status.container_statuses),
            meta.labels,
        )


def _is_restarted(pod: PodObject, main: Container, exit_code: int) -> bool:
    """Return whether the kubelet restarts the main container in the same pod: in a Job's pod, only with OnFailure."""
    policy = main.restart_policy or pod.spec.restart_policy
    return policy == "Always" or (policy == "OnFailure" and exit_code != 0)


def _has_begun(status: PodStatus) -> bool:
    """Return whether a container of a pod has begun."""
    states = [container.state for container in (*status.init_container_statuses, *status.container_statuses)]
    return any(state.running or state.terminated for state in states)


def _failed_init_container(status: PodStatus) -> str:
    """Name the init container that failed, so that the main container did not start; empty if none failed."""
    for container in status.init_container_statuses:
        terminated = container.state.terminated
        if terminated and terminated.exit_code:
            return f"init container {container.name} ended with exit code {terminated.exit_code}"
    return ""


def _waiting(status: PodStatus, main: ContainerState, scheduled: Condition | None) -> tuple[str, str] | None:
    """Return Kubernetes' reason and message of what a pod's main container waits for; None if there is none.

    The main container waits for a node and for each init container. A usual reason, such as PodInitializing, counts
    only if no container has another reason.
    """
    found = None
    if scheduled and scheduled.status == "False":
        found = (scheduled.reason or "Unschedulable", scheduled.message)
    for state in [*(container.state for container in status.init_container_statuses), main]:
        if state.waiting and (found is None or state.waiting.reason not in USUAL_WAITING_REASONS):
            found = (state.waiting.reason, state.waiting.message)
            if state.waiting.reason not in USUAL_WAITING_REASONS:
                break
    return found


def _supervisor_report(message: str) -> dict[str, Any]:
    """Return the supervisor's report in a termination message; empty if there is none."""
    try:
        found = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_run_id(label: str) -> bool:
    """Return whether a label has the form of a flow run's id. The Prefect API refuses requests with any other text."""
    with suppress(ValueError):
        return str(UUID(label)) == label
    return False


def _valid_ids(value: object) -> tuple[str, ...]:
    """Return the valid ids in a list. A container can write anything into its report."""
    found = []
    for text in value if isinstance(value, list) else ():
        with suppress(ValueError):
            found.append(str(UUID(str(text))))
    return tuple(found)


@dataclass(frozen=True)
class Job:
    """A Job of a run.

    Args:
        name: the Job's name.
        run: the run's id.
        created_at: when it was created. For a Job of a warm pod: when a run took it.
        is_finished: whether it creates no further pod.
        is_deleted: whether its deletion was requested.
        makes_one_pod: whether it creates one pod and no replacement, so that it is finished when that pod ends.
        refusal: why the Kubernetes API refuses its pod, such as a quota; empty if it does not.
        is_disrupted: whether the cluster ended its pod. The podFailurePolicy records that when the pod is gone.
        recorded_pods: how many of its ended pods are recorded on the run.
        exceeded_deadline: its activeDeadlineSeconds if it ran longer; otherwise None. Kubernetes then ends its pods.
        is_given_away: whether its claim of the run is over, so that its pods do not execute the run.
        warm_claim: the claim that took this Job of a warm pod; empty for a Job that was created for its run.
    """

    name: str
    run: str
    created_at: datetime
    is_finished: bool = False
    is_deleted: bool = False
    makes_one_pod: bool = False
    refusal: str = ""
    is_disrupted: bool = False
    recorded_pods: int = 0
    exceeded_deadline: int | None = None
    is_given_away: bool = False
    warm_claim: str = ""

    @property
    def claim(self) -> str:
        """Return the claim of the run to which the Job belongs; empty if its worker recorded none."""
        return self.warm_claim or claim_of(self.name)

    @classmethod
    def read(cls, raw: JobObject, clock_offset: timedelta = timedelta()) -> "Job":
        """Return the Job that the Kubernetes API returned.

        Args:
            raw: the Job, as the API returned it.
            clock_offset: what is added to its times, to have them on another clock.
        """
        meta = raw.metadata
        conditions = {condition.type: condition for condition in raw.status.conditions if condition.status == "True"}
        failed = conditions.get("Failed")
        # Kubernetes sets FailureTarget first, and Failed once no pod is left.
        reasons = {conditions[name].reason for name in ("Failed", "FailureTarget") if name in conditions}
        rules = raw.spec.pod_failure_policy.rules
        is_warm = meta.labels.get(WARM_LABEL) == WARM_TAKEN
        warm_claim, taken_at = _read_claim(meta.annotations.get(CLAIM_ANNOTATION, "") if is_warm else "")
        return cls(
            meta.name,
            meta.labels[RUN_LABEL],
            (taken_at or meta.creation_timestamp) + clock_offset,
            not conditions.keys().isdisjoint({"Complete", "Failed"}),
            meta.deletion_timestamp is not None,
            raw.spec.backoff_limit == 0 and all(rule.action == "FailJob" for rule in rules),
            is_disrupted=failed is not None and "DisruptionTarget" in failed.message,
            recorded_pods=whole_number(meta.annotations.get(NOTED_ANNOTATION)),
            exceeded_deadline=raw.spec.active_deadline_seconds or 0 if "DeadlineExceeded" in reasons else None,
            warm_claim=warm_claim,
        )


def _read_claim(annotation: str) -> tuple[str, datetime | None]:
    """Return the claim that took the Job of a warm pod, and when, from the Job's annotation."""
    state, _, time = annotation.partition(" ")
    with suppress(ValueError):
        taken_at = datetime.fromisoformat(time)
        if taken_at.tzinfo:
            return claim_of(f"-{UUID(state)}"), taken_at
    return "", None


@dataclass(frozen=True)
class Policy:
    """How long the reconciler waits before it acts, and what it reports.

    Args:
        settle_seconds: how long a run's last report may take to arrive if no component saw its pod end.
        claim_seconds: how long a worker may take from its claim to the Job.
        pending_seconds: how long a pod may wait for a person's cure before the run is given up.
        capacity_seconds: how long a run may wait for capacity: a used-up quota, full nodes.
        cancel_seconds: how long a run's process may take to notice the Cancelling state. Then the Job is deleted, and
            the process gets SIGTERM.
        crashed_pod_seconds: how long a pod may live after its run has crashed. It may still report the cause.
        finished_pod_seconds: how long a pod may live after its run has ended otherwise.
        sidecar_seconds: how long other containers of a pod may run after its main container has ended. Native sidecars
            end without help, and the pod's log stays.
        log_lines: how many lines of its pod's log the state of a crashed run shows.
    """

    settle_seconds: float = 3
    claim_seconds: float = 60
    pending_seconds: float = 600
    capacity_seconds: float = 86_400
    cancel_seconds: float = 3
    crashed_pod_seconds: float = 15
    finished_pod_seconds: float = 60
    sidecar_seconds: float = 5
    log_lines: int = 5
