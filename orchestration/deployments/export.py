"""A server's present state as a file: synced back it changes nothing."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestration.deployments import live_state as api
from orchestration.deployments import placeholders
from orchestration.deployments import record as records_of
from orchestration.deployments.resources import (
    AUTOMATION,
    DEPLOYMENT,
    FILE_SYSTEM,
    LIMIT,
    NOBODY,
    POOL,
    QUEUE,
    TAG_LIMIT,
    VARIABLE,
    Name,
    Object,
    fires_on_everything,
)
from orchestration.prefect_api import JSON, Server

FILLED_IN = (
    "description",
    "version",
    "tags",
    "entrypoint",
    "path",
    "parameters",
    "job_variables",
    "work_pool_name",
    "work_queue_name",
    "schedules",
)
"""Fields of a deployment in which a file's placeholders are filled in."""


async def of(server: Server, owner: str, *, mine: bool) -> tuple[dict[Name, Object], Counter[str]]:
    """What of a server is an owner's to sync, and how much of others is left out, by owner.

    Args:
        server: whose things these are.
        owner: who would sync them.
        mine: without what nobody owns, but for what comes with a pool of the owner's.
    """
    found, records = await asyncio.gather(api.everything(server), records_of.all_of(server))
    owners = records_of.owners(records.values())

    def owned_by(each: Object) -> str:
        pool = (POOL, each.key.partition("/")[0])
        return owners.get(each.name) or (owners.get(pool, "") if each.kind == QUEUE else "")

    of_whom = {each.name: owned_by(each) for each in found.values()}
    ours = (owner,) if mine else (owner, "")
    kept = {name: each for name, each in found.items() if of_whom[name] in ours}
    return kept, Counter(whose for whose in of_whom.values() if whose not in (owner, ""))


def unsaid(found: Mapping[Name, Object]) -> dict[Name, str]:
    """What no file can say, and why."""
    reasons: dict[Name, str] = {}
    for each in found.values():
        if each.kind != DEPLOYMENT:
            continue
        fields = each.fields
        if not fields["entrypoint"]:
            reasons[each.name] = "has no entrypoint"
        elif not fields["work_pool_name"]:
            reasons[each.name] = "has no work pool: the process that serves its flow (flow.serve) keeps it"
        elif name := next((name for name in FILLED_IN if placeholders.has_placeholder(fields[name])), ""):
            reasons[each.name] = f"has a placeholder in its {name}, which reading a file would fill in"
        elif placeholders.is_resolved_at_run_start(fields["parameters"]):
            reasons[each.name] = "has a parameter with a __prefect_kind, which is for a run"
        elif any(fires_on_everything(trigger["trigger"]) for trigger in fields["triggers"].values()):
            reasons[each.name] = "has a trigger of every event, also those of its own runs, which no file may have"
    return reasons


def document(found: Mapping[Name, Object], owner: str, directory: Path) -> JSON:
    """The file that says what `found` is.

    Args:
        found: of a server.
        owner: for its `name`.
        directory: of runs that need not be said.
    """
    of: dict[str, list[Object]] = {}
    for each in found.values():
        of.setdefault(each.kind, []).append(each)
    file: JSON = {"name": owner}
    left = unsaid(found)
    file["deployments"] = [_deployment(each, directory) for each in of.get(DEPLOYMENT, []) if each.name not in left]
    queues = of.get(QUEUE, [])
    file["work_pools"] = [
        {"name": each.key}
        | _said(each.fields)
        | {
            "queues": [
                {"name": queue.key.partition("/")[2]} | _said(queue.fields)
                for queue in queues
                if queue.key.partition("/")[0] == each.key
            ]
        }
        for each in of.get(POOL, [])
        if not each.key.startswith("prefect") and each.fields["type"] != "prefect-agent"
    ]
    file["variables"] = [
        {"name": each.key, "value": each.fields["value"]} | _said({"tags": each.fields["tags"]})
        for each in of.get(VARIABLE, [])
    ]
    file["remote_file_systems"] = [{"name": each.key} | _said(each.fields) for each in of.get(FILE_SYSTEM, [])]
    file["concurrency_limits"] = [{"name": each.key} | each.fields for each in of.get(LIMIT, [])]
    file["tag_concurrency_limits"] = [
        {"tag": each.key, "limit": each.fields["concurrency_limit"]} for each in of.get(TAG_LIMIT, [])
    ]
    file["automations"] = [{"name": each.key} | _said(each.fields) for each in of.get(AUTOMATION, [])]
    return {key: value for key, value in file.items() if value}


def text(file: JSON) -> str:
    """The file as YAML."""

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, _: Any) -> bool:
            return True

    return str(yaml.dump(file, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120))


def _said(fields: Mapping[str, Any]) -> JSON:
    """Without what a file need not say."""
    return {key: value for key, value in fields.items() if value not in (None, "", [], {})}


def _deployment(each: Object, directory: Path) -> JSON:
    fields = each.fields
    made: JSON = {"name": each.key.rpartition("/")[2], "entrypoint": fields["entrypoint"]}
    made |= _said({key: fields[key] for key in ("description", "version", "path", "tags", "parameters")})
    if not fields["enforce_parameter_schema"]:
        made["enforce_parameter_schema"] = False
    pool = {"name": fields["work_pool_name"], "job_variables": fields["job_variables"]}
    if fields["work_queue_name"] != "default":
        pool["work_queue_name"] = fields["work_queue_name"]
    made["work_pool"] = _said(pool)
    made |= _said(
        {"concurrency_limit": _said({"limit": fields["concurrency_limit"]} | (fields["concurrency_options"] or {}))}
    )
    if fields["paused"]:
        made["paused"] = True
    made |= _said({"schedules": [_schedule(schedule) for schedule in fields["schedules"].values()]})
    made |= _said({"triggers": [_trigger(name, trigger) for name, trigger in fields["triggers"].items()]})
    if fields["pull_steps"] != [{"prefect.deployments.steps.set_working_directory": {"directory": str(directory)}}]:
        made["pull"] = fields["pull_steps"]
    return made


def _schedule(schedule: Mapping[str, Any]) -> JSON:
    made = dict(schedule["schedule"])
    if made.get("day_or") is True:
        del made["day_or"]
    if not schedule["active"]:
        made["active"] = False
    return made | _said({"parameters": schedule["parameters"], "slug": schedule["slug"]})


def _trigger(name: str, automation: Mapping[str, Any]) -> JSON:
    """A trigger of which this automation is made: the other way round than `objects.trigger`."""
    action = next(each for each in automation["actions"] if each.get("deployment_id") == NOBODY)
    made: JSON = {"name": name} | automation["trigger"] | _said({"description": automation["description"]})
    if not automation["enabled"]:
        made["enabled"] = False
    made |= {key: action[key] for key in ("parameters", "job_variables") if action.get(key) is not None}
    if action.get("schedule_after"):
        made["schedule_after"] = action["schedule_after"]
    return made
