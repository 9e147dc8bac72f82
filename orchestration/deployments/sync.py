"""Brings a server to what the files want: only what differs, so that no run is lost, whenever it is cut off.

Before a sync touches a thing it writes that into the owner's record, and afterwards that it is done. What a sync that
was killed had begun is thus known to be the owner's, and the runs of a deployment that it was changing are scheduled
anew from then on: a change of a deployment makes the server delete the runs to come, until somebody schedules them.
"""

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any
from urllib.parse import quote

from orchestration.deployments import live_state as api
from orchestration.deployments import plan as planning
from orchestration.deployments import record as records_of
from orchestration.deployments import schedules
from orchestration.deployments.desired import Desired
from orchestration.deployments.plan import CREATE, DELETE, END, FINISH, FORGET, KEEP, Change, Plan
from orchestration.deployments.record import Record
from orchestration.deployments.resources import (
    AUTOMATION,
    DEPLOYMENT,
    FILE_SYSTEM,
    LEFT_TO_OTHERS,
    LIMIT,
    NOBODY,
    POOL,
    QUEUE,
    TAG_LIMIT,
    VARIABLE,
    Name,
    Object,
    paired,
    spoken,
    with_deployment,
)
from orchestration.errors import DeploymentsError, PipelineError
from orchestration.prefect_api import JSON, RefusedError, Server

ROUNDS = 10
"""How often a sync looks again when another one was at work at the same time."""

REACH = timedelta(hours=1)
"""How far back runs are scheduled anew after a sync that was cut off: further back, they had their time."""

PASS = 1.0
"""Seconds that the server's own scheduler takes from reading a deployment to inserting its runs, at most, mostly."""

SOON = timedelta(minutes=5)
"""How far ahead runs of a new deployment are not left to the server's own scheduler, which comes by each minute."""

TIMES = {"schedules", "paused"}
"""Fields of a deployment that say when it runs, and whether."""


async def sync(
    server: Server,
    desired: Desired,
    *,
    prune: bool = False,
    adopt: bool = False,
    report: Callable[[Plan], None] = lambda _: None,
) -> Plan:
    """Apply the files to the server.

    Args:
        server: where.
        desired: what the files want.
        prune: delete what the owner has on the server and the files no longer have.
        adopt: take over what nobody owns.
        report: is given the plan before it is carried out; more than once if another sync is at work.

    Returns:
        The plan that was carried out first.

    Raises:
        DeploymentsError: the server refuses a part; the rest is done, and the next sync goes on.
    """
    first: Plan | None = None
    took = 0.0
    for number in range(ROUNDS):
        # Two that want different things would stay in step, and each find the other at work each time.
        await asyncio.sleep(random.uniform(0, number * max(1, took)))  # noqa: S311 - no secret
        began = time.monotonic()
        plan = await planning.make(server, desired, prune=prune, adopt=adopt)
        if first is None or plan.changes:
            report(plan)
        first = first or plan
        if not plan.changes:
            return first
        together, refused = await _apply(server, plan)
        took = time.monotonic() - began
        # What another sync was faster with is refused; to look again tells whether anything is left to do.
        if together:
            continue
        if refused:
            raise DeploymentsError(refused)
        return first
    raise DeploymentsError(
        refused
        or f"Something else changes what {desired.owner} has, again and again. See what it is, and run this again"
    )


