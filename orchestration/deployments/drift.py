"""What was changed on the server since the owner's last sync."""

from dataclasses import dataclass
from typing import Any

from orchestration.deployments import live_state as api
from orchestration.deployments import record as records_of
from orchestration.deployments.resources import Difference, Object, differences
from orchestration.errors import DeploymentsError
from orchestration.prefect_api import Server


@dataclass
class Drift:
    """One thing that is not as the last sync left it.

    Args:
        kind: of it.
        key: of it.
        fields: field, value at the last sync and value now; none if it is gone.
        when: it was last changed, ISO 8601, as the server says.
        by: who changed it, if the server says.
    """

    kind: str
    key: str
    fields: list[Difference]
    when: str = ""
    by: str = ""

    def json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "action": "changed" if self.fields else "deleted",
            "kind": self.kind,
            "key": self.key,
            "fields": [{"field": name, "old": old, "new": new} for name, old, new in self.fields],
            "when": self.when or None,
            "by": self.by or None,
        }


async def find(server: Server, owner: str) -> list[Drift]:
    """What is not as the owner's last sync left it. What operators may decide is no drift.

    Raises:
        DeploymentsError: the owner has never synced.
    """
    record = await records_of.of(server, owner)
    while True:
        found = await api.everything(server)
        before, record = record, await records_of.of(server, owner)
        # What a sync did in between was seen in part.
        if before and record and before.serial == record.serial:
            break
        # Unless its first sync came just now.
        if record is None and owner not in (known := await records_of.all_of(server)):
            raise DeploymentsError(
                f"{owner} has never synced to {server.url}. It knows {', '.join(sorted(known)) or 'nobody'}. "
                "Say --owner, or sync first"
            )
    drifted = []
    for (kind, key), fields in sorted(record.applied.items()):
        # What a sync has begun is between two states; the next sync brings it to one.
        if fields is None or (kind, key) in record.begun or key in record.ending:
            continue
        there = found.get((kind, key))
        if there is None:
            drifted.append(Drift(kind, key, []))
        elif different := differences(Object(kind, key, fields), there.fields):
            by = there.raw.get("updated_by") or {}
            # From what was to what is.
            turned = [(name, new, old) for name, old, new in different]
            drifted.append(Drift(kind, key, turned, str(there.raw.get("updated") or ""), by.get("display_value") or ""))
    return drifted
