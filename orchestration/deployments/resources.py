"""What a file says and a server has, in one form, so that the two can be compared."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestration.deployments import schedules

VARIABLE = "variable"
FILE_SYSTEM = "remote-file-system"
LIMIT = "concurrency-limit"
TAG_LIMIT = "tag-concurrency-limit"
POOL = "work-pool"
QUEUE = "work-queue"
DEPLOYMENT = "deployment"
AUTOMATION = "automation"

KINDS = (VARIABLE, FILE_SYSTEM, LIMIT, TAG_LIMIT, POOL, QUEUE, DEPLOYMENT, AUTOMATION)
"""In the order in which they are made; they are deleted in the opposite one."""

LEFT_TO_OTHERS = ("paused", "active", "enabled", "priority", "base_job_template")
"""Fields that an operator, or for the template the pool's worker, decides where a file does not."""

Name = tuple[str, str]
"""A kind and a key: a name, for a queue POOL/QUEUE, for a deployment FLOW/DEPLOYMENT."""

NOBODY = "00000000-0000-0000-0000-000000000000"
"""Stands for a deployment's id in its triggers."""


@dataclass
class Object:
    """One thing on a server.

    Args:
        kind: one of `KINDS`.
        key: its name among its kind.
        fields: what it is. A field that is None where an operator may decide (`paused`, `active`, `enabled`) is left
            to the operator. `schedules` of a deployment are by slug or content, its `triggers` by name.
        where: FILE:LINE of what is wanted.
        id: the server's.
        raw: all that the server says of it.
    """

    kind: str
    key: str
    fields: dict[str, Any]
    where: str = ""
    id: str = ""
    raw: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> Name:
        """Kind and key."""
        return self.kind, self.key


def spoken(name: Name) -> str:
    """A name in a sentence: deployment etl/nightly."""
    return f"{name[0]} {name[1]}"


def parsed(text: str) -> Name:
    """The name that KIND:KEY says.

    Raises:
        ValueError: it says none.
    """
    kind, _, key = text.partition(":")
    if kind not in KINDS or not key:
        raise ValueError(f"{text} is no KIND:KEY. Write deployment:FLOW/NAME; the kinds are {', '.join(KINDS)}")
    return kind, key


def automation(raw: Mapping[str, Any]) -> dict[str, Any]:
    """An automation of a file or of a server, without ids of its own.

    Raises:
        pydantic.ValidationError: it is none.
    """
    from prefect.events.schemas.automations import AutomationCore

    fields = AutomationCore.model_validate(dict(raw)).model_dump(mode="json", exclude={"name", "owner_resource"})
    fields["trigger"] = _settled(fields["trigger"])
    return fields


