"""Attempts of a flow run that end early, and what the next attempt runs again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow, task
from prefect.context import FlowRunContext

from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult, artifacts
from orchestration.errors import DbtError
from tests.orchestration.dbt.conftest import Tiny
from tests.orchestration.dbt.projects import replace
from tests.orchestration.dbt.task_runs import Server, results_of
from tests.parts import Query, settings_of, wait_until


@pytest.fixture
def folder(tiny: Tiny, database: str, tmp_path: Path) -> Path:
    """Return the folder of the tiny project, which is not built."""
    return Path(shutil.copytree(tiny.folder, tmp_path / "tiny"))


@pytest.fixture
def use(tiny: Tiny, folder: Path) -> Callable[..., DbtProject]:
    """Return a function that makes the project as flows use it."""

    def make(**options: Any) -> DbtProject:
        defaults: dict[str, Any] = {"environment": warehouse.environment, "retries": 0}
        return DbtProject(folder, artifacts=f"{folder}.kept", python=tiny.python, **defaults | options)

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


def _recorded(server: Server, run: str, done: dict[str, str]) -> None:
    """Wait until the server has recorded the nodes that an attempt has done."""
    expected = {node for node, status in done.items() if status in ("success", "pass")}

    def recorded() -> bool:
        tasks = server.get("task_runs", run)
        return expected <= {task["task_key"] for task in tasks if task["state_type"] == "COMPLETED"}

    wait_until(recorded, "the nodes that the first attempt has done", 240)


def _flow_run_id() -> str:
    context = FlowRunContext.get()
    assert context
    assert context.flow_run
    return str(context.flow_run.id)


@pytest.mark.parametrize("memory", [pytest.param("process", marks=pytest.mark.further), "server"])
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
        runs.append(_flow_run_id())
        results.append(_statuses((project if memory == "process" else use()).build))

    @flow(retries=2)
    def daily() -> None:
        model.write_text(texts[len(results)])
        part()
        _recorded(server, runs[0], results[0])
        assert len(results) == 3

    assert daily(return_state=True).is_completed()
    first, second, third = results
    assert first.pop("model.tiny.four") == "error"
    assert set(first.values()) == {"success", "pass"}
    assert second == {}
    assert third == dict.fromkeys(first, "reused") | {"model.tiny.four": "success"}


@pytest.mark.usefixtures("prefect_server")
def test_failed_hook_runs_again_when_all_nodes_are_done(use: Callable[..., DbtProject], folder: Path) -> None:
    replace(folder, "dbt_project.yml", "as ended", "as ended from nowhere")
    project, failures = use(), []

    @flow(retries=2)
    def daily() -> None:
        try:
            project.build(select="three")
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
    """Rows stay unless a setting shows them, or an option of the project: see `test_nodes`. The SQL is always shown."""
    replace(folder, "seeds/rates.csv", "2\n", "1\n")

    def sample(result: DbtResult) -> int:
        [failed] = result.failed
        assert "group by" in failed.sql
        return len(failed.sample)

    assert sample(use().build(check=False)) == 0
    with settings_of(DBT_SAMPLE_ROWS="10"):
        assert sample(use().test(select="one", check=False)) == 1


@pytest.mark.further
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


@pytest.mark.further
def test_retried_run_reuses_only_nodes_of_the_same_connection(
    use: Callable[..., DbtProject], server: Server, query: Query
) -> None:
    """The first build is a task with a stored result, so only the others run in the next attempt.

    Where the connections are equal, the task tells the builds apart.
    """
    connections: dict[str, dict[str, Any]] = {
        "nothing": {},
        "target": {"target": "other"},
        "environment": {"environment": lambda: warehouse.environment() | {"WAREHOUSE_SCHEMA": "another"}},
    }
    results: list[dict[str, str]] = []
    attempts: list[str] = []

    @task(persist_result=True)
    def build(differs: str) -> str:
        results.append(_statuses(use(**connections.get(differs, {})).build))
        return differs

    @flow(retries=1)
    def daily() -> None:
        attempts.append(_flow_run_id())
        build("first")
        _recorded(server, attempts[0], results[0])
        if len(attempts) == 1:
            raise DbtError("the first attempt has failed")
        for differs in connections:
            build(differs)

    assert daily(return_state=True).is_completed()
    first, *others = results
    assert set(first.values()) == {"success", "pass"}
    assert others == [first] * len(connections)
    for schema in ("other", "another"):
        assert query(f"select id from {schema}.one order by id") == [(1,), (2,)]


@pytest.mark.usefixtures("prefect_server")
def test_retried_task_reuses_the_nodes_of_its_last_attempt(use: Callable[..., DbtProject], folder: Path) -> None:
    """A password that was rotated between the attempts changes nothing. Two equal builds of a task are two builds."""
    model, passwords = folder / "models" / "four.sql", iter("abcd")
    model.write_text("select nothing as id")
    project = use(environment=lambda: warehouse.environment() | {"DBT_PASSWORD": next(passwords)})
    results: list[dict[str, str]] = []

    @task(retries=1)
    def build() -> None:
        results.extend(_statuses(project.build) for _ in range(2))
        if len(results) == 2:
            model.write_text("select 4 as id")
            raise DbtError("the first attempt has failed")

    @flow
    def daily() -> None:
        build()

    assert daily(return_state=True).is_completed()
    first, second, *again = results
    assert set(first.values()) == {"success", "pass", "error"}
    assert second == first
    assert again == [dict.fromkeys(first, "reused") | {"model.tiny.four": "success"}] * 2


@pytest.mark.further
def test_no_node_is_reused_where_a_relation_has_moved(
    use: Callable[..., DbtProject],
    folder: Path,
    server: Server,
    query: Query,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A variable that `environment` does not return decides the schema."""
    replace(folder, "models/one.sql", "'table'", "'table', schema=env_var('PLACE', 'a')")
    results: list[dict[str, str]] = []

    @flow(retries=1)
    def daily() -> None:
        monkeypatch.setenv("PLACE", "ab"[len(results)])
        results.append(_statuses(use().build))
        _recorded(server, _flow_run_id(), results[0])
        assert len(results) == 2

    assert daily(return_state=True).is_completed()
    first, second = results
    assert set(first.values()) == {"success", "pass"}
    assert second == first
    assert query("select id from analytics_b.one order by id") == [(1,), (2,)]
    text = "Nothing is reused: one is postgres://shop/analytics_b/one now, and was postgres://shop/analytics_a/one"
    assert text in caplog.text


