"""Relay connections to a server, so that the server is away or slow for one client and not for others."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit


@contextlib.contextmanager
def relayed(port: int, url: str) -> Iterator[None]:
    """Relay a port of the loopback interface to the server at `url` while the block lasts."""
    real = urlsplit(url)
    assert real.hostname
    assert real.port
    with _Relay(port, (real.hostname, real.port)) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            relay.shutdown()
            for connection in relay.open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def silent(port: int) -> Iterator[None]:
    """Let a port of the loopback interface answer nothing, not even a refusal, while the block lasts."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        # The backlog is full of connections that are never accepted. The kernel drops further ones, as a network would.
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield


Stall = Callable[[bytes, str], None]
"""Called with the data and "asked" or "answered". The relay holds the data until the call returns."""


@contextlib.contextmanager
def stalled(url: str, stall: Stall) -> Iterator[str]:
    """Yield the URL of a relay to the server at `url` that holds requests and answers.

    A released request reaches the server even if its client has given up.

    Args:
        url: the URL of the server.
        stall: decides how long data is held.
    """
    real = urlsplit(url)
    assert real.hostname
    assert real.port
    with _Relay(0, (real.hostname, real.port), stall) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{relay.server_address[1]}"
        finally:
            relay.shutdown()


class _Relay(socketserver.ThreadingTCPServer):
    """Listens on a port, and relays each connection to a server elsewhere."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, to: tuple[str, int], stall: Stall | None = None) -> None:
        self.to = to
        self.stall = stall
        self.open: list[socket.socket] = []
        super().__init__(("127.0.0.1", port), _Connection)


class _Connection(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Relay)
        self.stall = self.server.stall
        self.unanswered = threading.Semaphore(0)
        with socket.create_connection(self.server.to) as other:
            self.server.open += [self.request, other]
            back = threading.Thread(target=self._pass, args=(other, self.request, "answered"), daemon=True)
            back.start()
            self._pass(self.request, other, "asked")
            back.join()

    def _pass(self, one: socket.socket, other: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                if self.stall:
                    self.stall(data, way)
                    if way == "answered":
                        self.unanswered.release()
                other.sendall(data)
            if self.stall and way == "asked":
                # Some servers drop the request of a client that disconnects.
                self.unanswered.acquire(timeout=10)
            other.shutdown(socket.SHUT_WR)
