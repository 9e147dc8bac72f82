"""Placeholders of a deployment: filled in as `prefect deploy` does, or refused where that would drop them silently.

`{{ prefect.variables.NAME }}` is a variable of the files or the server, `{{ $NAME }}` one of the environment. What
Prefect itself fills in later, in a pull step, a run's job or an event's parameters, is left.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestration.deployments.files import Map, Seq
from orchestration.errors import DeploymentsError

PLACEHOLDER = re.compile(r"{{\s*([\w.\-\[\]$]+)\s*}}")
"""As Prefect reads it (prefect.utilities.templating)."""

VARIABLE = "prefect.variables."
BLOCK = "prefect.blocks."
CONTEXT = "ctx."
"""What a worker fills in when it starts a run."""


def variables_of(documents: Sequence[Map]) -> set[str]:
    """The variables that deployments name and no file has."""
    named = {
        match[1].removeprefix(VARIABLE)
        for document in documents
        for deployment in _deployments(document)
        for key, value in deployment.items()
        if key != "pull"
        for text in _texts(value)
        for match in PLACEHOLDER.finditer(text)
        if match[1].startswith(VARIABLE)
    }
    return named - _declared(documents).keys() if named else named


def is_unknown(value: Any) -> bool:
    """Whether a value has a variable that is not known without the server."""
    return any(match[1].startswith(VARIABLE) for text in _texts(value) for match in PLACEHOLDER.finditer(text))


def leave_out_unknown(documents: Sequence[Map]) -> None:
    """Remove the keys of deployments whose values have no type without the server."""
    for document in documents:
        for deployment in _deployments(document):
            for key in ("tags", "triggers", "concurrency_limit"):
                if is_unknown(deployment.get(key)):
                    del deployment[key]


def is_for_a_run(value: Any) -> bool:
    """Whether the server would fill a value in when somebody starts a run."""
    if isinstance(value, dict):
        return "__prefect_kind" in value or any(is_for_a_run(each) for each in value.values())
    return isinstance(value, list) and any(is_for_a_run(each) for each in value)


def has_placeholder(value: Any) -> bool:
    """Whether no file can hold a value as it is, for reading the file fills it in."""
    return any(not match[1].startswith(CONTEXT) for text in _texts(value) for match in PLACEHOLDER.finditer(text))


def fill(documents: Sequence[Map], variables: Mapping[str, Any], missing: list[str] | None) -> None:
    """Fill in all documents.

    Args:
        documents: changed in place.
        variables: of the server, by name.
        missing: takes a line for each thing that is not known here, in place of an error.

    Raises:
        DeploymentsError: a placeholder that cannot be filled in, with its line.
    """
    for document in documents:
        for key, value in document.items():
            if key != "deployments" and isinstance(value, str | Map | Seq):
                document[key] = _Environment(missing).filled(value, document.at(key))
    # After the environment, which the files' own variables may name.
    known = dict(variables) | _declared(documents)
    for document in documents:
        for deployment in _deployments(document):
            _Deployment(missing, known).fill(deployment)


def _deployments(document: Map) -> Iterator[Map]:
    listed = document.get("deployments")
    for each in listed if isinstance(listed, list) else ():
        if isinstance(each, Map):
            yield each


def _declared(documents: Sequence[Map]) -> dict[str, Any]:
    """Values of the variables that the files have."""
    listed = [each for document in documents for each in document.get("variables") or () if isinstance(each, Map)]
    return {str(each.get("name")): each.get("value") for each in listed}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if "{{" in value:
            yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


@dataclass
class _Environment:
    """Fills in what the environment has.

    Args:
        missing: takes a line for each variable that it does not have, in place of an error.
    """

    missing: list[str] | None

    def filled(self, value: Any, where: str) -> Any:
        """A value of a file; a mapping or a list is changed in place.

        Raises:
            DeploymentsError: the environment does not have it.
        """
        if isinstance(value, str):
            return self.text(value, where) if "{{" in value else value
        if isinstance(value, Map):
            for key, each in value.items():
                value[key] = self.filled(each, value.at(key))
        elif isinstance(value, Seq):
            for index, each in enumerate(value):
                value[index] = self.filled(each, value.at(index))
        return value

    def text(self, text: str, where: str) -> Any:
        return PLACEHOLDER.sub(lambda match: self.replaced(match, where), text)

    def replaced(self, match: re.Match[str], where: str) -> str:
        if not match[1].startswith("$"):
            return match[0]
        name = match[1].lstrip("$")
        if name in os.environ:
            return os.environ[name]
        if self.missing is None:
            raise DeploymentsError(
                f"{where}: {match[0]} is not in the environment. Set it: export {name}=..., or write the value"
            )
        self.missing.append(f"{where}: {match[0]} is not set here")
        return match[0]


@dataclass
class _Deployment(_Environment):
    """Fills in what a deployment names.

    Args:
        missing: takes a line for each thing that is not known here, in place of an error.
        variables: by name.
    """

    variables: Mapping[str, Any]

    def fill(self, deployment: Map) -> None:
        """Fill in a deployment."""
        for key, value in deployment.items():
            where = deployment.at(key)
            if key == "pull":  # a worker fills in the rest
                deployment[key] = _Environment(self.missing).filled(value, where)
            elif key == "triggers" and isinstance(value, Seq):
                for index, trigger in enumerate(value):
                    if isinstance(trigger, Map):
                        for each, inner in trigger.items():
                            trigger[each] = self.resolved(inner, trigger.at(each), event=each == "parameters")
                    else:
                        value[index] = self.resolved(trigger, value.at(index))
            else:
                deployment[key] = self.resolved(value, where)

    def resolved(self, value: Any, where: str, *, event: bool = False, listed: bool = False) -> Any:
        """A value of a deployment.

        Args:
            value: changed in place if it is a mapping or a list.
            where: FILE:LINE.
            event: its placeholders may be an event's.
            listed: it is an entry of a list, which Prefect drops if it is nothing but a placeholder that it leaves.
        """
        if isinstance(value, Map):
            for key, each in value.items():
                value[key] = self.resolved(each, value.at(key), event=event)
        elif isinstance(value, Seq):
            for index, each in enumerate(value):
                value[index] = self.resolved(each, value.at(index), event=event, listed=True)
        elif isinstance(value, str) and "{{" in value:
            return self.typed(value, where, event, listed)
        return value

    def typed(self, text: str, where: str, event: bool, listed: bool) -> Any:
        whole = PLACEHOLDER.fullmatch(text)
        if whole and whole[1].startswith(VARIABLE):
            found = self.variable(whole, where)
            if not isinstance(found, str):
                return found
            text = found
        else:
            text = PLACEHOLDER.sub(
                lambda match: str(self.variable(match, where)) if match[1].startswith(VARIABLE) else match[0], text
            )
        # What stands in a variable of the environment is filled in once more.
        for _ in range(2):
            text = PLACEHOLDER.sub(lambda match: self.replaced(match, where), text)
        for match in PLACEHOLDER.finditer(text):
            self.left(match, where, event, listed and match[0] == text)
        return text

    def variable(self, match: re.Match[str], where: str) -> Any:
        name = match[1].removeprefix(VARIABLE)
        if name in self.variables:
            return self.variables[name]
        if self.missing is None:
            raise DeploymentsError(
                f"{where}: {match[0]} is a variable that neither the files nor the server have. Add it under "
                f"variables, or make it: prefect variable set {name} ..."
            )
        self.missing.append(f"{where}: {match[0]} is known with the server alone")
        return match[0]

    def replaced(self, match: re.Match[str], where: str) -> str:
        name = match[1]
        return os.environ[name] if name in os.environ else super().replaced(match, where)

    def left(self, match: re.Match[str], where: str, event: bool, dropped: bool) -> None:
        """Refuse a placeholder that stays, unless Prefect fills it in later."""
        name = match[1]
        if name.startswith(BLOCK):
            raise DeploymentsError(
                f"{where}: {match[0]} would write the block's content, secret or not, into the deployment. Load the "
                "block in the flow, or name it in the work pool's base job template"
            )
        if (event or name.startswith(CONTEXT)) and not dropped:
            return
        if self.missing is not None and name.startswith(("$", VARIABLE)):
            return
        what = "would be dropped from this list" if dropped else "has no value: build and push steps do not run here"
        raise DeploymentsError(f"{where}: {match[0]} {what}. Write the value, or {{{{ $NAME }}}} of the environment")