@pytest.mark.further
@pytest.mark.usefixtures("prefect_server")
def test_retried_run_writes_whole_files(use: Callable[..., DbtProject], folder: Path) -> None:
    """A retry of a command that builds nothing leaves out no node: the files would lack the node."""
    target, project = folder / "target", use()
    attempts: list[dict[str, list[str]]] = []

    def compiled() -> list[str]:
        return sorted(file.name for file in (target / "compiled").rglob("*.sql"))

    def documented() -> list[str]:
        catalog = json.loads((target / "catalog.json").read_text())
        nodes = json.loads((target / "manifest.json").read_text())["nodes"]
        return sorted([*catalog["nodes"], *(key for key, node in nodes.items() if node.get("compiled_code"))])

    project.build()

    @flow(retries=1)
    def daily() -> None:
        found: dict[str, list[str]] = {}
        for command, contents in ((project.docs, documented), (project.compile, compiled)):
            shutil.rmtree(target / "compiled", ignore_errors=True)
            command()
            found[command.__name__] = contents()
        project.source_freshness()
        found["source_freshness"] = sorted(results_of(folder, "sources.json"))
        attempts.append(found)
        assert len(attempts) == 2

    assert daily(return_state=True).is_completed()
    first, second = attempts
    assert all(first.values())
    assert second == first


@pytest.mark.further
def test_retry_takes_the_last_command_of_its_own_target(
    use: Callable[..., DbtProject], folder: Path, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two targets share the artifacts, and a variable names the target."""
    replace(folder, "models/one.sql", "select id", "select nothing as id")

    def at(target: str) -> DbtProject:
        monkeypatch.setenv("DBT_TARGET", target)
        # A parse holds for one target.
        monkeypatch.setenv("DBT_TARGET_PATH", "target" if target == "dev" else "other")
        return use()

    at("other").build(check=False)
    replace(folder, "models/one.sql", "select nothing as id", "select id")
    with pytest.raises(DbtError, match=r"There is no run of .* in target 'dev' in .* to retry"):
        at("dev").retry()
    at("dev").run(select="three")
    assert at("dev").retry().nodes == []
    at("dev").source_freshness()
    retried = at("other").retry()
    assert retried.command == "build"
    assert "one" in [node.name for node in retried.nodes]
    assert query("select count(*) from other.one") == [(2,)]
    assert at("other").retry().nodes == []


@pytest.mark.further
def test_models_of_fresher_sources_are_built(
    use: Callable[..., DbtProject], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fresher than before the last whole build. Only the command that writes sources.json stores the file."""
    monkeypatch.setattr(artifacts, "KEPT_COMMANDS", 1)
    (folder / "models" / "four.sql").write_text("select datname from {{ source('server', 'databases') }}")
    project = use()
    project.source_freshness()
    project.build()
    project.source_freshness()
    for _ in range(2):
        result = project.build(select="source_status:fresher+", defer_to="dev")
        assert [node.name for node in result.nodes if node.kind == "model"] == ["four"]
        assert not Path(result.stored, "sources.json").exists()


@pytest.mark.parametrize("place", ["environment", pytest.param("file", marks=pytest.mark.further)])
def test_files_are_left_in_the_projects_own_target_path(
    place: str, use: Callable[..., DbtProject], folder: Path, tmp_path: Path
) -> None:
    shutil.move(folder / "target", tmp_path / "mine")
    variables = {"DBT_TARGET_PATH": str(tmp_path / "mine")} if place == "environment" else {}
    if place == "file":
        replace(folder, "dbt_project.yml", "name: tiny", "name: tiny\ntarget-path: ../mine")
    use(environment=lambda: warehouse.environment() | variables).run(select="three")
    results = json.loads((tmp_path / "mine" / "run_results.json").read_text())["results"]
    assert [result["unique_id"] for result in results if "model" in result["unique_id"]] == ["model.tiny.three"]
    assert not (folder / "target").exists()
