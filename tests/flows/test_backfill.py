"""The backfill: a range of days, and continuation after a kill."""

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


def test_range_is_loaded_and_built_once(run: Run, api: Api, query: Query) -> None:
    status, output = run("--first", "2013-01-01", "--last", "2013-03-05", main=backfill.main)
    assert status == 0, output
    days = assert_whole(query)
    assert (min(days), max(days), len(days)) == (FIRST, date(2013, 3, 5), 64)
    assert "3 of 3 chunks are loaded." in output
    assert query("select count(distinct flight_date) from analytics.carrier_daily_punctuality") == [(64,)]

    # The second backfill skips loaded days.
    before = query("select day, load_id from raw.loads order by day")
    status, output = run("--first", "2013-01-01", "--last", "2013-03-06", main=backfill.main)
    assert status == 0, output
    assert "65 days, 1 of them to load." in output
    assert query("select day, load_id from raw.loads where day <= '2013-03-05' order by day") == before


def test_default_range_is_every_day_and_full_refresh_loads_again(run: Run, query: Query, landing_zone: Path) -> None:
    assert run(main=backfill.main)[0] == 0
    assert assert_whole(query) == {FIRST, SECOND, THIRD}
    assert run("--full-refresh", main=backfill.main)[0] == 0
    assert query("select distinct load_id from raw.loads") == [(2,)]


def test_range_that_ends_before_it_begins_is_an_error(run: Run, api: Api) -> None:
    status, output = run("--first", "2013-02-01", "--last", "2013-01-01", main=backfill.main)
    assert status == 1
    assert "Failed: The first day, 2013-02-01, is after the last, 2013-01-01. Exchange them." in output
    assert "Traceback" not in output
    assert api.newest("backfill").state_name == "Failed"


@pytest.mark.parametrize("option", [pytest.param("--first", marks=pytest.mark.further), "--last"])
def test_range_outside_the_data_is_an_error(run: Run, query: Query, option: str) -> None:
    status, output = run(option, "2014-01-01", main=backfill.main)
    assert status == 1
    assert "There are no flights of 2014-01-01" in output


@pytest.mark.further
def test_killed_backfill_continues_where_it_stopped(run: Run, query: Query, prefect_server: str) -> None:
    raw.prepare()
    last = date(2013, 6, 30)
    process = subprocess.Popen(
        [sys.executable, "flows/backfill.py", "--last", str(last)],
        env=os.environ | {"PREFECT_API_URL": prefect_server},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: query("select count(*) > 31 from raw.loads") == [(True,)], "the first chunks", 300)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    # Postgres may still finish a commit of the killed process.
    wait_until(lambda: not busy(query), "the end of the open transactions")
    before: dict[date, int] = dict(query("select day, load_id from raw.loads"))
    assert assert_whole(query) == set(before)

    status, output = run("--last", last, main=backfill.main)
    assert status == 0, output
    after: dict[date, int] = dict(query("select day, load_id from raw.loads"))
    assert {day: after[day] for day in before} == before
    assert assert_whole(query) == {day for day in landing.days() if day <= last}
    assert query("select sum(flight_count)::int from analytics.carrier_daily_punctuality") == [(166_158,)]
    assert query("select sum(cancelled_count)::int from analytics.airport_daily_delays") == [(4_883,)]
