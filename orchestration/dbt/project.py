"""A dbt project in a flow: each node a task run, at the speed of dbt's command line.

    from orchestration.dbt import DbtProject

    project = DbtProject("path/to/project")

    @flow
    def daily():
        project.build()

dbt runs as one child process for each command, which can be started early (:meth:`DbtProject.warm`)
so that dbt's imports (2 s) overlap with other work. dbt's threads stay dbt's.
"""

import atexit
import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, Unpack

import yaml

from orchestration.dbt import summary
from orchestration.dbt.artifacts import Artifacts, Earlier
from orchestration.dbt.mirror import Call, Mirror
from orchestration.dbt.process import DbtProcess
from orchestration.dbt.result import FAILED, NOT_RUN, REUSED, SKIPPED, DbtResult, Node
from orchestration.errors import DbtError
from orchestration.settings import settings

logger = logging.getLogger(__name__)

TRANSIENT = (
    r"connection (refused|reset|timed out|already closed)|could not connect|(server|SSL connection has been) closed"
    r"|terminating connection|connection .*(lost|closed unexpectedly)|no route to host"
    r"|deadlock detected|could not serialize|lock timeout"
    r"|(the database system|server) is (starting up|shutting down|in recovery)|too many (clients|connections)"
    r"|remaining connection slots"
)
"""Messages of databases that another attempt may cure."""

TESTS = ("test", "unit_test")


class Options(TypedDict, total=False):
    """What the commands of :class:`DbtProject` take; dbt says which of them a command of its own does not."""

    select: str | None
    """Any dbt selection, several separated by spaces; all if None."""
    exclude: str | None
    """What to leave out of it."""
    full_refresh: bool
    """Rebuild incremental models from nothing."""
    vars: Mapping[str, Any] | None
    """The project's variables."""
    threads: int | None
    """How many nodes at once; the profile's number if None."""
    defer_to: str | None
    """What `state:` selections compare with and what is read of nodes that are not selected: a target's name, for its
    last run without a failure, or a folder or URL with a manifest.json."""
    flags: Sequence[str]
    """Further options of dbt's command (`["--fail-fast"]`)."""
    inputs: object
    """What the nodes are built from, where the flow changes it: the id of its newest load, say. Another attempt of the
    flow run leaves out what is done only while this is the same."""
    check: bool
    """Raise if nodes failed, which is the default; else that is for the caller to look at."""


def _arguments(options: Options) -> list[str]:
    """The options as those of dbt's command line, without `--defer`.

    Raises:
        TypeError: there is no such option.
    """
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(
            f"There is no option {', '.join(sorted(unknown))}; there are: {', '.join(Options.__annotations__)}"
        )
    arguments = ["--full-refresh"] if options.get("full_refresh") else []
    if select := options.get("select"):
        arguments += ["--select", *select.split()]
    if exclude := options.get("exclude"):
        arguments += ["--exclude", *exclude.split()]
    if variables := options.get("vars"):
        arguments += ["--vars", json.dumps(variables)]
    if threads := options.get("threads"):
        arguments += ["--threads", str(threads)]
    return [*arguments, *options.get("flags", ())]