async def _apply(server: Server, plan: Plan) -> tuple[bool, str]:
    """Carry it out; whether another sync was at work or it is not known what a request did, and what was refused."""
    now = datetime.now(UTC).isoformat()
    late = await _late(server, plan.changes, now)

    def begin(record: Record) -> None:
        for name, times in late.items():
            record.late[name] = sorted({*record.late.get(name, ()), *times})
        for each in plan.changes:
            if each.action == END or (each.action == DELETE and _is_to_pause(each)):
                record.ending.add(each.name[1])
            if each.action == END:
                continue
            if each.action != FORGET:
                record.applied.setdefault(each.name, None)
                record.begun.setdefault(each.name, now)

    doubtful, conflict = server.doubtful, False
    began = await records_of.write(server, plan.owner, begin)
    done: list[Change] = []
    failures: list[str] = []
    flows: dict[str, str] = {}
    touched: dict[str, Change] = {}
    progress = _Progress(len(plan.changes))
    try:
        # What is refused ends it before what stands on it; others of its kind are done.
        for _, changes in groupby(plan.changes, lambda each: (each.name[0], each.wanted is None)):
            if failures:
                break
            for change in changes:
                try:
                    await _carry_out(server, plan, change, flows, touched, now, began.late.get(change.name, ()))
                except RefusedError as error:
                    where = change.wanted.where + ": " if change.wanted else ""
                    failures.append(f"{where}{spoken(change.name)}: {error}")
                    conflict |= error.status == 409
                else:
                    done.append(change)
                    progress.one()
        await _schedule_again(server, touched, now)
    finally:
        progress.end()
        # Also when the server went away or somebody interrupts: what is known to be done need not be done again.
        with contextlib.suppress(PipelineError) if sys.exc_info()[0] else contextlib.nullcontext():
            before = await _report(server, plan.owner, done)
    together = conflict or before != began.serial or server.doubtful > doubtful
    more = f"\n{len(failures) - 1} more were refused" if len(failures) > 1 else ""
    return together, f"{failures[0]}{more}" if failures else ""


async def _report(server: Server, owner: str, done: Sequence[Change]) -> str:
    """Write what is done; the record's serial before."""
    before = ""

    def finish(record: Record) -> None:
        nonlocal before
        before = before or record.serial
        for each in done:
            if each.action == END:
                record.begun.pop(each.name, None)
                continue
            record.begun.pop(each.name, None)
            record.late.pop(each.name, None)
            record.ending.discard(each.name[1] if each.name[0] == DEPLOYMENT else "")
            if each.action == KEEP:
                continue
            if each.wanted is None:
                record.applied.pop(each.name, None)
            else:
                # The schema is the code's: nobody changes it elsewhere.
                fields = {key: value for key, value in each.wanted.fields.items() if key != "parameter_openapi_schema"}
                record.applied[each.name] = fields

    await records_of.write(server, owner, finish)
    return before


