"""Files of desired state, read so that every mistake can be pointed at: each mapping knows its file and lines."""

import os
import re
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from orchestration.errors import DeploymentsError

PLACEHOLDER = re.compile(r"{{\s*\$(\w+)\s*}}")


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
        if Path(pattern).is_absolute():
            raise DeploymentsError(f"{document.at('include')}: {pattern} must be relative to {path.parent}")
        matches = sorted(path.parent.glob(pattern))
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
        document = _value(loader, node, str(path), ()) if node else Map()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        said = " ".join(filter(None, [error.problem, error.context]))
        raise DeploymentsError(f"{place}: this is no YAML: {said}. Look at the indentation and quotes there") from None
    except (yaml.YAMLError, ValueError) as error:
        raise DeploymentsError(f"{path}: this is no YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()
    if not isinstance(document, Map):
        raise DeploymentsError(f"{path}:1: this is no mapping. It begins with a key, like `deployments:`")
    if not document.file:
        document.file, document.line, document.lines = str(path), 1, {}
    return document


def _value(loader: yaml.CSafeLoader, node: yaml.Node, file: str, above: tuple[yaml.Node, ...]) -> Any:
    """The value of a node, as JSON knows it: dates are text."""
    line = node.start_mark.line + 1
    if node in above:
        raise DeploymentsError(f"{file}:{line}: an anchor that holds itself. Write the value out")
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_object(node)
        if isinstance(value, date):
            return value.isoformat()
        if isinstance(value, bytes | set):
            raise DeploymentsError(f"{file}:{line}: a value that JSON does not know. Write text, a number or a list")
        return value
    above = (*above, node)
    if isinstance(node, yaml.SequenceNode):
        sequence = Seq(_value(loader, each, file, above) for each in node.value)
        sequence.file, sequence.line = file, line
        sequence.lines = [each.start_mark.line + 1 for each in node.value]
        return sequence
    assert isinstance(node, yaml.MappingNode)
    mapping = Map()
    mapping.file, mapping.line, mapping.lines = file, line, {}
    for key, _ in node.value:
        if key.tag == "tag:yaml.org,2002:merge":
            continue
        name = loader.construct_object(key) if isinstance(key, yaml.ScalarNode) else None
        if not isinstance(name, str | int | float | bool):
            raise DeploymentsError(f"{file}:{key.start_mark.line + 1}: a key must be text")
        name = name if isinstance(name, str) else str(key.value)
        if name in mapping.lines:
            raise DeploymentsError(
                f"{file}:{key.start_mark.line + 1}: {name} is here twice, first in line {mapping.lines[name]}. "
                "Remove one: only the last would count"
            )
        mapping.lines[name] = key.start_mark.line + 1
    loader.flatten_mapping(node)
    for key, value in node.value:
        mapping[str(key.value)] = _value(loader, value, file, above)
        mapping.lines.setdefault(str(key.value), line)
    return mapping


def filled(value: Any, where: str, missing: list[str] | None = None) -> Any:
    """`value` with `{{ $NAME }}` replaced by the environment's, as `prefect deploy` does.

    Args:
        value: text, or what holds text.
        where: FILE:LINE, for a mapping's own is nearer.
        missing: takes the names that the environment does not have, in place of an error.

    Raises:
        DeploymentsError: the environment does not have it.
    """
    if isinstance(value, str) and "{{" in value:

        def replaced(match: re.Match[str]) -> str:
            name = match[1]
            if name in os.environ:
                return os.environ[name]
            if missing is None:
                raise DeploymentsError(
                    f"{where}: {match[0]} is not in the environment. Set it: export {name}=..., or write the value"
                )
            missing.append(f"{where}: {match[0]} is not set here")
            return match[0]

        return PLACEHOLDER.sub(replaced, value)
    if isinstance(value, Map):
        for key, each in value.items():
            if isinstance(each, str | Map | Seq):
                value[key] = filled(each, value.at(key), missing)
    elif isinstance(value, Seq):
        for index, each in enumerate(value):
            if isinstance(each, str | Map | Seq):
                value[index] = filled(each, value.at(index), missing)
    return value


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
