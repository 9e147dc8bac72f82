"""Why a pod does not start or was ended: Kubernetes' reasons, the state of the run, and the page that explains it.

`make deploy`, the reconciler, the worker and `orchestrate why` read this table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Diagnosis = Literal[
    "crash", "oom", "disruption", "deadline", "pod-gone", "image", "config-error", "unschedulable", "refused",
    "claim-lost", "late", "cancelling", "fenced", "given-up",
]  # fmt: skip
"""The name of a page in docs/diagnoses."""


@dataclass(frozen=True)
class WaitingReason:
    """Explains the reason for which a container waits.

    Args:
        state: the name of the run's Pending state. Two reasons that alternate have one state.
        diagnosis: the page that explains the reason.
        fails_rollout: whether `make deploy` gives up a release whose container waits for this reason.
    """

    state: str
    diagnosis: Diagnosis
    fails_rollout: bool = False


WAITING_REASONS: Mapping[str, WaitingReason] = {
    "ErrImagePull": WaitingReason("ImagePullBackOff", "image", fails_rollout=True),
    "ImagePullBackOff": WaitingReason("ImagePullBackOff", "image", fails_rollout=True),
    "InvalidImageName": WaitingReason("InvalidImageName", "image", fails_rollout=True),
    "ErrImageNeverPull": WaitingReason("ErrImageNeverPull", "image"),
    "CreateContainerConfigError": WaitingReason("CreateContainerConfigError", "config-error", fails_rollout=True),
    "CreateContainerError": WaitingReason("CreateContainerError", "config-error", fails_rollout=True),
    "RunContainerError": WaitingReason("RunContainerError", "config-error"),
    "CrashLoopBackOff": WaitingReason("CrashLoopBackOff", "config-error"),
    "Unschedulable": WaitingReason("Unschedulable", "unschedulable"),
    "SchedulingGated": WaitingReason("SchedulingGated", "unschedulable"),
    "FailedMount": WaitingReason("FailedMount", "config-error"),
    "FailedAttachVolume": WaitingReason("FailedAttachVolume", "config-error"),
    "FailedCreatePodSandBox": WaitingReason("FailedCreatePodSandBox", "config-error"),
}
"""Reasons of containers, pods and events that waiting alone does not cure. Other reasons are part of a usual start."""

POD_REFUSED = "PodRefused"
"""The state of a run whose Job exists, and whose pod the Kubernetes API refuses."""

JOB_REFUSED = "JobRefused"
"""The state of a run whose Job the Kubernetes API refuses."""

STATE_DIAGNOSES: Mapping[str, Diagnosis] = {
    **{reason.state: reason.diagnosis for reason in WAITING_REASONS.values()},
    POD_REFUSED: "refused",
    JOB_REFUSED: "refused",
}
"""The diagnosis of each state of a run whose pod does not start."""

STARTING_STATES = frozenset({"InfrastructurePending", *STATE_DIAGNOSES} - {JOB_REFUSED})
"""The Pending states of a run whose Job exists."""

DISRUPTIONS = {
    "EvictionByEvictionAPI": "evicted by the API, as by the drain of its node",
    "PreemptionByScheduler": "preempted by a pod of higher priority",
    "DeletionByTaintManager": "its node was tainted, as a lost node is",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node needed room or was shut down",
}
"""The reasons of the condition DisruptionTarget. Source: Kubernetes, "Disruptions"."""

DISRUPTION_REASONS = ("Evicted", "Preempting", "NodeLost", "Shutdown", "NodeShutdown")
"""The reasons in the status of a pod that the cluster ended without that condition."""

SIGNALS = {137: "SIGKILL", 143: "SIGTERM", 139: "SIGSEGV", 134: "SIGABRT"}
"""The signals by the exit code of a process that the signal killed."""
