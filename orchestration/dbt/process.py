"""The child process that dbt runs in, from its parent's side; for the other side see `orchestration.dbt.child`."""

import contextlib
import json
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestration.prefect_compat.task_runners import cancel_events

CHILD = Path(__file__).with_name("child")
"""The folder that Python runs as the child process."""

EXIT_TIMEOUT_SECONDS = 4.0
"""How long the process may take to end after an interrupt; it cancels its SQL within 2.5 s."""

TASK_POLL_SECONDS = 0.5
"""How often a build in a task's thread checks whether its flow ends."""


class DbtProcess:
    """Starts the child process, sends its one command, reads its events and ends it.

    Args:
        python: the interpreter of the environment that dbt is installed in.
        folder: its working directory.
    """

    def __init__(self, python: Path, folder: Path) -> None:
        self._process = subprocess.Popen(
            [python, "-P", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        self._stderr: deque[str] = deque(maxlen=5)
        # A thread reads stderr all the time: a full pipe would block dbt.
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def _read_stderr(self) -> None:
        assert self._process.stderr
        with self._process.stderr as stream:
            self._stderr.extend(line.strip() for line in stream if line.strip())

    def is_running(self) -> bool:
        """Return whether the process has not ended yet."""
        return self._process.poll() is None

    def run(self, command: Mapping[str, Any]) -> None:
        """Send the one command of this process; for its keys see `orchestration.dbt.child`."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events of the process until it ends."""
        assert self._process.stdout
        for line in self._process.stdout:
            yield json.loads(line)

    def interrupt(self) -> None:
        """Make dbt cancel its SQL and end; the caller reads the events that follow."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def interrupted_events(self) -> Iterator[dict[str, Any]]:
        """Interrupt dbt and yield its last events; kill the process after `EXIT_TIMEOUT_SECONDS`."""
        self.interrupt()
        overdue = threading.Timer(EXIT_TIMEOUT_SECONDS, self.kill)
        overdue.start()
        try:
            yield from self.events()
        finally:
            overdue.cancel()

    def kill(self) -> None:
        """Kill the process; Postgres ends the SQL of a client that is gone."""
        self._process.kill()

    def end(self) -> None:
        """Interrupt dbt if it still runs, and wait until the process has ended."""
        assert self._process.stdout
        self.interrupt()
        try:
            self._process.wait(EXIT_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    @property
    def exit_status(self) -> int | None:
        """The exit status; None before the process has ended."""
        return self._process.poll()

    @property
    def last_stderr(self) -> str:
        """The last five lines of stderr, in one line."""
        return " ".join(self._stderr)


@contextlib.contextmanager
def interrupted_with_flow(process: DbtProcess) -> Iterator[None]:
    """Interrupt dbt when the flow ends while the block runs in a task's thread, which no signal reaches.

    At its end, Prefect's ThreadPoolTaskRunner waits for its threads. It notifies them by events that only Prefect's
    engine reads.
    """
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    events = cancel_events(context and context.task_runner)
    if threading.current_thread() is threading.main_thread() or not events:
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(TASK_POLL_SECONDS):
            if any(event.is_set() for event in list(events.values())):
                process.interrupt()
                return

    watcher = threading.Thread(target=watch, name="dbt-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
