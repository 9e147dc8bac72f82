"""Find drift: changes on the server since the owner's last sync."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestration.deployments import live_state, masking, triggers
from orchestration.deployments import record as records
from orchestration.deployments.resources import DEPLOYMENT, Difference, Object, differences
from orchestration.errors import DeploymentsError
from orchestration.prefect_api import Server


class NeverSyncedError(DeploymentsError):
    """The owner has no record on the server.

    Args:
        owner: the owner.
        url: the server's API.
        known: the owners that have a record.
    """

    def __init__(self, owner: str, url: str, known: Iterable[str]) -> None:
        owners = ", ".join(sorted(known)) or "none"
        super().__init__(f"{owner} has never synced to {url}. Pass --owner, or sync first. Owners there: {owners}")
        self.owner = owner


@dataclass
class Drift:
    """An object that differs from the last sync.

    Args:
        kind: the object's kind.
        key: the object's key.
        fields: field, value at the last sync and value now; none if the object was deleted.
        when: time of the object's last change, ISO 8601, as the server has it.
        by: who changed the object, if the server has it.
    """

    kind: str
    key: str
    fields: list[Difference]
    when: str = ""
    by: str = ""

    def json(self) -> dict[str, Any]:
        """Return the drift as JSON."""
        return {
            "action": "changed" if self.fields else "deleted",
            "kind": self.kind,
            "key": self.key,
            "fields": [{"field": name, "old": old, "new": new} for name, old, new in self.fields],
            "when": self.when or None,
            "by": self.by or None,
        }


async def find(server: Server, owner: str) -> list[Drift]:
    """Return the objects that differ from the owner's last sync. An operator's pause is not drift.

    Raises:
        NeverSyncedError: the owner has no record on the server.
    """
    record = await records.read(server, owner)
    while True:
        live = await live_state.read_all(server)
        previous, record = record, await records.read(server, owner)
        # If a sync ran meanwhile, the live state is a mixture of before and after.
        if previous and record and previous.serial == record.serial:
            break
        # The owner's first sync may have come after this read no record. Then the next look finds it.
        if record is None and owner not in (known := await records.read_all(server)):
            raise NeverSyncedError(owner, server.url, known)
    drifted = []
    for (kind, key), fields in sorted(record.applied.items()):
        # A sync has begun with this object and not finished it. The next sync does.
        if fields is None or (kind, key) in record.begun or key in record.ending:
            continue
        item = live.get((kind, key))
        if item and kind == DEPLOYMENT:
            item, _ = triggers.claim(item, record.triggers((kind, key)))
        if item is None:
            drifted.append(Drift(kind, key, []))
        elif different := differences(Object(kind, key, fields), item.fields):
            by = item.raw.get("updated_by") or {}
            # `differences` returns what a sync would change: from the live value to the synced one.
            changed = [(name, synced, now) for name, now, synced in different]
            changed = masking.mask(changed, record.masked.get((kind, key), ()))
            drifted.append(Drift(kind, key, changed, str(item.raw.get("updated") or ""), by.get("display_value") or ""))
    return drifted
