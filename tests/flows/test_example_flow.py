"""The daily job: its steps, its results and its error messages."""

import base64
import logging
import struct
import threading
from collections.abc import Callable
from datetime import date
from pathlib import Path

import psycopg
import pytest
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry

from flows import example_flow, landing, raw
from flows.report import Step
from orchestration.errors import WarehouseError
from tests.flows.conftest import Api, Run
from tests.flows.test_raw import FIRST, SECOND, THIRD, assert_whole
from tests.parts import Query, free_port, new_database, rows_of, wait_until

MARTS = (
    "aircraft_daily_utilisation",
    "airport_daily_delays",
    "carrier_daily_punctuality",
    "route_performance",
    "weather_delay_effect",
)


def _rows_by_mart(query: Query) -> dict[str, int]:
    return {mart: query(f"select count(*) from analytics.{mart}")[0][0] for mart in MARTS}


def _task_states(api: Api, expected: dict[str, str]) -> None:
    """Wait until the task runs of the newest `ingest` have these states: the server records them with a delay."""
    ingest = api.newest("ingest")
    wait_until(lambda: api.task_states(ingest) == expected, f"{expected} on the server")


def _assert_reported(output: str, api: Api, query: Query) -> None:
    """Check that UI and terminal show what the first run on an empty warehouse loaded and built."""
    artifacts = api.artifacts(api.newest("report"))
    markdown = str(artifacts["daily-report"].data)
    for mart, rows in _rows_by_mart(query).items():
        assert f"| build | `{mart}` | {rows:,} | {rows:,} |" in markdown
        assert any(mart in line and line.count(f" {rows:,} ") == 2 for line in output.splitlines())
    assert "| load | `raw.flights 2013-01-01` | 842 |  |" in markdown
    image = str(artifacts["daily-report-plot"].data)
    prefix = "data:image/png;base64,"
    assert image.startswith(prefix)
    png = base64.b64decode(image.removeprefix(prefix))
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1000
    assert height > 300


def test_runs_load_consecutive_days_and_report_them(run: Run, api: Api, query: Query) -> None:
    status, output = run()
    assert status == 0, output
    assert "Completed to 2013-01-01: 5,705 rows loaded, 12 models built, 26/26 tests passed" in output
    assert _rows_by_mart(query) == {
        "aircraft_daily_utilisation": 647,
        "airport_daily_delays": 3,
        "carrier_daily_punctuality": 14,
        "route_performance": 166,
        "weather_delay_effect": 6,
    }
    _assert_reported(output, api, query)
    reference = ["load airlines", "load airports", "load planes"]
    _task_states(api, {"load 2013-01-01": "Completed"} | dict.fromkeys(reference, "Completed"))

    status, output = run()
    assert status == 0, output
    assert assert_whole(query) == {FIRST, SECOND}
    _task_states(api, {"load 2013-01-02": "Completed"} | dict.fromkeys(reference, "Cached"))
    assert output.count("cached") == 3

    status, output = run("--day", "2013-02-08", "--full-refresh")
    assert status == 0, output
    assert "Completed to 2013-02-08: 5,798 rows loaded, 12 models built, 26/26 tests passed" in output
    assert assert_whole(query) == {FIRST, SECOND, date(2013, 2, 8)}
    _task_states(api, {"load 2013-02-08": "Completed"} | dict.fromkeys(reference, "Completed"))
    assert query("select sum(flight_count)::int from analytics.carrier_daily_punctuality") == [(842 + 943 + 930,)]
    for flow in ("dbt-pipeline", "ingest", "transform", "report"):
        assert api.newest(flow).state_name == "Completed"


@pytest.mark.further
def test_each_subflow_runs_alone(api: Api, query: Query, capfd: pytest.CaptureFixture[str]) -> None:
    assert [step.rows for step in example_flow.ingest(date(2013, 1, 3)) if step.kind == "load"][:2] == [914, 72]
    built = example_flow.transform(select="+carrier_daily_punctuality")
    assert "carrier_daily_punctuality" in {step.name for step in built}
    assert "route_performance" not in {step.name for step in built}
    capfd.readouterr()
    example_flow.report()
    assert "The warehouse to 2013-01-03: 1 marts" in capfd.readouterr().out


def test_run_without_a_new_day_builds_a_selection(run: Run, landing_zone: Path, api: Api) -> None:
    raw.prepare()
    raw.load_days([FIRST, SECOND, THIRD])
    status, output = run("--select=+route_performance")
    assert status == 0, output
    assert "Nothing new to load: the landing zone ends on 2013-01-03." in output
    assert "route_performance" in output
    assert "weather_delay_effect" not in output
    assert api.newest("dbt-pipeline").state_name == "Completed"


def test_parameters_have_types_and_descriptions_in_the_ui() -> None:
    from prefect.utilities.callables import parameter_schema

    schema = parameter_schema(example_flow.dbt_pipeline).properties
    assert schema["day"]["anyOf"][0] == {"type": "string", "format": "date"}
    assert schema["full_refresh"]["type"] == "boolean"
    for parameter in ("day", "full_refresh", "select"):
        assert len(schema[parameter]["description"]) > 20


