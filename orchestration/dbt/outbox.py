"""Send events, log lines and artifacts to the Prefect API in batches, from a separate thread.

The caller never waits for the API. A newer state replaces an unsent state of the same task run, so a burst costs the
server one event per node and second. While the API is unreachable or slow, the outbox retries with exponential backoff.
It counts the items that the API never took.

The API refuses a request as a whole. The outbox halves a refused batch until the refused item is alone, cuts that
item down, and drops it only when the API refuses the smallest form too.

Prefect's synchronous client sends the requests. `orchestration.prefect_api` is asynchronous and hides the status by
which the outbox decides to retry, halve or drop.
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

SEND_INTERVAL_SECONDS = 1.0
"""Wait between two sends."""

BATCH_ITEMS = 200
"""Most events, or log lines, in a request: a server on SQLite takes 200 in half the time per line of 2,000."""

BATCH_BYTES = 500_000
"""Most bytes of JSON in a request, unless a single item has more: many proxies refuse more than 1 MiB with 413."""

MAXIMUM_LOG_LINES = 20_000
"""Log lines that may wait. The outbox drops further lines and counts them."""

CLOSE_TIMEOUT_SECONDS = 60.0
"""How long `close` waits for an API that takes requests."""

STALL_TIMEOUT_SECONDS = 30.0
"""How long `close` waits for an API that takes no request. A busy server may need ten seconds for one."""

REQUEST_TIMEOUT_SECONDS = 25.0
"""How long the API may take for a request. It is shorter, so that `close` knows the reason of one that hangs."""

FATAL_STATUSES = (401, 404, 405, 407)
"""HTTP statuses of an API that refuses every request: it would refuse a smaller request too."""

RETRY_STATUSES = (408, 425, 429)
"""HTTP statuses below 500 of an API that takes the same request later."""

NAMED_ITEMS = 3
"""How many refused items the warning names; it counts the others."""

_UNSTORABLE_ESCAPE = re.compile(r"\\u(0000|[dD][89a-fA-F][0-9a-fA-F]{2})")
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that Postgres and UTF-8 do not have: the API would answer 500 to each retry."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Unsent:
    """Counts the items that the API did not take."""

    events: int
    lines: int
    reason: str
    """Why, in one line, with the names of refused items."""

    def __bool__(self) -> bool:
        return bool(self.events or self.lines)


class Outbox:
    """Holds the unsent items, and runs the thread that sends them."""

    def __init__(self) -> None:
        self._events: dict[str, Json] = {}
        self._requests: deque[tuple[str, Json]] = deque()
        self._lines: deque[Json] = deque()
        self._lost_events = self._lost_lines = 0
        self._reason = ""
        self._names: list[str] = []
        self._batch_items = BATCH_ITEMS
        self._failures = 0
        """Failed requests in a row."""
        self._progress = 0.0
        """The monotonic time at which the API last took or refused a request."""
        self._lock = threading.Lock()
        self._closing = threading.Event()
        # The flow's context holds Prefect's settings.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=[self._work], name="dbt-outbox", daemon=True)
        self._thread.start()

    def add_event(self, key: str, event: Json) -> None:
        """Send an event, instead of an unsent event with the same key."""
        with self._lock:
            self._events.pop(key, None)
            self._events[key] = event

    def add_log_line(self, line: Json) -> None:
        """Send a log line."""
        with self._lock:
            if len(self._lines) < MAXIMUM_LOG_LINES:
                self._lines.append(line)
            else:
                self._lost_lines += 1
                self._reason = self._reason or f"more than {MAXIMUM_LOG_LINES:,} waited at once"

    def add_request(self, path: str, content: Json) -> None:
        """Send one item in a separate request."""
        with self._lock:
            self._requests.append((path, content))

    def close(self) -> Unsent:
        """Send the rest, within `CLOSE_TIMEOUT_SECONDS` and `STALL_TIMEOUT_SECONDS`; return what was not sent."""
        self._closing.set()
        start = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.2)
            now = time.monotonic()
            if now - start > CLOSE_TIMEOUT_SECONDS or now - max(start, self._progress) > STALL_TIMEOUT_SECONDS:
                break
        with self._lock:
            waiting = len(self._events) + len(self._requests)
            reason = self._reason or "it has not answered"
            return Unsent(waiting + self._lost_events, len(self._lines) + self._lost_lines, reason)

    def _work(self) -> None:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True, httpx_settings={"timeout": REQUEST_TIMEOUT_SECONDS}) as client:
            while True:
                # Exponential backoff after failures, which `close` cuts short.
                self._closing.wait(min(SEND_INTERVAL_SECONDS * 2**self._failures, 30.0))
                while self._send_some(client):
                    pass
                if self._closing.is_set():
                    if not self._failures:
                        return
                    time.sleep(SEND_INTERVAL_SECONDS)

    def _send_some(self, client: "SyncPrefectClient") -> bool:
        """Send a batch of each kind; return whether to send the next batches at once."""
        # Items stay until the API has them: otherwise `close` would not count the items of a request that hangs.
        with self._lock:
            keys = list(islice(self._events, self._batch_items))
            events = [self._events[key] for key in keys]
        if events:
            done = self._post(client, "/events", events)
            with self._lock:
                for key, event in list(zip(keys, events, strict=True))[:done]:
                    if self._events[key] is event:  # keep an event that has replaced it meanwhile
                        del self._events[key]
            if not done:
                return self._is_reachable()
        if self._requests:
            path, content = self._requests[0]
            if not self._post(client, path, [content]):
                return self._is_reachable()
            with self._lock:
                self._requests.popleft()
        with self._lock:
            lines = list(islice(self._lines, self._batch_items))
        if lines:
            done = self._post(client, "/logs/", lines)
            with self._lock:
                for _ in range(done):
                    self._lines.popleft()
            if not done:
                return self._is_reachable()
        return bool(self._events or self._requests or self._lines)

    def _is_reachable(self) -> bool:
        """Return whether the API answered the last request. Then a smaller part of a refused batch follows at once."""
        return not self._failures

    def _post(self, client: "SyncPrefectClient", path: str, items: Sequence[Json]) -> int:
        """Send as many of the items as fit into a request.

        Returns:
            How many items are done: taken by the API, or given up. 0 if a retry is due, with fewer items after a
            refusal.
        """
        from httpx import HTTPStatusError

        bodies = [_encode(item) for item in items]
        total, count = 0, 0
        while count < len(bodies) and (not count or total + len(bodies[count]) <= BATCH_BYTES):
            total += len(bodies[count])
            count += 1
        body = ",".join(bodies[:count])
        try:
            self._request(client, path, body if path == "/artifacts/" else f"[{body}]")
        except HTTPStatusError as error:
            status = error.response.status_code
            if status >= 500 or status in RETRY_STATUSES:
                return self._failed(error)
            self._failures, self._progress = 0, time.monotonic()
            if status in FATAL_STATUSES:
                return self._refused(path, items[:count], _reason(error))
            if count > 1:
                self._batch_items = count // 2
                return 0
            if _shrink(items[0]):
                return 0
            return self._refused(path, items[:1], _reason(error))
        except Exception as error:
            return self._failed(error)
        self._failures, self._progress = 0, time.monotonic()
        self._batch_items = min(2 * self._batch_items, BATCH_ITEMS)
        return count

    def _request(self, client: "SyncPrefectClient", path: str, body: str) -> None:
        client.request("POST", path, content=body, headers={"Content-Type": "application/json"})  # type: ignore[arg-type]

    def _failed(self, error: Exception) -> int:
        """Note a failure after which the same request is retried; return 0 items done."""
        self._failures = min(self._failures + 1, 10)
        if not self._names:
            answered = getattr(error, "response", None) is not None
            self._reason = _reason(error) if answered else f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return 0

    def _refused(self, path: str, items: Sequence[Json], reason: str) -> int:
        """Give up items that the API refuses; return their number."""
        if path == "/logs/":
            self._lost_lines += len(items)
        else:
            self._lost_events += len(items)
        self._names += [_name(path, item) for item in items]
        more = f" and {len(self._names) - NAMED_ITEMS} more" if len(self._names) > NAMED_ITEMS else ""
        self._reason = f"it refused {', '.join(self._names[:NAMED_ITEMS])}{more}: {reason}"
        return len(items)


def _encode(item: Json) -> str:
    """Return the item as JSON in ASCII, without the characters that no database stores."""
    text = json.dumps(item, default=str)
    if _UNSTORABLE_ESCAPE.search(text):
        text = json.dumps(_map_texts(item, lambda value: _UNSTORABLE.sub("\ufffd", value)), default=str)
    return text


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy with each string changed, the keys of dictionaries too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key) if isinstance(key, str) else key: _map_texts(part, change) for key, part in value.items()}
    return [_map_texts(part, change) for part in value] if isinstance(value, list) else value


def _shrink(item: Json) -> bool:
    """Halve the longest part that an item can do without: its related assets, or a text.

    The first related resources stay: they identify the flow run of the event.

    Returns:
        False if the item has no such part.
    """
    if len(item.get("related", ())) > 8:
        item["related"] = item["related"][: len(item["related"]) // 2]
        return True
    longest = max((len(value) for value in _texts(item)), default=0)
    if longest <= 1_000 or item.get("type") == "image":
        return False
    item.update(_map_texts(item, lambda value: value if len(value) <= longest // 2 else value[: longest // 2] + " …"))
    return True


def _texts(value: Any) -> list[str]:
    """Return all strings in the values of a JSON value."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]


def _name(path: str, item: Json) -> str:
    """Return what an item is, for the warning."""
    if path == "/logs/":
        return f"the line of log {str(item.get('message', ''))[:60]!r}"
    if path == "/artifacts/":
        return f"the artifact {item.get('key', '')}"
    resource = item.get("resource") or {}
    about = resource.get("prefect.resource.name") or resource.get("prefect.resource.id") or ""
    return f"the event {item.get('event', '')} of {about}"


def _reason(error: Any) -> str:
    """Return the status and the server's message in one line, as the answer repeats the whole request."""
    detail = ""
    with contextlib.suppress(Exception):
        content = error.response.json()
        found = content.get("exception_detail") or content.get("detail") or content.get("exception_message")
        first = found[0] if isinstance(found, list) else found
        detail = str(first["msg"] if isinstance(first, dict) else first)
    return " ".join(f"{error.response.status_code} {error.response.reason_phrase}. {detail}".split())[:300]
