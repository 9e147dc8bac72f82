"""Faults of the machine: a full disk, a read-only checkout, Ctrl+C, a kill at a random moment."""

import contextlib
import functools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import psycopg
import pytest

from flows import backfill, landing
from orchestration import warehouse
from orchestration.local import embedded_postgres
from orchestration.settings import ROOT
from tests.flows import forked_flow
from tests.flows.test_raw import assert_whole
from tests.long.kills import Baseline, Complete, run_killed_at_random
from tests.orchestration.dbt.conftest import Tiny
from tests.parts import Query, copy_of_checkout, random_seed, rows_of, settings_of, wait_until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small or read-only disk needs root")


@contextlib.contextmanager
def _mounted(folder: Path, *options: str) -> Iterator[None]:
    subprocess.run(["mount", *options, str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk() -> Iterator[Path]:
    """Yield a folder that Postgres' user can read, to mount a disk on."""
    # In no folder of pytest: a session that begins makes pytest's folders unreadable to all users but root.
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _assert_one_sentence(result: "subprocess.CompletedProcess[str]", *parts: str) -> None:
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Failed: "), output
    for part in parts:
        assert part in last
    assert "Traceback" not in output


@pytest.mark.further
@as_root
def test_full_disk_leaves_whole_days_and_a_larger_disk_completes(disk: Path, prefect_server: str, tiny: Tiny) -> None:
    # The disk has room for an empty server and some days, not for a year.
    with _mounted(disk, "-t", "tmpfs", "-o", "size=120m", "tmpfs"):
        variables = {"WAREHOUSE_DIR": str(disk), "PREFECT_API_URL": prefect_server}
        with settings_of(**variables):
            warehouse.environment()
            try:
                result = forked_flow.run(tiny.python, "flows.backfill", variables=variables)
                # Either a statement failed, or Postgres itself stopped on the full disk.
                _assert_one_sentence(result, str(disk), "ree space")
                assert re.search("No space left on device|[0-9] MB free on its disk", result.stderr)

                subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
                url = f"postgresql://postgres@/postgres?host={warehouse.environment()['PGHOST']}"
                query = functools.partial(rows_of, url)
                loaded = assert_whole(query)
                # Two chunks more, with a day in each that the full disk has left out.
                last = [day for day in landing.days() if day not in loaded][2 * backfill.CHUNK_DAYS - 1]
                result = forked_flow.run(tiny.python, "flows.backfill", "--last", str(last), variables=variables)
                assert result.returncode == 0, result.stdout + result.stderr
                assert assert_whole(query) == loaded | {day for day in landing.days() if day <= last}
            finally:
                embedded_postgres.stop(disk)


@as_root
def test_disk_too_small_for_the_warehouse_is_an_error(disk: Path, prefect_server: str, tiny: Tiny) -> None:
    with _mounted(disk, "-t", "tmpfs", "-o", "size=10m", "tmpfs"):
        variables = {"WAREHOUSE_DIR": str(disk), "PREFECT_API_URL": prefect_server}
        result = forked_flow.run(tiny.python, "flows.example_flow", variables=variables)
        _assert_one_sentence(result, f"The embedded warehouse in {disk} did not start", "MB free", "free space")
        assert not (disk / "data").exists()


@pytest.fixture
def read_only_checkout(tmp_path: Path) -> Iterator[Path]:
    """Yield a copy of the files in git, on a read-only disk."""
    checkout = tmp_path / "checkout"
    copy_of_checkout(checkout)
    with _mounted(checkout, "--bind", str(checkout)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(checkout)], check=True)
        yield checkout


@pytest.mark.further
@as_root
def test_read_only_checkout_runs_with_another_warehouse_and_without_it_is_an_error(
    read_only_checkout: Path, prefect_server: str, database: str, query: Query, tiny: Tiny
) -> None:
    def run(**variables: str) -> "subprocess.CompletedProcess[str]":
        variables |= {"PREFECT_API_URL": prefect_server}
        return forked_flow.run(tiny.python, "flows.example_flow", variables=variables, folder=read_only_checkout)

    result = run(WAREHOUSE_URL=database)
    assert result.returncode == 0, result.stdout + result.stderr
    assert query("select count(*) from analytics.carrier_daily_punctuality") == [(14,)]

    result = run(WAREHOUSE_URL="")
    _assert_one_sentence(
        result,
        f"The embedded warehouse cannot be kept in {read_only_checkout}/.warehouse: Read-only file system",
        "name another folder in WAREHOUSE_DIR, or a Postgres in WAREHOUSE_URL",
    )


def test_ctrl_c_ends_the_run_and_its_sql(database: str, query: Query, prefect_server: str) -> None:
    """Also if a statement waits for a lock that is held longer than the run lives."""
    query("create schema analytics_staging")
    query("create view analytics_staging.stg_loads as select 1 as load_id")
    dbt_sessions = (
        "select count(*) from pg_stat_activity where application_name = 'dbt' and datname = current_database()"
    )
    with psycopg.connect(database) as holder:
        holder.execute("lock table analytics_staging.stg_loads in access exclusive mode")
        process = subprocess.Popen(
            [sys.executable, "flows/example_flow.py", "--day", "2013-01-01"],
            cwd=ROOT,
            env=os.environ | {"PREFECT_API_URL": prefect_server},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

        def dbt_waits() -> bool:
            assert process.poll() is None, process.communicate()[0]
            return query(f"{dbt_sessions} and wait_event_type = 'Lock'") != [(0,)]

        try:
            wait_until(dbt_waits, "dbt to wait for the lock", 300)
            os.killpg(process.pid, signal.SIGINT)
            # Prefect still sends final states to a server that may be busy.
            output, _ = process.communicate(timeout=300)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        assert process.returncode == 130, output
        assert output.strip().splitlines()[-1].startswith("Interrupted")
        wait_until(lambda: query(dbt_sessions) == [(0,)], "its SQL to end")


def test_run_after_a_random_kill_completes(
    postgres: str, prefect_server: str, undisturbed: Baseline, complete: Complete
) -> None:
    """One kill while the run works on the warehouse. `make test-long FOR=kills` kills fifty times."""
    seed = random_seed()
    chance = random.Random(seed)  # noqa: S311 - a moment, no secret
    outcome = run_killed_at_random(postgres, prefect_server, undisturbed, chance, complete)
    assert outcome.half_loaded == [], f"seed {seed}"
    assert outcome.same_as_undisturbed, f"seed {seed}"


@pytest.fixture(scope="module")
def complete(tiny: Tiny) -> Complete:
    """Return a function that runs a day in a fork. The killed run and the run that sets its time are new processes."""

    def run(day: date, url: str, api: str) -> None:
        variables = {"WAREHOUSE_URL": url, "PREFECT_API_URL": api}
        done = forked_flow.run(tiny.python, "flows.example_flow", "--day", str(day), variables=variables)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def undisturbed(postgres: str, prefect_server: str, complete: Complete) -> Iterator[Baseline]:
    """Yield the warehouse after two days without a kill."""
    days = [date(2013, 1, 1), date(2013, 1, 2)]
    with Baseline.measured(postgres, prefect_server, days, complete) as baseline:
        yield baseline
