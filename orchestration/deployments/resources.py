"""One form for the objects of files and of servers, so that the two can be compared."""

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
"""The kinds in the order in which a sync creates objects. A sync deletes objects in the opposite order."""

KEPT_IF_UNSET = ("paused", "active", "enabled", "priority", "base_job_template")
"""Fields whose value on the server stays where a file sets none: an operator set it, or the worker (the template)."""

Name = tuple[str, str]
"""A kind and a key. The key of a queue is POOL/QUEUE, that of a deployment FLOW/DEPLOYMENT, any other the name."""

DEPLOYMENT_PLACEHOLDER = "00000000-0000-0000-0000-000000000000"
"""Stands for the deployment's id in its triggers, so that triggers of files and servers compare equal."""


@dataclass
class Object:
    """An object that a file declares or a server has.

    Args:
        kind: one of `KINDS`.
        key: unique among its kind.
        fields: the fields that a sync compares. None in a field of `KEPT_IF_UNSET` keeps the value on the server.
            `schedules` of a deployment are by slug or title, its `triggers` by name.
        where: FILE:LINE of an object of a file.
        id: the id of an object of a server.
        raw: all fields of an object of a server.
        masked: the fields with values of the environment of a sync, which are not shown (:mod:`masking`).
    """

    kind: str
    key: str
    fields: dict[str, Any]
    where: str = ""
    id: str = ""
    raw: dict[str, Any] = field(default_factory=dict, repr=False)
    masked: frozenset[str] = frozenset()

    @property
    def name(self) -> Name:
        """Return kind and key."""
        return self.kind, self.key

    @property
    def recorded_fields(self) -> dict[str, Any]:
        """Return the fields for the owner's record, without the schema of parameters: it comes only from the code."""
        return {key: value for key, value in self.fields.items() if key != "parameter_openapi_schema"}


def display_name(name: Name) -> str:
    """Return a name for messages, such as `deployment etl/nightly`."""
    return f"{name[0]} {name[1]}"


def parse_name(text: str) -> Name:
    """Return the name that a text KIND:KEY stands for.

    Raises:
        ValueError: the text has another form, or there is no such kind.
    """
    kind, _, key = text.partition(":")
    if kind not in KINDS or not key:
        raise ValueError(f"{text} is not KIND:KEY. Write one such as deployment:FLOW/NAME. Kinds: {', '.join(KINDS)}")
    return kind, key


