"""The Prefect server's records of runs, read and changed in its database while no server runs.

After a restore the runs are settled before any process of the server starts, so there is no API to ask.
Each function imports what it needs when it is called: each of these imports takes a second.
"""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from orchestration.prefect_compat import warn_if_untested
from orchestration.protocol import FINAL_STATES

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

Record = dict[str, Any]

KEYS_AT_ONCE = 10_000
"""How many values one statement takes. Postgres accepts 32,767 parameters."""


class UnreadableError(Exception):
    """The replaced database cannot be read."""


@contextlib.asynccontextmanager
async def transaction() -> AsyncIterator["AsyncSession"]:
    """Yield a session in one transaction: all changes of the block are committed, or none.

    Replaces: `PrefectDBInterface.session_context`
    Why: a restored database changes before any server uses it, completely or not at all
    Until: the server can be started on loopback without background services and workers
    """
    import prefect
    from prefect.server.database import provide_database_interface

    warn_if_untested("prefect", prefect.__version__)
    async with provide_database_interface().session_context(begin_transaction=True) as session:
        yield session


async def read_runs(session: "AsyncSession", ids: Collection[str], crashed_since: datetime) -> list[Record]:
    """Return flow runs in the form of the API: those not final or crashed since a time, and those with these ids.

    Each has the type of its work pool as `pool_type`; empty without a pool.

    Replaces: `PrefectDBInterface.FlowRun`, `PrefectDBInterface.WorkQueue`, `prefect.server.schemas.core.FlowRun`
    Why: a restored database changes before any server uses it
    Until: the server can be started on loopback without background services and workers
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface
    from prefect.server.schemas.core import FlowRun

    db = provide_database_interface()
    table = db.FlowRun
    is_crash = sa.and_(table.state_type == "CRASHED", table.end_time >= crashed_since)
    wanted = sa.or_(table.state_type.not_in(FINAL_STATES), is_crash, table.id.in_([UUID(run_id) for run_id in ids]))
    found = await session.execute(sa.select(table).where(wanted).order_by(table.expected_start_time, table.id))
    rows = [row for row in found.scalars() if row.state]  # a run that was created without a state is never executed
    queues = sa.select(db.WorkQueue.id, db.WorkPool.type).join(db.WorkPool, db.WorkPool.id == db.WorkQueue.work_pool_id)
    types = {str(queue): type_ for queue, type_ in await session.execute(queues)}
    return [
        FlowRun.model_validate(row, from_attributes=True).model_dump(mode="json")
        | {"pool_type": types.get(str(row.work_queue_id), "")}
        for row in rows
    ]


async def read_parents(session: "AsyncSession", task_runs: Collection[str]) -> dict[str, str]:
    """Return the flow run of each task run. A subflow's run names the task run of its parent.

    Replaces: `PrefectDBInterface.TaskRun`
    Why: a restored database changes before any server uses it
    Until: the server can be started on loopback without background services and workers
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    table = provide_database_interface().TaskRun
    query = sa.select(table.id, table.flow_run_id).where(table.id.in_([UUID(task_run) for task_run in task_runs]))
    return {str(task): str(run) for task, run in await session.execute(query)}


async def read_newest_state_time(session: "AsyncSession") -> datetime | None:
    """Return when the newest state of a flow run was set; None without any.

    Replaces: `PrefectDBInterface.FlowRunState`
    Why: after a point-in-time recovery to the end of an archive, only the records tell what time that is
    Until: the server keeps a record of runs outside its database
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    table = provide_database_interface().FlowRunState
    found = (await session.execute(sa.select(sa.func.max(table.timestamp)))).scalar()
    return datetime.fromisoformat(str(found)) if found else None


async def read_pools(session: "AsyncSession") -> dict[str, tuple[str, str]]:
    """Return the name and the id of the default queue of each work pool, by the pool's id.

    Replaces: `PrefectDBInterface.WorkPool`
    Why: a restored database changes before any server uses it
    Until: the server can be started on loopback without background services and workers
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    table = provide_database_interface().WorkPool
    return {
        str(pool): (name, str(queue or ""))
        for pool, name, queue in await session.execute(sa.select(table.id, table.name, table.default_queue_id))
    }


async def read_places(session: "AsyncSession") -> tuple[set[str], set[str]]:
    """Return the ids of all deployments, and those of all work queues.

    Replaces: `PrefectDBInterface.Deployment`, `PrefectDBInterface.WorkQueue`
    Why: a run without its deployment or its queue never starts
    Until: the server can be started on loopback without background services and workers
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    db = provide_database_interface()
    deployments, queues = [
        {str(id_) for id_ in (await session.execute(sa.select(table.id))).scalars()}
        for table in (db.Deployment, db.WorkQueue)
    ]
    return deployments, queues


async def read_schedules(session: "AsyncSession") -> list[Record]:
    """Return the active schedules: `id`, `schedule` in the form of the API, `deployment` and its `deployment_id`.

    Replaces: `PrefectDBInterface.DeploymentSchedule`
    Why: a restored database changes before any server uses it
    Until: the server can be started on loopback without background services and workers
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    db = provide_database_interface()
    query = (
        sa.select(db.DeploymentSchedule, db.Deployment.name, db.Flow.name)
        .join(db.Deployment, db.Deployment.id == db.DeploymentSchedule.deployment_id)
        .join(db.Flow, db.Flow.id == db.Deployment.flow_id)
        .where(db.DeploymentSchedule.active.is_(True), db.Deployment.paused.is_not(True))
        .order_by(db.Flow.name, db.Deployment.name)
    )
    return [
        {
            "id": str(row.id),
            "schedule": row.schedule.model_dump(mode="json"),
            "deployment": f"{flow}/{deployment}",
            "deployment_id": str(row.deployment_id),
        }
        for row, deployment, flow in await session.execute(query)
    ]


