"""Microbatch models whose batches fail or whose run dies: the next attempt runs what is left, as `dbt retry` does."""

import contextlib
import shutil
import threading
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow
from prefect.context import FlowRunContext

from orchestration import warehouse
from orchestration.dbt.process import CHILD
from orchestration.errors import DbtError
from tests.orchestration.dbt import forked, versions
from tests.orchestration.dbt.conftest import Tiny, parsed, use
from tests.orchestration.dbt.projects import replace
from tests.orchestration.dbt.task_runs import Server
from tests.parts import Query, wait_until

DAYS = 6
BEGIN = (datetime.now(UTC) - timedelta(DAYS)).date()
FAULTY = BEGIN + timedelta(2)
"""The day of the batch that fails: long before dbt's default lookback of one day."""

MODEL = f"""
{{{{ config(
    materialized='incremental', incremental_strategy='microbatch', unique_key='day',
    event_time='day', begin='{BEGIN}', batch_size='day'
) }}}}
{{% set day = (model.batch.event_time_start | string)[:10] if model.batch else '{BEGIN}' %}}
select '{{{{ day }}}}'::date as day, 1 as attempt, {{% if day == '{FAULTY}' %}}FAULT{{% else %}}0{{% endif %}} as fault
"""

EXPECTED = {BEGIN + timedelta(day): 2 if day == 2 else 1 for day in range(DAYS + 1)}
"""The attempt that builds each day, if only the failed batch runs again."""


@pytest.fixture(scope="module")
def parsed_daily(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a parsed project with a microbatch model whose third batch divides by zero."""
    folder = tmp_path_factory.mktemp("parsed") / "tiny"
    (folder / "models").mkdir(parents=True)
    for name in ("dbt_project.yml", "profiles.yml"):
        shutil.copyfile(tiny.folder / name, folder / name)
    (folder / "models" / "daily.sql").write_text(MODEL.replace("FAULT", "1 / (select 0)"))
    return parsed(folder, tiny)


@pytest.fixture
def folder(parsed_daily: Path, database: str, tmp_path: Path) -> Path:
    """Return the folder of the project, for the test to edit."""
    return Path(shutil.copytree(parsed_daily, tmp_path / "tiny"))


def _cure(folder: Path) -> None:
    (folder / "models" / "daily.sql").write_text(MODEL.replace("FAULT", "0").replace("1 as attempt", "2 as attempt"))


def _attempts(query: Query) -> dict[date, int]:
    """Return the attempt that built each day."""
    return dict(query("select day, attempt from analytics.daily"))


def _wait_for_batches(server: Server, state: str) -> None:
    """Wait until the server has recorded the batches of the first attempt."""
    context = FlowRunContext.get()
    assert context
    assert context.flow_run
    run = str(context.flow_run.id)

    def recorded() -> bool:
        tasks = {task["task_key"]: task for task in server.get("task_runs", run)}
        daily = tasks.get("model.tiny.daily", {})
        return daily.get("state_type") == state and "dbt.batches" in daily["labels"]

    wait_until(recorded, "the batches of the first attempt", 240)


@pytest.mark.parametrize(
    "retried",
    [
        pytest.param("by dbt", marks=pytest.mark.further),
        "by a new run",
        "by the flow run",
        pytest.param("by another process", marks=pytest.mark.further),
    ],
)
def test_retry_runs_only_the_failed_batch(retried: str, tiny: Tiny, folder: Path, server: Server, query: Query) -> None:
    """As dbt's own command does."""
    project = use(folder)
    results: list[Any] = []

    def dbt(command: str) -> None:
        arguments = ["dbt", command]
        results.append(forked.ask(str(tiny.socket), arguments, warehouse.environment(), str(folder)))

    def build() -> None:
        result = (use(folder) if retried == "by another process" else project).build(check=False)
        results.extend(node.status for node in result.nodes if node.kind == "model")

    @flow(retries=1)
    def daily() -> None:
        build()
        if len(results) == 1:
            _wait_for_batches(server, "FAILED")
            _cure(folder)
            raise DbtError("the first attempt has failed")

    if retried == "by dbt":
        dbt("build")
        _cure(folder)
        dbt("retry")
        assert results == [1, 0]
    elif retried == "by a new run":
        build()
        _cure(folder)
        results.extend(node.status for node in project.retry().nodes if node.kind == "model")
        assert results == ["partial success", "success"]
    else:
        assert daily(return_state=True).is_completed()
        assert results == ["partial success", "success"]
    assert _attempts(query) == EXPECTED


def test_model_whose_run_dies_is_completed_by_the_next_attempt(folder: Path, server: Server, query: Query) -> None:
    """The next attempt reads the batches from the server."""
    replace(folder, "models/daily.sql", "1 / (select 0)", "(select count(pg_sleep(1200)) from pg_class)")
    failures: list[str] = []

    def kill() -> None:
        sleeping = "select 1 from pg_stat_activity where query ~ 'pg_sleep' and pid <> pg_backend_pid()"
        wait_until(lambda: query(sleeping), "the third batch", 240)
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.cmdline()[-1:] == [str(CHILD)]:
                    child.kill()

    @flow(retries=1)
    def daily() -> None:
        try:
            # dbt is forked where it is not killed.
            use(folder, **({} if failures else {"python": versions.tested()})).build()
        except DbtError as error:
            failures.append(str(error))
            _wait_for_batches(server, "CRASHED")
            _cure(folder)
            raise

    killer = threading.Thread(target=kill)
    killer.start()
    state = daily(return_state=True)
    killer.join()
    assert state.is_completed(), state.message
    assert len(failures) == 1
    attempts = _attempts(query)
    assert attempts.keys() == EXPECTED.keys()
    assert all(attempt == 2 for day, attempt in attempts.items() if day >= FAULTY)


def test_full_refresh_runs_all_batches_again(folder: Path, query: Query) -> None:
    """dbt would replace the table by the table of the first batch that it runs."""
    project = use(folder)
    project.build(full_refresh=True, check=False)
    _cure(folder)
    project.retry()
    assert _attempts(query) == dict.fromkeys(EXPECTED, 2)


@pytest.mark.further
def test_batch_is_retried_after_a_broken_connection(folder: Path, query: Query) -> None:
    query("create sequence public.attempts")
    broken = "(select count(pg_terminate_backend(pg_backend_pid())) where nextval('public.attempts') = 1)"
    replace(folder, "models/daily.sql", "1 / (select 0)", broken)
    result = use(folder, retries=1, retry_delay_seconds=0.1).build()
    assert [(node.status, node.attempts) for node in result.nodes if node.kind == "model"] == [("success", 2)]
    assert _attempts(query) == dict.fromkeys(EXPECTED, 1)
