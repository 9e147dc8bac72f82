"""Create and change a deployment on the server, with its schedules, triggers and scheduled runs."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from orchestration.deployments import rescheduling, schedules
from orchestration.deployments.plan import Change
from orchestration.deployments.resources import (
    DEPLOYMENT_PLACEHOLDER,
    Object,
    is_same_value,
    is_schedule_deleted,
    pair_schedules,
    replace_deployment,
    trigger_differences,
)
from orchestration.prefect_api import JSON, Server

PLAIN_FIELDS = (
    "description", "version", "tags", "entrypoint", "path", "pull_steps", "parameters", "parameter_openapi_schema",
    "enforce_parameter_schema", "concurrency_limit", "concurrency_options", "paused",
)  # fmt: skip
"""Fields of a deployment that are sent unchanged."""

POOL_FIELDS = ("work_pool_name", "work_queue_name", "job_variables")
"""Fields that are sent together: the server checks job variables only in a request that names the work pool."""

SCHEDULED_BY_SYNC = timedelta(minutes=5)
"""A sync creates the runs of a new deployment that are due within this time. The server's own scheduler runs once a
minute and creates the others.
"""


async def create(server: Server, desired: Object, flow_ids: dict[str, str]) -> None:
    """Create a deployment.

    Args:
        server: the server.
        desired: the deployment.
        flow_ids: ids of the server's flows by name; takes the id of a new flow.
    """
    created = datetime.now(UTC)
    flow, _, name = desired.key.rpartition("/")
    if flow not in flow_ids:
        flow_ids[flow] = (await server.ask("POST", "/flows/", {"name": flow}, idempotent=True))["id"]
    body = {key: desired.fields[key] for key in PLAIN_FIELDS if desired.fields[key] is not None}
    body |= {key: desired.fields[key] for key in POOL_FIELDS}
    listed = desired.fields["schedules"].values()
    body |= {"name": name, "flow_id": flow_ids[flow], "schedules": [*map(_schedule_body, listed)]}
    active = [schedule for schedule in listed if schedule["active"] is not False]
    is_due = not desired.fields["paused"] and any(
        schedules.is_due_within(schedule["schedule"], SCHEDULED_BY_SYNC) for schedule in active
    )
    deployment_id = str((await server.ask("POST", "/deployments/", body, idempotent=True))["id"])
    await _apply_triggers(server, desired, deployment_id, {}, {})
    if is_due:
        await rescheduling.schedule_runs(server, deployment_id, created)


async def change(server: Server, change: Change, changed: dict[str, Change], now: str, late: Sequence[str]) -> None:
    """Bring an existing deployment to its desired state.

    Args:
        server: the server.
        change: the change.
        changed: takes the change, by the deployment's id, if its runs must be scheduled again at the end of the sync.
        now: when the sync began, ISO 8601.
        late: due times of late runs that the server deletes with a removed schedule.
    """
    desired, live = change.desired, change.live
    assert desired
    assert live
    different = change.changed_fields
    body = {key: desired.fields[key] for key in PLAIN_FIELDS if key in different}
    if different & {*POOL_FIELDS}:
        body |= {key: desired.fields[key] for key in POOL_FIELDS}
    runs_deleted = bool(body) or bool(change.since) or "schedules" in different
    if body:
        await server.ask("PATCH", f"/deployments/{live.id}", body)
    if "schedules" in different:
        await _apply_schedules(server, desired, live)
    await rescheduling.schedule_late_runs(server, live.id, late)
    if different & {"triggers", "copies"}:
        await _apply_triggers(server, desired, live.id, live.fields["triggers"], live.raw["trigger_ids"])
    if runs_deleted and (desired.fields["schedules"] or live.fields["schedules"]):
        changed[live.id] = change
    if runs_deleted and desired.fields["schedules"] and not rescheduling.is_paused(desired, live):
        await rescheduling.schedule_runs(server, live.id, datetime.fromisoformat(change.since or now))


def _schedule_body(schedule: JSON) -> JSON:
    """Return the body that creates a schedule."""
    body = {key: schedule[key] for key in ("parameters", "slug")} | {"schedule": _times(schedule)}
    return body if schedule["active"] is None else body | {"active": schedule["active"]}


def _times(schedule: JSON) -> JSON:
    """Return the times of a schedule. A cron without a timezone is sent without one, as `prefect deploy` does: UTC."""
    omitted = () if schedule.get("zoned", True) or "cron" not in schedule["schedule"] else ("timezone",)
    return {key: value for key, value in schedule["schedule"].items() if key not in omitted}


async def _apply_schedules(server: Server, desired: Object, live: Object) -> None:
    """Create, change and delete schedules. New ones come first: a deployment never has too few."""
    path = f"/deployments/{live.id}/schedules"
    new = []
    pairs = pair_schedules(desired.fields["schedules"], live.fields["schedules"])
    for _, old, schedule in pairs:
        if schedule is None:
            continue
        if old is None or is_schedule_deleted(old, schedule):
            active = old["active"] if old and schedule["active"] is None else schedule["active"]
            new.append(_schedule_body(schedule | {"active": active}))
        elif body := _schedule_changes(old, schedule):
            await server.ask("PATCH", f"{path}/{old['id']}", body, absent=True)
    if new:
        await server.ask("POST", path, new)
    for _, old, schedule in pairs:
        if old and is_schedule_deleted(old, schedule):
            await server.ask("DELETE", f"{path}/{old['id']}", absent=True)


def _schedule_changes(old: JSON, new: JSON) -> JSON:
    """Return the body that changes a schedule; empty if it does not change."""
    body: JSON = {}
    if not schedules.is_same(new["schedule"], old["schedule"]):
        body["schedule"] = _times(new)
    if new["active"] is not None and new["active"] != old["active"]:
        body["active"] = new["active"]
    if new["slug"] != old["slug"]:
        body["slug"] = new["slug"]
    if body or not is_same_value(old["parameters"] or {}, new["parameters"]):
        body["parameters"] = new["parameters"]  # the server empties parameters that a request leaves out
    return body


async def _apply_triggers(
    server: Server, desired: Object, deployment_id: str, live: Mapping[str, JSON], ids: Mapping[str, list[str]]
) -> None:
    """Create, change and delete a deployment's triggers, which are automations that the deployment owns.

    Args:
        server: the server.
        desired: the deployment.
        deployment_id: the deployment's id.
        live: the triggers on the server, by name.
        ids: the ids of their automations, by name. All after the first are copies.
    """
    triggers: dict[str, JSON] = desired.fields["triggers"]
    for name, trigger in triggers.items():
        body: dict[str, Any] = {"name": name} | replace_deployment(trigger, DEPLOYMENT_PLACEHOLDER, deployment_id)
        if name not in ids:
            body["enabled"] = body["enabled"] is not False
            await server.ask("POST", "/automations/", body | {"owner_resource": f"prefect.deployment.{deployment_id}"})
            continue
        old = live[name]
        if body["enabled"] is None:
            body["enabled"] = old["enabled"]
        if trigger_differences(trigger, old):
            await server.ask("PUT", f"/automations/{ids[name][0]}", body)
    for name, listed in ids.items():
        for automation_id in listed[1:] if name in triggers else listed:
            await server.ask("DELETE", f"/automations/{automation_id}", absent=True)
