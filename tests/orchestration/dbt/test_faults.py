"""Faults outside of the SQL, and dbt's strict options: one clear message, and the same states as with dbt."""

import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow

from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult
from orchestration.errors import DbtError
from tests.orchestration.dbt.conftest import use
from tests.orchestration.dbt.projects import hold, replace, small
from tests.orchestration.dbt.task_runs import Server, build_in_thread, results_of
from tests.parts import Query, embedded_postgres, rows_of, settings_of, wait_until

SLEEPING = "query ~ 'pg_sleep' and state = 'active' and pid <> pg_backend_pid()"


def _statuses(result: DbtResult) -> dict[str, str]:
    return {node.id: node.status for node in result.nodes}


@pytest.mark.further
def test_warn_error_turns_warnings_into_failures(project: DbtProject, shop: Path) -> None:
    options = '{"include": ["LogTestResult"]}'
    flags = ["--warn-error-options", options, "--indirect-selection", "cautious"]
    result = project.build(select="customers clean_customers", flags=flags, check=False)
    assert _statuses(result) == results_of(shop)
    assert [node.name for node in result.failed] == ["only_germans"]
    (shop / "models" / "orphans.yml").write_text("version: 2\nmodels: [{name: missing, description: not there}]\n")
    with pytest.raises(DbtError, match=r"dbt build could not start .*Nothing was built"):
        project.build(flags=["--warn-error"])


@pytest.mark.further
def test_fail_fast_stops_like_dbt(project: DbtProject, shop: Path, server: Server) -> None:
    """Nodes that never ran are task runs in the state Skipped."""
    replace(shop, "seeds/orders.csv", "5,4,8,", "5,4,eight,")
    results: list[DbtResult] = []

    @flow
    def daily() -> None:
        results.append(project.build(flags=["--fail-fast"], threads=1, check=False))

    run = server.run(daily(return_state=True))
    recorded = results_of(shop)
    for node, status in _statuses(results[0]).items():
        # A node that passes while dbt stops is skipped in dbt's results, although it ran.
        assert recorded[node] in (status, "skipped")
    assert recorded["seed.shop.orders"] == "error"
    assert "skipped" in recorded.values()
    tasks = server.nodes(run, len(results[0].nodes))
    assert tasks["seed.shop.orders"]["state_type"] == "FAILED"
    skipped = {node for node, task in tasks.items() if task["state_name"] == "Skipped"}
    assert skipped == {node for node, status in _statuses(results[0]).items() if status == "skipped"}


def test_node_that_fail_fast_cancels_is_not_started_again(folder: Path, query: Query) -> None:
    """dbt ends the node's session, as a broken connection would."""
    query("create sequence public.attempts")
    hold(folder, "three", 1200)
    replace(folder, "models/three.sql", "pg_sleep(1200)", "pg_sleep(1200) where nextval('public.attempts') = 1")
    hold(folder, "one", 1)
    wait = "do $$ begin while not (select is_called from public.attempts) loop perform pg_sleep(0.1); end loop; end $$"
    replace(folder, "models/one.sql", "select pg_sleep(1)", wait)
    replace(folder, "models/one.sql", "select 1 as id", "select 1 as id from nowhere")
    project = use(folder, retries=1, retry_delay_seconds=0.2)
    result = project.build(select="one three", flags=["--fail-fast"], threads=2, check=False)
    statuses = _statuses(result)
    assert statuses["model.small.one"] == "error"
    assert statuses["model.small.three"] != "success"
    assert query("select last_value, is_called from public.attempts") == [(1, True)]


def test_missing_profile_is_an_error(folder: Path) -> None:
    with pytest.raises(DbtError, match=r"could not start .*Could not find profile named 'nowhere'.*Nothing was built"):
        use(folder, profile="nowhere").build()


def test_unknown_option_is_an_error(small_project: DbtProject) -> None:
    with pytest.raises(TypeError, match=r"Unknown option selct. Options are: select, exclude"):
        small_project.build(selct="days")  # type: ignore[call-arg]
    with pytest.raises(DbtError, match=r"dbt seed could not start .*No such option '--nowhere'"):
        small_project.seed(flags=["--nowhere"])


