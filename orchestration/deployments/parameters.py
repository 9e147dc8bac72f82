"""Check the parameters of a deployment against its flow, as the server and pydantic do."""

import contextlib
import difflib
import functools
import ipaddress
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from typing import Any
from uuid import UUID

import jsonschema
import pydantic
import referencing
import referencing.exceptions

from orchestration.deployments.flows import Flow


def find_problems(parameters: Mapping[str, Any], flow: Flow, *, complete: bool) -> list[str]:
    """Return why the parameters do not fit the flow, a sentence with the cure for each cause.

    The server checks the schema alone, and no format (a date, a time of day, a UUID). The flow's types check the rest
    when a run starts: zones of times, schemes of URLs, validators of models. This check covers both. A value that the
    server fills in when a run starts (`__prefect_kind`) always fits.

    Args:
        parameters: those of the deployment.
        flow: the deployment's flow.
        complete: whether a required parameter needs a value: a scheduled run can ask for none.
    """
    from pydantic_core import to_json

    # Many deployments share a few flows and parameters. YAML's dates are text to the server.
    try:
        text = to_json(parameters)
    except ValueError as error:
        return [f"the parameters cannot be written as JSON: {error}. Use smaller values"]
    return list(_find_problems(text, json.dumps(flow.schema), complete)) or list(
        _find_type_problems(text, flow.validate, complete)
    )


@functools.lru_cache(maxsize=4096)
def _find_type_problems(
    parameters: bytes, validate: Callable[[dict[str, Any]], object], complete: bool
) -> tuple[str, ...]:
    """Return why a flow's types refuse parameters that the flow's schema has accepted.

    Args:
        parameters: JSON.
        validate: the flow's (`Flow.validate`).
        complete: whether a required parameter needs a value.
    """
    from prefect.exceptions import ParameterTypeError

    values = {name: value for name, value in json.loads(parameters).items() if not _is_known_at_run_start(value)}
    found: list[Any] = []
    logger, silence = logging.getLogger("prefect.flows"), logging.Filter("none")
    logger.addFilter(silence)  # Prefect logs all values as an error
    try:
        validate(values)
    except ParameterTypeError as error:
        if not isinstance(error.__context__, pydantic.ValidationError):
            return (" ".join(str(error).split()),)
        found = error.__context__.errors(include_url=False, include_context=False)
    except Exception:  # no answer of a validator: it may need what only a run has
        return ()
    finally:
        logger.removeFilter(silence)
    # The person who starts the run gives what is missing. The schema has found what may not be: in a union, a field of
    # another model.
    missing = [mistake["loc"] for mistake in found if mistake["type"] == "missing"]
    incomplete = {place[0] for place in missing if not complete or len(place) == 1}
    return tuple(
        f"parameter {_path(mistake['loc'])}: {mistake['msg'].removeprefix('Value error, ')}. {_cure_of(mistake)}"
        for mistake in found
        # Whether a path exists may differ between this machine and that of the run.
        if mistake["loc"][0] not in incomplete and mistake["type"] != "missing"
        and not mistake["type"].startswith("path_")
    )  # fmt: skip


def _cure_of(mistake: Any) -> str:
    if mistake["type"] in ("value_error", "assertion_error"):  # a validator of the flow's code
        return "Correct the value. If only a run can tell, set enforce_parameter_schema: false"
    return "Correct the value"


def _is_known_at_run_start(value: Any) -> bool:
    """Return whether a value, or one inside it, is read from the server: `__prefect_kind`, or `$ref` of a block."""
    if isinstance(value, dict):
        return bool({"__prefect_kind", "$ref"} & value.keys()) or any(map(_is_known_at_run_start, value.values()))
    return isinstance(value, list) and any(map(_is_known_at_run_start, value))


