"""The messages of states that worker and reconciler write, and what `orchestrate why` reads from these messages.

Where a label of the run has the diagnosis, the label counts and the message is not parsed. Messages of older versions
are recognised too: a run may be older than an upgrade.
"""

import re

from orchestration.diagnosis_table import STATE_DIAGNOSES, WAITING_REASONS, Diagnosis

POD_DELETED = "Its pod is gone: the pod or its Job was deleted"
NODE_LOST = "Its pod is gone: the cluster ended it"
OOM_KILLED = "OOMKilled: "
DISRUPTED = " was ended by the cluster: "
DEADLINE_EXCEEDED = " ran for longer than "
DOES_NOT_START = " does not start, "
POD_NOT_CREATED = " cannot make its pod: "
JOB_NOT_CREATED = "Its Job was not created: "
NO_JOB_FOR_CLAIM = "No worker made a Job"

_MARKS: dict[str, Diagnosis] = {
    POD_NOT_CREATED: "refused",
    JOB_NOT_CREATED: "refused",
    OOM_KILLED: "oom",
    DISRUPTED: "disruption",
    NODE_LOST: "disruption",
    "Its pod was asked to end": "disruption",  # orchestration.runs.supervisor writes this on SIGTERM
    DEADLINE_EXCEEDED: "deadline",
    "Its pod is gone: ": "pod-gone",
}
"""The parts of messages that tell diagnoses apart, in the order in which they are looked for."""

_LOG_TAIL = " The end of its log:"


def with_log_tail(sentence: str, lines: str) -> str:
    """Return the message of a crash: a sentence, and below it the end of the pod's log if there is any.

    Args:
        sentence: the cause, without a full stop.
        lines: the end of the log; empty if there is none.
    """
    return f"{sentence}.{_LOG_TAIL}\n{lines}" if lines else f"{sentence}."


def split_log_tail(message: str) -> tuple[str, str]:
    """Return the first line of a state's message without the heading of the log, and the lines of the log."""
    sentence = message.partition("\n")[0].removesuffix(_LOG_TAIL)
    return sentence, message.partition(_LOG_TAIL)[2]


def is_unclaimed(sentence: str) -> bool:
    """Return whether a message is that of a run whose claim was given away for want of a Job."""
    return sentence.startswith(NO_JOB_FOR_CLAIM)


def is_job_refusal(sentence: str) -> bool:
    """Return whether a message is that of a run whose Job the Kubernetes API refused."""
    return sentence.startswith(JOB_NOT_CREATED)


def diagnosis_of(sentence: str) -> Diagnosis:
    """Return the diagnosis that a sentence of worker, supervisor or reconciler has; `crash` for any other sentence."""
    if found := re.search(rf"{DOES_NOT_START}(\w+)", sentence):
        reason = WAITING_REASONS.get(found[1])
        return STATE_DIAGNOSES[reason.state] if reason else "crash"
    return next((diagnosis for mark, diagnosis in _MARKS.items() if mark in sentence), "crash")
