"""Old records of the Prefect server, deleted in its Postgres by batches.

Each function deletes one batch in one transaction. It walks over the records by age, and returns the place where the
next batch begins. A record that stays is read once in a walk, and not by each batch.

The module imports what it needs when it is called, as `server_internals` does.
"""

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from orchestration.prefect_compat.server_internals import database_interface
from orchestration.protocol import FINAL_STATES

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

Place = tuple[datetime, UUID]
"""The time and the id of a record. Records at later places are younger."""

OLDEST: Place = (datetime(1970, 1, 1, tzinfo=UTC), UUID(int=0))

APPLICATION = "prefect-retention"
"""The name of a batch's session in pg_stat_activity."""

LOCK_TIMEOUT_MS = 500
"""How long a batch waits for a lock that another transaction holds."""

TYPICAL_ROWS = 4
"""Rows of a run with its task runs and artifacts. A batch reads this many times fewer runs than it may delete rows."""


class Batch(NamedTuple):
    """Holds the number of records that a batch has deleted, and the place of the next one; None at the end."""

    deleted: int
    next: Place | None


_FINAL = f"({', '.join(repr(state) for state in sorted(FINAL_STATES))})"

# A statement sees the rows that it deletes. `gone` has the deleted artifacts.
_COLLECTIONS = """
moved as (
    update artifact_collection set latest_id = newest.id, data = newest.data, description = newest.description,
        type = newest.type, created = newest.created, updated = newest.updated, flow_run_id = newest.flow_run_id,
        task_run_id = newest.task_run_id, metadata_ = newest.metadata_
    from artifact_collection old cross join lateral (
        select * from artifact
        where artifact.key = old.key and artifact.id not in (select id from gone)
        order by artifact.created desc limit 1
    ) newest
    where artifact_collection.id = old.id and old.latest_id in (select id from gone)
), removed as (
    delete from artifact_collection
    where latest_id in (select id from gone) and not exists (
        select from artifact
        where artifact.key = artifact_collection.key and artifact.id not in (select id from gone)
    )
)
"""

_RUNS = f"""
with page as materialized (
    select run.id, run.end_time, run.state_type in {_FINAL} and run.parent_task_run_id is null and not (
        run.state_type = 'COMPLETED'
        and exists (select from deployment where deployment.id = run.deployment_id)
        and not exists (
            select from flow_run newer
            where newer.deployment_id = run.deployment_id and newer.state_type = 'COMPLETED'
            and newer.end_time >= run.end_time and (newer.end_time, newer.id) > (run.end_time, run.id)
        )
    ) as is_expired
    from flow_run run
    where run.end_time < :before and (run.end_time, run.id) > (:time, :id)
    order by run.end_time, run.id limit :runs
), locked as materialized (
    select run.id, 1
        + (select count(*) from (select from task_run where task_run.flow_run_id = run.id limit :rows) counted)
        + (select count(*) from (select from artifact where artifact.flow_run_id = run.id limit :rows) counted) as rows
    from flow_run run
    where run.id in (select id from page where is_expired)
    and run.state_type in {_FINAL} and run.parent_task_run_id is null
    for update skip locked
), summed as materialized (
    select page.id, page.end_time, locked.id as locked_id,
        coalesce(sum(locked.rows) over (order by page.end_time, page.id), 0) <= :rows as fits
    from page left join locked on locked.id = page.id
), deleted as (
    delete from flow_run where id in (select locked_id from summed where fits) returning 1
), gone as (
    delete from artifact where flow_run_id in (select locked_id from summed where fits) returning id
), {_COLLECTIONS}
select (select count(*) from deleted), (select count(*) from summed), (select count(*) from summed where fits),
    end_time, id
from summed order by fits desc, case when fits then end_time end desc, case when fits then id end desc, end_time, id
limit 1
"""  # noqa: S608 - of constants alone

_SHRINK = f"""
with locked as materialized (
    select id from flow_run where id = :run and state_type in {_FINAL} for update skip locked
), tasks as (
    delete from task_run where id in (
        select id from task_run where flow_run_id in (select id from locked) limit :rows
    )
), gone as (
    delete from artifact where id in (
        select id from artifact where flow_run_id in (select id from locked) limit :rows
    ) returning id
), {_COLLECTIONS}
select (select count(*) from locked)
"""  # noqa: S608 - of constants alone

_TASK_RUNS = f"""
with page as materialized (
    select id, end_time, flow_run_id from task_run
    where end_time < :before and (end_time, id) > (:time, :id) order by end_time, id limit :rows
), deleted as (
    delete from task_run using page
    where task_run.id = page.id and page.flow_run_id is null and task_run.state_type in {_FINAL}
    returning 1
)
select (select count(*) from deleted), count(*) over (), end_time, id
from page order by end_time desc, id desc limit 1
"""  # noqa: S608 - of constants alone

_LOGS = f"""
with page as materialized (
    select id, timestamp, flow_run_id from log
    where timestamp < :before and (timestamp, id) > (:time, :id) order by timestamp, id limit :rows
), deleted as (
    delete from log using page left join flow_run run on run.id = page.flow_run_id
    where log.id = page.id and (
        run.id is null and page.flow_run_id is not null and page.timestamp < :orphans_before
        or (run.id is null or run.state_type in {_FINAL}) and page.timestamp < :all_before
    )
    returning 1
)
select (select count(*) from deleted), count(*) over (), timestamp, id
from page order by timestamp desc, id desc limit 1
"""  # noqa: S608 - of constants alone

