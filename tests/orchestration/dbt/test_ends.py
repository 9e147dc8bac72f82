"""A run that is killed, terminated or cancelled: its SQL ends with it, and another attempt goes on from there.

What ends it does so while a model's statement executes. `make dbt-ends` ends runs at moments of the clock.
"""

import contextlib
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.long import dbt_ends
from tests.orchestration.dbt.conftest import LONG, Built
from tests.orchestration.dbt.projects import hold, tables
from tests.orchestration.dbt.task_runs import Server, busy, execute, results_of, start
from tests.parts import Query, wait_until

MODELS = (
    "clean_visits", "customer_totals", "order_log", "paid_orders", "revenue_by_day", "tier_names_v2", "yearly_orders",
)  # fmt: skip
"""One of each materialization, and some that others wait for."""

ROUNDS = 10 if LONG else 1


class Held(NamedTuple):
    """The project with a model, another one each time, that takes longer than a test waits for its end."""

    folder: Path
    model: str

    def let_go(self) -> None:
        """Have the model take as long as it does."""
        hold(self.folder, self.model, 0)


@pytest.fixture
def held(shop: Path) -> Held:
    """That project."""
    model = random.SystemRandom().choice(MODELS)
    hold(shop, model, 1200)
    return Held(shop, model)


@pytest.fixture(autouse=True)
def _nothing_is_left(prefect_server: str, built: Built) -> Iterator[None]:
    """A test that failed leaves no process to disturb the next one, whose database has the same name."""
    before = psutil.Process().children(recursive=True)
    yield
    for process in psutil.Process().children(recursive=True):
        if process not in before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _sleeps(query: Query) -> bool:
    return bool(
        query(
            "select 1 from pg_stat_activity where query ~ 'pg_sleep' and state = 'active' and pid <> pg_backend_pid()"
        )
    )


def _reached(held: Held, server: Server, run: str, query: Query) -> list[str]:
    """The nodes that are done, hooks apart, when the model's statement executes."""
    wait_until(lambda: _sleeps(query), f"the statement of {held.model}", 240)

    def done() -> list[str]:
        completed = [task for task in server.get("task_runs", run) if task["state_type"] == "COMPLETED"]
        return [task["task_key"] for task in completed if "operation" not in task["tags"] and "dbt" in task["tags"]]

    found: list[str] = wait_until(done, "what is done", 240)
    assert _sleeps(query), held
    return found


def _ends(held: Held, query: Query) -> None:
    wait_until(lambda: busy(query) == 0, f"the end of the SQL of {held.model}", 240)


def _state_is(state: str, held: Held, server: Server, run: str) -> None:
    def found() -> bool:
        # A server reads what tasks tell it with a delay: at first it may not know the task.
        tasks = {task["name"].replace(".v", "_v"): task["state_name"] for task in server.get("task_runs", run)}
        return tasks.get(held.model) == state

    wait_until(found, f"{held.model} to be {state}", 240)


def _goes_on(held: Held, built: Built, query: Query, done: list[str]) -> None:
    """What the attempt after that built: nothing twice, and the same in the end as an undisturbed run."""
    assert not set(done) & results_of(held.folder).keys(), held
    assert tables(query) == built.tables, held


@pytest.mark.parametrize("flow", ["daily", "beside"])
def test_a_run_that_is_terminated_ends_its_sql(
    flow: str, held: Held, prefect_server: str, server: Server, query: Query
) -> None:
    process, run = start(held.folder, prefect_server, flow)
    _reached(held, server, run, query)
    process.terminate()
    _ends(held, query)
    process.communicate(timeout=240)
    _state_is("Crashed", held, server, run)
    assert server.state(run)["type"] == "CRASHED"


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_run_that_is_killed_goes_on_from_there(
    number: int, built: Built, held: Held, prefect_server: str, server: Server, query: Query
) -> None:
    process, run = start(held.folder, prefect_server, "daily")
    done = _reached(held, server, run, query)
    [dbt] = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    _ends(held, query)
    wait_until(lambda: not dbt.is_running(), "the end of dbt", 240)

    held.let_go()
    again, _ = start(held.folder, prefect_server, "daily", run)
    again.communicate(timeout=480)
    assert again.returncode == 0, held
    _goes_on(held, built, query, done)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_run_that_is_cancelled_ends_its_sql_and_may_be_retried(
    number: int, built: Built, held: Held, prefect_server: str, server: Server, query: Query
) -> None:
    run = server.start(dbt_ends.deploy(held.folder, prefect_server))
    process = execute(held.folder, prefect_server, run)
    done = _reached(held, server, run, query)
    server.set_state(run, "CANCELLING", "Cancelling")
    _ends(held, query)
    wait_until(lambda: server.state(run)["type"] == "CANCELLED", "the flow run's state", 240)
    process.wait(240)
    _state_is("Cancelled", held, server, run)

    held.let_go()
    server.set_state(run, "SCHEDULED", "AwaitingRetry")
    assert execute(held.folder, prefect_server, run).wait(480) == 0, held
    assert server.state(run)["type"] == "COMPLETED"
    _goes_on(held, built, query, done)
