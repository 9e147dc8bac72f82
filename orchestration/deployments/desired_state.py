"""Read the desired state of an owner from files, and check all of it that needs no server."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestration.deployments import file_format, files, masking, object_builder, placeholders
from orchestration.deployments.files import YamlMapping
from orchestration.deployments.resources import Name, Object
from orchestration.errors import DeploymentsError


@dataclass
class DesiredState:
    """The objects that an owner's files declare.

    Args:
        owner: the owner of the objects.
        objects: by kind and key.
        notes: what a person should know about the files, a line each.
    """

    owner: str
    objects: dict[Name, Object] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Object]:
        """Return the objects of a kind."""
        return [item for item in self.objects.values() if item.kind == kind]


def read(
    paths: Sequence[str | Path],
    *,
    owner: str = "",
    directory: Path | None = None,
    default_pool: str = "",
    offline: bool = False,
) -> DesiredState:
    """Read files, import their flows and check all that needs no server.

    Args:
        paths: files of desired state.
        owner: by default the `name` of the first file that has one.
        directory: the working directory of runs without `pull` steps; by default the present directory.
        default_pool: the work pool of deployments that name none.
        offline: note a value that is unknown without the server or the environment, instead of an error.

    Raises:
        DeploymentsError: the first mistake, with FILE:LINE and the cure.
    """
    return from_documents(
        files.read(paths), owner=owner, directory=directory, default_pool=default_pool, offline=offline
    )


def from_documents(
    documents: Sequence[YamlMapping],
    *,
    owner: str = "",
    directory: Path | None = None,
    default_pool: str = "",
    offline: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> DesiredState:
    """Import the flows of files that have been parsed, and check all that needs no server.

    Args:
        documents: the files. Their placeholders are resolved in place.
        owner: as for :func:`read`.
        directory: as for :func:`read`.
        default_pool: as for :func:`read`.
        offline: as for :func:`read`.
        variables: values of the server's variables that deployments refer to, by name.

    Raises:
        DeploymentsError: the first mistake, with FILE:LINE and the cure.
    """
    for document in documents:
        file_format.drop_anchors(document)
    missing: list[str] | None = [] if offline else None
    environment = placeholders.resolve(documents, variables or {}, missing)
    if offline:
        placeholders.drop_unresolved_triggers(documents)
    entries = [file_format.validate(document, offline=offline) for document in documents]
    name = owner or next((entry.name for entry in entries if entry.name), None)
    if not name:
        raise DeploymentsError(
            f"{documents[0].location()}: no owner. Add `name: my-project` at the top of the file, or pass --owner"
        )
    state = DesiredState(name, notes=list(dict.fromkeys(missing or ())))
    for document, entry in zip(documents, entries, strict=True):
        object_builder.build(document, entry, state.objects, directory=directory, default_pool=default_pool)
    for item in state.objects.values():
        item.masked = masking.fields_with(item.fields, environment)
    return state


def default_pool() -> str:
    """Return the work pool of deployments that name none, from Prefect's settings."""
    from prefect.settings import get_current_settings

    return get_current_settings().deployments.default_work_pool_name or os.environ.get("PREFECT_DEFAULT_WORK_POOL", "")
