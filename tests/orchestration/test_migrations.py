"""The schema of the Prefect server's database, on a real Postgres."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from orchestration.settings import ROOT
from tests.parts import debian_postgres, new_database, rows_of

OLDER = "7218aad17905"
"""Of May 2026; Prefect 3.9.1 has seven revisions after it, the last two of them new in 3.9."""


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


def _said(process: "subprocess.Popen[str]") -> str:
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    return said.splitlines()[-1]


def test_older_schema_is_upgraded_once_by_two_and_keeps_its_data(empty: str) -> None:
    _said(_start(empty, "prefect", "server", "database", "upgrade", "--yes", "--revision", OLDER))
    rows_of(empty, "insert into flow (name) values ('kept')")
    waiting = _start(empty, "orchestration.migrations", "wait")
    assert waiting.stdout
    assert waiting.stdout.readline() == f"The schema is at {OLDER}: waiting for the migrations.\n"
    said = [_said(each) for each in [_start(empty, "orchestration.migrations", "upgrade") for _ in range(2)]]
    [(head,)] = rows_of(empty, "select version_num from alembic_version")
    assert head != OLDER
    assert sorted(said) == [f"The schema is at {head}.", f"The schema went from {OLDER} to {head}."]
    assert _said(waiting) == f"The schema is at {head}."
    assert rows_of(empty, "select name from flow") == [("kept",)]


@pytest.mark.parametrize("command", ["upgrade", "wait"])
def test_newer_schema_is_left_alone(empty: str, command: str) -> None:
    rows_of(empty, "create table alembic_version (version_num varchar(32) primary key)")
    rows_of(empty, "insert into alembic_version values ('of a newer image')")
    assert _said(_start(empty, "orchestration.migrations", command)) == "The schema is at of a newer image."
    assert rows_of(empty, "select version_num from alembic_version") == [("of a newer image",)]
    tables = "select tablename from pg_tables where schemaname = 'public'"
    assert rows_of(empty, tables) == [("alembic_version",)]
