"""Print plans and drift for people, in colour on a terminal, or as JSON."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.deployments.drift import Drift
from orchestration.deployments.masking import mask
from orchestration.deployments.plan import ADOPT, CHANGE, CREATE, DELETE, END, FINISH, FORGET, KEEP, Plan
from orchestration.deployments.resources import Difference, Object
from orchestration.deployments.schedules import title
from orchestration.terminal import json_text, one_line

MARKS = {
    CREATE: ("+", "create", "32"),
    CHANGE: ("~", "change", "33"),
    ADOPT: ("<", "adopt", "36"),
    FINISH: (">", "finish", "33"),
    END: ("-", "pause, delete after its runs", "31"),
    DELETE: ("-", "delete", "31"),
    FORGET: ("-", "forget, it no longer exists", "31"),
}

MAX_LISTED_CHANGES = 50
"""A sync lists up to this many changes. Of more it prints only the number."""

MAX_VALUE_CHARACTERS = 60
"""A longer value is cut."""


def _coloured(text: str, colour: str) -> str:
    return f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() else text


def print_plan(plan: Plan) -> None:
    """Print the changes that a sync would make."""
    _print_changes(plan)
    _print_notes(plan)
    counts = Counter(MARKS[change.action][1] for change in plan.changes)
    summary = ", ".join(f"{number} to {word}" for word, number in counts.items())
    print(f"{plan.owner}: {summary or _no_changes(plan)}.")


def print_plan_json(plan: Plan) -> None:
    """Print a plan as JSON."""
    document = {"owner": plan.owner, "changes": [change.json() for change in plan.changes], "notes": plan.notes}
    print(json_text(document))


def print_start(plan: Plan) -> None:
    """Print the notes of a sync that starts, and its changes if they are few."""
    if len(plan.changes) <= MAX_LISTED_CHANGES:
        _print_changes(plan)
    _print_notes(plan)


def print_result(plan: Plan) -> None:
    """Print what a sync did."""
    if not plan.changes:
        print(f"{plan.owner}: {_no_changes(plan)}.")
        return
    for line in plan.deferred:
        print(_coloured(f"! {line}", "33"))
    past = {CREATE: "created", CHANGE: "changed", ADOPT: "adopted", FINISH: "finished", DELETE: "deleted",
            END: "paused until their runs end", FORGET: "forgotten", KEEP: "kept"}  # fmt: skip
    counts = Counter(past[change.action] for change in plan.changes)
    print(f"{plan.owner}: {', '.join(f'{number} {word}' for word, number in counts.items())}.")


def _no_changes(plan: Plan) -> str:
    number = len(plan.record.applied)
    return f"nothing to do, {number} object{' matches' if number == 1 else 's match'} the files"


def _print_changes(plan: Plan) -> None:
    for change in plan.changes:
        mark, word, colour = MARKS[change.action]
        kind, key = change.name
        print(_coloured(f"{mark} {kind:<21} {one_line(key)}", colour) + f"  ({word})")
        _print_fields(_main_fields(change.desired) if change.action == CREATE and change.desired else change.fields)


def _print_notes(plan: Plan) -> None:
    for note in plan.notes:
        print(_coloured(f"! {note}", "33"))
    cut_off = sorted({change.since for change in plan.changes if change.since})
    if cut_off:
        line = f"! A sync that began at {cut_off[0][:19]} UTC was cut off. A sync finishes what it had begun"
        print(_coloured(line, "33"))


def print_drift_json(owner: str, drifted: Sequence[Drift]) -> None:
    """Print drift as JSON."""
    print(json_text({"owner": owner, "drift": [item.json() for item in drifted]}))


def print_drift(owner: str, drifted: Sequence[Drift]) -> None:
    """Print what changed on the server since the last sync."""
    for item in drifted:
        when = f", {item.when[:19].replace('T', ' ')} UTC" if item.when else ""
        by = f" by {one_line(item.by)}" if item.by else ""
        mark, colour, word = ("~", "33", "changed") if item.fields else ("-", "31", "deleted")
        print(_coloured(f"{mark} {item.kind:<21} {one_line(item.key)}", colour) + f"  ({word}{by}{when})")
        _print_fields(item.fields)
    if drifted:
        print(f"{owner}: {len(drifted)} changed since the last sync. `orchestrate sync` restores what the files say.")
    else:
        print(f"{owner}: no drift since the last sync.")


def _main_fields(desired: Object) -> list[Difference]:
    """Return the fields of a new object that are worth printing."""
    shown = ("entrypoint", "work_pool_name", "type", "limit", "concurrency_limit", "value")
    listed: list[Difference] = [
        (name, None, desired.fields[name]) for name in shown if desired.fields.get(name) is not None
    ]
    listed += [
        (f"schedules.{name}", None, title(schedule["schedule"]))
        for name, schedule in (desired.fields.get("schedules") or {}).items()
    ]
    listed += [(f"triggers.{name}", None, "...") for name in desired.fields.get("triggers") or {}]
    return mask(listed, desired.masked)


def _print_fields(fields: Sequence[Difference]) -> None:
    width = min(max((len(name) for name, _, _ in fields), default=0), 40)
    for name, old, new in ((one_line(name), old, new) for name, old, new in fields):
        if old is None and new is not None:
            print(f"    {name:<{width}}  {_value(new)}")
        else:
            print(f"    {name:<{width}}  {_value(old)} -> {_value(new)}")


def _value(value: Any) -> str:
    if value is None:
        return "(none)"
    if isinstance(value, Mapping | list | bool):
        value = json.dumps(value, default=str)
    text = str(value).replace("\n", " ")
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 3] + "..."
