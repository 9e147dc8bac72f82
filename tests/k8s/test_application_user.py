"""The user of the bundled databases, on a real Postgres: of a new volume, and of a volume of an older release."""

import os
import subprocess
import sys

import psycopg
import pytest

from orchestration.settings import ROOT
from tests.parts import debian_postgres, rows_of

SCRIPT = ROOT / "helm" / "prefect-server" / "files" / "application-user"


def _run_script(url: str) -> None:
    """Run the script as the image does, with the password that the image has given the superuser."""
    environment = {
        "PGHOST": url.partition("host=")[2],
        "POSTGRES_USER": "postgres",
        "APPLICATION_USER": "prefect",
        "POSTGRES_PASSWORD": 'it\'s "a" $password',
    }
    subprocess.run(["bash", SCRIPT], env=os.environ | environment, check=True)


def _url(url: str, user: str, database: str) -> str:
    return f"postgresql://{user}@/{database}?host={url.partition('host=')[2]}"


def _migrate(url: str) -> None:
    """Upgrade the schema of the Prefect server, which creates an extension."""
    environment = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url.replace("postgresql://", "postgresql+asyncpg://")}
    command = [sys.executable, "-m", "orchestration.migrations", "upgrade"]
    subprocess.run(command, env=os.environ | environment, cwd=ROOT, check=True)


def _check_rights(postgres: str) -> None:
    own = _url(postgres, "prefect", "prefect")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        rows_of(own, "copy (select 1) to program 'true'")
    roles = rows_of(
        _url(postgres, "postgres", "postgres"),
        "select rolname, rolsuper, rolcreaterole, rolreplication, rolbypassrls, rolpassword is null from pg_authid"
        " where rolcanlogin order by 1",
    )
    none = [False] * 5
    assert roles == [("postgres", True, True, True, True, True), ("prefect", *none), ("prefect_2", *none)]
    # Tables that the second login of a rotation creates belong to the first login.
    rows_of(_url(postgres, "prefect_2", "prefect"), "create table of_the_second ()")
    rows_of(_url(postgres, "prefect_2", "prefect"), "create database of_the_second")
    rows_of(own, "drop table of_the_second")
    rows_of(own, "drop database of_the_second")
    # A restore copies the database.
    rows_of(own, "create database copied")


def test_user_of_a_new_volume_is_no_superuser_and_owns_its_database() -> None:
    with debian_postgres() as postgres:
        rows_of(postgres, "alter role postgres password 'initial'")
        _run_script(postgres)
        _run_script(postgres)
        _migrate(_url(postgres, "prefect", "prefect"))
        _check_rights(postgres)


def test_superuser_of_an_older_volume_loses_its_rights_and_keeps_its_objects() -> None:
    with debian_postgres("prefect") as postgres:
        own = _url(postgres, "prefect", "prefect")
        rows_of(postgres, "alter role prefect password 'initial'")
        for name in ("prefect", "prefect_backup_check", "prefect_restored", "prefectural"):
            rows_of(postgres, f"create database {name}")
        for statement in (
            "create extension pg_trgm",
            "create schema marts",
            "create type mood as enum ('sad')",
            "create table kept (id serial, other int generated always as identity, mood mood)",
            "create index on kept using gin (cast(id as text) gin_trgm_ops)",
            "create table marts.daily (id int) partition by range (id)",
            "create view marts.shown as select id from kept",
            "create materialized view marts.stored as select id from kept",
            "create sequence counter",
            "create function one() returns int language sql as 'select 1'",
            "insert into kept (mood) values ('sad')",
        ):
            rows_of(own, statement)
        _run_script(postgres)
        _run_script(postgres)
        _check_rights(postgres)
        for statement in (
            "alter table kept add column more int",
            "alter type mood add value 'glad'",
            "create table marts.first partition of marts.daily for values from (1) to (2)",
            "drop view marts.shown",
            "refresh materialized view marts.stored",
            "drop sequence counter",
            "drop function one()",
            "create table public.more ()",
        ):
            rows_of(own, statement)
        assert rows_of(own, "select id, other, mood from kept") == [(1, 1, "sad")]
        rows_of(own, "drop database prefect_backup_check")
        rows_of(own, "drop database prefect_restored")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            rows_of(own, "drop database prefectural")


def test_warehouse_has_the_script_of_the_chart() -> None:
    copy = ROOT / "k8s" / "overlays" / "local" / "warehouse" / "application-user"
    assert copy.read_text() == SCRIPT.read_text()
