"""The restored database takes the place of the server's: a real Postgres, and a user without a superuser's rights."""

import contextlib
from collections.abc import Iterator

import psycopg
import pytest

from orchestration.recovery import restored_database, server_database
from tests.parts import debian_postgres, rows_of


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with debian_postgres() as url:
        rows_of(url, "create role prefect login createdb")
        # As `make rotate` creates it.
        rows_of(url, "create role prefect_2 login in role prefect")
        rows_of(url, "alter role prefect_2 set role to prefect")
        yield url


@pytest.fixture
def server(postgres: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Create the server's database and the restored one, both owned by the user of the server."""
    for name in ("prefect", "prefect_restored"):
        rows_of(postgres, f"create database {name} owner prefect")
    # Prefect reads its settings once in a process.
    own = _url(postgres, "prefect", "prefect").replace("postgresql://", "postgresql+asyncpg://")
    monkeypatch.setattr(server_database, "database_url", lambda: own)
    yield postgres
    for name in _databases(postgres):
        rows_of(postgres, f"drop database {name} with (force)")


def _url(server: str, user: str, database: str) -> str:
    return server.replace("postgres@", f"{user}@").replace("/postgres?", f"/{database}?")


def _databases(server: str) -> set[str]:
    return {name for (name,) in rows_of(server, "select datname from pg_database where datname like 'prefect%%'")}


@pytest.mark.parametrize("login", ["prefect", "prefect_2"])
def test_sessions_of_the_user_end_and_those_of_others_are_waited_for(
    server: str, monkeypatch: pytest.MonkeyPatch, login: str
) -> None:
    """Only a superuser may end the sessions of a superuser, and the workers of autovacuum, which have no user."""
    url = _url(server, login, "prefect").replace("postgresql://", "postgresql+asyncpg://")
    monkeypatch.setattr(server_database, "database_url", lambda: url)
    with (
        contextlib.closing(psycopg.connect(_url(server, login, "prefect"))) as own,
        contextlib.closing(psycopg.connect(_url(server, "postgres", "prefect"))) as other,
    ):
        monkeypatch.setattr("orchestration.recovery.restored_database.time.sleep", lambda _: other.close())
        restored_database.swap("prefect", "prefect_replaced")
        assert other.closed, "the swap has waited"
        assert _databases(server) == {"prefect", "prefect_replaced"}
        with pytest.raises(psycopg.OperationalError):
            own.execute("select 1")


def test_restored_database_is_used_with_the_settings_of_the_pod() -> None:
    """Of the settings of the database, all but its address hold: a long timeout, for example, and TLS."""
    kept = {
        "PREFECT_SERVER_DATABASE_TIMEOUT": "120",
        "PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_TLS_ENABLED": "true",
        "PREFECT_API_DATABASE_CONNECTION_TIMEOUT": "60",
    }
    address = {"PREFECT_SERVER_DATABASE_HOST": "a", "PREFECT_API_DATABASE_PASSWORD": "b"}
    found = restored_database.variables_for(kept | address, "url")
    assert found == kept | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": "url"}


def test_session_that_stays_is_named_as_the_cause(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restored_database, "RENAME_SECONDS", 0)
    with (
        psycopg.connect(_url(server, "postgres", "prefect")),
        pytest.raises(restored_database.RestoreError, match=r"The database prefect is in use: .*\n.*1 other session"),
    ):
        restored_database.swap("prefect", "prefect_replaced")
    assert _databases(server) == {"prefect", "prefect_restored"}


def test_database_of_another_owner_is_not_renamed(server: str) -> None:
    rows_of(server, "alter database prefect owner to postgres")
    with pytest.raises(restored_database.RestoreError, match="Its user has to own it"):
        restored_database.swap("prefect", "prefect_replaced")
    assert _databases(server) == {"prefect", "prefect_restored"}


def test_database_that_a_running_server_uses_is_not_replaced(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped server's session may be open still. A session that executes something belongs to a process."""
    monkeypatch.setattr(restored_database, "CLOSING_SECONDS", 0)
    own = _url(server, "prefect", "prefect")
    with psycopg.connect(own, autocommit=True, application_name="api") as session:
        begun = restored_database.read_time()
        with psycopg.connect(_url(server, "postgres", "prefect")) as another:  # a superuser's monitoring
            another.execute("select 1")
            restored_database.refuse_if_used("prefect", begun)
        session.execute("select 1")
        with pytest.raises(restored_database.RestoreError, match=r"prefect is in use by a process .*from local api"):
            restored_database.refuse_if_used("prefect", begun)
    monkeypatch.setattr(restored_database, "CLOSING_SECONDS", 30)
    restored_database.refuse_if_used("prefect", begun)
