"""Flows of entrypoints, and whether a deployment's parameters fit them."""

import contextlib
import difflib
import functools
import inspect
import ipaddress
import json
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any
from uuid import UUID

import jsonschema
import pydantic
import referencing
import referencing.exceptions

from orchestration.errors import DeploymentsError

_INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))

_importing = threading.RLock()
"""The working directory, sys.path and sys.modules are the process's: one import at a time."""


@dataclass(frozen=True)
class Flow:
    """What a deployment takes from its flow.

    Args:
        name: the flow's name on the server.
        description: the flow's, None if it has none.
        version: the flow's, None if `@flow` has none: Prefect's default, a hash of the file, changes with each edit.
        schema: the parameter_openapi_schema that `prefect deploy` sends.
    """

    name: str
    description: str | None
    version: str | None
    schema: dict[str, Any]


@dataclass(frozen=True)
class _Source:
    """A script or module that was imported.

    Args:
        module: the result; None if it failed.
        own: what came with it from its own folder, by its name in sys.modules.
        error: why it failed.
    """

    module: ModuleType | None
    own: dict[str, ModuleType]
    error: str = ""


@functools.cache
def load(entrypoint: str, directory: Path) -> Flow:
    """The flow of an entrypoint, imported as Prefect does it.

    A script is imported once for all of its flows. What it prints meanwhile goes to stderr. Its modules are its own: a
    script in another folder with a module of the same name gets that one.

    Args:
        entrypoint: `path/to/file.py:function`, `module.path:function` or `module.path.function`.
        directory: what paths and modules are relative to, and the working directory during the import.

    Raises:
        DeploymentsError: there is no such file or flow, or the import fails.
    """
    source_name, function = _split(entrypoint)
    directory = directory.resolve()
    source = _source(source_name, directory)
    if source.module is None:
        raise DeploymentsError(f"entrypoint {entrypoint}: {source.error}")
    from prefect import flows
    from pydantic_core import to_jsonable_python

    flow: Any = source.module
    with _inside(source_name, directory, source.own):
        try:
            for part in function.split("."):
                flow = getattr(flow, part)
        except AttributeError:
            cure = _flows_of(source.module, function)
            raise DeploymentsError(f"entrypoint {entrypoint}: {source_name} has no {function}: {cure}") from None
        if not isinstance(flow, flows.Flow):
            cure = f"decorate it with @flow, or {_flows_of(source.module, function)}"
            raise DeploymentsError(f"entrypoint {entrypoint}: {function} of {source_name} is not a flow: {cure}")
        # Not model_dump_for_openapi: of a flow without parameters it has "definitions", which deploy does not send.
        schema = to_jsonable_python(flow.parameters.model_dump(exclude_unset=True))
        return Flow(flow.name, flow.description or None, _version(flow), schema)


def problems(parameters: Mapping[str, Any], schema: Mapping[str, Any], *, complete: bool) -> list[str]:
    """What of a deployment's parameters does not fit its flow, a sentence each.

    The server looks at no format (a date, a time of day, a UUID): pydantic reads them when the flow starts.
    Values that the server fills in when a run starts (`__prefect_kind`) are accepted as they are.

    Args:
        parameters: the deployment's.
        schema: the flow's (`Flow.schema`).
        complete: whether a required parameter without a value is a problem: a schedule has nobody to ask for it.
    """
    from pydantic_core import to_json

    # Many deployments share few flows and parameters. YAML's dates are text to the server.
    return list(_problems(to_json(parameters), json.dumps(schema), complete))


def _version(flow: Any) -> str | None:
    """The version that `@flow` gives."""
    from prefect.utilities.hashing import file_hash

    try:
        default = file_hash(inspect.getsourcefile(flow.fn) or "")
    except (OSError, TypeError):
        default = None
    return flow.version if flow.version != default else None


def _split(entrypoint: str) -> tuple[str, str]:
    """Script or module, and function, of an entrypoint."""
    source, colon, function = entrypoint.rpartition(":")
    if not colon and not entrypoint.endswith(".py"):
        source, _, function = entrypoint.rpartition(".")
    if not source or not all(part.isidentifier() for part in function.split(".")):
        raise DeploymentsError(
            f"entrypoint {entrypoint!r} names no flow: write path/to/file.py:function or module.path:function"
        )
    return source, function


