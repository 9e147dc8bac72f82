"""Resolve the placeholders of deployments as `prefect deploy` does; refuse those that it would drop silently.

`{{ prefect.variables.NAME }}` is a variable of the files or the server, `{{ $NAME }}` one of the environment. A
placeholder that Prefect resolves later stays: in a pull step, in the job of a run, in the parameters of an event.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from orchestration.deployments.files import YamlMapping, YamlSequence
from orchestration.errors import DeploymentsError

PLACEHOLDER = re.compile(r"{{\s*([\w.\-\[\]$]+)\s*}}")
"""A placeholder, as `prefect.utilities.templating` reads it."""

VARIABLE = "prefect.variables."
BLOCK = "prefect.blocks."
CONTEXT = "ctx."
"""The prefix of what a worker fills in when it starts a run."""

EVERY = ""
"""The prefix of every placeholder: the server resolves those in the parameters of an event."""

READABLE_VARIABLE = "SYNC_ENVIRONMENT"
"""Names the variables that files may read, separated by commas. `NAME*` stands for all names that begin with NAME.

Without this variable, files may read the whole environment, as with `prefect deploy`.
"""


def server_variables(documents: Sequence[YamlMapping]) -> set[str]:
    """Return the names of the variables that deployments refer to and no file declares."""
    named = {
        match[1].removeprefix(VARIABLE)
        for document in documents
        for deployment in _entries(document, "deployments")
        for key, value in deployment.items()
        if key != "pull"
        for text in _texts(value)
        for match in PLACEHOLDER.finditer(text)
        if match[1].startswith(VARIABLE)
    }
    return named - _declared_variables(documents).keys() if named else named


def has_unresolved(value: Any, kinds: tuple[str, ...] = ("$", VARIABLE)) -> bool:
    """Return whether a value has a placeholder of these kinds: of the environment and of the server's variables."""
    return any(match[1].startswith(kinds) for text in _texts(value) for match in PLACEHOLDER.finditer(text))


def drop_unresolved_triggers(documents: Sequence[YamlMapping]) -> None:
    """Remove the triggers of deployments that Prefect's models cannot read without the server."""
    for document in documents:
        for deployment in _entries(document, "deployments"):
            if has_unresolved(deployment.get("triggers")):
                del deployment["triggers"]


def is_resolved_at_run_start(value: Any) -> bool:
    """Return whether the server would fill a value in when a person starts a run (`__prefect_kind`)."""
    if isinstance(value, dict):
        return "__prefect_kind" in value or any(is_resolved_at_run_start(inner) for inner in value.values())
    return isinstance(value, list) and any(is_resolved_at_run_start(inner) for inner in value)


def has_placeholder(value: Any, kept: str | None = CONTEXT) -> bool:
    """Return whether a value of a deployment has a placeholder that reading it from a file would resolve or refuse.

    Args:
        value: the value.
        kept: as :meth:`_DeploymentResolver.resolve_value` takes it.
    """
    names = (match[1] for text in _texts(value) for match in PLACEHOLDER.finditer(text))
    if kept == EVERY:  # `{{ NAME }}` may be a variable of the environment
        return any("." not in name or name.startswith(("$", VARIABLE, BLOCK)) for name in names)
    return any(kept is None or not name.startswith(kept) for name in names)


def resolve(documents: Sequence[YamlMapping], variables: Mapping[str, Any], missing: list[str] | None) -> set[str]:
    """Resolve the placeholders of all documents in place, and return the values that come from the environment.

    Args:
        documents: the files, changed in place.
        variables: values of the server's variables, by name.
        missing: takes a line for each value that is unknown here, instead of an error.

    Raises:
        DeploymentsError: a placeholder cannot be resolved. The message has its line.
    """
    environment: set[str] = set()
    for document in documents:
        for key, value in document.items():
            if key != "deployments" and isinstance(value, str | YamlMapping | YamlSequence):
                document[key] = _EnvironmentResolver(missing, environment).resolve(value, document.location(key))
    # After the environment, which variables of the files may refer to.
    known = dict(variables) | _declared_variables(documents)
    for document in documents:
        for deployment in _entries(document, "deployments"):
            _DeploymentResolver(missing, environment, known).resolve_deployment(deployment)
    return environment


