"""The upgrade of 10,000 runs from the previous Prefect while clients post, with failing migrations, and a rollback.

A rollback changes no schema. It starts the previous release's Job of migrations, and its server.
"""

import contextlib
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import httpx
import psycopg
import pytest
from cryptography.fernet import Fernet

from orchestration import migrations
from orchestration.settings import ROOT
from tests import server_forks
from tests.benchmarks.server_history import History, fill
from tests.benchmarks.upgrade import (
    APPLICATION,
    Clients,
    LockWatch,
    Migrations,
    count_history,
    migrate,
    newer_server,
    previous_server,
    variables_of,
)
from tests.interpreters import UvError
from tests.parts import asked, debian_postgres, new_database, rows_of, wait_until
from tests.versions.catalogue import UnavailableError, previous_release

HISTORY = History(runs=10_000, logs=0, events=10_000)

BEAT_SECONDS, WINDOW_SECONDS = 30, 8
"""The pace of the clients. They also post when the test waits for them. Runs fall due during the upgrade."""

NONE = "no migration of the newer release"
SOME = "some migrations of the newer release"
ALL = "all migrations of the newer release"
FEWER = "fewer migrations than the former release"
UNKNOWN = "a migration of a release that is neither of the two"

ENCRYPTED_AGAIN = "blocks with the key of the Secret alone"

FORMER_JOB = """
import sys
from orchestration.migrations import main
for line in sys.stdin:
    print(main(["upgrade"]), flush=True)
"""
"""Runs the former release's Job of migrations for each line, and prints its exit status below its output."""


@dataclass
class Upgrade:
    """Holds the history of a database from the previous release's schema to a rollback.

    Attributes:
        previous: the revision of the previous Prefect.
        failed: the first run of the migrations, of which the first migration fails.
        failed_later: the second run, of which the last migration fails.
        completed: the third run.
        revisions: the revision of the database after each run.
        has_table: whether the first migration's table exists after the first run.
        former_job: the last line of the former release's Job, by the state of the schema.
        errors: what clients could not post, by the state of the schema.
        locked: an answer of the newer server while migrations lock a table for longer than its statements wait.
        lost: rows, posts and runs that are lost.
        secrets: the answers to a request for a secret block, by who answers when.
    """

    previous: str = ""
    failed: Migrations = field(default_factory=Migrations)
    failed_later: Migrations = field(default_factory=Migrations)
    completed: Migrations = field(default_factory=Migrations)
    revisions: list[str] = field(default_factory=list)
    has_table: bool = True
    former_job: dict[str, str] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    locked: httpx.Response = field(default_factory=lambda: httpx.Response(200))
    lost: list[str] = field(default_factory=list)
    secrets: dict[str, httpx.Response] = field(default_factory=dict)


