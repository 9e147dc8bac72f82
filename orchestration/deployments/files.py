"""Read files of desired state as YAML, with the file and line of each value.

ruamel.yaml keeps positions too, but its loader is pure Python: it takes 1.6 s for a file of 1,000 deployments, and this
module 0.12 s.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from orchestration.errors import DeploymentsError

MAX_VALUES = 500_000
"""Values of a file, enough for some thousand deployments. Aliases of aliases turn a few lines into any number."""

MAX_LEVELS = 100
"""Levels of lists and mappings: the API refuses JSON with more, and Prefect cannot read 256 levels again."""


class YamlMapping(dict[str, Any]):
    """A mapping of a file.

    Attributes:
        file: the path as the user wrote it.
        line: where the mapping begins, from 1.
        lines: the line of each key.
    """

    file: str = ""
    line: int = 0
    lines: dict[str, int]

    def location(self, key: str = "") -> str:
        """Return FILE:LINE of a key, or of the mapping itself."""
        return f"{self.file}:{self.lines.get(key, self.line)}"


class YamlSequence(list[Any]):
    """A sequence of a file.

    Attributes:
        file: the path as the user wrote it.
        line: where the sequence begins, from 1.
        lines: the line of each entry.
    """

    file: str = ""
    line: int = 0
    lines: list[int]

    def location(self, index: int) -> str:
        """Return FILE:LINE of an entry."""
        return f"{self.file}:{self.lines[index]}"


def read(paths: Sequence[str | Path]) -> list[YamlMapping]:
    """Read the files and the files that they include, each once.

    The key `include` of a file lists others, by patterns relative to the file.

    Raises:
        DeploymentsError: a file is absent, or is not a YAML mapping. The message has line and column.
    """
    documents: list[YamlMapping] = []
    seen: set[Path] = set()
    for path in paths:
        documents += _read_with_includes(Path(path), seen, "")
    return documents


def files_for_image(path: str, context: Path) -> list[str]:
    """Return the files that a file of desired state includes, relative to the build context of the image.

    Args:
        path: the file, relative to `context`.
        context: the folder that the image is built from.

    Raises:
        DeploymentsError: an included file is outside of the folder, so that no image has it. Or the image will not have
            the file of an entrypoint, or a file cannot be read.
    """
    documents = read([context / path])
    found = []
    for document in documents[1:]:
        file = Path(document.file).resolve()
        if not file.is_relative_to(context.resolve()):
            raise DeploymentsError(
                f"{path} includes {file}, which is outside of {context.resolve()}, from which the image is built. Move "
                "the file there, and correct include"
            )
        found.append(str(file.relative_to(context.resolve())))
    for document in documents:
        listed = document.get("deployments")
        for deployment in listed if isinstance(listed, list) else ():
            _refuse_entrypoint_outside_of_image(deployment, context)
    return found


def _refuse_entrypoint_outside_of_image(deployment: Any, context: Path) -> None:
    """Refuse an entrypoint whose file exists where the image is built, and not in the image."""
    entrypoint = deployment.get("entrypoint") if isinstance(deployment, YamlMapping) else None
    if not isinstance(entrypoint, str) or "{{" in entrypoint:
        return
    source = entrypoint.rpartition(":")[0] or entrypoint
    if not source.endswith(".py"):  # a module of the checkout, or an installed one
        top = source.partition(".")[0]
        source = top if (context / top).is_dir() else f"{top}.py"
    file = Path(os.path.normpath(source))
    # An absolute path, or a file that is not here, may be one of the base image.
    if file.is_absolute() or not file.parts or not (context / file).exists():
        return
    ignore = context / "docker" / "Dockerfile.dockerignore"
    lines = [line.strip() for line in ignore.read_text().splitlines()] if ignore.exists() else []
    copied = [line.removeprefix("!").strip("/").removeprefix("**/") for line in lines if line.startswith("!")]
    parts = [str(part) for part in ((file / "any.py" if (context / file).is_dir() else file), file, *file.parents)]
    if "*" in lines and not any(fnmatch(part, pattern) for part in parts for pattern in copied):
        raise DeploymentsError(
            f"{deployment.location('entrypoint')}: the image will not have the entrypoint {entrypoint}. Move it to "
            f"flows/, or add {file.parts[0]} to docker/Dockerfile and to {ignore.relative_to(context)}"
        )


def locate(document: YamlMapping, path: Sequence[str | int]) -> str:
    """Return FILE:LINE of the value at a path of keys and indexes, or of its nearest parent in the file."""
    where = document.location()
    value: Any = document
    for step in path:
        if isinstance(value, YamlMapping) and isinstance(step, str):
            where = value.location(step)
            value = value.get(step)
        elif isinstance(value, YamlSequence) and isinstance(step, int) and step < len(value):
            where = value.location(step)
            value = value[step]
    return where


def _read_with_includes(path: Path, seen: set[Path], included_at: str) -> Iterator[YamlMapping]:
    if path.resolve() in seen:
        return
    seen.add(path.resolve())
    document = _read_document(path, included_at)
    yield document
    patterns = document.get("include") or []
    where = document.location("include")
    if isinstance(patterns, str):
        patterns = [patterns]
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise DeploymentsError(f"{where}: include must be a list of files, such as [teams/*.yaml]")
    for pattern in patterns:
        if not pattern.strip():
            raise DeploymentsError(f"{where}: include has an empty pattern. Write a file, such as teams/*.yaml")
        if Path(pattern).is_absolute():
            raise DeploymentsError(
                f"{where}: include has the absolute path {pattern}. Write it relative to {path.parent}"
            )
        try:
            matches = sorted(match for match in path.parent.glob(pattern) if not match.is_dir())
        except (ValueError, IndexError, AttributeError, OSError) as error:  # of pathlib, for an odd pattern
            shown = pattern if len(pattern) < 80 else f"{pattern[:80]}..."
            raise DeploymentsError(
                f"{where}: include has {shown}, which names no files ({error}). Write a file, such as teams/*.yaml"
            ) from None
        if not matches:
            raise DeploymentsError(
                f"{where}: no file matches {path.parent / pattern}. Add the file or remove the pattern from include"
            )
        for match in matches:
            yield from _read_with_includes(match, seen, where)


def _read_document(path: Path, included_at: str) -> YamlMapping:
    where = f"{included_at}: " if included_at else ""
    try:
        text = path.read_text()
    except FileNotFoundError:
        cure = "" if included_at else ". Change to its folder, or name another file"
        raise DeploymentsError(f"{where}{path} does not exist{cure}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeploymentsError(f"{where}{path} cannot be read: {error}") from None
    loader = yaml.CSafeLoader(text)
    try:
        node = loader.get_single_node()
        if node and (number := _count_values(node, {})) > MAX_VALUES:
            raise DeploymentsError(
                f"{path}: its aliases expand to {number:.1e} values, more than the limit of {MAX_VALUES:,}. "
                "Use fewer aliases within aliases, or several files"
            )
        document = _construct(node, loader, str(path)) if node else YamlMapping()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = " ".join(filter(None, [error.problem, error.context]))
        raise DeploymentsError(f"{place}: invalid YAML: {problem}. Check the indentation and quotes there") from None
    except (yaml.YAMLError, ValueError) as error:
        raise DeploymentsError(f"{path}: invalid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise DeploymentsError(f"{path}: lists or mappings are nested too deep. Use fewer levels") from None
    finally:
        loader.dispose()
    if not isinstance(document, YamlMapping):
        raise DeploymentsError(f"{path}:1: expected a mapping. Begin with a key, such as `deployments:`")
    if not document.file:
        document.file, document.line, document.lines = str(path), 1, {}
    return document


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node has after its aliases are expanded.

    Args:
        node: a node of a document.
        known: the counts of nodes by their id. A node that contains itself is found later.
    """
    if isinstance(node, yaml.CollectionNode) and id(node) not in known:
        known[id(node)] = 0
        pairs = isinstance(node, yaml.MappingNode)
        below = [item for pair in node.value for item in pair] if pairs else node.value
        known[id(node)] = 1 + sum(_count_values(item, known) for item in below)
    return known.get(id(node), 1)