_ARTIFACTS = f"""
with page as materialized (
    select id, updated, flow_run_id from artifact
    where updated < :before and (updated, id) > (:time, :id) order by updated, id limit :rows
), gone as (
    delete from artifact using page left join flow_run run on run.id = page.flow_run_id
    where artifact.id = page.id and artifact.updated < :before
    and (run.id is null or run.state_type in {_FINAL})
    and not exists (select from flow_run_state where flow_run_state.result_artifact_id = page.id)
    and not exists (select from task_run_state where task_run_state.result_artifact_id = page.id)
    returning artifact.id
), {_COLLECTIONS}
select (select count(*) from gone), count(*) over (), updated, id from page order by updated desc, id desc limit 1
"""  # noqa: S608 - of constants alone


async def delete_runs(before: datetime, place: Place, rows: int) -> Batch:
    """Delete flow runs that ended before a time, with their task runs, states, inputs and artifacts.

    A run that is not final stays, and so does the newest Completed run of each deployment. A subflow's run stays until
    its parent's run is deleted. A run that another transaction changes at this moment is left to the next walk.

    Replaces: `prefect.server.services.db_vacuum.vacuum_old_flow_runs`
    Why: it deletes the last successful run of a deployment, and reads the young runs again for each batch
    Until: the server's vacuum keeps the newest runs of each deployment

    Args:
        before: delete runs that ended before this time.
        place: where the batch begins.
        rows: how many runs, task runs and artifacts to delete, at most. A run that has more first loses so many of its
            task runs and artifacts, and the next batch begins at the same run.
    """
    runs = max(1, rows // TYPICAL_ROWS)
    async with _session() as connection:
        found = await _read(connection, _RUNS, before=before, time=place[0], id=place[1], runs=runs, rows=rows)
        if not found:
            return Batch(0, None)
        deleted, read, fitting, ended, id_ = found
        if not fitting:
            await _read(connection, _SHRINK, run=id_, rows=rows)
            return Batch(0, place)
        return Batch(deleted, None if fitting == read < runs else (ended, id_))


async def delete_task_runs(before: datetime, place: Place, rows: int) -> Batch:
    """Delete final task runs without a flow run (`task.delay()`) that ended before a time, with their states.

    Replaces: the table task_run of the server's database
    Why: the server never deletes them
    Until: the server's vacuum deletes them
    """
    return await _walk(_TASK_RUNS, place, rows, before=before)


async def delete_logs(before: datetime | None, runs_before: datetime | None, place: Place, rows: int) -> Batch:
    """Delete the log lines before a time, except those of unfinished runs; and those of runs that are deleted.

    Replaces: the tables log and flow_run of the server's database
    Why: the server deletes the logs of a run with the run, never earlier
    Until: the server's vacuum has an age for logs

    Args:
        before: delete lines before this time; None for no line of an existing run.
        runs_before: delete lines of deleted runs before this time; None for none of them.
        place: where the batch begins.
        rows: how many lines to read, and to delete at most.
    """
    times = {"all_before": before or OLDEST[0], "orphans_before": runs_before or OLDEST[0]}
    return await _walk(_LOGS, place, rows, before=max(times.values()), **times)


async def delete_artifacts(before: datetime, place: Place, rows: int) -> Batch:
    """Delete artifacts that have not changed since a time, except those of unfinished runs and results of runs.

    Replaces: the tables artifact and artifact_collection of the server's database
    Why: the server deletes the artifacts of a run with the run, never earlier
    Until: the server's vacuum has an age for artifacts
    """
    return await _walk(_ARTIFACTS, place, rows, before=before)


async def _walk(statement: str, place: Place, rows: int, **times: datetime) -> Batch:
    """Run a statement that returns the numbers of deleted and read records, and the place of the last."""
    async with _session() as connection:
        found = await _read(connection, statement, time=place[0], id=place[1], rows=rows, **times)
    if not found:
        return Batch(0, None)
    deleted, read, time, id_ = found
    return Batch(deleted, (time, id_) if read == rows else None)


async def _read(connection: "AsyncConnection", statement: str, **parameters: Any) -> Any:
    """Run a statement and return its first row; None without one."""
    import sqlalchemy as sa

    return (await connection.execute(sa.text(statement), parameters)).first()


@contextlib.asynccontextmanager
async def _session() -> "AsyncIterator[AsyncConnection]":
    """Yield a connection in a transaction that waits for no lock longer than the timeout."""
    import sqlalchemy as sa

    engine = await database_interface().engine()
    # PgBouncer may use the same session for another client's next transaction, so the settings end with this one.
    settings = {"lock_timeout": str(LOCK_TIMEOUT_MS), "application_name": APPLICATION}
    chosen = ", ".join(f"set_config('{name}', '{value}', true)" for name, value in settings.items())
    async with engine.begin() as connection:
        await connection.execute(sa.text(f"select {chosen}"))
        yield connection
