"""Files of desired state, read so that every mistake can be pointed at: each mapping knows its file and lines."""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from orchestration.errors import DeploymentsError

MOST_VALUES = 500_000
"""The values of a file: some thousand deployments. Aliases of aliases make as many of a few lines as they like."""


class Map(dict[str, Any]):
    """A mapping of a file.

    Attributes:
        file: as it was named.
        line: where it begins, from 1.
        lines: where each of its keys is.
    """

    file: str = ""
    line: int = 0
    lines: dict[str, int]

    def at(self, key: str = "") -> str:
        """FILE:LINE of a key, or of the mapping itself."""
        return f"{self.file}:{self.lines.get(key, self.line)}"


class Seq(list[Any]):
    """A sequence of a file; its attributes are as those of `Map`, with the lines of the entries."""

    file: str = ""
    line: int = 0
    lines: list[int]

    def at(self, index: int) -> str:
        """FILE:LINE of an entry."""
        return f"{self.file}:{self.lines[index]}"


def read(paths: Sequence[str | Path]) -> list[Map]:
    """The documents of the files and of those that they include, each once.

    `include:` of a file lists others, by patterns relative to it.

    Raises:
        DeploymentsError: a file is absent, or is no YAML mapping, with line and column.
    """
    found: list[Map] = []
    seen: set[Path] = set()
    for path in paths:
        found += _with_included(Path(path), seen, "")
    return found


def included(path: str, context: Path) -> list[str]:
    """The files that a file of desired state includes, relative to the folder that an image is built from.

    Args:
        path: of the file, relative to `context`.
        context: the folder.

    Raises:
        DeploymentsError: one is outside of the folder, and no image has it; or a file cannot be read.
    """
    found = []
    for document in read([context / path])[1:]:
        file = Path(document.file).resolve()
        if not file.is_relative_to(context.resolve()):
            raise DeploymentsError(
                f"{path} includes {file}, which is outside of {context.resolve()}, from which the image is built. Move "
                "the file there, and correct include"
            )
        found.append(str(file.relative_to(context.resolve())))
    return found


def _with_included(path: Path, seen: set[Path], named_at: str) -> Iterator[Map]:
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    document = _document(path, named_at)
    yield document
    included = document.get("include") or []
    if isinstance(included, str):
        included = [included]
    if not isinstance(included, list) or not all(isinstance(each, str) for each in included):
        raise DeploymentsError(f"{document.at('include')}: include is a list of files, like [teams/*.yaml]")
    for pattern in included:
        if not pattern.strip():
            raise DeploymentsError(f"{document.at('include')}: a pattern is empty. Write a file, like teams/*.yaml")
        if Path(pattern).is_absolute():
            raise DeploymentsError(f"{document.at('include')}: {pattern} must be relative to {path.parent}")
        matches = sorted(each for each in path.parent.glob(pattern) if not each.is_dir())
        if not matches:
            raise DeploymentsError(
                f"{document.at('include')}: no file is {path.parent / pattern}. Make it or leave it out"
            )
        for match in matches:
            yield from _with_included(match, seen, document.at("include"))


