"""Several API processes that do the same at the same moment, on a real Postgres."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import server_forks
from tests.parts import debian_postgres, new_database, rows_of
from tests.server_schema import create_schema

REGISTER = """
import asyncio
from orchestration.prefect_compat.server_internals import database_interface, repeat_block_registration
repeat_block_registration()
from prefect.server.models.block_registration import run_block_auto_registration

async def register():
    async with await database_interface().session() as session:
        await run_block_auto_registration(session=session)

async def main():
    await asyncio.gather(*(register() for _ in range(3)))

asyncio.run(main())
"""

CLAIM = """
import asyncio
from orchestration.prefect_compat.server_internals import database_interface, limit_claims
limit_claims()
from prefect.server import models
from prefect.server.orchestration.core_policy import CoreFlowPolicy
from prefect.server.schemas.actions import WorkPoolCreate, WorkQueueCreate, WorkQueueUpdate
from prefect.server.schemas.core import Flow, FlowRun
from prefect.server.schemas.states import Completed, Pending, Scheduled
db = database_interface()

async def create(session, pool_limit, queue_limits, runs):
    flow = await models.flows.create_flow(session, Flow(name="a"))
    pool = WorkPoolCreate(name=f"limits {pool_limit} {queue_limits}", concurrency_limit=pool_limit)
    pool = await models.workers.create_work_pool(session, pool)
    found = []
    for name, limit in zip("ab", queue_limits):
        queue = WorkQueueCreate(name=name, concurrency_limit=limit)
        queue = await models.workers.create_work_queue(session, pool.id, queue)
        for _ in range(runs):
            run = FlowRun(flow_id=flow.id, work_queue_id=queue.id, state=Scheduled())
            found.append((await models.flow_runs.create_flow_run(session, run)).id)
    return queue.id, found

async def propose(run, state):
    async with db.session_context(begin_transaction=True) as session:
        result = await models.flow_runs.set_flow_run_state(session, run, state, flow_policy=CoreFlowPolicy)
        return result.status.value

async def claim(pool_limit, queue_limit):
    async with db.session_context(begin_transaction=True) as session:
        _, runs = await create(session, pool_limit, [queue_limit], 8)
    statuses = await asyncio.gather(*(propose(run, Pending()) for run in runs))
    await propose(runs[statuses.index("ACCEPT")], Completed())
    again = [await propose(run, Pending()) for run, status in zip(runs, statuses) if status != "ACCEPT"]
    print(statuses.count("ACCEPT"), statuses.count("ABORT"), again.count("ACCEPT"))

async def claim_next_to_a_paused_queue():
    async with db.session_context(begin_transaction=True) as session:
        queue, (waiting, full) = await create(session, 1, [None, None], 1)
    print(await propose(full, Pending()), await propose(waiting, Pending()))
    async with db.session_context(begin_transaction=True) as session:
        await models.workers.update_work_queue(session, queue, WorkQueueUpdate(is_paused=True))
    print(await propose(waiting, Pending()))

async def main():
    for limits in ((3, None), (5, 3), (None, None)):
        await claim(*limits)
    await claim_next_to_a_paused_queue()

asyncio.run(main())
"""


CANCEL = """
import asyncio
from orchestration.prefect_compat.server_internals import database_interface, free_only_held_slots
free_only_held_slots()
from prefect.server import models
from prefect.server.orchestration.core_policy import CoreFlowPolicy
from prefect.server.schemas.core import Deployment, Flow, FlowRun
from prefect.server.schemas.states import AwaitingRetry, Cancelled, Cancelling, Completed, Paused, Pending, Running
from prefect.server.schemas.states import Scheduled
from prefect.types._datetime import now
db = database_interface()

async def create(name):
    async with db.session_context(begin_transaction=True) as session:
        flow = await models.flows.create_flow(session, Flow(name="limited"))
        made = Deployment(name=name, flow_id=flow.id, concurrency_limit=1)
        made = await models.deployments.create_deployment(session, made)
        runs = []
        for _ in range(2):
            run = FlowRun(flow_id=flow.id, deployment_id=made.id, state=Scheduled(), infrastructure_pid="a:b")
            runs.append((await models.flow_runs.create_flow_run(session, run)).id)
        return made.concurrency_limit_id, runs