def trigger(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The automation that a deployment's trigger is, for the deployment `NOBODY`.

    Raises:
        pydantic.ValidationError: it is none.
    """
    from uuid import UUID

    from prefect.events import DeploymentTriggerTypes
    from pydantic import TypeAdapter

    read = TypeAdapter(DeploymentTriggerTypes).validate_python(dict(raw))
    read.set_deployment_id(UUID(NOBODY))
    return automation(read.as_automation().model_dump(mode="json"))


def fires_on_everything(trigger: Mapping[str, Any]) -> bool:
    """Whether a trigger, as :func:`automation` gives it, or one inside of it, is of any event at all."""
    if trigger["type"] != "event":
        return any(fires_on_everything(each) for each in trigger.get("triggers", ()))
    return trigger["posture"] == "Reactive" and not any(trigger[key] for key in ("expect", "match", "match_related"))


def _settled(trigger: Any) -> Any:
    """A trigger without ids, and with the sets of Prefect's model in one order."""
    if isinstance(trigger, list):
        return [_settled(each) for each in trigger]
    if not isinstance(trigger, dict):
        return trigger
    sets = ("expect", "after", "for_each")
    return {key: sorted(each) if key in sets else _settled(each) for key, each in trigger.items() if key != "id"}


def with_deployment(fields: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """A trigger's automation for another deployment."""
    actions = [
        each | {"deployment_id": new} if each.get("deployment_id") == old else each for each in fields["actions"]
    ]
    return {**fields, "actions": actions}


def runs_one_deployment(raw: Mapping[str, Any]) -> str:
    """The id of the deployment whose trigger an automation is: all that it does is to run it. Else nothing."""
    actions = raw.get("actions") or []
    others = [*(raw.get("actions_on_trigger") or []), *(raw.get("actions_on_resolve") or [])]
    if len(actions) == 1 and not others and actions[0].get("type") == "run-deployment":
        return str(actions[0].get("deployment_id") or "")
    return ""


Difference = tuple[str, Any, Any]
"""A field, its old value and its new one; None is no value."""


def differences(wanted: Object, found: Mapping[str, Any]) -> list[Difference]:
    """The fields of `wanted` that `found` has otherwise."""
    listed: list[Difference] = []
    for name, value in wanted.fields.items():
        have = found.get(name)
        if name == "schedules":
            listed += _schedule_differences(value, have or {})
        elif name == "triggers":
            for each in sorted({*value, *(have or {})}):
                old, new = (have or {}).get(each), value.get(each)
                if new is not None and old is not None:
                    listed += [(f"triggers.{each}.{key}", a, b) for key, a, b in _mapping_differences(new, old)]
                else:
                    listed.append((f"triggers.{each}", old, new))
        elif value is None and name in LEFT_TO_OTHERS:
            continue
        elif isinstance(value, dict) and isinstance(have, dict):
            listed += [(f"{name}.{key}", a, b) for key, a, b in _mapping_differences(value, have)]
        elif value != have:
            listed.append((name, have, value))
    return listed


def _mapping_differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    """Field by field, down to what is no mapping."""
    listed: list[Difference] = []
    for key in sorted({*wanted, *found}, key=str):
        old, new = found.get(key), wanted.get(key)
        if key == "enabled" and new is None:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            listed += [(f"{key}.{below}", a, b) for below, a, b in _mapping_differences(new, old)]
        elif old != new or (key in found) != (key in wanted):
            listed.append((key, old, new))
    return listed


def paired(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Schedules that are one and the same: (name, found, wanted), either may be None.

    By name first, then by the slug that the file replaces, then by equal times: a schedule that gets, changes or loses
    its slug keeps its late runs and stays paused if it was. What has no slug and no counterpart is a changed one, in
    order.
    """
    pairs: list[tuple[str, Any, Any]] = [(name, found[name], each) for name, each in wanted.items() if name in found]
    left = {name: each for name, each in found.items() if name not in wanted}
    new = {name: each for name, each in wanted.items() if name not in found}

    def counterparts(name: str) -> Iterator[str]:
        each = new[name]
        if each.get("replaces") in left and left[each["replaces"]]["slug"]:
            yield each["replaces"]
        same = [key for key, old in left.items() if schedules.is_same(each["schedule"], old["schedule"])]
        yield from sorted(same, key=lambda key: bool(left[key]["slug"]) != bool(each["slug"]))

    def changed(name: str) -> Iterator[str]:
        yield from () if new[name]["slug"] else (key for key, old in left.items() if not old["slug"])

    for candidates in (counterparts, changed):
        for name in [*new]:
            key = next(candidates(name), None)
            if key is not None:
                pairs += [(name, left.pop(key), new.pop(name))]
    pairs += [(name, None, each) for name, each in new.items()]
    return pairs + [(name, each, None) for name, each in left.items()]


def _schedule_differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[Difference]:
    listed: list[Difference] = []
    for name, old, new in paired(wanted, found):
        if old is None or new is None:
            listed.append((f"schedules.{name}", _said(old), _said(new)))
            continue
        if not schedules.is_same(new["schedule"], old["schedule"]):
            titles = schedules.title(old["schedule"]), schedules.title(new["schedule"])
            both = titles if titles[0] != titles[1] else (old["schedule"], new["schedule"])
            listed.append((f"schedules.{name}", *both))
        if new["active"] is not None and new["active"] != old["active"]:
            listed.append((f"schedules.{name}.active", old["active"], new["active"]))
        if (new["parameters"] or {}) != (old["parameters"] or {}):
            listed.append((f"schedules.{name}.parameters", old["parameters"], new["parameters"]))
        if new["slug"] != old["slug"]:
            listed.append((f"schedules.{name}.slug", old["slug"], new["slug"]))
    return listed


def _said(schedule: Mapping[str, Any] | None) -> str | None:
    if schedule is None:
        return None
    return schedules.title(schedule["schedule"]) + ("" if schedule["active"] in (None, True) else ", paused")
