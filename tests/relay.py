"""A server that is away and comes back, though it serves others all the while: what is there is a relay to it."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit


@contextlib.contextmanager
def relayed(port: int, url: str) -> Iterator[None]:
    """The server at `url` answers at a port of the loopback interface, while the block lasts."""
    real = urlsplit(url)
    assert real.hostname
    assert real.port
    with _Relay(port, (real.hostname, real.port)) as relay:
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            relay.shutdown()
            for each in relay.open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def silent(port: int) -> Iterator[None]:
    """Nothing answers at a port of the loopback interface, not even by a refusal, while the block lasts."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        # Who comes after those that nobody accepts is dropped, as by a network.
        for _ in range(2):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield


Stall = Callable[[bytes, str], None]
"""Is given what goes through a relay and whether that is "asked" or "answered"; what it waits for is held so long."""


@contextlib.contextmanager
def stalled(url: str, stall: Stall) -> Iterator[str]:
    """The URL of a relay to the server at `url`, on which requests and answers are held, while the block lasts.

    A request that is let go reaches the server, also if its client has given up meanwhile.
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
    """What listens on a port in the place of a server that is somewhere else."""

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
                # Of a client that hangs up some servers drop the request.
                self.unanswered.acquire(timeout=10)
            other.shutdown(socket.SHUT_WR)