async def propose(run, *states):
    for state in states:
        state.timestamp = now("UTC")
        async with db.session_context(begin_transaction=True) as session:
            await models.flow_runs.set_flow_run_state(
                session, run, state, flow_policy=CoreFlowPolicy, client_version="3.9.0"
            )

async def active_slots(limit):
    async with db.session_context() as session:
        return (await models.concurrency_limits_v2.read_concurrency_limit(session, limit)).active_slots

async def main():
    limit, (waiting, other) = await create("retry")
    await propose(waiting, Pending(), Running(), AwaitingRetry(scheduled_time=now("UTC")))
    await propose(other, Pending(), Running())
    slots = [await active_slots(limit)]
    await propose(waiting, Cancelling(), Cancelling(), Cancelled())
    slots.append(await active_slots(limit))
    await propose(other, Completed())
    print(*slots, await active_slots(limit))
    limit, (claimed, _) = await create("claimed")
    await propose(claimed, Pending())
    slots = [await active_slots(limit)]
    await propose(claimed, Cancelling(), Cancelled())
    print(*slots, await active_slots(limit))
    retry = AwaitingRetry(scheduled_time=now("UTC"))
    for states in ([Running(), Completed()], [Cancelling(), Cancelling(), Cancelled()], [retry]):
        limit, (paused, _) = await create(states[-1].name)
        await propose(paused, Pending(), Running(), Paused(timeout_seconds=600))
        slots = [await active_slots(limit)]
        for state in states:
            await propose(paused, state)
            slots.append(await active_slots(limit))
        print(*slots)
    limit, (suspended, _) = await create("suspended")
    await propose(suspended, Pending(), Running(), Paused(timeout_seconds=600, reschedule=True))
    print(await active_slots(limit))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """An empty database with the server's schema."""
    with debian_postgres() as postgres, new_database(postgres) as url:
        create_schema(url)
        yield url


def _execute(database: str, folder: Path, code: str) -> str:
    """Execute Python code with a database as a module in this folder, and return the output."""
    url = database.replace("postgresql://", "postgresql+asyncpg://")
    (folder / "code_of_test.py").write_text(code)
    done = server_forks.run(["code_of_test"], os.environ | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}, folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_servers_that_start_at_once_register_all_block_types(database: str, tmp_path: Path) -> None:
    """On an empty database a server whose block type another server has just inserted would end with status 3."""
    _execute(database, tmp_path, REGISTER)
    counts = "select count(*), count(distinct block_type_id), (select count(*) from block_type) from block_schema"
    [(schemas, with_schema, types)] = rows_of(database, counts)
    assert schemas >= with_schema == types > 10


def test_claims_at_once_do_not_exceed_the_limit_of_pool_or_queue(database: str, tmp_path: Path) -> None:
    """A poll during the claims of another worker returns other runs for the same slots.

    As in a poll, runs of a paused queue take no slots of the pool.
    """
    limit_of_pool, limit_of_queue, no_limit, not_paused, paused = _execute(database, tmp_path, CLAIM).splitlines()
    assert limit_of_pool == limit_of_queue == "3 5 1", "a run that has ended has left its slot to one other run"
    assert no_limit == "8 0 0"
    assert not_paused == "ACCEPT ABORT"
    assert paused == "ACCEPT"


def test_slot_is_freed_only_for_its_run_and_once_its_process_is_gone(database: str, tmp_path: Path) -> None:
    """A run that is cancelled while it waits would free the slot of a run in progress."""
    waiting, claimed, resumed, cancelled, rescheduled, suspended = _execute(database, tmp_path, CANCEL).splitlines()
    assert waiting == "1 1 0"
    assert claimed == "1 0"
    assert resumed == "1 1 0", "the process of a paused run renews its lease"
    assert cancelled == "1 1 1 0", "a person may cancel twice"
    assert rescheduled == "1 0"
    assert suspended == "0"