LOADS = "select last_value, is_called from raw.load_ids"
"""Counts started loads: a rollback does not reset a sequence."""


def test_load_is_retried_after_a_lost_connection(
    api: Api, query: Query, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_flow.load_days, "retry_delay_seconds", [0, 0, 0])
    raw.prepare()
    waiting = (
        "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        " and starts_with(query, 'delete') and pid <> all(%s)"
    )
    cut: list[int] = []

    def cut_twice() -> None:
        with psycopg.connect(database) as blocker:
            blocker.execute("lock table raw.flights in share mode")
            locked.set()
            for _ in range(2):
                [(pid,)] = wait_until(lambda: query(waiting, cut), "the load to wait for the lock")
                query("select pg_terminate_backend(%s)", pid)
                cut.append(pid)

    locked = threading.Event()
    thread = threading.Thread(target=cut_twice)
    thread.start()
    assert locked.wait(60)
    example_flow.ingest(FIRST)
    thread.join()
    assert len(cut) == 2
    assert query(LOADS) == [(3, True)]
    assert assert_whole(query) == {FIRST}


@pytest.mark.further
def test_wrong_source_file_is_not_retried(api: Api, query: Query, landing_zone: Path) -> None:
    with (landing_zone / "flights.csv").open("a") as file:
        file.write("2013,1,1,early\n")
    with pytest.raises(WarehouseError, match="Correct the source file"):
        example_flow.ingest(FIRST)
    assert query(LOADS) == [(1, True)]


@pytest.mark.further
def test_another_warehouse_loads_the_reference_tables(api: Api, postgres: str, query: Query) -> None:
    example_flow.ingest(FIRST)
    with new_database(postgres) as other:
        example_flow.ingest(FIRST)
        assert rows_of(other, "select count(*) from raw.planes") == [(3322,)]


# --- errors: one sentence, exit status 1, state Failed, no half-loaded day -------------------------


def assert_failed(outcome: tuple[int, str], api: Api, *sentences: str, flow: str = "dbt-pipeline") -> None:
    """Check that the run failed with these sentences, on the terminal and in its state, without a traceback."""
    status, output = outcome
    assert status == 1, output
    last = output.strip().splitlines()[-1]
    failed_run = api.newest(flow)
    assert failed_run.state_name == "Failed"
    for sentence in sentences:
        assert sentence in output.split("\nFailed: ")[-1], last
        assert sentence in (failed_run.state.message or "") if failed_run.state else False
    assert "Traceback" not in output
    assert 'File "' not in output


@pytest.mark.further
def test_day_outside_the_data_is_an_error(run: Run, api: Api, query: Query) -> None:
    outcome = run("--day", "2012-12-31")
    assert_failed(outcome, api, "There are no flights of 2012-12-31", "2013-01-01 to 2013-12-31. Choose a day")
    assert_failed(run("--day", "2999-01-01"), api, "There are no flights of 2999-01-01 (it is in the future)")
    assert query("select schema_name from information_schema.schemata where schema_name = 'raw'") == []


def test_day_that_is_no_date_is_an_error(run: Run, api: Api) -> None:
    assert_failed(run("--day", "8 Feb"), api, "'8 Feb' is not a date. Write it as YYYY-MM-DD, for example 2013-02-08")


def test_unreachable_warehouse_is_an_error_without_the_password(
    run: Run, api: Api, use_settings: Callable[..., None]
) -> None:
    port = free_port()
    use_settings(WAREHOUSE_URL=f"postgresql://me:s3cret@127.0.0.1:{port}/db")
    outcome = run()
    assert_failed(outcome, api, f"The warehouse at 127.0.0.1:{port}/db cannot be reached", "Check WAREHOUSE_URL")
    assert "s3cret" not in outcome[1]


@pytest.mark.further
def test_wrong_warehouse_url_is_an_error(run: Run, api: Api, use_settings: Callable[..., None]) -> None:
    use_settings(WAREHOUSE_URL="mysql://db/x")
    assert_failed(run(), api, "WAREHOUSE_URL='mysql://db/x' is wrong: not a Postgres URL")


@pytest.mark.further
def test_selection_that_matches_nothing_is_an_error(run: Run, api: Api, query: Query) -> None:
    for selection, sentence in (
        ("carier_daily_punctuality", "The selection 'carier_daily_punctuality' matches no node"),
        ("colour:blue", "'colour' is not a valid method name"),
    ):
        outcome = run("--day", "2013-01-01", "--select", selection)
        assert_failed(outcome, api, sentence, "othing was built")
        assert assert_whole(query) == {FIRST}


