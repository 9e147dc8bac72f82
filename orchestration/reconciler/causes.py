"""Why a run's pod ended or does not start: the cause, as a sentence for people and a kind for the retry budget."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from orchestration.diagnosis_table import (
    DISRUPTION_REASONS,
    DISRUPTIONS,
    JOB_REFUSED,
    POD_REFUSED,
    SIGNALS,
    WAITING_REASONS,
)
from orchestration.quantity import quantity_or_zero
from orchestration.reconciler.model import Job, Pod
from orchestration.reconciler.state_messages import (
    DEADLINE_EXCEEDED,
    DISRUPTED,
    DOES_NOT_START,
    NODE_LOST,
    OOM_KILLED,
    POD_DELETED,
    POD_NOT_CREATED,
)

Kind = Literal["crash", "oom", "disruption", "start"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""crash: the run's own doing. oom: the run needs more memory. disruption: the cluster's doing. start: a person must
cure the cause, so no retry can help."""


@dataclass(frozen=True)
class Cause:
    """Why a run has no pod.

    Args:
        kind: which retry budget the crash draws on, if any.
        sentence: the cause for people, without a full stop.
        memory: the memory limit that was exceeded, as a Kubernetes quantity; empty if none was.
    """

    kind: Kind
    sentence: str
    memory: str = ""


OWN_STORAGE_MESSAGES = (
    "Usage of EmptyDir volume", "local ephemeral storage limit", "ephemeral local storage usage exceeds",
)  # fmt: skip
"""Parts of the kubelet's messages about pods that it evicts for their own use of storage, and not for want of room."""


def cause_of_end(pods: Sequence[Pod], jobs: Sequence[Job] = ()) -> Cause:
    """Return why the newest of a run's pods ended. Without a pod, return what the run's Jobs record.

    Args:
        pods: pods of the run, all of which have ended.
        jobs: Jobs of the run.
    """
    if not pods:
        if any(job.is_disrupted for job in jobs):
            return Cause("disruption", f"{NODE_LOST}, as when its node is lost")
        return Cause("crash", f"{POD_DELETED}, and the run reported nothing before")
    pod = max(pods, key=lambda pod: pod.created_at)
    end = pod.end
    assert end
    name = f"{pod.name} on {pod.node}" if pod.node else pod.name
    if end.oom:
        limit = f" of {pod.memory}" if pod.memory else ""
        peak = f"; it used at most {end.peak / 2**20:.0f} MiB" if end.peak else ""
        return Cause("oom", f"{OOM_KILLED}pod {name} exceeded its memory limit{limit}{peak}", pod.memory)
    is_own_eviction = end.reason == "Evicted" and any(part in end.message for part in OWN_STORAGE_MESSAGES)
    if (end.disruption or end.reason in DISRUPTION_REASONS) and not is_own_eviction:
        disruption = DISRUPTIONS.get(end.disruption, f"{end.reason}: {end.message}".rstrip(": "))
        return Cause("disruption", f"Pod {name}{DISRUPTED}{disruption}")
    if end.code is None:
        kind: Kind = "crash" if end.has_begun else "disruption"  # an init container failed, or the node refused the pod
        return Cause(kind, f"Pod {name} ended before its container ran: {end.reason} {end.message}".rstrip())
    if not end.has_begun:
        return Cause("disruption", f"Pod {name} ended before its flow began: the Prefect API did not answer it")
    signal = f" ({SIGNALS[end.code]})" if end.code in SIGNALS else ""
    message = f": {end.message.rstrip('. ')}" if end.message else ""
    return Cause("crash", f"Pod {name} ended with exit code {end.code}{signal}{message}")


def exceeded_deadline(job: Job | None, pods: Sequence[Pod]) -> str:
    """Return the sentence about an exceeded `activeDeadlineSeconds` of a Job or of one of its pods; empty if none was.

    Args:
        job: the run's current Job.
        pods: the pods of that Job.
    """
    if job and job.exceeded_deadline is not None:
        return f"Job {job.name}{DEADLINE_EXCEEDED}its activeDeadlineSeconds of {job.exceeded_deadline}"
    for pod in pods:
        if pod.end and pod.end.reason == "DeadlineExceeded":
            return f"Pod {pod.name}{DEADLINE_EXCEEDED}its activeDeadlineSeconds: {pod.end.message}".rstrip(": ")
    return ""


def waiting_state(job: Job, pods: Sequence[Pod]) -> tuple[str, str] | None:
    """Return the name and the message of the state of a run whose pod does not start; None if the start is usual.

    Args:
        job: the run's current Job.
        pods: the live pods of that Job.
    """
    for pod in pods:
        if pod.waiting and pod.waiting[0] in WAITING_REASONS:
            reason, message = pod.waiting
            return WAITING_REASONS[reason].state, f"Pod {pod.name}{DOES_NOT_START}{reason}: {message}".rstrip(": ")
    if job.refusal and not pods:
        return POD_REFUSED, f"Job {job.name}{POD_NOT_CREATED}{job.refusal}"
    return None


CAPACITY_MESSAGES = (
    "Insufficient ", "Too many pods", "no nodes available", "node(s) were unschedulable", "node(s) were not ready",
    "node.kubernetes.io/", "exceed max volume count",
)  # fmt: skip
"""Parts of the scheduler's messages about full, cordoned or unready nodes. Ending pods or an autoscaler cure these."""

TRANSIENT_MESSAGES = (
    "admission webhook",
    "denied request",
    "failed calling webhook",
    "status unknown for quota",
    "etcdserver",
    "timed out",
)
"""Parts of the API server's messages about refusals that the API server or a webhook may not repeat later."""


UNREAD_OBJECT = re.compile(r"failed to sync (secret|configmap) cache: timed out")
"""The kubelet's message about a Secret or ConfigMap that it has not read yet. On a new or busy node it tries again."""


def waits_for_capacity(state: str, message: str) -> bool:
    """Return whether a run starts without a cure, once there is room.

    Kubernetes has this information only in its messages, so this function parses them.

    Args:
        state: the name of the run's state, one of `diagnosis_table.STATE_DIAGNOSES`.
        message: the reason in Kubernetes' words.
    """
    if state == "SchedulingGated":
        return True
    if state == "Unschedulable":
        return any(part in message for part in CAPACITY_MESSAGES)
    if state in ("CreateContainerConfigError", "FailedMount"):
        return bool(UNREAD_OBJECT.search(message))
    if state in (POD_REFUSED, JOB_REFUSED):
        return _is_over_quota(message) or any(part in message for part in TRANSIENT_MESSAGES)
    return False


def _is_over_quota(message: str) -> bool:
    """Return whether other pods use up a quota. A quota that is smaller than the request never has room."""
    found = re.search(r"exceeded quota: .*?requested: (.*?), used: .*?, limited: (\S+)", message)
    if not found:
        return False
    requested, limits = (dict(re.findall(r"([^=,\s]+)=([0-9]+[.0-9A-Za-z]*)", part)) for part in found.groups())
    return all(
        quantity_or_zero(size) <= quantity_or_zero(limits[name].rstrip("."))
        for name, size in requested.items()
        if name in limits
    )


def is_transient(status: int, message: str) -> bool:
    """Return whether Kubernetes may accept a refused Job later, without a cure.

    Args:
        status: the HTTP status of the answer; 0 if there was no answer.
        message: the reason in Kubernetes' words.
    """
    return status in (0, 408, 429) or status >= 500 or waits_for_capacity(JOB_REFUSED, message)
