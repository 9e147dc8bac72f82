"""Commands other than build, their stored artifacts, and the later commands that use these artifacts."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow

from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult, artifacts
from orchestration.errors import DbtError
from tests.orchestration.dbt.conftest import DATABASE, Built
from tests.orchestration.dbt.projects import hold, replace
from tests.orchestration.dbt.task_runs import Server, results_of
from tests.parts import Query, new_database, settings_of, wait_until

CHANGED = ("models/paid_orders.sql", "cents,", "cents, 1 as changed,")


@pytest.fixture
def database(postgres: str, built: Built) -> Iterator[str]:
    """Yield the test's database, with the tables of a build without a failure."""
    with new_database(postgres, DATABASE, built.database) as url:
        yield url


@pytest.fixture
def shop(tmp_path: Path, database: str, built: Built) -> Path:
    """Return the project with every kind of node after the build, with the build's artifacts."""
    shutil.copytree(f"{built.folder}.kept", tmp_path / "shop.kept")
    return shutil.copytree(built.folder, tmp_path / "shop")


@pytest.fixture
def good(shop: Path) -> Path:
    """Return the folder with the build's artifacts."""
    [folder] = Path(f"{shop}.kept", "shop").glob("*-build")
    return folder


def _relations(query: Query, schema: str) -> set[str]:
    return {name for (name,) in query("select relname from pg_class join pg_namespace n on n.oid = relnamespace"
                                      " where nspname = %s and relkind in ('r', 'v', 'm')", schema)}  # fmt: skip


def test_modified_models_are_built_with_deferral_to_the_last_good_run(
    project: DbtProject, shop: Path, good: Path, built: Built, query: Query
) -> None:
    """Modified models are built in another schema. Other relations are read from the schema of the good run."""
    replace(shop, *CHANGED)
    replace(shop, "seeds/orders.csv", "5,4,8,", "5,4,eight,")
    with pytest.raises(DbtError):
        project.build(flags=["--fail-fast"])  # a failed run is not compared with
    replace(shop, "seeds/orders.csv", "5,4,eight,", "5,4,8,")
    with settings_of(WAREHOUSE_SCHEMA="development"):
        result = project.build(select="state:modified+", defer_to="dev")
    assert "paid_orders" in [node.name for node in result.nodes]
    assert "customers" not in [node.name for node in result.nodes]
    assert len(result.nodes) < len(built.results)
    assert {"paid_orders", "customer_totals"} <= _relations(query, "development")
    assert "clean_customers" not in _relations(query, "development")
    assert query("select sum(changed) from development.paid_orders") == [(4,)]

    with settings_of(WAREHOUSE_SCHEMA="development"):
        assert [node.name for node in project.compile(select="state:modified", defer_to=str(good)).nodes]
    with pytest.raises(DbtError, match=r"There is nothing to defer to: a run of target 'prod' without a failure"):
        project.build(select="state:modified+", defer_to="prod")


