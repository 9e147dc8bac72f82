"""Test each benchmark in its smallest size: it runs to its end and appends a table of figures.

`make test` does not collect this file; `make test-long FOR=benchmarks` runs it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts import copy_of_checkout

SMALLEST = {
    "run": ("--pairs", "1"),
    "dbt": ("--pairs", "1", "--sizes", "20", "--line-pairs", "0"),
    "deployments": ("--pairs", "1", "--deployments", "5"),
    "reconciler": ("--rounds", "1", "--live", "3", "--over", "3"),
    "starts": ("--pairs", "1"),
    "idle": ("--pairs", "1", "--runs", "1"),
    "recovery": ("--kills", "1"),
    "access": ("--pairs", "5"),
    "cluster": ("--pairs", "1"),
    "upgrade": ("--runs", "1000", "--events", "1000"),
    "health": ("--pairs", "1", "--stall-seconds", "5", "--hold-seconds", "1"),
    "load": (
        *("--pgbouncer", "--replicas", "1", "--clients", "1", "--settle-seconds", "0", "--step-seconds", "1"),
        *("--minutes", "0.02", "--kill-seconds", "0.5", "--runs", "4", "--limit", "2"),
        *("--live", "3", "--live-seconds", "1", "--report-seconds", "0.5"),
    ),
    "retention": ("--runs", "5000", "--logs", "20000", "--events", "10000", "--loads", "3", "--seconds", "5"),
}
"""Arguments of the smallest size by benchmark. `deploys` is left out, because it deletes the cluster first. `make test`
runs `load` without PgBouncer."""

ROW = r"^\| [^|]+ \| [^|]* \| [1-9]\d* \| [-\d.,]+ \| [-\d.,]+ \| [-\d.,]+ \| [-\d.,]+ \|"


@pytest.mark.parametrize("name", SMALLEST)
def test_benchmark_of_the_smallest_size_appends_its_figures(cluster: str, tmp_path: Path, name: str) -> None:
    copy_of_checkout(tmp_path)
    results = tmp_path / "tests" / "benchmarks" / "results.md"
    before = results.read_text()
    done = subprocess.run(
        [sys.executable, "-m", f"tests.benchmarks.{name}", *SMALLEST[name]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    appended = results.read_text().removeprefix(before)
    rows = appended.rpartition("---|\n")[2].splitlines()
    assert rows
    assert [row for row in rows if not re.match(ROW, row)] == []
