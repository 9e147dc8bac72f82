"""Plan a sync: compare the files with the server and with the owner's record."""

import asyncio
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestration.deployments import limit_removal, live_state, masking, triggers
from orchestration.deployments import record as records
from orchestration.deployments.desired_state import DesiredState
from orchestration.deployments.record import Record
from orchestration.deployments.resources import (
    AUTOMATION,
    DEPLOYMENT,
    KINDS,
    POOL,
    QUEUE,
    Difference,
    Name,
    Object,
    differences,
    display_name,
)
from orchestration.errors import DeploymentsError
from orchestration.prefect_api import JSON, Server

CREATE, CHANGE, ADOPT, FINISH = "create", "change", "adopt", "finish"
END, DELETE, FORGET, KEEP = "end", "delete", "forget", "keep"
"""Actions. FINISH completes what a killed sync began. END pauses a deployment that a later sync deletes, after the end
of its runs. FORGET removes an object from the record that the server no longer has. KEEP replaces a DELETE when a run
has begun since the plan was made.
"""


@dataclass
class Change:
    """One change that a sync would make.

    Args:
        action: one of CREATE to KEEP.
        desired: the object in the files; None if the files do not have it.
        live: the object on the server; None if the server does not have it.
        fields: the fields that differ, with old and new value.
        since: when an earlier sync began this change and did not finish it, ISO 8601 in UTC; else empty.
        recorded: the name of an object that only the record has.
    """

    action: str
    desired: Object | None
    live: Object | None
    fields: list[Difference] = field(default_factory=list)
    since: str = ""
    recorded: Name = ("", "")

    @property
    def name(self) -> Name:
        """Return the name of the object that changes."""
        changed = self.desired or self.live
        return changed.name if changed else self.recorded

    @property
    def changed_fields(self) -> set[str]:
        """Return the names of the top-level fields that differ."""
        return {name.partition(".")[0] for name, _, _ in self.fields}

    def json(self) -> dict[str, Any]:
        """Return the change as JSON."""
        kind, key = self.name
        return {
            "action": self.action,
            "kind": kind,
            "key": key,
            "where": self.desired.where if self.desired else None,
            "fields": [{"field": name, "old": old, "new": new} for name, old, new in self.fields],
        }


@dataclass
class Plan:
    """The changes that a sync would make.

    Args:
        owner: the owner of the objects.
        changes: in the order in which a sync makes them.
        notes: what stays as it is, and why, a line each.
        record: the owner's record.
        live: all objects of the server.
        deferred: what a sync left to the next sync because a run had begun since the plan was made, a line each.
    """

    owner: str
    changes: list[Change]
    notes: list[str]
    record: Record
    live: dict[Name, Object]
    deferred: list[str] = field(default_factory=list)


async def make(server: Server, desired: DesiredState, *, prune: bool = False, adopt: bool = False) -> Plan:
    """Compare the files with the server.

    Args:
        server: the server.
        desired: the objects of the files.
        prune: delete objects of the owner that the files no longer have.
        adopt: take over objects without an owner.

    Raises:
        DeploymentsError: an object belongs to another owner, refers to an object that does not exist, or cannot become
            what the files say.
    """
    live, by_owner = await asyncio.gather(live_state.read_all(server), records.read_all(server))
    record = by_owner.get(desired.owner) or Record(desired.owner)
    _refuse_impossible(desired, live)
    plan = Plan(desired.owner, [], list(desired.notes), record, live)
    other_owners = records.owners(record for record in by_owner.values() if record.owner != desired.owner)
    for item in desired.objects.values():
        _compare(plan, item, live.get(item.name), other_owners, adopt)
    await _plan_removals(server, plan, desired, prune)
    rank = {kind: number for number, kind in enumerate(KINDS)}

    def order(change: Change) -> tuple[bool, int, int]:
        is_removal = change.action in (END, DELETE, FORGET)
        kind = rank[change.name[0]]
        priority = (change.desired.fields.get("priority") or 0) if change.desired else 0
        return is_removal, -kind if is_removal else kind, priority

    plan.changes.sort(key=order)
    _refuse_job_variables(plan, desired)
    return plan


