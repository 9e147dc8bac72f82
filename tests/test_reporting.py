"""The cost of tests is measured, and a folder over its budget fails the run."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from orchestration.operations.local_cluster import node_processes
from orchestration.settings import ROOT
from tests.cluster import namespace
from tests.parts import wait_until
from tests.reporting import PROCESSOR, Meter, over_budget

BURN = "import time\nwhile time.process_time() < {seconds}: pass\n"
BUDGET = {"loop": 0.1, "processor_seconds": {"tests": 100, "tests/e2e": 10}}


@pytest.mark.parametrize(
    ("spent", "loop", "culprit"),
    [
        ({"tests/test_a.py": 119.0, "tests/e2e/test_b.py": 11.9}, 0.1, None),
        ({"tests/test_a.py": 60.0, "tests/test_c.py": 61.0}, 0.1, "tests/test_c.py"),
        (
            {"tests/test_a.py": 119.0, "tests/e2e/test_b.py": 9.0, "tests/e2e/test_d.py": 4.0},
            0.1,
            "tests/e2e/test_b.py",
        ),
        ({"tests/e2e/test_b.py": 17.0}, 0.15, None),
        ({"tests/e2e/test_b.py": 17.0}, 0.1, "tests/e2e/test_b.py"),
        ({"tests/e2e/test_b.py": 11.9}, 0.05, None),
        ({"docs/test_b.py": 1000.0}, 0.1, None),
    ],
    ids=["within", "folder", "innermost folder", "slower machine", "same machine", "faster machine", "no limit"],
)
def test_folder_over_budget_is_reported_with_its_most_expensive_file(
    spent: dict[str, float], loop: float, culprit: str | None
) -> None:
    lines = over_budget(spent, loop, BUDGET)
    assert len(lines) == (culprit is not None)
    assert all(f"Most of it: {culprit}" in line and "% over its budget" in line for line in lines)


def test_meter_counts_children_and_daemons(tmp_path: Path) -> None:
    """A daemon leaves the process tree, as an embedded Postgres does."""
    meter = Meter()
    before = meter.seconds()
    subprocess.run([sys.executable, "-c", BURN.format(seconds=1)], check=True)
    after = meter.seconds()
    assert after - before >= 0.9
    (tmp_path / "daemon.py").write_text(
        f"import pathlib\n{BURN.format(seconds=1)}pathlib.Path('done').touch()\ntime.sleep(60)"
    )
    start = "subprocess.Popen([sys.executable, 'daemon.py'], stdout=subprocess.DEVNULL)"
    daemon = f"import subprocess, sys; print({start}.pid)"
    started = subprocess.run(
        [sys.executable, "-c", daemon], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    wait_until((tmp_path / "done").exists, "the daemon to have worked")
    assert meter.seconds() - after >= 0.9
    subprocess.run(["kill", started.stdout.strip()], check=True)


@pytest.mark.parametrize("of_node", [True, False])
def test_meter_ignores_processes_of_the_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_node: bool) -> None:
    """The test process that starts the node is the parent of the node's processes, which serve all tests."""
    meter = Meter()
    # Servers of other tests in this process work meanwhile.
    others = {child.pid for child in psutil.Process().children(recursive=True)}
    monkeypatch.setattr(node_processes, "process_ids", lambda: others)
    # Pods of tests that this process has run work meanwhile, too.
    monkeypatch.setattr(namespace, "USED", set())
    code = f"import pathlib\n{BURN.format(seconds=1)}pathlib.Path('done').touch()\ntime.sleep(60)"
    before = meter.seconds()
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path) as program:
        if of_node:
            monkeypatch.setattr(node_processes, "process_ids", lambda: others | {program.pid})
        wait_until((tmp_path / "done").exists, "the program to have worked")
        assert (meter.seconds() - before < 0.7) is of_node
        program.kill()


def _run_project(folder: Path, limit: float, files: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run pytest with the report on files of tests, with a limit in processor seconds for all of them."""
    (folder / "tests").mkdir()
    for name, text in files.items():
        (folder / "tests" / name).write_text(text)
    (folder / "budget.toml").write_text(f'loop = 0.1\n[processor_seconds]\n"tests" = {limit}\n')
    (folder / "conftest.py").write_text(
        f"""
import pathlib
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests import reporting
reporting.BUDGET = pathlib.Path("budget.toml")
reporting.LONG_SECONDS = 0
reporting._cached = set  # what other tests put into the cache meanwhile is not of this run

def pytest_sessionstart(session):
    plugins = session.config.pluginmanager
    plugins.register(reporting.Meter())
    plugins.register(reporting.Report(plugins.get_plugin("terminalreporter"), failures=False))
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "tests"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("limit", "status"), [(0.01, 1), pytest.param(100, 0, marks=pytest.mark.further)])
def test_run_over_budget_fails(tmp_path: Path, limit: float, status: int) -> None:
    burn = "    end = time.process_time() + 1\n    while time.process_time() < end: pass\n"
    done = _run_project(tmp_path, limit, {"test_slow.py": f"import time\n\ndef test_slow():\n{burn}"})
    assert done.returncode == status, done.stdout + done.stderr
    assert ("over its budget" in done.stdout) == bool(status)
    assert "tests/test_slow.py" in done.stdout


def test_run_ends_with_the_ten_files_of_the_most_processor_seconds(tmp_path: Path) -> None:
    """Files of pods spend processor seconds without wall seconds, files that wait the reverse."""
    text = f"import time\n\ndef test_one(record_property):\n    record_property({PROCESSOR!r}, {{spent}}.0)\n"
    files = {f"test_{spent:02}.py": text.format(spent=10 * spent) for spent in range(1, 13)}
    files["test_02.py"] += "    record_property('note', 'Due: a test')\n    record_property('note', '')\n"
    files["test_01.py"] += "    time.sleep(4)\n"
    files["test_08.py"] += "    time.sleep(3)\n"
    done = _run_project(tmp_path, 1e6, files)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith(".py")]
    assert [(round(float(spent), -1), file) for spent, _, file in rows] == [
        (10 * spent, f"tests/test_{spent:02}.py") for spent in range(12, 2, -1)
    ]
    walls = [float(wall) for _, wall, _ in rows]
    assert walls[4] >= 3 > min(walls)
    [whole] = [line.split() for line in done.stdout.splitlines() if line.endswith("  all files")]
    assert float(whole[0]) >= sum(range(10, 130, 10))
    assert float(whole[1]) >= 7
    note, passed = done.stdout.split("  all files\n")[1].splitlines()
    assert note == "Due: a test"
    assert passed.startswith("12 passed")