def _document(path: Path, named_at: str) -> Map:
    where = f"{named_at}: " if named_at else ""
    try:
        text = path.read_text()
    except FileNotFoundError:
        cure = "" if named_at else ". Go where it is, or name another"
        raise DeploymentsError(f"{where}{path} does not exist{cure}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeploymentsError(f"{where}{path} cannot be read: {error}") from None
    loader = yaml.CSafeLoader(text)
    try:
        node = loader.get_single_node()
        if node and (number := _count(node, {})) > MOST_VALUES:
            raise DeploymentsError(
                f"{path}: its aliases repeat each other until it has {number:.1e} values, and {MOST_VALUES:,} are the "
                "limit. Use fewer aliases within aliases, or several files"
            )
        document = _Values(loader, str(path)).of(node) if node else Map()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        said = " ".join(filter(None, [error.problem, error.context]))
        raise DeploymentsError(f"{place}: this is no YAML: {said}. Look at the indentation and quotes there") from None
    except (yaml.YAMLError, ValueError) as error:
        raise DeploymentsError(f"{path}: this is no YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise DeploymentsError(f"{path}: lists or mappings are nested too deep, or without end. Write less") from None
    finally:
        loader.dispose()
    if not isinstance(document, Map):
        raise DeploymentsError(f"{path}:1: this is no mapping. It begins with a key, like `deployments:`")
    if not document.file:
        document.file, document.line, document.lines = str(path), 1, {}
    return document


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node has, with those that its aliases repeat.

    Args:
        node: of a document.
        known: the numbers of nodes by their id; a node that holds itself is found later.
    """
    if isinstance(node, yaml.CollectionNode) and id(node) not in known:
        known[id(node)] = 0
        pairs = isinstance(node, yaml.MappingNode)
        below = [each for pair in node.value for each in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_count(each, known) for each in below)
    return known.get(id(node), 1)


@dataclass
class _Values:
    """Makes the values of a document's nodes, as JSON knows them: dates are text.

    Args:
        loader: knows YAML's types.
        file: as it was named.
        seen: mappings whose own keys have been read: an alias leads to the same node again, and `flatten_mapping` has
            put the merged keys into the node.
    """

    loader: yaml.CSafeLoader
    file: str
    seen: set[int] = field(default_factory=set)

    def of(self, node: yaml.Node, above: tuple[yaml.Node, ...] = ()) -> Any:
        """The value of a node below others."""
        if node in above:
            raise self.error(node, "an anchor that holds itself. Write the value out")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        above = (*above, node)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                raise self.error(node, f"a value of the kind {node.tag}, which JSON does not know. Write a list")
            sequence = Seq(self.of(each, above) for each in node.value)
            sequence.file, sequence.line = self.file, node.start_mark.line + 1
            sequence.lines = [each.start_mark.line + 1 for each in node.value]
            return sequence
        assert isinstance(node, yaml.MappingNode)
        if node.tag != "tag:yaml.org,2002:map":
            raise self.error(node, f"a value of the kind {node.tag}, which JSON does not know. Write a mapping")
        return self.mapping(node, above)

    def error(self, node: yaml.Node, text: str) -> DeploymentsError:
        return DeploymentsError(f"{self.file}:{node.start_mark.line + 1}: {text}")

    def scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self.loader.construct_object(node)
        except ValueError as error:
            shown = node.value if len(node.value) < 40 else f"{node.value[:40]}..."
            raise self.error(node, f"{shown} is no value ({error}). Correct it, or put it in quotes") from None
        if isinstance(value, date):
            from pydantic_core import to_jsonable_python

            return to_jsonable_python(value)  # as `prefect deploy` sends it
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(
                node, f"{node.value} is a number that JSON does not know. Write another, or text in quotes"
            )
        if isinstance(value, str) and not _is_text(value):
            raise self.error(node, f"{value!r} has a character that no server keeps. Leave it out")
        if not isinstance(value, str | int | float | None):
            raise self.error(node, "a value that JSON does not know. Write text, a number or a list")
        return value

    def mapping(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> Map:
        line = node.start_mark.line + 1
        mapping = Map()
        mapping.file, mapping.line, mapping.lines = self.file, line, {}
        if id(node) not in self.seen:
            for key, _ in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    continue
                name = self.key(key)
                if name in mapping.lines:
                    raise self.error(
                        key,
                        f"{name} is here twice, first in line {mapping.lines[name]}. "
                        "Remove one: only the last would count",
                    )
                mapping.lines[name] = key.start_mark.line + 1
            self.loader.flatten_mapping(node)
            self.seen.add(id(node))
        for key, value in node.value:
            name = self.key(key)
            mapping[name] = self.of(value, above)
            mapping.lines.setdefault(name, line)
        return mapping

    def key(self, node: yaml.Node) -> str:
        """A key as JSON has it."""
        name = self.loader.construct_object(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(name, int) and not isinstance(name, bool):
            return str(name)
        if not isinstance(name, str) or not _is_text(name):
            shown = f"{node.value} is no text, and a" if isinstance(node, yaml.ScalarNode) else "a"
            raise self.error(node, f"{shown} key must be text. Put it in quotes")
        return name


def _is_text(value: str) -> bool:
    """Whether a server can keep it: Postgres has no zero bytes, UTF-8 no halves of characters."""
    return not any(each == "\0" or "\ud800" <= each <= "\udfff" for each in value)


def place(document: Map, path: Sequence[str | int]) -> str:
    """FILE:LINE of what a path of keys and indexes leads to, or of the nearest thing above it."""
    where = document.at()
    value: Any = document
    for step in path:
        if isinstance(value, Map) and isinstance(step, str):
            where = value.at(step)
            value = value.get(step)
        elif isinstance(value, Seq) and isinstance(step, int) and step < len(value):
            where = value.at(step)
            value = value[step]
    return where


if __name__ == "__main__":
    try:
        print("\n".join(included(sys.argv[1], Path())))
    except DeploymentsError as failure:
        sys.exit(str(failure))
