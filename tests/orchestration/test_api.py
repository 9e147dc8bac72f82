"""What an answer's date says of another clock, by answers with dates of their own."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest

from orchestration.prefect_api import ahead


def answer(date: str, *, took: float = 0) -> httpx.Response:
    """An answer with that Date, which took so many seconds."""
    made = httpx.Response(200, headers={"Date": date} if date else {})
    made.elapsed = timedelta(seconds=took)
    return made


@pytest.mark.parametrize(
    ("seconds", "took", "found"),
    [(0, 0, 0), (-1, 0, 0), (2, 0, 0), (300, 0, 300), (-300, 0, -300), (-20, 25, 0), (300, 25, 300), (-300, 25, -275)],
)
def test_a_slow_answer_is_no_slow_clock(seconds: float, took: float, found: float) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    assert abs(ahead(answer(date, took=took)).total_seconds() - found) < (1.5 if found else 0.001)


@pytest.mark.parametrize("date", ["", "yesterday"])
def test_an_answer_without_a_date_says_nothing_of_a_clock(date: str) -> None:
    assert ahead(answer(date)) == timedelta()
