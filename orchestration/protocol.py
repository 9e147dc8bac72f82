"""The protocol between worker, supervisor and reconciler: labels, annotations, events and environment variables.

The supervisor runs without site-packages, so this module imports the standard library alone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

FINAL_STATES = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
"""The types of states after which nothing of a flow run is executed."""

MAIN_CONTAINER = "prefect-job"
"""The name of the main container in Prefect's and the chart's base job templates."""

MAIN_CONTAINER_ANNOTATION = "kubectl.kubernetes.io/default-container"
"""The annotation of a pod by which the worker names the main container, and from which kubectl takes it."""

RUN_LABEL, POOL_LABEL = "prefect.io/flow-run-id", "prefect.io/work-pool-id"
"""Labels of Jobs and pods. The worker writes them."""

WARM_LABEL, WARM_WAITING, WARM_TAKEN = "reconciler.warm", "waiting", "taken"
"""Label of the Job of a warm pod and of the pod: whether the pod waits for a run. The worker writes it."""

CLAIM_ANNOTATION = "reconciler.claim"
"""Annotation of the Job of a warm pod that a run has taken: the id of the state that is the claim, and when."""

CREDENTIAL_ANNOTATION = "reconciler.credential"
"""Annotation of the Job of a warm pod that a run has taken: the SHA-256 of the run's API credential."""

HAND_OVER_ANNOTATION = "reconciler.hand-over"
"""Annotation of a warm pod: the encrypted environment variables of its run (`orchestration.runs.hand_over`)."""

NOTED_ANNOTATION = "reconciler.noted"
"""Annotation of a Job: how many of its ended pods the reconciler has recorded on the flow run."""

# Labels of a flow run.

CLUSTER_LABEL, NAMESPACE_LABEL = "reconciler.cluster", "reconciler.namespace"
"""The identity of the cluster, and the namespace, in which the worker that claimed the run creates its Job.

Workers of several clusters may share a work pool, and their namespaces may have the same name.
"""

REFUSAL_LABEL = "reconciler.refused"
"""Since when Kubernetes refuses the run's Job: a `Refusal`. The worker writes it."""

CAUSE_LABEL, LOST_LABEL = "reconciler.cause", "reconciler.lost"
"""The cause of a crash, and whether the end of its run attempt was not seen. Both are set before the Crashed state."""

CRASHES_LABEL, DISRUPTIONS_LABEL = "reconciler.crashes", "reconciler.disruptions"
"""How many crashes and how many disruptions were retried."""

RETRIED_LABEL, SETTLED_LABEL = "reconciler.retried", "reconciler.settled"
"""The id of the state whose retry is counted, with its cause, and the id of the state for which there is no retry."""

PEAK_LABEL, EXCEEDED_LABEL = "reconciler.peak", "reconciler.exceeded"
"""The peak memory use of the run's pods, and the highest limit for which a pod was killed, both in bytes."""

FENCED_LABEL_PREFIX = "reconciler.fenced."
"""This prefix and a Job's name are the label that fences the Job: its pods must not execute the run."""

POD_ENDED_EVENT = "reconciler.pod.ended"
"""The event on a run's page for each pod that has ended."""

CLAIM_LOST = "ClaimLost"
"""The name of the Pending state of a run whose claim the reconciler gives away. No Job of the claim executes it."""

EXPECTED_STATE_HEADER = "X-Expected-State"
"""The header of a proposed state with the id of the state that it replaces. A server with access control aborts the
transition if the run has another state by then. Other servers ignore the header."""

DISRUPTION_RETRIES = 10
"""How many disruptions are retried if neither the run nor its deployment nor its work pool has a number."""

DEADLINE_VARIABLE = "ACTIVE_DEADLINE_SECONDS"
"""The environment variable with a Job's `activeDeadlineSeconds`. The worker sets it if the Job has one."""