def read_automation(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an automation of a file or a server, without ids.

    Raises:
        pydantic.ValidationError: Prefect does not accept it as an automation.
    """
    from prefect.events.schemas.automations import AutomationCore

    fields = AutomationCore.model_validate(dict(raw)).model_dump(mode="json", exclude={"name", "owner_resource"})
    fields["trigger"] = _normalize_trigger(fields["trigger"])
    return fields


def read_trigger(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the automation that Prefect makes of a deployment's trigger.

    The automation runs the deployment `DEPLOYMENT_PLACEHOLDER`.

    Raises:
        pydantic.ValidationError: Prefect does not accept it as a trigger.
    """
    from uuid import UUID

    from prefect.events import DeploymentTriggerTypes
    from pydantic import TypeAdapter

    parsed = TypeAdapter(DeploymentTriggerTypes).validate_python(dict(raw))
    parsed.set_deployment_id(UUID(DEPLOYMENT_PLACEHOLDER))
    return read_automation(parsed.as_automation().model_dump(mode="json"))


def matches_every_event(trigger: Mapping[str, Any]) -> bool:
    """Return whether a trigger of :func:`read_automation`, or a trigger inside it, matches every event."""
    if trigger["type"] != "event":
        return any(matches_every_event(inner) for inner in trigger.get("triggers", ()))
    return trigger["posture"] == "Reactive" and not any(trigger[key] for key in ("expect", "match", "match_related"))


def _normalize_trigger(trigger: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trigger without ids, with the sets of Prefect's model sorted.

    Its filters `match` and `match_related` stay as they are: their keys are labels of any name, also `id` or `after`.
    """
    fields = {key: value for key, value in trigger.items() if key != "id"}
    fields |= {key: sorted(fields[key]) for key in ("expect", "after", "for_each") if key in fields}
    return fields | {
        key: [_normalize_trigger(inner) for inner in fields[key]] for key in ("triggers",) if key in fields
    }


def replace_deployment(fields: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    """Return a trigger's automation with another deployment's id in its actions."""
    actions = [
        action | {"deployment_id": new} if action.get("deployment_id") == old else action
        for action in fields["actions"]
    ]
    return {**fields, "actions": actions}


def triggered_deployment(raw: Mapping[str, Any]) -> str:
    """Return the id of the deployment whose trigger an automation is: it only runs that deployment. Else return ""."""
    actions = raw.get("actions") or []
    others = [*(raw.get("actions_on_trigger") or []), *(raw.get("actions_on_resolve") or [])]
    if len(actions) == 1 and not others and actions[0].get("type") == "run-deployment":
        return str(actions[0].get("deployment_id") or "")
    return ""


Difference = tuple[str, Any, Any]
"""A field, its old value and its new value. None is no value."""


def is_same_value(one: Any, other: Any) -> bool:
    """Return whether two values of JSON are the same to a server.

    Postgres returns a large float, such as 1e23, as an integer. To Python a truth equals 0 or 1.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same_value(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_same_value, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, float | int) and isinstance(other, float | int) and type(one) is not type(other):
        try:
            return float(one) == float(other)
        except OverflowError:
            return False
    return bool(one == other)


def differences(desired: Object, live: Mapping[str, Any]) -> list[Difference]:
    """Return the fields in which an object on the server differs from the desired one."""
    listed: list[Difference] = []
    for name, value in desired.fields.items():
        live_value = live.get(name)
        if name == "schedules":
            listed += _schedule_differences(value, live_value or {})
        elif name == "triggers":
            for trigger in sorted({*value, *(live_value or {})}):
                old, new = (live_value or {}).get(trigger), value.get(trigger)
                if new is not None and old is not None:
                    listed += [(f"triggers.{trigger}.{key}", a, b) for key, a, b in trigger_differences(new, old)]
                else:
                    listed.append((f"triggers.{trigger}", old, new))
        elif value is None and name in KEPT_IF_UNSET:
            continue
        elif isinstance(value, dict) and isinstance(live_value, dict):
            listed += [(f"{name}.{key}", a, b) for key, a, b in _mapping_differences(value, live_value)]
        elif not is_same_value(value, live_value):
            listed.append((name, live_value, value))
    return listed


def trigger_differences(desired: Mapping[str, Any], live: Mapping[str, Any]) -> list[Difference]:
    """Return the differences of two triggers. Without `enabled` in the file, the value on the server stays."""
    return [
        difference
        for difference in _mapping_differences(desired, live)
        if difference[0] != "enabled" or desired["enabled"] is not None
    ]


def _mapping_differences(desired: Mapping[str, Any], live: Mapping[str, Any]) -> list[Difference]:
    """Return the differences of two mappings, field by field and down through nested mappings."""
    listed: list[Difference] = []
    for key in sorted({*desired, *live}, key=str):
        old, new = live.get(key), desired.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            listed += [(f"{key}.{below}", a, b) for below, a, b in _mapping_differences(new, old)]
        elif not is_same_value(new, old) or (key in live) != (key in desired):
            listed.append((key, old, new))
    return listed


def pair_schedules(desired: Mapping[str, Any], live: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Match the schedules of a file with those of the server: (name, live, desired), where live or desired may be None.

    Schedules match by name, else by the slug that the file replaces, else by equal times. So a schedule that gets,
    changes or loses its slug keeps its late runs and its pause. The schedules without a slug that are left match in
    order: their times changed.
    """
    pairs: list[tuple[str, Any, Any]] = [
        (name, live[name], schedule) for name, schedule in desired.items() if name in live
    ]
    left = {name: schedule for name, schedule in live.items() if name not in desired}
    new = {name: schedule for name, schedule in desired.items() if name not in live}

    def counterparts(name: str) -> Iterator[str]:
        schedule = new[name]
        if schedule.get("replaces") in left and left[schedule["replaces"]]["slug"]:
            yield schedule["replaces"]
        same = [key for key, old in left.items() if schedules.is_same(schedule["schedule"], old["schedule"])]
        yield from sorted(same, key=lambda key: bool(left[key]["slug"]) != bool(schedule["slug"]))

    def with_changed_times(name: str) -> Iterator[str]:
        yield from () if new[name]["slug"] else (key for key, old in left.items() if not old["slug"])

    for candidates in (counterparts, with_changed_times):
        for name in [*new]:
            key = next(candidates(name), None)
            if key is not None:
                pairs += [(name, left.pop(key), new.pop(name))]
    pairs += [(name, None, schedule) for name, schedule in new.items()]
    return pairs + [(name, schedule, None) for name, schedule in left.items()]


def _schedule_differences(desired: Mapping[str, Any], live: Mapping[str, Any]) -> list[Difference]:
    listed: list[Difference] = []
    for name, old, new in pair_schedules(desired, live):
        if old is None or new is None:
            listed.append((f"schedules.{name}", _schedule_title(old), _schedule_title(new)))
            continue
        if not schedules.is_same(new["schedule"], old["schedule"]):
            titles = schedules.title(old["schedule"]), schedules.title(new["schedule"])
            both = titles if titles[0] != titles[1] else (old["schedule"], new["schedule"])
            listed.append((f"schedules.{name}", *both))
        if new["active"] is not None and new["active"] != old["active"]:
            listed.append((f"schedules.{name}.active", old["active"], new["active"]))
        if not is_same_value(new["parameters"] or {}, old["parameters"] or {}):
            listed.append((f"schedules.{name}.parameters", old["parameters"], new["parameters"]))
        if new["slug"] != old["slug"]:
            listed.append((f"schedules.{name}.slug", old["slug"], new["slug"]))
    return listed


def _schedule_title(schedule: Mapping[str, Any] | None) -> str | None:
    if schedule is None:
        return None
    return schedules.title(schedule["schedule"]) + ("" if schedule["active"] in (None, True) else ", paused")


def is_schedule_deleted(live: Mapping[str, Any], desired: Mapping[str, Any] | None) -> bool:
    """Return whether a sync deletes a schedule.

    The server cannot remove a slug. A schedule that loses its slug is deleted and created again.
    """
    return desired is None or bool(live["slug"] and not desired["slug"])
