"""Tell whether workers that poll a work pool get its runs by priority."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass
class Poll:
    """Holds what a worker has got by one poll, and what became of its claims.

    Args:
        started: when the worker asked, in seconds of one clock.
        ended: when the answer had come.
        runs: the ids of the runs in the answer.
        claimed: when the claims of these runs were answered.
        refused: the runs whose claims the server refused.
    """

    started: float
    ended: float
    runs: Sequence[str]
    claimed: float = math.inf
    refused: set[str] = field(default_factory=set)

    def overlaps(self, other: "Poll") -> bool:
        """Return whether the server may have answered both polls at the same time."""
        return self.started < other.ended and other.started < self.ended

    def holds(self, run: str, other: "Poll") -> bool:
        """Return whether another poll may not get a run, because this worker has it or is claiming it."""
        until = self.claimed if run in self.refused else math.inf
        return run in self.runs and self.started < other.ended and other.started < until


def find_passed_over(polls: Sequence[Poll], priorities: Mapping[str, int]) -> tuple[set[str], set[str]]:
    """Find the runs that a worker got while a run of a higher priority was due and no worker had it.

    A run whose claim was refused, as the pool had no free slot, is due again from then on. The answers of two polls at
    the same time have no order. Prefect locks the runs of a poll, those beyond the free slots too, and another poll at
    that time passes over locked runs.

    Args:
        polls: all polls of the work pool.
        priorities: the priority of each run, of which 1 is the highest. All runs are due before the first poll.

    Returns:
        The runs of polls with no other poll at the same time, and the runs of the other polls.
    """
    polls_of: dict[str, list[Poll]] = {run: [] for run in priorities}
    for poll in polls:
        for run in poll.runs:
            polls_of[run].append(poll)
    alone: set[str] = set()
    at_once: set[str] = set()
    for poll in polls:
        highest = min(
            (
                priority
                for run, priority in priorities.items()
                if not any(other.holds(run, poll) for other in polls_of[run])
            ),
            default=math.inf,
        )
        found = {run for run in poll.runs if priorities[run] > highest}
        overlapping = any(other is not poll and other.overlaps(poll) for other in polls)
        (at_once if overlapping else alone).update(found)
    return alone, at_once - alone