@functools.lru_cache(maxsize=4096)
def _find_problems(parameters: bytes, schema: str, complete: bool) -> tuple[str, ...]:
    """Return the problems of parameters and a schema that are JSON, so that the result can be cached."""
    values, properties = json.loads(parameters), json.loads(schema).get("properties", {})
    found = []
    for name in values.keys() - properties.keys():
        near = difflib.get_close_matches(name, properties, n=1)
        known = f"its parameters are {', '.join(properties)}" if properties else "it has none"
        cure = f"Did you mean {near[0]}?" if near else f"Remove it: {known}"
        found.append(f"parameter {name}: the flow has no such parameter. {cure}")
    given = {name: value for name, value in values.items() if name in properties}
    try:
        errors = _validate(given, json.loads(schema), complete)
    except (referencing.exceptions.Unresolvable, RecursionError) as failure:
        reason = str(failure) if isinstance(failure, referencing.exceptions.Unresolvable) else ""
        reason = reason or "a type refers to itself without end"
        return (*sorted(found), f"the parameters cannot be checked against the flow: {reason}. Simplify its types")
    for error in errors:
        if error.validator == "required" and not error.absolute_path:
            name = next(n for n in error.validator_value if error.message.startswith(f"{n!r} "))
            found.append(f"parameter {name}: the flow requires it. Give it a value, or a default in the flow")
        else:
            found += [
                f"parameter {_path(leaf.absolute_path)}: {leaf.message}{_cure_of_type(leaf)}"
                for leaf in _explaining_errors(error)
            ]
    return tuple(sorted(dict.fromkeys(found)))


def _cure_of_type(error: Any) -> str:
    """Return the cure for a text where a number or a boolean is meant. The environment has only text."""
    if error.validator != "type" or not isinstance(error.instance, str):
        return ""
    with contextlib.suppress(ValueError):
        if error.validator_value in ("integer", "number", "boolean") and not isinstance(
            json.loads(error.instance), str
        ):
            return (
                ". Remove the quotes. Instead of the environment, which has only text, use {{ prefect.variables.NAME }}"
            )
    return ""


def _validate(values: dict[str, Any], schema: dict[str, Any], complete: bool) -> list[Any]:
    """Return the errors of the server, and of pydantic for formats.

    Source: `prefect.utilities.schema_tools.validate`.
    """
    from prefect.utilities.collections import remove_nested_keys
    from prefect.utilities.schema_tools.validation import preprocess_schema

    schema = dict(preprocess_schema(schema))
    if not complete:
        schema = remove_nested_keys(["required"], schema)
    registry: referencing.Registry[Any] = referencing.Registry()
    validator = jsonschema.Draft202012Validator(schema, registry=registry, format_checker=_format_checker())
    return list(validator.iter_errors(values))


@functools.cache
def _format_checker() -> jsonschema.FormatChecker:
    """Return a checker of the formats that pydantic writes into schemas, by the types that they stand for."""
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
        checker.checks(name)(functools.partial(_has_format, pydantic.TypeAdapter(kind)))
    return checker


def _has_format(adapter: pydantic.TypeAdapter[Any], value: object) -> bool:
    try:
        adapter.validate_python(value)
    except pydantic.ValidationError:
        return not isinstance(value, str)  # a value of another type fails the check of its type
    return True


def _explaining_errors(error: Any) -> list[Any]:
    """Return the errors that explain one: of an anyOf, those of the branch that was meant.

    `jsonschema.best_match` always picks one branch, also where none was meant, and reports values that the server
    fills in (`__prefect_kind`), for which this returns none.
    """
    if isinstance(error.instance, dict) and "__prefect_kind" in error.instance:
        return []
    branches: dict[int, list[Any]] = {}
    for inner in error.context or ():
        branches.setdefault(inner.schema_path[0], []).append(inner)
    schemas = dict(enumerate(error.validator_value)) if branches else {}
    explained = {
        number: [leaf for inner in inners for leaf in _explaining_errors(inner)]
        for number, inners in branches.items()
        if schemas[number].get("type") != "null"
    }
    if not explained:
        return [error]
    if not all(explained.values()):  # all that this branch lacks, the server fills in
        return []
    # The branch that fits furthest down was meant. Of several that fit nowhere, none was meant more than another.
    depth = {number: max(len(leaf.absolute_path) for leaf in leaves) for number, leaves in explained.items()}
    best = max(depth.values())
    if len(explained) > 1 and best == len(error.absolute_path):
        types = [schemas[number].get("type") or schemas[number].get("$ref", "").rpartition("/")[2] for number in depth]
        error.message = f"{error.instance!r} is none of {', '.join(map(str, types))}"
        return [error]
    return explained[next(number for number in depth if depth[number] == best)]


def _path(steps: Sequence[str | int]) -> str:
    """Return the parameter and the place in it, such as `config.sizes[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in steps).lstrip(".")
