"""Keep dbt's artifacts command by command: for deferral, `state:` selections, docs and the summary's changes.

    <root>/<project>/<command>/{manifest,run_results,sources,catalog,nodes}.json, index.html, dbt.log
    <root>/<project>/latest-<target>.json     names the last `dbt build` of the whole project without a failure

The root is any URL that fsspec knows; by default a folder next to Prefect's results.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestration.dbt.result import DbtResult, Node
from orchestration.dbt.target_folder import SOURCES, is_copy
from orchestration.errors import DbtError

FILES = ("manifest.json", "run_results.json", "sources.json", "catalog.json", "index.html", "dbt.log")

KEPT_COMMANDS = 30
"""How many commands of a project are kept, in addition to each target's last good build. A new command prunes."""

_STATE_FILES = ("manifest.json", "run_results.json", "sources.json")


class Artifacts:
    """Stores and finds the artifacts of a project's commands.

    Args:
        root: URL or folder; None for a folder next to Prefect's results.
        project: the project's name.
    """

    def __init__(self, root: str | None, project: str) -> None:
        import fsspec

        if root is None:
            from prefect.settings import get_current_settings

            root = str(get_current_settings().results.local_storage_path / "dbt")
        self.root = root.rstrip("/")
        self._files, path = fsspec.core.url_to_fs(self.root)
        self._folder = f"{path}/{project}"
        self._project = project

    def store(
        self,
        folder: Path,
        result: DbtResult,
        target: str,
        run: str,
        *,
        whole: bool,
        complete: bool = True,
        options: Sequence[str] = (),
        defer_to: str | None = None,
    ) -> str:
        """Store the artifacts of a command, and delete those of older commands.

        Args:
            folder: the command's target folder.
            result: the command's result.
            target: the profile's target.
            run: identifies flow run and command, as a part of a file's name.
            whole: whether the command was to build the whole project.
            complete: whether dbt ended the command. Of an interrupted one only the nodes are stored, for a retry.
            options: the command's arguments, for a retry.
            defer_to: the state that the command deferred to, for a retry.

        Returns:
            The URL of the folder with the artifacts.
        """
        # Names sort by time.
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{run}"
        self._files.makedirs(f"{self._folder}/{name}", exist_ok=True)
        for file in FILES:
            if complete and (folder / file).exists() and not is_copy(folder / file):
                self._files.put_file(str(folder / file), f"{self._folder}/{name}/{file}")
        content = {"command": result.command, "target": target, "options": list(options), "defer_to": defer_to}
        self._write(f"{name}/nodes.json", {**content, "complete": complete, "nodes": result.nodes})
        # With --no-write-json dbt writes no manifest, and the former build stays the one to defer to.
        if whole and not result.error() and (folder / "manifest.json").exists():
            self._write(f"latest-{target}.json", {"run": name})
        self._prune()
        return f"{self.root}/{self._project}/{name}"

    def _prune(self) -> None:
        """Delete old commands, other than the good builds and the freshness of the sources before them."""
        old = set(self._names()[KEPT_COMMANDS:])
        for path in self._files.glob(f"{self._folder}/latest-*.json") if old else ():
            build = json.loads(self._files.cat_file(path))["run"]
            target = path.rsplit("/latest-", 1)[-1].removesuffix(".json")
            old -= {build, self._freshness_before(target, build) or ""}
        for name in old:
            with contextlib.suppress(OSError):  # another process may delete the same folder
                self._files.rm(f"{self._folder}/{name}", recursive=True)

    def newest(self, command: str | None = None, target: str | None = None) -> "StoredCommand | None":
        """Return the newest stored command that dbt ended, optionally of one dbt command and one target."""
        ended = (stored for stored in self.commands(target) if stored.complete)
        found = (stored for stored in ended if command in (None, stored.command))
        return next(found, None)

    def commands(self, target: str | None = None) -> "Iterator[StoredCommand]":
        """Yield the stored commands, newest first, optionally of one target."""
        for name in self._names():
            # The file may be being written or deleted.
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                stored = json.loads(self._files.cat_file(f"{self._folder}/{name}/nodes.json"))
                if target not in (None, stored["target"]):
                    continue
                nodes = [_node(node) for node in stored["nodes"]]
                options, defer_to = stored.get("options", []), stored.get("defer_to")
                command = StoredCommand(stored["command"], nodes, options, defer_to, stored["target"])
                command.complete = stored.get("complete", True)
                yield command

    def fetch(self, source: str, into: Path) -> Path:
        """Copy the artifacts that deferral and `state:` selections compare with.

        Args:
            source: a target's name, for its last build without a failure, or a folder or URL with a manifest.json.
            into: an empty folder for the copies.

        Returns:
            The folder `into`.

        Raises:
            DbtError: the source has no manifest.json.
        """
        import fsspec

        files, folder = self._files, ""
        if "/" in source:
            files, folder = fsspec.core.url_to_fs(source)
        else:
            with contextlib.suppress(OSError):
                latest = json.loads(self._files.cat_file(f"{self._folder}/latest-{source}.json"))
                folder = f"{self._folder}/{latest['run']}"
        for file in _STATE_FILES:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                (into / file).write_bytes(files.cat_file(f"{folder}/{file}"))
        build = folder.rsplit("/", 1)[-1] if "/" not in source and not (into / SOURCES).exists() else ""
        if build and (freshness := self._freshness_before(source, build)):
            with contextlib.suppress(OSError):  # another process may delete the same folder
                (into / SOURCES).write_bytes(files.cat_file(f"{self._folder}/{freshness}/{SOURCES}"))
        if not (into / "manifest.json").exists():
            place = source if "/" in source else f"a run of target {source!r} without a failure in {self.root}"
            raise DbtError(
                f"There is nothing to defer to: {place} has no manifest.json. "
                "Build the whole project there first, or name another folder or target."
            )
        return into

    def _freshness_before(self, target: str, build: str) -> str | None:
        """Return the folder with the freshness that was stored last before a build of the target."""
        for name in self._names():
            with contextlib.suppress(OSError, ValueError, KeyError):
                if name >= build or not self._files.exists(f"{self._folder}/{name}/{SOURCES}"):
                    continue
                if json.loads(self._files.cat_file(f"{self._folder}/{name}/nodes.json"))["target"] == target:
                    return name
        return None

    def _names(self) -> list[str]:
        """Return the folder names of the stored commands, newest first."""
        try:
            entries = self._files.ls(self._folder, detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            (entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"), reverse=True
        )

    def _write(self, name: str, content: dict[str, Any]) -> None:
        path = f"{self._folder}/{name}"
        data = json.dumps(content, default=_as_json).encode()
        self._files.pipe_file(f"{path}.new", data)
        self._files.mv(f"{path}.new", path)


class StoredCommand:
    """Holds the nodes and options of a command whose artifacts are stored.

    Args:
        command: dbt's command.
        nodes: its nodes with their outcomes.
        options: its arguments.
        defer_to: the state that it deferred to.
        target: the profile's target.
    """

    def __init__(
        self,
        command: str,
        nodes: Iterable[Node],
        options: Sequence[str] = (),
        defer_to: str | None = None,
        target: str = "",
    ) -> None:
        self.command = command
        self.nodes = {node.id: node for node in nodes}
        self.options = list(options)
        self.defer_to = defer_to
        self.target = target
        self.complete = True
        """Whether dbt ended the command, instead of being interrupted."""

    @property
    def left(self) -> list[str]:
        """The ids of the nodes that a retry runs. dbt's own command retries no hook either."""
        return [key for key, node in self.nodes.items() if not node.done and node.kind != "operation"]


def _as_json(value: Any) -> Any:
    return asdict(value) if isinstance(value, Node) else str(value)


def _node(stored: dict[str, Any]) -> Node:
    node = Node(**stored)
    node.started = datetime.fromisoformat(stored["started"]) if stored["started"] else None
    node.ended = datetime.fromisoformat(stored["ended"]) if stored["ended"] else None
    return node
