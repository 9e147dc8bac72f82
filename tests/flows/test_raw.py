"""Loads into schema raw are idempotent and atomic, also when they are killed."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

import psycopg
import pytest

from flows import landing, raw
from orchestration.errors import WarehouseError
from tests.parts import Query, wait_until

FIRST, SECOND, THIRD = (date(2013, 1, day) for day in (1, 2, 3))
FLIGHTS = {FIRST: 842, SECOND: 943, THIRD: 914}

# One row per day: the counts in raw.loads and the counted rows. A day is whole if both are equal.
CONTENT = """
    select
        coalesce(day), loads.flights, coalesce(flights.count, 0), loads.weather, coalesce(weather.count, 0)
    from raw.loads
    full join (select flight_date as day, count(*) from raw.flights group by 1) flights using (day)
    full join (select weather_date as day, count(*) from raw.weather group by 1) weather using (day)
    order by 1
"""


def assert_whole(query: Query) -> set[date]:
    """Check that each loaded day is whole and without duplicates; return the days."""
    rows = query(CONTENT)
    for day, ledger_flights, flights, ledger_weather, weather in rows:
        assert (ledger_flights, ledger_weather) == (flights, weather), f"{day} is not whole"
    duplicates = query("select time_hour, carrier, flight from raw.flights group by 1, 2, 3 having count(*) > 1")
    assert duplicates == []
    return {row[0] for row in rows}


def test_load_stores_the_rows_of_a_day(query: Query) -> None:
    raw.prepare()
    loaded = raw.load_days([FIRST])
    assert loaded.tables == {"flights": 842, "weather": 67}
    assert loaded.rows == 909
    assert raw.loaded_days() == {FIRST: 842}
    assert assert_whole(query) == {FIRST}


def test_loaded_values_equal_those_of_the_file(query: Query) -> None:
    raw.prepare()
    raw.load_days([FIRST])
    first = query(
        "select year, month, day, dep_time, sched_dep_time, dep_delay, arr_time, sched_arr_time, arr_delay,"
        "carrier, flight, tailnum, origin, dest, air_time, distance, hour, minute, time_hour at time zone 'UTC'"
        " from raw.flights where flight = 1545 and carrier = 'UA'"
    )
    assert [str(value) for value in first[0]] == (
        [
            "2013",
            "1",
            "1",
            "517",
            "515",
            "2",
            "830",
            "819",
            "11",
            "UA",
            "1545",
            "N14228",
            "EWR",
            "IAH",
            "227",
            "1400",
            "5",
            "15",
            "2013-01-01 10:00:00",
        ]
    )
    assert query("select count(*) from raw.flights where dep_time is null") == [(4,)]


@pytest.mark.parametrize("times", [2, pytest.param(3, marks=pytest.mark.further)])
def test_repeated_load_leaves_each_day_once_with_a_new_load_id(query: Query, times: int) -> None:
    raw.prepare()
    for _ in range(times):
        raw.load_days([FIRST, SECOND])
    assert assert_whole(query) == {FIRST, SECOND}
    assert query("select load_id from raw.loads") == [(times,)] * 2


def test_load_of_one_day_keeps_the_others(query: Query) -> None:
    raw.prepare()
    raw.load_days([FIRST, SECOND])
    before = query("select ctid from raw.flights where flight_date = %s", FIRST)
    raw.load_days([SECOND])
    assert query("select ctid from raw.flights where flight_date = %s", FIRST) == before


def test_day_given_twice_is_loaded_once(query: Query) -> None:
    raw.prepare()
    assert raw.load_days([FIRST, FIRST]).tables["flights"] == 842
    assert_whole(query)


def test_whole_year_has_the_documented_rows(query: Query) -> None:
    raw.prepare()
    raw.load_days(landing.days())
    for table in landing.REFERENCE:
        raw.load_reference(table)
    assert len(assert_whole(query)) == 365
    assert query("select count(*), count(*) filter (where dep_time is null) from raw.flights") == [(336776, 8255)]
    assert query(
        "select (select count(*) from raw.weather), (select count(*) from raw.planes),"
        " (select count(*) from raw.airlines), (select count(*) from raw.airports)"
    ) == [(26115, 3322, 16, 1458)]


def test_reference_table_is_replaced_as_a_whole(query: Query) -> None:
    raw.prepare()
    for _ in range(2):
        assert raw.load_reference("planes").tables == {"planes": 3322}
    assert query("select count(*) from raw.planes") == [(3322,)]


def test_next_day_follows_the_newest(query: Query, landing_zone: Path) -> None:
    raw.prepare()
    assert raw.next_day() == FIRST
    raw.load_days([SECOND])
    assert raw.next_day() == THIRD
    raw.load_days([THIRD])
    assert raw.next_day() is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2013,1,2,early", r"Loading 2013-01-02 failed: .*Correct the source file"),
        (
            "2013,1,2" + ",NA" * 15 + ",2013-01-02T10:00:00Z",
            r"Loading 2013-01-02 failed: null value in column",
        ),
    ],
)
def test_wrong_line_leaves_the_day_unchanged(query: Query, landing_zone: Path, line: str, message: str) -> None:
    raw.prepare()
    raw.load_days([FIRST, SECOND])
    before = query("select day, load_id, loaded_at from raw.loads")
    with (landing_zone / "flights.csv").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(WarehouseError, match=message):
        raw.load_days([SECOND])
    assert query("select day, load_id, loaded_at from raw.loads") == before
    assert_whole(query)


def test_error_of_a_wrong_value_names_line_and_column(query: Query, landing_zone: Path) -> None:
    raw.prepare()
    with (landing_zone / "planes.csv").open("a") as file:
        file.write("N1,old,x,y,z,1,2,3,q\n")
    with pytest.raises(WarehouseError, match=r'"old" \(COPY planes, line 3323, column year: "old"\)'):
        raw.load_reference("planes")


def test_line_break_inside_a_value_is_an_error(query: Query, landing_zone: Path) -> None:
    raw.prepare()
    with (landing_zone / "airlines.csv").open("a") as file:
        file.write('ZZ,"two\nlines"\n')
    with pytest.raises(WarehouseError, match=r"raw\.airlines took 17 of 18 lines; nothing was loaded"):
        raw.load_reference("airlines")
    assert query("select count(*) from raw.airlines") == [(0,)]


def test_concurrent_loads_of_a_day_are_serialised(query: Query) -> None:
    raw.prepare()
    threads = [threading.Thread(target=raw.load_days, args=[[FIRST, SECOND]]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert assert_whole(query) == {FIRST, SECOND}
    # Both days are of the same load, the last of the six.
    assert len(query("select distinct load_id from raw.loads")) == 1
    assert query("select last_value from raw.load_ids") == [(6,)]


def test_concurrent_preparation_succeeds(query: Query) -> None:
    failures: list[BaseException] = []

    def prepare() -> None:
        try:
            raw.prepare()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=prepare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_new_raw_schema_has_another_identity(query: Query) -> None:
    raw.prepare()
    before = raw.identity()
    assert raw.identity() == before
    query("drop schema raw cascade")
    raw.prepare()
    assert raw.identity() != before


# For each N that it reads, a fork kills itself before the Nth message to Postgres, or in the middle of a COPY. One
# interpreter imports for all forks. It prints the exit status of each.
KILLED_AT = """
import os, signal, sys
from datetime import date
import psycopg

