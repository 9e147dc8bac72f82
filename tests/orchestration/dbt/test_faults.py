"""What goes wrong outside of the SQL, and dbt's strict ways: one clear message, and states as dbt's own."""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import flow

from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult
from orchestration.errors import DbtError
from tests.orchestration.dbt.projects import FAULTS, every_kind, fast, hold
from tests.orchestration.dbt.task_runs import Object, Server, build_beside, results_of
from tests.parts import Query, embedded_postgres, rows_of, settings_of, wait_until

SLEEPING = "query ~ 'pg_sleep' and state = 'active' and pid <> pg_backend_pid()"


def _statuses(result: DbtResult) -> dict[str, str]:
    return {node.id: node.status for node in result.nodes}


def test_warn_error_makes_failures_of_warnings_as_dbt_does(project: DbtProject, shop: Path) -> None:
    options = '{"include": ["LogTestResult"]}'
    result = project.build(flags=["--warn-error-options", options], check=False)
    assert _statuses(result) == results_of(shop)
    (shop / "models" / "orphans.yml").write_text("version: 2\nmodels: [{name: nobody, description: not there}]\n")
    with pytest.raises(DbtError, match=r"dbt build could not start .*Nothing was built"):
        project.build(flags=["--warn-error"])


def test_fail_fast_stops_as_dbt_does(project: DbtProject, shop: Path, server: Server) -> None:
    """What never ran is there, and says so."""
    FAULTS["bad_seed"](shop)
    results: list[DbtResult] = []

    @flow
    def daily() -> None:
        results.append(project.build(flags=["--fail-fast"], threads=1, check=False))

    run = server.run(daily(return_state=True))
    recorded = results_of(shop)
    for node, status in _statuses(results[0]).items():
        # What passes in the moment when dbt stops is skipped in its results: it did run.
        assert recorded[node] in (status, "skipped")
    assert recorded["seed.shop.orders"] == "error"
    assert "skipped" in recorded.values()
    tasks = server.nodes(run, len(results[0].nodes))
    assert tasks["seed.shop.orders"]["state_type"] == "FAILED"
    skipped = {node for node, task in tasks.items() if task["state_name"] == "Skipped"}
    assert skipped == {node for node, status in _statuses(results[0]).items() if status == "skipped"}


def test_a_profile_that_is_not_there(shop: Path) -> None:
    with pytest.raises(DbtError, match=r"could not start .*Could not find profile named 'nowhere'.*Nothing was built"):
        DbtProject(shop, profile="nowhere", environment=warehouse.environment).build()


def test_an_option_that_is_not_there(project: DbtProject) -> None:
    with pytest.raises(TypeError, match=r"There is no option selct; there are: select, exclude"):
        project.build(selct="days")  # type: ignore[call-arg]
    with pytest.raises(DbtError, match=r"dbt seed could not start .*No such option '--nowhere'"):
        project.seed(flags=["--nowhere"])


@pytest.fixture
def guest(postgres: str, query: Query) -> Iterator[dict[str, str]]:
    """The environment of a user whom the server asks for a password, and who gives a wrong one."""
    [(file,)] = query("show hba_file")
    rules = Path(file).read_text()
    query("create role guest login password 'right'")
    Path(file).write_text(f"local all guest scram-sha-256\nhost all guest all scram-sha-256\n{rules}")
    query("select pg_reload_conf()")
    yield {**warehouse.environment(), "PGUSER": "guest", "PGPASSWORD": "letmein"}
    Path(file).write_text(rules)
    query("select pg_reload_conf()")
    query("drop role guest")


def test_a_wrong_password(shop: Path, guest: dict[str, str]) -> None:
    with pytest.raises(DbtError, match='password authentication failed for user "guest"') as raised:
        DbtProject(shop, environment=lambda: guest).build()
    assert "letmein" not in str(raised.value)


