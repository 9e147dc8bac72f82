"""Which cluster is used, what `make test` says of it before, and what is left out without one."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, choice, kind, node
from orchestration.settings import ROOT
from tests import preview
from tests.docker import daemon
from tests.parts import migrated_database

NO_GO = "there is no Go to build Kubernetes with"


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with Docker that can also be a node, as the code sees it: no test machine has each of these."""
    for name in ("CLUSTER", "KUBE_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kind, "docker_runs", lambda: True)
    monkeypatch.setattr(node, "unavailable", lambda: None)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "docker", "context"),
    [
        ({}, True, "kind-prefect"),
        ({}, False, "prefect-node"),
        ({"CLUSTER": "node"}, True, "prefect-node"),
        ({"CLUSTER": "kind"}, True, "kind-prefect"),
        ({"KUBE_CONTEXT": "mine"}, True, "mine"),
        ({"KUBE_CONTEXT": "prefect-node", "CLUSTER": "node"}, True, "prefect-node"),
    ],
)
def test_context_follows_what_is_named_and_what_is_there(
    machine: pytest.MonkeyPatch, variables: dict[str, str], docker: bool, context: str
) -> None:
    machine.setattr(kind, "docker_runs", lambda: docker)
    for name, value in variables.items():
        machine.setenv(name, value)
    assert choice.chosen() == context
    [cluster] = [line for line in preview.text().splitlines() if line.startswith("Cluster")]
    assert cluster.startswith(f"Cluster  {context}, ")
    reason = "CLUSTER=" if variables.get("CLUSTER") else "KUBE_CONTEXT" if variables else "Docker"
    if "KUBE_CONTEXT" not in variables:
        assert reason in cluster


@pytest.mark.parametrize(
    ("variables", "message", "stops"),
    [
        ({"CLUSTER": "kid"}, "CLUSTER=kid is unknown. Use kind, node, none, or leave it empty", True),
        ({"CLUSTER": "node", "KUBE_CONTEXT": "mine"}, "KUBE_CONTEXT=mine and CLUSTER=node are two clusters", True),
        ({"CLUSTER": "kind"}, "CLUSTER=kind cannot be made: Docker does not run", True),
        ({"CLUSTER": "node"}, f"CLUSTER=node cannot be made: {NO_GO}", True),
        ({"CLUSTER": "none"}, "CLUSTER=none: no cluster is used", False),
        ({"CLUSTER": "none", "KUBE_CONTEXT": "mine"}, "CLUSTER=none: no cluster is used", False),
        ({}, f"No cluster can be made here: Docker does not run, and for a node from packages {NO_GO}", False),
    ],
)
def test_missing_cluster_is_an_error_with_its_reason(
    machine: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    message: str,
    stops: bool,
) -> None:
    """A cluster that was asked for stops `make test` at its first line."""
    machine.setattr(kind, "docker_runs", lambda: False)
    machine.setattr(node, "unavailable", lambda: NO_GO)
    for name, value in variables.items():
        machine.setenv(name, value)
    with pytest.raises(ClusterError, match=message):
        choice.chosen()
    assert preview.main() == (1 if stops else 0)
    captured = capsys.readouterr()
    assert message in (captured.err if stops else captured.out)


def test_preview_tells_what_changes_on_the_machine(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setenv("CLUSTER", "node")
    machine.setenv("PATH", "/nowhere")
    cached = binaries.cache() / f"helm-{binaries.MODULES['helm'][1]}" / "helm"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(bytes(3_000_000))
    text = preview.text()
    packages = [package for program, package in binaries.PACKAGES.items() if "/" not in program]
    for each in (str(node.STATE), node.BRIDGE, "KUBE-*", *packages, str(tmp_path), "3 MB"):
        assert each in text
    assert "kubernetes 9 min" in text
    assert "helm 3 min" not in text, "it is in the cache"
    assert "\x1b" not in text


def test_preview_names_every_package_that_tests_install() -> None:
    known = set(preview.TEST_PACKAGES.values())
    assert set(daemon.PACKAGES.values()) <= known
    for path in (ROOT / "tests").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("install_packages"):
                for given in (each for each in call.args if isinstance(each, ast.Dict)):
                    assert set(ast.literal_eval(given).values()) <= known, path


def _pytest(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run pytest as `make test` does, on tests of this repository."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "CLUSTER", "KUBE_CONTEXT")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, env=kept | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("processes", [[], ["--numprocesses", "1"]], ids=["alone", "xdist"])
def test_without_cluster_its_tests_are_left_out_in_one_line(machine: pytest.MonkeyPatch, processes: list[str]) -> None:
    machine.undo()  # an empty cache costs a migrated database
    file = "tests/cluster/test_cluster.py"
    done = _pytest(*processes, file, "-k", "memory or cure_is_said", CLUSTER="none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout
    line = f"Left out: 1 tests that need a cluster. Run them: make test TESTS='{file}'"
    assert done.stdout.count(line) == 1


@pytest.mark.parametrize("ci", ["", "true"])
def test_absent_program_skips_its_test_but_in_ci_fails_it(machine: pytest.MonkeyPatch, tmp_path: Path, ci: str) -> None:
    """With a cache and a PATH that have no program there is no helm."""
    machine.undo()
    cache = tmp_path / "prefect-orchestration"
    cache.mkdir()
    shutil.copy(migrated_database(), cache)  # not to be made again
    done = _pytest(
        "tests/helm/test_prefect_server.py", "-k", "by_default",
        CLUSTER="none", CI=ci, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path),
    )  # fmt: skip
    assert ("1 failed" if ci else "1 skipped") in done.stdout, done.stdout + done.stderr
    assert "CLUSTER=none: helm is not here, and nothing is installed or built" in done.stdout
    assert [each for each in cache.iterdir() if each.is_dir()] == [], "something was built"


def test_invalid_cluster_stops_pytest() -> None:
    done = _pytest("tests/orchestration/operations/local_cluster/test_turns.py", CLUSTER="kid")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "CLUSTER=kid is unknown" in done.stderr
