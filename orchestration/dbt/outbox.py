"""Events and logs on their way to the Prefect API: in batches, from a thread of their own.

Whoever puts something in never waits. A state that was not sent yet gives way to the next one of the
same task run, so that a burst costs the server one event for each node and second. An API that is
away or slow is asked again, with longer and longer pauses; what it never took is counted.
"""

import contextvars
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two sends."""

BATCH = 200
"""Events, or lines of log, in a request: a server on SQLite takes 200 in half the time per line of 2,000."""

LINES = 20_000
"""Lines of log that may wait; a longer burst loses what is beyond them, and says how many those were."""

PATIENCE = 60.0
"""Seconds that the end of a command waits for an API that takes what is sent."""

IMPATIENCE = 10.0
"""Seconds that it waits for one that takes nothing."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Unsent:
    """What the API never got."""

    events: int
    lines: int
    reason: str

    def __bool__(self) -> bool:
        return bool(self.events or self.lines)


class Outbox:
    """What is to be sent, and the thread that sends it."""

    def __init__(self) -> None:
        self._events: dict[str, Json] = {}
        self._requests: deque[tuple[str, Json]] = deque()
        self._lines: deque[Json] = deque()
        self._lost_events = self._lost_lines = 0
        self._reason = ""
        self._failures = 0
        self._progress = 0.0
        self._busy = threading.Lock()
        self._closing = threading.Event()
        # Prefect's settings come with the context of the flow.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=[self._work], name="dbt-outbox", daemon=True)
        self._thread.start()

    def event(self, key: str, event: Json) -> None:
        """Send an event; one of the same key that has not been sent is forgotten."""
        with self._busy:
            self._events.pop(key, None)
            self._events[key] = event

    def line(self, line: Json) -> None:
        """Send a line of log."""
        with self._busy:
            if len(self._lines) < LINES:
                self._lines.append(line)
            else:
                self._lost_lines += 1
                self._reason = self._reason or f"more than {LINES:,} waited at once"

    def request(self, path: str, content: Json) -> None:
        """Send a request of its own."""
        with self._busy:
            self._requests.append((path, content))

    def close(self) -> Unsent:
        """Send what is left, within bounds; what could not be sent."""
        self._closing.set()
        start = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.2)
            now = time.monotonic()
            if now - start > PATIENCE or now - max(start, self._progress) > IMPATIENCE:
                break
        with self._busy:
            waiting = len(self._events) + len(self._requests)
            reason = self._reason or "it has not answered"
            return Unsent(waiting + self._lost_events, len(self._lines) + self._lost_lines, reason)

    def _work(self) -> None:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True, httpx_settings={"timeout": 10.0}) as client:
            while True:
                # Longer and longer after failures, but not once somebody waits for the end.
                self._closing.wait(min(INTERVAL * 2**self._failures, 30.0))
                while self._send_some(client):
                    pass
                if self._closing.is_set():
                    if not self._failures:
                        return
                    time.sleep(INTERVAL)

    def _send_some(self, client: "SyncPrefectClient") -> bool:
        """Send a batch of each kind; whether there is more, and the API took these."""
        # What is being sent stays until the API has it: else an API that hangs would have it uncounted.
        with self._busy:
            events = dict(islice(self._events.items(), BATCH))
        if events:
            if not self._post(client, "/events", list(events.values()), len(events)):
                return False
            with self._busy:
                for key, event in events.items():
                    if self._events[key] is event:  # what came meanwhile is newer, and stays
                        del self._events[key]
        if self._requests:
            if not self._post(client, *self._requests[0], 1):
                return False
            with self._busy:
                self._requests.popleft()
        with self._busy:
            lines = list(islice(self._lines, BATCH))
        if lines:
            if not self._post(client, "/logs/", lines, len(lines)):
                return False
            with self._busy:
                for _ in lines:
                    self._lines.popleft()
        return bool(self._events or self._requests or self._lines)

    def _post(self, client: "SyncPrefectClient", path: str, content: Any, count: int) -> bool:
        """Send a batch; False if it should be tried again."""
        from httpx import HTTPStatusError

        try:
            self._request(client, path, content)
        except HTTPStatusError as error:
            if error.response.status_code < 500 and error.response.status_code != 429:
                self._refused(path, count, error)
                return True
            return self._failed(error)
        except Exception as error:
            return self._failed(error)
        self._failures, self._progress = 0, time.monotonic()
        return True

    def _request(self, client: "SyncPrefectClient", path: str, content: Any) -> None:
        client.request("POST", path, json=content)  # type: ignore[arg-type]

    def _failed(self, error: Exception) -> bool:
        self._failures = min(self._failures + 1, 10)
        self._reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return False

    def _refused(self, path: str, count: int, error: Exception) -> None:
        self._failures, self._progress = 0, time.monotonic()
        self._reason = str(error).splitlines()[0]
        if path == "/logs/":
            self._lost_lines += count
        else:
            self._lost_events += count