def test_a_compile_error_shows_file_line_and_text(project: DbtProject, shop: Path) -> None:
    FAULTS["broken_jinja"](shop)
    with pytest.raises(DbtError) as raised:
        project.build()
    message = str(raised.value)
    assert "models/countries.sql" in message
    assert "line 2" in message
    assert "select country, {{ count(*)" in message


def test_a_connection_that_breaks_is_tried_again(shop: Path, query: Query, server: Server) -> None:
    """The node alone, and what is behind it after it; never the whole run."""
    project = DbtProject(shop, environment=warehouse.environment, retries=1, retry_delay_seconds=0.5)
    hold(shop, "countries", 30)
    # Only the first attempt waits.
    (file,) = (shop / "models").rglob("countries.sql")
    file.write_text(file.read_text().replace("pg_sleep(30)", "pg_sleep(30) where nextval('public.attempts') = 1"))
    query("create sequence public.attempts")

    def break_it() -> None:
        wait_until(
            lambda: query(f"select pg_terminate_backend(pid) from pg_stat_activity where {SLEEPING}"), "the model", 60
        )

    breaker = threading.Thread(target=break_it)
    breaker.start()

    @flow
    def daily() -> None:
        project.build(select="+countries", flags=["--indirect-selection", "buildable"])

    state = daily(return_state=True)
    breaker.join()
    assert state.is_completed(), state.message
    run = server.run(state)

    def again() -> Object | None:
        found = [task for task in server.get("task_runs", run) if task["task_key"] == "model.shop.countries"]
        return next((task for task in found if task["run_count"] == 2), None)

    task = wait_until(again, "the second attempt to be recorded")
    lines = [line["message"] for line in server.logs(run) if line["task_run_id"] == task["id"]]
    assert any("Another attempt in 0.5 s." in line for line in lines)


def test_a_database_that_is_gone_in_mid_run(tmp_path: Path) -> None:
    with embedded_postgres(tmp_path / "own") as url, settings_of(WAREHOUSE_URL=url):
        shop = every_kind(tmp_path / "shop")
        hold(shop, "countries", 60)
        data = Path(rows_of(url, "show data_directory")[0][0])
        environment = warehouse.environment()
        project = DbtProject(shop, environment=lambda: environment, retries=1, retry_delay_seconds=0.2)

        thread, caught = build_beside(project)
        wait_until(lambda: rows_of(url, f"select 1 from pg_stat_activity where {SLEEPING}"), "the model", 60)
        os.kill(int((data / "postmaster.pid").read_text().splitlines()[0]), signal.SIGQUIT)
        thread.join(60)
        assert not thread.is_alive()
        [error] = caught
        assert "Correct the cause and run again" in str(error)
        assert error.result
        assert "countries" in [node.name for node in error.result.failed]
        assert "customers" in [node.name for node in error.result.built]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk that is full")
def test_a_disk_that_is_full(tmp_path: Path, database: str, query: Query) -> None:
    shop = fast(tmp_path / "fast", 20)
    (shop / "target").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", shop / "target"], check=True)
    try:
        with pytest.raises(DbtError, match="No space left on device"):
            DbtProject(shop, environment=warehouse.environment, artifacts=str(tmp_path / "kept")).build()
        assert not query("select 1 from pg_stat_activity where datname = current_database() and xact_start is not null"
                         " and pid <> pg_backend_pid()")  # fmt: skip
    finally:
        subprocess.run(["umount", shop / "target"], check=True)
    assert not DbtProject(shop, environment=warehouse.environment).build().failed


def test_artifacts_that_cannot_be_stored_are_said_and_disturb_nothing(
    shop: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with settings_of(DBT_ARTIFACTS_URL="file:///dev/full/kept"):
        result = DbtProject(shop, environment=warehouse.environment).build(select="days")
    assert not result.failed
    assert result.stored == ""
    assert "The artifacts of this run could not be stored" in caplog.text
