"""What is read of a run, its Jobs and its pods, and what the policy is: all that a decision is made of."""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from orchestration.protocol import (
    CLUSTER_LABEL,
    NAMESPACE_LABEL,
    NOTED_ANNOTATION,
    REFUSAL_LABEL,
    RUN_LABEL,
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

ORDINARY = frozenset({"", "ContainerCreating", "PodInitializing"})
"""Why a container waits that is about to start, or for another one."""


@dataclass(frozen=True)
class Refusal:
    """Since when Kubernetes does not take a run's Job.

    Args:
        since: when it refused the Job first.
        waits_for_capacity: whether the Job will be taken without a cure, by its newest answer.
        attempts: how many run attempts there were before; a refusal before another attempt is another one.
    """

    since: datetime
    waits_for_capacity: bool
    attempts: int

    @property
    def label(self) -> str:
        """As the run has it."""
        return f"{self.since.isoformat()} {'capacity' if self.waits_for_capacity else 'cure'} {self.attempts}"

    @classmethod
    def read(cls, labels: Mapping[str, Any]) -> "Refusal | None":
        """Return that of a run's labels; None if there is none."""
        parts = str(labels.get(REFUSAL_LABEL) or "").split()
        with suppress(ValueError):
            since, kind, attempts = parts
            refused = datetime.fromisoformat(since)
            return cls(refused, kind == "capacity", int(attempts)) if refused.tzinfo else None
        return None


@dataclass(frozen=True)
class Run:
    """A flow run, as the API gives it.

    Args:
        id: its id.
        type: its state's type, like RUNNING.
        state: its state's name, like AwaitingRetry.
        state_id: another with each transition.
        since: when it got there.
        message: of the state.
        name: people's.
        deployment: its id; empty if it has none.
        namespace: where its Job was made; empty if none was yet.
        job: the name of its newest Job; empty if none was made yet.
        labels: of the run; retries are counted there.
        abandoned: whether its deployment was deleted.
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
    abandoned: bool = False

    def is_of(self, clusters: Collection[str], namespace: str) -> bool:
        """Whether its pod is there; what is claimed and not yet marked by its worker may be anywhere.

        Args:
            clusters: the identities of one cluster.
            namespace: of its Jobs.
        """
        marked = self.labels.get(CLUSTER_LABEL)
        if marked is None and not self.job:
            return self.type == "PENDING"
        where = self.namespace or self.labels.get(NAMESPACE_LABEL) or namespace
        return marked in clusters and where == namespace

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "Run":
        """Of the API's JSON."""
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
        )


