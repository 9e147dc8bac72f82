"""Build the objects that a file of desired state declares."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.deployments import automation_reader, files, placeholders
from orchestration.deployments.deployment_builder import DeploymentBuilder
from orchestration.deployments.file_format import AutomationEntry, DesiredStateFile, PoolEntry
from orchestration.deployments.files import YamlMapping, plain
from orchestration.deployments.resources import (
    AUTOMATION,
    DEPLOYMENT,
    FILE_SYSTEM,
    LIMIT,
    POOL,
    QUEUE,
    TAG_LIMIT,
    VARIABLE,
    Name,
    Object,
    display_name,
    read_automation,
    triggered_deployment,
)
from orchestration.errors import DeploymentsError


def build(
    document: YamlMapping,
    file: DesiredStateFile,
    objects: dict[Name, Object],
    *,
    directory: Path | None,
    default_pool: str,
) -> None:
    """Add the objects of a file.

    Args:
        document: the file, with its lines.
        file: the same, validated.
        objects: takes the objects, by kind and key.
        directory: the working directory of runs without `pull` steps; by default the present directory.
        default_pool: the work pool of deployments that name none.

    Raises:
        DeploymentsError: the first mistake, with FILE:LINE and the cure.
    """
    deployments = DeploymentBuilder(document, file, directory, default_pool)
    deployments.refuse_steps(file)
    builder = _ObjectBuilder(document, file, objects)
    builder.add_all_but_deployments()
    for index, entry in enumerate(file.deployments or []):
        if placeholders.has_unresolved(entry.entrypoint):  # the notes name the variable
            continue
        key, fields = deployments.build(entry, index)
        builder.add(DEPLOYMENT, key, fields, "deployments", index)


@dataclass
class _ObjectBuilder:
    """Builds the objects of one file, and refuses an object that is declared twice."""

    document: YamlMapping
    file: DesiredStateFile
    objects: dict[Name, Object]

    def add_all_but_deployments(self) -> None:
        file = self.file
        for index, variable in enumerate(file.variables or []):
            self.add(VARIABLE, variable.name, variable.model_dump(exclude={"name"}), "variables", index)
        for index, system in enumerate(file.remote_file_systems or []):
            self.add(FILE_SYSTEM, system.name, system.model_dump(exclude={"name"}), "remote_file_systems", index)
        for index, limit in enumerate(file.concurrency_limits or []):
            fields = limit.model_dump(exclude={"name"})
            self.add(LIMIT, limit.name, fields, "concurrency_limits", index)
        for index, tag in enumerate(file.tag_concurrency_limits or []):
            self.add(TAG_LIMIT, tag.tag, {"concurrency_limit": tag.limit}, "tag_concurrency_limits", index)
        for index, pool in enumerate(file.work_pools or []):
            self.add_pool(pool, index)
        for index, automation in enumerate(file.automations or []):
            self.add_automation(automation, index)

    def add(self, kind: str, key: str, fields: dict[str, Any], *path: str | int) -> None:
        """Add an object that the file declares at `path`."""
        added = Object(kind, key, fields, files.locate(self.document, path))
        if first := self.objects.get(added.name):
            raise DeploymentsError(
                f"{added.where}: {display_name(added.name)} is declared twice, first in {first.where}. "
                "Rename or remove one"
            )
        self.objects[added.name] = added

    def add_pool(self, pool: PoolEntry, index: int) -> None:
        path = ("work_pools", index)
        fields = plain(pool.model_dump(exclude={"name", "queues"})) | {"description": pool.description or None}
        self.add(POOL, pool.name, fields, *path)
        for number, queue in enumerate(pool.queues or []):
            # Without a description in the file, the server's own description of the queue `default` stays.
            excluded = {"name"} if queue.description else {"name", "description"}
            fields = queue.model_dump(exclude=excluded)
            self.add(QUEUE, f"{pool.name}/{queue.name}", fields, *path, "queues", number)

    def add_automation(self, entry: AutomationEntry, index: int) -> None:
        from prefect.events.schemas.automations import AutomationCore

        path = ("automations", index)
        raw = entry.model_dump()
        if triggered_deployment(raw):
            raise DeploymentsError(
                f"{files.locate(self.document, (*path, 'actions'))}: automation {entry.name} does nothing but run a "
                "deployment. Move it to the triggers of that deployment"
            )
        enabled = raw | {"enabled": entry.enabled is not False}
        fields = automation_reader.read(enabled, read_automation, AutomationCore, self.document, path)
        self.add(AUTOMATION, entry.name, fields | {"enabled": entry.enabled}, *path)