@contextlib.contextmanager
def former_job(database: str) -> Iterator[Callable[[], str]]:
    """Yield a function that runs the previous release's migrations, and returns the last line of their output."""
    python, checkout = previous_release()
    with subprocess.Popen(
        [str(python), "-c", FORMER_JOB], cwd=checkout, env=variables_of(database), text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        stdin, stdout = process.stdin, process.stdout
        assert stdin
        assert stdout

        def run() -> str:
            lines: list[str] = []
            print(file=stdin, flush=True)
            for line in stdout:
                if line == "0\n":
                    return lines[-1].strip()
                lines.append(line)
            raise AssertionError("".join(lines))

        yield run


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with debian_postgres() as url:
        yield url


@contextlib.contextmanager
def _failing(database: str, revision: str) -> Iterator[None]:
    """Let Postgres refuse the end of a migration, as on a full disk."""
    refuse = f"if new.version_num = '{revision}' then raise 'the disk is full' using errcode = '53100'; end if"
    body = f"begin {refuse}; return new; end"
    rows_of(
        database, f"create function refuse() returns trigger language plpgsql as '{body.replace(chr(39), chr(39) * 2)}'"
    )
    rows_of(database, "create trigger refuse before update on alembic_version for each row execute function refuse()")
    try:
        yield
    finally:
        rows_of(database, "drop function refuse cascade")


def _migrate_in_fork(database: str) -> Migrations:
    """Run the command of the chart's Job in a fork: a new process takes seconds to import Prefect's server."""
    done = server_forks.run(["orchestration.migrations", "upgrade"], variables_of(database), ROOT)
    return Migrations(done.returncode, [re.sub(r"^\S+Z [A-Z]+ ", "", line) for line in done.stderr.splitlines()])


def _create_secret(api: str) -> str:
    """Create a secret block; return its path."""
    with httpx.Client(base_url=api, timeout=300) as client:
        type_ = asked(client, "GET", "/block_types/slug/secret")["id"]
        filter_ = {"block_schemas": {"block_type_id": {"any_": [type_]}}}
        schema = asked(client, "POST", "/block_schemas/filter", filter_)[0]["id"]
        block = {"name": "kept", "data": {"value": "of-a-flow"}, "block_type_id": type_, "block_schema_id": schema}
        return f"/block_documents/{asked(client, 'POST', '/block_documents/', block)['id']}?include_secrets=true"


def _revision(database: str) -> str:
    return str(rows_of(database, "select version_num from alembic_version")[0][0])


def _newer_revisions(previous: str) -> list[str]:
    """Return the revisions after the previous one, oldest first."""
    from alembic.script import ScriptDirectory

    from orchestration.prefect_compat.server_internals import migrations_config

    config = migrations_config()
    folder = Path(str(config.get_main_option("version_locations"))).with_name("postgresql")
    config.set_main_option("version_locations", str(folder))
    script = ScriptDirectory.from_config(config)
    return [revision.revision for revision in script.walk_revisions(previous, "head")][::-1][1:]


@pytest.fixture(scope="module")
def upgrade(postgres: str) -> Iterator[Upgrade]:
    try:
        previous_release()
    except UnavailableError as error:
        pytest.skip(str(error))  # an archive or a clone without history, also in CI
    except UvError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    made = Upgrade()
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(new_database(postgres))
        run_former_job = stack.enter_context(former_job(database))
        made.former_job[FEWER] = run_former_job()
        made.previous = _revision(database)
        first, *_, last = _newer_revisions(made.previous)
        fill(database, HISTORY)
        [(now,)] = rows_of(database, "select now()")
        before = count_history(database, now)
        former, newer, former_again = (stack.enter_context(contextlib.ExitStack()) for _ in range(3))
        clients = Clients(former.enter_context(previous_server(database)), BEAT_SECONDS)
        secret = _create_secret(clients.url)

        def read_secret() -> httpx.Response:
            return httpx.get(clients.url + secret, timeout=300)

        def look(state: str) -> None:
            clients.wait_for_requests()
            made.errors[state] = list(clients.errors)
            made.revisions.append(_revision(database))
            made.former_job[state] = run_former_job()

        with clients:
            with _failing(database, first):
                made.failed = _migrate_in_fork(database)
            made.has_table = rows_of(database, "select to_regclass('automation_held_event')") != [(None,)]
            look(NONE)
            with _failing(database, last):
                made.failed_later = _migrate_in_fork(database)
            look(SOME)
            clients.schedule(WINDOW_SECONDS)
            made.completed = migrate(database)
            clients.wait_for_requests()
            key = {"PREFECT_SERVER_ENCRYPTION_KEY": Fernet.generate_key().decode()}
            with patch.dict(os.environ, key):
                clients.url = newer.enter_context(newer_server(database))
            clients.wait_for_requests()
            former.close()
            with psycopg.connect(database) as migration:
                migration.execute(migrations.LOCK)
                migration.execute("lock table flow_run in access exclusive mode")
                made.locked = httpx.post(f"{clients.url}/flow_runs/filter", json={}, timeout=120)
                wait_until(lambda: clients.repeated or clients.errors, "a client to repeat a request")
            clients.wait_for_due_runs()
            made.secrets["newer"] = read_secret()
            again = ["orchestration.block_encryption", "encrypt-again"]
            encrypted = server_forks.run(again, variables_of(database) | key, ROOT)
            assert encrypted.returncode == 0, encrypted.stderr
            made.secrets["newer, encrypted again"] = read_secret()
            clients.url = former_again.enter_context(previous_server(database))
            newer.close()
            look(ALL)
            made.secrets["former, encrypted again"] = read_secret()
        after = count_history(database, now)
        made.lost = [*clients.errors, *clients.losses(database)]
        made.lost += [
            f"{table}: {count} rows, now {after[table]}" for table, count in before.items() if after[table] != count
        ]
        rows_of(database, "update alembic_version set version_num = 'another'")
        made.former_job[UNKNOWN] = run_former_job()
        yield made


def test_failing_migration_changes_nothing_and_the_former_server_serves(upgrade: Upgrade) -> None:
    first, *_ = _newer_revisions(upgrade.previous)
    assert upgrade.failed.status == 1
    assert upgrade.failed.lines[-1] == (
        f"Migration {first} failed: the disk is full. The schema stays at {upgrade.previous}, and a server "
        "of the former release keeps serving. Cure the cause, and deploy again."
    )
    assert upgrade.revisions[0] == upgrade.previous
    assert not upgrade.has_table
    assert upgrade.errors[NONE] == []


def test_migrations_before_the_failing_one_stay_and_the_former_server_serves(upgrade: Upgrade) -> None:
    *_, before, last = _newer_revisions(upgrade.previous)
    assert upgrade.failed_later.status == 1
    assert f"Migration {last} failed: the disk is full. The schema stays at {before}," in upgrade.failed_later.lines[-1]
    assert upgrade.revisions[1] == before
    assert upgrade.errors[SOME] == []


def test_next_run_continues_with_the_migration_that_failed(upgrade: Upgrade) -> None:
    *_, before, last = _newer_revisions(upgrade.previous)
    assert upgrade.completed.status == 0
    assert list(upgrade.completed.seconds) == [last]
    assert upgrade.completed.lines[-1] == f"The schema went from {before} to {last}."


def test_clients_wait_while_migrations_lock_a_table_for_long(upgrade: Upgrade) -> None:
    assert upgrade.locked.status_code == 503, upgrade.locked.text
    assert (upgrade.locked.headers["Prefect-Maintenance"], upgrade.locked.headers["Retry-After"]) == ("true", "5")


def test_no_row_post_or_run_is_lost(upgrade: Upgrade) -> None:
    assert upgrade.lost == []


@pytest.mark.parametrize("schema", [NONE, SOME, ALL, FEWER, UNKNOWN])
def test_rollback_outcome_by_schema_is_as_documented(upgrade: Upgrade, schema: str) -> None:
    assert f"\n| {schema} |" in (ROOT / "docs/upgrading.md").read_text()
    *_, before, last = _newer_revisions(upgrade.previous)
    revisions = {NONE: upgrade.previous, SOME: before, ALL: last, UNKNOWN: "another"}
    if schema == FEWER:
        assert upgrade.former_job[schema] == f"The schema went from nothing to {upgrade.previous}."
    else:
        assert upgrade.former_job[schema] == f"The schema is at {revisions[schema]}."
    assert upgrade.errors.get(schema, []) == []


def test_former_server_cannot_read_blocks_that_are_encrypted_again(upgrade: Upgrade) -> None:
    assert f"\n| {ENCRYPTED_AGAIN} |" in (ROOT / "docs/upgrading.md").read_text()
    former = upgrade.secrets.pop("former, encrypted again")
    assert (former.status_code, "of-a-flow" in former.text) == (500, False)
    assert len(upgrade.secrets) == 2
    for answer in upgrade.secrets.values():
        assert answer.json()["data"] == {"value": "of-a-flow"}


def test_watch_sees_a_lock_and_who_waits_for_it(postgres: str) -> None:
    with new_database(postgres) as database, LockWatch(database) as watch:
        rows_of(database, "create table flow_run (id int)")
        watch.phase = "locking"
        other = threading.Thread(target=rows_of, args=[database, "select id from flow_run"])
        with psycopg.connect(database, application_name=APPLICATION) as migration:
            migration.execute("lock table flow_run in access exclusive mode")
            other.start()
            lock = ("locking", "flow_run", "AccessExclusiveLock")
            wait_until(lambda: watch.held.get(lock) and watch.waits, "the watch to see the lock and the wait")
        other.join()
    assert watch.waits.keys() == {("flow_run", "AccessShareLock")}
    assert watch.longest("locking").startswith("AccessExclusiveLock on flow_run, ")
    assert watch.longest("locking").endswith(" s: blocks reads and writes")
