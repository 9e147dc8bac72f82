"""The options of dbt's commands, and their form on dbt's command line."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import yaml

from orchestration.errors import DbtError

_SELECTIONS = ({"--select", "-s", "--models", "--model", "-m"}, {"--exclude"})
"""Options that dbt adds up where they are repeated, by their names."""

_SURROGATE = re.compile("[\ud800-\udfff]")


class Options(TypedDict, total=False):
    """Options of the commands of `DbtProject`; dbt itself refuses those that a command does not have."""

    select: str | None
    """A dbt selection, several separated by spaces: all nodes if None, none if empty."""
    exclude: str | None
    """A dbt selection of nodes to leave out."""
    full_refresh: bool
    """Rebuild incremental models from scratch."""
    vars: Mapping[str, Any] | None
    """The project's variables: values that JSON has."""
    threads: int | None
    """How many nodes run in parallel; the profile's number if None."""
    defer_to: str | None
    """The state that `state:` selections compare with, and that unselected nodes are read from: a target's name, for
    the last build of the whole project without a failure, or a folder or URL with a manifest.json."""
    flags: Sequence[str]
    """More options of dbt's command (`["--fail-fast"]`)."""
    inputs: object
    """Identifies the data that the flow has loaded for the nodes, such as the id of the newest load. A retry of the
    flow run leaves out finished nodes only while `inputs` is equal."""
    check: bool
    """Raise if nodes failed, which is the default. With False the caller looks at the result."""


def command_line_arguments(options: Options) -> list[str]:
    """Return the options as dbt's command line takes them, without `--defer`.

    Raises:
        TypeError: an option has an unknown name.
        DbtError: an option has a value of another type, or `vars` one that JSON does not have.
    """
    if unknown := options.keys() - Options.__annotations__.keys():
        raise TypeError(
            f"Unknown option {', '.join(sorted(unknown))}. Options are: {', '.join(Options.__annotations__)}"
        )
    flags = options.get("flags", ())
    flags = flags if isinstance(flags, str) else list(flags)
    _check_strings(options, flags)
    arguments = ["--full-refresh"] if options.get("full_refresh") else []
    if (select := options.get("select")) is not None:
        arguments += ["--select", *(select.split() or [""])]  # "" selects nothing; no argument would select everything
    if exclude := options.get("exclude"):
        arguments += ["--exclude", *exclude.split()]
    if (variables := options.get("vars")) is not None:
        arguments += ["--vars", _variables_as_yaml(variables)]
    if (threads := options.get("threads")) is not None:
        arguments += ["--threads", str(threads)]
    return [*arguments, *flags]


def combined_arguments(earlier: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return the arguments of an earlier command with those of its retry, which win.

    dbt takes the last of several equal options, but adds up selections.
    """
    kept: list[str] = []
    replaced = False
    for argument in earlier:
        if argument.startswith("-"):
            names = next((names for names in _SELECTIONS if argument.partition("=")[0] in names), set())
            replaced = any(other.partition("=")[0] in names for other in arguments)
        if not replaced:
            kept.append(argument)
    return [*kept, *arguments]


def _check_strings(options: Options, flags: str | list[Any]) -> None:
    """Raise a DbtError for a selection that is not a string, and for flags that are not a list of strings."""
    for name in ("select", "exclude"):
        if not isinstance(given := options.get(name), str | None):
            found = given if isinstance(given, list | tuple | set) else [given]
            cure = " ".join(map(str, found))
            raise DbtError(f"{name} is not a string, but {given!r:.100}. Separate selections by spaces: {cure!r:.100}.")
    if isinstance(flags, str):
        raise DbtError(f"flags is a string, {flags!r:.100}. Give a list, like {flags.split()!r:.100}.")
    if wrong := [flag for flag in flags if not isinstance(flag, str)]:
        raise DbtError(f"flags has {wrong[0]!r:.100}, which is not a string. Give {str(wrong[0])!r:.100}.")
    if any(flag.partition("=")[0] == "--target-path" for flag in flags):
        raise DbtError(
            "flags has --target-path, but each command has a separate target folder. "
            "Set DBT_TARGET_PATH, or target-path in dbt_project.yml, to the folder that gets the files at the end."
        )


def _variables_as_yaml(variables: Any) -> str:
    """Return the project's variables as YAML that dbt reads as the same JSON.

    JSON itself would not do: PyYAML reads its `1e+16` as a string.
    """
    if not isinstance(variables, Mapping):
        raise DbtError(f"vars is not a mapping, but {variables!r:.100}. Give a dictionary of names and values.")
    return str(yaml.safe_dump(_as_json(variables, "vars"), default_flow_style=True, width=10**9)).strip()


def _as_json(value: Any, name: str, parents: tuple[int, ...] = ()) -> Any:
    """Return the value in JSON's types.

    Args:
        value: the value.
        name: where the value is: `vars.window.days[1]`.
        parents: the ids of the containers around the value.

    Raises:
        DbtError: JSON has no such value; names it.
    """
    wrong = ""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if not _SURROGATE.search(value):
            return str.__str__(value)
        wrong = "a string with half a character (a lone surrogate)"
    elif isinstance(value, int):
        return int(value)
    elif isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        wrong = f"the number {value}"
    elif id(value) in parents:
        wrong = "a value that contains itself"
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                wrong = f"a dictionary with the key {key!r:.50}, which is not a string"
        if not wrong:
            inner = (*parents, id(value))
            return {_as_json(key, name): _as_json(item, f"{name}.{key}", inner) for key, item in value.items()}
    elif isinstance(value, list | tuple):
        inner = (*parents, id(value))
        return [_as_json(item, f"{name}[{index}]", inner) for index, item in enumerate(value)]
    wrong = wrong or f"a {type(value).__name__}"
    raise DbtError(f"{name} is not JSON: it is {wrong}. Give strings, numbers, lists and dictionaries.")
