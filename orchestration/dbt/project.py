"""Run a dbt project in a flow: each node a task run, at the speed of dbt's command line.

    from orchestration.dbt import DbtProject

    project = DbtProject("path/to/project")

    @flow
    def daily():
        project.build()

dbt runs as one child process for each command. :meth:`DbtProject.warm` starts that process early, so that dbt's imports
(2 s) overlap with other work. dbt's own threads run the nodes.
"""

import atexit
import contextlib
import dataclasses
import logging
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Unpack

import yaml

from orchestration.dbt.artifacts import Artifacts, StoredCommand
from orchestration.dbt.command_run import CommandRun
from orchestration.dbt.mirror import Call
from orchestration.dbt.options import Options, combined_arguments, command_line_arguments
from orchestration.dbt.process import DbtProcess, interrupted_with_flow
from orchestration.dbt.result import DbtResult, Node
from orchestration.dbt.target_folder import target_folder
from orchestration.errors import DbtError
from orchestration.settings import settings

logger = logging.getLogger(__name__)

TRANSIENT_ERRORS = (
    r"connection (refused|reset|timed out|already closed)|could not connect|(server|SSL connection has been) closed"
    r"|terminating connection|connection .*(lost|closed unexpectedly)|no route to host"
    r"|deadlock detected|could not serialize|lock timeout"
    r"|(the database system|server) is (starting up|shutting down|in recovery)|too many (clients|connections)"
    r"|remaining connection slots"
)
"""A regular expression for the database's messages after which a node is retried."""

BUILDING_COMMANDS = ("build", "run", "test", "seed", "snapshot")
"""The commands whose finished nodes a retry leaves out. The others write files about all of their nodes."""

PROFILES_VARIABLES = {"DBT_ENGINE_PROFILES_DIR", "DBT_PROFILES_DIR"}
"""dbt's variables for the folder with profiles.yml."""

CONNECTION_VARIABLES = ("DBT_ENGINE_PROFILE", "DBT_PROFILE", "DBT_ENGINE_TARGET", "DBT_TARGET")
"""dbt's variables for profile and target."""

SECRET_VARIABLES = re.compile(r"PASS|PWD|SECRET|TOKEN|CREDENTIAL|(PRIVATE|ACCESS|API)_?KEY", re.IGNORECASE)
"""Matches the names of variables that may change between two attempts: a rotated password reaches the same place."""


class OtherTargetError(Exception):
    """dbt's target is not that of the command to retry.

    Args:
        target: dbt's target.
    """

    def __init__(self, target: str) -> None:
        super().__init__(f"The target is {target}")
        self.target = target


