"""A dbt project, run node by node by one dbt process.

dbt's threads stay dbt's: a process for each node would cost six times the time and run on stale
relation caches. The process can be started early (:meth:`DbtProject.warm`), so that dbt's imports
(2 s) overlap with other work.
"""

import atexit
import contextlib
import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.errors import DbtError

_FAILED = ("error", "fail", "runtime error")
_SKIPPED = ("skipped", "partial success")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Node:
    """What became of one node of the project."""

    id: str
    name: str
    kind: str
    """dbt's resource type: model, seed, snapshot, test, unit_test, ..."""
    path: str
    status: str
    """dbt's own word: success, pass, warn, error, fail, skipped, ..."""
    message: str
    seconds: float
    rows: int | None
    """Rows affected, as the database says; None for what has none, a view for one."""
    relation: str | None
    materialized: str | None
    failures: int | None

    @property
    def failed(self) -> bool:
        """Whether it ran and did not succeed."""
        return self.status in _FAILED

    @property
    def reason(self) -> str:
        """Why it failed, in a line: dbt's message without its heading."""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        if len(lines) > 1 and " Error in " in lines[0]:
            lines = lines[1:]
        shown = [line for line in lines if not line.startswith("compiled code at") and set(line) != {"^"}]
        return " ".join(shown)


@dataclass(frozen=True)
class DbtResult:
    """What a dbt command did, node by node in the order in which they ended."""

    command: str
    nodes: list[Node] = field(default_factory=list)

    @property
    def failed(self) -> list[Node]:
        """The nodes that failed."""
        return [node for node in self.nodes if node.failed]

    @property
    def skipped(self) -> list[Node]:
        """The nodes that did not run because something above them failed."""
        return [node for node in self.nodes if node.status in _SKIPPED]

    @property
    def built(self) -> list[Node]:
        """The relations that were built or refreshed."""
        kinds = ("model", "seed", "snapshot")
        return [node for node in self.nodes if node.kind in kinds and node.status == "success"]

    def error(self) -> DbtError | None:
        """The failures in one sentence, with what was built all the same; None if all is well."""
        if not self.failed:
            return None
        reasons = "; ".join(f"{node.kind} {node.name} ({node.path}): {node.reason}" for node in self.failed[:5])
        more = f"; and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
        skipped = f", {len(self.skipped)} skipped behind" if self.skipped else ""
        built = ", ".join(node.name for node in self.built) or "nothing"
        return DbtError(
            f"dbt {self.command}: {len(self.failed)} of {len(self.nodes)} nodes failed{skipped}: "
            f"{reasons}{more}. Built, each whole and up to date: {built}. "
            "Correct the cause and run again.",
            self,
        )


