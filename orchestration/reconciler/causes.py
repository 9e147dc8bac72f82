"""Why a run's pod ended or does not start, in a sentence."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from orchestration.quantity import quantity_or_zero
from orchestration.reconciler.model import Job, Pod

HOPELESS = {
    "ErrImagePull": "ImagePullBackOff",
    "ImagePullBackOff": "ImagePullBackOff",
    "InvalidImageName": "InvalidImageName",
    "ErrImageNeverPull": "ErrImageNeverPull",
    "CreateContainerConfigError": "CreateContainerConfigError",
    "CreateContainerError": "CreateContainerError",
    "RunContainerError": "RunContainerError",
    "CrashLoopBackOff": "CrashLoopBackOff",
    "Unschedulable": "Unschedulable",
    "SchedulingGated": "SchedulingGated",
    "FailedMount": "FailedMount",
    "FailedAttachVolume": "FailedAttachVolume",
    "FailedCreatePodSandBox": "FailedCreatePodSandBox",
}
"""Why a pod waits for what waiting alone does not cure: Kubernetes' words, and the state that the run gets. Kubernetes
goes to and fro between the first two."""

REFUSED = "PodRefused"
"""The same of a Job whose pod the API server does not take."""

JOB_REFUSED = "JobRefused"
"""State of a run whose Job the API server does not take."""

STARTING = frozenset({"InfrastructurePending", REFUSED, *HOPELESS.values()})
"""States that a run gets once its Job is there."""

DISRUPTIONS = {
    "EvictionByEvictionAPI": "it was evicted by the API, as a drain of its node does",
    "PreemptionByScheduler": "it was preempted by a pod of higher priority",
    "DeletionByTaintManager": "its node was tainted, as a lost one is",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node needed room or was shut down",
}
"""Reasons of the condition DisruptionTarget. Source: Kubernetes, "Disruptions"."""

SIGNALS = {137: "SIGKILL", 143: "SIGTERM", 139: "SIGSEGV", 134: "SIGABRT"}

Kind = Literal["crash", "oom", "disruption", "start"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""crash: the run's own doing. oom: it needs more memory. disruption: the cluster's doing. start: a person has to cure
it, so no retry can help."""

Diagnosis = Literal[
    "crash", "oom", "disruption", "deadline", "pod-gone", "image", "config-error", "unschedulable", "refused",
    "claim-lost", "late", "cancelling", "fenced", "given-up",
]  # fmt: skip
"""What a run may suffer from; each has a page of its name."""

OF_STATE: Mapping[str, Diagnosis] = {
    "ImagePullBackOff": "image",
    "InvalidImageName": "image",
    "ErrImageNeverPull": "image",
    "CreateContainerConfigError": "config-error",
    "CreateContainerError": "config-error",
    "RunContainerError": "config-error",
    "CrashLoopBackOff": "config-error",
    "Unschedulable": "unschedulable",
    "SchedulingGated": "unschedulable",
    "FailedMount": "config-error",
    "FailedAttachVolume": "config-error",
    "FailedCreatePodSandBox": "config-error",
    REFUSED: "refused",
    JOB_REFUSED: "refused",
}
"""The diagnosis of each state of a run whose pod does not start."""

GONE, EXCEEDED, DISRUPTED, WAITS, CANNOT = (
    "Its pod is gone: ", "OOMKilled: ", " was ended by the cluster: ", " does not start, ", " cannot make its pod: ",
)  # fmt: skip
LOST_NODE = "Its pod is gone: the cluster ended it"
ASKED = "Its pod was asked to end"
EXPIRED = " ran for longer than "
NO_JOB = "Its Job was not created: "
"""What tells the sentences below from each other."""


def of_sentence(sentence: str) -> Diagnosis:
    """The diagnosis that a sentence of this module says, wherever in a state's message it is; crash of any other."""
    if found := re.search(rf"{WAITS}(\w+)", sentence):
        return OF_STATE.get(HOPELESS.get(found[1], ""), "crash")
    marks: dict[str, Diagnosis] = {
        CANNOT: "refused",
        NO_JOB: "refused",
        EXCEEDED: "oom",
        DISRUPTED: "disruption",
        LOST_NODE: "disruption",
        ASKED: "disruption",
        EXPIRED: "deadline",
        GONE: "pod-gone",
    }
    return next((diagnosis for mark, diagnosis in marks.items() if mark in sentence), "crash")


@dataclass(frozen=True)
class Cause:
    """Why a run has no pod any more.

    Args:
        kind: which budget of retries it is taken from, if any.
        sentence: for people.
        memory: the limit that was exceeded.
    """

    kind: Kind
    sentence: str
    memory: str = ""