@pytest.mark.further
def test_last_good_run_is_never_pruned(
    project: DbtProject, shop: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build without a modified node is no error. A build without a manifest, by --no-write-json, replaces none."""
    monkeypatch.setattr(artifacts, "KEPT_COMMANDS", 1)
    kept = artifacts.Artifacts(f"{shop}.kept", "shop")
    passing = [
        Path(kept.store(folder, DbtResult("build"), "dev", str(number), whole=whole))
        for number, (folder, whole) in enumerate([(shop / "target", False), (shop / "seeds", True)])
    ]
    assert [folder.exists() for folder in (good, *passing)] == [True, False, True]
    assert not [node for node in project.build(select="state:modified", defer_to="dev").nodes if node.kind == "model"]


def test_retry_command_runs_the_failed_and_skipped_nodes(
    shop: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = DbtProject(shop, environment=warehouse.environment, artifacts=str(tmp_path / "other"))
    with pytest.raises(DbtError, match=r"There is no run of .* to retry"):
        project.retry()
    replace(shop, "models/paid_orders.sql", "cents,", "no_such_column as cents,")
    failed = project.build(select="clean_orders paid_orders+", check=False)
    left = {node.id for node in failed.nodes if not node.done}
    assert {
        "model.shop.paid_orders",
        "model.shop.customer_totals",
        "unit_test.shop.customer_totals.unpaid_is_zero",
    } <= left
    replace(shop, "models/paid_orders.sql", "no_such_column as cents,", "cents,")
    project.retry()
    assert {node for node in results_of(shop) if not node.startswith("operation.")} == left
    assert project.retry().nodes == []
    assert "The last dbt build of" in caplog.text
    assert "left nothing to retry" in caplog.text


@pytest.mark.further
def test_each_command_runs_the_dbt_command(project: DbtProject, shop: Path, server: Server) -> None:
    """In one flow each command has separate task runs."""
    selected = {
        "seed": "customers",
        "run": "customer_totals",
        "snapshot": "order_history",
        "test": "customer_totals",
        "compile": "best_customers",
        "docs": None,
    }

    @flow
    def all_of_them() -> None:
        for command, select in selected.items():
            result = getattr(project, command)(select=select)
            assert [node for node in result.nodes if node.kind != "operation"], command
            if command in ("seed", "snapshot", "run", "test"):
                assert {node.id: node.status for node in result.nodes} == results_of(shop)
        project.source_freshness()

    state = all_of_them(return_state=True)
    assert state.is_completed(), state.message

    def recorded() -> bool:
        tasks = server.get("task_runs", server.run(state))
        commands = {task["dynamic_key"] for task in tasks}
        return len(commands) == len(selected) + 1 and {"freshness · raw.visits"} < {task["name"] for task in tasks}

    wait_until(recorded, "task runs of each command", 240)
    kept = sorted(Path(f"{shop}.kept", "shop").glob("*-docs-generate/*"))
    assert {"catalog.json", "manifest.json", "index.html"} <= {file.name for file in kept}
    catalog = json.loads(next(file for file in kept if file.name == "catalog.json").read_text())
    assert "model.shop.paid_orders" in catalog["nodes"]


@pytest.mark.further
def test_stale_or_unreadable_source_fails(project: DbtProject, shop: Path) -> None:
    (shop / "models" / "more_sources.yml").write_text("""
version: 2
sources:
  - name: more
    schema: "{{ target.schema }}"
    config: {freshness: {error_after: {count: 2, period: day}}}
    tables:
      - {name: stale, identifier: visits, config: {loaded_at_field: "loaded_at - interval '9 days'"}}
      - {name: unreadable, identifier: visits, config: {loaded_at_field: colour}}
""")
    with pytest.raises(DbtError) as raised:
        project.source_freshness()
    result = raised.value.result
    assert result
    assert {node.id: node.status for node in result.nodes if node.kind == "source"} == {
        "source.shop.raw.visits": "pass",
        "source.shop.more.stale": "error",
        "source.shop.more.unreadable": "runtime error",
    }
    assert {node.name for node in result.failed} == {"stale", "unreadable"}


@pytest.mark.further
def test_flow_runs_several_projects(project: DbtProject, small_project: DbtProject, server: Server) -> None:
    hold(small_project.path, "one", 0.5)
    results: list[DbtResult] = []

    @flow
    def both() -> None:
        project.build(select="days")
        results.append(small_project.build())

    state = both(return_state=True)
    assert state.is_completed(), state.message
    [result] = results
    assert Counter(node.status for node in result.nodes) == {"success": 3}
    assert next(node.seconds for node in result.nodes if node.name == "one") >= 0.5
    hooks = 4
    nodes = server.nodes(server.run(state), 1 + hooks + 3)
    assert {node.split(".")[1] for node in nodes} == {"shop", "small"}


def test_parse_holds_for_any_host_unless_the_project_reads_the_host(
    folder: Path, query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    """A parse depends on the target's database and schema. dbt itself parses again for another user too."""
    caplog.set_level("INFO")
    query("drop role if exists other_user")
    query("create role other_user superuser login")

    def parses(user: str = "postgres", schema: str = "analytics") -> bool:
        caplog.clear()
        variables = {"PGUSER": user, "WAREHOUSE_SCHEMA": schema}
        project = DbtProject(folder, environment=lambda: {**warehouse.environment(), **variables})
        project.compile(select="three")
        return "Unable to do partial parsing" in caplog.text

    assert not parses()  # the parse was made for another user and host
    assert parses(schema="elsewhere")
    (folder / "macros").mkdir()
    (folder / "macros" / "who.sql").write_text("{% macro who() %}{{ target.user }}{% endmacro %}")
    assert parses()
    assert not parses()
    assert parses("other_user")