@functools.cache
def _source(name: str, directory: Path) -> _Source:
    """The script or module `name`, imported. A failure is kept as well: it has as many deployments."""
    from prefect.exceptions import ScriptError
    from prefect.utilities.importtools import load_module, load_script_as_module

    script = directory / name
    if name.endswith(".py") and not script.is_file():
        siblings = {path.name: path for path in sorted(script.parent.glob("*.py"))}
        near = difflib.get_close_matches(script.name, siblings, n=1)
        cure = f"did you mean {Path(name).with_name(near[0])}?" if near else "correct the path, which is relative to it"
        return _Source(None, {}, f"there is no file {name} in {directory}: {cure}")
    own: dict[str, ModuleType] = {}
    try:
        with _inside(name, directory, own):
            module = load_script_as_module(name) if name.endswith(".py") else load_module(name)
    except ScriptError as error:
        return _Source(None, {}, _explained(error.user_exc, name, directory))
    except (Exception, SystemExit) as error:
        return _Source(None, {}, _explained(error, name, directory))
    return _Source(module, own)


@contextlib.contextmanager
def _inside(name: str, directory: Path, own: dict[str, ModuleType]) -> Iterator[None]:
    """The surroundings in which `name` is imported: `own` is what it has imported already, and gets what it imports.

    Only modules whose package was there before stay: one that others imported already would else exist twice.
    """
    folder = (directory / name).resolve().parent if name.endswith(".py") else directory
    with _importing:
        path, before, cwd = list(sys.path), set(sys.modules), Path.cwd()
        sys.modules.update(own)
        os.chdir(directory)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            os.chdir(cwd)
            sys.path[:] = path
            for found in set(sys.modules) - before:
                module = sys.modules[found]
                if found.partition(".")[0] not in before and _is_in(module, folder, directory):
                    own[found] = sys.modules.pop(found)


def _is_in(module: ModuleType, *folders: Path) -> bool:
    """Whether a module's file, or its folder if it has none, is in one of the folders and not installed."""
    files = [module.__file__] if getattr(module, "__file__", None) else list(getattr(module, "__path__", []))
    return any(_is_users(Path(file), *folders) for file in files if file)


def _is_users(file: Path, *folders: Path) -> bool:
    file = file.resolve()
    return any(file.is_relative_to(f) for f in folders) and not any(file.is_relative_to(i) for i in _INSTALLED)


