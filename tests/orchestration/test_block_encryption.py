"""The key of secret blocks, on real servers."""

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet, InvalidToken
from prefect.blocks.system import Secret
from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings
from sqlalchemy import Engine, event

from orchestration.prefect_compat.server_internals import encrypt_blocks_again, store_block_key
from orchestration.settings import ROOT
from tests import parts, server_forks

MODULE = "orchestration.server_process"


def _encrypt_again(home: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = ["orchestration.block_encryption", "encrypt-again"]
    return server_forks.run(command, environment | {"PREFECT_HOME": str(home)}, ROOT)


def _stored_keys(home: Path) -> list[str]:
    with closing(sqlite3.connect(home / "prefect.db")) as database:
        return [row[0] for row in database.execute("select value from configuration where key = 'ENCRYPTION_KEY'")]


def _blocks(home: Path) -> list[str]:
    with closing(sqlite3.connect(home / "prefect.db")) as database:
        return [row[0] for row in database.execute("select data from block_document")]


def test_blocks_of_the_key_in_the_database_stay_readable_with_a_key_from_the_environment(tmp_path: Path) -> None:
    home = tmp_path
    shutil.copyfile(parts.migrated_database(), home / "prefect.db")
    with (
        parts.served(home, parts.free_port(), sys.executable, os.environ) as url,
        temporary_settings({PREFECT_API_URL: url}),
    ):
        Secret(value="before").save("before")
    assert len(_stored_keys(home)) == 1
    environment = os.environ | {"PREFECT_SERVER_ENCRYPTION_KEY": Fernet.generate_key().decode()}
    with (
        parts.served(home, parts.free_port(), sys.executable, environment, MODULE) as url,
        temporary_settings({PREFECT_API_URL: url}),
    ):

        def read() -> list[str]:
            return [Secret.load(name).get() for name in ("before", "after")]  # type: ignore[union-attr]

        Secret(value="after").save("after")
        assert read() == ["before", "after"]
        [stored] = _stored_keys(home)
        # An older server, as after a rollback, has this key alone.
        former = Fernet(json.loads(stored)["fernet_key"])
        assert [former.decrypt(block) for block in _blocks(home)]
        done = _encrypt_again(home, environment)
        assert done.stdout == "2 blocks have the key of the environment, and the key in the database is deleted.\n"
        assert _stored_keys(home) == []
        assert "\n| blocks with the key of the Secret alone |" in (ROOT / "docs/upgrading.md").read_text()
        for block in _blocks(home):
            with pytest.raises(InvalidToken):
                former.decrypt(block)
        assert read() == ["before", "after"]


def test_commands_succeed_while_a_server_writes(tmp_path: Path) -> None:
    """SQLite refuses the write of a transaction that has read before another one wrote, unless it began as a writer."""
    shutil.copyfile(parts.migrated_database(), tmp_path / "prefect.db")
    writes: list[int] = []

    def write(*arguments: Any) -> None:
        """Write as another connection between a command's read and its write, if SQLite lets it."""
        if arguments[2].startswith("SELECT"):
            writes.append(len(writes))
            other = sqlite3.connect(tmp_path / "prefect.db", timeout=0)
            with closing(other), suppress(sqlite3.OperationalError):
                other.execute(f"pragma user_version = {len(writes)}")

    async def store_and_encrypt() -> int | None:
        assert await store_block_key(Fernet.generate_key().decode())
        return await encrypt_blocks_again(Fernet.generate_key().decode())

    url = f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}"
    event.listen(Engine, "after_cursor_execute", write)
    try:
        with temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: url}):
            assert asyncio.run(store_and_encrypt()) == 0
    finally:
        event.remove(Engine, "after_cursor_execute", write)
    assert len(writes) == 3


def test_server_with_a_wrong_key_does_not_start(tmp_path: Path) -> None:
    for key in ("short", "", "ä" * 32):
        done = _encrypt_again(tmp_path, os.environ | {"PREFECT_SERVER_ENCRYPTION_KEY": key})
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("PREFECT_SERVER_ENCRYPTION_KEY has no key of 32 bytes in base64.")


@pytest.mark.parametrize(
    "address", ["PREFECT_SERVER_DATABASE_CONNECTION_URL", pytest.param("PGBOUNCER_ADDRESS", marks=pytest.mark.further)]
)
def test_database_that_is_away_is_reported_in_one_line(tmp_path: Path, address: str) -> None:
    """With `PGBOUNCER_ADDRESS` the command connects to PgBouncer, wherever the URL leads."""
    closed = f"127.0.0.1:{parts.free_port()}"
    url = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://prefect:x@{closed}/prefect"}
    if address == "PGBOUNCER_ADDRESS":
        url = {
            address: closed,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg://prefect:x@absent/prefect",
        }
    done = _encrypt_again(
        tmp_path, os.environ | url | {"PREFECT_SERVER_ENCRYPTION_KEY": Fernet.generate_key().decode()}
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("The database cannot be used: ")
    assert str(closed.rpartition(":")[2]) in line
