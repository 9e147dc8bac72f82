"""The warehouse that `WAREHOUSE_URL` names: its variables, connections, locks, errors and command line."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestration import warehouse
from orchestration.errors import WarehouseError
from orchestration.settings import ROOT
from tests.parts import free_port, rows_of, wait_until

UseSettings = Callable[..., None]


def _start_python(code: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


# Variables.


def test_unknown_option_of_the_url_is_refused(use_settings: UseSettings) -> None:
    use_settings(WAREHOUSE_URL="postgresql://db/x?colour=blue")
    with pytest.raises(WarehouseError, match=r'WAREHOUSE_URL is not understood: .*"colour"'):
        warehouse.environment()


def test_every_part_of_the_url_reaches_libpq(use_settings: UseSettings) -> None:
    use_settings(WAREHOUSE_URL="postgresql://me:p%40ss@db.example:6543/dw?sslmode=require&options=-c%20work_mem%3D1MB")
    variables = warehouse.environment()
    assert {name: variables[name] for name in variables if name.startswith("PG")} == {
        "PGHOST": "db.example",
        "PGPORT": "6543",
        "PGUSER": "me",
        "PGPASSWORD": "p@ss",
        "PGDATABASE": "dw",
        "PGSSLMODE": "require",
        "PGOPTIONS": "-c work_mem=1MB",
        "PGCONNECT_TIMEOUT": "10",
    }


# Connections.


def test_unreachable_server_is_named_by_its_address(use_settings: UseSettings) -> None:
    port = free_port()
    use_settings(WAREHOUSE_URL=f"postgresql://me:s3cret@127.0.0.1:{port}/db")
    with pytest.raises(WarehouseError) as caught:
        warehouse.connect()
    message = str(caught.value)
    assert message.startswith(f"The warehouse at 127.0.0.1:{port}/db cannot be reached: ")
    assert "Connection refused" in message
    assert "Check WAREHOUSE_URL" in message
    assert "s3cret" not in message


def test_missing_database_is_named(use_settings: UseSettings, postgres: str) -> None:
    use_settings(WAREHOUSE_URL=postgres.replace("/postgres?", "/nothing?"))
    with pytest.raises(WarehouseError, match=r'database "nothing" does not exist'):
        warehouse.connect()


def test_wrong_password_is_refused_without_showing_it(postgres: str, use_settings: UseSettings) -> None:
    hba = Path(rows_of(postgres, "show hba_file")[0][0])
    rules = hba.read_text()
    rows_of(postgres, "create role guarded login password 'right'")
    try:
        hba.write_text(f"local all guarded scram-sha-256\n{rules}")
        rows_of(postgres, "select pg_reload_conf()")
        base = postgres.replace("postgres@", "guarded:{}@")
        use_settings(WAREHOUSE_URL=base.format("wr0ng"))
        with pytest.raises(WarehouseError, match=r'password authentication failed for user "guarded"') as caught:
            warehouse.connect()
        assert "wr0ng" not in str(caught.value)
        assert not caught.value.transient
        use_settings(WAREHOUSE_URL=base.format("right"))
        warehouse.connect().close()
    finally:
        hba.write_text(rules)
        rows_of(postgres, "select pg_reload_conf()")
        rows_of(postgres, "drop role guarded")


def test_refused_connection_is_transient(use_settings: UseSettings) -> None:
    use_settings(WAREHOUSE_URL=f"postgresql://127.0.0.1:{free_port()}/db")
    with pytest.raises(WarehouseError) as caught:
        warehouse.connect()
    assert caught.value.transient


def test_sql_of_a_killed_client_ends(database: str) -> None:
    process = _start_python(
        "from orchestration import warehouse\nwith warehouse.connect() as c: c.execute('select pg_sleep(600)')"
    )
    running = "select count(*) from pg_stat_activity where query = 'select pg_sleep(600)' and state = 'active'"
    wait_until(lambda: rows_of(database, running) == [(1,)], "the query")
    process.kill()
    process.communicate()
    wait_until(lambda: rows_of(database, running) == [(0,)], "the end of the query")


# Locks and errors.


def test_exclusive_lock_has_one_holder_and_is_released_when_the_holder_is_killed(database: str) -> None:
    code = (
        "from orchestration import warehouse; import time\n"
        "with warehouse.exclusive_lock('a test'): print('held', flush=True); time.sleep(600)"
    )
    holder = _start_python(code)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waited = threading.Event()
    entered = threading.Event()

    def wait_for_lock() -> None:
        with warehouse.exclusive_lock("a test", on_wait=waited.set):
            entered.set()

    thread = threading.Thread(target=wait_for_lock)
    thread.start()
    assert waited.wait(60)
    assert not entered.wait(0.5)
    with warehouse.exclusive_lock("another purpose"):
        pass
    holder.kill()
    holder.communicate()
    assert entered.wait(60)
    thread.join()


@pytest.mark.parametrize(
    ("statement", "message", "transient"),
    [
        ("select 1/0", r"Counting failed: division by zero. Postgres error 22012", False),
        (
            "do $$ begin raise disk_full; end $$",
            r"Counting failed: .*Free space on the disk of WAREHOUSE_URL",
            False,
        ),
        ("do $$ begin raise insufficient_privilege; end $$", r"Grant the warehouse's user CREATE", False),
        ("do $$ begin raise deadlock_detected; end $$", r"The transaction was rolled back: run it again", True),
        ("select pg_terminate_backend(pg_backend_pid())", r"run it again", True),
    ],
)
def test_postgres_error_is_explained_with_a_cure(database: str, statement: str, message: str, transient: bool) -> None:
    with (
        pytest.raises(WarehouseError, match=message) as caught,
        warehouse.explain_errors("Counting"),
        warehouse.connect() as connection,
    ):
        connection.execute(statement)
    assert caught.value.transient is transient


# The command line.


def test_psql_and_dbt_connect_to_the_same_database(database: str) -> None:
    name = rows_of(database, "select current_database()")[0][0]
    command = [sys.executable, "-m", "orchestration.warehouse", "exec"]
    psql = subprocess.run(
        [*command, "psql", "-Atc", "select current_database()"], capture_output=True, text=True, check=True
    )
    assert psql.stdout.strip() == name
    project = str(ROOT / "flows" / "warehouse")
    dbt = subprocess.run(
        [*command, str(Path(sys.executable).parent / "dbt"), "debug", "--project-dir", project,
         "--profiles-dir", project],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"database: {name}" in dbt.stdout
    assert "All checks passed!" in dbt.stdout


def test_missing_program_is_named() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "orchestration.warehouse", "exec", "pqsl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (
        1,
        "There is no program pqsl. Install it, or check its spelling.\n",
    )