@pytest.mark.further
def test_wrong_sql_of_a_model_is_an_error_and_the_next_run_completes(
    run: Run, api: Api, query: Query, project_copy: Path
) -> None:
    assert run("--day", "2013-01-01", "--select", "+route_performance +carrier_daily_punctuality")[0] == 0
    before = query("select * from analytics.route_performance order by 1, 2")
    model = project_copy / "models" / "marts" / "carrier_daily_punctuality.sql"
    model.write_text(model.read_text().replace("flights.is_cancelled", "flights.is_canceled"))
    outcome = run("--day", "2013-01-02")
    assert_failed(
        outcome,
        api,
        "dbt build: 1 of 40 nodes failed, 5 skipped behind: model carrier_daily_punctuality "
        "(models/marts/carrier_daily_punctuality.sql): column flights.is_canceled does not exist",
        "Built, each whole and up to date: ",
        "route_performance",
    )
    assert assert_whole(query) == {FIRST, SECOND}
    assert query("select count(*) from analytics.carrier_daily_punctuality") == [(14,)]
    assert query("select * from analytics.route_performance order by 1, 2") != before
    markdown = str(api.artifacts(api.newest("report"))["daily-report"].data)
    assert "column flights.is_canceled does not exist" in markdown
    assert "failed" in outcome[1]

    # After the correction another run builds all days, with the day before.
    model.write_text(model.read_text().replace("flights.is_canceled", "flights.is_cancelled"))
    assert run("--day", "2013-01-03", "--select", "+carrier_daily_punctuality")[0] == 0
    assert query("select count(distinct flight_date) from analytics.carrier_daily_punctuality") == [(3,)]


def test_retried_run_continues_with_its_day(api: Api, run: Run, query: Query, project_copy: Path) -> None:
    """It runs the remaining nodes, or all nodes if another run has loaded a day meanwhile."""
    model = project_copy / "models" / "marts" / "carrier_daily_punctuality.sql"
    right = model.read_text()
    model.write_text(right.replace("flights.is_cancelled", "flights.is_canceled"))
    assert run()[0] == 1
    failed = api.newest("dbt-pipeline")
    built = query("select oid from pg_class where relname = 'route_performance'")
    model.write_text(right)

    def retry_leaves(days: set[date]) -> None:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(failed.id, AwaitingRetry(), force=True)
            run_flow(example_flow.dbt_pipeline, flow_run=client.read_flow_run(failed.id))
        assert api.newest("dbt-pipeline").id == failed.id
        assert api.newest("dbt-pipeline").state_name == "Completed"
        assert assert_whole(query) == days
        assert query("select count(distinct flight_date) from analytics.carrier_daily_punctuality") == [(len(days),)]

    retry_leaves({FIRST})
    # A build replaces the table, so its oid changes.
    assert query("select oid from pg_class where relname = 'route_performance'") == built
    raw.load_days([SECOND])
    retry_leaves({FIRST, SECOND})
    assert query("select oid from pg_class where relname = 'route_performance'") != built


@pytest.mark.further
def test_model_that_does_not_compile_is_an_error(run: Run, api: Api, query: Query, project_copy: Path) -> None:
    model = project_copy / "models" / "marts" / "route_performance.sql"
    model.write_text("select * from {{ ref('int_flihgts') }}")
    outcome = run("--day", "2013-01-01")
    assert_failed(outcome, api, "dbt build could not start", "route_performance", "int_flihgts", "Nothing was built.")
    assert assert_whole(query) == {FIRST}


def test_failed_data_test_is_an_error(run: Run, api: Api, query: Query, landing_zone: Path) -> None:
    with (landing_zone / "flights.csv").open("a") as file:
        file.write("2013,1,1,517,515,2,830,819,11,ZZ,1,N14228,EWR,IAH,227,1400,5,15,2013-01-01T10:00:00Z\n")
    outcome = run("--day", "2013-01-01", "--select", "+carrier_daily_punctuality")
    assert_failed(
        outcome,
        api,
        "test relationships_stg_flights_carrier_code__carrier_code__ref_stg_airlines_",
        "Got 1 result, configured to fail if != 0",
        "Built, each whole and up to date: ",
    )
    assert assert_whole(query) == {FIRST}
    assert query("select to_regclass('analytics.carrier_daily_punctuality')") == [(None,)]


def test_wrong_line_in_the_source_is_an_error(run: Run, api: Api, query: Query, landing_zone: Path) -> None:
    with (landing_zone / "flights.csv").open("a") as file:
        file.write("2013,1,2,early\n")
    assert_failed(run("--day", "2013-01-02"), api, "Loading 2013-01-02 failed", "Correct the source file")
    assert assert_whole(query) == set()


def test_unexpected_error_keeps_its_traceback(
    api: Api, query: Query, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def crash() -> list[date]:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(landing, "days", crash)
    with caplog.at_level(logging.ERROR), pytest.raises(ZeroDivisionError):
        example_flow.ingest()
    assert any(record.exc_info for record in caplog.records)


def test_steps_reach_a_subflow_unchanged() -> None:
    """Prefect validates a flow's parameters, which must not change a step."""
    steps = [Step("load", "raw.x", 0.5, 3, cached=True), Step("build", "y", 1, failure="why")]
    assert example_flow.report.validate_parameters({"steps": steps})["steps"] == steps
