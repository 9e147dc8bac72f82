"""Limit the log lines that a flow run sends to the Prefect API.

The server stores every line it gets, so a run that logs in a loop would fill the database of all runs. A token bucket
holds the bytes of one hour. Lines beyond that are in the log of the run's pod alone.
"""

import logging
import threading
import time
from typing import NamedTuple

from orchestration.errors import SettingsError
from orchestration.protocol import LOG_LIMIT_VARIABLE
from orchestration.quantity import parse_quantity

PERIOD_SECONDS = 3600.0
"""For how long the limit is."""

RESERVED_SHARE = 1 / 10
"""The share of the limit that errors may use in addition, so that the reason of a failure is on the run's page."""

RESUMED_SHARE = 1 / 60
"""The share of the limit that must be free before lines are sent again. So at most one notice is sent each minute."""


class Decision(NamedTuple):
    """Holds whether a line is sent, and a notice to send before the line or instead of it."""

    is_sent: bool
    notice: str = ""


class LogLimit:
    """Decides which lines are sent.

    Args:
        limit: bytes for each `PERIOD_SECONDS`, as a quantity such as `64Mi`.

    Raises:
        SettingsError: the limit is no quantity.
    """

    def __init__(self, limit: str) -> None:
        try:
            self._capacity = float(parse_quantity(limit))
        except ValueError:
            raise SettingsError(
                f"{LOG_LIMIT_VARIABLE}={limit!r} is no quantity. Set it to bytes an hour: 64Mi"
            ) from None
        self._text = limit
        self._free = self._capacity
        self._refilled_at = time.monotonic()
        self._dropped = 0
        self._lock = threading.Lock()

    def decide(self, size: int, level: int) -> Decision:
        """Decide about the next line.

        Args:
            size: bytes of the line in the request.
            level: the line's level, as in `logging`.
        """
        with self._lock:
            now = time.monotonic()
            refill = (now - self._refilled_at) / PERIOD_SECONDS * self._capacity
            self._free, self._refilled_at = min(self._free + refill, self._capacity), now
            if level >= logging.ERROR and self._free + self._capacity * RESERVED_SHARE >= size:
                self._free -= size
                return Decision(True)
            if self._free < max(size, self._capacity * RESUMED_SHARE if self._dropped else 0):
                self._dropped += 1
                return Decision(False, self._stopped() if self._dropped == 1 else "")
            self._free -= size
            dropped, self._dropped = self._dropped, 0
            return Decision(True, f"{dropped:,} log lines before this one were not sent." if dropped else "")

    def _stopped(self) -> str:
        return (
            "Only errors are sent to the Prefect API for a while: "
            f"this run's log lines have used up {self._text} an hour. "
            "Read all lines in the log of its pod, log less, or raise runs.logLimit."
        )
