"""The backfill: many days at once, and on from where it stopped."""

import os
import signal
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from flows import backfill, landing, raw
from tests.flows.conftest import Api, Run
from tests.flows.test_raw import FIRST, SECOND, THIRD, assert_whole
from tests.orchestration.dbt.task_runs import busy
from tests.parts import Query, wait_until


def test_a_range_is_filled_and_built_once(run: Run, api: Api, query: Query) -> None:
    status, output = run("--first", "2013-01-01", "--last", "2013-03-05", main=backfill.main)
    assert status == 0, output
    days = assert_whole(query)
    assert (min(days), max(days), len(days)) == (FIRST, date(2013, 3, 5), 64)
    assert "3 of 3 chunks are loaded." in output
    assert query("select count(distinct flight_date) from analytics.carrier_daily_punctuality") == [(64,)]

    # Again: what is loaded is left alone.
    before = query("select day, load_id from raw.loads order by day")
    status, output = run("--first", "2013-01-01", "--last", "2013-03-06", main=backfill.main)
    assert status == 0, output
    assert "65 days, 1 of them to load." in output
    assert query("select day, load_id from raw.loads where day <= '2013-03-05' order by day") == before


def test_every_day_is_the_default_and_a_full_refresh_loads_again(run: Run, query: Query, landing_zone: Path) -> None:
    assert run(main=backfill.main)[0] == 0
    assert assert_whole(query) == {FIRST, SECOND, THIRD}
    assert run("--full-refresh", main=backfill.main)[0] == 0
    assert query("select distinct load_id from raw.loads") == [(2,)]


def test_a_range_that_ends_before_it_begins(run: Run, api: Api) -> None:
    status, output = run("--first", "2013-02-01", "--last", "2013-01-01", main=backfill.main)
    assert status == 1
    assert "Failed: The first day, 2013-02-01, is after the last, 2013-01-01. Exchange them." in output
    assert "Traceback" not in output
    assert api.newest("backfill").state_name == "Failed"


@pytest.mark.parametrize("option", ["--first", "--last"])
def test_a_range_outside_the_data(run: Run, query: Query, option: str) -> None:
    status, output = run(option, "2014-01-01", main=backfill.main)
    assert status == 1
    assert "There are no flights of 2014-01-01" in output


def test_a_backfill_that_was_killed_goes_on_where_it_was(run: Run, query: Query, prefect_server: str) -> None:
    raw.prepare()
    process = subprocess.Popen(
        [sys.executable, "flows/backfill.py"],
        env=os.environ | {"PREFECT_API_URL": prefect_server},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: query("select count(*) > 31 from raw.loads") == [(True,)], "the first chunks", 180)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # What was being committed is, a moment after.
    wait_until(lambda: not busy(query), "the database to have done what it was told")
    before: dict[date, int] = dict(query("select day, load_id from raw.loads"))
    assert assert_whole(query) == set(before)

    status, output = run(main=backfill.main)
    assert status == 0, output
    after: dict[date, int] = dict(query("select day, load_id from raw.loads"))
    assert len(after) == 365
    assert {day: after[day] for day in before} == before
    assert query("select sum(flight_count)::int from analytics.carrier_daily_punctuality") == [(336_776,)]
    assert query("select sum(cancelled_count)::int from analytics.airport_daily_delays") == [(8_255,)]
    assert assert_whole(query) == set(landing.days())
