"""The endpoints `/metrics` and `/health` of a component that runs a loop."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import prometheus_client as prometheus

from orchestration.errors import SettingsError

Answer = tuple[int, str | Mapping[str, Any]]
"""An HTTP status, and the text or JSON that explains it."""


@dataclass
class Pulse:
    """Records the rounds of a loop, and whether the loop is healthy.

    Args:
        timeout_seconds: how long the loop is healthy after a round or the start.
        trouble: what keeps the loop from its work; empty if nothing does.
        registry: the metrics of the component.
        last: when the last round was, on the clock of `time.monotonic`.
    """

    timeout_seconds: float
    trouble: str = ""
    registry: prometheus.CollectorRegistry = field(default_factory=prometheus.CollectorRegistry)
    last: float = field(default_factory=time.monotonic)

    def beat(self) -> None:
        """Record a round."""
        self.last = time.monotonic()

    def health(self) -> Answer:
        """Return the answer to a request of `/health`."""
        seconds = time.monotonic() - self.last
        status = 503 if seconds > self.timeout_seconds else 200
        return status, f"{seconds:.0f} s since the last round or the start. {self.trouble}".rstrip() + "\n"


@contextlib.contextmanager
def served(pulse: Pulse, port: int) -> Iterator[None]:
    """Serve `/metrics` and `/health` of a loop during the block.

    Raises:
        SettingsError: the port is in use or not allowed.
    """
    with served_paths({"/health": pulse.health}, pulse.registry, port, "Pass another one: --port"):
        yield


@contextlib.contextmanager
def served_paths(
    paths: Mapping[str, Callable[[], Answer]], registry: prometheus.CollectorRegistry, port: int, cure: str
) -> Iterator[None]:
    """Serve `/metrics` and other paths in a thread during the block, so that they answer while the component works.

    Args:
        paths: the function that answers each path.
        registry: the metrics of the component.
        port: the port on all addresses.
        cure: what to do where the port cannot be used.

    Raises:
        SettingsError: the port is in use or not allowed.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self.answer(200, prometheus.CONTENT_TYPE_LATEST, prometheus.generate_latest(registry))
            elif self.path in paths:
                status, content = paths[self.path]()
                if isinstance(content, str):
                    self.answer(status, "text/plain; charset=utf-8", content.encode())
                else:
                    self.answer(status, "application/json", json.dumps(content, indent=2).encode() + b"\n")
            else:
                self.send_error(404)

        def answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Log nothing: probes would fill the log."""

    try:
        server = ThreadingHTTPServer(("", port), Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"Cannot listen on port {port}: {error}. {cure}") from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
