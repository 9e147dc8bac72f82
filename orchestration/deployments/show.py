"""Plans and drift as people read them: coloured on a terminal, plain elsewhere."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orchestration.deployments.drift import Drift
from orchestration.deployments.plan import ADOPT, CHANGE, CREATE, DELETE, END, FINISH, FORGET, KEEP, Plan
from orchestration.deployments.resources import Difference, Object
from orchestration.deployments.schedules import title

MARKS = {
    CREATE: ("+", "create", "32"),
    CHANGE: ("~", "change", "33"),
    ADOPT: ("<", "adopt", "36"),
    FINISH: (">", "finish", "33"),
    END: ("-", "pause, delete after its runs", "31"),
    DELETE: ("-", "delete", "31"),
    FORGET: ("-", "forget, it is gone", "31"),
}

FEW = 50
"""Changes that a sync lists; of more it says how many."""

WIDTH = 60
"""Letters of a value that are shown."""


def _coloured(text: str, colour: str) -> str:
    return f"\033[{colour}m{text}\033[0m" if sys.stdout.isatty() else text


def plan(found: Plan) -> None:
    """Print what a sync would do."""
    _changes(found)
    notes(found)
    counts = Counter(MARKS[each.action][1] for each in found.changes)
    said = ", ".join(f"{number} to {word}" for word, number in counts.items())
    print(f"{found.owner}: {said}." if said else f"{found.owner}: nothing to do, {_has(found)} as the files say.")


def _changes(found: Plan) -> None:
    for each in found.changes:
        mark, word, colour = MARKS[each.action]
        kind, key = each.name
        print(_coloured(f"{mark} {kind:<21} {key}", colour) + f"  ({word})")
        _fields(_of_new(each.wanted) if each.action == CREATE and each.wanted else each.fields)


def done(carried_out: Plan) -> None:
    """Print what a sync did."""
    if not carried_out.changes:
        print(f"{carried_out.owner}: nothing to do, {_has(carried_out)} as the files say.")
        return
    for line in carried_out.deferred:
        print(_coloured(f"! {line}", "33"))
    past = {CREATE: "created", CHANGE: "changed", ADOPT: "adopted", FINISH: "finished", DELETE: "deleted",
            END: "paused until their runs end", FORGET: "forgotten", KEEP: "kept"}  # fmt: skip
    counts = Counter(past[each.action] for each in carried_out.changes)
    print(f"{carried_out.owner}: {', '.join(f'{number} {word}' for word, number in counts.items())}.")


def _has(found: Plan) -> str:
    number = len(found.record.applied)
    return f"{number} thing{'' if number == 1 else 's'} {'is' if number == 1 else 'are'}"


def notes(found: Plan) -> None:
    """Print what to know."""
    for note in found.notes:
        print(_coloured(f"! {note}", "33"))
    cut_off = sorted({each.since for each in found.changes if each.since})
    if cut_off:
        print(
            _coloured(f"! A sync that began at {cut_off[0][:19]} UTC was cut off; what it had begun is finished", "33")
        )


def plan_json(found: Plan) -> None:
    """Print it for programs."""
    print(
        json.dumps(
            {
                "owner": found.owner,
                "changes": [each.json() for each in found.changes],
                "notes": found.notes,
            },
            indent=2,
            default=str,
        )
    )


def report(about: Plan) -> None:
    """Print what a sync is about to do, if that is little, and what to know."""
    if len(about.changes) <= FEW:
        _changes(about)
    notes(about)


def drift_json(owner: str, found: Sequence[Drift]) -> None:
    """Print it for programs."""
    print(json.dumps({"owner": owner, "drift": [each.json() for each in found]}, indent=2, default=str))


def drift(owner: str, found: Sequence[Drift]) -> None:
    """Print what changed since the last sync."""
    for each in found:
        when = f", {each.when[:19].replace('T', ' ')} UTC" if each.when else ""
        by = f" by {each.by}" if each.by else ""
        print(
            _coloured(f"{'~' if each.fields else '-'} {each.kind:<21} {each.key}", "33" if each.fields else "31"),
            end="",
        )
        print(f"  ({'changed' if each.fields else 'deleted'}{by}{when})")
        _fields(each.fields)
    if found:
        print(f"{owner}: {len(found)} changed since its last sync. `orchestrate sync` brings back what the files say.")
    else:
        print(f"{owner}: all is as its last sync left it.")


def _of_new(wanted: Object) -> list[Difference]:
    """What is worth seeing of something new."""
    seen = ("entrypoint", "work_pool_name", "type", "limit", "concurrency_limit", "value")
    listed: list[Difference] = [
        (name, None, wanted.fields[name]) for name in seen if wanted.fields.get(name) is not None
    ]
    listed += [
        (f"schedules.{name}", None, title(each["schedule"]))
        for name, each in (wanted.fields.get("schedules") or {}).items()
    ]
    return listed + [(f"triggers.{name}", None, "...") for name in wanted.fields.get("triggers") or {}]


def _fields(fields: Sequence[Difference]) -> None:
    width = min(max((len(name) for name, _, _ in fields), default=0), 40)
    for name, old, new in fields:
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
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