def _flows_of(module: ModuleType, wanted: str) -> str:
    """The cure for a function that is no flow: the flow that was meant, else all there are."""
    from prefect import flows

    names = sorted(name for name, value in vars(module).items() if isinstance(value, flows.Flow))
    near = difflib.get_close_matches(wanted, names, n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"its flows are {', '.join(names)}" if names else "it has no flow"


def _explained(error: BaseException, name: str, directory: Path) -> str:
    """Why an import failed: what was raised, and the last line of the user's own on the way there."""
    folder = (directory / name).resolve().parent
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{_shown(Path(error.filename), directory)}:{error.lineno}"
        return f"{type(error).__name__}: {error.msg} ({where}): correct that line"
    # The entrypoint's own module or a package of it, rather than something that it imports.
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"there is no module {error.name} in {directory} or installed: correct the entrypoint or install it"
    frames = [
        f"{_shown(directory / frame.filename, directory)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and _is_users(directory / frame.filename, folder, directory)
    ]
    at = f" at {frames[-1]}" if frames else ""
    said = " ".join(str(error).split())
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if isinstance(error, SystemExit):
        return f'it ends the process when imported ({what}{at}): put that under if __name__ == "__main__"'
    cure = "install what is missing" if isinstance(error, ImportError) else "correct that"
    return f"importing {name} raises {what}{at}: {cure}, or move it into the flow"


def _shown(file: Path, directory: Path) -> str:
    """A file as the user names it: relative to `directory` if it is in there."""
    file = (directory / file).resolve()
    return str(file.relative_to(directory)) if file.is_relative_to(directory) else str(file)


@functools.lru_cache(maxsize=4096)
def _problems(parameters: bytes, schema: str, complete: bool) -> tuple[str, ...]:
    """Those of :func:`problems`, of JSON."""
    values, properties = json.loads(parameters), json.loads(schema).get("properties", {})
    found = []
    for name in values.keys() - properties.keys():
        near = difflib.get_close_matches(name, properties, n=1)
        has = f"its parameters are {', '.join(properties)}" if properties else "it has none"
        cure = f"did you mean {near[0]}?" if near else f"remove it, {has}"
        found.append(f"parameter {name}: the flow has no such parameter: {cure}")
    given = {name: value for name, value in values.items() if name in properties}
    try:
        errors = _errors(given, json.loads(schema), complete)
    except (referencing.exceptions.Unresolvable, RecursionError) as failure:
        reason = str(failure) if isinstance(failure, referencing.exceptions.Unresolvable) else ""
        reason = reason or "a type refers to itself without end"
        return (*sorted(found), f"the parameters cannot be checked against the flow ({reason}): simplify its types")
    for error in errors:
        if error.validator == "required" and not error.absolute_path:
            name = next(n for n in error.validator_value if error.message.startswith(f"{n!r} "))
            found.append(f"parameter {name}: the flow requires it: give it a value, or a default in the flow")
        else:
            found += [f"parameter {_path(leaf)}: {leaf.message}" for leaf in _leaves(error)]
    return tuple(sorted(dict.fromkeys(found)))


def _errors(values: dict[str, Any], schema: dict[str, Any], complete: bool) -> list[Any]:
    """What the server, or pydantic for a format, refuses: as `prefect.utilities.schema_tools.validate`."""
    from prefect.utilities.collections import remove_nested_keys
    from prefect.utilities.schema_tools.validation import preprocess_schema

    schema = dict(preprocess_schema(schema))
    if not complete:
        schema = remove_nested_keys(["required"], schema)
    registry: referencing.Registry[Any] = referencing.Registry()
    validator = jsonschema.Draft202012Validator(schema, registry=registry, format_checker=_formats())
    return list(validator.iter_errors(values))


@functools.cache
def _formats() -> jsonschema.FormatChecker:
    """The formats of schemas that pydantic writes, checked by the types that they stand for."""
    checker = jsonschema.FormatChecker(formats=())
    types: dict[str, Any] = {
        "date-time": datetime,
        "date": date,
        "time": time,
        "duration": timedelta,
        "uuid": UUID,
        "uri": pydantic.AnyUrl,
        "ipv4": ipaddress.IPv4Address,
        "ipv6": ipaddress.IPv6Address,
        "ipv4network": ipaddress.IPv4Network,
        "ipv6network": ipaddress.IPv6Network,
        "regex": re.Pattern,
    }
    for name, kind in types.items():
        checker.checks(name)(functools.partial(_fits, pydantic.TypeAdapter(kind)))
    return checker


def _fits(adapter: pydantic.TypeAdapter[Any], value: object) -> bool:
    try:
        adapter.validate_python(value)
    except pydantic.ValidationError:
        return not isinstance(value, str)  # what is no text has another mistake
    return True


def _leaves(error: Any) -> list[Any]:
    """The errors that explain one: of an anyOf those of the branch that was meant. None if the server fills it in."""
    if isinstance(error.instance, dict) and "__prefect_kind" in error.instance:
        return []
    branches: dict[int, list[Any]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.schema_path[0], []).append(inner)
    schemas = dict(enumerate(error.validator_value)) if branches else {}
    explained = {
        number: [leaf for inner in inners for leaf in _leaves(inner)]
        for number, inners in branches.items()
        if schemas[number].get("type") != "null"
    }
    if not explained:
        return [error]
    if not all(explained.values()):  # one has nothing but what the server fills in
        return []
    # The one that fits furthest down; of several that do not fit at all, none was meant more than another.
    depth = {number: max(len(leaf.absolute_path) for leaf in leaves) for number, leaves in explained.items()}
    best = max(depth.values())
    if len(explained) > 1 and best == len(error.absolute_path):
        types = [schemas[number].get("type") or schemas[number].get("$ref", "").rpartition("/")[2] for number in depth]
        error.message = f"{error.instance!r} is none of {', '.join(map(str, types))}"
        return [error]
    return explained[next(number for number in depth if depth[number] == best)]


def _path(error: Any) -> str:
    """A parameter and where in it: `config.sizes[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path).lstrip(".")