class _Progress:
    """How much is done, on a terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.shown = total > 20 and sys.stderr.isatty()

    def one(self) -> None:
        self.done += 1
        if self.shown:
            # Not through `orchestration.terminal`, which takes carriage returns for those of a hostile name.
            print(f"\r{self.done} of {self.total}", end="", file=sys.__stderr__, flush=True)

    def end(self) -> None:
        if self.shown:
            print("\r" + " " * 20 + "\r", end="", file=sys.__stderr__, flush=True)


async def _late(server: Server, changes: Sequence[Change], now: str) -> dict[Name, list[str]]:
    """When runs fell due that nobody has begun, of deployments that lose a schedule: with one, the server deletes those
    of all of them.
    """
    late: dict[Name, list[str]] = {}
    for each in changes:
        if each.name[0] != DEPLOYMENT or not each.wanted or not each.found:
            continue
        pairs = paired(each.wanted.fields["schedules"], each.found.fields["schedules"])
        if not any(found and _goes(found, wanted) for _, found, wanted in pairs):
            continue
        staying = {found["id"] for _, found, wanted in pairs if found and wanted is not None}
        since = datetime.fromisoformat(now) - REACH
        runs = await server.all(
            "/flow_runs/filter",
            deployments={"id": {"any_": [each.found.id]}},
            flow_runs={
                "state": {"type": {"any_": ["SCHEDULED"]}},
                "expected_start_time": {"after_": since.isoformat(), "before_": now},
            },
            sort="ID_DESC",
        )
        of_staying = [run for run in runs if (run.get("created_by") or {}).get("id") in staying]
        late[each.name] = sorted({run["expected_start_time"] for run in of_staying})
    return late


async def _schedule_again(server: Server, touched: dict[str, Change], now: str) -> None:
    """Delete and make the runs to come once more: the server's own scheduler, if it read a deployment before a change
    and inserts after it, puts runs of the old state back.

    A run of the same schedule and time it does not insert beside the new one: of a deployment whose times are the same
    what it put there came before the new ones, and there is nothing to wait for.
    """
    if any(each.action == END or each.since or TIMES & each.differs for each in touched.values()):
        await asyncio.sleep(PASS)
    for id_, change in touched.items():
        assert change.found
        if change.action == END:
            await _pause(server, change.found)
            continue
        assert change.wanted
        # Any change deletes the runs to come.
        await server.ask("PATCH", f"/deployments/{id_}", {"description": change.wanted.fields["description"]})
        if change.wanted.fields["schedules"] and not _paused(change.wanted, change.found):
            await _schedule_runs(server, id_, datetime.fromisoformat(change.since or now))


async def _pause(server: Server, found: Object) -> None:
    """Pause a deployment; the server deletes its runs to come."""
    await server.ask("PATCH", f"/deployments/{found.id}", {"paused": True}, absent=True)


def _paused(wanted: Object, found: Object) -> bool:
    return bool(found.fields["paused"] if wanted.fields["paused"] is None else wanted.fields["paused"])


async def _carry_out(
    server: Server,
    plan: Plan,
    change: Change,
    flows: dict[str, str],
    touched: dict[str, Change],
    now: str,
    late: Sequence[str],
) -> None:
    kind = change.name[0]
    if change.action == FORGET:
        return
    if change.action == DELETE:
        assert change.found
        if reason := await _stays(server, plan, change):
            plan.deferred.append(f"{spoken(change.name)} {reason}")
            change.action = END if kind == DEPLOYMENT else KEEP
            if kind == DEPLOYMENT:
                touched[change.found.id] = change
            return
        # To the server a deployment's triggers are automations that stay when it goes.
        for each in (id_ for ids in change.found.raw.get("trigger_ids", {}).values() for id_ in ids):
            await server.ask("DELETE", f"/automations/{each}", absent=True)
        await server.ask("DELETE", _path(change.found), absent=True)
        return
    if change.action == END:
        assert change.found
        await _pause(server, change.found)
        touched[change.found.id] = change
        return
    assert change.wanted
    if kind == DEPLOYMENT:
        await _keep_limit(server, plan, change)
        await _deployment(server, change, flows, touched, now, late)
    elif change.action == CREATE:
        await _create(server, change.wanted)
    elif change.action != FINISH:
        await _change(server, change)


def _is_to_pause(change: Change) -> bool:
    """Whether a sync pauses what it deletes, and not an operator did."""
    return bool(change.name[0] == DEPLOYMENT and change.found and not change.found.fields["paused"])


async def _stays(server: Server, plan: Plan, change: Change) -> str:
    """Why something does not go after all: a run has begun since the plan was made."""
    found = change.found
    assert found
    if found.kind == DEPLOYMENT:
        # The server schedules no run of a paused one; whether one had begun is seen after that.
        await _pause(server, found)
        if busy := await api.unfinished(server, [found]):
            runs = f"{busy[found.id]} run{'s have' if busy[found.id] > 1 else ' has'}"
            return f"stays, paused: {runs} begun meanwhile. It goes with the first sync after their end"
    if found.kind in (POOL, QUEUE):
        ended = [each.found for each in plan.changes if each.action == END and each.found]
        places = {each.fields["work_pool_name"] for each in ended}
        places |= {f"{each.fields['work_pool_name']}/{each.fields['work_queue_name']}" for each in ended}
        if found.key in places or await api.places_of_runs(server, [found]):
            return "stays: a run has come into it meanwhile. It goes with the first sync after that run's end"
    return ""


async def _keep_limit(server: Server, plan: Plan, change: Change) -> None:
    """Leave a deployment's concurrency limit as it is if a run has taken a slot since the plan was made."""
    wanted, found = change.wanted, change.found
    if (
        not wanted
        or not found
        or "concurrency_limit" not in change.differs
        or not planning.removes_limit(wanted, found)
    ):
        return
    now = await server.ask("GET", f"/deployments/{found.id}", absent=True)
    if now and (held := planning.held_slots(now)):
        plan.deferred.append(planning.limit_stays(wanted, held))
        change.wanted = planning.with_limit_of(wanted, found)
        change.fields = [each for each in change.fields if not each[0].startswith("concurrency_")]


