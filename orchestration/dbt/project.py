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
import dataclasses
import fcntl
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import threading
from collections import deque
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
from orchestration.prefect_compat.task_runners import cancel_events
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

_SURROGATE = re.compile("[\ud800-\udfff]")


class Options(TypedDict, total=False):
    """What the commands of :class:`DbtProject` take; dbt says which of them a command of its own does not."""

    select: str | None
    """Any dbt selection, several separated by spaces; all if None, nothing if empty."""
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
    if (select := options.get("select")) is not None:
        arguments += ["--select", *(select.split() or [""])]  # an empty one selects nothing, and not everything
    if exclude := options.get("exclude"):
        arguments += ["--exclude", *exclude.split()]
    if (variables := options.get("vars")) is not None:
        arguments += ["--vars", _vars(variables)]
    if (threads := options.get("threads")) is not None:
        arguments += ["--threads", str(threads)]
    flags = options.get("flags", ())
    if isinstance(flags, str):
        raise DbtError(f"flags are a text, {flags!r:.100}. Give a list, like {flags.split()!r:.100}.")
    return [*arguments, *flags]


def _vars(variables: Any) -> str:
    """The project's variables in YAML that dbt reads as the same JSON.

    PyYAML reads JSON's `1e+16` as a text, so that JSON itself would not do.

    Raises:
        DbtError: a value that JSON does not have, by its name.
    """
    if not isinstance(variables, Mapping):
        raise DbtError(f"vars are no mapping, but {variables!r:.100}. Give a dictionary of names and values.")
    return str(yaml.safe_dump(_plain(variables, "vars"), default_flow_style=True, width=10**9)).strip()