class DbtProject:
    """Runs the commands of a dbt project in flows.

    Args:
        path: the folder with dbt_project.yml.
        profile: the profile; by default the one of dbt_project.yml.
        target: the profile's target; by default the profile's own.
        profiles_dir: the folder with profiles.yml; by default the project's folder if it has one, then dbt's default.
        environment: called before each command; returns the variables that profiles.yml reads. A retried flow run
            reuses finished nodes only while these variables are equal, other than passwords and tokens.
        artifacts: where artifacts are stored: a folder, or a URL that fsspec knows (`s3://...`). By default
            `DBT_ARTIFACTS_URL`, and without that a folder next to Prefect's results.
        retries: how often a node is retried after a transient database error, such as a lost connection or a deadlock.
        retry_delay_seconds: the wait before a retry; it occupies one of dbt's threads.
        python: the interpreter of the environment that dbt is installed in; by default this one.
        sample_rows: how many rows that a failing data test finds are logged and stored, up to 10 KB. With 0 no row
            leaves the database. None for `DBT_SAMPLE_ROWS`.
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
        self._artifacts_url = artifacts
        self._retries = retries
        self._retry_delay_seconds = retry_delay_seconds
        self._python = Path(python)
        self._sample_rows = sample_rows
        self._warm_process: DbtProcess | None = None
        self._process_lock = threading.Lock()
        self._earlier: dict[tuple[Any, str], dict[str, Node]] = {}
        """The nodes that attempts in this process have finished or begun, by the command's key."""
        atexit.register(self.close)

    def warm(self) -> None:
        """Start the dbt process of the next command now, so that its imports overlap with other work."""
        with self._process_lock:
            self._warm_process = self._running_process()

    def close(self) -> None:
        """End the process that :meth:`warm` started, if no command has used it."""
        with self._process_lock:
            process, self._warm_process = self._warm_process, None
        if process:
            process.end()

    # Commands ---------------------------------------------------------------------------------

    def build(self, **options: Unpack[Options]) -> DbtResult:
        """Run `dbt build`: seeds, snapshots, models and their tests, in order of dependency.

        Args:
            options: see :class:`orchestration.dbt.options.Options`.

        Returns:
            The outcome of each node.

        Raises:
            DbtError: dbt could not run (the project does not parse), or nodes failed. A selection that matches nothing
                is a warning in the log, as with dbt's command; `flags=["--warn-error"]` makes it an error.
        """
        return self._run("build", options)

    def run(self, **options: Unpack[Options]) -> DbtResult:
        """Run `dbt run`: the models, without their tests; see :meth:`build`."""
        return self._run("run", options)

    def test(self, **options: Unpack[Options]) -> DbtResult:
        """Run `dbt test`: data tests and unit tests of the existing relations; see :meth:`build`."""
        return self._run("test", options)

    def seed(self, **options: Unpack[Options]) -> DbtResult:
        """Run `dbt seed`: load the project's CSV files; see :meth:`build`."""
        return self._run("seed", options)

    def snapshot(self, **options: Unpack[Options]) -> DbtResult:
        """Run `dbt snapshot`: store the rows that have changed since the last snapshot; see :meth:`build`."""
        return self._run("snapshot", options)

    def source_freshness(self, **options: Unpack[Options]) -> DbtResult:
        """Run `dbt source freshness`: check the age of the sources' newest rows; see :meth:`build`."""
        return self._run("source freshness", options)

    def compile(self, **options: Unpack[Options]) -> DbtResult:
        """Run `dbt compile`: render the SQL of the nodes without executing it; see :meth:`build`."""
        return self._run("compile", options)

    def docs(self, **options: Unpack[Options]) -> DbtResult:
        """Run `dbt docs generate`: write the documentation as `target/index.html` and to the artifacts."""
        return self._run("docs generate", options)

    def retry(self, **options: Unpack[Options]) -> DbtResult:
        """Run the failed and skipped nodes of the project's last command, like `dbt retry`.

        Call it in a new flow run: a flow run that Prefect retries leaves out finished nodes without it. The options of
        the last command hold, unless an option replaces them.

        Raises:
            DbtError: no command is stored, or nodes failed again.
        """
        artifacts = self._artifact_store()
        newest: dict[str, StoredCommand] = {}
        for stored in artifacts.commands(self._target_name):
            if stored.command != "source freshness":  # dbt's own command retries none either
                newest.setdefault(stored.target, stored)
        # Only dbt knows the target where a variable or the profile names it. It refuses the command of another target.
        target = self._target_name
        for last in [command for command in newest.values() if command.left]:
            if target in (None, last.target):
                try:
                    return self._run(last.command, options, last)
                except OtherTargetError as other:
                    target = other.target
        if target in newest or (target is None and newest):
            command = newest[target].command if target else next(iter(newest.values())).command
            logger.warning("The last dbt %s of %s left nothing to retry.", command, self.path)
            return DbtResult(command)
        place = f"{self.path} in target {target!r}" if target else self.path
        raise DbtError(f"There is no run of {place} in {artifacts.root} to retry. Run a command first.")

    # One command ------------------------------------------------------------------------------

    def _run(self, command: str, options: Options, last: StoredCommand | None = None) -> DbtResult:
        arguments, defer_to = command_line_arguments(options), options.get("defer_to")
        if last:
            arguments, defer_to = combined_arguments(last.options, arguments), defer_to or last.defer_to
        begun = {key: node for key, node in last.nodes.items() if not node.done} if last else {}
        environment = self._command_environment()
        call = Call.current(
            self.path.name, command, arguments, options.get("inputs"), defer_to, self._connection(environment)
        )
        building = command in BUILDING_COMMANDS
        earlier = self._earlier_nodes(call) if building else {}
        shared = self._target_path(environment)
        with target_folder(shared) as target, tempfile.TemporaryDirectory(prefix="dbt-state-") as state:
            command_line = [
                # After the command, so that an option of the user may replace its default.
                *command.split(), "--log-level", "none", "--no-use-colors", "--log-path", str(target),
                "--project-dir", str(self.path), "--target-path", str(target),
                *self._profile_arguments(), *arguments,
            ]  # fmt: skip
            if defer_to is not None:
                command_line += ["--defer", "--state", str(self._artifact_store().fetch(defer_to, Path(state)))]
            run = CommandRun(command, call, {**begun, **earlier})
            only = [key for key, node in last.nodes.items() if not node.done] if last and building else None
            target_name = last.target if last else None
            try:
                self._execute(run, command_line, environment, only, target_name)
                result = self._finish(run, target, arguments, defer_to)
            except BaseException:
                self._store_interrupted(run, target, arguments, defer_to)
                raise
            finally:
                if call:
                    # An attempt that ends before dbt lists its nodes forgets nothing of earlier attempts.
                    known = {node.id: node for node in run.nodes.values() if node.done or node.batches}
                    unlisted = {key: node for key, node in earlier.items() if key not in run.nodes}
                    self._earlier[call.key_over_attempts] = {**unlisted, **known}
                run.close()
        if options.get("check", True) and (error := result.error()):
            raise error
        return result

    def _earlier_nodes(self, call: Call | None) -> Mapping[str, Node]:
        """Return what earlier attempts of the flow run have finished or begun: from this process, else the server."""
        if call is None:
            return {}
        if call.key_over_attempts in self._earlier:
            return self._earlier[call.key_over_attempts]
        return call.earlier_nodes()

    def _command_environment(self) -> dict[str, str]:
        """Return the environment variables of a command, with absolute folders of profiles.

        dbt's working directory is the project, but a relative folder may be meant from the flow's.
        """
        environment = dict(self._environment())
        for name in PROFILES_VARIABLES:
            if folder := environment.get(name, os.environ.get(name)):
                environment[name] = str(Path(folder).resolve() if Path(folder).exists() else self.path / folder)
        return environment

    def _connection(self, environment: Mapping[str, str]) -> list[Any]:
        """Return what decides where a command builds, without passwords and equally in a moved checkout."""
        variables = {name: os.environ[name] for name in CONNECTION_VARIABLES if name in os.environ} | dict(environment)
        for name in PROFILES_VARIABLES & variables.keys():
            variables[name] = os.path.relpath(variables[name], self.path)
        known = sorted((name, value) for name, value in variables.items() if not SECRET_VARIABLES.search(name))
        folder = os.path.relpath(self._profiles_dir, self.path) if self._profiles_dir else None
        return [self._profile, self._target_name, folder, known]

    def _target_path(self, environment: Mapping[str, str]) -> Path:
        """Return the folder that gets the files of a command at its end, as dbt chooses its target folder."""
        variables = {**os.environ, **environment}
        path = variables.get("DBT_ENGINE_TARGET_PATH") or variables.get("DBT_TARGET_PATH")
        path = path or str(self._project_file().get("target-path") or "target")
        folder = self.path / ("target" if "{{" in path else path)
        if self.path.is_dir():  # a project that is missing is dbt's error
            with contextlib.suppress(OSError):
                folder.parent.mkdir(parents=True, exist_ok=True)
        return folder

    def _project_file(self) -> dict[str, Any]:
        """Return the content of dbt_project.yml; empty if the file cannot be read."""
        with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):
            return dict(yaml.safe_load((self.path / "dbt_project.yml").read_text()))
        return {}

    def _profile_arguments(self) -> list[str]:
        """Return dbt's options for profile and target, where they are given here and not left to dbt."""
        arguments = []
        if self._profiles_dir:
            arguments += ["--profiles-dir", str(self._profiles_dir)]
        if self._profile:
            arguments += ["--profile", self._profile]
        if self._target_name:
            arguments += ["--target", self._target_name]
        return arguments

    def _running_process(self) -> DbtProcess:
        """Return the warm process if it still runs, else a new one; for the holder of the lock."""
        if self._warm_process and self._warm_process.is_running():
            return self._warm_process
        if self._warm_process:
            self._warm_process.end()
        return DbtProcess(self._python, self.path if self.path.is_dir() else Path())

    def _take_process(self) -> DbtProcess:
        with self._process_lock:
            process, self._warm_process = self._running_process(), None
        return process

    def _execute(
        self,
        run: CommandRun,
        command_line: list[str],
        environment: dict[str, str],
        only: list[str] | None,
        target_name: str | None,
    ) -> None:
        """Run the command in a child process, and apply the events of the process to `run`.

        Raises:
            OtherTargetError: dbt's target is not the given one, and nothing has run.
        """
        process = self._take_process()
        try:
            process.run(
                {
                    "arguments": command_line,
                    "environment": environment,
                    "earlier": {
                        node.id: {"asset": node.asset, "done": node.done, "batches": node.batches}
                        for node in run.earlier.values()
                    },
                    "started": min(
                        (node.first_attempt for node in run.earlier.values() if node.first_attempt), default=""
                    ),
                    "only": only,
                    "target": target_name,
                    "retries": self._retries,
                    "delay": self._retry_delay_seconds,
                    "transient": TRANSIENT_ERRORS,
                    "sample_rows": settings().dbt_sample_rows if self._sample_rows is None else self._sample_rows,
                }
            )
            try:
                with interrupted_with_flow(process):
                    for event in process.events():
                        run.apply(event)
            except BaseException:
                # The flow is cancelled or its process is terminated: end the SQL first.
                run.stopping = True
                for event in process.interrupted_events():
                    run.apply(event)
                raise
        finally:
            process.end()
            run.process_ended()
        if target_name and run.target not in ("", target_name):
            raise OtherTargetError(run.target)
        run.raise_if_incomplete(process, self.path)

    def _finish(self, run: CommandRun, target: Path, arguments: list[str], defer_to: str | None) -> DbtResult:
        """Store the artifacts, show the summary and return the result."""
        result = run.result()
        before, stored = None, ""
        try:
            artifacts = self._artifact_store()
            before = artifacts.newest(run.command, run.target)
            whole = run.command == "build" and run.whole_project
            stored = artifacts.store(
                target, result, run.target, _stored_name(run), whole=whole, options=arguments, defer_to=defer_to
            )
        except Exception as error:
            run.log("warn", f"The artifacts of this run could not be stored: {error}")
        result = dataclasses.replace(result, stored=stored)
        run.summarise(result, before)
        return result

    def _store_interrupted(self, run: CommandRun, target: Path, arguments: list[str], defer_to: str | None) -> None:
        """Store the nodes of a command that dbt did not end, so that `retry` runs what is left of them."""
        if not run.nodes:
            return
        result = DbtResult(run.command, list(run.nodes.values()))
        with contextlib.suppress(Exception):  # the command's own error is the one to raise
            self._artifact_store().store(
                target, result, run.target, _stored_name(run),
                whole=False, complete=False, options=arguments, defer_to=defer_to,
            )  # fmt: skip

    def _artifact_store(self) -> Artifacts:
        url = self._artifacts_url or settings().dbt_artifacts_url
        name = str(self._project_file().get("name") or self.path.name)
        return Artifacts(url, name)


def _stored_name(run: CommandRun) -> str:
    """Return what names the artifacts of a command, in addition to the time."""
    return f"{run.call.flow_run.id if run.call else os.getpid()}-{run.command.replace(' ', '-')}"