@dataclass(frozen=True)
class End:
    """How a pod ended.

    Args:
        at: when.
        code: of its main container; None if that never ran.
        reason: Kubernetes' word: Error, OOMKilled, Evicted, Completed.
        message: what Kubernetes adds.
        disruption: the reason of its condition DisruptionTarget: the cluster's doing, not the run's.
        oom: whether something in it was killed for its memory.
        peak: bytes that it used at the most; 0 if nobody knows.
        seen: whether its node has said so; else that was given up, and what is on it may execute on.
        leases: of the concurrency slots that its execution held.
    """

    at: datetime
    code: int | None
    reason: str
    message: str = ""
    disruption: str = ""
    oom: bool = False
    peak: int = 0
    seen: bool = True
    leases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pod:
    """A pod of a run.

    Args:
        name: its name.
        run: the run's id.
        job: the name of its Job.
        created: when.
        started: whether its main container has run.
        deleted: when somebody asked for its deletion; None if nobody did.
        end: how it ended; None if it has not.
        waiting: why it does not start: Kubernetes' word and what it adds.
        memory: the limit of its main container, as it is written.
        node: where it was put.
        scheduled: when; None if it was not.
        began: when its main container began; None if it did not.
        container: the name of its main container.
        lingers: whether other containers run on in it though the main one has ended: a sidecar that nothing ends.
        uid: Kubernetes' id of it.
        phase: Kubernetes' word for where it is: Pending, Running, Succeeded, Failed.
        restarts: of its containers.
        labels: of the pod.
    """

    name: str
    run: str
    job: str
    created: datetime
    started: bool = False
    deleted: datetime | None = None
    end: End | None = None
    waiting: tuple[str, str] | None = None
    memory: str = ""
    node: str = ""
    scheduled: datetime | None = None
    began: datetime | None = None
    container: str = ""
    lingers: bool = False
    uid: str = ""
    phase: str = ""
    restarts: int = 0
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def live(self) -> bool:
        """Whether something of it may execute, now or later."""
        return self.end is None

    @classmethod
    def read(cls, raw: PodObject, later: timedelta = timedelta()) -> "Pod":
        """Of what the API has, with times that much later: on another clock."""
        meta, status, main = raw.metadata, raw.status, raw.main_container
        conditions = {each.type: each for each in status.conditions}
        # The kubelet lists them by name, not by the order of the specification.
        state = next((each.state for each in status.container_statuses if each.name == main.name), ContainerState())
        target = conditions.get("DisruptionTarget")
        created = meta.creation_timestamp + later
        end = None
        began = state.running.started_at if state.running else None
        terminated = state.terminated
        is_over = status.phase in ("Succeeded", "Failed")
        if is_over or (terminated and not _is_restarted(raw, main, terminated.exit_code)):
            began = terminated.started_at if terminated else None
            at = (terminated and terminated.finished_at) or (target and target.last_transition_time)
            reason = status.reason or (terminated and terminated.reason) or status.phase
            said = terminated.message if terminated else ""
            left = _report(said)
            end = End(
                at + later if at else created,
                terminated.exit_code if terminated else None,
                reason,
                status.message or ("" if left else said) or ("" if terminated else _failed_init_container(status)),
                target.reason if target and target.status == "True" else "",
                reason == "OOMKilled" or bool(left.get("oom_kills")),
                whole_number(left.get("peak")),
                terminated is not None or not (state.running or (target and target.reason == "DeletionByPodGC")),
                _ids(left.get("leases")),
            )
        started = bool(state.running or terminated)
        statuses = [*status.init_container_statuses, *status.container_statuses]
        others = [each for each in statuses if each.name != main.name]
        scheduled = conditions.get("PodScheduled")
        put = scheduled.last_transition_time if scheduled and scheduled.status == "True" else None
        return cls(
            meta.name,
            meta.labels[RUN_LABEL],
            meta.labels.get("job-name", ""),
            created,
            started,
            meta.deletion_timestamp + later if meta.deletion_timestamp else None,
            end,
            None if started else _waiting(status, state, scheduled),
            str(main.resources.limits.get("memory", "")),
            raw.spec.node_name,
            put + later if put else None,
            began + later if began else None,
            main.name,
            # Of a pod without sidecars the kubelet says so, too, before it says that the pod is over.
            end is not None and not is_over and any(not each.state.terminated for each in others),
            meta.uid,
            status.phase,
            sum(each.restart_count for each in status.container_statuses),
            meta.labels,
        )


def _is_restarted(pod: PodObject, main: Container, exit_code: int) -> bool:
    """Whether the kubelet starts the main container again in the same pod: of a Job, only if that says OnFailure."""
    policy = main.restart_policy or pod.spec.restart_policy
    return policy == "Always" or (policy == "OnFailure" and exit_code != 0)


def _failed_init_container(status: PodStatus) -> str:
    """Name the init container that kept the main container from starting; empty if none did."""
    for each in status.init_container_statuses:
        if each.state.terminated and each.state.terminated.exit_code:
            return f"init container {each.name} ended with exit code {each.state.terminated.exit_code}"
    return ""


