"""Mask values that come from the environment of a sync: plans, diffs and drift reports are shown to many people."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from orchestration.deployments.resources import Difference

MASK = "***"

MIN_SECRET_CHARACTERS = 4
"""A shorter value is in too many other texts, and is no secret."""


def fields_with(fields: Any, values: Iterable[str]) -> frozenset[str]:
    """Return the fields, such as `job_variables.env.TOKEN`, whose texts have one of the values."""
    secrets = [value for value in values if len(value) >= MIN_SECRET_CHARACTERS]
    return frozenset(name for name, text in _texts(fields) if any(value in text for value in secrets))


def _texts(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in a value, with the name of the field. An entry of a list has the list's name."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, name)


def mask(differences: Sequence[Difference], masked: Iterable[str]) -> list[Difference]:
    """Return differences without old and new values of the masked fields, of fields in them and around them."""
    names = [*masked]

    def hidden(value: Any) -> Any:
        return value if value is None else MASK

    return [
        (name, hidden(old), hidden(new))
        if any(
            f"{masked_name}.".startswith(f"{name}.") or f"{name}.".startswith(f"{masked_name}.")
            for masked_name in names
        )
        else (name, old, new)
        for name, old, new in differences
    ]
