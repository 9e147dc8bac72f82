"""What a sync would do: the files beside the server and beside what the owner has there."""

import asyncio
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from orchestration.deployments import live_state as api
from orchestration.deployments import record as records_of
from orchestration.deployments.desired import Desired
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
    spoken,
)
from orchestration.errors import DeploymentsError
from orchestration.prefect_api import JSON, Server

CREATE, CHANGE, ADOPT, FINISH = "create", "change", "adopt", "finish"
END, DELETE, FORGET, KEEP = "end", "delete", "forget", "keep"
"""Finish: what a sync that was cut off had begun. End: pause a deployment that goes when its runs have ended.
Forget: what is gone already. Keep: what was to be deleted, and a run has come into it meanwhile."""


@dataclass
class Change:
    """One thing that a sync would do.

    Args:
        action: CREATE to FORGET.
        wanted: as the files want it; None if it goes.
        found: as the server has it; None if it is not there.
        fields: field, old value and new value.
        since: when an earlier sync began with it and did not end.
        gone: the name of what is neither wanted nor there.
    """

    action: str
    wanted: Object | None
    found: Object | None
    fields: list[Difference] = field(default_factory=list)
    since: str = ""
    gone: Name = ("", "")

    @property
    def name(self) -> Name:
        """Of what it is about."""
        thing = self.wanted or self.found
        return thing.name if thing else self.gone

    @property
    def differs(self) -> set[str]:
        """The names of the fields that do, without what is inside of them."""
        return {name.partition(".")[0] for name, _, _ in self.fields}

    def json(self) -> dict[str, Any]:
        """For programs."""
        kind, key = self.name
        return {
            "action": self.action,
            "kind": kind,
            "key": key,
            "where": self.wanted.where if self.wanted else None,
            "fields": [{"field": name, "old": old, "new": new} for name, old, new in self.fields],
        }


@dataclass
class Plan:
    """What a sync would do.

    Args:
        owner: whose things these are.
        changes: in the order in which they are to be made.
        notes: what stays as it is, and why, a line each.
        deferred: what a sync left for the next one, for a run had begun meanwhile, a line each.
        record: what the owner has now.
        found: all that the server has.
    """

    owner: str
    changes: list[Change]
    notes: list[str]
    record: Record
    found: dict[Name, Object]
    deferred: list[str] = field(default_factory=list)


async def make(server: Server, desired: Desired, *, prune: bool = False, adopt: bool = False) -> Plan:
    """Compare the files with the server.

    Args:
        server: where.
        desired: what the files want.
        prune: delete what the owner has on the server and the files no longer have.
        adopt: take over what nobody owns.

    Raises:
        DeploymentsError: something of it cannot be: it is another's, or refers to what is not there.
    """
    found, records = await asyncio.gather(api.everything(server), records_of.all_of(server))
    record = records.get(desired.owner) or Record(desired.owner)
    _refuse_impossible(desired, found)
    plan = Plan(desired.owner, [], list(desired.notes), record, found)
    others = records_of.owners(each for each in records.values() if each.owner != desired.owner)
    for wanted in desired.objects.values():
        _compare(plan, wanted, found.get(wanted.name), others, adopt)
    await _removals(server, plan, desired, prune)
    rank = {kind: number for number, kind in enumerate(KINDS)}

    def order(change: Change) -> tuple[bool, int, int]:
        goes = change.action in (END, DELETE, FORGET)
        kind = rank[change.name[0]]
        priority = (change.wanted.fields.get("priority") or 0) if change.wanted else 0
        return goes, -kind if goes else kind, priority

    plan.changes.sort(key=order)
    _refuse_job_variables(plan, desired)
    return plan


def _refuse_job_variables(plan: Plan, desired: Desired) -> None:
    """Refuse what the server would refuse of a deployment that changes, before anything does."""
    from prefect.utilities.schema_tools import CircularSchemaRefError, ValidationError, validate

    pools = {each.key: each for each in plan.found.values() if each.kind == POOL}
    pools |= {each.key: each for each in desired.of(POOL) if each.fields["base_job_template"] is not None}
    for each in plan.changes:
        wanted = each.wanted
        if not wanted or wanted.kind != DEPLOYMENT:
            continue
        pool = pools.get(wanted.fields["work_pool_name"])
        variables = pool and (pool.fields["base_job_template"] or {}).get("variables")
        if not variables:
            continue
        for key, given in _job_variables(each, wanted):
            if not given:
                continue
            try:
                # As the server does, but for the defaults of the pool, which are not the deployment's.
                validate(given, variables, raise_on_error=True, ignore_required=True, allow_none_with_default=True)
            except ValidationError as error:
                said = str(error).removeprefix("Validation failed for field ").replace(" Failure reason: ", " ")
                raise DeploymentsError(
                    f"{wanted.where}: {spoken(wanted.name)}: the work pool {wanted.fields['work_pool_name']} takes no "
                    f"such job variable {said}. Correct it under {key}, or the pool's base job template"
                ) from None
            except CircularSchemaRefError:
                continue  # the server says so