def _refuse_job_variables(plan: Plan, desired: DesiredState) -> None:
    """Refuse job variables that the server would refuse, before the sync changes anything."""
    from prefect.utilities.schema_tools import CircularSchemaRefError, ValidationError, validate

    pools = {item.key: item for item in plan.live.values() if item.kind == POOL}
    pools |= {item.key: item for item in desired.of_kind(POOL) if item.fields["base_job_template"] is not None}
    for change in plan.changes:
        deployment = change.desired
        if not deployment or deployment.kind != DEPLOYMENT:
            continue
        pool = pools.get(deployment.fields["work_pool_name"])
        schema = pool and (pool.fields["base_job_template"] or {}).get("variables")
        if not schema:
            continue
        for key, job_variables in _job_variables(change, deployment):
            if not job_variables:
                continue
            try:
                # As the server does, but without the defaults of the pool, which are not the deployment's.
                validate(job_variables, schema, raise_on_error=True, ignore_required=True, allow_none_with_default=True)
            except ValidationError as error:
                reason = str(error).removeprefix("Validation failed for field ").replace(" Failure reason: ", " ")
                raise DeploymentsError(
                    f"{deployment.where}: {display_name(deployment.name)}: the work pool "
                    f"{deployment.fields['work_pool_name']} takes no such job variable {reason}. Correct it under "
                    f"{key}, or the pool's base job template"
                ) from None
            except CircularSchemaRefError:
                continue  # the server reports it


def _job_variables(change: Change, deployment: Object) -> Iterator[tuple[str, JSON]]:
    """Yield the job variables that a sync sends for a deployment and its triggers, each with its key in the file."""
    if change.live is None or change.changed_fields & {"work_pool_name", "work_queue_name", "job_variables"}:
        yield "work_pool.job_variables", deployment.fields["job_variables"]
    if change.live is None or "triggers" in change.changed_fields:
        for name, trigger in deployment.fields["triggers"].items():
            for action in trigger["actions"]:
                yield f"job_variables of the trigger {name}", action.get("job_variables") or {}


def _refuse_impossible(desired: DesiredState, live: dict[Name, Object]) -> None:
    """Refuse another type of an existing work pool, and pools and queues that do not exist."""
    pools = {key: item for (kind, key), item in live.items() if kind == POOL}
    pools |= {item.key: item for item in desired.of_kind(POOL)}
    queues = {key for kind, key in [*live, *desired.objects] if kind == QUEUE}
    for pool in desired.of_kind(POOL):
        existing = live.get(pool.name)
        if existing and existing.fields["type"] != pool.fields["type"]:
            raise DeploymentsError(
                f"{pool.where}: work pool {pool.key} exists and is of type {existing.fields['type']}, not "
                f"{pool.fields['type']}. Choose another name, or delete it with its schedules: "
                f"prefect work-pool delete {pool.key}"
            )
    for deployment in desired.of_kind(DEPLOYMENT):
        pool_name, queue_name = deployment.fields["work_pool_name"], deployment.fields["work_queue_name"]
        if pool_name not in pools:
            raise DeploymentsError(
                f"{deployment.where}: {display_name(deployment.name)} uses the work pool {pool_name}, which does not "
                f"exist. {_suggestion(pool_name, pools)}Create it: prefect work-pool create {pool_name}, or add it "
                "under work_pools"
            )
        if queue_name != "default" and f"{pool_name}/{queue_name}" not in queues:
            known = [key.partition("/")[2] for key in queues if key.startswith(f"{pool_name}/")]
            raise DeploymentsError(
                f"{deployment.where}: {display_name(deployment.name)} uses the queue {queue_name} of the work pool "
                f"{pool_name}, which does not exist. {_suggestion(queue_name, known)}Add it to the pool's queues"
            )


def _suggestion(name: str, known: Iterable[str]) -> str:
    """Return the question whether the nearest known name is meant, if there is one."""
    nearest = difflib.get_close_matches(name, list(known), 1)
    return f"Did you mean {nearest[0]}? " if nearest else ""


def _compare(plan: Plan, desired: Object, live: Object | None, other_owners: dict[Name, str], adopt: bool) -> None:
    """Add the change that brings an object to its desired state."""
    name, record = desired.name, plan.record
    since = record.begun.get(name, "")
    if live is None:
        plan.changes.append(Change(CREATE, desired, None, since=since))
        return
    if other := other_owners.get(name):
        raise DeploymentsError(
            f"{desired.where}: {display_name(name)} belongs to {other}. Rename yours, or take it over on purpose: "
            f"orchestrate adopt '{name[0]}:{name[1]}' --owner '{plan.owner}' --from '{other}'"
        )
    if live.kind == DEPLOYMENT:
        live, notes = triggers.claim(live, desired.fields["triggers"], record.triggers(name))
        plan.notes += notes
    if limit_removal.must_wait(desired, live, live.raw):
        plan.notes.append(limit_removal.note(desired, live.raw))
        desired = limit_removal.keep_limit(desired, live)
    is_recorded = name in record.applied
    is_owned = is_recorded or _is_default_queue_of_owned_pool(plan, desired)
    if not is_owned and not adopt:
        raise DeploymentsError(
            f"{desired.where}: {display_name(name)} exists and does not belong to {plan.owner}. Rename yours, or take "
            f"over what has no owner: --adopt, or orchestrate adopt '{name[0]}:{name[1]}' --owner '{plan.owner}'"
        )
    if desired.kind == DEPLOYMENT and desired.key in record.ending and desired.fields["paused"] is None:
        # An earlier sync paused it to delete it. Now the files have it again.
        desired = Object(
            desired.kind, desired.key, desired.fields | {"paused": False}, desired.where, masked=desired.masked
        )
    fields = differences(desired, live.fields)
    copies = len(live.raw.get("copy_ids", ())) + sum(len(ids) - 1 for ids in live.raw.get("trigger_ids", {}).values())
    if is_owned and copies:
        fields.append(("copies", copies + 1, 1))
    if fields or not is_owned:
        # An earlier sync has set a value that the environment no longer has.
        fields = masking.mask(fields, desired.masked | {*record.masked.get(name, ())})
        plan.changes.append(Change(CHANGE if is_owned else ADOPT, desired, live, fields, since))
    elif since or (is_recorded and record.applied[name] is None):
        plan.changes.append(Change(FINISH, desired, live, since=since))
    plan.notes += _operator_notes(desired, live)