def of_end(pods: Sequence[Pod], jobs: Sequence[Job] = ()) -> Cause:
    """Why the newest of a run's pods ended; of none, what its Jobs say of one that is gone."""
    if not pods:
        if any(each.disrupted for each in jobs):
            return Cause("disruption", f"{LOST_NODE}, as when its node is lost")
        return Cause("crash", f"{GONE}the pod or its Job was deleted, and the run reported nothing before")
    pod = max(pods, key=lambda each: each.created)
    end = pod.end
    assert end
    where = f"{pod.name} on {pod.node}" if pod.node else pod.name
    if end.oom:
        limit = f" of {pod.memory}" if pod.memory else ""
        peak = f"; it used at most {end.peak / 2**20:.0f} MiB" if end.peak else ""
        return Cause("oom", f"{EXCEEDED}pod {where} exceeded its memory limit{limit}{peak}", pod.memory)
    if end.disruption or end.reason in ("Evicted", "Preempting", "NodeLost", "Shutdown", "NodeShutdown"):
        why = DISRUPTIONS.get(end.disruption, f"{end.reason}: {end.message}".rstrip(": "))
        return Cause("disruption", f"Pod {where}{DISRUPTED}{why}")
    if end.code is None:
        return Cause("crash", f"Pod {where} ended before its container ran: {end.reason} {end.message}".rstrip())
    signal = f" ({SIGNALS[end.code]})" if end.code in SIGNALS else ""
    more = f": {end.message}" if end.message else ""
    return Cause("crash", f"Pod {where} ended with exit code {end.code}{signal}{more}")


def of_deadline(job: Job | None, pods: Sequence[Pod]) -> str:
    """Say that a Job or one of its pods ran for longer than its deadline allows; empty if none did."""
    if job and job.expired is not None:
        return f"Job {job.name}{EXPIRED}its activeDeadlineSeconds of {job.expired}"
    for pod in pods:
        if pod.end and pod.end.reason == "DeadlineExceeded":
            return f"Pod {pod.name}{EXPIRED}its activeDeadlineSeconds: {pod.end.message}".rstrip(": ")
    return ""


def of_wait(job: Job, pods: Sequence[Pod]) -> tuple[str, str] | None:
    """Why none of a Job's pods starts, if a person has to cure it: the run's state, and a sentence."""
    for pod in pods:
        if pod.waiting and pod.waiting[0] in HOPELESS:
            word, said = pod.waiting
            return HOPELESS[word], f"Pod {pod.name}{WAITS}{word}: {said}".rstrip(": ")
    if job.refused and not pods:
        return REFUSED, f"Job {job.name}{CANNOT}{job.refused}"
    return None


ROOM = (
    "Insufficient ", "Too many pods", "no nodes available", "node(s) were unschedulable", "node(s) were not ready",
    "node.kubernetes.io/", "exceed max volume count",
)  # fmt: skip
"""What the scheduler says of nodes that are full, cordoned or not ready: others end, or an autoscaler adds nodes."""

PASSING = (
    "admission webhook",
    "denied request",
    "failed calling webhook",
    "status unknown for quota",
    "etcdserver",
    "timed out",
)
"""What the API server says where it, or what it asks, may answer otherwise later."""


def waits_for_capacity(word: str, said: str) -> bool:
    """Whether a run will start without a cure, once there is room.

    Args:
        word: the run's state: one of those of a pod that waits, or of a refusal.
        said: why, in Kubernetes' words.
    """
    if word == "SchedulingGated":
        return True
    if word == "Unschedulable":
        return any(each in said for each in ROOM)
    if word in (REFUSED, JOB_REFUSED):
        return _is_over_quota(said) or any(each in said for each in PASSING)
    return False


def _is_over_quota(said: str) -> bool:
    """Whether a quota is used up by others: one that is smaller than what is asked for never has room."""
    found = re.search(r"exceeded quota: .*?requested: (.*?), used: .*?, limited: (\S+)", said)
    if not found:
        return False
    asked, limits = (dict(re.findall(r"([^=,\s]+)=([0-9]+[.0-9A-Za-z]*)", each)) for each in found.groups())
    return all(
        quantity_or_zero(size) <= quantity_or_zero(limits[name].rstrip("."))
        for name, size in asked.items()
        if name in limits
    )


def is_passing(status: int, said: str) -> bool:
    """Whether Kubernetes may take a Job later that it has refused, without a cure.

    Args:
        status: of its answer, as HTTP has it; 0 if it did not answer.
        said: why.
    """
    return status in (0, 408, 429) or status >= 500 or waits_for_capacity(JOB_REFUSED, said)
