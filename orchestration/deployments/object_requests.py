"""Create, change and delete the objects of a server, apart from deployments."""

from urllib.parse import quote

from orchestration.deployments.plan import Change
from orchestration.deployments.resources import (
    AUTOMATION,
    DEPLOYMENT,
    FILE_SYSTEM,
    KEPT_IF_UNSET,
    LIMIT,
    POOL,
    QUEUE,
    TAG_LIMIT,
    VARIABLE,
    Object,
)
from orchestration.prefect_api import JSON, RefusedError, Server


async def create(server: Server, desired: Object) -> None:
    """Create an object."""
    fields = _set_fields(desired.fields)
    if desired.kind == TAG_LIMIT:
        # The server creates the limit, or changes an existing one.
        await server.ask("POST", "/concurrency_limits/", {"tag": desired.key, **fields})
        return
    if desired.kind == FILE_SYSTEM:
        await _create_file_system(server, desired)
        return
    pool, _, queue = desired.key.partition("/")
    path, name = {
        VARIABLE: ("/variables/", desired.key),
        LIMIT: ("/v2/concurrency_limits/", desired.key),
        POOL: ("/work_pools/", desired.key),
        QUEUE: (f"/work_pools/{quote(pool, safe='')}/queues", queue),
        AUTOMATION: ("/automations/", desired.key),
    }[desired.kind]
    try:
        await server.ask("POST", path, {"name": name, **fields})
    except RefusedError as error:
        # Another sync was faster, or the server itself created the queue `default` of a new pool.
        if error.status != 409:
            raise
        if desired.kind == POOL:
            without_type = {key: value for key, value in fields.items() if key != "type"}
            await server.ask("PATCH", f"{path}{quote(name, safe='')}", without_type)
        elif desired.kind == QUEUE:
            await server.ask("PATCH", f"{path}/{quote(name, safe='')}", fields)


async def change(server: Server, change: Change) -> None:
    """Bring an existing object to its desired state."""
    desired, live = change.desired, change.live
    assert desired
    assert live
    fields = _set_fields(desired.fields)
    if desired.kind == TAG_LIMIT:
        await create(server, desired)
    elif desired.kind == FILE_SYSTEM:
        await server.ask("PATCH", _path(live), {"data": desired.fields, "merge_existing_data": False})
    elif desired.kind == AUTOMATION:
        for copy_id in live.raw.get("copy_ids", ()):
            await server.ask("DELETE", f"/automations/{copy_id}", absent=True)
        await server.ask("PUT", _path(live), {"name": desired.key, "enabled": live.fields["enabled"]} | fields)
    else:
        body = {key: value for key, value in fields.items() if key in change.changed_fields}
        if body:
            await server.ask("PATCH", _path(live), body)


async def delete(server: Server, live: Object) -> None:
    """Delete an object. A deployment's triggers are automations that would stay on the server without it.

    Args:
        server: the server.
        live: the object; a deployment with its own triggers alone (:func:`triggers.claim`).
    """
    for automation_id in (id_ for ids in live.raw.get("trigger_ids", {}).values() for id_ in ids):
        await server.ask("DELETE", f"/automations/{automation_id}", absent=True)
    await server.ask("DELETE", _path(live), absent=True)


def _path(live: Object) -> str:
    """Return the path of an object in the API."""
    key = "/".join(quote(part, safe="") for part in live.key.split("/"))
    return {
        VARIABLE: f"/variables/{live.id}",
        FILE_SYSTEM: f"/block_documents/{live.id}",
        LIMIT: f"/v2/concurrency_limits/{live.id}",
        TAG_LIMIT: f"/concurrency_limits/tag/{key}",
        POOL: f"/work_pools/{key}",
        QUEUE: f"/work_queues/{live.id}",
        DEPLOYMENT: f"/deployments/{live.id}",
        AUTOMATION: f"/automations/{live.id}",
    }[live.kind]


def _set_fields(fields: JSON) -> JSON:
    """Return the fields to send: without unset fields whose value on the server stays."""
    sent = {key: value for key, value in fields.items() if value is not None or key not in KEPT_IF_UNSET}
    # The server refuses a queue whose description is null.
    return sent | {"description": sent["description"] or ""} if "description" in sent else sent


async def _create_file_system(server: Server, desired: Object) -> None:
    """Create a block document. The server created the block type and its schema when it started."""
    block_type = await server.ask("GET", f"/block_types/slug/{FILE_SYSTEM}")
    body: JSON = {"block_schemas": {"block_type_id": {"any_": [block_type["id"]]}}, "limit": 1}
    [schema] = await server.ask("POST", "/block_schemas/filter", body)
    body = {
        "name": desired.key,
        "data": desired.fields,
        "block_type_id": block_type["id"],
        "block_schema_id": schema["id"],
        "is_anonymous": False,
    }
    await server.ask("POST", "/block_documents/", body)