class DbtProject:
    """A dbt project that flows run.

    Args:
        path: the folder with dbt_project.yml.
        profile: the profile, if not the project's own.
        target: the profile's target, if not its default.
        profiles_dir: the folder with profiles.yml; the project's if it has one, else dbt's default.
        environment: called before each command for the variables that profiles.yml reads.
        artifacts: where artifacts are kept: a folder, or a URL that fsspec knows (`s3://...`). Without one
            `DBT_ARTIFACTS_URL`, without that a folder beside Prefect's results.
        retries: how often a node is tried again whose database was away, or in a deadlock, for a moment.
        retry_delay_seconds: the wait before that; it occupies one of dbt's threads.
        python: the interpreter of the environment that dbt is installed in, if not this one.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        profile: str | None = None,
        target: str | None = None,
        profiles_dir: str | Path | None = None,
        environment: Callable[[], Mapping[str, str]] = dict,
        artifacts: str | None = None,
        retries: int = 2,
        retry_delay_seconds: float = 5.0,
        python: str | Path = sys.executable,
    ) -> None:
        self.path = Path(path).resolve()
        self._profile = profile
        self._target_name = target
        self._profiles_dir = Path(profiles_dir).resolve() if profiles_dir else None
        self._environment = environment
        self._artifacts = artifacts
        self._retries = retries
        self._delay = retry_delay_seconds
        self._python = Path(python)
        self._warm: DbtProcess | None = None
        self._starting = threading.Lock()
        self._attempts: dict[tuple[Any, str], dict[str, Node]] = {}
        atexit.register(self.close)

    def warm(self) -> None:
        """Start the dbt process of the next command now, so that its imports are done by then."""
        with self._starting:
            self._warm = self._started()

    def close(self) -> None:
        """End the process that :meth:`warm` started, if no command has used it."""
        with self._starting:
            child, self._warm = self._warm, None
        if child:
            child.end()

    # Commands ---------------------------------------------------------------------------------

    def build(self, **options: Unpack[Options]) -> DbtResult:
        """`dbt build`: seeds, snapshots, models and their tests, in order of dependency.

        Args:
            options: see :class:`Options`.

        Returns:
            Every node's outcome.

        Raises:
            DbtError: dbt could not run (the project does not parse, the selection matches nothing), or nodes failed.
        """
        result = self._run("build", options)
        select = options.get("select")
        # A selection by state may well find nothing: nothing has changed.
        if not result.nodes and not re.search(r"\b(state|result|source_status):", select or ""):
            chosen = f"The selection {select!r} matches no node" if select else "There is no node to build"
            raise DbtError(
                f"{chosen} in the dbt project {self.path}; nothing was built. See what there is with: dbt ls"
            )
        return result

    def run(self, **options: Unpack[Options]) -> DbtResult:
        """`dbt run`: the models, without their tests; see :meth:`build`."""
        return self._run("run", options)

    def test(self, **options: Unpack[Options]) -> DbtResult:
        """`dbt test`: data tests and unit tests of what is there; see :meth:`build`."""
        return self._run("test", options)

    def seed(self, **options: Unpack[Options]) -> DbtResult:
        """`dbt seed`: the tables of the project's CSV files; see :meth:`build`."""
        return self._run("seed", options)

    def snapshot(self, **options: Unpack[Options]) -> DbtResult:
        """`dbt snapshot`: the rows that have changed since the last one; see :meth:`build`."""
        return self._run("snapshot", options)

    def source_freshness(self, **options: Unpack[Options]) -> DbtResult:
        """`dbt source freshness`: how old the sources' newest rows are; see :meth:`build`."""
        return self._run("source freshness", options)

    def compile(self, **options: Unpack[Options]) -> DbtResult:
        """`dbt compile`: the SQL of the nodes, without running it; see :meth:`build`."""
        return self._run("compile", options)

    def docs(self, **options: Unpack[Options]) -> DbtResult:
        """`dbt docs generate`: the project's documentation, as `target/index.html` and among the artifacts."""
        return self._run("docs generate", options)

    def retry(self, **options: Unpack[Options]) -> DbtResult:
        """Run what the project's last command left: what failed in it and what was skipped behind that.

        A flow run that is retried does so by itself; this is for a new one. Give the options that the command had.

        Raises:
            DbtError: no command was stored, it left nothing, or nodes failed again.
        """
        artifacts = self._store()
        last = artifacts.newest(target=self._target_name)
        if last is None:
            raise DbtError(f"There is no run of {self.path} in {artifacts.root} to retry. Run a command first.")
        if all(node.done for node in last.nodes.values()):
            raise DbtError(f"The last dbt {last.command} of {self.path} left nothing to retry.")
        return self._run(last.command, options, last)

    # One of them ------------------------------------------------------------------------------

    def _run(self, command: str, given: Options, last: Earlier | None = None) -> DbtResult:
        options, defer_to = _arguments(given), given.get("defer_to")
        call = Call.current(self.path.name, command, options, given.get("inputs"))
        before = {} if last is None else {key: node for key, node in last.nodes.items() if node.done}
        before |= self._done_before(call)
        with self._target() as target, tempfile.TemporaryDirectory(prefix="dbt-state-") as state:
            arguments = [
                "--log-level", "none", "--no-use-colors", "--log-path", str(target), *command.split(),
                "--project-dir", str(self.path), "--target-path", str(target), *self._profile_options(), *options,
            ]  # fmt: skip
            if defer_to:
                arguments += ["--defer", "--state", str(self._store().fetch(defer_to, Path(state)))]
            run = _Run(command, call, before)
            only = set(last.nodes) if last else None
            try:
                self._execute(run, arguments, only)
                result = self._finish(run, target, options)
            finally:
                if call:
                    self._attempts[call.memory] = {node.id: node for node in run.nodes.values() if node.done}
                run.close()
        if given.get("check", True) and (error := result.error()):
            raise error
        return result

    def _done_before(self, call: Call | None) -> dict[str, Node]:
        """The nodes that an earlier attempt of this flow run has done."""
        if call is None:
            return {}
        if call.memory in self._attempts:
            return self._attempts[call.memory]
        return call.earlier()

    def _profile_options(self) -> list[str]:
        options = []
        folder = self._profiles_dir or (self.path if (self.path / "profiles.yml").exists() else None)
        if folder:
            options += ["--profiles-dir", str(folder)]
        if self._profile:
            options += ["--profile", self._profile]
        if self._target_name:
            options += ["--target", self._target_name]
        return options

    def _started(self) -> DbtProcess:
        """The process that is warm, or a new one; for the holder of the lock."""
        if self._warm and self._warm.alive():
            return self._warm
        if self._warm:
            self._warm.end()
        return DbtProcess(self._python, self.path if self.path.is_dir() else Path())

    def _take_child(self) -> DbtProcess:
        with self._starting:
            child, self._warm = self._started(), None
        return child

    def _execute(self, run: "_Run", arguments: list[str], only: set[str] | None) -> None:
        environment = dict(self._environment())
        child = self._take_child()
        try:
            child.run(
                {
                    "arguments": arguments,
                    "environment": environment,
                    "done": list(run.before),
                    "only": None if only is None else list(only),
                    "retries": self._retries,
                    "delay": self._delay,
                    "transient": TRANSIENT,
                }
            )
            try:
                with _interrupted_with_task(child):
                    for event in child.events():
                        run.apply(event)
            except BaseException:
                # The flow is cancelled or its process is ended: first of all the SQL ends.
                run.stopping = True
                child.interrupt()
                overdue = threading.Timer(4.0, child.kill)
                overdue.start()
                try:
                    for event in child.events():
                        run.apply(event)
                finally:
                    overdue.cancel()
                raise
        finally:
            child.end()
            run.over()
        if run.stopping:
            # A signal to the process group reaches dbt too, also where the flow waits for it in another thread.
            raise KeyboardInterrupt(f"dbt {run.command} was interrupted")
        if run.outcome is None:
            raise DbtError(
                f"dbt {run.command} ended with status {child.status} before it was done: "
                f"{child.last_words or 'it said nothing'}. What it had built is whole; run it again."
            )
        ended = [node for node in run.nodes.values() if node.status not in (NOT_RUN, REUSED)]
        if run.outcome["error"] and not any(node.failed for node in ended):
            reason = " ".join(part.strip() for part in run.outcome["error"].split("\n") if part.strip())
            stopped, left = "stopped", "What it had built is whole; run it again"
            if not ended:
                stopped, left = "could not start", "Nothing was built"
            raise DbtError(f"dbt {run.command} {stopped} on {self.path}: {reason.removesuffix('.')}. {left}.")

    def _finish(self, run: "_Run", target: Path, options: list[str]) -> DbtResult:
        """Store the artifacts, and tell what was done."""
        result = run.result()
        before, stored = None, ""
        try:
            artifacts = self._store()
            before = artifacts.newest(run.command, run.target)
            whole = run.command in ("build", "run") and not {"--select", "--exclude"} & set(options)
            name = f"{run.call.flow_run.id if run.call else os.getpid()}-{run.command.replace(' ', '-')}"
            stored = artifacts.store(target, result, run.target, name, whole=whole)
        except Exception as error:
            run.say("warn", f"The artifacts of this run could not be stored: {error}")
        result = DbtResult(result.command, result.nodes, result.seconds, stored)
        run.summarise(result, before)
        return result

    def _store(self) -> Artifacts:
        url = self._artifacts or settings().dbt_artifacts_url
        name = self.path.name
        with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):
            name = str(yaml.safe_load((self.path / "dbt_project.yml").read_text())["name"])
        return Artifacts(url, name)

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