def _path(found: Object) -> str:
    """The resource of something that is there."""
    key = "/".join(quote(part, safe="") for part in found.key.split("/"))
    return {
        VARIABLE: f"/variables/{found.id}",
        FILE_SYSTEM: f"/block_documents/{found.id}",
        LIMIT: f"/v2/concurrency_limits/{found.id}",
        TAG_LIMIT: f"/concurrency_limits/tag/{key}",
        POOL: f"/work_pools/{key}",
        QUEUE: f"/work_queues/{found.id}",
        DEPLOYMENT: f"/deployments/{found.id}",
        AUTOMATION: f"/automations/{found.id}",
    }[found.kind]


def _set(fields: JSON) -> JSON:
    """Without what is left to others."""
    said = {key: value for key, value in fields.items() if value is not None or key not in LEFT_TO_OTHERS}
    # A queue cannot be without a description.
    return said | {"description": said["description"] or ""} if "description" in said else said


async def _create(server: Server, wanted: Object) -> None:
    fields = _set(wanted.fields)
    if wanted.kind == TAG_LIMIT:
        # It is one or becomes one: the server's own way to set it.
        await server.ask("POST", "/concurrency_limits/", {"tag": wanted.key, **fields})
        return
    if wanted.kind == FILE_SYSTEM:
        await _create_file_system(server, wanted)
        return
    pool, _, queue = wanted.key.partition("/")
    path, name = {
        VARIABLE: ("/variables/", wanted.key),
        LIMIT: ("/v2/concurrency_limits/", wanted.key),
        POOL: ("/work_pools/", wanted.key),
        QUEUE: (f"/work_pools/{quote(pool, safe='')}/queues", queue),
        AUTOMATION: ("/automations/", wanted.key),
    }[wanted.kind]
    try:
        await server.ask("POST", path, {"name": name, **fields})
    except RefusedError as error:
        # Another sync was faster; or, of a new pool, the server itself made the queue `default`.
        if error.status != 409:
            raise
        if wanted.kind == POOL:
            await server.ask("PATCH", f"{path}{quote(name, safe='')}", _without_type(fields))
        elif wanted.kind == QUEUE:
            await server.ask("PATCH", f"{path}/{quote(name, safe='')}", fields)


async def _create_file_system(server: Server, wanted: Object) -> None:
    """A block; the server made its type and their schema when it started."""
    kind = await server.ask("GET", f"/block_types/slug/{FILE_SYSTEM}")
    body: JSON = {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}, "limit": 1}
    [schema] = await server.ask("POST", "/block_schemas/filter", body)
    body = {"name": wanted.key, "data": wanted.fields, "block_type_id": kind["id"], "block_schema_id": schema["id"]}
    await server.ask("POST", "/block_documents/", body | {"is_anonymous": False})


def _without_type(fields: JSON) -> JSON:
    return {key: value for key, value in fields.items() if key != "type"}


async def _change(server: Server, change: Change) -> None:
    wanted, found = change.wanted, change.found
    assert wanted
    assert found
    fields = _set(wanted.fields)
    if wanted.kind == TAG_LIMIT:
        await _create(server, wanted)
    elif wanted.kind == FILE_SYSTEM:
        await server.ask("PATCH", _path(found), {"data": wanted.fields, "merge_existing_data": False})
    elif wanted.kind == AUTOMATION:
        for each in found.raw.get("copy_ids", ()):
            await server.ask("DELETE", f"/automations/{each}", absent=True)
        body = {"name": wanted.key, "enabled": found.fields["enabled"]} | fields
        await server.ask("PUT", _path(found), body)
    else:
        different = change.differs
        body = {key: value for key, value in fields.items() if key in different}
        if body:
            await server.ask("PATCH", _path(found), body)


