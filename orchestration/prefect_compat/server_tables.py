"""Indexes and settings of the Prefect server's tables in Postgres that its migrations lack.

The module imports what it needs when it is called, as `server_internals` does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

INDEXES = {
    "ix_orchestration_flow_run__deployment_success": (
        "flow_run (deployment_id, end_time) where state_type = 'COMPLETED'"
    ),
    "ix_orchestration_flow_run__deployment_start": (
        "flow_run (deployment_id, coalesce(start_time, expected_start_time))"
    ),
}
"""The first finds the newest success of a deployment, the second the newest runs on a deployment's page."""

GROWING_TABLES = (
    "flow_run", "flow_run_state", "task_run", "task_run_state", "log", "artifact", "events", "event_resources",
)  # fmt: skip

STORAGE_PARAMETERS = {
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_analyze_scale_factor": "0.02",
    "autovacuum_vacuum_insert_scale_factor": "0.05",
}
"""By default a fifth of a table is dead before autovacuum frees it: 4,000,000 of 20,000,000 log lines."""


async def tune_tables(connection: "AsyncConnection", timeout: float) -> tuple[list[str], list[str]]:
    """Create the indexes that are absent, and set the storage parameters that are not set.

    No statement blocks reads or writes of a server that runs. A parameter that an operator has set stays.

    Replaces: the tables and indexes of the server's database
    Why: without the indexes some reads take seconds next to a million runs
    Until: Prefect's migrations create them

    Args:
        connection: is in no transaction, as an index is created concurrently.
        timeout: seconds for each statement. Those of Prefect's settings are for requests.

    Returns:
        The indexes that were created, and the tables whose parameters were set.
    """
    driver: Any = (await connection.get_raw_connection()).driver_connection
    indexes, tables = [], []
    for table in GROWING_TABLES:
        options = await driver.fetchval("select reloptions from pg_class where oid = $1::text::regclass", table)
        names = {option.partition("=")[0] for option in options or []}
        missing = {name: value for name, value in STORAGE_PARAMETERS.items() if name not in names}
        if missing:
            parameters = ", ".join(f"{name} = {value}" for name, value in missing.items())
            await driver.execute(f"alter table {table} set ({parameters})", timeout=timeout)
            tables.append(table)
    for index, definition in INDEXES.items():
        valid = "select indisvalid from pg_index where indexrelid = to_regclass($1::text)"
        is_valid = await driver.fetchval(valid, index)
        if is_valid is False:  # its creation was interrupted
            await driver.execute(f"drop index concurrently {index}", timeout=timeout)
        if not is_valid:
            await driver.execute(f"create index concurrently if not exists {index} on {definition}", timeout=timeout)
            indexes.append(index)
    return indexes, tables
