"""Test each benchmark in its smallest size: it runs to its end and appends a table of figures.

`make test` does not collect this file; `make test-long FOR=benchmarks` runs it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.settings import ROOT
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
    "bursts": ("--pairs", "1", "--queued", "5"),
    "upgrade": ("--runs", "1000", "--events", "1000"),
    "health": ("--pairs", "1", "--stall-seconds", "5", "--hold-seconds", "1"),
    "load": (
        *("--pgbouncer", "--replicas", "1", "--clients", "1", "--settle-seconds", "0", "--step-seconds", "1"),
        *("--minutes", "0.02", "--kill-seconds", "0.5", "--runs", "4", "--limit", "2"),
        *("--live", "3", "--live-seconds", "1", "--report-seconds", "0.5"),
    ),
    "retention": ("--runs", "5000", "--logs", "20000", "--events", "10000", "--loads", "3", "--seconds", "5"),
}
"""Arguments of the smallest size by benchmark. `deploys` is left out, because it deletes the cluster first."""

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


LOAD = """
import sys
from pathlib import Path
from tests.benchmarks import curves, load, table
table.RESULTS, curves.LOAD = Path("results.md"), Path("load.json")
# Record also this size, and on a busy machine.
load.CURVE_OPTIONS, curves.IDLE_LOAD = (), 1e9
sys.exit(load.main(sys.argv[1:]))
"""

GOALS = (
    "1 API replica at 70%, one killed every 0.5 s: runs that failed",
    "1 API replica at 70%, one killed every 0.5 s: runs not Completed once",
    "3 live runs that report every 0.5 s: runs that failed",
    *(f"3 live runs that report every 0.5 s: {kind} lost" for kind in ("heartbeats", "task runs", "log lines")),
    "4 runs due at once: runs not Completed once",
    "4 runs due at once: handed out before a higher priority",
)


def test_smallest_load_without_pgbouncer_completes_each_run_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *(word for word in SMALLEST["load"] if word != "--pgbouncer")],
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
