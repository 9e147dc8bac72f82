"""The real parts that tests and measurements run on: a Postgres, a Prefect server, settings."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.request import urlopen
from uuid import uuid4

import psycopg

from orchestration import warehouse
from orchestration.settings import ROOT, settings

Query = Callable[..., list[tuple[Any, ...]]]


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Poll `condition` until it is true; its value."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < seconds:
        if value := condition():
            return value
        # An answer costs kubectl or a server more than a pause does: a wait may last a twentieth longer than it must.
        time.sleep(min(max(0.05, waited / 20), 1))
    raise AssertionError(f"not within {seconds} s: {what}")


def answers(url: str) -> bool:
    """Whether a GET of `url` succeeds."""
    try:
        with urlopen(url, timeout=2) as response:  # noqa: S310 - of this machine
            return bool(response.status == 200)
    except OSError:
        return False


def rows_of(url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a statement in the database at `url`; its rows."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def copy_of_checkout(folder: Path) -> None:
    """Copy what git has of this checkout, changes and new files included, and nothing else."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@contextlib.contextmanager
def settings_of(**variables: str) -> Iterator[None]:
    """The project's settings with these variables: `settings_of(DBT_THREADS="2")`."""
    with patch.dict(os.environ, variables):
        settings.cache_clear()
        yield
    settings.cache_clear()


@contextlib.contextmanager
def embedded_postgres(directory: Path) -> Iterator[str]:
    """The URL of an embedded PostgreSQL that keeps its data in `directory`; ended afterwards."""
    with settings_of(WAREHOUSE_DIR=str(directory)):
        host = warehouse.environment()["PGHOST"]
    try:
        yield f"postgresql://postgres@/postgres?host={host}"
    finally:
        with settings_of(WAREHOUSE_DIR=str(directory)):
            warehouse.stop()


@contextlib.contextmanager
def new_database(postgres: str) -> Iterator[str]:
    """The URL of an empty database that is `WAREHOUSE_URL` meanwhile."""
    name = f"test_{uuid4().hex[:12]}"
    url = postgres.replace("/postgres?", f"/{name}?")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"create database {name}")
        with settings_of(WAREHOUSE_URL=url):
            yield url
        connection.execute(f"drop database {name} with (force)")


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """The API's URL of a Prefect server that keeps its state in `home`; ended afterwards."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
            env=os.environ | {"PREFECT_HOME": str(home), "PYTHONTZPATH": ""},  # as `make server`
            cwd=home,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: answers(f"{url}/health"), f"a Prefect server; see {home}/server.log", 180)
            yield url
        finally:
            server.terminate()
            server.wait(30)
