"""Kill the pipeline at random moments, run it again, and compare with an undisturbed run.

    make test-long FOR=kills KILLS=50

Each round has a copy of a warehouse with one day loaded. SIGKILL ends the run for the next day, together with its dbt,
and the run is repeated. The moment of the kill is drawn evenly over the time of an undisturbed run, from its first
connection to the warehouse. After the kill no day may be half-loaded. After the second run every model must have the
rows of the undisturbed run. A run that ends before its kill does not count.
"""

import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from orchestration.settings import ROOT
from tests.long.longtest import Findings, Parameters
from tests.parts import embedded_postgres, new_database, prefect_server, rows_of, wait_until

FIRST_DAY = "first_day"
"""The name of the database with the first day loaded."""

RUN_TIMEOUT_SECONDS = 600.0
"""Upper bound for a run that is not killed."""

HALF_LOADED = """
    select coalesce(loads.day, counted.day)::text
    from raw.loads
    full join (
        select day, sum(flights)::int as flights, sum(weather)::int as weather
        from (
            select flight_date as day, 1 as flights, 0 as weather from raw.flights
            union all select weather_date, 0, 1 from raw.weather
        ) as rows group by day
    ) as counted on counted.day = loads.day
    where (loads.flights, loads.weather) is distinct from (counted.flights, counted.weather)
"""


def read_models(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return all rows of all models of the warehouse at `url`, without the columns that name the load."""
    tables = rows_of(
        url,
        "select table_schema, table_name, string_agg(quote_ident(column_name), ', ' order by ordinal_position)"
        " from information_schema.columns where table_schema like 'analytics%%' and column_name not in"
        " ('load_id', 'loaded_at') group by 1, 2",
    )
    return {
        f"{schema}.{table}": sorted(rows_of(url, f"select {columns} from {schema}.{table}"), key=repr)
        for schema, table, columns in tables
    }


def _start(day: date, url: str, api: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "flows/example_flow.py", "--day", str(day)],
        cwd=ROOT,
        env=os.environ | {"WAREHOUSE_URL": url, "PREFECT_API_URL": api},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the processes of a run that has not ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_work(process: "subprocess.Popen[bytes]", url: str) -> None:
    """Wait for the run's first connection to the warehouse. Before it, a kill interrupts nothing."""
    connected = "select 1 from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    wait_until(lambda: rows_of(url, connected) or process.poll() is not None, "the run's first connection", 300)


def _time_run(day: date, url: str, api: str) -> float:
    """Return the seconds of an undisturbed run from its first connection to the warehouse."""
    process = _start(day, url, api)
    try:
        _wait_for_work(process, url)
        start = time.monotonic()
        status = process.wait(RUN_TIMEOUT_SECONDS)
    finally:
        _kill(process)
    if status:
        raise RuntimeError(f"an undisturbed run of {day} ended with {status}")
    return time.monotonic() - start


Complete = Callable[[date, str, str], object]
"""Runs a day to its end, without a kill, in the warehouse and with the Prefect API of the URLs."""


@dataclass(frozen=True)
class Baseline:
    """The undisturbed runs of two days.

    Args:
        days: both days.
        seconds: duration of the second day's run from its first connection to the warehouse.
        content: the rows of all models after both runs.
    """

    days: list[date]
    seconds: float
    content: dict[str, list[tuple[Any, ...]]] = field(repr=False)

    @classmethod
    @contextlib.contextmanager
    def measured(
        cls, postgres: str, api: str, days: list[date], complete: Complete = _time_run
    ) -> "Iterator[Baseline]":
        """Run both days in a new warehouse, and keep a copy of the warehouse between them while the block lasts.

        Args:
            postgres: the URL of the server's database `postgres`.
            api: the URL of the Prefect API.
            days: both days.
            complete: runs the first day.
        """
        with new_database(postgres) as url:
            complete(days[0], url, api)
            [(name,)] = rows_of(url, "select current_database()")
            rows_of(postgres, f"create database {FIRST_DAY} template {name}")
            baseline = cls(days, _time_run(days[1], url, api), read_models(url))
        try:
            yield baseline
        finally:
            rows_of(postgres, f"drop database {FIRST_DAY} with (force)")


@dataclass(frozen=True)
class Outcome:
    """What a killed run and the run after it left.

    Args:
        killed_after: seconds from the first connection to the warehouse to the kill.
        loaded: whether the day was loaded before the kill.
        half_loaded: half-loaded days after the kill; there must be none.
        same_as_undisturbed: whether the second run left the rows of an undisturbed run.
    """

    killed_after: float
    loaded: bool
    half_loaded: list[str]
    same_as_undisturbed: bool


def run_killed_at_random(
    postgres: str, api: str, undisturbed: Baseline, chance: random.Random, complete: Complete = _time_run
) -> Outcome:
    """Kill the run of the second day, and repeat it by `complete`. If the run ends before its kill, start over."""
    second, seconds = undisturbed.days[1], undisturbed.seconds
    while True:
        with new_database(postgres, template=FIRST_DAY) as url:
            moment = chance.uniform(0, seconds)
            process = _start(second, url, api)
            try:
                _wait_for_work(process, url)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(moment)
            finally:
                _kill(process)
            if process.returncode not in (0, -signal.SIGKILL):
                raise RuntimeError(f"a run of {second} ended with {process.returncode} before its kill")
            if process.returncode == 0:
                seconds = moment
                continue
            half_loaded = [day for (day,) in rows_of(url, HALF_LOADED)]
            loaded = rows_of(url, "select count(*) from raw.loads where day = %s", second) == [(1,)]
            complete(second, url, api)
            return Outcome(moment, loaded, half_loaded, read_models(url) == undisturbed.content)


def run(parameters: Parameters) -> Findings:
    """Kill `KILLS` runs at the moments that `SEED` draws."""
    kills = int(parameters["KILLS"])
    chance = random.Random(parameters["SEED"])  # noqa: S311 - moments, no secret
    outcomes: list[Outcome] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        embedded_postgres(Path(folder)) as postgres,
        tempfile.TemporaryDirectory() as home,
        prefect_server(Path(home)) as api,
        Baseline.measured(postgres, api, [date(2013, 1, 1), date(2013, 1, 2)]) as undisturbed,
    ):
        for number in range(1, kills + 1):
            outcome = run_killed_at_random(postgres, api, undisturbed, chance)
            outcomes.append(outcome)
            verdict = "ok" if outcome.same_as_undisturbed and not outcome.half_loaded else f"WRONG {outcome}"
            print(f"{number} of {kills}: killed after {outcome.killed_after:.2f} s, {verdict}", flush=True)
    moments = [outcome.killed_after for outcome in outcomes]
    loaded = Counter(outcome.loaded for outcome in outcomes)
    figures: dict[str, str | float] = {
        "runs killed": len(outcomes),
        "seconds of an undisturbed run from its first connection": round(undisturbed.seconds, 1),
        "moment of the kill: min, median, max (s)": f"{min(moments):.1f}, {statistics.median(moments):.1f}, "
        f"{max(moments):.1f}",
        "killed before, after the day was loaded": f"{loaded[False]}, {loaded[True]}",
        "half-loaded days after the kill": sum(len(outcome.half_loaded) for outcome in outcomes),
        "second runs that left other rows than an undisturbed run": sum(
            not outcome.same_as_undisturbed for outcome in outcomes
        ),
    }
    return Findings(
        figures, [str(outcome) for outcome in outcomes if outcome.half_loaded or not outcome.same_as_undisturbed]
    )
