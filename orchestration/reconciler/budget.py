"""The retry budget: whether a crashed run is retried, when, and with how much memory."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from orchestration.protocol import (
    CAUSE_LABEL,
    CRASHES_LABEL,
    DISRUPTION_RETRIES,
    DISRUPTIONS_LABEL,
    FENCED_WITHIN_SECONDS,
    LOST_LABEL,
    RETRIED_LABEL,
    SETTLED_LABEL,
    whole_number,
)
from orchestration.quantity import quantity_or_zero
from orchestration.reconciler.causes import Cause
from orchestration.reconciler.model import Run

MAX_BACKOFF_SECONDS = 86_400.0
"""The upper bound of the delay before a retry."""

MAX_DOUBLINGS = 30
"""How often the delay is doubled at most. One second that often doubled exceeds the upper bound of the delay."""


@dataclass(frozen=True)
class RetryBudget:
    """How often the runs of a deployment are retried after a crash, and how.

    The fields are job variables of the same names. The work pool has their defaults.

    Args:
        crash_retries: how many crashes of a run are retried.
        disruption_retries: how many disruptions are retried: eviction, drain, preemption, lost node.
        crash_backoff: seconds before the second retry after a crash. Each further delay is twice as long; the first
            retry is immediate.
        memory_growth: the factor by which a memory limit grows after it was exceeded.
        memory_max: the highest memory limit, as a Kubernetes quantity; empty means no upper bound.
    """

    crash_retries: int = 2
    disruption_retries: int = DISRUPTION_RETRIES
    crash_backoff: float = 10
    memory_growth: float = 1.5
    memory_max: str = ""

    MAX_FLOAT: ClassVar[float] = 1e6
    """The upper bound of `crash_backoff` and `memory_growth`."""

    @classmethod
    def from_job_variables(cls, variables: Mapping[str, Any]) -> "RetryBudget":
        """Return the budget that job variables set. A variable that is absent or not valid gets its default."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            with suppress(TypeError, ValueError, OverflowError):
                kind: Any = type(field.default)
                if variables.get(field.name) is not None:
                    value = kind(variables[field.name])
                    if kind is not float or 0 <= value <= cls.MAX_FLOAT:
                        values[field.name] = value
        return cls(**values)


@dataclass(frozen=True)
class RetryDecision:
    """Whether a crashed run is retried.

    Args:
        is_retried: whether it is.
        sentence: the decision for people, without a full stop.
        delay_seconds: how long after the decision the retry is due.
        labels: the labels to write on the run before the retry.
        memory_limit: the new memory limit; empty if the limit does not change.
    """

    is_retried: bool
    sentence: str
    delay_seconds: float = 0
    labels: dict[str, Any] | None = None
    memory_limit: str = ""


def decide_retry(run: Run, cause: Cause, budget: RetryBudget | None) -> RetryDecision:
    """Decide whether a crashed run is retried.

    The decision is idempotent: once the retry is counted in the run's labels, the same decision comes out.

    Args:
        run: the crashed run.
        cause: why the run crashed.
        budget: the budget of the run's deployment; None if the deployment was deleted, so that no worker could claim
            the run.
    """
    settled = {SETTLED_LABEL: run.state_id}
    if budget is None:
        return RetryDecision(False, "No retry: its deployment was deleted", labels=settled)
    if cause.kind == "start":
        return RetryDecision(False, "No retry: its cause has to be cured first", labels=settled)
    limit, label, event = (
        (budget.disruption_retries, DISRUPTIONS_LABEL, "disruption")
        if cause.kind == "disruption"
        else (budget.crash_retries, CRASHES_LABEL, "crash")
    )
    used = whole_number(run.labels.get(label))
    if str(run.labels.get(RETRIED_LABEL, "")).startswith(run.state_id):
        used -= 1
    if used >= limit:
        sentence = f"No retry: all {limit} after a {event} are used up" if limit else f"No retry after a {event}"
        return RetryDecision(False, sentence, labels=settled)
    memory_limit = _grown_limit(cause.memory, budget) if cause.kind == "oom" else ""
    backoff = budget.crash_backoff * 2.0 ** min(used - 1, MAX_DOUBLINGS)
    delay = min(backoff, MAX_BACKOFF_SECONDS) if used and event == "crash" else 0.0
    if run.labels.get(LOST_LABEL):
        delay = max(delay, FENCED_WITHIN_SECONDS)
    with_memory = f", with {memory_limit} of memory in place of {cause.memory}" if memory_limit else ""
    return RetryDecision(
        True,
        f"Retry {used + 1} of {limit} after a {event}{with_memory}",
        delay,
        {label: used + 1, RETRIED_LABEL: f"{run.state_id} {cause.kind}", CAUSE_LABEL: ""},
        memory_limit,
    )


def _grown_limit(limit: str, budget: RetryBudget) -> str:
    """Return the next memory limit in Mi; empty if the limit cannot grow."""
    current = quantity_or_zero(limit)
    if not current:
        return ""
    grown = min(current * budget.memory_growth, quantity_or_zero(budget.memory_max) or float("inf"))
    return f"{int(grown) // 2**20}Mi" if grown > current else ""
