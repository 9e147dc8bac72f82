"""The files that PgBouncer reads, and connections that lead to it. tests/e2e/test_pgbouncer.py has a real PgBouncer."""

import asyncio
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from orchestration import pgbouncer
from orchestration.errors import SettingsError
from orchestration.operations.local_cluster.certificates import Authority
from orchestration.settings import ROOT

URL = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
BUNDLED = {
    "PREFECT_SERVER_DATABASE_HOST": "prefect-database",
    "PREFECT_SERVER_DATABASE_PORT": "5432",
    "PREFECT_SERVER_DATABASE_NAME": "prefect",
    "PREFECT_SERVER_DATABASE_USER": "prefect",
    "PREFECT_SERVER_DATABASE_PASSWORD": 'a"b',
}


def _written(folder: Path, environment: dict[str, str], **options: str) -> list[str]:
    """Return the texts of database.ini, tls.ini and userlist.txt."""
    pgbouncer.write_files(folder, environment, **options)
    return [file.read_text() for file in sorted(folder.iterdir())]


def test_files_have_address_and_password_of_the_bundled_database(tmp_path: Path) -> None:
    assert _written(tmp_path, BUNDLED) == [
        "* = host='prefect-database' port=5432\n", "server_tls_sslmode = prefer\n", '"prefect" "a""b"\n',
    ]  # fmt: skip
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", ["NEXT", "PREVIOUS"])
def test_users_have_both_logins_of_a_rotation(tmp_path: Path, place: str) -> None:
    other = {f"PGBOUNCER_{place}_USER": "prefect_2", f"PGBOUNCER_{place}_PASSWORD": "other"}
    assert _written(tmp_path, BUNDLED | other)[-1] == '"prefect_2" "other"\n"prefect" "a""b"\n'


@pytest.mark.parametrize(
    ("query", "options", "tls"),
    [
        ("", {}, ["server_tls_sslmode = prefer"]),
        ("?ssl=require", {}, ["server_tls_sslmode = require"]),
        ("?ssl=require", {"tls_mode": "disable"}, ["server_tls_sslmode = disable"]),
        (
            "?ssl=verify-full", {"ca_file": "/ca.crt"},
            ["server_tls_sslmode = verify-full", "server_tls_ca_file = /ca.crt"],
        ),
    ],
)  # fmt: skip
def test_files_have_the_parts_of_a_url(tmp_path: Path, query: str, options: dict[str, str], tls: list[str]) -> None:
    url = f"postgresql+asyncpg://us%40er:p%2F%22%25@[fd00::5]:6000/prefect{query}"
    database, lines, users = _written(tmp_path, {URL: url}, **options)
    assert database == "* = host='fd00::5' port=6000\n"
    assert lines.splitlines() == tls
    assert users == '"us@er" "p/""%"\n'


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("db.example.com", "is no URL"),
        ("sqlite+aiosqlite:///a.db", "needs a Postgres, and the server's database is sqlite"),
        ("postgresql+asyncpg://u@h/d", "has no password"),
        ("postgresql+asyncpg://u:p@/d?host=a:1&host=b:1", "has no host"),
        ("postgresql+asyncpg://h", "has no user and no password and no database"),
        ("postgresql+asyncpg://u:p%0A@h/d", "has a line break"),
        ("postgresql+asyncpg://u:p@h/d?ssl=on", "`ssl` is 'on'"),
        ("postgresql+asyncpg://u:secret@h/d?ssl=verify-full", "Set pgbouncer.serverTLS.caSecret"),
    ],
)
def test_url_without_what_pgbouncer_needs_is_refused(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        pgbouncer.write_files(tmp_path, {URL: url})
    assert message in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_command_reports_a_wrong_url_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestration.pgbouncer", str(tmp_path)],
        cwd=ROOT, env={"PATH": "", URL: "postgresql+asyncpg://u@h/d"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("The URL of the database has no password, which PgBouncer needs. Check the Secret: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Yield a function that sets the address of PgBouncer. After the test, engines connect as before."""
    yield lambda value: monkeypatch.setenv(pgbouncer.VARIABLE, value)
    if event.contains(Engine, "do_connect", pgbouncer.connect_to_pgbouncer):
        event.remove(Engine, "do_connect", pgbouncer.connect_to_pgbouncer)


def test_engine_connects_to_pgbouncer_instead_of_the_hosts_of_its_url(address: Callable[[str], None]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(180)
        address(f"127.0.0.1:{listener.getsockname()[1]}")
        pgbouncer.use_pgbouncer()

        def receive() -> bytes:
            connection, _ = listener.accept()
            with connection:
                return connection.recv(1000)

        async def connect() -> bytes:
            received = asyncio.create_task(asyncio.to_thread(receive))
            url = "postgresql+asyncpg://u:p@/d?host=nowhere.invalid:1&host=other.invalid:2&ssl=require"
            engine = create_async_engine(url, connect_args={"timeout": 60})
            with pytest.raises((DBAPIError, OSError)):
                async with engine.connect():
                    pass
            return await received

        assert b"database\0d\0" in asyncio.run(connect()), "a startup packet, and no request for TLS"


def test_engine_connects_to_pgbouncer_by_tls_if_its_ca_is_named(
    address: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Authority(tmp_path)
    monkeypatch.setenv(pgbouncer.CA_VARIABLE, str(tmp_path / "ca.crt"))
    address("pgbouncer:6432")
    parameters: dict[str, Any] = {"host": "database", "ssl": False}
    pgbouncer.connect_to_pgbouncer(SimpleNamespace(name="postgresql"), None, None, parameters)
    tls = parameters["ssl"]
    assert (tls.verify_mode, tls.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert [dict(*found["subject"])["commonName"] for found in tls.get_ca_certs()] == ["kubernetes"]


def test_other_databases_and_processes_without_the_variable_connect_directly(address: Callable[[str], None]) -> None:
    async def read() -> Any:
        engine = create_async_engine("sqlite+aiosqlite://")
        async with engine.connect() as connection:
            found = (await connection.execute(text("select 1"))).scalar()
        await engine.dispose()
        return found

    pgbouncer.use_pgbouncer()
    address("127.0.0.1:1")
    pgbouncer.use_pgbouncer()
    assert asyncio.run(read()) == 1


@pytest.mark.parametrize("value", ["pgbouncer", ":6432", "pgbouncer:port"])
def test_address_without_a_port_is_refused(address: Callable[[str], None], value: str) -> None:
    address(value)
    with pytest.raises(SettingsError, match=r"without a port\. Set it to HOST:PORT"):
        pgbouncer.use_pgbouncer()
