"""Events and logs on their way to the Prefect API: in batches, from a thread of their own.

Whoever puts something in never waits. A state that was not sent yet gives way to the next one of the
same task run, so that a burst costs the server one event for each node and second. An API that is
away or slow is asked again, with longer and longer pauses; what it never took is counted.

The API refuses a request as a whole. The outbox halves a refused batch until the refused item is alone, cuts that
item down, and drops it only when the API refuses the smallest form too.
"""

import contextlib
import contextvars
import json
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
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

BATCH_BYTES = 500_000
"""Bytes of JSON in a request, unless a single item has more: many proxies refuse more than 1 MiB by 413."""

LINES = 20_000
"""Lines of log that may wait; a longer burst loses what is beyond them, and says how many those were."""

PATIENCE = 60.0
"""Seconds that the end of a command waits for an API that takes what is sent."""

IMPATIENCE = 10.0
"""Seconds that it waits for one that takes nothing."""

FATAL = (401, 404, 405, 407)
"""Statuses of an API that refuses whatever it is sent: a smaller request would be refused too."""

LATER = (408, 425, 429)
"""Statuses below 500 of an API that takes the same request later."""

NAMED = 3
"""Refused items that the warning names; the others are counted."""

_UNSTORABLE = re.compile(r"\\u(0000|[dD][89a-fA-F][0-9a-fA-F]{2})")
_REPLACED = re.compile("[\0\ud800-\udfff]")
"""Characters that Postgres and UTF-8 do not have: the API would answer 500 for as long as it is sent them."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Unsent:
    """What the API never got."""

    events: int
    lines: int
    reason: str
    """In one line, with the names of what was refused."""

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
        self._names: list[str] = []
        self._size = BATCH
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
        """Send a batch of each kind; whether there is more, and the API took or refused these."""
        # What is being sent stays until the API has it: else an API that hangs would have it uncounted.
        with self._busy:
            keys = list(islice(self._events, self._size))
            events = [self._events[key] for key in keys]
        if events:
            done = self._post(client, "/events", events)
            with self._busy:
                for key, event in list(zip(keys, events, strict=True))[:done]:
                    if self._events[key] is event:  # what came meanwhile is newer, and stays
                        del self._events[key]
            if not done:
                return self._halved()
        if self._requests:
            path, content = self._requests[0]
            if not self._post(client, path, [content]):
                return self._halved()
            with self._busy:
                self._requests.popleft()
        with self._busy:
            lines = list(islice(self._lines, self._size))
        if lines:
            done = self._post(client, "/logs/", lines)
            with self._busy:
                for _ in range(done):
                    self._lines.popleft()
            if not done:
                return self._halved()
        return bool(self._events or self._requests or self._lines)

    def _halved(self) -> bool:
        """Whether the first half of what was refused is to be sent at once; not if the API did not answer."""
        return not self._failures

    def _post(self, client: "SyncPrefectClient", path: str, items: Sequence[Json]) -> int:
        """Send the first of the items, as many as fit into a request; how many of them are done with.

        None is if the API is to be asked again, with fewer if it refused these.
        """
        from httpx import HTTPStatusError

        bodies = [_encoded(item) for item in items]
        total, count = 0, 0
        while count < len(bodies) and (not count or total + len(bodies[count]) <= BATCH_BYTES):
            total += len(bodies[count])
            count += 1
        body = ",".join(bodies[:count])
        try:
            self._request(client, path, body if path == "/artifacts/" else f"[{body}]")
        except HTTPStatusError as error:
            status = error.response.status_code
            if status >= 500 or status in LATER:
                return self._failed(error)
            self._failures, self._progress = 0, time.monotonic()
            if status in FATAL:
                return self._refused(path, items[:count], _reason(error))
            if count > 1:
                self._size = count // 2
                return 0
            if _shrink(items[0]):
                return 0
            return self._refused(path, items[:1], _reason(error))
        except Exception as error:
            return self._failed(error)
        self._failures, self._progress = 0, time.monotonic()
        self._size = min(2 * self._size, BATCH)
        return count

    def _request(self, client: "SyncPrefectClient", path: str, body: str) -> None:
        client.request("POST", path, content=body, headers={"Content-Type": "application/json"})  # type: ignore[arg-type]

    def _failed(self, error: Exception) -> int:
        self._failures = min(self._failures + 1, 10)
        if not self._names:
            answered = getattr(error, "response", None) is not None
            self._reason = _reason(error) if answered else f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return 0

    def _refused(self, path: str, items: Sequence[Json], reason: str) -> int:
        """Give up items that the API does not take."""
        if path == "/logs/":
            self._lost_lines += len(items)
        else:
            self._lost_events += len(items)
        self._names += [_name(path, item) for item in items]
        more = f" and {len(self._names) - NAMED} more" if len(self._names) > NAMED else ""
        self._reason = f"it refused {', '.join(self._names[:NAMED])}{more}: {reason}"
        return len(items)


def _encoded(item: Json) -> str:
    """The item as JSON in ASCII, without the characters that no database stores."""
    text = json.dumps(item, default=str)
    if _UNSTORABLE.search(text):
        text = json.dumps(_each_text(item, lambda value: _REPLACED.sub("\ufffd", value)), default=str)
    return text


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A copy with each text changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key) if isinstance(key, str) else key: _each_text(each, change) for key, each in value.items()}
    return [_each_text(each, change) for each in value] if isinstance(value, list) else value


def _shrink(item: Json) -> bool:
    """Halve the longest part that an item can do without, its related assets or a text; False if it has none.

    The first of the related resources say what the event is of, and stay.
    """
    if len(item.get("related", ())) > 8:
        item["related"] = item["related"][: len(item["related"]) // 2]
        return True
    longest = max((len(value) for value in _texts(item)), default=0)
    if longest <= 1_000 or item.get("type") == "image":
        return False
    item.update(_each_text(item, lambda value: value if len(value) <= longest // 2 else value[: longest // 2] + " …"))
    return True


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]


def _name(path: str, item: Json) -> str:
    """What an item is, for people."""
    if path == "/logs/":
        return f"the line of log {str(item.get('message', ''))[:60]!r}"
    if path == "/artifacts/":
        return f"the artifact {item.get('key', '')}"
    resource = item.get("resource") or {}
    about = resource.get("prefect.resource.name") or resource.get("prefect.resource.id") or ""
    return f"the event {item.get('event', '')} of {about}"


def _reason(error: Any) -> str:
    """The status and the server's message in one line: its answer repeats the whole request."""
    detail = ""
    with contextlib.suppress(Exception):
        content = error.response.json()
        found = content.get("exception_detail") or content.get("detail") or content.get("exception_message")
        first = found[0] if isinstance(found, list) else found
        detail = str(first["msg"] if isinstance(first, dict) else first)
    return " ".join(f"{error.response.status_code} {error.response.reason_phrase}. {detail}".split())[:300]
