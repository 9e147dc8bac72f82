"""The script that dumps, verifies and restores the server's database, on a real Postgres."""

import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from orchestration.settings import ROOT
from tests.parts import debian_postgres, new_database, rows_of, wait_until

SCRIPT = ROOT / "helm/prefect-server/files/backup"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with debian_postgres() as url:
        yield url


@pytest.fixture
def original(server: str) -> Iterator[str]:
    """Create a database with the tables of a server, a foreign key, an extension and a name to quote."""
    with new_database(server, "prefect") as url:
        for statement in (
            "create extension pg_trgm",
            "create table alembic_version (version_num varchar(32) primary key)",
            "insert into alembic_version values ('91e2b8f3d6a4')",
            "create table flow (id int primary key, name text)",
            "create index on flow using gin (name gin_trgm_ops)",
            'create table "Flow run" (id int primary key, flow int references flow)',
            "insert into flow select each, 'flow ' || each from generate_series(1, 1000) as each",
            'insert into "Flow run" select each, each from generate_series(1, 500) as each',
        ):
            rows_of(url, statement)
        yield url


def _run(url: str, *arguments: str | Path, path: str = "") -> "subprocess.CompletedProcess[str]":
    asynchronous = url.replace("postgresql://", "postgresql+asyncpg://")
    environment = {"PATH": path + os.environ["PATH"], "CONNECTION_URL": asynchronous, "HOME": "/tmp"}  # noqa: S108
    return subprocess.run([SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


def _databases(server: str) -> set[str]:
    return {name for (name,) in rows_of(server, "select datname from pg_database")}


def test_dump_is_verified_and_restores_what_was_dumped(server: str, original: str, tmp_path: Path) -> None:
    before = _databases(server)
    done = _run(original, "dump", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "The backup of prefect is verified: 3 tables, schema 91e2b8f3d6a4.\n"
    assert _databases(server) == before, "the scratch database is dropped"
    counts = dict(line.split("|") for line in (tmp_path / "counts").read_text().splitlines())
    assert counts == {
        "public.flow": "1000", "public.Flow run": "500", "public.alembic_version": "1", "revision": "91e2b8f3d6a4"
    }  # fmt: skip
    assert datetime.fromisoformat((tmp_path / "time").read_text().strip()).tzinfo
    rows_of(original, "delete from flow where id > 500")
    try:
        assert _run(original, "restore", tmp_path).returncode == 0
        restored = original.replace("/prefect?", "/prefect_restored?")
        assert rows_of(restored, "select count(*) from flow") == [(1000,)]
        assert rows_of(original, "select count(*) from flow") == [(500,)], "the server's database is unchanged"
    finally:
        rows_of(server, "drop database prefect_restored")


def test_server_older_than_the_programs_restores(original: str, tmp_path: Path) -> None:
    """Since version 17 pg_restore sets `transaction_timeout`. Servers before 17 do not know the parameter."""
    wrong = tmp_path / "bin" / "pg_restore"
    wrong.parent.mkdir()
    # Only output without --dbname can be filtered, so the newer program refuses that option.
    wrong.write_text(
        '#!/bin/sh\ncase "$*" in *--dbname*) echo unrecognized transaction_timeout >&2; exit 1 ;; esac\n'
        'echo "SET transaction_timeout = 0;"\nexec /usr/bin/pg_restore "$@"\n'
    )
    wrong.chmod(0o755)
    done = _run(original, "dump", tmp_path / "work", path=f"{wrong.parent}:")
    assert (done.returncode, done.stderr) == (0, "")


def test_counts_are_those_of_the_dump_while_rows_are_written(original: str, tmp_path: Path) -> None:
    is_over = threading.Event()

    def write() -> None:
        number = 10_000
        while not is_over.is_set():
            number += 1
            rows_of(original, "insert into flow values (%s, 'new')", number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        done = _run(original, "dump", tmp_path)
    finally:
        is_over.set()
        writer.join()
    assert (done.returncode, done.stderr) == (0, "")


def test_backups_at_one_time_take_turns_with_the_scratch_database(server: str, original: str, tmp_path: Path) -> None:
    """The first backup's restore pauses until the second waits for it, or has ended."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "pg_restore").write_text(
        f"#!/bin/sh\ntouch {tmp_path}/begun\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.1; done\n"
        'exec /usr/bin/pg_restore "$@"\n'
    )
    (programs / "pg_restore").chmod(0o755)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(_run, original, "dump", tmp_path / "first", path=f"{programs}:")
        wait_until((tmp_path / "begun").exists, "the first backup to restore its dump")
        second = pool.submit(_run, original, "dump", tmp_path / "second")
        waiting = "select pid from pg_locks where locktype = 'advisory' and not granted"
        try:
            wait_until(lambda: rows_of(server, waiting) or second.done(), "the second backup to wait")
        finally:
            (tmp_path / "go").touch()
        for done in (first.result(), second.result()):
            assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("program", "message"),
    [
        # A dump without a table's rows, as after a table that pg_dump was told to skip.
        ('exec {real} --exclude-table-data=flow "$@"', "violates foreign key constraint"),
        ('exec {real} --exclude-table-data=\'"Flow run"\' "$@"', "public.Flow run|500"),
        ("echo pg_dump: error: disk full >&2; exit 1", "pg_dump failed: its message is above."),
        ('{real} "$@" && truncate --size=-2000 "$FOLDER/dump"', "pg_restore: error"),
    ],
)
def test_incomplete_dump_is_refused(server: str, original: str, tmp_path: Path, program: str, message: str) -> None:
    wrong = tmp_path / "bin" / "pg_dump"
    wrong.parent.mkdir()
    wrong.write_text("#!/bin/sh\n" + program.format(real="/usr/bin/pg_dump"))
    wrong.chmod(0o755)
    before = _databases(server)
    done = _run(original, "dump", tmp_path / "work", path=f"{wrong.parent}:")
    assert done.returncode != 0
    assert message in done.stderr
    assert "is verified" not in done.stdout
    assert _databases(server) == before


def test_user_without_the_right_to_create_databases_is_named(server: str, original: str, tmp_path: Path) -> None:
    rows_of(original, "create role reader login")
    rows_of(original, "grant pg_read_all_data to reader")
    try:
        done = _run(original.replace("postgres@", "reader@"), "dump", tmp_path)
        assert done.returncode == 1
        assert "Give the user of prefect the right CREATEDB" in done.stderr
    finally:
        rows_of(original, "drop role reader")
