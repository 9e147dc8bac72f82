"""The schema of the Prefect server's database, on a real Postgres."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from orchestration.settings import ROOT
from tests.parts import debian_postgres, new_database, rows_of

OLDER_REVISION = "7218aad17905"
"""A revision of May 2026. Prefect 3.9.1 has seven later revisions, and the last two are new in 3.9."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with debian_postgres() as url:
        yield url


@pytest.fixture
def empty(server: str) -> Iterator[str]:
    with new_database(server) as url:
        yield url


def _start(url: str, *command: str) -> "subprocess.Popen[str]":
    database = url.replace("postgresql://", "postgresql+asyncpg://")
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *command],
        cwd=ROOT, env=os.environ | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _output(process: "subprocess.Popen[str]") -> str:
    """Wait until a process succeeds, and return its output."""
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    return output


def _message(line: str) -> str:
    """Return the message of a log line of level INFO."""
    found = re.fullmatch(r"\d{4}-\d\d-\d\dT\S+Z INFO (.*)\n?", line)
    assert found, line
    return found[1]


def _last_message(process: "subprocess.Popen[str]") -> str:
    """Wait until a process succeeds, and return the message of its last log line."""
    return _message(_output(process).splitlines()[-1])


def test_two_upgrades_at_once_upgrade_an_older_schema_once_and_keep_its_data(empty: str) -> None:
    _output(_start(empty, "prefect", "server", "database", "upgrade", "--yes", "--revision", OLDER_REVISION))
    rows_of(empty, "insert into flow (name) values ('kept')")
    waiting = _start(empty, "orchestration.migrations", "wait")
    assert waiting.stdout
    assert _message(waiting.stdout.readline()) == f"The schema is at {OLDER_REVISION}: waiting for the migrations."
    upgrades = [_start(empty, "orchestration.migrations", "upgrade") for _ in range(2)]
    messages = [_last_message(process) for process in upgrades]
    [(head,)] = rows_of(empty, "select version_num from alembic_version")
    assert head != OLDER_REVISION
    assert sorted(messages) == [f"The schema is at {head}.", f"The schema went from {OLDER_REVISION} to {head}."]
    assert _last_message(waiting) == f"The schema is at {head}."
    assert rows_of(empty, "select name from flow") == [("kept",)]


@pytest.mark.parametrize("command", ["upgrade", "wait"])
def test_newer_schema_does_not_change(empty: str, command: str) -> None:
    rows_of(empty, "create table alembic_version (version_num varchar(32) primary key)")
    rows_of(empty, "insert into alembic_version values ('of a newer image')")
    assert _last_message(_start(empty, "orchestration.migrations", command)) == "The schema is at of a newer image."
    assert rows_of(empty, "select version_num from alembic_version") == [("of a newer image",)]
    tables = "select tablename from pg_tables where schemaname = 'public'"
    assert rows_of(empty, tables) == [("alembic_version",)]
