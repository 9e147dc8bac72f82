"""The Prefect server's clock, as a flow run's process knows it."""

import contextlib
import time
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

import httpx

DATE_SPAN = timedelta(seconds=2)
"""How far the server's time may be after its Date header, which has whole seconds and is up to a second old."""


class ServerClock:
    """Tells the server's time by this node's clock, or by the newest answer if this node's clock is wrong."""

    def __init__(self) -> None:
        self._answer: tuple[datetime, float] | None = None
        """The Date of the newest answer, and when it was received, on the clock of `time.monotonic`."""

    def observe(self, _: httpx.Request, response: httpx.Response) -> None:
        """Keep the Date header of an answer."""
        with contextlib.suppress(ValueError):
            self._answer = parsedate_to_datetime(response.headers.get("Date", "")), time.monotonic()

    def now(self) -> datetime:
        """Return the time: never after the server's, unless this node's clock is ahead by less than two seconds."""
        here = datetime.now(UTC)
        if self._answer is None:
            return here
        date, received = self._answer
        earliest = date + timedelta(seconds=time.monotonic() - received)
        return here if earliest <= here <= earliest + DATE_SPAN else earliest
