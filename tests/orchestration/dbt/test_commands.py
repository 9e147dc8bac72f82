"""The commands beside build, what is kept of them, and what later ones make of that."""

import json
from pathlib import Path

import pytest
from prefect import flow

from orchestration import warehouse
from orchestration.dbt import DbtProject, artifacts
from orchestration.errors import DbtError
from tests.orchestration.dbt.projects import FAULTS, NODES, fast
from tests.orchestration.dbt.task_runs import Server, results_of
from tests.parts import Query, settings_of, wait_until


def _change(shop: Path, model: str, old: str, new: str) -> None:
    file = shop / "models" / f"{model}.sql"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def _relations(query: Query, schema: str) -> set[str]:
    return {name for (name,) in query("select relname from pg_class join pg_namespace n on n.oid = relnamespace"
                                      " where nspname = %s and relkind in ('r', 'v', 'm')", schema)}  # fmt: skip


def test_what_was_modified_is_built_beside_the_last_good_run(project: DbtProject, shop: Path, query: Query) -> None:
    """In another schema, with everything else read from where the good run built it."""
    good = project.build()
    _change(shop, "paid_orders", "cents,", "cents, 1 as changed,")
    _change(shop, "countries", "select country,", "select country, continent,")
    with pytest.raises(DbtError):
        project.build()  # a run that failed is nothing to compare with
    _change(shop, "countries", "select country, continent,", "select country,")
    with settings_of(WAREHOUSE_SCHEMA="development"):
        result = project.build(select="state:modified+", defer_to="dev")
    assert "paid_orders" in [node.name for node in result.nodes]
    assert "customers" not in [node.name for node in result.nodes]
    assert len(result.nodes) < len(good.nodes)
    assert {"paid_orders", "customer_totals"} <= _relations(query, "development")
    assert "clean_customers" not in _relations(query, "development")
    assert query("select sum(changed) from development.paid_orders") == [(4,)]

    folder = good.stored
    with settings_of(WAREHOUSE_SCHEMA="elsewhere"):
        assert project.build(select="state:modified+", defer_to=folder).nodes
    with pytest.raises(DbtError, match=r"There is nothing to defer to: a run of target 'prod' without a failure"):
        project.build(select="state:modified+", defer_to="prod")


def test_nothing_modified_is_no_error(project: DbtProject) -> None:
    project.build()
    assert not [node for node in project.build(select="state:modified", defer_to="dev").nodes if node.kind == "model"]


def test_the_last_good_run_is_kept_whatever_follows(project: DbtProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "KEPT", 1)
    good = Path(project.build().stored)
    passing = [Path(project.compile(select="countries").stored) for _ in range(2)]
    assert [folder.exists() for folder in (good, *passing)] == [True, False, True]
    assert not project.build(select="state:modified,resource_type:model", defer_to="dev").nodes


def test_retry_does_what_the_last_command_left(project: DbtProject, shop: Path) -> None:
    with pytest.raises(DbtError, match=r"There is no run of .* to retry"):
        project.retry()
    _change(shop, "paid_orders", "cents,", "no_such_column as cents,")
    failed = project.build(check=False)
    left = {node.id for node in failed.nodes if not node.done}
    assert left
    _change(shop, "paid_orders", "no_such_column as cents,", "cents,")
    project.retry()
    assert {node for node in results_of(shop) if not node.startswith("operation.")} == left
    with pytest.raises(DbtError, match=r"The last dbt build of .* left nothing to retry"):
        project.retry()


def test_each_command_is_dbts(project: DbtProject, shop: Path, server: Server, query: Query) -> None:
    """In one flow: each has its own task runs."""
    counts: dict[str, int] = {}

    @flow
    def all_of_them() -> None:
        project.build()
        for command in ("seed", "run", "snapshot", "test", "compile", "docs"):
            result = getattr(project, command)()
            counts[command] = len(result.nodes)
            if command in ("seed", "snapshot", "run", "test"):
                recorded = results_of(shop)
                assert {node.id: node.status for node in result.nodes} == recorded
        counts["freshness"] = len([node for node in project.source_freshness().nodes if node.kind == "source"])

    state = all_of_them(return_state=True)
    assert state.is_completed(), state.message
    assert counts["freshness"] == 1

    def recorded() -> bool:
        tasks = server.get("task_runs", server.run(state))
        commands = {task["dynamic_key"] for task in tasks}
        return len(commands) == 8 and {"freshness · raw.visits"} < {task["name"] for task in tasks}

    wait_until(recorded, "task runs of each command")
    kept = sorted(Path(f"{shop}.kept", "shop").glob("*-docs-generate/*"))
    assert {"catalog.json", "manifest.json", "index.html"} <= {file.name for file in kept}
    catalog = json.loads(next(file for file in kept if file.name == "catalog.json").read_text())
    assert "model.shop.paid_orders" in catalog["nodes"]


@pytest.mark.parametrize("fault", ["stale_source", "unreadable_source"])
def test_a_source_that_is_stale_fails(fault: str, project: DbtProject, shop: Path) -> None:
    project.run(select="clean_visits")
    failure = FAULTS[fault](shop)
    with pytest.raises(DbtError) as raised:
        project.source_freshness()
    assert raised.value.result
    assert {node.id: node.status for node in raised.value.result.failed} == {failure.node: failure.status}


def test_several_projects_in_a_flow(project: DbtProject, tmp_path: Path, server: Server) -> None:
    other = DbtProject(fast(tmp_path / "fast", 20), environment=warehouse.environment, artifacts=str(tmp_path / "kept"))

    @flow
    def both() -> None:
        project.build()
        other.build()

    state = both(return_state=True)
    assert state.is_completed(), state.message
    nodes = server.nodes(server.run(state), NODES + 20)
    assert {node.split(".")[1] for node in nodes} == {"shop", "fast"}


def test_the_summary_says_what_changed(project: DbtProject, shop: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    project.build()
    assert "since before" not in caplog.text
    (shop / "models" / "added.sql").write_text("select 1 as id")
    _change(shop, "countries", "count(*)", "count(no_such_column)")
    project.build(check=False)
    assert "since before   fails now: countries" in caplog.text
    assert "since before   new: added" in caplog.text


def test_a_parse_holds_for_any_host_unless_the_project_reads_it(
    shop: Path, query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    """A parse depends on the target's database and schema; dbt itself parses anew for another user too."""
    caplog.set_level("INFO")
    query("create role somebody superuser login")

    def parses(user: str) -> bool:
        caplog.clear()
        project = DbtProject(shop, environment=lambda: {**warehouse.environment(), "PGUSER": user})
        project.compile(select="days", check=False)
        return "Unable to do partial parsing" in caplog.text

    assert parses("postgres")
    assert not parses("postgres")
    assert not parses("somebody")
    (shop / "macros" / "who.sql").write_text("{% macro who() %}{{ target.user }}{% endmacro %}")
    assert parses("postgres")
    assert not parses("postgres")
    assert parses("somebody")