def _job_variables(change: Change, wanted: Object) -> Iterator[tuple[str, JSON]]:
    """Yield the job variables that a sync sends for a deployment and its triggers, each with its key in the file."""
    if change.found is None or change.differs & {"work_pool_name", "work_queue_name", "job_variables"}:
        yield "work_pool.job_variables", wanted.fields["job_variables"]
    if change.found is None or "triggers" in change.differs:
        for name, trigger in wanted.fields["triggers"].items():
            for action in trigger["actions"]:
                yield f"job_variables of the trigger {name}", action.get("job_variables") or {}


def _refuse_impossible(desired: Desired, found: dict[Name, Object]) -> None:
    pools = {key: each for (kind, key), each in found.items() if kind == POOL}
    pools |= {each.key: each for each in desired.of(POOL)}
    queues = {key for kind, key in [*found, *desired.objects] if kind == QUEUE}
    for each in desired.of(POOL):
        there = found.get(each.name)
        if there and there.fields["type"] != each.fields["type"]:
            raise DeploymentsError(
                f"{each.where}: work pool {each.key} exists and is of type {there.fields['type']}, not "
                f"{each.fields['type']}. Choose another name, or delete it with its schedules: "
                f"prefect work-pool delete {each.key}"
            )
    for each in desired.of(DEPLOYMENT):
        pool, queue = each.fields["work_pool_name"], each.fields["work_queue_name"]
        if pool not in pools:
            raise DeploymentsError(
                f"{each.where}: {spoken(each.name)} wants the work pool {pool}, which does not exist. "
                f"{_near(pool, pools)}Make it: prefect work-pool create {pool}, or add it under work_pools"
            )
        if queue != "default" and f"{pool}/{queue}" not in queues:
            known = [key.partition("/")[2] for key in queues if key.startswith(f"{pool}/")]
            raise DeploymentsError(
                f"{each.where}: {spoken(each.name)} wants the queue {queue} of the work pool {pool}, which does not "
                f"exist. {_near(queue, known)}Add it to the pool's queues"
            )


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"Did you mean {near[0]}? " if near else ""


def _compare(plan: Plan, wanted: Object, found: Object | None, others: dict[Name, str], adopt: bool) -> None:
    name, record = wanted.name, plan.record
    since = record.begun.get(name, "")
    if found is None:
        plan.changes.append(Change(CREATE, wanted, None, since=since))
        return
    if other := others.get(name):
        raise DeploymentsError(
            f"{wanted.where}: {spoken(name)} belongs to {other}. Rename yours, or take it over on purpose: "
            f"orchestrate adopt '{name[0]}:{name[1]}' --owner '{plan.owner}' --from '{other}'"
        )
    wanted = _without_deferred(plan, wanted, found)
    recorded = name in record.applied
    ours = recorded or _comes_with_our_pool(plan, wanted)
    if not ours and not adopt:
        raise DeploymentsError(
            f"{wanted.where}: {spoken(name)} exists and is not of {plan.owner}. Rename yours, or take over what nobody "
            f"owns: --adopt, or orchestrate adopt '{name[0]}:{name[1]}' --owner '{plan.owner}'"
        )
    if wanted.kind == DEPLOYMENT and wanted.key in record.ending and wanted.fields["paused"] is None:
        wanted = Object(wanted.kind, wanted.key, wanted.fields | {"paused": False}, wanted.where)
    fields = differences(wanted, found.fields)
    copies = len(found.raw.get("copy_ids", ())) + sum(len(ids) - 1 for ids in found.raw.get("trigger_ids", {}).values())
    if ours and copies:
        fields.append(("copies", copies + 1, 1))
    if fields or not ours:
        plan.changes.append(Change(CHANGE if ours else ADOPT, wanted, found, fields, since))
    elif since or (recorded and record.applied[name] is None):
        plan.changes.append(Change(FINISH, wanted, found, since=since))
    plan.notes += _kept_for_operators(wanted, found)


def _without_deferred(plan: Plan, wanted: Object, found: Object) -> Object:
    """The same without what the server cannot take now: with its deployment's limit gone, it fails when a run that
    holds a slot ends.
    """
    if wanted.kind != DEPLOYMENT or not removes_limit(wanted, found) or not held_slots(found.raw):
        return wanted
    plan.notes.append(limit_stays(wanted, held_slots(found.raw)))
    return with_limit_of(wanted, found)


