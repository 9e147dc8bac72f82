"""What became of a run, from its creation to its end, and which runs do not get on; all of it from the API."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from orchestration.api import JSON, Server
from orchestration.errors import ApiError
from orchestration.reconciler.causes import STARTING
from orchestration.reconciler.facts import FINAL

PATIENCE = timedelta(seconds=60)
"""How long a run may be late, claimed or to be cancelled before it counts as stuck."""

LINES = 10
"""Of a run's log."""

SHOWN = ("prefect.worker.submitted-flow-run", "prefect.worker.executed-flow-run", "reconciler.flow-run.given-up")
"""Events that say what no state of the run says; of others the states are there."""


@dataclass(frozen=True)
class Moment:
    """A line of a timeline.

    Args:
        at: when.
        who: state, event or log.
        text: what.
    """

    at: datetime
    who: str
    text: str

    def json(self) -> JSON:
        """For programs."""
        return {"at": self.at.isoformat(), "who": self.who, "text": self.text}


async def named(server: Server, name: str) -> JSON:
    """The newest run of that name, or the one of that id.

    Raises:
        ApiError: there is none.
    """
    body = {"flow_runs": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_DESC"}
    found = await server.all("/flow_runs/filter", **body)
    if not found and len(name) == 36:
        one = await server.ask("GET", f"/flow_runs/{quote(name, safe='')}", absent=True)
        found = [one] if one else []
    if not found:
        raise ApiError(f"There is no run {name} on {server.url}. `orchestrate runs` lists those that are under way")
    return found[0]


async def timeline(server: Server, run: Mapping[str, Any]) -> list[Moment]:
    """States, events and the end of the log of a run, in order."""
    moments: list[Moment] = []
    for state in await server.ask("GET", f"/flow_run_states/?flow_run_id={run['id']}"):
        said = f": {state['message']}" if state["message"] else ""
        moments.append(Moment(datetime.fromisoformat(state["timestamp"]), "state", f"{state['name']}{said}"))
    which = {"any_resource": {"id": [f"prefect.flow-run.{run['id']}"]}, "event": {"name": list(SHOWN)}}
    for event in (await server.ask("POST", "/events/filter", {"filter": which, "limit": 50}))["events"]:
        said = (event.get("payload") or {}).get("evidence") or event["event"]
        moments.append(Moment(datetime.fromisoformat(event["occurred"]), "event", str(said)))
    logs = {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "sort": "TIMESTAMP_DESC", "limit": LINES}
    moments += [
        Moment(datetime.fromisoformat(line["timestamp"]), "log", line["message"])
        for line in await server.ask("POST", "/logs/filter", logs)
    ]
    return sorted(moments, key=lambda each: each.at)


async def diagnosis(server: Server, run: Mapping[str, Any]) -> str:
    """Why a run is where it is, in a sentence."""
    state = run["state"]
    name, kind, said = state["name"], state["type"], (state["message"] or "").partition("\n")[0]
    now = datetime.now(UTC)
    since = now - datetime.fromisoformat(state["timestamp"])
    if kind in FINAL:
        retried = " No retry is left" if (run.get("labels") or {}).get("reconciler.settled") == state["id"] else ""
        return f"It is {name}{f': {said}' if said else ''}.{retried}".replace("..", ".")
    if kind == "RUNNING":
        return f"It runs since {_spoken(since)}, in Job {(run['infrastructure_pid'] or 'unknown').rpartition(':')[2]}."
    if kind == "PENDING":
        if name in STARTING and said:
            return said
        worker = (run.get("labels") or {}).get("prefect.worker.name")
        by = f" by worker {worker}" if worker else ""
        return f"It was claimed{by} {_spoken(since)} ago and has not begun: its pod starts, or the worker went away."
    if kind == "CANCELLING":
        return f"It is to be cancelled since {_spoken(since)}; its process gets the pod's grace period."
    due = datetime.fromisoformat(run["expected_start_time"])
    if due > now:
        return f"It is due in {_spoken(due - now)}{f': {said}' if said else '.'}"
    return f"It is late by {_spoken(now - due)}: {await _hindrance(server, run)}"


async def _hindrance(server: Server, run: Mapping[str, Any]) -> str:
    """What keeps a run that is due from being claimed."""
    if run["state"]["name"] == "AwaitingConcurrencySlot":
        return "the deployment's concurrency limit is reached. Its other runs end first"
    name = run.get("work_pool_name")
    if not name:
        return "it has no work pool. Deploy it with one"
    pool = await server.ask("GET", f"/work_pools/{quote(name, safe='')}")
    if pool["is_paused"]:
        return f"work pool {name} is paused. Resume it: prefect work-pool resume {name}"
    path = f"/work_pools/{quote(name, safe='')}/queues/{quote(run['work_queue_name'], safe='')}"
    queue = await server.ask("GET", path)
    if queue["is_paused"]:
        return f"queue {queue['name']} of work pool {name} is paused. Resume it in the UI"
    if pool["status"] == "NOT_READY":
        return f"work pool {name} has no worker. See its pods: kubectl get pods -l app.kubernetes.io/component=worker"
    full = [each["name"] for each in (pool, queue) if each["concurrency_limit"] is not None]
    if full:
        return f"a concurrency limit may be reached, that of {' or '.join(full)}. Raise it, or wait"
    return "a worker takes it with its next look, unless it takes only other queues"


async def under_way(server: Server, *, stuck: bool) -> list[JSON]:
    """Runs that are due and not over, each with `why`; or only those that do not get on.

    Args:
        server: of the runs.
        stuck: only those that are late, claimed or to be cancelled for longer than `PATIENCE`.
    """
    now = datetime.now(UTC)
    live = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    due = {
        "state": {"type": {"any_": ["SCHEDULED"]}},
        "expected_start_time": {"before_": (now - (PATIENCE if stuck else timedelta())).isoformat()},
    }
    top = {"parent_task_run_id": {"is_null_": True}}
    found = [*await server.all("/flow_runs/filter", flow_runs=due | top)]
    for run in await server.all("/flow_runs/filter", flow_runs=live | top):
        waited = now - datetime.fromisoformat(run["state"]["timestamp"])
        hopeless = run["state_name"] in STARTING and run["state"]["message"]
        if not stuck or hopeless or (run["state_type"] != "RUNNING" and waited > PATIENCE):
            found.append(run)
    found.sort(key=lambda each: str(each["expected_start_time"]))
    return [
        {
            "id": run["id"],
            "name": run["name"],
            "state": run["state_name"],
            "since": run["state"]["timestamp"],
            "work_pool": run.get("work_pool_name"),
            "why": await diagnosis(server, run),
        }
        for run in found
    ]


def _spoken(time: timedelta) -> str:
    seconds = int(time.total_seconds())
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"


def show_runs(runs: Sequence[JSON], *, as_json: bool) -> None:
    """Print them, one a line."""
    if as_json:
        print(json.dumps(runs, indent=2))
        return
    width = max((len(each["name"]) for each in runs), default=0)
    states = max((len(each["state"]) for each in runs), default=0)
    for each in runs:
        print(f"{each['name']:<{width}}  {each['state']:<{states}}  {each['why']}")
    if not runs:
        print("None.")


def show(moments: Sequence[Moment], sentence: str, *, as_json: bool) -> None:
    """Print a timeline, and below it the diagnosis."""
    if as_json:
        print(json.dumps({"timeline": [each.json() for each in moments], "diagnosis": sentence}, indent=2))
        return
    colours = {"state": "1", "event": "36", "log": "2"} if sys.stdout.isatty() else {}
    for each in moments:
        first, *more = each.text.splitlines() or [""]
        line = f"{each.at:%Y-%m-%d %H:%M:%S}  {each.who:<5}  {first}"
        print(f"\033[{colours[each.who]}m{line}\033[0m" if colours else line)
        for below in more:
            print(f"{'':<28}{below}")
    print(f"\n{sentence}")