@pytest.fixture
def guest(postgres: str, query: Query) -> Iterator[dict[str, str]]:
    """Yield the environment of a database user with a wrong password."""
    [(file,)] = query("show hba_file")
    rules = Path(file).read_text()
    query("create role guest login password 'right'")
    Path(file).write_text(f"local all guest scram-sha-256\nhost all guest all scram-sha-256\n{rules}")
    query("select pg_reload_conf()")
    yield {**warehouse.environment(), "PGUSER": "guest", "PGPASSWORD": "letmein"}
    Path(file).write_text(rules)
    query("select pg_reload_conf()")
    query("drop role guest")


def test_wrong_password_is_an_error_without_the_password(folder: Path, guest: dict[str, str]) -> None:
    with pytest.raises(DbtError, match='password authentication failed for user "guest"') as raised:
        DbtProject(folder, environment=lambda: guest).build()
    assert "letmein" not in str(raised.value)


def test_node_is_retried_after_a_broken_connection(folder: Path, query: Query, server: Server) -> None:
    """Only the node is retried. The node behind it follows once, and the flow run is not repeated."""
    project = use(folder, retries=1, retry_delay_seconds=0.5)
    hold(folder, "one", 1200)
    # Only the first attempt waits.
    replace(folder, "models/one.sql", "pg_sleep(1200)", "pg_sleep(1200) where nextval('public.attempts') = 1")
    query("create sequence public.attempts")

    def break_connection() -> None:
        wait_until(
            lambda: query(f"select pg_terminate_backend(pid) from pg_stat_activity where {SLEEPING}"), "the model", 240
        )

    breaker = threading.Thread(target=break_connection)
    breaker.start()

    @flow
    def daily() -> None:
        project.build()

    state = daily(return_state=True)
    breaker.join()
    assert state.is_completed(), state.message
    run = server.run(state)

    task = server.nodes(run, 3)["model.small.one"]
    attempts = {node: task_run["run_count"] for node, task_run in server.nodes(run, 3).items()}
    assert attempts == {"model.small.one": 2, "model.small.two": 1, "model.small.three": 1}
    lines = [line["message"] for line in server.logs(run) if line["task_run_id"] == task["id"]]
    assert any("Another attempt in 0.5 s." in line for line in lines)


@pytest.mark.further
def test_database_that_stops_fails_the_running_node(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    # In no folder of pytest: a session that begins makes pytest's folders unreadable to all users but root.
    with (
        tempfile.TemporaryDirectory() as data_folder,
        embedded_postgres(Path(data_folder)) as url,
        settings_of(WAREHOUSE_URL=url),
    ):
        folder = small(tmp_path / "small")
        hold(folder, "one", 1200)
        data = Path(rows_of(url, "show data_directory")[0][0])
        environment = warehouse.environment()
        project = DbtProject(folder, environment=lambda: environment, retries=1, retry_delay_seconds=0.2)

        thread, caught = build_in_thread(project)
        wait_until(lambda: rows_of(url, f"select 1 from pg_stat_activity where {SLEEPING}"), "the model", 240)
        wait_until(lambda: "OK created sql view model analytics.three" in caplog.text, "the independent model", 240)
        os.kill(int((data / "postmaster.pid").read_text().splitlines()[0]), signal.SIGQUIT)
        thread.join(240)
        assert not thread.is_alive()
        [error] = caught
        assert "Correct the cause and run again" in str(error)
        assert error.result
        assert [node.name for node in error.result.failed] == ["one"]
        assert [node.name for node in error.result.skipped] == ["two"]
        assert [node.name for node in error.result.built] == ["three"]


@pytest.mark.further
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk that is full")
def test_full_disk_is_an_error_and_leaves_no_transaction(folder: Path, query: Query) -> None:
    target = folder / "target"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", target], check=True)
    try:
        with pytest.raises(DbtError, match="No space left on device"):
            use(folder).build()
        assert not query("select 1 from pg_stat_activity where datname = current_database() and xact_start is not null"
                         " and pid <> pg_backend_pid()")  # fmt: skip
    finally:
        subprocess.run(["umount", target], check=True)
    assert not use(folder).build().failed


def test_artifacts_that_cannot_be_stored_are_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with settings_of(DBT_ARTIFACTS_URL="file:///dev/full/kept"):
        result = DbtProject(folder, environment=warehouse.environment).build(select="three")
    assert not result.failed
    assert result.stored == ""
    assert "The artifacts of this run could not be stored" in caplog.text