def _plain(value: Any, name: str, above: tuple[int, ...] = ()) -> Any:
    """The value as JSON has it: in dictionaries, lists, texts and numbers."""
    wrong = ""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not _SURROGATE.search(value):
            return str.__str__(value)
        wrong = "a text with half a character"
    elif isinstance(value, int):
        return int(value)
    elif isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        wrong = f"{value}, which is no number"
    elif id(value) in above:
        wrong = "a value that contains itself"
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                wrong = f"a dictionary with the name {key!r:.50}, which is no text"
        if not wrong:
            inside = (*above, id(value))
            return {_plain(key, name): _plain(each, f"{name}.{key}", inside) for key, each in value.items()}
    elif isinstance(value, list | tuple):
        return [_plain(each, f"{name}[{number}]", (*above, id(value))) for number, each in enumerate(value)]
    wrong = wrong or f"a {type(value).__name__}"
    raise DbtError(f"{name} is no JSON: it is {wrong}. Give texts, numbers, lists and dictionaries.")


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
        sample_rows: how many of the rows that a failing data test finds are logged and stored, 10 KB at most; 0 for
            none, where rows must not leave the database. None for `DBT_SAMPLE_ROWS`.
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
        sample_rows: int | None = None,
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
        self._sample_rows = sample_rows
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
            DbtError: dbt could not run (the project does not parse), or nodes failed. A selection that matches nothing
                is a warning in the log, as with dbt's command; `flags=["--warn-error"]` makes it an error.
        """
        return self._run("build", options)

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

        The options are those of that command, unless others are given. A flow run that is retried does so by itself;
        this is for a new one.

        Raises:
            DbtError: no command was stored, or nodes failed again.
        """
        artifacts = self._store()
        last = artifacts.newest(target=self._target_name)
        if last is None:
            raise DbtError(f"There is no run of {self.path} in {artifacts.root} to retry. Run a command first.")
        # dbt's own command retries no hook either.
        if all(node.done or node.kind == "operation" for node in last.nodes.values()):
            logger.warning("The last dbt %s of %s left nothing to retry.", last.command, self.path)
            return DbtResult(last.command)
        return self._run(last.command, options, last)

    # One of them ------------------------------------------------------------------------------

    def _run(self, command: str, given: Options, last: Earlier | None = None) -> DbtResult:
        options, defer_to = _arguments(given), given.get("defer_to")
        if last and not options and not defer_to:
            options, defer_to = last.options, last.defer_to
        call = Call.current(self.path.name, command, options, given.get("inputs"))
        earlier = self._done_before(call)
        environment = dict(self._environment())
        with self._target() as target, tempfile.TemporaryDirectory(prefix="dbt-state-") as state:
            arguments = [
                "--log-level", "none", "--no-use-colors", "--log-path", str(target), *command.split(),
                "--project-dir", str(self.path), "--target-path", str(target),
                *self._profile_options(environment), *options,
            ]  # fmt: skip
            if defer_to is not None:
                arguments += ["--defer", "--state", str(self._store().fetch(defer_to, Path(state)))]
            run = _Run(command, call, earlier)
            only = {key for key, node in last.nodes.items() if not node.done} if last else None
            try:
                self._execute(run, arguments, environment, only)
                result = self._finish(run, target, options, defer_to)
            finally:
                if call:
                    # An attempt that ends before dbt lists its nodes takes nothing from what earlier ones have done.
                    done = {node.id: node for node in run.nodes.values() if node.done}
                    self._attempts[call.memory] = earlier | done
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

    def _profile_options(self, environment: Mapping[str, str]) -> list[str]:
        options = []
        if folder := self._profiles_folder({**os.environ, **environment}):
            options += ["--profiles-dir", str(folder)]
        if self._profile:
            options += ["--profile", self._profile]
        if self._target_name:
            options += ["--target", self._target_name]
        return options

    def _profiles_folder(self, environment: Mapping[str, str]) -> Path | None:
        """The folder with profiles.yml in dbt's order: option, environment, project; None for dbt's default."""
        if self._profiles_dir:
            return self._profiles_dir
        for name in ("DBT_ENGINE_PROFILES_DIR", "DBT_PROFILES_DIR"):
            if named := environment.get(name):
                # dbt's process has the project as its working directory, the flow's may be another.
                return Path(named).resolve() if Path(named).exists() else self.path / named
        return self.path if (self.path / "profiles.yml").exists() else None

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

    def _execute(self, run: "_Run", arguments: list[str], environment: dict[str, str], only: set[str] | None) -> None:
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
                    "sample_rows": settings().dbt_sample_rows if self._sample_rows is None else self._sample_rows,
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

    def _finish(self, run: "_Run", target: Path, options: list[str], defer_to: str | None) -> DbtResult:
        """Store the artifacts, and tell what was done."""
        result = run.result()
        before, stored = None, ""
        try:
            artifacts = self._store()
            before = artifacts.newest(run.command, run.target)
            whole = run.command == "build" and run.whole
            name = f"{run.call.flow_run.id if run.call else os.getpid()}-{run.command.replace(' ', '-')}"
            stored = artifacts.store(target, result, run.target, name, whole=whole, options=options, defer_to=defer_to)
        except Exception as error:
            run.say("warn", f"The artifacts of this run could not be stored: {error}")
        result = dataclasses.replace(result, stored=stored)
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
    events = cancel_events(context and context.task_runner)
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
        self.whole = False
        """Whether the command has selected the whole project."""
        self.stopping = False
        """Whether the command is being ended: what fails now was cancelled."""
        self._ended: list[Node] = []
        self._errors: deque[str] = deque(maxlen=3)
        """The last errors of dbt's log that are about no node."""
        self._running: dict[str, Node] = {}
        self._mirror = Mirror(call) if call else None
        self._logger: Any = logger
        if call:
            from prefect.logging import get_run_logger

            self._logger = get_run_logger()

    def apply(self, event: dict[str, Any]) -> None:
        """Take in what the child says."""
        match event["event"]:
            case "selected":
                self.whole = event["whole"]
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
        if node.status and (node.status == REUSED or not event.get("final")):
            return
        if not node.status:
            self._ended.append(node)
        node.status, node.message, node.because = event["status"], event["message"] or "", event["because"]
        node.ended, node.seconds, node.thread = _time(event["at"]), event["seconds"], event["thread"]
        node.started = node.started or node.ended
        node.rows, node.failures = event["rows"], event["failures"]
        if self._mirror:
            self._mirror.ended(node, self.nodes)
        if node.sql:
            self.say("error" if node.failed else "warn", summary.rows_as_text(node), node.id, aloud=False)

    def _log(self, level: str, text: str, node: str) -> None:
        known = self.nodes.get(node)
        # A test that passes is not worth a line on the terminal; at its task run it is.
        quiet = level == "info" and known is not None and known.kind in TESTS
        if level == "error" and not known:
            self._errors.append(" ".join(text.split())[:500])
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
        return DbtResult(self.command, list(self._ended), seconds, problem=self._problem())

    def _problem(self) -> str:
        """Why dbt says that the command failed, where no node did."""
        if self.outcome is None or self.outcome["success"] or any(node.failed for node in self._ended):
            return ""
        said = self.outcome["problems"] or list(self._errors) or ["dbt says that it failed, and not why"]
        return "; ".join(" ".join(text.split()) for text in said)

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