left = 0

def countdown():
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

execute, write, commit = psycopg.Connection.execute, psycopg.Copy.write, psycopg.Connection.commit

def patched_execute(self, *args, **kwargs):
    countdown()
    return execute(self, *args, **kwargs)

def patched_write(self, data):
    half = len(data) // 2
    write(self, data[:half])
    countdown()
    write(self, data[half:])
    countdown()

def patched_commit(self):
    countdown()
    commit(self)
    countdown()

psycopg.Connection.execute = patched_execute
psycopg.Copy.write = patched_write
psycopg.Connection.commit = patched_commit

from flows import raw

for line in sys.stdin:
    fork = os.fork()
    if not fork:
        left = int(line)
        raw.prepare()
        raw.load_days([date(2013, 1, 1), date(2013, 1, 2)])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]), flush=True)
"""


def test_load_killed_at_any_step_leaves_whole_days(query: Query, landing_zone: Path) -> None:
    raw.prepare()
    raw.load_days([FIRST])
    steps = 0
    command = [sys.executable, "-c", KILLED_AT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as loader:
        assert loader.stdin
        assert loader.stdout
        while True:
            print(steps, file=loader.stdin, flush=True)
            if (status := int(loader.stdout.readline())) == 0:
                break
            assert status == -signal.SIGKILL
            assert assert_whole(query) in ({FIRST}, {FIRST, SECOND})
            steps += 1
        loader.stdin.close()
    assert loader.returncode == 0
    assert steps > 10, "the load was not killed at its statements"
    assert assert_whole(query) == {FIRST, SECOND}


def test_reader_never_sees_a_part_of_a_day(query: Query, database: str) -> None:
    raw.prepare()
    raw.load_days([FIRST])
    stop = threading.Event()
    seen: set[tuple[int, int]] = set()

    def read() -> None:
        with psycopg.connect(database, autocommit=True) as connection:
            while not stop.is_set():
                row = connection.execute(
                    "select count(*), (select count(*) from raw.weather) from raw.flights"
                ).fetchone()
                assert row is not None
                seen.add((row[0], row[1]))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        raw.load_days([FIRST])
    stop.set()
    reader.join()
    assert seen == {(842, 67)}


def test_cut_connection_is_a_transient_error(query: Query, postgres: str) -> None:
    raw.prepare()
    with psycopg.connect(os.environ["WAREHOUSE_URL"]) as blocker:
        blocker.execute("lock table raw.flights in share mode")
        caught: list[WarehouseError] = []

        def load() -> None:
            try:
                raw.load_days([FIRST])
            except WarehouseError as error:
                caught.append(error)

        thread = threading.Thread(target=load)
        thread.start()
        pattern = "select pid from pg_stat_activity where wait_event_type = 'Lock' and starts_with(query, 'delete')"
        pids = wait_until(lambda: query(pattern), "the load to wait for the lock")
        query("select pg_terminate_backend(%s)", pids[0][0])
        thread.join()
    assert len(caught) == 1
    assert caught[0].transient
    assert assert_whole(query) == set()


LOADING = """
    select 1 from pg_stat_activity
    where datname = current_database() and pid <> pg_backend_pid() and xact_start is not null
