"""The benchmark of load in its smallest size, on real parts. No figure is asserted."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from orchestration.settings import ROOT
from tests.benchmarks.load import Step, drain_seconds, find_knee
from tests.benchmarks.polls import Poll, find_passed_over

BENCHMARK = """
import sys
from pathlib import Path
from tests.benchmarks import curves, load, table
table.RESULTS, curves.LOAD = Path("results.md"), Path("load.json")
# Record also this size, and on a busy machine.
load.CURVE_OPTIONS, curves.IDLE_LOAD = (), 1e9
sys.exit(load.main(sys.argv[1:]))
"""

SMALLEST = (
    "--replicas 1 --clients 1 --settle-seconds 0 --step-seconds 1 --minutes 0.02 --kill-seconds 0.5 --runs 4 --limit 2 "
    "--live 3 --live-seconds 1 --report-seconds 0.5"
)

GOALS = (
    "1 API replica at 70%, one killed every 0.5 s: runs that failed",
    "1 API replica at 70%, one killed every 0.5 s: runs not Completed once",
    "3 live runs that report every 0.5 s: runs that failed",
    *(f"3 live runs that report every 0.5 s: {kind} lost" for kind in ("heartbeats", "task runs", "log lines")),
    "4 runs due at once: runs not Completed once",
    "4 runs due at once: handed out before a higher priority",
)


def test_smallest_load_completes_each_run_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BENCHMARK, *SMALLEST.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "results.md").read_text()
    rows = dict(re.findall(r"^\| ([^|]+) \| \S* \| \d+ \| ([\d.,]+) \|", table, re.MULTILINE))
    assert {name: rows.get(name) for name in GOALS} == dict.fromkeys(GOALS, "0.00"), done.stderr
    assert float(rows["4 runs due at once: at once, at most"]) <= 2
    assert "1 API replica: the knee" in rows
    assert "1 API replica at 70%, one killed every 0.5 s: from kill to ready" in rows
    assert re.search(r"Prefect [\d.]+, PostgreSQL [\d.]+ and Redis [\d.]+ of this machine, load", table)
    recorded = json.loads((tmp_path / "load.json").read_text())
    assert [point["clients"] for point in recorded["replicas"]["1"]["points"]] == [1]
    assert {figure["name"]: figure["median"] for figure in recorded["phases"]}.items() >= dict.fromkeys(
        GOALS, 0
    ).items()


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
