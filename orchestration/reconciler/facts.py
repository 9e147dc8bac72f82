"""What is read of a run, its Jobs and its pods, and what the policy is: all that a decision is made of."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from orchestration.reconciler.objects import ContainerState, JobObject, PodObject

FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
"""Types of states after which nothing of a run is executed any more."""

RUN_LABEL, POOL_LABEL = "prefect.io/flow-run-id", "prefect.io/work-pool-id"
"""Of Jobs and pods, by the worker."""

CLUSTER = "reconciler.cluster"
"""Label of a run, by the worker that claimed it: in which cluster. Workers of several may share a pool, and their
namespaces may have the same name."""

NAMESPACE = "reconciler.namespace"
"""Label of a run, by the worker that claimed it: where it makes the Job."""

NOTED = "reconciler.noted"
"""Annotation of a Job: how many of its pods had ended and were noted on their run."""


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

    def is_of(self, cluster: str, namespace: str) -> bool:
        """Whether its pod is there; what is claimed and not yet marked by its worker may be anywhere."""
        marked = self.labels.get(CLUSTER)
        if marked is None and not self.job:
            return self.type == "PENDING"
        where = self.namespace or self.labels.get(NAMESPACE) or namespace
        return marked == cluster and where == namespace

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
        meta, status = raw.metadata, raw.status
        conditions = {each.type: each for each in status.conditions}
        state = status.container_statuses[0].state if status.container_statuses else ContainerState()
        target = conditions.get("DisruptionTarget")
        created = meta.creation_timestamp + later
        end = None
        began = state.running.started_at if state.running else None
        if status.phase in ("Succeeded", "Failed"):
            terminated = state.terminated
            began = terminated.started_at if terminated else None
            at = (terminated and terminated.finished_at) or (target and target.last_transition_time)
            reason = status.reason or (terminated and terminated.reason) or status.phase
            said = terminated.message if terminated else ""
            left = _report(said)
            end = End(
                at + later if at else created,
                terminated.exit_code if terminated else None,
                reason,
                status.message or ("" if left else said),
                target.reason if target and target.status == "True" else "",
                reason == "OOMKilled" or bool(left.get("oom_kills")),
                left.get("peak", 0),
                terminated is not None or not (state.running or (target and target.reason == "DeletionByPodGC")),
                _ids(left.get("leases")),
            )
        waiting = None
        scheduled = conditions.get("PodScheduled")
        if scheduled and scheduled.status == "False":
            waiting = (scheduled.reason or "Unschedulable", scheduled.message)
        for each in [*(each.state for each in status.init_container_statuses), state]:
            if each.waiting:
                waiting = (each.waiting.reason, each.waiting.message)
                break
        put = scheduled.last_transition_time if scheduled and scheduled.status == "True" else None
        return cls(
            meta.name,
            meta.labels[RUN_LABEL],
            meta.labels.get("job-name", ""),
            created,
            bool(state.running or state.terminated),
            meta.deletion_timestamp + later if meta.deletion_timestamp else None,
            end,
            waiting,
            str(raw.spec.containers[0].resources.limits.get("memory", "")),
            raw.spec.node_name,
            put + later if put else None,
            began + later if began else None,
            meta.uid,
            status.phase,
            sum(each.restart_count for each in status.container_statuses),
            meta.labels,
        )


def _report(message: str) -> dict[str, Any]:
    """What `orchestration.execution` has left; nothing if it was not there."""
    try:
        found = json.loads(message)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


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
    given_away: bool = False

    @classmethod
    def read(cls, raw: JobObject, later: timedelta = timedelta()) -> "Job":
        """Of what the API has, with times that much later: on another clock."""
        meta = raw.metadata
        conditions = {each.type: each for each in raw.status.conditions if each.status == "True"}
        failed = conditions.get("Failed")
        return cls(
            meta.name,
            meta.labels[RUN_LABEL],
            meta.creation_timestamp + later,
            not conditions.keys().isdisjoint({"Complete", "Failed"}),
            meta.deletion_timestamp is not None,
            raw.spec.backoff_limit == 0 and all(each.action == "FailJob" for each in raw.spec.pod_failure_policy.rules),
            disrupted=failed is not None and "DisruptionTarget" in failed.message,
            noted=int(meta.annotations.get(NOTED, 0)),
        )


@dataclass(frozen=True)
class Policy:
    """How patient the reconciler is; seconds.

    Args:
        settle: how long what a run reported may be on its way, where nobody saw its pod end.
        claim: how long a worker may take from its claim to the Job.
        pending: how long a pod may not start for a reason that a person has to cure.
        cancel: how long a run's own process may take to notice that it is cancelled, before its Job is deleted, of
            which it hears by SIGTERM.
        crashed: how long a pod may live on after its run has crashed: it may yet tell why.
        linger: how long a pod may live on after its run has ended otherwise.
    """

    settle: float = 3
    claim: float = 60
    pending: float = 600
    cancel: float = 3
    crashed: float = 15
    linger: float = 60


@dataclass(frozen=True)
class Retries:
    """What a deployment's runs get after a crash; job variables of the same names, with the pool's defaults.

    Args:
        crash_retries: how many times a run that crashed is tried again.
        disruption_retries: the same where the cluster ended it: eviction, drain, preemption, a lost node.
        crash_backoff: seconds before the second retry, doubled for each further one; the first comes at once.
        memory_growth: what the memory limit is multiplied by after it was exceeded.
        memory_max: the most it becomes, as a quantity of Kubernetes; empty is no bound.
    """

    crash_retries: int = 2
    disruption_retries: int = 10
    crash_backoff: float = 10
    memory_growth: float = 1.5
    memory_max: str = ""

    @classmethod
    def of(cls, variables: Mapping[str, Any]) -> "Retries":
        """Those of job variables; one that is absent or not of its kind is the default."""
        made: dict[str, Any] = {}
        for each in fields(cls):
            with suppress(TypeError, ValueError):
                kind: Any = type(each.default)
                if variables.get(each.name) is not None:
                    made[each.name] = kind(variables[each.name])
        return cls(**made)
