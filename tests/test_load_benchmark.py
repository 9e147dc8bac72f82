"""The benchmark of load in its smallest size, on real parts. No figure is asserted."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from orchestration.settings import ROOT
from tests.benchmarks.load import Step, find_knee, out_of_order

BENCHMARK = """
import sys
from pathlib import Path
from tests.benchmarks import load, table
table.RESULTS = Path(sys.argv[1])
sys.exit(load.main(sys.argv[2:]))
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
    results = tmp_path / "results.md"
    done = subprocess.run(
        [sys.executable, "-c", BENCHMARK, str(results), *SMALLEST.split()],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^\| ([^|]+) \| \S* \| \d+ \| ([\d.,]+) \|", results.read_text(), re.MULTILINE))
    assert {name: rows.get(name) for name in GOALS} == dict.fromkeys(GOALS, "0.00"), done.stderr
    assert float(rows["4 runs due at once: at once, at most"]) <= 2
    assert "1 API replica: the knee" in rows
    assert "1 API replica at 70%, one killed every 0.5 s: from kill to ready" in rows


@pytest.mark.parametrize(("rates", "knee"), [([1, 2, 4, 4.1, 3], 4), ([5, 4], 5), ([1, 2, 3], 3)])
def test_knee_is_the_first_rate_close_to_the_highest(rates: list[float], knee: float) -> None:
    steps = [Step(number, [rate, rate], [0.1], Counter(), {}) for number, rate in enumerate(rates)]
    assert find_knee(steps).rate == knee


@pytest.mark.parametrize(("priorities", "count"), [([], 0), ([1, 1, 2, 3], 0), ([1, 2, 1, 3], 1), ([3, 2, 1], 2)])
def test_runs_before_a_higher_priority_are_counted(priorities: list[int], count: int) -> None:
    assert out_of_order(priorities) == count
