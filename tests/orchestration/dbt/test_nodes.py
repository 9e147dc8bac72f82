"""Each node of a dbt command is a task run: on a real server, compared with dbt's results."""

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prefect import flow

from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult
from orchestration.dbt.mirror import STATES
from orchestration.errors import DbtError
from tests.orchestration.dbt.conftest import DATABASE, Built, Tiny, use
from tests.orchestration.dbt.projects import FAULTS, FUNCTIONS, NODES, command_line, tables
from tests.orchestration.dbt.task_runs import Object, Server, results_of
from tests.parts import Query, new_database, rows_of, wait_until


def _assert_states_match(tasks: dict[str, Object], results: dict[str, str]) -> None:
    states = {node: (task["state_type"], task["state_name"]) for node, task in tasks.items()}
    assert states == {node: STATES[status] for node, status in results.items()}


def test_every_kind_of_node_is_a_task_run(built: Built, server: Server) -> None:
    run = built.run
    tasks = server.nodes(run, NODES)
    _assert_states_match(tasks, built.results)

    names = {task["name"] for task in tasks.values()}
    assert {"clean_orders", "unit test · customer_totals.unpaid_is_zero", "unique · order_log.id"} <= names
    # Names that the project gives to tests.
    assert {
        "only_germans · clean_customers.country",
        "not_null · raw.visits.id",
        "positive · clean_orders.amount",
    } <= names
    assert {"tier_names.v2", "unique · tier_names.v1.tier", "unique · tier_names.v2.tier"} <= names
    assert {"unique · customers.id", "relationships · clean_orders.customer_id"} <= names
    assert all(task["start_time"] <= task["end_time"] for task in tasks.values())
    parents = {node: [above["id"] for above in task["task_inputs"]["parents"]] for node, task in tasks.items()}
    by_id = {task["id"]: task for task in tasks.values()}
    assert sum(map(len, parents.values())) > NODES / 2
    for node, above in parents.items():
        assert all(by_id[parent]["end_time"] <= tasks[node]["start_time"] for parent in above)
    # The parent is above an ephemeral model, which has no task run.
    assert tasks["model.shop.clean_customers"]["id"] in parents["model.shop.german_names"]

    seed = tasks["seed.shop.orders"]
    assert "5 rows" in seed["state"]["message"]
    lines = [line["message"] for line in server.logs(run) if line["task_run_id"] == seed["id"]]
    assert any("OK loaded seed file" in line for line in lines)

    artifacts = server.artifacts(run)
    assert f"{NODES} nodes in" in artifacts["dbt-build"]["data"]
    assert "Critical path" in artifacts["dbt-build"]["data"]
    assert artifacts["dbt-build-threads"]["data"].startswith("data:image/svg+xml;base64,")


class Broken(NamedTuple):
    """Holds what a build with all of `FAULTS` left. The build before it had no failure."""

    folder: Path
    run: str
    """The flow run's id."""
    state: Any
    """The flow run's state."""
    result: DbtResult
    results: dict[str, str]
    """dbt's statuses by node, from run_results.json."""
    tables: dict[str, Any]
    """The rows that the build left, by table."""