"""
"""Selects other connections that have an open transaction."""


WRITERS = """
    select distinct xmin::text from raw.loads union select distinct xmin::text from raw.flights
    union select distinct xmin::text from raw.weather
"""
"""Selects the transactions that have written the present rows."""


def _killed_in_its_transaction(query: Query, seconds: float) -> bool:
    """Kill a load of 90 days some seconds after its transaction began; return whether the transaction was open then."""
    code = "from flows import landing, raw; raw.load_days(landing.days()[:90])"
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        wait_until(lambda: query(LOADING) or process.poll() is not None, "the transaction to begin")
        time.sleep(seconds)
        process.send_signal(signal.SIGSTOP)
        was_open = bool(query(LOADING))
        process.kill()
    wait_until(lambda: not query(LOADING), "the transaction to end")
    return process.returncode == -signal.SIGKILL and was_open


@pytest.mark.further
def test_load_killed_at_a_random_moment_of_its_transaction_changes_nothing(query: Query) -> None:
    days = landing.days()[:90]
    raw.prepare()
    seconds = raw.load_days(days).load_seconds
    chance = random.Random(2013)  # noqa: S311 - moments, no secret
    kills = 0
    while kills < 3:
        before = query(WRITERS)
        was_open = _killed_in_its_transaction(query, chance.uniform(0, seconds))
        after = query(WRITERS)
        assert len(after) == 1, "a part of a transaction has changed rows"
        assert assert_whole(query) == set(days)
        if was_open and after == before:
            kills += 1
        else:
            seconds /= 2  # the kill came too late, perhaps between sending the commit and its execution
    raw.load_days(days)
    assert assert_whole(query) == set(days)