PLAIN = (
    "description", "version", "tags", "entrypoint", "path", "pull_steps", "parameters", "parameter_openapi_schema",
    "enforce_parameter_schema", "concurrency_limit", "concurrency_options", "paused",
)  # fmt: skip
"""A deployment's fields that are sent as they are."""


async def _deployment(
    server: Server, change: Change, flows: dict[str, str], touched: dict[str, Change], now: str, late: Sequence[str]
) -> None:
    wanted, found = change.wanted, change.found
    assert wanted
    if found is None:
        created = datetime.now(UTC)
        id_ = await _create_deployment(server, wanted, flows)
        await _triggers(server, wanted, id_, {}, {})
        active = [each for each in wanted.fields["schedules"].values() if each["active"] is not False]
        if not wanted.fields["paused"] and any(schedules.is_due_within(each["schedule"], SOON) for each in active):
            await _schedule_runs(server, id_, created)
        return
    different = change.differs
    body = {key: wanted.fields[key] for key in PLAIN if key in different}
    if different & {"work_pool_name", "work_queue_name", "job_variables"}:
        # With the pool's name the server checks the job variables.
        body |= {key: wanted.fields[key] for key in ("work_pool_name", "work_queue_name", "job_variables")}
    changed = bool(body) or bool(change.since) or "schedules" in different
    if body:
        await server.ask("PATCH", f"/deployments/{found.id}", body)
    if "schedules" in different:
        await _schedules(server, wanted, found)
    for each in late:
        body = {"start_time": each, "end_time": each}
        await server.ask("POST", f"/deployments/{found.id}/schedule", body, idempotent=True)
    if different & {"triggers", "copies"}:
        await _triggers(server, wanted, found.id, found.fields["triggers"], found.raw["trigger_ids"])
    if changed and (wanted.fields["schedules"] or found.fields["schedules"]):
        touched[found.id] = change
    if changed and wanted.fields["schedules"] and not _paused(wanted, found):
        await _schedule_runs(server, found.id, datetime.fromisoformat(change.since or now))


async def _schedule_runs(server: Server, deployment: str, since: datetime) -> None:
    """Those that are there stay: the server knows a run by its schedule and its time."""
    since = max(since, datetime.now(UTC) - REACH)
    # It makes a hundred of a schedule, or an hour's: from earlier on these end before those that are made from now on.
    for body in ({"start_time": since.isoformat()}, {}):
        await server.ask("POST", f"/deployments/{deployment}/schedule", body, idempotent=True)


async def _create_deployment(server: Server, wanted: Object, flows: dict[str, str]) -> str:
    flow, _, name = wanted.key.rpartition("/")
    if flow not in flows:
        flows[flow] = (await server.ask("POST", "/flows/", {"name": flow}, idempotent=True))["id"]
    body = {key: wanted.fields[key] for key in PLAIN if wanted.fields[key] is not None}
    body |= {key: wanted.fields[key] for key in ("work_pool_name", "work_queue_name", "job_variables")}
    body |= {"name": name, "flow_id": flows[flow], "schedules": [*map(_schedule, wanted.fields["schedules"].values())]}
    return str((await server.ask("POST", "/deployments/", body, idempotent=True))["id"])


def _schedule(wanted: JSON) -> JSON:
    body = {key: wanted[key] for key in ("parameters", "slug")} | {"schedule": _times(wanted)}
    return body if wanted["active"] is None else body | {"active": wanted["active"]}


def _times(wanted: JSON) -> JSON:
    """A cron without a timezone is sent without one, as `prefect deploy` sends it: it means UTC."""
    left = () if wanted.get("zoned", True) or "cron" not in wanted["schedule"] else ("timezone",)
    return {key: value for key, value in wanted["schedule"].items() if key not in left}


