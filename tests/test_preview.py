"""The preview of `make test`: the cluster and its reason, the changes on the machine, the time."""

import ast
from pathlib import Path

import pytest

from orchestration.operations.local_cluster import binaries, kind, node, node_layout
from orchestration.settings import ROOT
from tests import preview
from tests.docker import daemon
from tests.orchestration.operations.local_cluster.test_choice import CHOICES, NO_GO, REFUSALS


@CHOICES
def test_preview_names_the_cluster_and_its_reason(
    machine: pytest.MonkeyPatch, variables: dict[str, str], docker: bool, context: str
) -> None:
    machine.setattr(kind, "is_docker_running", lambda: docker)
    for name, value in variables.items():
        machine.setenv(name, value)
    lines = preview.text().splitlines()
    [cluster] = [line for line in lines if line.startswith("Cluster")]
    assert any(line.startswith(f"Time     about {preview.WHOLE_MINUTES} min on 2 cores") for line in lines)
    assert cluster.startswith(f"Cluster  {context}, ")
    reason = "CLUSTER=" if variables.get("CLUSTER") else "KUBE_CONTEXT" if variables else "Docker"
    if "KUBE_CONTEXT" not in variables:
        assert reason in cluster


@REFUSALS
def test_requested_cluster_that_cannot_be_made_stops_make_test(
    machine: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    message: str,
    stops: bool,
) -> None:
    machine.setattr(kind, "is_docker_running", lambda: False)
    machine.setattr(node, "unavailable_reason", lambda: NO_GO)
    for name, value in variables.items():
        machine.setenv(name, value)
    assert preview.main() == (1 if stops else 0)
    captured = capsys.readouterr()
    assert message in (captured.err if stops else captured.out)
    usual = f"Time     about {preview.WITHOUT_CLUSTER_MINUTES} min on 2 cores\n"
    assert (usual in captured.out) is not stops


def test_preview_lists_what_changes_on_the_machine(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine.setenv("CLUSTER", "node")
    machine.setenv("PATH", "/nowhere")
    cached = binaries.cache() / f"helm-{binaries.MODULES['helm'][1]}" / "helm"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(bytes(3_000_000))
    text = preview.text()
    packages = [package for program, package in binaries.PACKAGES.items() if "/" not in program]
    for part in (str(node_layout.STATE), node_layout.BRIDGE, "KUBE-*", *packages, str(tmp_path), "3 MB"):
        assert part in text
    assert "kubernetes 9 min" in text
    assert "helm 3 min" not in text, "helm is in the cache"
    assert "\x1b" not in text


def test_preview_names_every_package_that_tests_install() -> None:
    known = set(preview.TEST_PACKAGES.values())
    assert set(daemon.PACKAGES.values()) <= known
    for path in (ROOT / "tests").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("install_packages"):
                for given in (argument for argument in call.args if isinstance(argument, ast.Dict)):
                    assert set(ast.literal_eval(given).values()) <= known, path
