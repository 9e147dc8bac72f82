"""The commands that make runs for each variable. Recording programs replace the real ones."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestration.settings import ROOT

PROGRAMS = ("ruff", "yamllint", "codespell", "mkdocs", "shellcheck", "hadolint", "sqlfluff", "mypy", "pytest", "python")
ALL = "--numprocesses 4 --dist loadfile --no-loadscope-reorder"

Make = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that runs `make test`.

    It returns the exit status and the commands of pytest and Python, each with its CLUSTER. `selected` is the output of
    the selection, `fails` a part of the command that fails.
    """
    log = tmp_path / "log"

    def run(*variables: str, selected: str = "", fails: str = "nothing", cluster: str = "") -> tuple[int, list[str]]:
        for name in PROGRAMS:
            (tmp_path / name).write_text(
                f'''#!/bin/sh
echo "{name} $* CLUSTER=$CLUSTER" >>"{log}"
case "{name} $*" in *"{fails}"*) exit 1 ;; *tests.selection*) echo "{selected}" ;; esac
'''
            )
            (tmp_path / name).chmod(0o755)
        # No variable of the make that runs this test.
        environment = {"PATH": os.environ["PATH"], "CLUSTER": cluster}
        command = ["make", "--old-file", ".venv/ready", "test", f"BIN={tmp_path}", *variables]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        lines = log.read_text().splitlines()
        return done.returncode, [line for line in lines if line.startswith(("pytest", "python"))]

    return run


def test_make_test_previews_makes_a_cluster_and_runs_everything(make: Make, tmp_path: Path) -> None:
    assert make() == (
        0,
        [
            "python -m tests.preview CLUSTER=",
            "python -m orchestration.operations.local_cluster up CLUSTER=",
            f"pytest {ALL} tests CLUSTER=",
        ],
    )
    first, *_ = (tmp_path / "log").read_text().splitlines()
    assert first == "python -m tests.preview CLUSTER=", "before the linters"


def test_changed_runs_affected_tests_without_a_cluster(make: Make) -> None:
    assert make("CHANGED=1", selected="tests/a.py tests/b.py", cluster="kind") == (
        0,
        ["python -m tests.selection CLUSTER=none", f"pytest {ALL} tests/a.py tests/b.py CLUSTER=none"],
    )


def test_change_that_affects_no_test_runs_no_pytest(make: Make) -> None:
    assert make("CHANGED=v1") == (0, ["python -m tests.selection --base v1 CLUSTER=none"])


def test_failed_selection_stops_make(make: Make) -> None:
    assert make("CHANGED=v1", fails="tests.selection") == (2, ["python -m tests.selection --base v1 CLUSTER=none"])


def test_paths_without_cluster_tests_make_no_cluster(make: Make) -> None:
    assert make("TESTS=tests/helm tests/k8s") == (0, ["pytest tests/helm tests/k8s CLUSTER="])


@pytest.mark.parametrize("where", ["environment", "command line"])
def test_cluster_none_makes_no_cluster(make: Make, tmp_path: Path, where: str) -> None:
    ran = make(cluster="none") if where == "environment" else make("CLUSTER=none")
    assert ran == (0, ["python -m tests.preview CLUSTER=none", f"pytest {ALL} tests CLUSTER=none"])
    assert (tmp_path / "log").read_text().startswith("python -m tests.preview"), "before the linters"


def test_failed_preview_stops_make(make: Make) -> None:
    assert make(cluster="kid", fails="preview") == (2, ["python -m tests.preview CLUSTER=kid"])


@pytest.mark.parametrize("status", [0, 1, 2])
def test_make_plan_exits_with_2_for_a_change_and_for_an_error(tmp_path: Path, status: int) -> None:
    """docs/how-to/deploy.md tells scripts to call the command instead."""
    (tmp_path / "python").write_text(f'#!/bin/sh\ncase "$*" in *operations*) exit {status} ;; esac\n')
    (tmp_path / "python").chmod(0o755)
    command = ["make", "--old-file", ".venv/ready", "plan", f"BIN={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, check=False)
    assert done.returncode == (2 if status else 0)


@pytest.mark.parametrize(("way", "stops"), [("", False), ("node", True)])
def test_requested_cluster_that_cannot_be_made_stops_make(make: Make, way: str, stops: bool) -> None:
    status, commands = make(fails="local_cluster up", cluster=way)
    assert status == (2 if stops else 0)
    assert (f"pytest {ALL} tests CLUSTER={way}" in commands) is not stops


HOSTILE = 'a\'b "c" $(touch {folder}/executed) $HOME `touch {folder}/executed` \\ ;#&|<x> 100% é, -x'


@pytest.mark.parametrize(
    ("target", "variable"),
    [
        ("run", "DAY"), ("run", "SELECT"), ("backfill", "FIRST"), ("backfill", "LAST"), ("deploy", "ENV"),
        ("deploy", "KUBE_CONTEXT"), ("deploy", "NAMESPACE"), ("undeploy", "CONFIRM"), ("run-on-cluster", "DEPLOYMENT"),
        ("run-on-cluster", "PARAMETERS"), ("logs", "RUN"), ("ui", "PORT"), ("test-long", "SEED"), ("bench", "PAIRS"),
        ("bench-deployments", "POSTGRES"), ("bench-recovery", "KILLS"), ("bench-cluster", "BEFORE"),
        ("bench-starts", "BEFORE"), ("bench-idle", "BEFORE"),
        ("restore", "FROM"), ("restore", "IDENTITY"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["environment", "command line"])
def test_value_reaches_the_command_unchanged(tmp_path: Path, target: str, variable: str, where: str) -> None:
    value = HOSTILE.format(folder=tmp_path)
    (tmp_path / "python").write_text(f"#!/bin/sh\nfor each; do printf '%s\\0' \"$each\"; done >>{tmp_path}/arguments\n")
    (tmp_path / "python").chmod(0o755)
    given = {variable: value} if where == "environment" else {}
    command = ["make", "--old-file", ".venv/ready", target, f"BIN={tmp_path}"]
    subprocess.run(
        [*command, *([] if given else [f"{variable}={value}"])],
        cwd=ROOT, env={"PATH": os.environ["PATH"]} | given, check=True, capture_output=True,
    )  # fmt: skip
    arguments = (tmp_path / "arguments").read_text().split("\0")
    assert [argument for argument in arguments if argument.removeprefix("--select=").removeprefix("SEED=") == value]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("given", "compiled"), [({}, "1"), ({"UV_COMPILE_BYTECODE": "0"}, "0")])
def test_environment_is_compiled_unless_a_variable_forbids_it(
    tmp_path: Path, given: dict[str, str], compiled: str
) -> None:
    for name in ("pyproject.toml", "uv.lock"):
        (tmp_path / name).touch()
    (tmp_path / ".venv").mkdir()
    (tmp_path / "uv").write_text(f'#!/bin/sh\necho "$* UV_COMPILE_BYTECODE=$UV_COMPILE_BYTECODE" >>"{tmp_path}/log"\n')
    (tmp_path / "uv").chmod(0o755)
    command = ["make", "--file", str(ROOT / "Makefile"), ".venv/ready", f"UV={tmp_path / 'uv'}", "PYTHON=python3"]
    environment = {"PATH": os.environ["PATH"]} | given
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True)
    expected = f"sync -q --locked --all-extras --python python3 UV_COMPILE_BYTECODE={compiled}\n"
    assert (tmp_path / "log").read_text() == expected
