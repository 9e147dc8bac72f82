"""What an owner has brought to a server: a block document of the owner's on that server, so that every machine that
syncs knows it, and another owner's things are told from what nobody owns.
"""

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from uuid import uuid4

from orchestration.deployments.resources import Name
from orchestration.errors import DeploymentsError
from orchestration.prefect_api import JSON, RefusedError, Server

TYPE = "orchestrate-record"
"""The block type's slug."""


@dataclass
class Record:
    """What an owner has on a server.

    Args:
        owner: who.
        applied: the fields of each thing as the owner's last sync left them. None: a sync began to make it.
        begun: since when (ISO 8601, UTC) a sync works on a thing that it has not reported as done.
        late: when runs of a deployment fell due that the server deletes with a schedule which a sync removes.
        ending: deployments that a sync paused, to be deleted when their runs have ended.
        serial: another after each write.
        id: the document's; empty if there is none yet.
    """

    owner: str
    applied: dict[Name, JSON | None] = field(default_factory=dict)
    begun: dict[Name, str] = field(default_factory=dict)
    ending: set[str] = field(default_factory=set)
    late: dict[Name, list[str]] = field(default_factory=dict)
    serial: str = ""
    id: str = ""

    def data(self) -> JSON:
        """As the document has it."""
        return {
            "owner": self.owner,
            "serial": self.serial,
            "applied": [[*name, fields] for name, fields in sorted(self.applied.items())],
            "begun": [[*name, since] for name, since in sorted(self.begun.items())],
            "ending": sorted(self.ending),
            "late": [[*name, times] for name, times in sorted(self.late.items())],
        }


def slug(owner: str) -> str:
    """A name for an owner of letters that block documents may have."""
    readable = re.sub("[^a-z0-9]+", "-", owner.lower()).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(owner.encode()).hexdigest()[:8]}"


async def all_of(server: Server) -> dict[str, Record]:
    """The records of all owners, by owner."""
    body = {"block_types": {"slug": {"any_": [TYPE]}}, "include_secrets": True}
    found = await server.all("/block_documents/filter", **body)
    return {each["data"]["owner"]: _read(each) for each in found if each.get("data")}


def _read(document: JSON) -> Record:
    data = document["data"]
    return Record(
        data["owner"],
        {(kind, key): fields for kind, key, fields in data["applied"]},
        {(kind, key): since for kind, key, since in data["begun"]},
        set(data["ending"]),
        {(kind, key): times for kind, key, times in data.get("late", ())},
        data["serial"],
        document["id"],
    )


async def write(server: Server, owner: str, change: Callable[[Record], None]) -> Record:
    """Change the owner's record as it is now on the server, which another sync may have changed meanwhile.

    Raises:
        DeploymentsError: others write it all the time.
    """
    for attempt in range(10):
        record = await of(server, owner) or Record(owner)
        change(record)
        record.serial = uuid4().hex
        if record.id:
            body = {"data": record.data(), "merge_existing_data": False}
            await server.ask("PATCH", f"/block_documents/{record.id}", body)
        else:
            await _create(server, record)
        # Whose write came last has it; the other sees that and writes again.
        now = await of(server, owner)
        if now and now.serial == record.serial:
            return now
        await asyncio.sleep(0.05 * (attempt + 1))
    raise DeploymentsError(f"Other syncs of {owner} write at the same time, again and again. Run it again")


async def of(server: Server, owner: str) -> Record | None:
    """The owner's record, if there is one."""
    path = f"/block_types/slug/{TYPE}/block_documents/name/{slug(owner)}?include_secrets=true"
    found = await server.ask("GET", path, absent=True)
    return _read(found) if found else None


async def _create(server: Server, record: Record) -> None:
    kind = await _made(
        server, "/block_types/", {"name": "orchestrate record", "slug": TYPE}, f"/block_types/slug/{TYPE}"
    )
    fields: JSON = {"title": "OrchestrateRecord", "type": "object", "properties": {}, "block_type_slug": TYPE}
    body = {"fields": fields, "block_type_id": kind["id"], "capabilities": [], "version": "1"}
    schema = await server.ask("POST", "/block_schemas/", body)
    document = {
        "name": slug(record.owner),
        "data": record.data(),
        "block_type_id": kind["id"],
        "block_schema_id": schema["id"],
        "is_anonymous": False,
    }
    try:
        await server.ask("POST", "/block_documents/", document)
    except RefusedError as error:
        if error.status != 409:  # another sync has just made it
            raise


async def _made(server: Server, path: str, body: JSON, read: str) -> JSON:
    """What is there, else made; two may make it at once."""
    found = await server.ask("GET", read, absent=True)
    if not found:
        try:
            found = await server.ask("POST", path, body)
        except RefusedError as error:
            if error.status != 409:
                raise
            found = await server.ask("GET", read)
    return dict(found)


def owners(records: Iterable[Record]) -> dict[Name, str]:
    """Who owns what."""
    return {name: each.owner for each in records for name in each.applied}
