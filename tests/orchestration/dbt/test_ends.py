"""A killed, terminated or cancelled run: its SQL ends with it, and the next attempt continues.

Runs end while a model's statement executes. `make test-long FOR=dbt-ends` ends runs at random moments. The dbt of a run
that ends is a new interpreter, that of the next attempt a fork (`forked`).
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
from tests.orchestration.dbt.conftest import LONG, Built, Tiny
from tests.orchestration.dbt.projects import hold, tables
from tests.orchestration.dbt.task_runs import Server, busy, execute, results_of, run_again, start
from tests.parts import Query, random_seed, wait_until

MODELS = (
    "clean_visits", "customer_totals", "order_log", "paid_orders", "revenue_by_day", "tier_names_v2", "yearly_orders",
)  # fmt: skip
"""One model of each materialization, and some that other models depend on."""

ROUNDS = 10 if LONG else 1


class Held(NamedTuple):
    """The project with a random model that takes longer than the test waits for its end."""

    folder: Path
    model: str

    def release(self) -> None:
        """Remove the model's delay."""
        hold(self.folder, self.model, 0)


@pytest.fixture
def held(shop: Path, request: pytest.FixtureRequest) -> Held:
    """Return the project with a held model, which differs between tests."""
    model = random.Random(f"{random_seed()} {request.node.name}").choice(MODELS)  # noqa: S311 - no secret
    hold(shop, model, 1200)
    return Held(shop, model)


@pytest.fixture(autouse=True)
def _kill_children(prefect_server: str, built: Built) -> Iterator[None]:
    """Kill the processes of a failed test: they would disturb the next test, whose database has the same name."""
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
    """Return the finished nodes, without hooks, once the model's statement executes."""
    wait_until(lambda: _sleeps(query), f"the statement of {held.model}", 240)

    def done() -> list[str]:
        completed = [task for task in server.get("task_runs", run) if task["state_type"] == "COMPLETED"]
        return [task["task_key"] for task in completed if "operation" not in task["tags"] and "dbt" in task["tags"]]

    found: list[str] = wait_until(done, "the finished nodes", 240)
    assert _sleeps(query), held
    return found


def _wait_for_end_of_sql(held: Held, query: Query) -> None:
    wait_until(lambda: busy(query) == 0, f"the end of the SQL of {held.model}", 240)


def _wait_for_state(state: str, held: Held, server: Server, run: str) -> None:
    def found() -> bool:
        # The server records task runs with a delay.
        tasks = {task["name"].replace(".v", "_v"): task["state_name"] for task in server.get("task_runs", run)}
        return tasks.get(held.model) == state

    wait_until(found, f"{held.model} to be {state}", 240)


def _assert_continued(held: Held, built: Built, query: Query, done: list[str]) -> None:
    """Check that the attempt built nothing twice, and that the tables equal those of an undisturbed run."""
    assert not set(done) & results_of(held.folder).keys(), held
    assert tables(query) == built.tables, held


@pytest.mark.further
def test_terminated_run_ends_its_sql(held: Held, prefect_server: str, server: Server, query: Query) -> None:
    """dbt runs in the thread of a task, which no signal reaches. A cancelled run is terminated in its main thread."""
    process, run = start(held.folder, prefect_server, "in_task")
    _reached(held, server, run, query)
    process.terminate()
    _wait_for_end_of_sql(held, query)
    process.communicate(timeout=240)
    _wait_for_state("Crashed", held, server, run)
    assert server.state(run)["type"] == "CRASHED"


@pytest.mark.parametrize("number", range(ROUNDS))
def test_killed_run_continues_after_its_finished_nodes(
    number: int, built: Built, held: Held, prefect_server: str, server: Server, query: Query, tiny: Tiny
) -> None:
    process, run = start(held.folder, prefect_server, "daily")
    done = _reached(held, server, run, query)
    [dbt] = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=240)
    assert process.returncode == -signal.SIGKILL
    _wait_for_end_of_sql(held, query)
    wait_until(lambda: not dbt.is_running(), "the end of dbt", 240)

    held.release()
    again = run_again(held.folder, prefect_server, "daily", run, tiny.python)
    assert again.returncode == 0, (held, again)
    _assert_continued(held, built, query, done)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_cancelled_run_ends_its_sql_and_can_be_retried(
    number: int, built: Built, held: Held, prefect_server: str, server: Server, query: Query, tiny: Tiny
) -> None:
    run = server.start(dbt_ends.deploy(prefect_server))
    process = execute(held.folder, prefect_server, run)
    done = _reached(held, server, run, query)
    server.set_state(run, "CANCELLING", "Cancelling")
    _wait_for_end_of_sql(held, query)
    wait_until(lambda: server.state(run)["type"] == "CANCELLED", "the flow run's state", 240)
    process.wait(240)
    _wait_for_state("Cancelled", held, server, run)

    held.release()
    server.set_state(run, "SCHEDULED", "AwaitingRetry")
    assert execute(held.folder, prefect_server, run, tiny.python).wait(480) == 0, held
    assert server.state(run)["type"] == "COMPLETED"
    _assert_continued(held, built, query, done)
