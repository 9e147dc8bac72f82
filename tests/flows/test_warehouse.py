"""The dbt project `flows/warehouse`: its tests, its documentation, and incremental builds."""

import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psycopg
import pytest

from flows import landing, raw
from flows.example_flow import NO_UNIT_TESTS
from orchestration import warehouse
from orchestration.dbt import DbtProject
from orchestration.settings import ROOT
from tests.orchestration.dbt.conftest import LONG, Tiny
from tests.parts import answers, debian_postgres, free_port, new_database, rows_of, wait_until

PROJECT = ROOT / "flows" / "warehouse"
MODELS = (
    "analytics_intermediate.int_flights",
    "analytics.aircraft_daily_utilisation",
    "analytics.airport_daily_delays",
    "analytics.carrier_daily_punctuality",
    "analytics.route_performance",
    "analytics.weather_delay_effect",
)


pytestmark = pytest.mark.usefixtures("forked_dbt")


def _dbt(forked_dbt: Tiny, *arguments: str, target: Path) -> "subprocess.CompletedProcess[str]":
    """Run dbt's command line on the warehouse of the test."""
    return subprocess.run(
        [str(forked_dbt.python), "dbt", "--no-use-colors", *arguments,
         "--project-dir", str(PROJECT), "--profiles-dir", str(PROJECT),
         "--target-path", str(target), "--log-path", str(target)],
        env=os.environ | warehouse.environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(postgres: str, forked_dbt: Tiny) -> Iterator[str]:
    """Yield the URL of a warehouse with three loaded and built days."""
    with new_database(postgres) as url:
        raw.prepare()
        raw.load_days(landing.days()[:3])
        for table in landing.REFERENCE:
            raw.load_reference(table)
        assert DbtProject(PROJECT, environment=warehouse.environment).build(flags=NO_UNIT_TESTS).error() is None
        yield url


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the target folder of dbt's command line, with the parse of the last command."""
    return tmp_path_factory.mktemp("target")


@pytest.fixture(scope="module")
def manifest(built: str, forked_dbt: Tiny, target: Path) -> dict[str, Any]:
    """Return dbt's manifest of the project."""
    assert _dbt(forked_dbt, "parse", target=target).returncode == 0
    content: dict[str, Any] = json.loads((target / "manifest.json").read_text())
    return content


def test_unit_tests_pass(built: str, forked_dbt: Tiny, target: Path) -> None:
    result = _dbt(forked_dbt, "test", "--select", "test_type:unit", target=target)
    assert result.returncode == 0, result.stdout
    assert "PASS=6" in result.stdout


def test_sources_are_fresh_after_a_load_and_stale_two_days_later(built: str, forked_dbt: Tiny, target: Path) -> None:
    fresh = _dbt(forked_dbt, "source", "freshness", target=target)
    assert fresh.returncode == 0, fresh.stdout
    assert fresh.stdout.count("PASS freshness") == 3
    rows_of(built, "update raw.loads set loaded_at = loaded_at - interval '51 hours'")
    try:
        stale = _dbt(forked_dbt, "source", "freshness", target=target)
        assert stale.returncode == 1
        assert "ERROR STALE freshness of raw.flights" in stale.stdout
    finally:
        rows_of(built, "update raw.loads set loaded_at = loaded_at + interval '51 hours'")


def test_each_model_column_and_exposure_has_a_description(manifest: dict[str, Any]) -> None:
    nodes = [node for node in manifest["nodes"].values() if node["resource_type"] == "model"]
    nodes += manifest["sources"].values()
    for node in nodes:
        assert node["description"], node["name"]
        for column in node["columns"].values():
            assert column["description"], (node["name"], column["name"])
    assert all(exposure["description"] for exposure in manifest["exposures"].values())
    assert len(manifest["exposures"]) == 2


def test_each_mart_has_a_grain_a_contract_and_a_primary_key(manifest: dict[str, Any]) -> None:
    marts = [
        node
        for node in manifest["nodes"].values()
        if node["resource_type"] == "model" and node["path"].startswith("marts/")
    ]
    assert len(marts) == 5
    for mart in marts:
        assert mart["contract"]["enforced"], mart["name"]
        assert "One row per" in mart["description"], mart["name"]
        assert [constraint["type"] for constraint in mart["constraints"]] == ["primary_key"], mart["name"]


def test_postgres_enforces_the_primary_key_of_a_mart(built: str) -> None:
    """The primary key is a constraint in Postgres, so that Postgres refuses a duplicate row of any client."""
    with pytest.raises(psycopg.errors.UniqueViolation):
        rows_of(built, "insert into analytics.route_performance select * from analytics.route_performance limit 1")


def test_mart_has_the_figures_of_the_source(built: str) -> None:
    assert rows_of(
        built,
        "select flight_count, cancelled_count, diverted_count, departed_on_time_share::text,"
        " arrived_on_time_share::text, mean_departure_delay_minutes::text, mean_arrival_delay_minutes::text"
        " from analytics.carrier_daily_punctuality where flight_date = '2013-01-01' and carrier_code = 'UA'",
    ) == _carrier_from_the_file("UA", date(2013, 1, 1))


def _carrier_from_the_file(carrier: str, day: date) -> list[tuple[Any, ...]]:
    """Compute the figures from the source's lines in Python."""
    extract = landing.extract("flights", [day])
    names = extract.columns
    flights = [dict(zip(names, line.split(","), strict=True)) for line in extract.csv.decode().splitlines()]
    flights = [flight for flight in flights if flight["carrier"] == carrier]
    left = [int(flight["dep_delay"]) for flight in flights if flight["dep_delay"] != "NA"]
    arrived = [int(flight["arr_delay"]) for flight in flights if flight["arr_delay"] != "NA"]
    total = len(flights)
    return [
        (
            total,
            total - len(left),
            len(left) - len(arrived),
            f"{sum(delay < 15 for delay in left) / total:.4f}",
            f"{sum(delay < 15 for delay in arrived) / total:.4f}",
            f"{sum(left) / len(left):.2f}",
            f"{sum(arrived) / len(arrived):.2f}",
        )
    ]


def test_scheduled_times_are_local_on_days_when_the_clocks_change(postgres: str) -> None:
    with new_database(postgres) as url:
        raw.prepare()
        raw.load_days([date(2013, 3, 10), date(2013, 11, 3)])
        for table in landing.REFERENCE:
            raw.load_reference(table)
        assert (
            DbtProject(PROJECT, environment=warehouse.environment)
            .build(select="stg_flights", flags=NO_UNIT_TESTS)
            .error()
            is None
        )
        assert rows_of(
            url,
            "select count(*) from analytics_staging.stg_flights as staged join raw.flights as raw"
            " on raw.time_hour = staged.scheduled_hour and raw.carrier = staged.carrier_code"
            " and raw.flight = staged.flight_number where staged.scheduled_departure_at <>"
            " raw.flight_date + make_interval(hours => raw.hour, mins => raw.minute)",
        ) == [(0,)]


def _content(url: str) -> dict[str, list[tuple[Any, ...]]]:
    """Return all rows of all models, without the column `load_id`."""
    content = {}
    for model in MODELS:
        schema, table = model.split(".")
        columns = rows_of(
            url,
            "select string_agg(quote_ident(column_name), ', ') from information_schema.columns"
            " where table_schema = %s and table_name = %s and column_name <> 'load_id'",
            schema,
            table,
        )[0][0]
        content[model] = sorted(rows_of(url, f"select {columns} from {model}"), key=repr)
    return content


@pytest.mark.parametrize("seed", range(10 if LONG else 1))
def test_incremental_builds_equal_a_full_refresh(postgres: str, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - an order, no secret
    days = chance.sample(landing.days(), 5)
    with new_database(postgres) as url:
        raw.prepare()
        for table in landing.REFERENCE:
            raw.load_reference(table)
        project = DbtProject(PROJECT, environment=warehouse.environment)
        left = list(days)
        while left:
            batch = [left.pop() for _ in range(min(len(left), chance.randint(1, 2)))]
            again = chance.sample(days, 1)
            raw.load_days(batch + again)
            if chance.random() < 0.7:  # otherwise the run was killed between load and build
                assert project.build(flags=NO_UNIT_TESTS).error() is None
        assert project.build(flags=NO_UNIT_TESTS).error() is None
        incremental = _content(url)
        assert project.build(full_refresh=True, flags=NO_UNIT_TESTS).error() is None
        assert incremental == _content(url)
        assert len({row[0] for row in incremental["analytics.carrier_daily_punctuality"]}) == 5


@pytest.mark.further
def test_debians_postgres_builds_the_same_marts_as_the_embedded_postgres(built: str) -> None:
    with debian_postgres() as server, new_database(server) as url:
        [(version,)] = rows_of(url, "show server_version_num")
        assert int(version) >= 150_000, "docs/explanation/warehouse.md names 15 as the oldest version"
        raw.prepare()
        raw.load_days(landing.days()[:3])
        for table in landing.REFERENCE:
            raw.load_reference(table)
        assert DbtProject(PROJECT, environment=warehouse.environment).build(flags=NO_UNIT_TESTS).error() is None
        assert _content(url) == _content(built)


def test_corrected_source_reaches_the_marts(postgres: str, landing_zone: Path) -> None:
    with new_database(postgres) as url:
        raw.prepare()
        raw.load_days(landing.days())
        for table in landing.REFERENCE:
            raw.load_reference(table)
        project = DbtProject(PROJECT, environment=warehouse.environment)
        assert project.build(flags=NO_UNIT_TESTS).error() is None
        flights = landing_zone / "flights.csv"
        lines = flights.read_text().splitlines(keepends=True)
        flights.write_text("".join(line for line in lines if not line.startswith("2013,1,2,") or ",HA," not in line))
        raw.load_days([date(2013, 1, 2)])
        assert project.build(flags=NO_UNIT_TESTS).error() is None
        assert rows_of(
            url,
            "select flight_date::text from analytics.carrier_daily_punctuality where carrier_code = 'HA' order by 1",
        ) == [("2013-01-01",), ("2013-01-03",)]


def test_make_dbt_docs_serves_the_documentation(database: str, tmp_path: Path) -> None:
    port = free_port()
    # Flows of other tests delete files in dbt's default folders.
    variables = {"WAREHOUSE_URL": database, "DBT_TARGET_PATH": str(tmp_path), "DBT_LOG_PATH": str(tmp_path)}
    command = ["make", "--silent", "--old-file", ".venv/ready", "dbt-docs", f"PORT={port}"]
    served = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        wait_until(lambda: answers(f"http://127.0.0.1:{port}/"), "the documentation", 300)
        with urlopen(f"http://127.0.0.1:{port}/manifest.json") as answer:
            assert "model.flights.route_performance" in json.load(answer)["nodes"]
    finally:
        os.killpg(served.pid, signal.SIGTERM)
        served.wait(180)