def _goes(found: JSON, wanted: JSON | None) -> bool:
    """Whether a schedule is deleted: the server cannot take a slug away, so one that loses its slug is made again."""
    return wanted is None or bool(found["slug"] and not wanted["slug"])


async def _schedules(server: Server, wanted: Object, found: Object) -> None:
    path = f"/deployments/{found.id}/schedules"
    new = []
    # New ones before old ones go: in between a deployment has too many schedules and not too few.
    pairs = paired(wanted.fields["schedules"], found.fields["schedules"])
    for _, old, each in pairs:
        if each is None:
            continue
        if old is None or _goes(old, each):
            active = old["active"] if old and each["active"] is None else each["active"]
            new.append(_schedule(each | {"active": active}))
            continue
        body = {"parameters": each["parameters"]}  # the server empties them if they are not said
        changed = (old["parameters"] or {}) != each["parameters"]
        if not schedules.is_same(each["schedule"], old["schedule"]):
            body["schedule"], changed = _times(each), True
        if each["active"] is not None and each["active"] != old["active"]:
            body["active"], changed = each["active"], True
        if each["slug"] != old["slug"]:
            body["slug"], changed = each["slug"], True
        if changed:
            await server.ask("PATCH", f"{path}/{old['id']}", body, absent=True)
    if new:
        await server.ask("POST", path, new)
    for _, old, each in pairs:
        if old and _goes(old, each):
            await server.ask("DELETE", f"{path}/{old['id']}", absent=True)


async def _triggers(
    server: Server, wanted: Object, deployment: str, found: dict[str, JSON], ids: dict[str, list[str]]
) -> None:
    """A deployment's triggers are automations that it owns."""
    for name, each in wanted.fields["triggers"].items():
        body: dict[str, Any] = {"name": name} | with_deployment(each, NOBODY, deployment)
        if name not in ids:
            body["enabled"] = body["enabled"] is not False
            await server.ask("POST", "/automations/", body | {"owner_resource": f"prefect.deployment.{deployment}"})
            continue
        if body["enabled"] is None:
            body["enabled"] = found[name]["enabled"]
        if any(
            found[name].get(key) != value for key, value in each.items() if value is not None and key != "actions"
        ) or (found[name]["actions"] != each["actions"]):
            await server.ask("PUT", f"/automations/{ids[name][0]}", body)
    extra = [id_ for name, listed in ids.items() for id_ in listed[0 if name not in wanted.fields["triggers"] else 1 :]]
    for id_ in extra:
        await server.ask("DELETE", f"/automations/{id_}", absent=True)


async def adopt(server: Server, owner: str, names: Sequence[Name], giver: str = "") -> None:
    """Make things on the server the owner's, as they are.

    Args:
        server: where.
        owner: who gets them.
        names: what.
        giver: whose they were; nobody's, if empty.

    Raises:
        DeploymentsError: one is not there, or another's than the giver's.
    """
    found, records = await asyncio.gather(api.everything(server), records_of.all_of(server))
    owners = records_of.owners(records.values())
    for name in names:
        if name not in found:
            raise DeploymentsError(f"{spoken(name)} is not on the server. See what is: orchestrate export")
        if owners.get(name, "") not in (giver, owner):
            whose = owners.get(name, "")
            said = f"belongs to {whose}, say --from '{whose}'" if whose else "belongs to nobody, leave --from out"
            raise DeploymentsError(f"{spoken(name)} {said}")

    def take(record: Record) -> None:
        for name in names:
            fields = {key: value for key, value in found[name].fields.items() if key != "parameter_openapi_schema"}
            record.applied[name] = fields

    def give(record: Record) -> None:
        for name in names:
            record.applied.pop(name, None)
            record.begun.pop(name, None)

    # First taken, then given: cut off in between it is two owners' and not nobody's.
    await records_of.write(server, owner, take)
    if giver and giver != owner:
        await records_of.write(server, giver, give)
