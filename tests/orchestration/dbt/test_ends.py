"""A run that is killed, terminated or cancelled: its SQL ends with it, and another attempt goes on from there."""

import os
import random
import signal
from pathlib import Path

import pytest

from orchestration.dbt import DbtProject
from tests.long import dbt_ends
from tests.orchestration.dbt.projects import hold, tables
from tests.orchestration.dbt.task_runs import Server, busy, execute, results_of, start
from tests.parts import Query, wait_until

HELD = "model.shop.countries"


def _sleeps(query: Query) -> bool:
    return bool(
        query(
            "select 1 from pg_stat_activity where query ~ 'pg_sleep' and state = 'active' and pid <> pg_backend_pid()"
        )
    )


def _done(server: Server, run: str) -> list[str]:
    return [task["task_key"] for task in server.get("task_runs", run) if task["state_type"] == "COMPLETED"]


def _state_of(node: str, server: Server, run: str) -> str:
    # A server reads what tasks tell it with a delay: at first it may not know the task.
    return next((str(task["state_name"]) for task in server.get("task_runs", run) if task["task_key"] == node), "")


@pytest.fixture
def held(shop: Path) -> Path:
    """The project with a model that takes a minute."""
    hold(shop, "countries", 60)
    return shop


def _goes_on(shop: Path, query: Query, project: DbtProject, done: list[str]) -> None:
    """What the attempt after that built: nothing twice, and the same in the end as an undisturbed run."""
    assert not set(done) & {node for node in results_of(shop) if not node.startswith("operation.")}
    resumed = tables(query)
    # An append-only log has another row after each build, so that the comparison begins from nothing.
    query("drop schema if exists analytics cascade")
    project.build()
    assert resumed == tables(query)


@pytest.mark.parametrize(
    ("how", "flow"), [(signal.SIGKILL, "daily"), (signal.SIGTERM, "daily"), (signal.SIGTERM, "beside")]
)
def test_a_run_that_is_ended_half_way_goes_on_from_there(
    how: signal.Signals, flow: str, held: Path, prefect_server: str, server: Server, query: Query, project: DbtProject
) -> None:
    process, run = start(held, prefect_server, flow)
    wait_until(lambda: _sleeps(query), "the model", 90)
    done = wait_until(lambda: _done(server, run), "what is done", 30)
    process.send_signal(how)
    wait_until(lambda: busy(query) == 0, "the end of its SQL", 15)
    process.communicate(timeout=30)
    if how == signal.SIGTERM:
        wait_until(lambda: _state_of(HELD, server, run) == "Crashed", "the model's state", 10)
        assert server.state(run)["type"] == "CRASHED"
    if flow == "daily":
        hold(held, "countries", 0)
        again, _ = start(held, prefect_server, "daily", run)
        again.communicate(timeout=120)
        assert again.returncode == 0
        _goes_on(held, query, project, done)


def test_a_run_that_is_cancelled_ends_its_sql_and_may_be_retried(
    held: Path, prefect_server: str, server: Server, query: Query, project: DbtProject
) -> None:
    run = server.start(dbt_ends.deploy(held, prefect_server))
    process = execute(held, prefect_server, run)
    wait_until(lambda: _sleeps(query), "the model", 90)
    done = wait_until(lambda: _done(server, run), "what is done", 30)
    server.set_state(run, "CANCELLING", "Cancelling")
    wait_until(lambda: busy(query) == 0, "the end of its SQL", 15)
    wait_until(lambda: server.state(run)["type"] == "CANCELLED", "the flow run's state", 30)
    process.wait(60)
    wait_until(lambda: _state_of(HELD, server, run) == "Cancelled", "the model's state", 10)

    hold(held, "countries", 0)
    server.set_state(run, "SCHEDULED", "AwaitingRetry")
    assert execute(held, prefect_server, run).wait(120) == 0
    assert server.state(run)["type"] == "COMPLETED"
    _goes_on(held, query, project, done)


def test_runs_that_end_at_random_moments_leave_what_an_undisturbed_one_leaves(
    postgres: str, prefect_server: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each here; `make test-long FOR=dbt-ends` ends twenty, on a machine that does nothing else."""
    monkeypatch.setattr(dbt_ends, "PROMPT", 15.0)
    chance = random.Random(os.getpid())  # noqa: S311 - moments, no secret
    undisturbed = dbt_ends.Undisturbed.measure(postgres, prefect_server, tmp_path)
    for way in dbt_ends.WAYS:
        outcome = dbt_ends.end_at_random(way, postgres, prefect_server, server, undisturbed, tmp_path, chance)
        assert outcome.right, outcome
