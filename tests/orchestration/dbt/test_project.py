"""dbt as a child process: what comes back, and what becomes of it when something dies."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestration import warehouse
from orchestration.dbt import DbtProject
from orchestration.dbt.process import CHILD
from orchestration.errors import DbtError
from tests.orchestration.dbt.task_runs import build_beside
from tests.parts import Query, wait_until

PROFILE = (Path(__file__).parents[3] / "flows" / "warehouse" / "profiles.yml").read_text()


@pytest.fixture
def folder(tmp_path: Path, database: str) -> Path:
    """A small dbt project on the test's database."""
    project = tmp_path / "project"
    (project / "models").mkdir(parents=True)
    (project / "profiles.yml").write_text(PROFILE)
    (project / "dbt_project.yml").write_text(
        "name: small\nversion: '1.0'\nprofile: warehouse\nflags: {send_anonymous_usage_stats: false}\n"
    )
    (project / "models" / "one.sql").write_text("{{ config(materialized='table') }}\nselect 1 as id")
    (project / "models" / "two.sql").write_text("select * from {{ ref('one') }}")
    return project


@pytest.fixture
def project(folder: Path) -> Iterator[DbtProject]:
    """That project as flows use it."""
    project = DbtProject(folder, environment=warehouse.environment)
    yield project
    project.close()


