"""When the worker polls between its regular polls."""

import asyncio
import contextlib
from datetime import UTC, datetime
from uuid import UUID

RETRY_SECONDS = (0.1, 0.2, 1.0)
"""The pauses before the polls for a run that an event has announced and a poll did not return.

The server sends an event just before it commits the state that the event reports. A busy server is slow to commit.
"""


class PollSchedule:
    """Holds the moments of the next polls, and the runs that the polls are to find."""

    def __init__(self) -> None:
        self._moments: set[datetime] = set()
        self._has_changed = asyncio.Event()
        self._retries: dict[UUID, int] = {}
        """How many retries were made for each expected run."""

    def add(self, moment: datetime) -> None:
        """Schedule a poll."""
        self._moments.add(moment)
        self._has_changed.set()

    def expect(self, run: UUID) -> None:
        """Expect the next poll to return a run."""
        self._retries[run] = 0

    def forget(self, runs: set[UUID]) -> None:
        """Expect these runs no longer."""
        for run in runs & self._retries.keys():
            del self._retries[run]

    @property
    def is_expecting(self) -> bool:
        """Return whether a run is expected."""
        return bool(self._retries)

    def next_retry(self) -> float | None:
        """Give up runs that no retry has found; return the seconds until the next retry, None if no run is expected."""
        self._retries = {run: made + 1 for run, made in self._retries.items() if made < len(RETRY_SECONDS)}
        return RETRY_SECONDS[min(self._retries.values()) - 1] if self._retries else None

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
