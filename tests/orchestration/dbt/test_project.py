"""dbt as a child process: the results of nodes, and the death of flow or child."""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult, Node
from orchestration.dbt.process import CHILD
from orchestration.errors import DbtError
from tests.orchestration.dbt import versions
from tests.orchestration.dbt.conftest import use
from tests.orchestration.dbt.projects import hold, replace, small
from tests.orchestration.dbt.task_runs import build_in_thread
from tests.parts import Query, wait_until


@pytest.fixture
def project(folder: Path) -> Iterator[DbtProject]:
    """Yield a project of three models, parsed and not built, whose child is a real interpreter."""
    project = use(folder, python=versions.tested())
    yield project
    project.close()


def test_build_returns_each_node_with_its_outcome(
    tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The project is not parsed yet, and its macros print. The next run parses only changed files."""
    caplog.set_level("INFO")
    folder = small(tmp_path / "small")
    replace(folder, "models/one.sql", "select", '{{ print(\'{"event": "result"}\') }}select')
    project = use(folder)
    result = project.build()
    assert [node.name for node in result.nodes if node.name != "three"] == ["one", "two"]
    nodes = {node.name: node for node in result.nodes}
    one, two = nodes["one"], nodes["two"]
    assert (one.id, one.name, one.kind, one.status) == ("model.small.one", "one", "model", "success")
    assert (one.rows, one.materialized, one.path) == (1, "table", "models/one.sql")
    assert (two.rows, two.materialized) == (None, "view")
    assert one.seconds > 0
    assert result.error() is None
    lines = [record.message for record in caplog.records]
    assert any("of 3 OK created sql table model analytics.one" in line for line in lines)
    assert any("of 3 OK created sql view model analytics.two" in line for line in lines)
    assert "Unable to do partial parsing because saved manifest not found" in caplog.text

    caplog.clear()
    assert [node.name for node in project.build(select="three").nodes] == ["three"]
    assert "OK created sql view model analytics.three" in caplog.text
    assert "Unable to do partial parsing" not in caplog.text


def test_error_names_the_failed_node_and_counts_skipped_nodes(small_project: DbtProject, folder: Path) -> None:
    (folder / "models" / "one.sql").write_text("select 1 as id from nowhere")
    with pytest.raises(DbtError) as raised:
        small_project.build()
    result = raised.value.result
    assert [node.name for node in result.failed] == ["one"]
    assert [node.name for node in result.skipped] == ["two"]
    assert [node.name for node in result.built] == ["three"]
    error = raised.value
    assert [node.because for node in result.skipped] == ["model.small.one"]
    assert 'model one (models/one.sql): relation "nowhere" does not exist' in str(error)
    assert "Built, each whole and up to date: three." in str(error)


@pytest.mark.skipif(versions.minor() < (1, 12), reason="dbt 1.12 brought on_error")
def test_skipped_node_names_the_failure_that_dbt_did_not_pass_over(small_project: DbtProject, folder: Path) -> None:
    """A failure with `on_error: continue` is not named."""
    (folder / "models" / "one.sql").write_text("{{ config(on_error='continue') }} select 1 as id from nowhere")
    (folder / "models" / "three.sql").write_text("select 3 as id from nowhere")
    (folder / "models" / "four.sql").write_text("select * from {{ ref('one') }}, {{ ref('three') }}")
    result = small_project.build(select="+four", check=False)
    assert {node.name for node in result.failed} == {"one", "three"}
    assert [(node.name, node.because) for node in result.skipped] == [("four", "model.small.three")]


def test_error_names_the_first_five_failures_and_counts_the_rest() -> None:
    failed = [
        Node(f"model.small.bad_{number}", f"bad_{number}", f"bad_{number}", "model", f"models/bad_{number}.sql",
             status="error", message=f"Database Error in model bad_{number}\n  relation does not exist")
        for number in range(7)
    ]  # fmt: skip
    error = str(DbtResult("build", failed).error())
    assert error.startswith("dbt build: 7 of 7 nodes failed: model bad_0 (models/bad_0.sql): relation does not exist; ")
    assert error.count("does not exist") == 5
    assert "; and 2 more. Built, each whole and up to date: nothing." in error


def test_missing_project_is_an_error(tmp_path: Path, database: str) -> None:
    (small(tmp_path) / "dbt_project.yml").unlink()
    with pytest.raises(DbtError, match=r"could not start on .*dbt_project\.yml"):
        DbtProject(tmp_path, environment=warehouse.environment).build()


def test_error_of_broken_jinja_has_file_line_and_text(small_project: DbtProject, folder: Path) -> None:
    (folder / "models" / "three.sql").write_text("select\n  {{ 3 as id")
    with pytest.raises(DbtError, match=r"could not start .*models/three\.sql.*Nothing was built") as raised:
        small_project.build()
    assert "line 2" in str(raised.value)
    assert "{{ 3 as id" in str(raised.value)


def test_warm_process_is_used_once(small_project: DbtProject) -> None:
    """A process that no command used ends with the project."""
    project = small_project
    project.warm()
    used = project._warm_process
    assert used is not None
    project.warm()
    assert project._warm_process is used
    assert project.build().error() is None
    assert not used.is_running()
    project.warm()
    unused = project._warm_process
    assert unused is not None
    assert unused is not used
    assert unused.is_running()
    project.close()
    assert not unused.is_running()


@pytest.mark.further
def test_dead_warm_process_is_replaced(project: DbtProject) -> None:
    project.warm()
    assert project._warm_process is not None
    # At once, so that the process has not imported dbt yet.
    project._warm_process._process.kill()
    project._warm_process._process.wait()
    assert project.build(select="three").error() is None


def test_concurrent_builds_in_one_folder_do_not_mix(small_project: DbtProject, folder: Path, query: Query) -> None:
    query("create schema analytics")  # Postgres refuses one of two concurrent creations
    (folder / "target" / ".run-killed").mkdir(parents=True)
    names: dict[str, list[str]] = {}

    def build(select: str) -> None:
        names[select] = [node.name for node in small_project.build(select=select).nodes]

    threads = [threading.Thread(target=build, args=[select]) for select in ("+two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names == {"+two": ["one", "two"], "three": ["three"]}
    assert not list((folder / "target").glob(".run-*"))
    assert (folder / "target" / "partial_parse.msgpack").exists()


def _sleeping(query: Query) -> int:
    found = query("select count(*) from pg_stat_activity where query ~ 'pg_sleep' and state = 'active' "
                  "and pid <> pg_backend_pid()")  # fmt: skip
    return int(found[0][0])


@pytest.fixture
def slow(folder: Path) -> Path:
    """Return the project with a model that takes longer than the test waits for its end."""
    hold(folder, "one", 1200)
    return folder


def _build_in_process(folder: Path) -> "subprocess.Popen[bytes]":
    code = (
        "import sys; from pathlib import Path\n"
        "from orchestration import warehouse; from orchestration.dbt import *\n"
        "DbtProject(Path(sys.argv[1]), environment=warehouse.environment, python=sys.argv[2]).build()"
    )
    command = [sys.executable, "-c", code, str(folder), str(versions.tested())]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


@pytest.mark.further
def test_interrupted_flow_ends_its_dbt_and_its_sql(slow: Path, query: Query) -> None:
    """`test_ends` has the killed flow."""
    flow = _build_in_process(slow)
    wait_until(lambda: _sleeping(query) == 1, "the model", 240)
    [dbt] = psutil.Process(flow.pid).children()
    flow.send_signal(signal.SIGINT)
    flow.wait(240)
    wait_until(lambda: _sleeping(query) == 0, "the end of the SQL", 240)
    wait_until(lambda: not dbt.is_running(), "the end of dbt", 240)


def test_death_of_dbt_is_an_error_in_the_flow(slow: Path, query: Query) -> None:
    project = use(slow, python=versions.tested())
    thread, caught = build_in_thread(project)
    wait_until(lambda: _sleeping(query) == 1, "the model", 240)
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            # The process that forks dbt for other tests has the folder among its arguments too.
            if child.cmdline()[-1:] == [str(CHILD)]:
                child.kill()
    thread.join()
    assert "dbt build ended with status -9 before it was done" in str(caught[0])
    hold(slow, "one", 0)
    assert {"one", "two"} <= {node.name for node in use(slow).retry().nodes}
    wait_until(lambda: _sleeping(query) == 0, "the end of the SQL", 240)
