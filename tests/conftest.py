"""The parts that tests share: one Postgres and one Prefect server a session, a database a test."""

import contextlib
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen
from uuid import uuid4

import psycopg
import pytest

# Before Prefect is imported: its settings are read once. Tests leave the person's own home alone.
_STATE = Path(os.environ.setdefault("PREFECT_HOME", f"/tmp/prefect-orchestration-{os.getpid()}"))  # noqa: S108
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"
for _name in ("WAREHOUSE_URL", "WAREHOUSE_DIR", "WAREHOUSE_SCHEMA", "LANDING_ZONE", "DBT_THREADS"):
    os.environ.pop(_name, None)

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Poll `condition` until it is true; its value."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what}")


def answers(url: str) -> bool:
    """Whether a GET of `url` succeeds."""
    try:
        with urlopen(url, timeout=2) as response:  # noqa: S310
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an embedded PostgreSQL of the session's own."""
    from orchestration import warehouse

    with settings_of(WAREHOUSE_DIR=str(tmp_path_factory.mktemp("warehouse"))):
        host = warehouse.environment()["PGHOST"]
        yield f"postgresql://postgres@/postgres?host={host}"
        warehouse.stop()


@contextlib.contextmanager
def settings_of(**variables: str) -> Iterator[None]:
    """The project's settings with these variables: `settings_of(DBT_THREADS="2")`."""
    from orchestration.settings import settings

    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        settings.cache_clear()
        yield
    settings.cache_clear()


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


@pytest.fixture
def use_settings() -> Iterator[Callable[..., None]]:
    """Set settings' variables for the rest of a test: `use_settings(DBT_THREADS="2")`."""
    with contextlib.ExitStack() as stack:
        yield lambda **variables: stack.enter_context(settings_of(**variables))


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """A new, empty database; `WAREHOUSE_URL` names it."""
    with new_database(postgres) as url:
        yield url


def rows_of(url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a statement in the database at `url`; its rows."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


Query = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture
def query(database: str) -> Query:
    """Run a statement in the test's database; its rows."""
    return functools.partial(rows_of, database)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API's URL of a Prefect server of the session's own."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    port = free_port()
    home = tmp_path_factory.mktemp("prefect")
    environment = os.environ | {"PREFECT_HOME": str(home)}
    log = (home / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env=environment,
        cwd=home,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    url = f"http://127.0.0.1:{port}/api"
    try:
        wait_until(lambda: answers(f"{url}/health"), f"a Prefect server; see {home}/server.log", 180)
        with temporary_settings({PREFECT_API_URL: url}):
            yield url
    finally:
        server.terminate()
        server.wait(30)
        log.close()


@pytest.fixture(scope="session", autouse=True)
def _remove_prefect_home() -> Iterator[None]:
    yield
    if _STATE.name.startswith("prefect-orchestration-"):
        shutil.rmtree(_STATE, ignore_errors=True)


@pytest.fixture
def landing_zone(tmp_path: Path, use_settings: Callable[..., None]) -> Path:
    """A writable landing zone with three days of January 2013 and the reference tables."""
    from flows import landing

    source = landing.folder()
    folder = tmp_path / "landing"
    folder.mkdir()
    for table in landing.REFERENCE:
        shutil.copyfile(source / f"{table}.csv", folder / f"{table}.csv")
    days = landing.days()[:3]
    for table in landing.DAILY:
        extract = landing.extract(table, days)
        content = ",".join(extract.columns).encode() + b"\n" + extract.csv
        (folder / f"{table}.csv").write_bytes(content)
    use_settings(LANDING_ZONE=str(folder))
    return folder