SIGNING_KEY_VARIABLE = "RESULTS_SIGNING_KEY"
"""The environment variable with the key by which a run signs its stored results. The worker derives the key."""

FORMER_SIGNING_KEYS_VARIABLE = "RESULTS_FORMER_SIGNING_KEYS"
"""The environment variable with keys of older results that a run loads, too, with spaces between them."""

LOG_LIMIT_VARIABLE = "LOG_LIMIT"
"""The environment variable with how many bytes of log lines a run may send to the Prefect API in an hour."""

RESULTS_LIMIT_VARIABLE = "RESULTS_LIMIT"
"""The environment variable with how much the runs of one deployment may store. The chart sets it for each storage."""

RESULTS_OWNER_VARIABLE = "RESULTS_OWNER"
"""The environment variable that the engine sets for its process pools: whose results a run stores."""

CLAIM_VARIABLE = "RUN_CLAIM"
"""The environment variable with the claim of a run in a warm pod, whose Job has no claim in its name."""

HAND_OVER_VARIABLE, HAND_OVER_KEY_VARIABLE = "RUN_HAND_OVER", "RUN_HAND_OVER_KEY"
"""The environment variables of a warm pod: the file that gets the variables of its run, and the key of that file."""

WARM_SECONDS_VARIABLE = "WARM_SECONDS"
"""The environment variable of a warm pod: after how many seconds it ends if no run has taken it."""

CHECK_INTERVAL_SECONDS, RECHECK_INTERVAL_SECONDS, CHECK_TIMEOUT_SECONDS = 15.0, 3.0, 5.0
"""How often a supervisor reads whether its Job is fenced, how soon it asks again without an answer, and its timeout."""

FENCED_WITHIN_SECONDS = CHECK_INTERVAL_SECONDS + RECHECK_INTERVAL_SECONDS + 3 * CHECK_TIMEOUT_SECONDS
"""How long after its Job was fenced a supervisor has stopped at the latest.

In the slowest case it got an answer just before the fencing, and then one request without an answer.
"""


def claim_of(job: str) -> str:
    """Return the claim in a Job's name: the last 12 digits of the id of the Pending state that made it; else empty."""
    found = re.search(r"-([0-9a-f]{12})$", job)
    return found[1] if found else ""


def is_given_away(claim: str, states: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a Job's claim of its run is over, so that the Job must not execute the run.

    Args:
        claim: the claim of the Job; empty if the Job has none.
        states: all states of the run, oldest first.
    """
    positions = [number for number, state in enumerate(states) if claim and str(state["id"]).endswith(claim)]
    later = states[positions[0] + 1 :] if positions else ()
    # A claim sets the state named Pending, and any worker may claim a Scheduled run.
    return any(state["name"] in ("Pending", CLAIM_LOST) for state in later) or (
        bool(later) and later[-1]["type"] == "SCHEDULED"
    )


def is_retried_in_process(run: Mapping[str, Any]) -> bool:
    """Return whether a flow run is one whose flow its process retries: no worker claims it while it is Scheduled.

    Prefect marks the run when it retries the flow, and removes the mark when the run leaves a final state.

    Args:
        run: the run, in the form of the API.
    """
    return bool((run.get("empirical_policy") or {}).get("retry_type") == "in_process")


def is_paused_in_process(run: Mapping[str, Any]) -> bool:
    """Return whether a flow run is paused and its process waits. The process of a suspended run has ended.

    Args:
        run: the run, in the form of the API.
    """
    details = (run.get("state") or {}).get("state_details") or {}
    return run.get("state_type") == "PAUSED" and not details.get("pause_reschedule")


def whole_number(given: object) -> int:
    """Return the whole number from 0 to 2**63 - 1 that a label, an annotation or a report holds; 0 if it holds none.

    A flow run and its user can write anything there.
    """
    try:
        number = int(given or 0)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError):
        return 0
    return int(number) if 0 <= number < 2**63 else 0
