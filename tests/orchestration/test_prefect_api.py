"""The client of the Prefect API: waiting for the API, and the offset of the server's clock."""

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from orchestration.errors import ApiError
from orchestration.prefect_api import clock_offset, connected
from tests.parts import free_port


def test_api_that_is_waited_for_is_reported_once() -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    reports: list[str] = []

    async def connect() -> None:
        async with connected(5, reports.append):
            pass

    with temporary_settings({PREFECT_API_URL: url}), pytest.raises(ApiError, match="does not answer"):
        asyncio.run(connect())
    assert reports == [f"Waiting for the Prefect API at {url}: All connection attempts failed"]


def _response(date: str, *, seconds: float = 0) -> httpx.Response:
    """Return a response with a Date header that arrives that many seconds after its request."""
    response = httpx.Response(200, headers={"Date": date} if date else {})
    response.elapsed = timedelta(seconds=seconds)
    return response


@pytest.mark.parametrize(
    ("ahead", "elapsed", "offset"),
    [(0, 0, 0), (-1, 0, 0), (2, 0, 0), (300, 0, 300), (-300, 0, -300), (-20, 25, 0), (300, 25, 300), (-300, 25, -275)],
)
def test_slow_response_is_no_slow_clock(ahead: float, elapsed: float, offset: float) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=ahead), usegmt=True)
    measured = clock_offset(_response(date, seconds=elapsed)).total_seconds()
    assert abs(measured - offset) < (10 if offset else 0.001)


@pytest.mark.parametrize("date", ["", "yesterday"])
def test_response_without_a_date_gives_no_offset(date: str) -> None:
    assert clock_offset(_response(date)) == timedelta()
