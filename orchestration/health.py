"""`/metrics` and `/health` of a component that works in a loop."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import prometheus_client as prometheus

from orchestration.errors import SettingsError


@dataclass
class Pulse:
    """The sign of life of a loop.

    Args:
        patience: seconds without a turn of it after which it counts as ill.
        trouble: what keeps it from its work, if anything.
        registry: of its metrics.
    """

    patience: float
    trouble: str = ""
    registry: prometheus.CollectorRegistry = field(default_factory=prometheus.CollectorRegistry)
    last: float = field(default_factory=time.monotonic)

    def beat(self) -> None:
        """Note a turn."""
        self.last = time.monotonic()

    def health(self) -> tuple[int, str]:
        """HTTP's status, and why."""
        seconds = time.monotonic() - self.last
        ill = seconds > self.patience
        return 503 if ill else 200, f"{seconds:.0f} s since the last turn or the start. {self.trouble}".rstrip() + "\n"


@contextlib.contextmanager
def served(pulse: Pulse, port: int) -> Iterator[None]:
    """Serve `/metrics` and `/health` from a thread of their own, so that they answer while the loop is at work.

    Raises:
        SettingsError: the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/metrics":
                self.answer(200, prometheus.CONTENT_TYPE_LATEST, prometheus.generate_latest(pulse.registry))
            elif self.path == "/health":
                status, text = pulse.health()
                self.answer(status, "text/plain; charset=utf-8", text.encode())
            else:
                self.send_error(404)

        def answer(self, status: int, content_type: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Probes are no news."""

    try:
        listening = ThreadingHTTPServer(("", port), Handler)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"Port {port} cannot be listened on: {error}. Say another: --port") from None
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        listening.shutdown()
        listening.server_close()
