"""Attempts of a flow run that end early, and what the next attempt runs again."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.context import FlowRunContext

from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult
from orchestration.errors import DbtError
from tests.orchestration.dbt.conftest import Tiny
from tests.orchestration.dbt.projects import replace
from tests.orchestration.dbt.task_runs import Server
from tests.parts import settings_of, wait_until


@pytest.fixture
def folder(tiny: Tiny, database: str, tmp_path: Path) -> Path:
    """Return the folder of the tiny project, which is not built."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "tiny"))


@pytest.fixture
def use(tiny: Tiny, folder: Path) -> Callable[..., DbtProject]:
    """Return a function that makes the project as flows use it."""

    def make(**options: Any) -> DbtProject:
        return DbtProject(
            folder,
            environment=warehouse.environment,
            artifacts=f"{folder}.kept",
            python=tiny.python,
            retries=0,
            **options,
        )

    return make


def _statuses(build: Callable[[], DbtResult]) -> dict[str, str]:
    """Return the statuses of a build's nodes, also after a failure."""
    try:
        result = build()
    except DbtError as error:
        if error.result is None:
            return {}
        result = error.result
    return {node.id: node.status for node in result.nodes if node.kind != "operation"}


@pytest.mark.parametrize("memory", ["process", "server"])
def test_attempt_that_ends_before_dbt_lists_its_nodes_keeps_finished_nodes(
    memory: str, use: Callable[..., DbtProject], folder: Path, server: Server
) -> None:
    """In the same process, and in a new one, which reads from the server. A subflow has a new flow run each time."""
    model, project = folder / "models" / "four.sql", use()
    texts = ["select nothing as id", "select {{ 4", "select 4 as id"]
    results: list[dict[str, str]] = []
    runs: list[str] = []

    @flow
    def part() -> None:
        context = FlowRunContext.get()
        assert context
        assert context.flow_run
        runs.append(str(context.flow_run.id))
        results.append(_statuses((project if memory == "process" else use()).build))

    @flow(retries=2)
    def daily() -> None:
        model.write_text(texts[len(results)])
        part()
        done = {node for node, status in results[0].items() if status in ("success", "pass")}

        def recorded() -> bool:
            tasks = server.get("task_runs", runs[0])
            return done <= {task["task_key"] for task in tasks if task["state_type"] == "COMPLETED"}

        wait_until(recorded, "the nodes that the first attempt has done", 240)
        assert len(results) == 3

    assert daily(return_state=True).is_completed()
    first, second, third = results
    assert first.pop("model.tiny.four") == "error"
    assert set(first.values()) == {"success", "pass"}
    assert second == {}
    assert third == dict.fromkeys(first, "reused") | {"model.tiny.four": "success"}


def test_failed_hook_runs_again_when_all_nodes_are_done(use: Callable[..., DbtProject], folder: Path) -> None:
    replace(folder, "dbt_project.yml", "as ended", "as ended from nowhere")
    project, failures = use(), []

    @flow(retries=2)
    def daily() -> None:
        try:
            project.build()
        except DbtError as error:
            failures.append(str(error))
            if len(failures) == 2:
                replace(folder, "dbt_project.yml", "as ended from nowhere", "as ended")
            raise

    assert daily(return_state=True).is_completed()
    assert len(failures) == 2
    assert all('relation "nowhere" does not exist' in failure for failure in failures)


def test_rows_of_a_failing_test_are_shown_or_stay_in_the_database(
    use: Callable[..., DbtProject], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows stay unless an option of the project or a setting shows them. The SQL is always shown."""
    replace(folder, "seeds/rates.csv", "2\n", "1\n")

    def sample(**options: Any) -> int:
        [failed] = use(**options).build(check=False).failed
        assert "group by" in failed.sql
        return len(failed.sample)

    assert sample() == 0
    assert sample(sample_rows=10) == 1
    with settings_of(DBT_SAMPLE_ROWS="10"):
        assert sample() == 1


def test_model_with_more_sources_than_an_event_takes_is_recorded(
    use: Callable[..., DbtProject], folder: Path, server: Server
) -> None:
    """The event of the model names as many sources as the server takes."""
    tables = "\n".join(f"      - {{name: tenant_{number}, identifier: pg_class}}" for number in range(120))
    (folder / "models" / "many.yml").write_text(
        f"version: 2\nsources:\n  - name: many\n    schema: pg_catalog\n    tables:\n{tables}\n"
    )
    union = "\nunion all\n".join(f"select relname from {{{{ source('many', 'tenant_{n}') }}}}" for n in range(120))
    (folder / "models" / "four.sql").write_text(union)

    @flow
    def daily() -> None:
        use().build(select="four three")

    run = server.run(daily(return_state=True))
    assert server.nodes(run, 4).keys() >= {"model.tiny.four", "model.tiny.three"}

    def materialized() -> dict[str, Any]:
        events = server.events(run, "prefect.asset.materialization.succeeded")
        return {event["resource"]["prefect.resource.name"]: event for event in events}

    events = wait_until(lambda: materialized() if len(materialized()) == 2 else {}, "both events", 240)
    assert len(events["four"]["related"]) == 100
    assert len(events["four"]["payload"]["upstream"]) == 120
