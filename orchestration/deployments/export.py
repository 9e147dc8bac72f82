"""Export the live state as a file of desired state. A sync of that file changes nothing."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestration.deployments import live_state, placeholders, schedules, triggers
from orchestration.deployments import record as records
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
    matches_every_event,
)
from orchestration.prefect_api import JSON, Server
from orchestration.terminal import printable

RESOLVED_FIELDS = (
    "description",
    "version",
    "tags",
    "entrypoint",
    "path",
    "parameters",
    "job_variables",
    "work_pool_name",
    "work_queue_name",
)
"""Fields of a deployment in which a sync resolves all placeholders but a run's context."""


async def read(server: Server, owner: str, *, mine: bool) -> tuple[dict[Name, Object], Counter[str]]:
    """Return the objects that an owner could sync, and the number of the other owners' objects by owner.

    Args:
        server: the server.
        owner: the owner.
        mine: without objects that have no owner. A queue belongs to the owner of its pool.
    """
    live, by_owner = await asyncio.gather(live_state.read_all(server), records.read_all(server))
    recorded_owners = records.owners(by_owner.values())

    def owner_of(item: Object) -> str:
        pool = (POOL, item.key.partition("/")[0])
        return recorded_owners.get(item.name) or (recorded_owners.get(pool, "") if item.kind == QUEUE else "")

    owners = {item.name: owner_of(item) for item in live.values()}
    exported = (owner,) if mine else (owner, "")
    kept = {name: item for name, item in live.items() if owners[name] in exported}
    if mine and owner in by_owner:
        for name, item in kept.items():
            if item.kind == DEPLOYMENT:
                kept[name], _ = triggers.claim(item, by_owner[owner].triggers(name))
    return kept, Counter(other for other in owners.values() if other not in (owner, ""))


def find_inexpressible(live: Mapping[Name, Object]) -> dict[Name, str]:
    """Return the objects that a file cannot express, with the reason."""
    found = ((item.name, _inexpressible(item)) for item in live.values())
    return {name: reason for name, reason in found if reason}


def _inexpressible(item: Object) -> str:
    """Return why a file cannot express an object; "" if it can."""
    fields = item.fields
    if item.kind != DEPLOYMENT:
        everything = {"name": item.key, **fields}
        resolved = iter([name for name, value in everything.items() if placeholders.has_unresolved(value, ("$",))])
    elif not fields["entrypoint"]:
        return "has no entrypoint"
    elif not fields["work_pool_name"]:
        return "has no work pool: the process that serves its flow (flow.serve) keeps it"
    else:
        resolved = _resolved_fields(fields)
    if name := next(resolved, ""):
        return f"has a placeholder in its {name}, which a sync would resolve"
    if item.kind != DEPLOYMENT:
        return ""
    if placeholders.is_resolved_at_run_start(fields["parameters"]):
        return "has a parameter with a __prefect_kind, which the server resolves at the start of a run"
    if any(matches_every_event(trigger["trigger"]) for trigger in fields["triggers"].values()):
        return "has a trigger on every event, also on those of its own runs, which a sync refuses"
    problems = (schedules.find_problem(schedule["schedule"]) for schedule in fields["schedules"].values())
    if problem := next(filter(None, problems), None):
        return f"has a schedule that a sync refuses: {problem}"
    return ""


def _resolved_fields(fields: JSON) -> Iterator[str]:
    """Yield the fields of a deployment with a placeholder that a sync would resolve or refuse."""
    yield from (name for name in RESOLVED_FIELDS if placeholders.has_placeholder(fields[name]))
    if placeholders.has_placeholder(fields["schedules"], None):
        yield "schedules"
    if placeholders.has_unresolved(fields["pull_steps"], ("$",)):
        yield "pull"
    for name, trigger in fields["triggers"].items():
        entry = _trigger(name, trigger)
        parameters = entry.pop("parameters", None)
        if placeholders.has_placeholder(entry, None) or placeholders.has_placeholder(parameters, placeholders.EVERY):
            yield "triggers"