def removes_limit(wanted: Object, found: Object) -> bool:
    """Whether a deployment's own concurrency limit would go."""
    return wanted.fields["concurrency_limit"] is None and found.fields["concurrency_limit"] is not None


def held_slots(deployment: JSON) -> int:
    """How many runs hold a slot of a deployment's concurrency limit."""
    return int((deployment.get("global_concurrency_limit") or {}).get("active_slots") or 0)


def limit_stays(wanted: Object, held: int) -> str:
    """Say that a limit is not removed yet."""
    runs = f"{held} run{'s hold' if held > 1 else ' holds'}"
    return (
        f"{spoken(wanted.name)}: its concurrency_limit stays while {runs} a slot; the next sync after that removes it"
    )


def with_limit_of(wanted: Object, found: Object) -> Object:
    """A deployment with the limit that it has."""
    kept = {key: found.fields[key] for key in ("concurrency_limit", "concurrency_options")}
    return Object(wanted.kind, wanted.key, wanted.fields | kept, wanted.where)


def _comes_with_our_pool(plan: Plan, wanted: Object) -> bool:
    """The server makes a queue `default` with each pool."""
    pool, _, queue = wanted.key.partition("/")
    return wanted.kind == QUEUE and queue == "default" and (POOL, pool) in plan.record.applied


def _kept_for_operators(wanted: Object, found: Object) -> list[str]:
    notes = []
    if wanted.kind == DEPLOYMENT:
        if wanted.fields["paused"] is None and found.fields["paused"]:
            notes.append(f"{spoken(wanted.name)} is paused on the server and stays so; `paused: false` would resume it")
        for title, each in wanted.fields["schedules"].items():
            there = found.fields["schedules"].get(title)
            if each["active"] is None and there and not there["active"]:
                notes.append(
                    f"{spoken(wanted.name)}: schedule {title} is paused on the server and stays so; "
                    "`active: true` would resume it"
                )
    if wanted.kind == AUTOMATION and wanted.fields["enabled"] is None and not found.fields["enabled"]:
        notes.append(f"{spoken(wanted.name)} is disabled on the server and stays so; `enabled: true` would enable it")
    return notes


async def _removals(server: Server, plan: Plan, desired: Desired, prune: bool) -> None:
    """What the owner has on the server and the files no longer have."""
    gone = [name for name in {*plan.record.applied, *plan.record.begun} if name not in desired.objects]
    there = {name: plan.found[name] for name in gone if name in plan.found}
    if gone and not prune:
        what = ", ".join(spoken(name) for name in sorted(there)[:3]) + (", ..." if len(there) > 3 else "")
        if there:
            plan.notes.append(f"{len(there)} no longer in the files stay on the server: {what}; --prune deletes them")
        return
    plan.changes += [Change(FORGET, None, None, gone=name) for name in gone if name not in there]
    leaving = [each for each in there.values() if each.kind == DEPLOYMENT]
    busy = await api.unfinished(server, leaving)
    staying = {
        each.fields["work_pool_name"]
        for each in plan.found.values()
        if each.kind == DEPLOYMENT and (each.name not in there or each.id in busy)
    }
    queues = {
        f"{each.fields['work_pool_name']}/{each.fields['work_queue_name']}"
        for each in plan.found.values()
        if each.kind == DEPLOYMENT and (each.name not in there or each.id in busy)
    }
    deleted = [each.id for each in leaving if each.id not in busy]
    waiting = await api.places_of_runs(
        server, [each for each in there.values() if each.kind in (POOL, QUEUE)], without=deleted
    )
    for each in there.values():
        if each.id in busy:
            runs = f"{busy[each.id]} unfinished run{'s' if busy[each.id] > 1 else ''}"
            plan.notes.append(f"{spoken(each.name)} has {runs}: paused, it goes with the first sync after their end")
            if each.key not in plan.record.ending or not each.fields["paused"]:
                plan.changes.append(Change(END, None, each, [("paused", each.fields["paused"], True)]))
        elif each.kind == POOL and each.key in staying:
            plan.notes.append(f"{spoken(each.name)} stays while deployments use it")
        elif each.id in waiting:
            plan.notes.append(f"{spoken(each.name)} stays while runs are in it")
        elif each.kind == QUEUE and each.key.endswith("/default"):
            plan.changes.append(Change(FORGET, None, each))  # it goes with its pool
        elif each.kind == QUEUE and each.key in queues:
            plan.notes.append(f"{spoken(each.name)} stays while deployments use it")
        else:
            plan.changes.append(Change(DELETE, None, each))
