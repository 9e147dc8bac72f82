"""Import Prefect's server once for all servers that a process of the tests starts: each is a fork of one process.

A new interpreter takes three processor seconds to import the server. `python -P server_forks.py FILE` imports it. The
process forks for each request on the socket with the number FILE.
"""

import atexit
import contextlib
import ctypes
import functools
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

COLLAPSE, HUGE_PAGE = 25, 2 << 20
"""Linux's MADV_COLLAPSE, and the size of a huge page in bytes."""

LENGTH_BYTES, PID_BYTES = 8, 4
"""Size of the length that precedes a request, and of the process id that a fork writes first."""


class Fork:
    """A forked process, with the methods of `Popen` that end a process.

    Args:
        pid: the process's id.
        status: the reading end of a pipe to which the process writes its exit status.
    """

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process, and return its exit status; -1 if a signal ended the process.

        Raises:
            subprocess.TimeoutExpired: the process has not ended in time.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            # To its end, as the process closes its files after it has written.
            written = b"".join(iter(lambda: os.read(self._status, 1), b""))
            os.close(self._status)
            self.returncode = written[0] if written else -1
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def can_fork(python: str | Path, environment: Mapping[str, str]) -> bool:
    """Return whether a fork equals a new process: the import of the server reads some of its settings."""
    is_read_at_import = any(name.endswith(("_LOOP_SECONDS", "_CACHE_TTL")) for name in environment)
    has_same_path = environment.get("PYTHONPATH") == os.environ.get("PYTHONPATH")
    return str(python) == sys.executable and has_same_path and not is_read_at_import


@functools.cache
def _forking() -> socket.socket:
    """Start the process that forks, and return the socket to ask it."""
    own, other = socket.socketpair()
    command = [sys.executable, "-P", __file__, str(other.fileno())]
    # Without the settings of the test that happens to be the first. zoneinfo reads its variable at its import.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_SERVER_")}
    process = subprocess.Popen(command, pass_fds=[other.fileno()], env=environment | {"PYTHONTZPATH": ""})
    other.close()

    def end() -> None:
        own.shutdown(socket.SHUT_RDWR)
        own.close()
        process.wait()

    atexit.register(end)
    return own


def start(
    arguments: list[str], environment: Mapping[str, str], folder: Path, output: int, errors: int | None = None
) -> Fork:
    """Run a module's command in a fork, as `python -m` does.

    Args:
        arguments: the module and its arguments.
        environment: the variables of the process.
        folder: its working folder.
        output: the file for its output.
        errors: the file for its standard error; by default `output`.
    """
    asked = _forking()
    status, held = os.pipe()
    request = json.dumps([arguments, dict(environment), str(folder)]).encode()
    files = [output, output if errors is None else errors, held]
    socket.send_fds(asked, [len(request).to_bytes(LENGTH_BYTES, "big")], files)
    os.close(held)
    asked.sendall(request)
    if not (pid := os.read(status, PID_BYTES)):
        raise RuntimeError("The process that forks Prefect servers has ended. Its traceback is on stderr")
    return Fork(int.from_bytes(pid, "big"), status)


def run(
    arguments: list[str], environment: Mapping[str, str], folder: Path, seconds: float = 600
) -> "subprocess.CompletedProcess[str]":
    """Run a module's command in a fork to its end, and return its status and output.

    Raises:
        subprocess.TimeoutExpired: the process has not ended in time.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        fork = start(arguments, environment, folder, output.fileno(), errors.fileno())
        try:
            status = fork.wait(seconds)
        finally:
            fork.kill()
        for file in (output, errors):
            file.seek(0)
        return subprocess.CompletedProcess(arguments, status, output.read(), errors.read())


def _received(source: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        part = source.recv(size - len(found))
        if not part:
            raise EOFError
        found += part
    return found


def _reap(_: int, __: FrameType | None) -> None:
    """Reap ended forks, so that their time counts as this process's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve(asked: socket.socket) -> None:
    """Import the server, and fork for each request until the tests end."""
    import gc

    gc.disable()  # without it the imports take a third less time
    import prefect.cli
    import prefect.server.api.server  # noqa: F401
    from prefect.plugins import load_prefect_collections

    load_prefect_collections()
    gc.freeze()
    signal.signal(signal.SIGCHLD, _reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        length, files, _, _ = socket.recv_fds(asked, LENGTH_BYTES, 3)
        if not length:
            return
        arguments, environment, folder = json.loads(_received(asked, int.from_bytes(length, "big")))
        if not os.fork():
            asked.close()
            os.write(files[-1], os.getpid().to_bytes(PID_BYTES, "big"))
            gc.enable()
            _become(arguments, environment, folder, *files)
        for file in files:
            os.close(file)


def _end_forks() -> None:
    """Kill the forks that are left when the tests were interrupted: a stopped one would not end by SIGTERM."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


def _use_huge_pages() -> None:
    """Copy this fork's heap into huge pages, where Linux can: a garbage collection then takes half of its time.

    Without, each page of 4 KB is copied when the fork first writes to it, and a virtual machine looks each up slowly.
    """
    with contextlib.suppress(OSError):
        memory = ctypes.CDLL(None)
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, rights, *_ = fields = line.split()
            if rights == "rw-p" and (len(fields) == 5 or fields[5] == "[heap]"):
                begin, end = (int(address, 16) for address in addresses.split("-"))
                begin = -(-begin // HUGE_PAGE) * HUGE_PAGE
                size = end // HUGE_PAGE * HUGE_PAGE - begin
                if size > 0:
                    memory.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), COLLAPSE)


def _become(
    arguments: list[str], environment: dict[str, str], folder: str, output: int, errors: int, ended: int
) -> None:
    """Run the command in this process, which has the environment of a new one."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for file, target in ((output, 1), (errors, 2)):
        os.dup2(file, target)
        os.close(file)
    os.set_inheritable(ended, False)  # else it would end with the last child
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    status = 1
    try:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        random.seed()
        sys.argv = arguments
        sys.path.insert(0, folder)
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()
        if "start" in arguments:  # it lives long
            _use_huge_pages()
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(ended, bytes([status]))
        os._exit(status)


if __name__ == "__main__":
    try:
        _serve(socket.socket(fileno=int(sys.argv[1])))
    finally:
        _end_forks()