def _entries(document: YamlMapping, section: str) -> Iterator[YamlMapping]:
    """Yield the entries of a section of a file that has not been validated."""
    listed = document.get(section)
    for entry in listed if isinstance(listed, list) else ():
        if isinstance(entry, YamlMapping):
            yield entry


def _declared_variables(documents: Sequence[YamlMapping]) -> dict[str, Any]:
    """Return the values of the variables that the files declare, by name."""
    listed = [variable for document in documents for variable in _entries(document, "variables")]
    return {str(variable.get("name")): variable.get("value") for variable in listed}


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in a value that may have a placeholder."""
    if isinstance(value, str):
        if "{{" in value:
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _read_environment(name: str, where: str) -> str:
    """Return a variable of the environment.

    Raises:
        DeploymentsError: files may not read the variable.
    """
    readable = os.environ.get(READABLE_VARIABLE)
    if readable is None or any(fnmatchcase(name, pattern.strip()) for pattern in readable.split(",")):
        return os.environ[name]
    raise DeploymentsError(
        f"{where}: {name} may not be read from the environment: files may read {readable}. Name the variable "
        "SYNC_..., or set it in the chart's sync.env"
    )


@dataclass
class _EnvironmentResolver:
    """Resolves variables of the environment.

    Args:
        missing: takes a line for each variable that is not set, instead of an error.
        values: takes the value of each variable that is read.
    """

    missing: list[str] | None
    values: set[str]

    def resolve(self, value: Any, where: str) -> Any:
        """Return a value of a file, resolved; a mapping or a list is changed in place.

        Raises:
            DeploymentsError: a variable of the environment is not set.
        """
        if isinstance(value, str):
            return self.resolve_text(value, where) if "{{" in value else value
        if isinstance(value, YamlMapping):
            for key, inner in value.items():
                value[key] = self.resolve(inner, value.location(key))
        elif isinstance(value, YamlSequence):
            for index, inner in enumerate(value):
                value[index] = self.resolve(inner, value.location(index))
        return value

    def resolve_text(self, text: str, where: str) -> Any:
        return PLACEHOLDER.sub(lambda match: self.environment_value(match, where), text)

    def environment_value(self, match: re.Match[str], where: str) -> str:
        if not match[1].startswith("$"):
            return match[0]
        name = match[1].lstrip("$")
        if name in os.environ:
            return self.read_environment(name, where)
        if self.missing is None:
            raise DeploymentsError(
                f"{where}: {match[0]} is not set in the environment. Set it with export {name}=..., or write the value"
            )
        self.missing.append(f"{where}: {match[0]} is not set here")
        return match[0]

    def read_environment(self, name: str, where: str) -> str:
        value = _read_environment(name, where)
        self.values.add(value)
        return value


@dataclass
class _DeploymentResolver(_EnvironmentResolver):
    """Resolves the placeholders of a deployment.

    Args:
        missing: takes a line for each value that is unknown here, instead of an error.
        values: takes the value of each variable of the environment that is read.
        variables: values of the variables of files and server, by name.
    """

    variables: Mapping[str, Any]

    def resolve_deployment(self, deployment: YamlMapping) -> None:
        """Resolve a deployment in place."""
        for key, value in deployment.items():
            where = deployment.location(key)
            if key == "pull":  # a worker resolves the other placeholders
                deployment[key] = _EnvironmentResolver(self.missing, self.values).resolve(value, where)
            elif key == "triggers" and isinstance(value, YamlSequence):
                for index, trigger in enumerate(value):
                    if isinstance(trigger, YamlMapping):
                        for name, inner in trigger.items():
                            kept = EVERY if name == "parameters" else None
                            trigger[name] = self.resolve_value(inner, trigger.location(name), kept)
                    else:
                        value[index] = self.resolve_value(trigger, value.location(index), None)
            else:
                # Prefect drops the context of a run from schedules and triggers.
                kept = None if key in ("schedule", "schedules", "triggers") else CONTEXT
                deployment[key] = self.resolve_value(value, where, kept)

    def resolve_value(self, value: Any, where: str, kept: str | None) -> Any:
        """Return a value of a deployment, resolved; a mapping or a list is changed in place.

        Args:
            value: the value.
            where: FILE:LINE.
            kept: the prefix of the placeholders in it that are resolved later: `CONTEXT`, `EVERY` placeholder in the
                parameters of an event, or None.
        """
        if isinstance(value, YamlMapping):
            for key, inner in value.items():
                value[key] = self.resolve_value(inner, value.location(key), kept)
        elif isinstance(value, YamlSequence):
            for index, inner in enumerate(value):
                value[index] = self.resolve_value(inner, value.location(index), kept)
        elif isinstance(value, str) and "{{" in value:
            return self.resolve_typed(value, where, kept)
        return value

    def resolve_typed(self, text: str, where: str, kept: str | None) -> Any:
        """Return a text, resolved. A text that is one variable gets the variable's type."""
        whole = PLACEHOLDER.fullmatch(text)
        if whole and whole[1].startswith(VARIABLE):
            value = self.variable_value(whole, where)
        else:
            value = PLACEHOLDER.sub(
                lambda match: str(self.variable_value(match, where)) if match[1].startswith(VARIABLE) else match[0],
                text,
            )
        return self.resolve_rest(value, where, kept, whole[0] if whole else "")

    def resolve_rest(self, value: Any, where: str, kept: str | None, variable: str) -> Any:
        """Return a value whose variables of files and server have been resolved, with those of the environment.

        Args:
            value: the value.
            where: FILE:LINE.
            kept: as `resolve_value` takes it.
            variable: the placeholder whose whole value this is; empty if none is.
        """
        if isinstance(value, dict):
            return {key: self.resolve_rest(inner, where, kept, variable) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.resolve_rest(inner, where, kept, variable) for inner in value]
        if not isinstance(value, str):
            return value
        text = PLACEHOLDER.sub(lambda match: self.environment_value(match, where), value)
        if kept != EVERY:  # A variable of the environment may refer to another one, by a name with a dollar.
            text = _EnvironmentResolver(self.missing, self.values).resolve_text(text, where)
        for match in PLACEHOLDER.finditer(text):
            self.refuse_unresolved(match, where, kept, variable)
        return text

    def variable_value(self, match: re.Match[str], where: str) -> Any:
        name = match[1].removeprefix(VARIABLE)
        if name in self.variables:
            return self.variables[name]
        if self.missing is None:
            raise DeploymentsError(
                f"{where}: {match[0]} is a variable that neither the files nor the server have. Add it under "
                f"variables, or create it with: prefect variable set {name} ..."
            )
        self.missing.append(f"{where}: {match[0]} is known only to the server")
        return match[0]

    def environment_value(self, match: re.Match[str], where: str) -> str:
        name = match[1]
        return self.read_environment(name, where) if name in os.environ else super().environment_value(match, where)

    def refuse_unresolved(self, match: re.Match[str], where: str, kept: str | None, variable: str) -> None:
        """Refuse a placeholder that is left, unless Prefect resolves it later."""
        name = match[1]
        if name.startswith(BLOCK):
            raise DeploymentsError(
                f"{where}: {match[0]} would write the block's content, secret or not, into the deployment. Load the "
                "block in the flow, or name it in the work pool's base job template"
            )
        if name.lstrip("$") in os.environ:
            raise DeploymentsError(
                f"{where}: {match[0]} is in the value of another variable, where Prefect does not resolve it. Write "
                "the value there"
            )
        if kept is not None and name.startswith(kept):
            return
        if self.missing is not None and name.startswith(("$", VARIABLE)):
            return
        if variable and variable != match[0]:
            raise DeploymentsError(
                f"{where}: {match[0]} is in the value of {variable}, where Prefect resolves variables of the "
                "environment alone, and would drop it. Correct the variable's value"
            )
        cause = "has no value: build and push steps do not run here"
        if name.startswith(CONTEXT):
            cause = "would be dropped here: a worker resolves it neither in schedules nor in triggers"
        if name.startswith(VARIABLE):
            cause = "is in the value of another variable, where Prefect resolves none"
        raise DeploymentsError(f"{where}: {match[0]} {cause}. Write the value, or {{{{ $NAME }}}} of the environment")
