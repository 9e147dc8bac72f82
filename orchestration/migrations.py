"""Upgrade the schema of the Prefect server's database, or wait until another process has upgraded it.

    python -m orchestration.migrations upgrade   # a Job, once for each release
    python -m orchestration.migrations wait      # each of the release's pods, before its server

Prefect's settings name the database (`PREFECT_SERVER_DATABASE_*`). A schema that is newer than this image, as after a
rollback, does not change. `wait` may connect through PgBouncer. `upgrade` never does: its session holds a lock. After
Prefect's migrations, `upgrade` adds indexes and autovacuum settings of this project.

With tenacity the wait loops would be no shorter: each logs its first wait, and ends early on a permanent error.
"""

import asyncio
import contextlib
import functools
import logging
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from asyncpg import InterfaceError, PostgresError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from orchestration import logs, pgbouncer
from orchestration.errors import PipelineError
from orchestration.prefect_compat.server_internals import database_interface, migrations_config
from orchestration.prefect_compat.server_tables import tune_tables

if TYPE_CHECKING:
    from alembic.runtime.migration import RevisionStep

logger = logging.getLogger("orchestration.migrations")  # __name__ is __main__ here

TIMEOUT_SECONDS = 900.0
"""How long to wait for the database to answer and for the upgrade of the schema."""

_KEY = "hashtextextended('prefect-orchestration: migrations', 0)"

LOCK = f"select pg_try_advisory_lock({_KEY})"

IS_LOCKED = f"""
    select exists (select from pg_locks where locktype = 'advisory' and granted and objsubid = 1
                   and database = (select oid from pg_database where datname = current_database())
                   and ((classid::bigint << 32) | objid::bigint) = {_KEY})
"""  # noqa: S608 - the key is a constant

_PERMANENT_ERRORS = ("28000", "28P01", "3D000")
"""SQL states that no other attempt cures: a refused user, a refused password, a database that does not exist."""


@functools.cache
def _revisions() -> tuple[str, frozenset[str]]:
    """Return the newest revision of this image's migrations, and all revisions that this image knows."""
    from alembic.script import ScriptDirectory

    script = ScriptDirectory.from_config(migrations_config())
    head = script.get_current_head()
    assert head
    return head, frozenset(revision.revision for revision in script.walk_revisions())


async def _read_revision(connection: AsyncConnection) -> str | None:
    """Return the database's revision; None if the database is empty."""
    if not (await connection.execute(text("select to_regclass('alembic_version')"))).scalar():
        return None
    revision: str | None = (await connection.execute(text("select version_num from alembic_version"))).scalar()
    return revision


def _explain(error: BaseException) -> tuple[BaseException, str]:
    """Return the driver's error below an error, and the first line of its text."""
    cause = getattr(error, "orig", None) or error
    return cause, (str(cause) or type(cause).__name__).splitlines()[0].split(">: ")[-1]


@contextlib.asynccontextmanager
async def _connection(deadline: float) -> AsyncIterator[AsyncConnection]:
    """Open a connection once the database answers.

    Args:
        deadline: when to give up, on the clock of `time.monotonic`.

    Raises:
        PipelineError: the database refuses the user, does not exist, or does not answer until the deadline.
    """
    engine = await database_interface().engine()
    url = engine.url.render_as_string(hide_password=True)
    is_logged = False
    while True:
        try:
            connection = await engine.connect()
            break
        except (OSError, DBAPIError, PostgresError, InterfaceError) as error:  # SQLAlchemy wraps some of asyncpg's
            cause, reason = _explain(error)
            if getattr(cause, "sqlstate", None) in _PERMANENT_ERRORS or time.monotonic() > deadline:
                raise PipelineError(
                    f"The server's database {url} cannot be used: {reason}. Check the Secret with its URL or "
                    "password, and that it can be reached from here"
                ) from None
            if not is_logged:
                logger.info("Waiting for the database %s: %s", url, reason)
                is_logged = True
            await asyncio.sleep(1)
    try:
        yield connection
    finally:
        await connection.close()


async def _check_revision(connection: AsyncConnection) -> tuple[str | None, bool]:
    """Return the database's revision, and whether this image's server can use that revision."""
    head, known = _revisions()
    current = await _read_revision(connection)
    await connection.rollback()
    return current, current == head or (current is not None and current not in known)


async def _wait(deadline: float) -> None:
    """Wait until another process has upgraded the schema.

    Raises:
        PipelineError: the schema is not upgraded until the deadline.
    """
    pgbouncer.use_pgbouncer()
    is_logged = False
    while True:
        async with _connection(deadline) as connection:
            current, is_usable = await _check_revision(connection)
        if is_usable:
            logger.info("The schema is at %s.", current)
            return
        if time.monotonic() > deadline:
            raise PipelineError(
                f"After {TIMEOUT_SECONDS:.0f} s the schema is still at {current or 'nothing'}. "
                "Look at the log of the migrations' Job"
            )
        if not is_logged:
            logger.info("The schema is at %s: waiting for the migrations.", current or "nothing")
            is_logged = True
        await asyncio.sleep(1)