class DbtProject:
    """A dbt project that flows run.

    Args:
        path: the folder with dbt_project.yml and profiles.yml.
        environment: called before each command for the variables that profiles.yml reads.
    """

    def __init__(self, path: Path, *, environment: Callable[[], Mapping[str, str]] = dict) -> None:
        self.path = path
        self._environment = environment
        self._warm: _Child | None = None
        self._starting = threading.Lock()
        atexit.register(self.close)

    def warm(self) -> None:
        """Start the dbt process of the next command now, so that its imports are done by then."""
        with self._starting:
            if self._warm and not self._warm.alive():
                self._warm.end()
                self._warm = None
            if not self._warm:
                self._warm = _Child(self.path)

    def close(self) -> None:
        """End the process that :meth:`warm` started, if no command has used it."""
        with self._starting:
            child, self._warm = self._warm, None
        if child:
            child.end()

    def build(
        self,
        *,
        select: str | None = None,
        full_refresh: bool = False,
        unit_tests: bool = False,
        log: Callable[[str, str], None] | None = None,
    ) -> DbtResult:
        """`dbt build`: seeds, snapshots, models and their tests, in order of dependency.

        Args:
            select: any dbt selection, several separated by spaces; all if None.
            full_refresh: rebuild incremental models from nothing.
            unit_tests: run dbt's unit tests too; they test the code, not the data, and those of an
                incremental model need it to be there.
            log: called with a level ("debug", "info", "warning", "error") and a line.

        Returns:
            Every node's outcome; that nodes failed is for the caller to look at.

        Raises:
            DbtError: dbt could not run (the project does not parse, the selection matches nothing).
        """
        arguments = ["--full-refresh"] if full_refresh else []
        if not unit_tests:
            arguments += ["--exclude-resource-type", "unit_test"]
        if select:
            arguments += ["--select", *select.split()]
        result = self._run("build", arguments, log or _log_quietly)
        if not result.nodes:
            chosen = f"The selection {select!r} matches no node" if select else "There is no node to build"
            raise DbtError(
                f"{chosen} in the dbt project {self.path}; nothing was built. See what there is with: make dbt CMD=ls"
            )
        return result

    def _take_child(self) -> "_Child":
        self.warm()
        with self._starting:
            child, self._warm = self._warm, None
        return child or _Child(self.path)

    def _run(self, command: str, arguments: list[str], log: Callable[[str, str], None]) -> DbtResult:
        with self._target() as target:
            line = {
                "arguments": [
                    "--log-level", "none", "--no-use-colors", "--log-path", str(target),
                    command,
                    "--project-dir", str(self.path), "--profiles-dir", str(self.path),
                    "--target-path", str(target),
                    *arguments,
                ],
                "environment": dict(self._environment()),
            }  # fmt: skip
            outcome: dict[str, Any] | None = None
            child = self._take_child()
            try:
                for event in child.run(line):
                    if event["event"] == "result":
                        outcome = event
                    elif event["event"] == "log":
                        log("warning" if event["level"] == "warn" else event["level"], event["text"])
                    else:
                        log(*_progress(event))
            finally:
                child.end()
        if outcome is None:
            raise DbtError(
                f"dbt {command} ended with status {child.status} before it was done: "
                f"{child.last_words or 'it said nothing'}. What it had built is whole; run it again."
            )
        nodes = [Node(**node) for node in outcome["nodes"]]
        if outcome["error"] and not nodes:
            reason = " ".join(part.strip() for part in outcome["error"].split("\n") if part.strip())
            raise DbtError(f"dbt {command} could not start on {self.path}: {reason}. Nothing was built.")
        return DbtResult(command, nodes)

    @contextlib.contextmanager
    def _target(self) -> Iterator[Path]:
        """A target folder of this run's own, as two runs in one folder mix up their files.

        It starts with the shared partial parse and ends as the project's `target/`; a checkout that
        cannot be written to keeps nothing.
        """
        shared = self.path / "target"
        try:
            shared.mkdir(exist_ok=True)
            own, lock = _run_folder(shared)
        except OSError:
            own, lock = Path(tempfile.mkdtemp(prefix="dbt-")), None
        try:
            with contextlib.suppress(OSError):
                shutil.copyfile(shared / "partial_parse.msgpack", own / "partial_parse.msgpack")
            yield own
            if own.parent == shared:
                with contextlib.suppress(OSError):
                    for entry in own.iterdir():
                        if entry.is_dir():
                            shutil.rmtree(shared / entry.name, ignore_errors=True)
                        entry.replace(shared / entry.name)
        finally:
            shutil.rmtree(own, ignore_errors=True)
            if lock is not None:
                os.close(lock)


def _run_folder(target: Path) -> tuple[Path, int]:
    """A new folder in `target` and the descriptor that locks it; removes those that killed runs left."""
    folder = os.open(target, os.O_RDONLY)
    try:
        # One process at a time: a folder that is there but not locked yet would look left over.
        fcntl.flock(folder, fcntl.LOCK_EX)
        for other in target.glob(".run-*"):
            lock = os.open(other, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
        own = Path(tempfile.mkdtemp(prefix=".run-", dir=target))
        lock = os.open(own, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return own, lock
    finally:
        os.close(folder)


def _log_quietly(_level: str, line: str) -> None:
    logger.debug(line)


def _progress(event: Mapping[str, Any]) -> tuple[str, str]:
    """The level and the line of a node that ended; tests that pass are for debugging."""
    outcome = event["result"] or event["status"]
    node = f"{event['number']} of {event['of']} {event['kind']} {event['name']}"
    line = f"{node}: {outcome} in {event['seconds']:.2f} s"
    if event["status"] in _FAILED:
        return "error", line
    if event["status"] == "warn":
        return "warning", line
    return ("debug" if event["kind"] == "test" else "info"), line


class _Child:
    """The process that dbt runs in; see `orchestration.dbt.child`."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestration.dbt.child"],
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
        return self._process.poll() is None

    def run(self, command: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Send the one command of this process; its events until it ends."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        yield from map(json.loads, self._process.stdout)

    def end(self) -> None:
        """Wait for the process; if it still works, its closed stdin makes it cancel its SQL and end."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
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