def _is_default_queue_of_owned_pool(plan: Plan, desired: Object) -> bool:
    """Return whether an object is the queue `default`, which the server creates with each pool, of an owned pool."""
    pool, _, queue = desired.key.partition("/")
    return desired.kind == QUEUE and queue == "default" and (POOL, pool) in plan.record.applied


def _operator_notes(desired: Object, live: Object) -> list[str]:
    """Return a note for each pause that an operator set and a sync keeps."""
    notes = []
    name = display_name(desired.name)
    if desired.kind == DEPLOYMENT:
        if desired.fields["paused"] is None and live.fields["paused"]:
            notes.append(f"{name} is paused on the server and stays so; `paused: false` would resume it")
        for title, schedule in desired.fields["schedules"].items():
            existing = live.fields["schedules"].get(title)
            if schedule["active"] is None and existing and not existing["active"]:
                notes.append(
                    f"{name}: schedule {title} is paused on the server and stays so; `active: true` would resume it"
                )
    if desired.kind == AUTOMATION and desired.fields["enabled"] is None and not live.fields["enabled"]:
        notes.append(f"{name} is disabled on the server and stays so; `enabled: true` would enable it")
    return notes


async def _plan_removals(server: Server, plan: Plan, desired: DesiredState, prune: bool) -> None:
    """Add the removal of the owner's objects that the files no longer have."""
    removed = [name for name in {*plan.record.applied, *plan.record.begun} if name not in desired.objects]
    existing = {name: plan.live[name] for name in removed if name in plan.live}
    for removal, item in existing.items():
        if item.kind == DEPLOYMENT:
            existing[removal], notes = triggers.claim(item, plan.record.triggers(removal))
            plan.notes += notes if prune else ()
    if removed and not prune:
        names = ", ".join(display_name(name) for name in sorted(existing)[:3]) + (", ..." if len(existing) > 3 else "")
        if existing:
            plan.notes.append(
                f"{len(existing)} no longer in the files stay on the server: {names}. --prune deletes them"
            )
        return
    plan.changes += [Change(FORGET, None, None, recorded=name) for name in removed if name not in existing]
    removed_deployments = [item for item in existing.values() if item.kind == DEPLOYMENT]
    busy = await live_state.count_unfinished_runs(server, removed_deployments)
    staying = [
        item
        for item in plan.live.values()
        if item.kind == DEPLOYMENT and (item.name not in existing or item.id in busy)
    ]
    used_pools = {item.fields["work_pool_name"] for item in staying}
    used_queues = {f"{item.fields['work_pool_name']}/{item.fields['work_queue_name']}" for item in staying}
    with_runs = await live_state.find_pools_and_queues_in_use(
        server,
        [item for item in existing.values() if item.kind in (POOL, QUEUE)],
        without=[item.id for item in removed_deployments if item.id not in busy],
    )
    for item in existing.values():
        name = display_name(item.name)
        if item.id in busy:
            runs = f"{busy[item.id]} unfinished run{'s' if busy[item.id] > 1 else ''}"
            plan.notes.append(f"{name} has {runs}: it is paused, and the first sync after their end deletes it")
            if item.key not in plan.record.ending or not item.fields["paused"]:
                plan.changes.append(Change(END, None, item, [("paused", item.fields["paused"], True)]))
        elif item.kind == POOL and item.key in used_pools:
            plan.notes.append(f"{name} stays while deployments use it")
        elif item.id in with_runs:
            plan.notes.append(f"{name} stays while runs are in it")
        elif item.kind == QUEUE and item.key.endswith("/default"):
            plan.changes.append(Change(FORGET, None, item))  # the server deletes it with its pool
        elif item.kind == QUEUE and item.key in used_queues:
            plan.notes.append(f"{name} stays while deployments use it")
        else:
            plan.changes.append(Change(DELETE, None, item))