def document(live: Mapping[Name, Object], owner: str, directory: Path) -> JSON:
    """Return the file of desired state that declares objects of a server.

    Args:
        live: the objects.
        owner: the `name` of the file.
        directory: the working directory of runs that the file leaves out.
    """
    left_out = find_inexpressible(live)
    by_kind: dict[str, list[Object]] = {}
    for item in live.values():
        if item.name not in left_out:
            by_kind.setdefault(item.kind, []).append(item)
    file: JSON = {"name": owner}
    file["deployments"] = [_deployment(item, directory) for item in by_kind.get(DEPLOYMENT, [])]
    queues = by_kind.get(QUEUE, [])
    file["work_pools"] = [
        {"name": pool.key}
        | _drop_empty(pool.fields)
        | {
            "queues": [
                {"name": queue.key.partition("/")[2]} | _drop_empty(queue.fields)
                for queue in queues
                if queue.key.partition("/")[0] == pool.key
            ]
        }
        for pool in by_kind.get(POOL, [])
        if not pool.key.startswith("prefect") and pool.fields["type"] != "prefect-agent"
    ]
    file["variables"] = [
        {"name": item.key, "value": item.fields["value"]} | _drop_empty({"tags": item.fields["tags"]})
        for item in by_kind.get(VARIABLE, [])
    ]
    file["remote_file_systems"] = [
        {"name": item.key} | _drop_empty(item.fields) for item in by_kind.get(FILE_SYSTEM, [])
    ]
    file["concurrency_limits"] = [{"name": item.key} | item.fields for item in by_kind.get(LIMIT, [])]
    file["tag_concurrency_limits"] = [
        {"tag": item.key, "limit": item.fields["concurrency_limit"]} for item in by_kind.get(TAG_LIMIT, [])
    ]
    file["automations"] = [
        {"name": item.key} | _drop_empty(item.fields) | {"actions": item.fields["actions"]}
        for item in by_kind.get(AUTOMATION, [])
    ]
    return {key: value for key, value in file.items() if value}


def text(file: JSON) -> str:
    """Return a file as YAML."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, _: Any) -> bool:
            return True

    text = str(yaml.dump(file, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120))
    if printable(text) == text:
        return text
    # YAML needs its own escapes for the characters that the terminal output escapes.
    return str(yaml.dump(file, Dumper=Dumper, sort_keys=False, width=120))


def _drop_empty(fields: Mapping[str, Any]) -> JSON:
    """Return the fields without those whose absence means the same."""
    return {key: value for key, value in fields.items() if value not in (None, "", [], {})}


def _deployment(live: Object, directory: Path) -> JSON:
    fields = live.fields
    entry: JSON = {"name": live.key.rpartition("/")[2], "entrypoint": fields["entrypoint"]}
    entry |= _drop_empty({key: fields[key] for key in ("description", "version", "path", "tags", "parameters")})
    if not fields["enforce_parameter_schema"]:
        entry["enforce_parameter_schema"] = False
    pool = {"name": fields["work_pool_name"], "job_variables": fields["job_variables"]}
    if fields["work_queue_name"] != "default":
        pool["work_queue_name"] = fields["work_queue_name"]
    entry["work_pool"] = _drop_empty(pool)
    entry |= _drop_empty(
        {
            "concurrency_limit": _drop_empty(
                {"limit": fields["concurrency_limit"]} | (fields["concurrency_options"] or {})
            )
        }
    )
    if fields["paused"]:
        entry["paused"] = True
    # A sync refuses a schedule that a deployment has twice without a slug.
    listed = [*map(_schedule, fields["schedules"].values())]
    entry |= _drop_empty({"schedules": [*{json.dumps(one, sort_keys=True): one for one in listed}.values()]})
    entry |= _drop_empty({"triggers": [_trigger(name, trigger) for name, trigger in fields["triggers"].items()]})
    if fields["pull_steps"] != [{"prefect.deployments.steps.set_working_directory": {"directory": str(directory)}}]:
        entry["pull"] = fields["pull_steps"]
    return entry


def _schedule(schedule: Mapping[str, Any]) -> JSON:
    entry = dict(schedule["schedule"])
    if entry.get("day_or") is True:
        del entry["day_or"]
    if not schedule["active"]:
        entry["active"] = False
    return entry | _drop_empty({"parameters": schedule["parameters"], "slug": schedule["slug"]})


def _trigger(name: str, automation: Mapping[str, Any]) -> JSON:
    """Return the trigger of which Prefect makes this automation, the inverse of `resources.read_trigger`."""
    action = next(action for action in automation["actions"] if action.get("deployment_id") == DEPLOYMENT_PLACEHOLDER)
    entry: JSON = {"name": name} | automation["trigger"] | _drop_empty({"description": automation["description"]})
    if not automation["enabled"]:
        entry["enabled"] = False
    entry |= {key: action[key] for key in ("parameters", "job_variables") if action.get(key) is not None}
    if action.get("schedule_after"):
        entry["schedule_after"] = action["schedule_after"]
    return entry
