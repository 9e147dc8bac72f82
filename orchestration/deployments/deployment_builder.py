"""Build the deployments that a file declares: import the flow, check parameters, schedules and triggers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestration.access.limits import MAX_TAGS
from orchestration.deployments import automation_reader, files, flows, placeholders, schedules
from orchestration.deployments.file_format import (
    DeploymentEntry,
    DeploymentLimitEntry,
    DesiredStateFile,
    ScheduleEntry,
    WorkPoolReference,
)
from orchestration.deployments.files import YamlMapping, plain
from orchestration.deployments.flows import Flow
from orchestration.deployments.resources import is_same_value, matches_every_event, read_trigger
from orchestration.errors import DeploymentsError

UNKNOWN_VALUE = {"__prefect_kind": "workspace_variable"}
"""Stands for a value that only the server knows. Every parameter accepts it."""

Steps = tuple[str | int, ...]
"""A path of keys and indexes in a file."""


@dataclass
class DeploymentBuilder:
    """Builds the deployments of one file.

    Args:
        document: the file, with its lines.
        file: the same, validated.
        directory: the working directory of runs without `pull` steps; by default the present directory.
        default_pool: the work pool of deployments that name none.
    """

    document: YamlMapping
    file: DesiredStateFile
    directory: Path | None
    default_pool: str

    def build(self, entry: DeploymentEntry, index: int) -> tuple[str, dict[str, Any]]:
        """Return the key and the fields of a deployment.

        Args:
            entry: the deployment in the file.
            index: its place in the file's `deployments`.

        Raises:
            DeploymentsError: the first mistake, with FILE:LINE and the cure.
        """
        path: Steps = ("deployments", index)
        self.refuse_steps(entry, *path)
        flow = self._load_flow(entry, *path)
        self._refuse_values_of_run_start(entry, *path)
        self._refuse_large_parameters(entry, *path)
        listed = self._schedules(entry, *path)
        if entry.enforce_parameter_schema is not False:
            self._check_parameters(entry, flow, bool(listed), *path)
        limit = entry.concurrency_limit or DeploymentLimitEntry()
        options = None
        if limit.collision_strategy or limit.grace_period_seconds:
            options = {
                "collision_strategy": limit.collision_strategy or "ENQUEUE",
                "grace_period_seconds": limit.grace_period_seconds,
            }
        pool = entry.work_pool or WorkPoolReference()
        pool_name = pool.name or self.default_pool
        if not pool_name:
            raise DeploymentsError(
                f"{self._locate(*path)}: deployment {entry.name} names no work pool. Add `work_pool: {{name: ...}}`"
            )
        tags = sorted({tag for tag in entry.tags or [] if tag.strip()})
        if len(tags) > MAX_TAGS:
            raise DeploymentsError(
                f"{self._locate(*path, 'tags')}: deployment {entry.name} has {len(tags)} tags, and the server refuses "
                f"runs with more than {MAX_TAGS}. Remove some"
            )
        fields = {
            "description": entry.description or flow.description,
            "version": entry.version or flow.version,
            "tags": tags,
            "entrypoint": entry.entrypoint,
            "path": entry.path,
            "pull_steps": plain(self._pull_steps(entry, pool, *path)),
            "work_pool_name": pool_name,
            "work_queue_name": pool.work_queue_name or "default",
            "job_variables": plain(pool.job_variables or {}),
            "parameters": plain(entry.parameters or {}),
            "parameter_openapi_schema": flow.schema,
            "enforce_parameter_schema": entry.enforce_parameter_schema is not False,
            "concurrency_limit": limit.limit,
            "concurrency_options": options,
            "paused": entry.paused,
            "schedules": listed,
            "triggers": self._triggers(entry, *path),
        }
        return f"{flow.name}/{entry.name}", fields

    def refuse_steps(self, entry: DesiredStateFile | DeploymentEntry, *path: str | int) -> None:
        """Refuse `build` and `push` steps of a file or a deployment."""
        for key in ("build", "push"):
            if getattr(entry, key):
                raise DeploymentsError(
                    f"{self._locate(*path, key)}: {key} steps are not run here. Build and push the image "
                    f"before, and set `{key}: null`"
                )

    def _locate(self, *path: str | int) -> str:
        return files.locate(self.document, path)

    def _load_flow(self, entry: DeploymentEntry, *path: str | int) -> Flow:
        try:
            flow = flows.load(entry.entrypoint, Path.cwd())
        except DeploymentsError as error:
            raise DeploymentsError(f"{self._locate(*path, 'entrypoint')}: {error}") from None
        if entry.flow_name and entry.flow_name != flow.name:
            raise DeploymentsError(
                f"{self._locate(*path, 'flow_name')}: the flow of {entry.entrypoint} is called {flow.name}, not "
                f"{entry.flow_name}. Correct or remove flow_name"
            )
        return flow

    def _refuse_values_of_run_start(self, entry: DeploymentEntry, *path: str | int) -> None:
        """Refuse parameters with a `__prefect_kind`."""
        for values in (entry.parameters or {}, *(schedule.parameters for schedule in entry.schedules or [])):
            for name, value in values.items():
                if placeholders.is_resolved_at_run_start(value):
                    raise DeploymentsError(
                        f"{self._locate(*path, 'parameters')}: deployment {entry.name}: parameter {name} has a "
                        "__prefect_kind, which the server resolves only for a run that a person starts. Write the "
                        "value, or {{ prefect.variables.NAME }}"
                    )

    def _refuse_large_parameters(self, entry: DeploymentEntry, *path: str | int) -> None:
        """Refuse parameters of more bytes than the server takes."""
        from prefect.settings import get_current_settings

        limit = get_current_settings().server.api.max_parameter_size
        sources = [
            (entry.parameters or {}, ()),
            *((item.parameters, below) for item, below in _schedule_entries(entry)),
        ]
        for parameters, below in sources:
            size = len(json.dumps(parameters, separators=(",", ":"), default=str))
            if 0 < limit < size:
                raise DeploymentsError(
                    f"{self._locate(*path, *below, 'parameters')}: deployment {entry.name}: the parameters have "
                    f"{size:,} bytes as JSON, and the server takes {limit:,}. Store the data elsewhere, and name its "
                    "place in a parameter"
                )

    def _check_parameters(self, entry: DeploymentEntry, flow: Flow, scheduled: bool, *path: str | int) -> None:
        """Check the parameters of each schedule, or of the deployment if it has no schedule.

        Args:
            entry: the deployment.
            flow: the deployment's flow.
            scheduled: whether every required parameter needs a value: a scheduled run has no person to ask.
            path: where the deployment is in the file.
        """
        from orchestration.deployments.parameters import find_problems

        sources = [(schedule.parameters, below) for schedule, below in _schedule_entries(entry)] or [({}, ())]
        for overrides, below in sources:
            where = self._locate(*path, *(below if overrides else ()), "parameters")
            values = {
                name: UNKNOWN_VALUE if placeholders.has_unresolved(value) else value
                for name, value in ((entry.parameters or {}) | overrides).items()
            }
            for problem in find_problems(values, flow, complete=scheduled):
                raise DeploymentsError(f"{where}: deployment {entry.name}: {problem}")

    def _pull_steps(self, entry: DeploymentEntry, pool: WorkPoolReference, *path: str | int) -> list[dict[str, Any]]:
        """Return the steps of the deployment or of the file; without any, a step into the working directory."""
        pull = entry.pull if "pull" in entry.model_fields_set else self.file.pull
        if pull is None and self.file.pull:
            pull = self.file.pull
        if pull is not None:
            return pull
        if (pool.job_variables or {}).get("image") and not self.directory:
            raise DeploymentsError(
                f"{self._locate(*path)}: deployment {entry.name} has its own image and no `pull`, which must say where "
                "that image has the flow. Add `pull: [{prefect.deployments.steps.set_working_directory: {directory: "
                "...}}]`, for example /opt/prefect"
            )
        step = {"directory": str(self.directory or Path.cwd())}
        return [{"prefect.deployments.steps.set_working_directory": step}]

    def _schedules(self, entry: DeploymentEntry, *path: str | int) -> dict[str, dict[str, Any]]:
        """Return the schedules by name, in the normal form."""
        if entry.schedule and "schedules" in entry.model_fields_set:
            raise DeploymentsError(
                f"{self._locate(*path, 'schedule')}: deployment {entry.name} has schedule and schedules. Write all of "
                "them under schedules"
            )
        listed: list[dict[str, Any]] = []
        slugs: dict[str, str] = {}
        for schedule, below in _schedule_entries(entry):
            raw = schedule.model_dump()
            where = self._locate(*path, *below)
            timing = {key: value for key, value in raw.items() if key != "parameters"}
            if placeholders.has_unresolved(timing):  # the notes name the variable
                continue
            if problem := schedules.find_problem(raw):
                key = next((key for key in ("timezone", "anchor_date") if problem.startswith(key)), "")
                raise DeploymentsError(
                    f"{self._locate(*path, *below, key) if key else where}: deployment {entry.name}: {problem}"
                )
            if schedule.slug and schedule.slug in slugs:
                raise DeploymentsError(
                    f"{where}: deployment {entry.name} has two schedules with the slug {schedule.slug}, the first in "
                    f"{slugs[schedule.slug]}. Rename one"
                )
            slugs[schedule.slug or ""] = where
            fields = {
                "schedule": schedules.normalize(raw),
                "active": schedule.active,
                "parameters": plain(schedule.parameters),
                "slug": schedule.slug,
                "replaces": schedule.replaces,
                "zoned": schedule.timezone is not None,
            }
            if any(_starts_the_same_runs(fields, other) for other in listed):
                raise DeploymentsError(f"{where}: deployment {entry.name} has this schedule twice. Remove one")
            listed.append(fields)
        return schedules.by_name(listed)

    def _triggers(self, entry: DeploymentEntry, *path: str | int) -> dict[str, dict[str, Any]]:
        """Return the automations of the deployment's triggers, by name."""
        if not entry.triggers:
            return {}
        from prefect.events import DeploymentTriggerTypes

        found: dict[str, dict[str, Any]] = {}
        for number, raw in enumerate(entry.triggers):
            below = (*path, "triggers", number)
            name = raw.get("name", f"{entry.name}__automation_{number + 1}")
            if not name or not isinstance(name, str):
                raise DeploymentsError(
                    f"{self._locate(*below, 'name')}: deployment {entry.name}: the name of a trigger should be text, "
                    f"not {name!r}. Correct it, or leave it out"
                )
            if name in found:
                raise DeploymentsError(
                    f"{self._locate(*below)}: deployment {entry.name} has two triggers {name}. Rename one"
                )
            fields = automation_reader.read(raw, read_trigger, DeploymentTriggerTypes, self.document, below)
            if matches_every_event(fields["trigger"]):
                raise DeploymentsError(
                    f"{self._locate(*below)}: deployment {entry.name}: trigger {name} names no event: every event "
                    "would start a run, also the events of its own runs. Add events, such as expect: [orders.landed], "
                    "or a match"
                )
            found[name] = fields | {"enabled": fields["enabled"] if raw.get("enabled") is not None else None}
        return found


def _schedule_entries(entry: DeploymentEntry) -> list[tuple[ScheduleEntry, Steps]]:
    """Return the schedules of a deployment, each with its path in the deployment."""
    listed: list[tuple[ScheduleEntry, Steps]] = [
        (schedule, ("schedules", number)) for number, schedule in enumerate(entry.schedules or [])
    ]
    return [*listed, (entry.schedule, ("schedule",))] if entry.schedule else listed


def _starts_the_same_runs(schedule: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two schedules without a slug start the same runs."""
    if schedule["slug"] is not None or other["slug"] is not None:
        return False
    return all(
        (
            schedule["schedule"] == other["schedule"],
            (schedule["active"] is not False) == (other["active"] is not False),
            is_same_value(schedule["parameters"], other["parameters"]),
        )
    )
