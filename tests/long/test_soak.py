"""The soak's verdict: each violation is found in journals and observations, and a sound run has none."""

from collections.abc import Callable

import pytest

from tests.long.soak import (
    STUCK_AFTER_SECONDS,
    Attempt,
    Fault,
    Line,
    Outcome,
    count_repeated_steps,
    has_overlapping_attempts,
)

KILLED_IN_STEP_2 = """
    10.0 1 pod-a began
    10.5 1 pod-a step 1
    10.7 1 pod-a alive
    11.5 1 pod-a step 2
    11.7 1 pod-a alive
    20.0 2 pod-b began
    20.5 2 pod-b step 2
    21.5 2 pod-b step 3
    22.5 2 pod-b ended
"""
"""A sound journal of two run attempts: step 2 was not finished, so the second attempt repeats it."""


def read(journal: str) -> list[Line]:
    return [Line.read(line.strip()) for line in journal.strip().splitlines()]


def sound_outcome() -> Outcome:
    """Return what is observed of a run that a fault has hit and that has completed."""
    outcome = Outcome(runs={"soak-001": "id-1"}, faults=[Fault("pod killed", "id-1", "pod-a", 11.8)])
    outcome.journals["id-1"] = read(KILLED_IN_STEP_2)
    outcome.attempts["id-1"] = {"pod-a": Attempt(9, 12), "pod-b": Attempt(19, 23)}
    outcome.waited["id-1"] = STUCK_AFTER_SECONDS
    return outcome


@pytest.mark.parametrize(
    ("journal", "overlaps", "repeated"),
    [
        (KILLED_IN_STEP_2, False, 0),
        # The first attempt still writes when the second one has begun, or while it ends.
        (KILLED_IN_STEP_2.replace("20.5 2 pod-b step 2", "20.4 1 pod-a alive\n20.5 2 pod-b step 2"), True, 0),
        (KILLED_IN_STEP_2 + "    23.0 1 pod-a ended", True, 0),
        # A third attempt after both.
        (KILLED_IN_STEP_2.replace("22.5 2 pod-b ended", "30.0 3 pod-c began\n30.5 3 pod-c step 3"), False, 0),
        # Step 1 was finished when step 2 began, and is repeated by one attempt or by two.
        (KILLED_IN_STEP_2.replace("20.5 2 pod-b step 2", "20.4 2 pod-b step 1\n20.5 2 pod-b step 2"), False, 1),
        (KILLED_IN_STEP_2 + "30.0 3 pod-c began\n30.5 3 pod-c step 1\n31.0 3 pod-c step 3", False, 2),
        # An attempt that is killed between its last step and the end: a step counts as finished by what follows.
        ("1.0 1 pod-a began\n1.5 1 pod-a step 1\n9.0 2 pod-b began\n9.5 2 pod-b step 1\n10.0 2 pod-b ended", False, 0),
        ("1.0 1 pod-a began\n1.5 1 pod-a step 1\n2.0 1 pod-a ended\n9.0 2 pod-b began\n9.5 2 pod-b step 1", False, 1),
        ("", False, 0),
    ],
    ids=[
        "killed", "alive after the next began", "ended after the next", "third attempt", "finished step",
        "finished steps of both", "unfinished only step", "finished only step", "empty",
    ],
)  # fmt: skip
def test_journal_shows_overlapping_attempts_and_repeated_steps(journal: str, overlaps: bool, repeated: int) -> None:
    lines = read(journal)
    assert has_overlapping_attempts(lines) is overlaps
    assert count_repeated_steps(lines) == repeated


def test_sound_run_has_no_violation_and_a_recovery() -> None:
    outcome = sound_outcome()
    assert outcome.wrong == []
    assert {kind: [round(seconds, 1) for seconds in values] for kind, values in outcome.recoveries().items()} == {
        "pod killed": [8.3]
    }
    assert outcome.figures["faults"] == "1: pod killed 1"
    assert outcome.figures["steps begun"] == 4


@pytest.mark.parametrize(
    ("violate", "wrong"),
    [
        (lambda outcome: outcome.states.update({"id-1": "Crashed"}), "lost: soak-001 (Crashed)"),
        (
            lambda outcome: outcome.waited.update({"id-1": STUCK_AFTER_SECONDS + 1}),
            f"without a live pod for over {STUCK_AFTER_SECONDS:.0f} s: soak-001",
        ),
        (lambda outcome: outcome.journals["id-1"].pop(), "completed without a journal of it: soak-001"),
        (lambda outcome: outcome.journals.clear(), "completed without a journal of it: soak-001"),
        (
            lambda outcome: outcome.journals["id-1"].insert(-1, Line.read("22.0 1 pod-a alive")),
            "executed twice at a time: soak-001",
        ),
        (
            lambda outcome: outcome.attempts["id-1"].update({"pod-b": Attempt(10, 23)}),
            "overlapping containers of a run: 2 s",
        ),
        (
            lambda outcome: outcome.journals["id-1"].insert(-1, Line.read("22.0 2 pod-b step 1")),
            "finished steps repeated: soak-001",
        ),
        (lambda outcome: outcome.left.append("jobs soak-001"), "left: jobs soak-001"),
    ],
    ids=["lost", "stuck", "no end", "no journal", "executed twice", "overlap", "repeated", "left"],
)
def test_each_violation_is_named_with_its_run(violate: Callable[[Outcome], object], wrong: str) -> None:
    outcome = sound_outcome()
    violate(outcome)
    assert outcome.wrong == [wrong]


def test_run_that_is_not_completed_needs_no_journal() -> None:
    outcome = sound_outcome()
    outcome.states["id-1"] = "Crashed"
    outcome.journals.clear()
    assert outcome.wrong == ["lost: soak-001 (Crashed)"]