def _waiting(status: PodStatus, main: ContainerState, scheduled: Condition | None) -> tuple[str, str] | None:
    """Why a pod's main container has not started: it waits for the node, and for each init container.

    What the kubelet says of a container that only waits for another says nothing, where the other one says more.
    """
    found = None
    if scheduled and scheduled.status == "False":
        found = (scheduled.reason or "Unschedulable", scheduled.message)
    for state in [*(each.state for each in status.init_container_statuses), main]:
        if state.waiting and (found is None or state.waiting.reason not in ORDINARY):
            found = (state.waiting.reason, state.waiting.message)
            if state.waiting.reason not in ORDINARY:
                break
    return found


def _report(message: str) -> dict[str, Any]:
    """What `orchestration.runs.supervisor` has left; nothing if it was not there."""
    try:
        found = json.loads(message)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_run_id(label: str) -> bool:
    """Whether a label has the form of a flow run's id, for which alone the API can be asked."""
    with suppress(ValueError):
        return str(UUID(label)) == label
    return False


def _ids(given: object) -> tuple[str, ...]:
    """Those of a list that are ids: what a container leaves may be anything."""
    found = []
    for each in given if isinstance(given, list) else ():
        with suppress(ValueError):
            found.append(str(UUID(str(each))))
    return tuple(found)


@dataclass(frozen=True)
class Job:
    """A Job of a run.

    Args:
        name: its name.
        run: the run's id.
        created: when.
        over: whether it will make no pod any more.
        once: whether it makes one pod and no other, so that it is over with that one.
        deleted: whether somebody asked for its deletion.
        refused: why it has no pod, of its events: a quota, an account that is not there.
        disrupted: whether the cluster ended its pod; it says so when that is gone, by its podFailurePolicy.
        noted: how many of its pods had ended and were noted on the run.
        expired: the seconds of its activeDeadlineSeconds, if it ran for longer; Kubernetes ends its pods then.
        given_away: whether its claim of the run is over, so that its pods execute nothing.
    """

    name: str
    run: str
    created: datetime
    over: bool = False
    deleted: bool = False
    once: bool = False
    refused: str = ""
    disrupted: bool = False
    noted: int = 0
    expired: int | None = None
    given_away: bool = False

    @classmethod
    def read(cls, raw: JobObject, later: timedelta = timedelta()) -> "Job":
        """Of what the API has, with times that much later: on another clock."""
        meta = raw.metadata
        conditions = {each.type: each for each in raw.status.conditions if each.status == "True"}
        failed = conditions.get("Failed")
        # The second one comes first, and the first once no pod is left.
        reasons = {conditions[each].reason for each in ("Failed", "FailureTarget") if each in conditions}
        return cls(
            meta.name,
            meta.labels[RUN_LABEL],
            meta.creation_timestamp + later,
            not conditions.keys().isdisjoint({"Complete", "Failed"}),
            meta.deletion_timestamp is not None,
            raw.spec.backoff_limit == 0 and all(each.action == "FailJob" for each in raw.spec.pod_failure_policy.rules),
            disrupted=failed is not None and "DisruptionTarget" in failed.message,
            noted=whole_number(meta.annotations.get(NOTED_ANNOTATION)),
            expired=raw.spec.active_deadline_seconds or 0 if "DeadlineExceeded" in reasons else None,
        )


@dataclass(frozen=True)
class Policy:
    """How patient the reconciler is; seconds.

    Args:
        settle: how long what a run reported may be on its way, where nobody saw its pod end.
        claim: how long a worker may take from its claim to the Job.
        pending: how long a pod may not start for a reason that a person has to cure.
        capacity: how long a run may wait for room: a quota that is used up, nodes that are full.
        cancel: how long a run's own process may take to notice that it is cancelled, before its Job is deleted, of
            which it hears by SIGTERM.
        crashed: how long a pod may live on after its run has crashed: it may yet tell why.
        linger: how long a pod may live on after its run has ended otherwise.
        sidecars: how long other containers of a pod may run on after its main container has ended: native sidecars end
            by themselves, and the pod's log stays.
    """

    settle: float = 3
    claim: float = 60
    pending: float = 600
    capacity: float = 86_400
    cancel: float = 3
    crashed: float = 15
    linger: float = 60
    sidecars: float = 5