def test_every_node_comes_back_with_its_outcome(project: DbtProject, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    result = project.build()
    one, two = result.nodes
    assert (one.id, one.name, one.kind, one.status) == ("model.small.one", "one", "model", "success")
    assert (one.rows, one.materialized, one.path) == (1, "table", "models/one.sql")
    assert (two.rows, two.materialized) == (None, "view")
    assert one.seconds > 0
    assert result.error() is None
    lines = [record.message for record in caplog.records]
    assert any(line.startswith("1 of 2 OK created sql table model analytics.one") for line in lines)
    assert any(line.startswith("2 of 2 OK created sql view model analytics.two") for line in lines)


def test_a_failed_node_and_what_was_skipped_behind_it(project: DbtProject, folder: Path) -> None:
    (folder / "models" / "one.sql").write_text("select 1 as id from nowhere")
    (folder / "models" / "three.sql").write_text("select 3 as id")
    with pytest.raises(DbtError) as raised:
        project.build()
    result = raised.value.result
    assert [node.name for node in result.failed] == ["one"]
    assert [node.name for node in result.skipped] == ["two"]
    assert [node.name for node in result.built] == ["three"]
    error = raised.value
    assert [node.because for node in result.skipped] == ["model.small.one"]
    assert 'model one (models/one.sql): relation "nowhere" does not exist' in str(error)
    assert "Built, each whole and up to date: three." in str(error)


def test_many_failures_are_counted_and_the_first_five_told(project: DbtProject, folder: Path) -> None:
    for number in range(7):
        (folder / "models" / f"bad_{number}.sql").write_text("select 1 from nowhere")
    error = project.build(select="bad_0 bad_1 bad_2 bad_3 bad_4 bad_5 bad_6", check=False).error()
    assert error is not None
    assert str(error).startswith("dbt build: 7 of 7 nodes failed: ")
    assert str(error).count("does not exist") == 5
    assert "; and 2 more. Built, each whole and up to date: nothing." in str(error)


def test_a_selection_that_matches_nothing_is_an_error(project: DbtProject) -> None:
    with pytest.raises(DbtError, match=r"The selection 'three' matches no node in the dbt project .*dbt ls"):
        project.build(select="three")


def test_a_project_that_is_not_there_is_an_error(tmp_path: Path, database: str) -> None:
    (tmp_path / "profiles.yml").write_text(PROFILE)
    with pytest.raises(DbtError, match=r"could not start on .*dbt_project\.yml"):
        DbtProject(tmp_path, environment=warehouse.environment).build()


def test_jinja_that_is_broken_is_an_error_with_its_file(project: DbtProject, folder: Path) -> None:
    (folder / "models" / "one.sql").write_text("select {{ 1")
    with pytest.raises(DbtError, match=r"could not start .*models/one\.sql.*Nothing was built"):
        project.build()


def test_what_a_macro_prints_does_not_disturb(project: DbtProject, folder: Path) -> None:
    (folder / "models" / "one.sql").write_text('{{ print(\'{"event": "result"}\') }}\nselect 1 as id')
    assert project.build().error() is None


def test_a_warm_process_is_used_once(project: DbtProject) -> None:
    project.warm()
    warmed = project._warm
    assert warmed is not None
    project.warm()
    assert project._warm is warmed
    assert project.build().error() is None
    assert not warmed.alive()
    assert project.build().error() is None


def test_a_warm_process_that_died_is_replaced(project: DbtProject) -> None:
    project.warm()
    assert project._warm is not None
    project._warm._process.kill()
    project._warm._process.wait()
    assert project.build().error() is None


def test_closing_ends_a_warm_process_that_nothing_used(project: DbtProject) -> None:
    project.warm()
    warmed = project._warm
    assert warmed is not None
    project.close()
    assert not warmed.alive()


def test_two_at_once_in_one_folder_do_not_mix(project: DbtProject, folder: Path, query: Query) -> None:
    query("create schema analytics")  # which Postgres refuses to one of two that make it at once
    (folder / "models" / "three.sql").write_text("select 3 as id")
    (folder / "target" / ".run-killed").mkdir(parents=True)
    names: dict[str, list[str]] = {}

    def build(select: str) -> None:
        names[select] = [node.name for node in project.build(select=select).nodes]

    threads = [threading.Thread(target=build, args=[select]) for select in ("+two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == {"+two": ["one", "two"], "three": ["three"]}
    assert not list((folder / "target").glob(".run-*"))
    assert (folder / "target" / "partial_parse.msgpack").exists()


def test_the_next_run_parses_only_what_changed(project: DbtProject, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def lines() -> str:
        caplog.clear()
        project.build()
        return caplog.text

    assert "Unable to do partial parsing because saved manifest not found" in lines()
    assert "Unable to do partial parsing" not in lines()


def _sleeping(query: Query) -> int:
    found = query("select count(*) from pg_stat_activity where query ~ 'pg_sleep' and state = 'active' "
                  "and pid <> pg_backend_pid()")  # fmt: skip
    return int(found[0][0])


@pytest.fixture
def slow(folder: Path) -> Path:
    """The project with a model that takes a minute."""
    (folder / "models" / "one.sql").write_text("{{ config(materialized='table') }}\nselect 1 as id from pg_sleep(60)")
    return folder


def _build_elsewhere(folder: Path) -> "subprocess.Popen[bytes]":
    code = (
        "import sys; from pathlib import Path; from orchestration import warehouse; from orchestration.dbt import *\n"
        "DbtProject(Path(sys.argv[1]), environment=warehouse.environment).build()"
    )
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_when_the_flow_dies_its_dbt_and_its_sql_end(slow: Path, query: Query, how: signal.Signals) -> None:
    flow = _build_elsewhere(slow)
    wait_until(lambda: _sleeping(query) == 1, "the model")
    children = psutil.Process(flow.pid).children()
    assert len(children) == 1
    os.kill(flow.pid, how)
    flow.wait(20)
    wait_until(lambda: _sleeping(query) == 0, "the end of the SQL", 10)
    wait_until(lambda: not any(child.is_running() for child in children), "the end of dbt", 10)


def test_when_dbt_dies_the_flow_is_told(slow: Path, query: Query) -> None:
    project = DbtProject(slow, environment=warehouse.environment)

    thread, caught = build_beside(project)
    wait_until(lambda: _sleeping(query) == 1, "the model")
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.ZombieProcess):
            if str(CHILD) in child.cmdline():
                child.kill()
    thread.join()
    assert "dbt build ended with status -9 before it was done" in str(caught[0])
    wait_until(lambda: _sleeping(query) == 0, "the end of the SQL", 10)
