"""The schema of the Prefect server's database: brought up to date by one process, waited for by the others.

    python -m orchestration.migrations upgrade   # a Job, once for each release
    python -m orchestration.migrations wait      # each of the release's pods, before its server

The database is the one that Prefect's own settings name (`PREFECT_SERVER_DATABASE_*`). A schema that is
newer than this image, as after a rollback, is left as it is.
"""

import asyncio
import contextlib
import functools
import sys
import time
from collections.abc import AsyncIterator, Sequence

from asyncpg import InterfaceError, PostgresError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from orchestration.errors import PipelineError
from orchestration.prefect_compat.server_internals import database_interface, migrations_config

PATIENCE = 900.0
"""Seconds to wait for the database to answer and for the schema to be made."""

LOCK = "select pg_try_advisory_lock(hashtextextended('prefect-orchestration: migrations', 0))"

# What another attempt will not cure: a refused user or password, a database that is not there.
_FINAL = ("28000", "28P01", "3D000")


@functools.cache
def _revisions() -> tuple[str, frozenset[str]]:
    """The newest revision of this image's migrations, and all that it knows."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(migrations_config())
    head = script.get_current_head()
    assert head
    return head, frozenset(revision.revision for revision in script.walk_revisions())


async def _current(connection: AsyncConnection) -> str | None:
    """The database's revision; None if it is empty."""
    if not (await connection.execute(text("select to_regclass('alembic_version')"))).scalar():
        return None
    revision: str | None = (await connection.execute(text("select version_num from alembic_version"))).scalar()
    return revision


@contextlib.asynccontextmanager
async def _connection(deadline: float) -> AsyncIterator[AsyncConnection]:
    """A connection, once the database answers.

    Raises:
        PipelineError: it refuses the user, is not there, or does not answer until the deadline.
    """
    engine = await database_interface().engine()
    where = engine.url.render_as_string(hide_password=True)
    told = False
    while True:
        try:
            connection = await engine.connect()
            break
        except (OSError, DBAPIError, PostgresError, InterfaceError) as error:  # SQLAlchemy wraps some of asyncpg's
            cause = getattr(error, "orig", None) or error
            reason = (str(cause) or type(cause).__name__).splitlines()[0].split(">: ")[-1]
            if getattr(cause, "sqlstate", None) in _FINAL or time.monotonic() > deadline:
                raise PipelineError(
                    f"The server's database {where} cannot be used: {reason}. Check the Secret with its URL or "
                    "password, and that it can be reached from here"
                ) from None
            if not told:
                print(f"Waiting for the database {where}: {reason}", flush=True)
                told = True
            await asyncio.sleep(1)
    try:
        yield connection
    finally:
        await connection.close()


async def _status(connection: AsyncConnection) -> tuple[str | None, bool]:
    """The database's revision, and whether that will do for this image."""
    head, known = _revisions()
    current = await _current(connection)
    await connection.rollback()
    return current, current == head or (current is not None and current not in known)


async def _wait(deadline: float) -> None:
    told = False
    while True:
        async with _connection(deadline) as connection:
            current, good = await _status(connection)
        if good:
            print(f"The schema is at {current}.")
            return
        if time.monotonic() > deadline:
            raise PipelineError(
                f"After {PATIENCE:.0f} s the schema is still at {current or 'nothing'}. "
                "Look at the log of the migrations' Job"
            )
        if not told:
            print(f"The schema is at {current or 'nothing'}: waiting for the migrations.", flush=True)
            told = True
        await asyncio.sleep(1)


async def _lock(connection: AsyncConnection, deadline: float) -> None:
    """Wait for the lock outside a transaction: a migration that creates an index concurrently waits for transactions.

    Raises:
        PipelineError: another process holds the lock until the deadline.
    """
    while not (await connection.execute(text(LOCK))).scalar():
        await connection.rollback()
        if time.monotonic() > deadline:
            raise PipelineError(
                f"The schema cannot be upgraded: another process has done so for {PATIENCE:.0f} s. "
                "Look at the logs of the migrations' Jobs"
            )
        await asyncio.sleep(1)
    await connection.rollback()


async def _upgrade(deadline: float) -> None:
    async with _connection(deadline) as connection:
        # Two releases on one database at once: the second finds the work done. The lock is the session's.
        await _lock(connection, deadline)
        before, good = await _status(connection)
        if not good:
            await database_interface().run_migrations_upgrade()
        after, _ = await _status(connection)
    changed = f"went from {before or 'nothing'} to" if before != after else "is at"
    print(f"The schema {changed} {after}.")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    commands = {"upgrade": _upgrade, "wait": _wait}
    if len(arguments) != 1 or arguments[0] not in commands:
        print("usage: python -m orchestration.migrations upgrade | wait", file=sys.stderr)
        return 2
    try:
        asyncio.run(commands[arguments[0]](time.monotonic() + PATIENCE))
    except PipelineError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
