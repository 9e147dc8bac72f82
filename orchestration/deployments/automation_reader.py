"""Read the automations and triggers of a file with Prefect's own models, and refuse what Prefect would ignore."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, RootModel, TypeAdapter, ValidationError

from orchestration.deployments import files
from orchestration.deployments.file_format import unknown_key
from orchestration.deployments.files import YamlMapping
from orchestration.errors import DeploymentsError
from orchestration.prefect_compat.server_internals import validate_automation


def read(
    entry: Mapping[str, Any],
    convert: Callable[[Mapping[str, Any]], dict[str, Any]],
    model: Any,
    document: YamlMapping,
    path: tuple[str | int, ...],
) -> dict[str, Any]:
    """Return the automation that an entry of a file describes.

    Args:
        entry: an automation or a trigger.
        convert: turns the entry into an automation's fields.
        model: Prefect's type of the entry.
        document: the file.
        path: where the entry is in the file.

    Raises:
        DeploymentsError: Prefect refuses the entry, or ignores one of its keys.
    """
    try:
        fields = convert(entry)
        # Prefect's client accepts triggers that only Prefect Cloud has.
        validate_automation(deepcopy(fields) | {"name": entry.get("name") or "automation"})
        for below, known in _ignored_keys(entry, TypeAdapter(model).validate_python(dict(entry))):
            # Prefect drops the key: an automation without its filter fires at other events.
            where = files.locate(document, (*path, *below))
            raise DeploymentsError(unknown_key(where, str(below[-1]), known))
        return fields
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        steps = [step for step in first["loc"] if step in entry or isinstance(step, int) or str(step).islower()]
        cure = "See docs.prefect.io, Automations"
        if first["type"].startswith("time_delta"):
            cure = 'Write a number of seconds, or of the environment "PT{{ $NAME }}S"'
        raise DeploymentsError(
            f"{files.locate(document, (*path, *steps))}: {'.'.join(map(str, steps))}: {first['msg']}. {cure}"
        ) from None


def _ignored_keys(raw: Any, parsed: Any) -> Iterator[tuple[tuple[str | int, ...], list[str]]]:
    """Yield the path of each key that pydantic ignored, and the keys that its model has there.

    Args:
        raw: a value of a file.
        parsed: the model that pydantic made of it.
    """
    if isinstance(raw, list) and isinstance(parsed, list):
        for index, (raw_item, parsed_item) in enumerate(zip(raw, parsed, strict=False)):
            yield from (((index, *below), known) for below, known in _ignored_keys(raw_item, parsed_item))
    if not isinstance(raw, dict) or not isinstance(parsed, BaseModel) or isinstance(parsed, RootModel):
        return
    known = [info.alias or name for name, info in type(parsed).model_fields.items()]
    for key, value in raw.items():
        if key not in known:
            yield (key,), known
        yield from (((key, *below), inner) for below, inner in _ignored_keys(value, getattr(parsed, key, None)))