def _construct(node: yaml.Node, loader: yaml.CSafeLoader, file: str) -> Any:
    """Return the value of a document's node."""
    constructor = _Constructor(loader, file)
    constructor.read_own_keys(node)
    return constructor.construct(node)


@dataclass
class _Constructor:
    """Constructs the values of a document's nodes as JSON has them: dates become text.

    Args:
        loader: resolves YAML's types.
        file: the path as the user wrote it.
        own_keys: the lines of each mapping's own keys, without those that it merges, by the id of its node.
    """

    loader: yaml.CSafeLoader
    file: str
    own_keys: dict[int, dict[str, int]] = field(default_factory=dict)

    def read_own_keys(self, node: yaml.Node) -> None:
        """Read the own keys of all mappings below a node.

        This comes first: to merge a mapping changes its node, and those of the mappings that it merges.
        """
        if not isinstance(node, yaml.CollectionNode) or id(node) in self.own_keys:
            return
        lines = self.own_keys[id(node)] = {}
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.read_own_keys(item)
            return
        for key, value in node.value:
            self.read_own_keys(value)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.key(key)
            if name in lines:
                raise self.error(
                    key,
                    f"duplicate key {name}, first in line {lines[name]}. Remove one: only the last would count",
                )
            lines[name] = key.start_mark.line + 1

    def construct(self, node: yaml.Node, parents: tuple[yaml.Node, ...] = ()) -> Any:
        """Return the value of a node."""
        if node in parents:
            raise self.error(node, "an anchor contains itself. Write the value out")
        if len(parents) > MAX_LEVELS:
            raise self.error(node, f"more than {MAX_LEVELS} levels of lists and mappings. Use fewer levels")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        parents = (*parents, node)
        if isinstance(node, yaml.SequenceNode):
            if node.tag != "tag:yaml.org,2002:seq":
                raise self.error(node, f"a value of type {node.tag}, which JSON does not have. Write a list")
            sequence = YamlSequence(self.construct(item, parents) for item in node.value)
            sequence.file, sequence.line = self.file, node.start_mark.line + 1
            sequence.lines = [item.start_mark.line + 1 for item in node.value]
            return sequence
        assert isinstance(node, yaml.MappingNode)
        if node.tag != "tag:yaml.org,2002:map":
            raise self.error(node, f"a value of type {node.tag}, which JSON does not have. Write a mapping")
        return self.mapping(node, parents)

    def error(self, node: yaml.Node, text: str) -> DeploymentsError:
        return DeploymentsError(f"{self.file}:{node.start_mark.line + 1}: {text}")

    def convert(self, node: yaml.ScalarNode) -> Any:
        """Return the value of a node as YAML has it."""
        try:
            value = self.loader.construct_object(node)
            if isinstance(value, int):
                str(value)  # Python limits the digits of numbers that it writes, also of hexadecimal ones
        # PyYAML looks up and matches the text of a value with a tag, such as !!bool, without a check.
        except (ValueError, LookupError, AttributeError, ArithmeticError) as error:
            shown = node.value if len(node.value) < 40 else f"{node.value[:40]}..."
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            reason = error if isinstance(error, ValueError) else f"it is no !!{kind}"
            raise self.error(node, f"invalid value {shown} ({reason}). Correct it, or put it in quotes") from None
        return value

    def scalar(self, node: yaml.ScalarNode) -> Any:
        value = self.convert(node)
        if isinstance(value, date):
            from pydantic_core import to_jsonable_python

            return to_jsonable_python(value)  # as `prefect deploy` sends it
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(
                node, f"{node.value} is a number that JSON does not have. Write another, or text in quotes"
            )
        if isinstance(value, str) and not _can_be_stored(value):
            raise self.error(node, f"{value!r} has a character that no server can store. Remove the character")
        if not isinstance(value, str | int | float | None):
            raise self.error(node, "a value that JSON does not have. Write text, a number or a list")
        return value

    def mapping(self, node: yaml.MappingNode, parents: tuple[yaml.Node, ...]) -> YamlMapping:
        mapping = YamlMapping()
        mapping.file, mapping.line = self.file, node.start_mark.line + 1
        mapping.lines = dict(self.own_keys[id(node)])
        self.loader.flatten_mapping(node)
        for key, value in node.value:
            name = self.key(key)
            mapping[name] = self.construct(value, parents)
            mapping.lines.setdefault(name, mapping.line)
        return mapping

    def key(self, node: yaml.Node) -> str:
        """Return a key as JSON has it."""
        name = self.convert(node) if isinstance(node, yaml.ScalarNode) else None
        if isinstance(name, int) and not isinstance(name, bool):
            return str(name)
        if not isinstance(name, str) or not _can_be_stored(name):
            shown = f"key {node.value}" if isinstance(node, yaml.ScalarNode) else "a key"
            raise self.error(node, f"{shown} is not text. Put it in quotes")
        return name


def _can_be_stored(value: str) -> bool:
    """Return whether a server can store a text: Postgres has no zero bytes, UTF-8 no surrogates."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)


def plain(value: Any) -> Any:
    """Return a copy of a value without its lines, as plain dicts and lists."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


if __name__ == "__main__":
    try:
        print("\n".join(files_for_image(sys.argv[1], Path())))
    except DeploymentsError as failure:
        sys.exit(str(failure))
