"""How the benchmark of load reads what it has measured. `make test-long FOR=benchmarks` runs the benchmark itself."""

from collections import Counter

import pytest

from tests.benchmarks.load import Step, drain_seconds, find_knee
from tests.benchmarks.polls import Poll, find_passed_over


@pytest.mark.parametrize(("rates", "knee"), [([1, 2, 4, 4.1, 3], 4), ([5, 4], 5), ([1, 2, 3], 3)])
def test_knee_is_the_first_rate_close_to_the_highest(rates: list[float], knee: float) -> None:
    steps = [Step(number, [rate, rate], [0.1], Counter(), {}) for number, rate in enumerate(rates)]
    assert find_knee(steps).rate == knee


def test_slow_server_has_more_time_for_its_runs() -> None:
    assert drain_seconds(1000, 50) > 19 * 1000 / 50
    assert drain_seconds(1000, 20) > 2 * 19 * 1000 / 20
    assert drain_seconds(4, 10) == 600


PASSED_OVER = {
    "in order": ([Poll(0, 1, ["high 1", "high 2"]), Poll(2, 3, ["normal"]), Poll(4, 5, ["low"])], set(), set()),
    "out of order": ([Poll(0, 1, ["low"]), Poll(2, 3, ["high 1", "high 2", "normal"])], {"low"}, set()),
    "in one answer": ([Poll(0, 1, ["normal"]), Poll(2, 3, ["low", "high 1", "high 2"])], {"normal"}, set()),
    "the later answer has the higher priority": (
        [Poll(0, 2, ["high 1", "high 2"]), Poll(0.5, 1, ["normal", "low"])], set(), set(),
    ),
    "no free slot for a run that the other poll locks": (
        [Poll(0, 2, ["high 1"]), Poll(0.5, 1, ["normal"]), Poll(3, 4, ["high 2"]), Poll(5, 6, ["low"])],
        set(), {"normal"},
    ),
    "during a claim that is refused": (
        [Poll(0, 1, ["high 1", "high 2"], 3, {"high 2"}), Poll(1.5, 2, ["normal"]), Poll(4, 5, ["high 2"])],
        set(), set(),
    ),
    "after a claim was refused": (
        [Poll(0, 1, ["high 1", "high 2"], 3, {"high 2"}), Poll(4, 5, ["normal"]), Poll(6, 7, ["high 2"])],
        {"normal"}, set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED_OVER)
def test_runs_before_a_due_run_of_a_higher_priority_are_found(name: str) -> None:
    """The answers of polls at the same time come in any order, and a run whose claim was refused is due again."""
    polls, alone, at_once = PASSED_OVER[name]
    priorities = {"high 1": 1, "high 2": 1, "normal": 2, "low": 3}
    assert find_passed_over(polls, priorities) == (alone, at_once)
