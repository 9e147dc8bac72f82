"""Put a restored database in the place of the server's database, once its runs are settled.

The backup is restored next to the server's database, as NAME_restored. It is migrated and settled there, and then the
two databases are renamed in one transaction. So no server ever sees runs that are not settled, and until the renaming
nothing of the server has changed.
"""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import psycopg
from psycopg import sql
from sqlalchemy.engine import make_url

from orchestration.errors import PipelineError
from orchestration.prefect_compat.server_internals import database_url
from orchestration.recovery.server_database import libpq_url

SUFFIX = "_restored"
"""The suffix of the database into which the script `backup` restores."""

MAINTENANCE_DATABASE = "postgres"
"""The database that a session uses while it renames others."""

ADDRESS = frozenset(
    f"PREFECT_{prefix}DATABASE_{part}"
    for prefix in ("SERVER_", "API_")
    for part in ("CONNECTION_URL", "DRIVER", "HOST", "PORT", "NAME", "USER", "PASSWORD")
)
"""The variables that name the server's database. All others, such as timeouts, hold for the restored database, too."""

RENAME_SECONDS = 30.0
"""For how long the renaming is tried again because another session has connected."""

CLOSING_SECONDS = 5.0
"""How long sessions that this module's processes have closed may still be listed."""


class RestoreError(PipelineError):
    """A restore that changed nothing."""


def finish(backup: datetime, stopped: str, executions: Path | None, *, start_unknown: bool) -> None:
    """Migrate and settle the restored database, and put it in the place of the server's.

    Args:
        backup: the time of the backup.
        stopped: since when no worker claims runs.
        executions: the Jobs and pods of runs; None if there are none.
        start_unknown: start due runs that may have been executed before.

    Raises:
        RestoreError: a step failed. The server's database is as it was.
    """
    url = make_url(database_url())
    assert url.database
    begun = read_time()
    restored = url.set(database=url.database + SUFFIX)
    environment = variables_for(os.environ, restored.render_as_string(hide_password=False))
    _run(environment, "orchestration.migrations", "upgrade")
    _analyze(url.database + SUFFIX)
    options = ["--backup", backup.isoformat(), "--replaced", url.database]
    options += ["--stopped", stopped] if stopped else []
    options += ["--executions", str(executions)] if executions else []
    options += ["--start-unknown"] if start_unknown else []
    _run(environment, "orchestration", "settle", *options)
    replaced = f"{url.database}_replaced_{datetime.now(UTC):%Y%m%dt%H%M%S}"
    refuse_if_used(url.database, begun)
    swap(url.database, replaced)
    print(f"The replaced database is kept as {replaced}.", file=sys.stderr)


def variables_for(variables: Mapping[str, str], url: str) -> dict[str, str]:
    """Return the variables of a process that uses another database than the server's."""
    # The parts of an address (PREFECT_SERVER_DATABASE_HOST and others) would win over the URL.
    others = {name: value for name, value in variables.items() if name not in ADDRESS}
    return others | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}


def _analyze(name: str) -> None:
    """Collect the statistics that a restore does not bring: without them, statements on large tables may time out."""
    try:
        with psycopg.connect(libpq_url(name), autocommit=True) as connection:
            connection.execute("analyze")
    except psycopg.Error as error:
        raise RestoreError(f"The database {name} cannot be analyzed: {str(error).splitlines()[0]}") from None


def _run(environment: Mapping[str, str], module: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, *arguments], env=dict(environment), check=False)
    if done.returncode not in (0, 2):  # 2: a person has to look at some runs
        raise RestoreError(f"`{module} {arguments[0]}` failed, see above. The server's database is unchanged")


def read_time() -> datetime:
    """Return the time of the database server's clock.

    Raises:
        RestoreError: the database server does not answer.
    """
    try:
        with psycopg.connect(libpq_url(MAINTENANCE_DATABASE)) as connection:
            [time_] = connection.execute("select clock_timestamp()").fetchone() or []
    except psycopg.Error as error:
        raise RestoreError(f"The database server cannot be used: {str(error).splitlines()[0]}") from None
    assert isinstance(time_, datetime)
    return time_


def refuse_if_used(name: str, since: datetime) -> None:
    """Refuse to replace a database that a process with the server's login uses.

    A session of a server that has been stopped may still be open, but executes nothing. A running server's does.

    Args:
        name: the server's database.
        since: when the restore began to use the databases, on the clock of the database server.

    Raises:
        RestoreError: such a session has executed something since. Nothing has changed.
    """
    used = (
        "select coalesce(host(client_addr), 'local'), application_name from pg_stat_activity where datname = %s"
        " and pid != pg_backend_pid() and pg_has_role(usesysid, 'usage') and state_change > %s"
    )
    deadline = time.monotonic() + CLOSING_SECONDS
    while True:
        with psycopg.connect(libpq_url(MAINTENANCE_DATABASE)) as connection:
            connection.execute("set role none")
            found = connection.execute(used, [name, since]).fetchall()
        if not found:
            return
        if time.monotonic() > deadline:
            place = " ".join(filter(None, found[0]))
            raise RestoreError(
                f"The database {name} is in use by a process with the server's login, from {place}. "
                "Stop whatever uses it, first the server's pods, and restore again"
            )
        time.sleep(1)


def swap(name: str, replaced: str) -> None:
    """Rename the server's database, and give its name to the restored one, in one transaction.

    Raises:
        RestoreError: the databases cannot be renamed. Neither is.
    """
    # Only a superuser may end others' sessions. The renaming itself ends autovacuum's, and fails while there are more.
    # The rights to end sessions are those of the login, not of the role that it takes when it connects.
    end_sessions = (
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = any(%s) and pg_has_role(usesysid, 'usage')"
    )
    rename = sql.SQL("alter database {} rename to {}")
    deadline = time.monotonic() + RENAME_SECONDS
    while True:
        try:
            with psycopg.connect(libpq_url(MAINTENANCE_DATABASE)) as connection:
                connection.execute("set role none")
                connection.execute(end_sessions, [[name, name + SUFFIX]])
                connection.execute("reset role")
                connection.execute(rename.format(sql.Identifier(name), sql.Identifier(replaced)))
                connection.execute(rename.format(sql.Identifier(name + SUFFIX), sql.Identifier(name)))
            return
        except psycopg.errors.ObjectInUse as error:
            if time.monotonic() > deadline:
                raise RestoreError(
                    f"The database {name} is in use: {error}. Stop whatever connects to it, and restore again"
                ) from None
            time.sleep(1)
        except psycopg.Error as error:
            cause = str(error).splitlines()[0]
            raise RestoreError(
                f"The database {name} cannot be renamed: {cause}. Its user has to own it and have the right CREATEDB"
            ) from None
