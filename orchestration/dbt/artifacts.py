"""dbt's artifacts, kept run by run: for deferral, `state:` selections, docs and what changed since.

    <root>/<project>/<run>/{manifest,run_results,sources,catalog,nodes}.json, dbt.log
    <root>/<project>/latest-<target>.json     the last `dbt build` of the whole project without a failure

The root is any URL that fsspec knows; without one, a folder beside Prefect's results.
"""

import contextlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orchestration.dbt.result import DbtResult, Node
from orchestration.errors import DbtError

FILES = ("manifest.json", "run_results.json", "sources.json", "catalog.json", "index.html", "dbt.log")

KEPT = 30
"""Runs of a project that are kept, and each target's last good one; older ones are deleted when a new one comes."""

_STATE = ("manifest.json", "run_results.json", "sources.json")


class Artifacts:
    """The artifacts of a project's runs.

    Args:
        root: URL or folder; None for a folder beside Prefect's results.
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
        options: Sequence[str] = (),
        defer_to: str | None = None,
    ) -> str:
        """Keep what a command left in its target folder.

        Args:
            folder: dbt's target folder.
            result: what the command did.
            target: the profile's target.
            run: what tells the flow run's commands from others.
            whole: whether it was to build the whole project.
            options: dbt's options, for a retry.
            defer_to: what it compared with.

        Returns:
            The folder's URL.
        """
        # Sorted by name they are sorted by time.
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{run}"
        self._files.makedirs(f"{self._folder}/{name}", exist_ok=True)
        for file in FILES:
            if (folder / file).exists():
                self._files.put_file(str(folder / file), f"{self._folder}/{name}/{file}")
        kept = {"command": result.command, "target": target, "options": list(options), "defer_to": defer_to}
        self._write(f"{name}/nodes.json", {**kept, "nodes": result.nodes})
        if whole and not result.error():
            self._write(f"latest-{target}.json", {"run": name})
        good = {
            json.loads(self._files.cat_file(path))["run"] for path in self._files.glob(f"{self._folder}/latest-*.json")
        }
        for old in set(self._runs()[KEPT:]) - good:
            with contextlib.suppress(OSError):  # another run may be deleting it too
                self._files.rm(f"{self._folder}/{old}", recursive=True)
        return f"{self.root}/{self._project}/{name}"

    def newest(self, command: str | None = None, target: str | None = None) -> "Earlier | None":
        """The newest run, of a command or of any."""
        for run in self._runs():
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # one that is being written or deleted
                stored = json.loads(self._files.cat_file(f"{self._folder}/{run}/nodes.json"))
                if command in (None, stored["command"]) and target in (None, stored["target"]):
                    nodes = [_node(node) for node in stored["nodes"]]
                    return Earlier(stored["command"], nodes, stored.get("options", []), stored.get("defer_to"))
        return None

    def fetch(self, source: str, into: Path) -> Path:
        """Get the artifacts that deferral and `state:` selections compare with.

        Args:
            source: a target's name, for its last run without a failure; or a folder or URL that has a manifest.json.
            into: an empty folder to put them in.

        Raises:
            DbtError: there are none.
        """
        import fsspec

        files, folder = self._files, ""
        if "/" in source:
            files, folder = fsspec.core.url_to_fs(source)
        else:
            with contextlib.suppress(OSError):
                latest = json.loads(self._files.cat_file(f"{self._folder}/latest-{source}.json"))
                folder = f"{self._folder}/{latest['run']}"
        for file in _STATE:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                (into / file).write_bytes(files.cat_file(f"{folder}/{file}"))
        if not (into / "manifest.json").exists():
            where = source if "/" in source else f"a run of target {source!r} without a failure in {self.root}"
            raise DbtError(
                f"There is nothing to defer to: {where} has no manifest.json. "
                "Build the whole project there first, or name another folder or target."
            )
        return into

    def _runs(self) -> list[str]:
        """The names of the runs, newest first."""
        try:
            entries = self._files.ls(self._folder, detail=True)
        except FileNotFoundError:
            return []
        return sorted(
            (entry["name"].rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"), reverse=True
        )

    def _write(self, name: str, content: dict[str, Any]) -> None:
        path = f"{self._folder}/{name}"
        data = json.dumps(content, default=_plain).encode()
        self._files.pipe_file(f"{path}.new", data)
        self._files.mv(f"{path}.new", path)


class Earlier:
    """A command that was run before.

    Args:
        command: dbt's command.
        nodes: what became of its nodes.
        options: dbt's options.
        defer_to: what it compared with.
    """

    def __init__(
        self, command: str, nodes: Iterable[Node], options: Sequence[str] = (), defer_to: str | None = None
    ) -> None:
        self.command = command
        self.nodes = {node.id: node for node in nodes}
        self.options = list(options)
        self.defer_to = defer_to


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Node) else str(value)


def _node(stored: dict[str, Any]) -> Node:
    node = Node(**stored)
    node.started = datetime.fromisoformat(stored["started"]) if stored["started"] else None
    node.ended = datetime.fromisoformat(stored["ended"]) if stored["ended"] else None
    return node
