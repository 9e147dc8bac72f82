"""Connect to the warehouse: the Postgres that holds the raw data and dbt's models.

`WAREHOUSE_URL` names a Postgres, 15 or later. Without `WAREHOUSE_URL`, an embedded PostgreSQL starts under
`WAREHOUSE_DIR` at first use (:mod:`orchestration.local.embedded_postgres`). Flow, dbt and psql connect to the same
Postgres, because all of them get libpq's variables (`PGHOST`, `PGDATABASE`, ...) from :func:`environment`.

    python -m orchestration.warehouse exec COMMAND ...   # run COMMAND with those variables
    python -m orchestration.warehouse stop               # stop the embedded server
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict

from orchestration.errors import PipelineError, WarehouseError
from orchestration.local import embedded_postgres
from orchestration.settings import settings

CLIENT_OPTIONS = "-c client_connection_check_interval=2000"
"""Make Postgres check every 2 s that the client is connected, so that no SQL is orphaned (since Postgres 14)."""


def environment() -> dict[str, str]:
    """Return what psql and dbt's profile read: libpq's variables, `WAREHOUSE_SCHEMA` and `DBT_THREADS`.

    Starts the embedded server if `WAREHOUSE_URL` is not set and the server is not running.

    Raises:
        SettingsError: `WAREHOUSE_URL` is not a Postgres URL.
        WarehouseError: `WAREHOUSE_URL` has an option that libpq does not know, or the embedded server cannot start.
    """
    url = settings().warehouse_url
    if url is None:
        parameters = embedded_postgres.start(settings().warehouse_dir)
    else:
        try:
            parsed = conninfo_to_dict(url.get_secret_value())
        except psycopg.ProgrammingError as error:
            raise WarehouseError(
                f"WAREHOUSE_URL is not understood: {str(error).strip()}. "
                "Set it to something like postgresql://user:password@host:5432/warehouse."
            ) from None
        parameters = {keyword: str(value) for keyword, value in parsed.items()}
    # dbt's profile needs each of these four; libpq has defaults for them.
    defaults = {"host": "localhost", "port": "5432", "user": "postgres", "password": ""}
    variable_names = {option.keyword.decode(): option.envvar for option in psycopg.pq.Conninfo.get_defaults()}
    variables = {
        "PGOPTIONS": CLIENT_OPTIONS,
        "PGCONNECT_TIMEOUT": "10",
        "WAREHOUSE_SCHEMA": settings().warehouse_schema,
        "DBT_THREADS": str(settings().dbt_threads),
    }
    for keyword, value in (defaults | parameters).items():
        if name := variable_names.get(keyword):
            variables[name.decode()] = value
    return variables


def connect(**options: Any) -> psycopg.Connection[tuple[Any, ...]]:
    """Open a connection to the warehouse; its first statement begins a transaction.

    Args:
        options: options of `psycopg.connect`, which win over those of the warehouse.

    Raises:
        WarehouseError: the warehouse cannot be reached; names the address (never the password) and the cure.
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
        address = f"{variables['PGHOST']}:{variables['PGPORT']}/{variables.get('PGDATABASE', '')}"
        cure = (
            "Check WAREHOUSE_URL and that the server is up"
            if settings().warehouse_url
            else f"Look at {settings().warehouse_dir / 'data' / 'log'}, or set WAREHOUSE_URL"
        )
        # FATAL means that the server refused the connection. Only these reasons pass without an operator.
        passing = ("starting up", "shutting down", "recovery", "too many", "remaining connection slots")
        raise WarehouseError(
            f"The warehouse at {address} cannot be reached: {reason}. {cure}.",
            transient="FATAL:" not in reason or any(words in reason for words in passing),
        ) from error


@contextlib.contextmanager
def explain_errors(operation: str) -> Iterator[None]:
    """Turn a Postgres error of the block into one sentence with a cure.

    Args:
        operation: what the block does, as the start of the sentence: "Loading 2013-01-01".

    Raises:
        WarehouseError: the Postgres error is its cause.
    """
    try:
        yield
    except psycopg.Error as error:
        transient = False
        reason = (error.diag.message_primary or str(error)).strip().splitlines()[0]
        if isinstance(error, pg.DiskFull) or "No space left on device" in str(error):
            place = "WAREHOUSE_URL's server" if settings().warehouse_url else settings().warehouse_dir
            cure = f"Free space on the disk of {place}; the transaction was rolled back"
        elif isinstance(error, pg.InsufficientPrivilege):
            cure = "Grant the warehouse's user CREATE on the database"
        elif isinstance(error, pg.DataError) and error.diag.context:
            reason += f" ({error.diag.context.splitlines()[0]})"
            cure = "Correct the source file; nothing of it was loaded"
        elif isinstance(error, pg.OperationalError | pg.InterfaceError):
            # A cut connection, a restarting server, a deadlock, a lock timeout or a statement timeout.
            transient = True
            cure = "The transaction was rolled back: run it again"
        else:
            cure = f"Postgres error {error.sqlstate}; the transaction was rolled back"
        raise WarehouseError(f"{operation} failed: {reason}. {cure}.", transient=transient) from error


@contextlib.contextmanager
def exclusive_lock(purpose: str, on_wait: Callable[[], Any] | None = None) -> Iterator[None]:
    """Hold an advisory lock on the warehouse; a second holder waits for the first.

    The lock belongs to the database session (`pg_advisory_lock`), so it ends with the process, even with a killed one.

    Args:
        purpose: what only one process may do at a time, such as "dbt build in schema analytics".
        on_wait: called once if another session holds the lock.
    """
    with connect(autocommit=True) as connection:
        key = f"prefect-orchestration: {purpose}"
        row = connection.execute("select pg_try_advisory_lock(hashtextextended(%s, 0))", [key]).fetchone()
        if row != (True,):
            if on_wait:
                on_wait()
            connection.execute("select pg_advisory_lock(hashtextextended(%s, 0))", [key])
        yield


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    try:
        match list(arguments):
            case ["exec", program, *rest]:
                path = embedded_postgres.find_program(program)
                os.execve(  # noqa: S606 - the program replaces this process
                    path, [program, *rest], os.environ | environment()
                )
            case ["stop"]:
                stopped = embedded_postgres.stop(settings().warehouse_dir)
                print("The embedded warehouse is stopped." if stopped else "No embedded warehouse is running.")
                return 0
            case _:
                print("usage: python -m orchestration.warehouse exec COMMAND ... | stop", file=sys.stderr)
                return 2
    except PipelineError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
