"""The schema of the Prefect server's database, on a real Postgres."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, NamedTuple

import pytest

from orchestration.prefect_compat.server_tables import INDEXES, STORAGE_PARAMETERS
from orchestration.settings import ROOT
from tests import server_forks
from tests.parts import debian_postgres, new_database, rows_of
from tests.server_forks import Fork
from tests.server_schema import create_schema

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


@pytest.fixture(scope="module")
def template(server: str) -> Iterator[str]:
    """The name of a database with an older schema."""
    with new_database(server, "older") as url:
        create_schema(url, OLDER_REVISION)
        yield "older"


@pytest.fixture
def older(server: str, template: str) -> Iterator[str]:
    with new_database(server, template=template) as url:
        yield url


class Command(NamedTuple):
    """A command that runs, and its output."""

    process: "subprocess.Popen[str] | Fork"
    output: IO[str]


def _variables(url: str) -> dict[str, str]:
    database = url.replace("postgresql://", "postgresql+asyncpg://")
    return os.environ | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database, "PYTHONUNBUFFERED": "1"}


def _start(url: str, *command: str) -> Command:
    """Start a module's command in a fork: a new process takes two processor seconds to import Prefect's server."""
    read, written = os.pipe()
    process = server_forks.start(list(command), _variables(url), ROOT, written)
    os.close(written)
    return Command(process, os.fdopen(read))


def _start_process(url: str, *command: str) -> Command:
    """Start a module's command in a new process, as the image does."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT, env=_variables(url), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout
    return Command(process, process.stdout)


def _output(command: Command) -> str:
    """Wait until a command succeeds, and return its output."""
    end = threading.Timer(600, command.process.kill)
    end.start()
    try:
        with command.output:
            output = command.output.read()
    finally:
        end.cancel()
    assert command.process.wait(60) == 0, output
    return output


def _message(line: str) -> str:
    """Return the message of a log line of level INFO."""
    found = re.fullmatch(r"\d{4}-\d\d-\d\dT\S+Z INFO (.*)\n?", line)
    assert found, line
    return found[1]


def _last_message(command: Command) -> str:
    """Wait until a command succeeds, and return the message of its last log line."""
    return _message(_output(command).splitlines()[-1])


def test_schema_of_the_cached_dump_is_that_of_an_upgrade(server: str, empty: str) -> None:
    with new_database(server) as first:
        create_schema(first)  # without a dump the first caller makes it
    create_schema(empty)
    [line] = _output(_start(empty, "orchestration.migrations", "upgrade")).splitlines()
    assert _message(line).startswith("The schema is at "), "nothing was left to do"


def test_two_upgrades_at_once_upgrade_an_older_schema_once_and_keep_its_data(older: str) -> None:
    rows_of(older, "insert into flow (name) values ('kept')")
    waiting = _start(older, "orchestration.migrations", "wait")
    assert _message(waiting.output.readline()) == f"The schema is at {OLDER_REVISION}: waiting for the migrations."
    upgrades = [_start(older, "orchestration.migrations", "upgrade") for _ in range(2)]
    outputs = [_output(upgrade) for upgrade in upgrades]
    [(head,)] = rows_of(older, "select version_num from alembic_version")
    assert head != OLDER_REVISION
    messages = [_message(line) for output in outputs for line in output.splitlines()]
    assert sorted(message for message in messages if message.startswith("The schema")) == [
        f"The schema is at {head}.",
        f"The schema went from {OLDER_REVISION} to {head}.",
    ]
    assert _last_message(waiting) == f"The schema is at {head}."
    assert rows_of(older, "select name from flow") == [("kept",)]
    took = [found[1] for message in messages if (found := re.fullmatch(r"Migration (\w+) took \d+\.\d\d s\.", message))]
    assert len(took) >= 7
    assert took[-1] == head


@pytest.mark.parametrize("command", ["upgrade", pytest.param("wait", marks=pytest.mark.further)])
def test_newer_schema_does_not_change(empty: str, command: str) -> None:
    rows_of(empty, "create table alembic_version (version_num varchar(32) primary key)")
    rows_of(empty, "insert into alembic_version values ('of a newer image')")
    assert (
        _last_message(_start_process(empty, "orchestration.migrations", command))
        == "The schema is at of a newer image."
    )
    assert rows_of(empty, "select version_num from alembic_version") == [("of a newer image",)]
    tables = "select tablename from pg_tables where schemaname = 'public'"
    assert rows_of(empty, tables) == [("alembic_version",)]


def test_upgrade_adds_indexes_and_autovacuum_settings_once_and_keeps_those_of_an_operator(older: str) -> None:
    def upgraded() -> list[str]:
        lines = _output(_start(older, "orchestration.migrations", "upgrade")).splitlines()
        return [message for message in map(_message, lines) if not message.startswith("Migration ")]

    def indexes() -> dict[str, bool]:
        statement = "select indexrelid::regclass::text, indisvalid from pg_index where indexrelid = any(%s::regclass[])"
        return dict(rows_of(older, statement, list(INDEXES)))

    def options(table: str) -> list[str]:
        return list(rows_of(older, "select reloptions from pg_class where relname = %s", table)[0][0])

    added = f"Added {', '.join(INDEXES)} and autovacuum settings of 8 tables."
    assert upgraded()[0] == added
    assert indexes() == dict.fromkeys(INDEXES, True)
    assert options("log") == [f"{name}={value}" for name, value in STORAGE_PARAMETERS.items()]

    rows_of(older, "alter table log reset (autovacuum_analyze_scale_factor)")
    rows_of(older, "alter table log set (autovacuum_vacuum_scale_factor = 0.1)")
    first, second = INDEXES
    rows_of(older, f"drop index {first}")
    rows_of(older, f"update pg_index set indisvalid = false where indexrelid = '{second}'::regclass")
    assert upgraded()[0] == f"Added {first}, {second} and autovacuum settings of 1 tables."
    assert indexes() == dict.fromkeys(INDEXES, True)
    assert "autovacuum_vacuum_scale_factor=0.1" in options("log")
    assert len(upgraded()) == 1


@pytest.mark.further
def test_tables_of_another_owner_are_no_failure(server: str, older: str) -> None:
    _output(_start(older, "orchestration.migrations", "upgrade"))
    rows_of(server, "create role reader login")
    rows_of(older, "grant select on all tables in schema public to reader")
    rows_of(older, f"drop index {next(iter(INDEXES))}")
    first, last = _output(
        _start(older.replace("postgres@", "reader@"), "orchestration.migrations", "upgrade")
    ).splitlines()
    assert " WARNING Indexes and autovacuum settings are not complete: must be owner of table flow_run. " in first
    assert _message(last).startswith("The schema is at ")