@pytest.fixture(scope="module")
def broken(built: Built, postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Broken:
    """Build the project with all of `FAULTS` in a flow."""
    folder = shutil.copytree(built.folder, tmp_path_factory.mktemp("broken") / "shop")
    shutil.copytree(f"{built.folder}.kept", f"{folder}.kept")
    for fault in FAULTS.values():
        fault.inject(folder)
    (folder / "models" / "added.sql").write_text("select 1 as id")

    @flow
    def daily() -> None:
        use(folder, sample_rows=10).build()

    with new_database(postgres, DATABASE) as url:
        state = daily(return_state=True)
        error = state.result(raise_on_failure=False)
        assert isinstance(error, DbtError)
        assert error.result
        left = tables(functools.partial(rows_of, url))
    return Broken(folder, Server.run(state), state, error.result, results_of(folder), left)


def test_nodes_fail_as_on_dbts_command_line(broken: Broken, database: str, query: Query, tiny: Tiny) -> None:
    _, expected = command_line(broken.folder, "build", environment=warehouse.environment(), dbt=tiny.dbt)
    assert broken.results == expected
    assert {node.id: node.status for node in broken.result.nodes} == expected
    failed = {node.id: node.status for node in broken.result.failed}
    assert failed == {fault.node: fault.status for fault in FAULTS.values()}
    assert broken.tables == tables(query)


def test_skipped_nodes_name_the_failure(broken: Broken, server: Server) -> None:
    assert broken.state.is_failed()
    tasks = server.nodes(broken.run, len(broken.results))
    _assert_states_match(tasks, broken.results)
    because = {task["name"]: task["state"]["message"] for task in tasks.values() if task["state_name"] == "Skipped"}
    assert because == {
        "large_countries": "Skipped, because countries failed.",
        "tier_titles": "Skipped, because unique · tier_names.v2.tier did not pass.",
        "visits_by_customer": "Skipped, because unit test · visits_by_customer.visits_are_counted did not pass.",
        **({"doubled_amounts": "Skipped, because doubled failed."} if FUNCTIONS else {}),
    }


def test_failing_test_shows_its_sql_and_rows(broken: Broken, server: Server) -> None:
    tasks = server.nodes(broken.run, len(broken.results))

    def shown(fault: str) -> str:
        task = tasks[FAULTS[fault].node]["id"]
        lines = [line["message"] for line in server.logs(broken.run) if line["task_run_id"] == task]
        [found] = [line for line in lines if "Rows that it found" in line]
        return str(found)

    assert "having count(*) > 1" in shown("data test")
    assert "unique_field  n_records\ngold          2" in shown("data test")
    assert shown("singular test").endswith("(at most 10 shown):\n\ndifferent\n" + "\n".join(map(str, range(1, 11))))
    assert "```sql" in server.artifacts(broken.run)["dbt-build"]["data"]


def test_summary_has_the_changes_since_the_last_run(broken: Broken, built: Built, server: Server) -> None:
    def summary(run: str) -> str:
        [found] = [line["message"] for line in server.logs(run) if "critical path" in line["message"]]
        return str(found)

    assert "since before" not in summary(built.run)
    assert "since before   new: added" in summary(broken.run)
    [fails] = [line for line in summary(broken.run).splitlines() if "since before   fails now: " in line]
    assert fails.endswith(f" and {len(FAULTS) - 5} more")


def test_retry_runs_only_the_remaining_nodes(project: DbtProject, shop: Path, server: Server) -> None:
    whole = (shop / "models").rglob("clean_customers.sql")
    (model,) = whole
    right = model.read_text()
    model.write_text(right + " where no_such_column = 1")
    results = []

    @flow(retries=1)
    def daily() -> None:
        try:
            project.build()
        finally:
            results.append(results_of(shop))
            model.write_text(right)

    state = daily(return_state=True)
    assert state.is_completed(), state.message
    first, second = results
    done = {node for node, status in first.items() if status not in ("error", "fail", "skipped")}
    again = {node for node in second if not node.startswith("operation.")}
    assert again == first.keys() - done
    assert second["model.shop.clean_customers"] == "success"
    expected = {node for node in done if not node.startswith("operation.")}

    def cached() -> set[str]:
        tasks = server.get("task_runs", server.run(state))
        return {task["task_key"] for task in tasks if task["state_name"] == "Cached"}

    # All task runs have an end since the first attempt, so an end does not show that the second attempt is recorded.
    wait_until(lambda: cached() == expected, "the nodes that were reused", 240)


def test_retry_with_other_inputs_runs_all_nodes(small_project: DbtProject, folder: Path) -> None:
    results: list[DbtResult] = []

    @flow(retries=1)
    def daily() -> None:
        results.append(small_project.build(inputs=f"load {len(results)}"))
        assert len(results) == 2

    assert daily(return_state=True).is_completed()
    assert [len(result.reused) for result in results] == [0, 0]


def test_built_relation_is_an_asset_with_its_lineage(broken: Broken, server: Server) -> None:
    address = f"postgres://{DATABASE}/analytics/{{}}".format
    at_work = {
        node
        for node, status in broken.results.items()
        if node.startswith(("model.", "seed.", "snapshot.")) and status in ("success", "error")
    }

    def all_events() -> list[Object]:
        """Return the events once all are recorded, as the server records them with a delay."""
        events = server.events(broken.run, "prefect.asset.")
        ends = [event for event in events if "referenced" not in event["event"]]
        return events if len(ends) == len(at_work) else []

    events = wait_until(all_events, f"events of {len(at_work)} assets", 240)
    built = {event["resource"]["prefect.resource.id"]: event for event in events if "succeeded" in event["event"]}
    failed = {event["resource"]["prefect.resource.id"] for event in events if "failed" in event["event"]}
    seen = {event["resource"]["prefect.resource.id"] for event in events if "referenced" in event["event"]}
    assert failed == {address("countries"), address("german_names"), address("customer_history")}
    totals = built[address("customer_totals")]
    above = {
        related["prefect.resource.id"] for related in totals["related"] if related["prefect.resource.role"] == "asset"
    }
    assert above == {address("clean_customers"), address("paid_orders")}
    assert address("visits") in seen  # a source


@pytest.mark.further
def test_project_with_packages_and_another_profile_is_built(
    folder: Path, tmp_path: Path, query: Query, tiny: Tiny
) -> None:
    package = tmp_path / "package"
    (package / "models").mkdir(parents=True)
    (package / "dbt_project.yml").write_text("name: extra\nversion: '1.0'\n")
    (package / "models" / "from_package.sql").write_text("select 1 as id")
    (folder / "packages.yml").write_text("packages: [{local: ../package}]\n")
    (tmp_path / "profiles").mkdir()
    profiles = (folder / "profiles.yml").read_text().replace("warehouse:\n  target: dev", "mine:\n  target: dev")
    (tmp_path / "profiles" / "profiles.yml").write_text(profiles.replace("    dev:", "    nightly:"))
    (folder / "profiles.yml").unlink()
    own = DbtProject(
        folder, profile="mine", target="nightly", profiles_dir=tmp_path / "profiles", environment=warehouse.environment,
        artifacts=str(tmp_path / "kept"),
    )  # fmt: skip
    with pytest.raises(DbtError, match="dbt deps"):
        own.build(select="from_package")
    deps = [*tiny.dbt, "deps", "--profiles-dir", str(tmp_path / "profiles"), "--profile", "mine"]
    subprocess.run(deps, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    built = own.build(select="package:extra").built
    assert [node.id for node in built] == ["model.extra.from_package"]
    assert query("select id from analytics.from_package") == [(1,)]