async def _lock(connection: AsyncConnection, deadline: float) -> None:
    """Take the lock outside a transaction: a migration that creates an index concurrently waits for transactions.

    Raises:
        PipelineError: another process holds the lock until the deadline.
    """
    while not (await connection.execute(text(LOCK))).scalar():
        await connection.rollback()
        if time.monotonic() > deadline:
            raise PipelineError(
                f"The schema cannot be upgraded: another process has held the lock for {TIMEOUT_SECONDS:.0f} s. "
                "Look at the logs of the migrations' Jobs"
            )
        await asyncio.sleep(1)
    await connection.rollback()


async def look() -> tuple[bool, str | None]:
    """Return whether a process upgrades the schema of the database that the settings name, and the schema's revision.

    A SQLite database is the file of one server, which upgrades it before it starts: it has no revision here.
    """
    engine = await database_interface().engine()
    if engine.dialect.name != "postgresql":
        return False, None
    async with engine.connect() as connection:
        is_locked = bool((await connection.execute(text(IS_LOCKED))).scalar())
        return is_locked, await _read_revision(connection)


class _Progress(logging.Handler):
    """Logs each migration and how long it took, from what Alembic logs when a migration begins.

    Attributes:
        current: the revision of the migration that runs; empty if none does.
        schema: the revision of the schema.
    """

    def __init__(self, schema: str) -> None:
        super().__init__()
        self.current, self.schema = "", schema
        self._began = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Log that a migration begins. So the one before has ended."""
        if record.msg == "Running %s" and isinstance(record.args, tuple):
            self.end()
            step = cast("RevisionStep", record.args[0])
            [self.current] = step.to_revisions
            self._began = time.monotonic()
            logger.info("Migration %s begins: %s", self.current, step.doc)

    def end(self) -> None:
        """Log how long the migration took, if one has run."""
        if self.current:
            logger.info("Migration %s took %.2f s.", self.current, time.monotonic() - self._began)
            self.current, self.schema = "", self.current


@contextlib.contextmanager
def _logged_migrations(schema: str) -> Iterator[None]:
    """Log the migrations that run in the block.

    Raises:
        PipelineError: a migration failed.
    """
    alembic, progress = logging.getLogger("alembic.runtime.migration"), _Progress(schema)
    alembic.addHandler(progress)
    alembic.setLevel(logging.INFO)
    alembic.propagate = False
    try:
        yield
        progress.end()
    except (OSError, DBAPIError, PostgresError, InterfaceError) as error:
        failed = f"Migration {progress.current}" if progress.current else "The upgrade of the schema"
        raise PipelineError(
            f"{failed} failed: {_explain(error)[1]}. The schema stays at {progress.schema}, and a server of the former "
            "release keeps serving. Cure the cause, and deploy again"
        ) from None
    finally:
        alembic.removeHandler(progress)


async def _upgrade(deadline: float) -> None:
    """Upgrade the schema, unless another process has upgraded it.

    Raises:
        PipelineError: a migration failed. The schema has the migrations before it.
    """
    async with _connection(deadline) as connection:
        # The session holds the lock. Of two releases that upgrade one database, the second finds the work done.
        await _lock(connection, deadline)
        before, is_usable = await _check_revision(connection)
        if not is_usable:
            # The migrations of an empty database are more than a hundred, and take seconds.
            with _logged_migrations(before) if before else contextlib.nullcontext():
                await database_interface().run_migrations_upgrade()
        after, _ = await _check_revision(connection)
        if after in _revisions()[1]:
            await _tune(connection, deadline)
    if before == after:
        logger.info("The schema is at %s.", after)
    else:
        logger.info("The schema went from %s to %s.", before or "nothing", after)


async def _tune(connection: AsyncConnection, deadline: float) -> None:
    """Add indexes and settings of tables. The server runs without them, so that an error is only logged."""
    try:
        indexes, tables = await tune_tables(connection, max(deadline - time.monotonic(), 1))
    except (OSError, PostgresError, InterfaceError) as error:
        message = "Indexes and autovacuum settings are not complete: %s. The next upgrade tries again."
        logger.warning(message, _explain(error)[1])
        return
    added = [", ".join(indexes), f"autovacuum settings of {len(tables)} tables" if tables else ""]
    if indexes or tables:
        logger.info("Added %s.", " and ".join(filter(None, added)))


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    commands = {"upgrade": _upgrade, "wait": _wait}
    if len(arguments) != 1 or arguments[0] not in commands:
        print("usage: python -m orchestration.migrations upgrade | wait", file=sys.stderr)
        return 2
    command = commands[arguments[0]]
    return logs.run_component(logger.name, lambda: asyncio.run(command(time.monotonic() + TIMEOUT_SECONDS)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
