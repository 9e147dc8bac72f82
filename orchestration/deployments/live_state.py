"""What a Prefect server has that desired state is about, all of it at once."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from orchestration.deployments import schedules
from orchestration.deployments.resources import (
    AUTOMATION,
    DEPLOYMENT,
    FILE_SYSTEM,
    LIMIT,
    NOBODY,
    POOL,
    QUEUE,
    TAG_LIMIT,
    VARIABLE,
    Name,
    Object,
    automation,
    runs_one_deployment,
    with_deployment,
)
from orchestration.prefect_api import JSON, Server


async def everything(server: Server) -> dict[Name, Object]:
    """All that desired state may be about, by kind and key."""
    variables, systems, limits, pools, queues, automations, deployments, flows = await asyncio.gather(
        server.all("/variables/filter"),
        server.all("/block_documents/filter", block_types={"slug": {"any_": [FILE_SYSTEM]}}),
        server.all("/v2/concurrency_limits/filter"),
        server.all("/work_pools/filter"),
        server.all("/work_queues/filter"),
        server.all("/automations/filter"),
        server.all("/deployments/filter", sort="NAME_ASC"),
        server.all("/flows/filter", sort="NAME_ASC"),
    )
    names = {each["id"]: each["name"] for each in flows}
    found: list[Object] = []
    found += [_made(VARIABLE, each["name"], each, "value", "tags") for each in variables]
    for each in systems:
        fields = {key: each["data"].get(key, missing) for key, missing in (("basepath", ""), ("settings", {}))}
        found.append(Object(FILE_SYSTEM, each["name"], fields, id=each["id"], raw=each))
    for each in limits:
        # The server keeps those of tags and deployments among them.
        if each["name"].startswith("tag:"):
            fields = {"concurrency_limit": each["limit"]}
            found.append(Object(TAG_LIMIT, each["name"].removeprefix("tag:"), fields, id=each["id"], raw=each))
        elif not each["name"].startswith("deployment:"):
            found.append(_made(LIMIT, each["name"], each, "limit", "slot_decay_per_second", "active"))
    template = ("type", "description", "concurrency_limit", "base_job_template")
    found += [_made(POOL, each["name"], each, *template) for each in pools]
    for each in queues:
        if each.get("work_pool_name"):
            key = f"{each['work_pool_name']}/{each['name']}"
            found.append(_made(QUEUE, key, each, "priority", "concurrency_limit", "description"))
    by_id = {}
    for each in deployments:
        made = deployment(each, names.get(each["flow_id"], ""))
        by_id[made.id] = made
        found.append(made)
    for each in automations:
        target = by_id.get(runs_one_deployment(each))
        fields = automation(each)
        if target:
            target.fields["triggers"][each["name"]] = with_deployment(fields, target.id, NOBODY)
            target.raw["trigger_ids"].setdefault(each["name"], []).append(each["id"])
        else:
            found.append(Object(AUTOMATION, each["name"], fields, id=each["id"], raw=each | {"copy_ids": []}))
    things: dict[Name, Object] = {}
    for thing in found:
        if thing.kind == AUTOMATION and (first := things.get(thing.name)):  # their names are not unique
            first.raw["copy_ids"].append(thing.id)
        else:
            things[thing.name] = thing
    return things


async def variables(server: Server, names: Collection[str]) -> JSON:
    """Values of those of these variables that there are."""
    found = await server.all("/variables/filter", variables={"name": {"any_": sorted(names)}})
    return {each["name"]: each["value"] for each in found}


def deployment(raw: JSON, flow: str) -> Object:
    """A deployment as the server gives it."""
    limit = raw.get("global_concurrency_limit") or {}
    own_limit = str(limit.get("name", "")).startswith("deployment:")
    listed = [
        {
            "schedule": schedules.normalize(each["schedule"]),
            "active": each["active"],
            "parameters": each["parameters"] or {},
            "slug": each["slug"],
            "id": each["id"],
        }
        for each in sorted(raw["schedules"], key=lambda each: (each["created"], each["id"]))
    ]
    same = ("description", "version", "entrypoint", "path", "work_pool_name", "work_queue_name")
    fields: JSON = {key: raw.get(key) for key in same}
    fields |= {
        "tags": sorted(raw["tags"]),
        "pull_steps": raw.get("pull_steps") or [],
        "job_variables": raw.get("job_variables") or {},
        "parameters": raw.get("parameters") or {},
        "parameter_openapi_schema": raw.get("parameter_openapi_schema") or {},
        "enforce_parameter_schema": raw["enforce_parameter_schema"],
        "concurrency_limit": limit.get("limit") if own_limit else raw.get("concurrency_limit"),
        "concurrency_options": raw.get("concurrency_options"),
        "paused": raw["paused"],
        "schedules": schedules.by_name(listed),
        "triggers": {},
    }
    return Object(DEPLOYMENT, f"{flow}/{raw['name']}", fields, id=raw["id"], raw=raw | {"trigger_ids": {}})


def _made(kind: str, key: str, raw: JSON, *fields: str) -> Object:
    # To the server no description is sometimes an empty one.
    values = {each: raw.get(each) or None if each == "description" else raw.get(each) for each in fields}
    return Object(kind, key, values, id=raw["id"], raw=raw)


BEGUN: Mapping[str, Any] = {
    "operator": "or_",
    "type": {"any_": ["PENDING", "RUNNING", "PAUSED", "CANCELLING"]},
    "name": {"any_": ["AwaitingRetry", "AwaitingConcurrencySlot"]},
}
"""States of a run that has begun and not ended."""


async def unfinished(server: Server, deployments: Sequence[Object]) -> dict[str, int]:
    """How many runs of each deployment have begun and not ended, by its id; only where there are any."""

    async def count(each: Object) -> int:
        body = {"deployments": {"id": {"any_": [each.id]}}, "flow_runs": {"state": BEGUN}}
        return int(await server.ask("POST", "/flow_runs/count", body, idempotent=True))

    counts = await asyncio.gather(*map(count, deployments))
    return {each.id: number for each, number in zip(deployments, counts, strict=True) if number}


async def places_of_runs(server: Server, places: Sequence[Object], *, without: Collection[str] = ()) -> set[str]:
    """The ids of those work pools and queues in which runs are that have not ended: without it no worker finds them.

    Args:
        server: where.
        places: pools and queues.
        without: ids of deployments whose runs do not count.
    """
    states = {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]}}}

    async def has_runs(each: Object) -> bool:
        which = {"work_pools": {"name": {"any_": [each.key]}}} if each.kind == POOL else {
            "work_pool_queues": {"id": {"any_": [each.id]}}
        }  # fmt: skip
        async for page in server.pages("/flow_runs/filter", flow_runs=states, sort="ID_DESC", **which):
            if any(run["deployment_id"] not in without for run in page):
                return True
        return False

    found = await asyncio.gather(*map(has_runs, places))
    return {each.id for each, runs in zip(places, found, strict=True) if runs}
