"""The report: steps, failures and an empty warehouse."""

import struct
from datetime import date

import pytest
from rich.console import Console

from flows import report
from flows.report import Step, Summary
from orchestration.errors import WarehouseError
from tests.parts import free_port, settings_of

STEPS = [
    Step("extract", "2013-01-02", 0.01, 1015),
    Step("load", "raw.flights 2013-01-02", 0.5, 943),
    Step("load", "raw.planes", 0, 3322, cached=True),
    Step("build", "int_flights", 0.25, 943),
    Step("build", "carrier_daily_punctuality", 0.1, failure='column "x" does not | exist\nLINE 1'),
    Step("build", "route_performance", 0, skipped=True),
    Step("test", "unique_stg_loads_load_day", 0.05),
    Step("test", "not_null_stg_loads_load_id", 0.05, failure="Got 1 result"),
]
DAYS = [(date(2013, 1, day), 0.7 + day / 100) for day in (1, 2)]
SUMMARY = Summary(STEPS, "It failed.", {"int_flights": 1785}, DAYS, [("United", 0.8), ("Delta", 0.5)])


def _terminal(summary: Summary, width: int = 100) -> str:
    console = Console(width=width, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(report.terminal(summary))
    return capture.get()


def test_headline_counts_rows_models_and_tests() -> None:
    assert SUMMARY.headline == "Failed to 2013-01-02: 943 rows loaded, 1 models built, 1/2 tests passed"
    assert Summary([], None, {"a": 1, "b": 2}).headline == "The warehouse: 2 marts"
    assert Summary(STEPS[:2], None).headline == "Completed: 943 rows loaded, 0 models built, 0/0 tests passed"


def test_terminal_shows_each_step_with_its_outcome() -> None:
    lines = _terminal(SUMMARY).splitlines()

    def line(name: str) -> str:
        return next(line for line in lines if name in line)

    assert line("raw.planes").split()[-1] == "cached"
    assert "failed" in line("carrier_daily_punctuality")
    assert line("route_performance").split()[-1] == "skipped"
    assert "943" in line("int_flights")
    assert "1,785" in line("int_flights")
    assert not any("unique_stg_loads" in line for line in lines), "a test that passed"
    assert "failed" in line("not_null_stg_loads_load_id")
    assert all(len(line) <= 100 for line in lines)


def test_terminal_of_eighty_columns_keeps_figures_and_outcomes() -> None:
    text = _terminal(SUMMARY, width=80)
    heading = next(line for line in text.splitlines() if "seconds" in line)
    assert heading.split() == ["step", "what", "written", "rows", "seconds"]
    assert all(word in text for word in ("extract", "1,785", "cached", "━━ failed", "skipped"))
    assert all(len(line) <= 80 for line in text.splitlines())


def test_reason_does_not_break_the_markdown_table() -> None:
    lines = report.markdown(SUMMARY).splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert "> It failed." in lines
    assert any('failed: column "x" does not \\| exist LINE 1' in row for row in rows)


@pytest.mark.parametrize(
    "summary",
    [SUMMARY, Summary([], None, {}, DAYS[:1], [("United", 1.0)]), Summary(STEPS, None, {}, DAYS * 20, [])],
    ids=["failed", "one day", "many days"],
)
def test_plot_is_a_png(summary: Summary) -> None:
    png = report.plot(summary)
    assert png.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width >= 1000
    assert height >= 400


def test_summary_of_an_empty_warehouse_has_no_marts(database: str) -> None:
    assert report.summarise([]) == Summary([], None, {})


def test_report_after_a_failure_works_without_a_warehouse() -> None:
    with settings_of(WAREHOUSE_URL=f"postgresql://127.0.0.1:{free_port()}/db"):
        assert report.summarise(STEPS, "why") == Summary(STEPS, "why")
        with pytest.raises(WarehouseError, match="cannot be reached"):
            report.summarise(STEPS)
