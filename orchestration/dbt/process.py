"""The child process that dbt runs in, as its parent sees it; see `orchestration.dbt.child`."""

import contextlib
import json
import subprocess
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("child.py")

PATIENCE = 4.0
"""Seconds the process may take to end once it is told to; it takes 2.5 s at most to cancel its SQL."""


class DbtProcess:
    """A process that has dbt imported and runs one command.

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
        # Read beside the work: a full pipe would stop dbt.
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()

    def _read_stderr(self) -> None:
        assert self._process.stderr
        with self._process.stderr as stream:
            self._stderr.extend(line.strip() for line in stream if line.strip())

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def run(self, command: Mapping[str, Any]) -> None:
        """Send the one command of this process."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def events(self) -> Iterator[dict[str, Any]]:
        """What it says, until it ends."""
        assert self._process.stdout
        for line in self._process.stdout:
            yield json.loads(line)

    def interrupt(self) -> None:
        """Make dbt cancel its SQL and end; what it says meanwhile is still to be read."""
        assert self._process.stdin
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def kill(self) -> None:
        """End it at once; Postgres ends the SQL of a client that is gone."""
        self._process.kill()

    def end(self) -> None:
        """Wait for the process; if it still works, it cancels its SQL and ends."""
        assert self._process.stdout
        self.interrupt()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()

    @property
    def status(self) -> int | None:
        """The exit status, once it ended."""
        return self._process.poll()

    @property
    def last_words(self) -> str:
        """The last lines of its stderr."""
        return " ".join(self._stderr)
