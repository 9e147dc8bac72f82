"""Decide which automations of a server are the triggers of a deployment. Other automations, which people made, stay.

Prefect marks the triggers that `prefect deploy` or a sync creates as owned by the deployment. Its API returns no such
mark, so the decision is by name.
"""

import re
from collections.abc import Mapping
from typing import Any

from orchestration.deployments.resources import Object, display_name, trigger_differences


def claim(live: Object, *known: Mapping[str, Any]) -> tuple[Object, list[str]]:
    """Return a deployment of a server with its own triggers alone, and a note for each other automation that runs it.

    A trigger has a name that is known, or one that Prefect gives (`NAME__automation_1`). Two syncs at the same time may
    create a trigger twice. So an automation of the same name is a copy only if it equals the trigger or a known one.

    Args:
        live: the deployment, with all automations that do nothing but run it.
        known: triggers by name: of the files and of the owner's record.
    """
    given = re.compile(re.escape(live.key.rpartition("/")[2]) + r"__automation_\d+")
    claimed: dict[str, Any] = {}
    ids: dict[str, list[str]] = {}
    notes: list[str] = []
    by_name: dict[str, list[tuple[str, Any]]] = {}
    for automation_id, name, fields in live.raw["automations"]:
        by_name.setdefault(name, []).append((automation_id, fields))
    for name, listed in by_name.items():
        expected = [triggers[name] for triggers in known if name in triggers]
        others = len(listed)
        if expected or given.fullmatch(name):
            first = next((pair for pair in listed if _is_any(pair[1], expected)), listed[0])
            copies = [pair for pair in listed if pair is not first and _is_any(pair[1], [first[1], *expected])]
            claimed[name], ids[name] = first[1], [first[0], *(automation_id for automation_id, _ in copies)]
            others -= len(ids[name])
        if others:
            notes.append(
                f"{display_name(live.name)}: the automation {name} also runs it, and is no trigger of the files: it "
                "stays. Delete it in the UI, or add it to the deployment's triggers"
            )
    fields = live.fields | {"triggers": claimed}
    return Object(live.kind, live.key, fields, id=live.id, raw=live.raw | {"trigger_ids": ids}), notes


def _is_any(live: Mapping[str, Any], triggers: list[Any]) -> bool:
    return any(not trigger_differences(trigger, live) for trigger in triggers)
