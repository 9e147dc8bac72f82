"""When the worker polls between its regular polls."""

import asyncio
import contextlib
from datetime import UTC, datetime
from uuid import UUID

RETRIES = 2
"""How often the worker polls again for a run that an event has announced and a poll did not return."""

RETRY_SECONDS = 0.1
"""The pause before such a poll. The server sends an event just before it commits the state that the event reports."""


class PollSchedule:
    """Holds the moments of the next polls, and the runs that the polls are to find."""

    def __init__(self) -> None:
        self._moments: set[datetime] = set()
        self._has_changed = asyncio.Event()
        self._expected: dict[UUID, int] = {}

    def add(self, moment: datetime) -> None:
        """Schedule a poll."""
        self._moments.add(moment)
        self._has_changed.set()

    def expect(self, run: UUID) -> None:
        """Expect the next poll to return a run."""
        self._expected[run] = RETRIES

    def forget(self, runs: set[UUID]) -> None:
        """Expect these runs no longer."""
        for run in runs & self._expected.keys():
            del self._expected[run]

    @property
    def is_expecting(self) -> bool:
        """Return whether a run is expected."""
        return bool(self._expected)

    def count_retry(self) -> bool:
        """Give up runs that no retry has found; return whether others are left."""
        self._expected = {run: left - 1 for run, left in self._expected.items() if left > 0}
        return self.is_expecting

    async def wait(self) -> None:
        """Wait until a poll is due, and remove all moments that have passed."""
        while True:
            self._has_changed.clear()
            now = datetime.now(UTC)
            if any(moment <= now for moment in self._moments):
                self._moments = {moment for moment in self._moments if moment > now}
                return
            left = (min(self._moments) - now).total_seconds() if self._moments else None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_changed.wait(), left)
