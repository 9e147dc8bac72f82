"""Fixtures: flows in this process, on a real server, Postgres and dbt."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun
from prefect.client.schemas.sorting import FlowRunSort

from flows import example_flow
from orchestration import warehouse
from orchestration.dbt import DbtProject
from orchestration.settings import ROOT
from tests.orchestration.dbt.conftest import Tiny
from tests.orchestration.dbt.forked import PARSE


class Api:
    """Reads runs from the Prefect server."""

    def newest(self, flow: str) -> FlowRun:
        """Return the newest run of the flow."""
        with get_client(sync_client=True) as client:
            runs = client.read_flow_runs(
                flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
                sort=FlowRunSort.START_TIME_DESC,
                limit=1,
            )
        return runs[0]

    def task_states(self, run: FlowRun) -> dict[str, str]:
        """Return the state names of task runs, by the task runs' names."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        with get_client(sync_client=True) as client:
            tasks: list[TaskRun] = client.read_task_runs(
                flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
            )
        return {task.name: task.state_name or "" for task in tasks if not task.task_key.startswith("None")}

    def artifacts(self, run: FlowRun) -> dict[str, Artifact]:
        """Return the artifacts of a run by key."""
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

        with get_client(sync_client=True) as client:
            found = client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
            )
        return {artifact.key or "": artifact for artifact in found}


@pytest.fixture(scope="session")
def forked_dbt(tiny: Tiny) -> Iterator[Tiny]:
    """Run the dbt of this process's flows in forks. Flows in separate processes use a real interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_flow.dbt_project, "_python", tiny.python)
        yield tiny


@pytest.fixture
def api(prefect_server: str, forked_dbt: Tiny) -> Api:
    """Return the session's Prefect server."""
    return Api()


@pytest.fixture
def project_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a copy of the dbt project, which the flows use for the rest of the test."""
    original, copy = ROOT / "flows" / "warehouse", tmp_path / "project"
    shutil.copytree(original, copy, ignore=shutil.ignore_patterns("target", "logs"))
    with contextlib.suppress(FileNotFoundError):  # the parse of another test saves another one
        (copy / "target").mkdir()
        shutil.copyfile(original / "target" / PARSE, copy / "target" / PARSE)
    project = DbtProject(copy, environment=warehouse.environment)
    monkeypatch.setattr(example_flow, "dbt_project", project)
    yield copy
    project.close()


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(api: Api, database: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Run:
    """Return a function that runs a command line in this process: its exit status, and its logs and output."""

    def call(*arguments: Any, main: Callable[[list[str]], int] = example_flow.main) -> tuple[int, str]:
        capfd.readouterr()
        caplog.clear()
        status = main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        return status, caplog.text + printed.out + printed.err

    return call
