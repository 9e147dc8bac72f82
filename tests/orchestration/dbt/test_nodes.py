"""Each node of a dbt command is a task run: on a real server, compared with what dbt itself wrote."""

import subprocess
import sys
from pathlib import Path

import pytest
from prefect import flow

from orchestration import warehouse
from orchestration.dbt import DbtProject
from orchestration.dbt.mirror import STATES
from orchestration.errors import DbtError
from tests.orchestration.dbt.projects import FAULTS, NODES
from tests.orchestration.dbt.task_runs import Object, Server, results_of
from tests.parts import Query, wait_until


def _assert_as_dbt_says(tasks: dict[str, Object], results: dict[str, str]) -> None:
    states = {node: (task["state_type"], task["state_name"]) for node, task in tasks.items()}
    assert states == {node: STATES[status] for node, status in results.items()}


def test_every_kind_of_node_is_a_task_run(project: DbtProject, shop: Path, server: Server) -> None:
    @flow
    def daily() -> None:
        project.build()

    run = server.run(daily(return_state=True))
    tasks = server.nodes(run, NODES)
    _assert_as_dbt_says(tasks, results_of(shop))

    names = {task["name"] for task in tasks.values()}
    assert {"clean_orders", "unit test · customer_totals.unpaid_is_zero", "unique · order_log.id"} <= names
    assert all(task["start_time"] <= task["end_time"] for task in tasks.values())
    parents = {node: [above["id"] for above in task["task_inputs"]["parents"]] for node, task in tasks.items()}
    by_id = {task["id"]: task for task in tasks.values()}
    assert sum(map(len, parents.values())) > NODES / 2
    for node, above in parents.items():
        assert all(by_id[parent]["end_time"] <= tasks[node]["start_time"] for parent in above)
    # Through an ephemeral model, which is no task run.
    assert tasks["model.shop.clean_customers"]["id"] in parents["model.shop.german_names"]

    seed = tasks["seed.shop.orders"]
    assert "5 rows" in seed["state"]["message"]
    lines = [line["message"] for line in server.logs(run) if line["task_run_id"] == seed["id"]]
    assert any("OK loaded seed file" in line for line in lines)

    artifacts = server.artifacts(run)
    assert f"{NODES} nodes in" in artifacts["dbt-build"]["data"]
    assert "Critical path" in artifacts["dbt-build"]["data"]
    assert artifacts["dbt-build-threads"]["data"].startswith("data:image/svg+xml;base64,")


@pytest.mark.parametrize(
    "fault",
    ["missing_column", "undefined_macro", "failing_data_test", "failing_unit_test", "failing_batch", "failing_end"],
)
def test_a_failure_and_what_it_keeps_from_running(fault: str, project: DbtProject, shop: Path, server: Server) -> None:
    failure = FAULTS[fault](shop)
    assert failure.node

    @flow
    def daily() -> None:
        project.build()

    state = daily(return_state=True)
    assert state.is_failed()
    results = results_of(shop)
    tasks = server.nodes(server.run(state), len(results))
    _assert_as_dbt_says(tasks, results)
    assert results[failure.node] == failure.status
    skipped = [tasks[node] for node, status in results.items() if status == "skipped"]
    title = tasks[failure.node]["name"]
    assert all(task["state"]["message"].startswith(f"Skipped, because {title} ") for task in skipped)


def test_a_failing_test_shows_its_sql_and_rows(project: DbtProject, shop: Path, server: Server) -> None:
    failure = FAULTS["failing_data_test"](shop)
    assert failure.node

    @flow
    def daily() -> None:
        project.build()

    run = server.run(daily(return_state=True))
    task = server.nodes(run, len(results_of(shop)))[failure.node]
    lines = [line["message"] for line in server.logs(run) if line["task_run_id"] == task["id"]]
    [shown] = [line for line in lines if "Rows that it found" in line]
    assert "select" in shown
    assert "where value_field not in" in shown
    assert "```sql" in server.artifacts(run)["dbt-build"]["data"]


def test_another_attempt_does_only_what_is_left(project: DbtProject, shop: Path, server: Server) -> None:
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

    # Each has an end since the first attempt, so that these do not tell whether the second one's are recorded.
    wait_until(lambda: cached() == expected, "the nodes that were reused", 30)


def test_what_is_built_is_an_asset_with_its_lineage(project: DbtProject, shop: Path, server: Server) -> None:
    FAULTS["missing_column"](shop)

    @flow
    def daily() -> None:
        project.build()

    run = server.run(daily(return_state=True))
    address = "postgres://{}/analytics/{}".format
    database = warehouse.environment()["PGDATABASE"]

    def told() -> list[Object]:
        """The server's events, all of them: it writes down what it is sent some time later."""
        events = server.events(run, "prefect.asset.")
        ends = [event for event in events if "referenced" not in event["event"]]
        return events if len(ends) == len(at_work) else []

    at_work = {
        node
        for node, status in results_of(shop).items()
        if node.startswith(("model.", "seed.", "snapshot.")) and status != "skipped"
    }
    events = wait_until(told, f"events of {len(at_work)} assets", 30)
    built = {event["resource"]["prefect.resource.id"]: event for event in events if "succeeded" in event["event"]}
    failed = [event["resource"]["prefect.resource.id"] for event in events if "failed" in event["event"]]
    seen = {event["resource"]["prefect.resource.id"] for event in events if "referenced" in event["event"]}
    assert failed == [address(database, "countries")]
    totals = built[address(database, "customer_totals")]
    above = {each["prefect.resource.id"] for each in totals["related"] if each["prefect.resource.role"] == "asset"}
    assert above == {address(database, "clean_customers"), address(database, "paid_orders")}
    assert address(database, "visits") in seen  # a source


def test_packages_and_a_profile_of_the_users_own(shop: Path, tmp_path: Path, query: Query) -> None:
    package = tmp_path / "package"
    (package / "models").mkdir(parents=True)
    (package / "dbt_project.yml").write_text("name: extra\nversion: '1.0'\n")
    (package / "models" / "from_package.sql").write_text("select 1 as id")
    (shop / "packages.yml").write_text("packages: [{local: ../package}]\n")
    (tmp_path / "profiles").mkdir()
    profiles = (shop / "profiles.yml").read_text().replace("warehouse:\n  target: dev", "mine:\n  target: dev")
    (tmp_path / "profiles" / "profiles.yml").write_text(profiles.replace("    dev:", "    nightly:"))
    (shop / "profiles.yml").unlink()
    own = DbtProject(
        shop, profile="mine", target="nightly", profiles_dir=tmp_path / "profiles", environment=warehouse.environment,
        artifacts=str(tmp_path / "kept"),
    )  # fmt: skip
    with pytest.raises(DbtError, match="dbt deps"):
        own.build(select="from_package")
    dbt = str(Path(sys.executable).parent / "dbt")
    deps = [dbt, "deps", "--profiles-dir", str(tmp_path / "profiles"), "--profile", "mine"]
    subprocess.run(deps, cwd=shop, check=True, stdout=subprocess.DEVNULL)
    built = own.build(select="package:extra").built
    assert [node.id for node in built] == ["model.extra.from_package"]
    assert query("select id from analytics.from_package") == [(1,)]