async def read_keys(session: "AsyncSession", keys: Collection[str]) -> set[str]:
    """Return those of some idempotency keys that a flow run has. The scheduler gives one to each run.

    Replaces: `idempotency_key` of `prefect.server.models.deployments._generate_scheduled_flow_runs`
    Why: the key tells whether a scheduled time has a run
    Until: the Prefect API tells which schedule and time a run is for
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    table = provide_database_interface().FlowRun
    wanted, found = list(keys), set()
    for start in range(0, len(wanted), KEYS_AT_ONCE):
        part = wanted[start : start + KEYS_AT_ONCE]
        query = sa.select(table.idempotency_key).where(table.idempotency_key.in_(part))
        found |= {key for key in (await session.execute(query)).scalars() if key}
    return found


def schedule_key(deployment_id: str, schedule_id: str, date: datetime) -> str:
    """Return the idempotency key of the run of a schedule at a time.

    Replaces: `idempotency_key` of `prefect.server.models.deployments._generate_scheduled_flow_runs`
    Why: the key tells whether a scheduled time has a run
    Until: the Prefect API tells which schedule and time a run is for
    """
    return f"scheduled {deployment_id} {schedule_id} {date}"


async def set_run_state(
    session: "AsyncSession", run: str, state: Mapping[str, Any], labels: Mapping[str, Any], job: str = ""
) -> None:
    """Force a state of a flow run, merge labels into its labels, and record its Job, unless `job` is empty.

    Replaces: `prefect.server.models.flow_runs.set_flow_run_state`
    Why: a restored database changes before any server uses it
    Until: the server can be started on loopback without background services and workers
    """
    from prefect.server import models
    from prefect.server.database import provide_database_interface
    from prefect.server.schemas.states import State

    row = await session.get(provide_database_interface().FlowRun, UUID(run))
    assert row is not None
    row.labels = {**(row.labels or {}), **labels}
    if job:  # before the state: the server sets a Cancelling run without a Job to Cancelled
        row.infrastructure_pid = job
    await session.flush()
    proposed = State.model_validate(state)
    await models.flow_runs.set_flow_run_state(session=session, flow_run_id=UUID(run), state=proposed, force=True)


async def label_run(session: "AsyncSession", run: str, labels: Mapping[str, Any]) -> None:
    """Merge labels into a flow run's labels.

    Replaces: `PrefectDBInterface.FlowRun`
    Why: a restored database changes before any server uses it
    Until: the server can be started on loopback without background services and workers
    """
    from prefect.server.database import provide_database_interface

    row = await session.get(provide_database_interface().FlowRun, UUID(run))
    assert row is not None
    row.labels = {**(row.labels or {}), **labels}


async def create_run(session: "AsyncSession", flow_name: str, fields: Record) -> None:
    """Create a flow run with its id, and its flow if the database has neither the flow's id nor its name.

    A deployment that the database does not have is left out, and so is an idempotency key that another run has.

    Replaces: `prefect.server.models.flow_runs.create_flow_run`
    Why: the Prefect API chooses the id of a new run, and a live pod reports to the id that it has
    Until: the Prefect API takes the id of a new run
    """
    import sqlalchemy as sa
    from prefect.server import models
    from prefect.server.database import provide_database_interface
    from prefect.server.schemas.core import Flow, FlowRun

    db = provide_database_interface()
    # `db_injector` loses the types of these functions.
    create_flow: Any = models.flows.create_flow
    create_flow_run: Any = models.flow_runs.create_flow_run
    by_name = sa.select(db.Flow.id).where(sa.or_(db.Flow.id == UUID(fields["flow_id"]), db.Flow.name == flow_name))
    flow = (await session.execute(by_name)).scalars().first()
    if flow is None:
        made = await create_flow(session, flow=Flow(id=UUID(fields["flow_id"]), name=flow_name))
        flow = made.id
    deployment = fields.get("deployment_id")
    if deployment and await session.get(db.Deployment, UUID(deployment)) is None:
        fields = fields | {"deployment_id": None}
    if (key := fields.get("idempotency_key")) and await read_keys(session, [key]):
        fields = fields | {"idempotency_key": None}
    await create_flow_run(session, flow_run=FlowRun.model_validate(fields | {"flow_id": flow}))


async def reset_slots(session: "AsyncSession", live: Collection[str | None]) -> int:
    """Set the taken slots of all concurrency limits to those of live runs; return how many limits were changed.

    A limit of a deployment counts its live runs. Who held the slots of other limits at the backup has ended, or
    releases them without effect.

    Args:
        session: the session.
        live: the deployment of each live run.

    Replaces: `active_slots` of `PrefectDBInterface.ConcurrencyLimitV2` and `PrefectDBInterface.ConcurrencyLimit`
    Why: the holders of the slots at the backup are gone, and their leases are not in the database
    Until: the server releases slots whose lease it does not know
    """
    import sqlalchemy as sa
    from prefect.server.database import provide_database_interface

    db = provide_database_interface()
    counts = Counter(deployment_id for deployment_id in live if deployment_id)
    deployments = (await session.execute(sa.select(db.Deployment.id, db.Deployment.concurrency_limit_id))).all()
    taken = {limit: counts[str(deployment)] for deployment, limit in deployments if limit}
    changed = 0
    for row in (await session.execute(sa.select(db.ConcurrencyLimitV2))).scalars():
        slots = min(taken.get(row.id, 0), row.limit)
        changed += row.active_slots != slots
        row.active_slots = slots
    for tag in (await session.execute(sa.select(db.ConcurrencyLimit))).scalars():
        changed += bool(tag.active_slots)
        tag.active_slots = []
    return changed


def read_previous_runs(url: str, ids: Collection[str]) -> dict[str, Record]:
    """Return the runs of another database, by their ids: those with some ids, and all that are not final.

    Each has its columns, and `state` with `type`, `name`, `message`, `timestamp` and `state_details`. `pool_type` and
    `pool` are the type and the id of its work pool; empty without a pool.

    Args:
        url: the database that a restore has replaced, as a URL of libpq.
        ids: ids of flow runs.

    Replaces: the tables flow_run, flow_run_state, flow, work_queue and work_pool of the server's database
    Why: the replaced database knows how the runs ended, and may have an older schema than this image
    Until: the server keeps a record of runs outside its database

    Raises:
        UnreadableError: the database is absent or damaged, or is no database of a server.
    """
    import psycopg
    from psycopg.rows import dict_row

    statement = """
        select run.id::text, run.name, run.flow_id::text, flow.name as flow_name, run.deployment_id::text,
               run.parameters, run.idempotency_key, run.tags, run.auto_scheduled, run.job_variables,
               run.work_queue_id::text, run.expected_start_time, run.state_type::text, run.state_name,
               run.created, run.parent_task_run_id::text, run.labels, run.infrastructure_pid,
               state.message, state.timestamp, state.state_details,
               coalesce(pool.type, '') as pool_type, coalesce(pool.id::text, '') as pool
        from flow_run as run
        join flow on flow.id = run.flow_id
        left join flow_run_state as state on state.id = run.state_id
        left join work_queue as queue on queue.id = run.work_queue_id
        left join work_pool as pool on pool.id = queue.work_pool_id
        where run.id = any(%s::uuid[]) or run.state_type::text != all(%s)
    """
    try:
        with psycopg.connect(url, row_factory=dict_row) as connection:
            connection.read_only = True
            rows = connection.execute(statement, [list(ids), [*FINAL_STATES]]).fetchall()
    except psycopg.Error as error:
        raise UnreadableError(str(error).splitlines()[0]) from None
    for row in rows:
        row["state"] = {
            "type": row.pop("state_type"),
            "name": row.pop("state_name"),
            "message": row.pop("message"),
            "timestamp": row.pop("timestamp"),
            "state_details": row.pop("state_details") or {},
        }
    return {row["id"]: row for row in rows if row["state"]["type"]}


def read_previous_pools(url: str) -> dict[str, str]:
    """Return the names of the work pools of another database, by their ids.

    Replaces: the table work_pool of the server's database
    Why: Jobs of runs name the id of their pool, and the pool may be newer than the backup
    Until: the server keeps a record of runs outside its database

    Raises:
        UnreadableError: the database is absent or damaged, or is no database of a server.
    """
    import psycopg

    try:
        with psycopg.connect(url) as connection:
            connection.read_only = True
            return dict(connection.execute("select id::text, name from work_pool").fetchall())
    except psycopg.Error as error:
        raise UnreadableError(str(error).splitlines()[0]) from None


def read_previous_keys(url: str, keys: Collection[str]) -> set[str]:
    """Return those of some idempotency keys that a flow run of another database has which has ended.

    Replaces: the table flow_run of the server's database
    Why: the replaced database knows which scheduled times have a run, and may have an older schema than this image
    Until: the server keeps a record of runs outside its database
    """
    import psycopg

    with psycopg.connect(url) as connection:
        connection.read_only = True
        statement = (
            "select idempotency_key from flow_run where idempotency_key = any(%s) and state_type::text = any(%s)"
        )
        found = connection.execute(statement, [list(keys), [*FINAL_STATES]])
        return {row[0] for row in found}
