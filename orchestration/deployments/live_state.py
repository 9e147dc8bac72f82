"""The live state: all objects of a Prefect server that a sync can manage, and the runs that use them."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from orchestration.deployments import schedules
from orchestration.deployments.resources import (
    AUTOMATION,
    DEPLOYMENT,
    DEPLOYMENT_PLACEHOLDER,
    FILE_SYSTEM,
    LIMIT,
    POOL,
    QUEUE,
    TAG_LIMIT,
    VARIABLE,
    Name,
    Object,
    read_automation,
    replace_deployment,
    triggered_deployment,
)
from orchestration.prefect_api import JSON, Server


async def read_all(server: Server) -> dict[Name, Object]:
    """Return all objects of the server that a sync can manage, by kind and key.

    The triggers of a deployment are all automations that do nothing but run it; :func:`triggers.claim` returns its own.
    """
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
    flow_names = {flow["id"]: flow["name"] for flow in flows}
    found: list[Object] = []
    found += [_object(VARIABLE, item["name"], item, "value", "tags") for item in variables]
    for item in systems:
        fields = {key: item["data"].get(key, default) for key, default in (("basepath", ""), ("settings", {}))}
        found.append(Object(FILE_SYSTEM, item["name"], fields, id=item["id"], raw=item))
    for item in limits:
        # The server lists the limits of tags and deployments among the others.
        if item["name"].startswith("tag:"):
            fields = {"concurrency_limit": item["limit"]}
            found.append(Object(TAG_LIMIT, item["name"].removeprefix("tag:"), fields, id=item["id"], raw=item))
        elif not item["name"].startswith("deployment:"):
            found.append(_object(LIMIT, item["name"], item, "limit", "slot_decay_per_second", "active"))
    pool_fields = ("type", "description", "concurrency_limit", "base_job_template")
    found += [_object(POOL, item["name"], item, *pool_fields) for item in pools]
    for item in queues:
        if item.get("work_pool_name"):
            key = f"{item['work_pool_name']}/{item['name']}"
            found.append(_object(QUEUE, key, item, "priority", "concurrency_limit", "description"))
    by_id = {}
    for item in deployments:
        made = deployment(item, flow_names.get(item["flow_id"], ""))
        by_id[made.id] = made
        found.append(made)
    for item in automations:
        target = by_id.get(triggered_deployment(item))
        fields = read_automation(item)
        if target:
            fields = replace_deployment(fields, target.id, DEPLOYMENT_PLACEHOLDER)
            target.fields["triggers"].setdefault(item["name"], fields)
            target.raw["automations"].append((item["id"], item["name"], fields))
        else:
            found.append(Object(AUTOMATION, item["name"], fields, id=item["id"], raw=item | {"copy_ids": []}))
    objects: dict[Name, Object] = {}
    for made in found:
        if made.kind == AUTOMATION and (first := objects.get(made.name)):  # names of automations are not unique
            first.raw["copy_ids"].append(made.id)
        else:
            objects[made.name] = made
    return objects


async def variables(server: Server, names: Collection[str]) -> JSON:
    """Return the values of variables by name, without those that the server does not have."""
    found = await server.all("/variables/filter", variables={"name": {"any_": sorted(names)}})
    return {item["name"]: item["value"] for item in found}


def deployment(raw: JSON, flow: str) -> Object:
    """Return a deployment of the server.

    Args:
        raw: the API's answer.
        flow: the name of the deployment's flow.
    """
    limit = raw.get("global_concurrency_limit") or {}
    own_limit = str(limit.get("name", "")).startswith("deployment:")
    listed = [
        {
            "schedule": schedules.normalize(item["schedule"]),
            "active": item["active"],
            "parameters": item["parameters"] or {},
            "slug": item["slug"],
            "id": item["id"],
        }
        for item in sorted(raw["schedules"], key=lambda item: (item["created"], item["id"]))
    ]
    same = ("description", "version", "entrypoint", "path", "work_pool_name", "work_queue_name")
    fields: JSON = {key: raw.get(key) for key in same}
    fields |= {
        "tags": sorted({*raw["tags"]}),
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
    return Object(DEPLOYMENT, f"{flow}/{raw['name']}", fields, id=raw["id"], raw=raw | {"automations": []})


def _object(kind: str, key: str, raw: JSON, *fields: str) -> Object:
    # The server returns an empty description or None for the same.
    values = {name: raw.get(name) or None if name == "description" else raw.get(name) for name in fields}
    return Object(kind, key, values, id=raw["id"], raw=raw)


UNFINISHED: Mapping[str, Any] = {
    "operator": "or_",
    "type": {"any_": ["PENDING", "RUNNING", "PAUSED", "CANCELLING"]},
    "name": {"any_": ["AwaitingRetry", "AwaitingConcurrencySlot"]},
}
"""States of a run that has begun and has not ended."""


async def count_unfinished_runs(server: Server, deployments: Sequence[Object]) -> dict[str, int]:
    """Return the number of unfinished runs by the id of their deployment, without deployments that have none."""

    async def count(item: Object) -> int:
        body = {"deployments": {"id": {"any_": [item.id]}}, "flow_runs": {"state": UNFINISHED}}
        return int(await server.ask("POST", "/flow_runs/count", body, idempotent=True))

    counts = await asyncio.gather(*map(count, deployments))
    return {item.id: number for item, number in zip(deployments, counts, strict=True) if number}


async def find_pools_and_queues_in_use(
    server: Server, candidates: Sequence[Object], *, without: Collection[str] = ()
) -> set[str]:
    """Return the ids of work pools and queues with runs that have not ended. No worker finds a run without its queue.

    Args:
        server: the server.
        candidates: work pools and queues.
        without: ids of deployments whose runs do not count.
    """
    states = {"state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "CANCELLING"]}}}

    async def has_runs(item: Object) -> bool:
        which = {"work_pools": {"name": {"any_": [item.key]}}} if item.kind == POOL else {
            "work_pool_queues": {"id": {"any_": [item.id]}}
        }  # fmt: skip
        async for page in server.pages("/flow_runs/filter", flow_runs=states, sort="ID_DESC", **which):
            if any(run["deployment_id"] not in without for run in page):
                return True
        return False

    found = await asyncio.gather(*map(has_runs, candidates))
    return {item.id for item, runs in zip(candidates, found, strict=True) if runs}
