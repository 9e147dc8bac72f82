"""pytest without a cluster or a program: tests that need one are skipped and named, and fail in CI."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.settings import ROOT
from tests.parts import migrated_database


def _pytest(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run pytest as `make test` does, on tests of this repository."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "CLUSTER", "KUBE_CONTEXT")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "processes",
    [pytest.param([], id="alone", marks=pytest.mark.further), pytest.param(["--numprocesses", "1"], id="xdist")],
)
def test_tests_of_the_cluster_are_left_out_in_one_line(processes: list[str]) -> None:
    file = "tests/cluster/test_cluster.py"
    done = _pytest(*processes, file, "-k", "kubectl_top or why_no_cluster", CLUSTER="none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    line = f"Left out: 1 tests that need a cluster. Run them: make test TESTS='{file}'"
    assert done.stdout.count(line) == 1


@pytest.mark.parametrize("processes", [[], ["--numprocesses", "1"]], ids=["alone", "xdist"])
def test_further_cases_are_left_to_the_long_test(processes: list[str]) -> None:
    """A selection that has no other test passes."""
    chosen = [*processes, "tests/cluster/test_cluster.py", "-k", "service_is_reached"]
    done = _pytest(*chosen, CLUSTER="none")
    assert done.returncode == 0, done.stdout + done.stderr
    line = r"^Left out: [1-9]\d* further cases\. Run them: make test-long FOR=cases$"
    assert len(re.findall(line, done.stdout, flags=re.M)) == 1
    assert "1 skipped" not in done.stdout
    done = _pytest(*chosen, CLUSTER="none", FURTHER_CASES="1")
    assert "1 skipped" in done.stdout, done.stdout + done.stderr
    assert "further cases" not in done.stdout


@pytest.mark.parametrize("ci", [pytest.param("", marks=pytest.mark.further), "true"])
def test_missing_program_skips_its_test_and_fails_it_in_ci(tmp_path: Path, ci: str) -> None:
    """helm is missing with an empty cache and an empty PATH."""
    cache = tmp_path / "prefect-orchestration"
    cache.mkdir()
    shutil.copy(migrated_database(), cache)  # it takes long to make
    done = _pytest(
        "tests/helm/test_prefect_server.py", "-k", "disabled_auth",
        CLUSTER="none", CI=ci, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    assert ("1 failed" if ci else "1 skipped") in done.stdout, done.stdout + done.stderr
    assert "CLUSTER=none: helm is not here, and nothing is installed or built" in done.stdout
    assert [path for path in cache.iterdir() if path.is_dir()] == [], "something was built"


def test_unknown_cluster_stops_pytest() -> None:
    done = _pytest("tests/orchestration/operations/local_cluster/test_file_lock.py", CLUSTER="kid")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "CLUSTER=kid is unknown" in done.stderr
