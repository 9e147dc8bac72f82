"""The record of what an owner has synced: a block document on the server.

Every machine that syncs reads the record. So it can tell apart the objects of the owner, of other owners and of none.
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
    """The objects that an owner has on a server.

    Args:
        owner: the owner.
        applied: the fields of each object after the owner's last sync. None: a sync began to create the object.
        begun: when a sync began with an object that it has not finished, ISO 8601 in UTC.
        ending: keys of deployments that a sync paused, to be deleted when their runs have ended.
        late: due times of late runs, by deployment. The server deletes them with a removed schedule, and a sync
            schedules them again.
        masked: names of the fields of each object that have values of the environment of the last sync.
        serial: a new text after each write.
        id: the document's id; empty if there is no document yet.
    """

    owner: str
    applied: dict[Name, JSON | None] = field(default_factory=dict)
    begun: dict[Name, str] = field(default_factory=dict)
    ending: set[str] = field(default_factory=set)
    late: dict[Name, list[str]] = field(default_factory=dict)
    masked: dict[Name, list[str]] = field(default_factory=dict)
    serial: str = ""
    id: str = ""

    def triggers(self, name: Name) -> JSON:
        """Return the triggers of a deployment after the owner's last sync, by name."""
        return dict((self.applied.get(name) or {}).get("triggers") or {})

    def data(self) -> JSON:
        """Return the content of the block document."""
        return {
            "owner": self.owner,
            "serial": self.serial,
            "applied": [[*name, fields] for name, fields in sorted(self.applied.items())],
            "begun": [[*name, since] for name, since in sorted(self.begun.items())],
            "ending": sorted(self.ending),
            "late": [[*name, times] for name, times in sorted(self.late.items())],
            "masked": [[*name, fields] for name, fields in sorted(self.masked.items())],
        }


def slug(owner: str) -> str:
    """Return a name for an owner that a block document may have: lower-case letters, digits and dashes."""
    readable = re.sub("[^a-z0-9]+", "-", owner.lower()).strip("-")[:40]
    return f"{readable}-{hashlib.sha256(owner.encode()).hexdigest()[:8]}"


async def read_all(server: Server) -> dict[str, Record]:
    """Return the records of all owners, by owner."""
    body = {"block_types": {"slug": {"any_": [TYPE]}}, "include_secrets": True}
    found = await server.all("/block_documents/filter", **body)
    return {item["data"]["owner"]: _parse(item) for item in found if item.get("data")}


def _parse(document: JSON) -> Record:
    data = document["data"]
    return Record(
        data["owner"],
        {(kind, key): fields for kind, key, fields in data["applied"]},
        {(kind, key): since for kind, key, since in data["begun"]},
        set(data["ending"]),
        {(kind, key): times for kind, key, times in data.get("late", ())},
        {(kind, key): fields for kind, key, fields in data.get("masked", ())},
        data["serial"],
        document["id"],
    )


async def update(server: Server, owner: str, change: Callable[[Record], None]) -> Record:
    """Change the owner's record on the server, and return the record.

    Another sync may write the record at the same time. Then this reads the record and applies the change once more.

    Args:
        server: the server.
        owner: the owner.
        change: changes the record in place.

    Raises:
        DeploymentsError: other syncs overwrote the record ten times.
    """
    for attempt in range(10):
        record = await read(server, owner) or Record(owner)
        change(record)
        record.serial = uuid4().hex
        if record.id:
            body = {"data": record.data(), "merge_existing_data": False}
            await server.ask("PATCH", f"/block_documents/{record.id}", body)
        else:
            await _create(server, record)
        # The last write wins. The other sync finds another serial and writes again.
        now = await read(server, owner)
        if now and now.serial == record.serial:
            return now
        await asyncio.sleep(0.05 * (attempt + 1))
    raise DeploymentsError(f"The record of {owner} was not written: other syncs overwrote it ten times. Sync again")


async def read(server: Server, owner: str) -> Record | None:
    """Return the owner's record; None if the owner has never synced."""
    path = f"/block_types/slug/{TYPE}/block_documents/name/{slug(owner)}?include_secrets=true"
    found = await server.ask("GET", path, absent=True)
    return _parse(found) if found else None


async def _create(server: Server, record: Record) -> None:
    kind = await _get_or_create(
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
        if error.status != 409:  # another sync has just created it
            raise


async def _get_or_create(server: Server, path: str, body: JSON, item_path: str) -> JSON:
    """Return the object at `item_path`, created at `path` if it is absent. Two syncs may create it at once."""
    found = await server.ask("GET", item_path, absent=True)
    if not found:
        try:
            found = await server.ask("POST", path, body)
        except RefusedError as error:
            if error.status != 409:
                raise
            found = await server.ask("GET", item_path)
    return dict(found)


def owners(records: Iterable[Record]) -> dict[Name, str]:
    """Return the owner of each object."""
    return {name: record.owner for record in records for name in record.applied}
