"""Take over objects of a server as they are, from another owner or without an owner."""

import asyncio
from collections.abc import Sequence

from orchestration.deployments import live_state, triggers
from orchestration.deployments import record as records
from orchestration.deployments.record import Record
from orchestration.deployments.resources import DEPLOYMENT, Name, display_name
from orchestration.errors import DeploymentsError
from orchestration.prefect_api import Server


async def adopt(server: Server, owner: str, names: Sequence[Name], previous_owner: str = "") -> None:
    """Make an owner the owner of objects, and leave the objects unchanged.

    Args:
        server: the server.
        owner: the new owner.
        names: the objects.
        previous_owner: the present owner; empty for objects without an owner.

    Raises:
        DeploymentsError: an object does not exist, or belongs to neither the previous nor the new owner.
    """
    live, by_owner = await asyncio.gather(live_state.read_all(server), records.read_all(server))
    owners = records.owners(by_owner.values())
    for name in names:
        if name not in live:
            raise DeploymentsError(f"{display_name(name)} is not on the server. List its objects: orchestrate export")
        actual = owners.get(name, "")
        if actual not in (previous_owner, owner):
            cause = f"belongs to {actual}. Pass --from '{actual}'" if actual else "has no owner. Leave --from out"
            raise DeploymentsError(f"{display_name(name)} {cause}")

    known = [record.triggers for record in by_owner.values() if record.owner in (previous_owner, owner)]

    def add(record: Record) -> None:
        for name in names:
            adopted = live[name]
            if adopted.kind == DEPLOYMENT:
                adopted, _ = triggers.claim(adopted, *(recorded(name) for recorded in known))
            record.applied[name] = adopted.recorded_fields

    def remove(record: Record) -> None:
        for name in names:
            record.applied.pop(name, None)
            record.begun.pop(name, None)

    # Between the two writes the objects have two owners. In the other order they would have none.
    await records.update(server, owner, add)
    if previous_owner and previous_owner != owner:
        await records.update(server, previous_owner, remove)
