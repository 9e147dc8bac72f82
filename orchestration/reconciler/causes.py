"""Why a run's pod ended or does not start, in a sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from orchestration.reconciler.facts import Job, Pod

HOPELESS = {
    "ErrImagePull": "ImagePullBackOff",
    "ImagePullBackOff": "ImagePullBackOff",
    "InvalidImageName": "InvalidImageName",
    "ErrImageNeverPull": "ErrImageNeverPull",
    "CreateContainerConfigError": "CreateContainerConfigError",
    "CreateContainerError": "CreateContainerError",
    "RunContainerError": "RunContainerError",
    "Unschedulable": "Unschedulable",
    "SchedulingGated": "SchedulingGated",
}
"""Why a pod waits for what waiting alone does not cure: Kubernetes' words, and the state that the run gets. Kubernetes
goes to and fro between the first two."""

REFUSED = "PodRefused"
"""The same of a Job whose pod the API server does not take."""

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


def of_end(pods: Sequence[Pod]) -> Cause:
    """Why the newest of a run's pods ended; none is one that was deleted."""
    if not pods:
        return Cause("crash", "Its pod is gone: somebody deleted it or its Job, and it reported nothing before")
    pod = max(pods, key=lambda each: each.created)
    end = pod.end
    assert end
    if end.oom:
        limit = f" of {pod.memory}" if pod.memory else ""
        peak = f"; it used {end.peak / 2**20:.0f} MiB at the most" if end.peak else ""
        return Cause("oom", f"OOMKilled: pod {pod.name} exceeded its memory limit{limit}{peak}", pod.memory)
    if end.disruption or end.reason in ("Evicted", "Preempting", "NodeLost", "Shutdown", "NodeShutdown"):
        why = DISRUPTIONS.get(end.disruption, f"{end.reason}: {end.message}".rstrip(": "))
        return Cause("disruption", f"Pod {pod.name} was ended by the cluster: {why}")
    if end.code is None:
        return Cause("crash", f"Pod {pod.name} ended before its container ran: {end.reason} {end.message}".rstrip())
    signal = f" ({SIGNALS[end.code]})" if end.code in SIGNALS else ""
    more = f": {end.message}" if end.message else ""
    return Cause("crash", f"Pod {pod.name} ended with exit code {end.code}{signal}{more}")


def of_wait(job: Job, pods: Sequence[Pod]) -> tuple[str, str] | None:
    """Why none of a Job's pods starts, if a person has to cure it: the run's state, and a sentence."""
    for pod in pods:
        if pod.waiting and pod.waiting[0] in HOPELESS:
            word, said = pod.waiting
            return HOPELESS[word], f"Pod {pod.name} does not start, {word}: {said}".rstrip(": ")
    if job.refused and not pods:
        return REFUSED, f"Job {job.name} cannot make its pod: {job.refused}"
    return None