@contextlib.contextmanager
def _interrupted_with_task(child: DbtProcess) -> Iterator[None]:
    """Interrupt dbt when the flow ends that runs it in a task of another thread, which no signal reaches.

    Prefect's ThreadPoolTaskRunner waits for its threads then, and tells them by events that only its own engine reads.
    """
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    events = getattr(context and context.task_runner, "_cancel_events", {})
    if threading.current_thread() is threading.main_thread() or not events:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            if any(event.is_set() for event in list(events.values())):
                child.interrupt()
                return

    watcher = threading.Thread(target=watch, name="dbt-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


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


class _Run:
    """A command while it runs: what dbt has said of its nodes so far, shown as it comes."""

    def __init__(self, command: str, call: Call | None, before: Mapping[str, Any]) -> None:
        self.command = command
        self.call = call
        self.before = before
        self.nodes: dict[str, Node] = {}
        self.outcome: dict[str, Any] | None = None
        self.target = ""
        self.stopping = False
        """Whether the command is being ended: what fails now was cancelled."""
        self._ended: list[Node] = []
        self._running: dict[str, Node] = {}
        self._mirror = Mirror(call) if call else None
        self._logger: Any = logger
        if call:
            from prefect.logging import get_run_logger

            self._logger = get_run_logger()

    def apply(self, event: dict[str, Any]) -> None:
        """Take in what the child says."""
        match event["event"]:
            case "nodes":
                self.target = event["target"]
                for described in event["nodes"]:
                    self.nodes[described["id"]] = node = Node(**described)
                    if node.id in self.before and node.kind != "operation":  # hooks run with each command
                        self._reuse(node, self.before[node.id])
            case "start":
                node = self.nodes[event["id"]]
                node.started = _time(event["at"])
                node.attempts += 1
                self._running[node.id] = node
                if self._mirror:
                    self._mirror.running(node)
            case "retry":
                node = self.nodes[event["id"]]
                text = f"{event['message'].strip()}\nAnother attempt in {event['delay']:g} s."
                self.say("warn", f"{node.title}: {text}", node.id)
                if self._mirror:
                    self._mirror.retrying(node, text, _time(event["at"]))
            case "rows":
                node = self.nodes[event["id"]]
                node.sql, node.columns, node.sample = event["sql"], event["columns"], event["rows"]
            case "end":
                self._end(self.nodes[event["id"]], event)
            case "log":
                self._log(event["level"], event["text"], event["id"])
            case "interrupted":
                self.stopping = True
            case "result":
                self.outcome = event

    def _reuse(self, node: Node, earlier: Any) -> None:
        """Take over what an earlier attempt did: its Node, or what the server has of its task run."""
        node.status = REUSED
        node.attempts = earlier.attempts if isinstance(earlier, Node) else earlier.run_count
        node.started = earlier.started if isinstance(earlier, Node) else earlier.start_time
        node.ended = earlier.ended if isinstance(earlier, Node) else earlier.end_time
        if isinstance(earlier, Node):
            node.seconds, node.rows = earlier.seconds, earlier.rows
        else:
            node.seconds = earlier.total_run_time.total_seconds()
        self._ended.append(node)
        if self._mirror:
            self._mirror.ended(node, self.nodes)

    def _end(self, node: Node, event: dict[str, Any]) -> None:
        if self.stopping and event["status"] in (*FAILED, SKIPPED):
            return
        self._running.pop(node.id, None)
        if node.status:
            return
        node.status, node.message, node.because = event["status"], event["message"] or "", event["because"]
        node.ended, node.seconds, node.thread = _time(event["at"]), event["seconds"], event["thread"]
        node.started = node.started or node.ended
        node.rows, node.failures = event["rows"], event["failures"]
        self._ended.append(node)
        if self._mirror:
            self._mirror.ended(node, self.nodes)
        if node.sql:
            self.say("error" if node.failed else "warn", summary.rows_as_text(node), node.id, aloud=False)

    def _log(self, level: str, text: str, node: str) -> None:
        known = self.nodes.get(node)
        # A test that passes is not worth a line on the terminal; at its task run it is.
        quiet = level == "info" and known is not None and known.kind in TESTS
        self.say(level, text, node if known else "", aloud=not quiet)

    def say(self, level: str, text: str, node: str = "", *, aloud: bool = True) -> None:
        """A line of log: at the node's task run or the flow run, and on the terminal."""
        if self._mirror:
            self._mirror.log(level, text, node)
        if aloud:
            self._logger.log(_LEVELS[level], text, extra={"send_to_api": False})

    def over(self) -> None:
        """The child has ended: what was running then was cancelled or has crashed."""
        if self._running and self._mirror:
            cancelled = self._mirror.cancelled()
            for node in self._running.values():
                self._mirror.stopped(node, cancelled)

    def result(self) -> DbtResult:
        """What became of the nodes."""
        timed = [node for node in self._ended if node.started and node.ended and node.status != REUSED]
        seconds = 0.0
        if timed:
            first = min(node.started for node in timed if node.started)
            seconds = (max(node.ended for node in timed if node.ended) - first).total_seconds()
        return DbtResult(self.command, list(self._ended), seconds)

    def summarise(self, result: DbtResult, before: Earlier | None) -> None:
        """Tell what the command did: in the log and as artifacts."""
        self.say("info", summary.text(result, before))
        if self._mirror and result.nodes:
            headline = summary.counts(result)
            self._mirror.artifact(f"dbt {self.command}", "markdown", summary.markdown(result, before), headline)
            if picture := summary.gantt(result):
                self._mirror.artifact(f"dbt {self.command} threads", "image", summary.as_data_url(picture), headline)

    def close(self) -> None:
        """Send what the API has not got yet, within bounds."""
        if self._mirror and (unsent := self._mirror.close()):
            self._logger.warning(
                "The Prefect API did not take %s events and %s lines of log of this run (%s). dbt was not disturbed.",
                unsent.events,
                unsent.lines,
                unsent.reason,
                extra={"send_to_api": False},
            )


_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
