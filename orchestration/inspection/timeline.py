"""What became of a run, from its creation to its end, and which runs do not get on; all of it from the API."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from logging import WARNING
from typing import Any
from urllib.parse import quote

from orchestration import diagnoses
from orchestration.diagnosis_table import JOB_REFUSED, STARTING_STATES, STATE_DIAGNOSES, Diagnosis
from orchestration.errors import ApiError
from orchestration.prefect_api import CLOCK, JSON, Server
from orchestration.prefect_compat.events import POD_EVENT_PREFIX
from orchestration.protocol import CAUSE_LABEL, CLAIM_LOST, FINAL_STATES, LOST_LABEL, POD_ENDED_EVENT, SETTLED_LABEL
from orchestration.reconciler.run_events import GIVEN_UP_EVENT
from orchestration.reconciler.state_messages import diagnosis_of, is_job_refusal, is_unclaimed, split_log_tail
from orchestration.terminal import one_line

PATIENCE = timedelta(seconds=60)
"""How long a run may be late, claimed or to be cancelled before it counts as stuck."""

WAITING = STARTING_STATES | {JOB_REFUSED}
"""States of a claimed run that say in their message what it waits for."""

LINES = 10
"""Of a run's log."""

SUBMITTED, EXECUTED = "prefect.worker.submitted-flow-run", "prefect.worker.executed-flow-run"
"""Events of a worker: it has claimed a run; and it has made the run's Job or, where that is none, seen the run end."""

PHASES = ("pending", "running", "succeeded", "failed", "evicted")
"""Events of the worker's observer, where it is on: this and a pod's phase. Source: prefect_kubernetes/observer.py."""

AT_ONCE = 50
"""Events that the API gives at most."""

SUBMITTER = "prefect.flow_runs.worker"
"""The logger of a worker, which says of a run what its events say."""


@dataclass(frozen=True)
class Moment:
    """A line of a timeline.

    Args:
        at: when.
        who: run, worker, job, pod, state, reconciler or log.
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
    """From creation to end: who created and claimed a run, its Jobs, pods and states, and the end of its log."""
    states = await server.ask("GET", f"/flow_run_states/?flow_run_id={run['id']}")
    states.sort(key=lambda each: str(each["timestamp"]))
    events = await _events(server, run)
    moments = [await _created(server, run, states[0] if states else None)]
    noted = {event["payload"]["pod"] for event in events if event["event"] == POD_ENDED_EVENT}
    for event in events:
        if event["event"] == POD_ENDED_EVENT:
            moments += _of_pod(event["payload"])
        elif not (
            event["event"].startswith(POD_EVENT_PREFIX) and event["resource"].get("prefect.resource.name") in noted
        ):
            moments += [each] if (each := _of_event(event)) else []
    jobs = {each.text.split()[0] for each in moments if each.who == "job"}
    moments += _of_states(states, moments)
    namespace, _, job = str(run["infrastructure_pid"] or "").rpartition(":")
    claims = [each["timestamp"] for each in states if each["type"] == "PENDING"]
    if run["labels"].get("prefect.worker.type") == "kubernetes" and job and job not in jobs and claims:
        # Its worker died before it said so.
        moments.append(Moment(datetime.fromisoformat(claims[-1]), "job", f"{job} made in namespace {namespace}"))
    moments += await _log(server, run, [each["message"] or "" for each in states])
    return sorted(moments, key=lambda each: each.at)


async def _created(server: Server, run: Mapping[str, Any], first: Mapping[str, Any] | None) -> Moment:
    """By whom, and for when."""
    deployment = None
    if run["deployment_id"]:
        deployment = await server.ask("GET", f"/deployments/{run['deployment_id']}", absent=True)
    by = run["created_by"] or {}
    if by.get("type") == "SCHEDULE":
        mine = [each["schedule"] for each in (deployment or {}).get("schedules", []) if each["id"] == by["id"]]
        rule = next((f" ({_rule(each)})" for each in mine), "")
        who = f"schedule {by['display_value']}{rule}"
    elif by:
        who = f"{by['type'].lower()} {by['display_value']}"
    else:
        who = "another run" if run["parent_task_run_id"] else "a person or a program, by the API"
    scheduled = first if first and first["type"] == "SCHEDULED" else None
    due = (scheduled and scheduled["state_details"].get("scheduled_time")) or run["expected_start_time"]
    of = f" of deployment {deployment['name']}" if deployment else ""
    said = scheduled["message"] if scheduled and scheduled["message"] != "Flow run scheduled" else ""
    text = f"created by {who}{of}, due at {_clock(due)}{f': {said}' if said else ''}"
    return Moment(datetime.fromisoformat(run["created"]), "run", text)


def _rule(schedule: Mapping[str, Any]) -> str:
    """A schedule, as people write it."""
    rule = schedule.get("cron") or schedule.get("rrule") or f"every {timedelta(seconds=schedule.get('interval') or 0)}"
    return f"{rule}, {schedule['timezone']}" if schedule.get("timezone") else str(rule)


def _clock(time: str) -> str:
    return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M:%S}"


async def _events(server: Server, run: Mapping[str, Any]) -> list[JSON]:
    """What worker, observer and reconciler said of a run, the first one first."""
    found: dict[str, JSON] = {}
    since = datetime.fromisoformat(run["created"]) - PATIENCE  # of other clocks
    while True:
        which = {
            "any_resource": {"id": [f"prefect.flow-run.{run['id']}"]},
            "event": {
                "name": [
                    SUBMITTED,
                    EXECUTED,
                    GIVEN_UP_EVENT,
                    POD_ENDED_EVENT,
                    *(POD_EVENT_PREFIX + each for each in PHASES),
                ]
            },
            "occurred": {"since": since.isoformat(), "until": (datetime.now(UTC) + PATIENCE).isoformat()},
            "order": "ASC",
        }
        page = (await server.ask("POST", "/events/filter", {"filter": which, "limit": AT_ONCE}))["events"]
        new = [each for each in page if each["id"] not in found]
        found |= {each["id"]: each for each in new}
        if len(page) < AT_ONCE or not new:
            return list(found.values())
        since = datetime.fromisoformat(page[-1]["occurred"])


def _of_event(event: Mapping[str, Any]) -> Moment | None:
    """The line of an event; none if it says nothing."""
    at, name, resource = datetime.fromisoformat(event["occurred"]), event["event"], event["resource"]
    subject = resource.get("prefect.resource.name", "")
    if name == SUBMITTED:
        return Moment(at, "worker", f"{subject} claimed it")
    if name == EXECUTED:
        # The server may add the run once more, without what the worker says of it.
        of: JSON = next((each for each in event["related"] if "prefect.infrastructure.identifier" in each), {})
        made, code = (of.get(f"prefect.infrastructure.{each}", "") for each in ("identifier", "status-code"))
        namespace, _, job = made.rpartition(":")
        if resource.get("prefect.worker-type") != "kubernetes":
            return Moment(at, "worker", f"{subject} saw {made} end with status {code}")
        return Moment(at, "job", f"{job} made in namespace {namespace}") if job else None
    if name.startswith(POD_EVENT_PREFIX):
        phase, why = name.removeprefix(POD_EVENT_PREFIX), resource.get("kubernetes.diagnosis", "")
        # It calls each pod evicted whose container ended with a reason, be it an error.
        reason = resource.get("kubernetes.reason") or why or ("Failed" if phase == "failed" else "Completed")
        said = {"pending": f"does not start: {why}" if why else "created", "running": "started"}
        return Moment(at, "pod", f"{subject} {said.get(phase, f'ended: {reason}')}")
    return Moment(at, "reconciler", str((event.get("payload") or {}).get("evidence") or name))


def _of_pod(told: Mapping[str, Any]) -> list[Moment]:
    """The lines of a pod that the reconciler saw ended."""
    pod, times = told["pod"], {name: told[name] for name in ("created", "scheduled", "started", "ended")}
    code = "" if told["code"] is None else f", exit code {told['code']}"
    peak = f", with at most {told['peak'] / 2**20:.0f} MiB of memory" if told["peak"] else ""
    text = {
        "created": f"{pod} created",
        "scheduled": f"{pod} put on {told['node']}",
        "started": f"{pod} started",
        "ended": f"{pod} ended: {told['reason']}{code}{peak}",
    }
    return [Moment(datetime.fromisoformat(at), "pod", text[name]) for name, at in times.items() if at]


def _of_states(states: Sequence[Mapping[str, Any]], others: Sequence[Moment]) -> list[Moment]:
    """The states that say what no other line says: the first is in that of the creation, a claim in its worker's, what
    the pod waits for in the pod's.
    """
    found = []
    for number, state in enumerate(states):
        at = datetime.fromisoformat(state["timestamp"])
        if number == 0 and state["type"] == "SCHEDULED":
            continue
        then = next((each["timestamp"] for each in states[number:] if each["type"] != "PENDING"), None)
        until = datetime.fromisoformat(then) if then else datetime.max.replace(tzinfo=UTC)
        if number == 0 or states[number - 1]["type"] != "PENDING":
            claimed = at
        told = {each.who for each in others if claimed - CLOCK <= each.at < until}
        if state["name"] in ("Pending", "Submitting") and "worker" in told and not state["message"]:
            continue
        if state["name"] == "InfrastructurePending" and "pod" in told:
            continue
        said = f": {state['message']}" if state["message"] else ""
        due = state["state_details"].get("scheduled_time") if state["type"] == "SCHEDULED" else None
        when = f", due at {_clock(due)}" if due and datetime.fromisoformat(due) > at else ""
        found.append(Moment(at, "state", f"{state['name']}{when}{said}"))
    return found


async def _log(server: Server, run: Mapping[str, Any], told: Sequence[str]) -> list[Moment]:
    """The end of a run's log, without what its worker's events and the messages of its states have."""
    logs = {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "sort": "TIMESTAMP_DESC", "limit": 5 * LINES}
    there = {line.rpartition(" - ")[2] for message in told for line in split_log_tail(message)[1].splitlines()}
    lines = [
        Moment(datetime.fromisoformat(line["timestamp"]), "log", line["message"])
        for line in await server.ask("POST", "/logs/filter", logs)
        if not (line["name"] == SUBMITTER and line["level"] < WARNING)
    ]
    return [each for each in lines[:LINES] if each.text.partition("\n")[0] not in there]


@dataclass(frozen=True)
class Finding:
    """Why a run is where it is.

    Args:
        sentence: for people.
        diagnoses: what it suffers from, if anything.
    """

    sentence: str
    diagnoses: tuple[Diagnosis, ...] = ()

    @property
    def pages(self) -> list[str]:
        """Return the paths of the diagnoses' pages."""
        return [diagnoses.path(each) for each in self.diagnoses]


async def diagnosis(server: Server, run: Mapping[str, Any]) -> Finding:
    """Why a run is where it is."""
    state, labels = run["state"], run["labels"] or {}
    name, kind, said = state["name"], state["type"], split_log_tail(state["message"] or "")[0]
    now = datetime.now(UTC)
    since = now - datetime.fromisoformat(state["timestamp"])
    if kind in FINAL_STATES:
        settled = labels.get(SETTLED_LABEL) == state["id"]
        retried = " No retry is left" if settled else ""
        sentence = f"It is {name}{f': {said}' if said else ''}.{retried}".replace("..", ".")
        given_up: tuple[Diagnosis, ...] = ("given-up",) if settled else ()
        if kind == "FAILED" and diagnosis_of(said) == "deadline":
            return Finding(sentence, ("deadline",))
        return Finding(sentence, (*_of_crash(said, labels), *given_up) if kind == "CRASHED" else ())
    if kind == "RUNNING":
        job = (run["infrastructure_pid"] or "unknown").rpartition(":")[2]
        return Finding(f"It runs since {_spoken(since)}, in Job {job}.")
    if kind == "PENDING":
        if name in WAITING and said:
            return Finding(said, (STATE_DIAGNOSES[name],) if name in STATE_DIAGNOSES else ())
        if name == CLAIM_LOST:
            return Finding(said, ("claim-lost",))
        worker = labels.get("prefect.worker.name")
        by = f" by worker {worker}" if worker else ""
        waits = "its pod starts, or the worker went away"
        lost: tuple[Diagnosis, ...] = ("claim-lost",) if since > PATIENCE else ()
        return Finding(f"It was claimed{by} {_spoken(since)} ago and has not begun: {waits}.", lost)
    if kind == "CANCELLING":
        sentence = f"It is to be cancelled since {_spoken(since)}; its process gets the pod's grace period."
        return Finding(sentence, ("cancelling",))
    due = datetime.fromisoformat(state["state_details"].get("scheduled_time") or run["expected_start_time"])
    # Prefect itself calls it so where a flow has failed and has retries of its own.
    before = _of_crash(said, labels) if name == "AwaitingRetry" and said.startswith("Retry ") else ()
    if is_unclaimed(said):
        before = ("claim-lost",)
    if is_job_refusal(said):
        before = ("refused",)
    if due > now:
        return Finding(f"It is due in {_spoken(due - now)}{f': {said}' if said else '.'}", before)
    sentence = f"It is late by {_spoken(now - due)}: {await _hindrance(server, run)}"
    return Finding(sentence, (*before, "late"))


def _of_crash(said: str, labels: Mapping[str, Any]) -> tuple[Diagnosis, ...]:
    """Of what a run crashed; what the reconciler noted says more than what a process said of itself."""
    found = diagnosis_of(said)
    noted = labels.get(CAUSE_LABEL)
    if found == "crash" and noted in ("oom", "disruption"):
        found = noted
    return (found, "fenced") if labels.get(LOST_LABEL) else (found,)


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
        "next_scheduled_start_time": {"before_": (now - (PATIENCE if stuck else timedelta())).isoformat()},
    }
    top = {"parent_task_run_id": {"is_null_": True}}
    found = [*await server.all("/flow_runs/filter", flow_runs=due | top)]
    for run in await server.all("/flow_runs/filter", flow_runs=live | top):
        waited = now - datetime.fromisoformat(run["state"]["timestamp"])
        hopeless = run["state_name"] in WAITING and run["state"]["message"]
        if not stuck or hopeless or (run["state_type"] != "RUNNING" and waited > PATIENCE):
            found.append(run)
    found.sort(key=lambda each: str(each["expected_start_time"]))
    why = [await diagnosis(server, run) for run in found]
    return [
        {
            "id": run["id"],
            "name": run["name"],
            "state": run["state_name"],
            "since": run["state"]["timestamp"],
            "work_pool": run.get("work_pool_name"),
            "why": each.sentence,
            "see": each.pages,
        }
        for run, each in zip(found, why, strict=True)
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
    rows = [tuple(one_line(each[name]) for name in ("name", "state", "why")) for each in runs]
    width, states = (max((len(each[column]) for each in rows), default=0) for column in (0, 1))
    for name, state, why in rows:
        print(f"{name:<{width}}  {state:<{states}}  {why}")
    if not runs:
        print("None.")


def show(moments: Sequence[Moment], found: Finding, *, as_json: bool) -> None:
    """Print a timeline, and below it the diagnosis and the title and path of each page about it."""
    if as_json:
        lines = [each.json() for each in moments]
        print(json.dumps({"timeline": lines, "diagnosis": found.sentence, "see": found.pages}, indent=2))
        return
    colours = {"state": "1", "log": "2"} if sys.stdout.isatty() else {}
    width = max(len(each.who) for each in moments)
    for each in moments:
        first, *more = each.text.splitlines() or [""]
        line = f"{each.at.astimezone(UTC):%Y-%m-%d %H:%M:%S}  {each.who:<{width}}  {first}"
        print(f"\033[{colours.get(each.who, '36')}m{line}\033[0m" if colours else line)
        for below in more:
            print(f"{'':<{width + 23}}{below}")
    print(f"\n{found.sentence}")
    for name in found.diagnoses:
        print(f"{diagnoses.title(name)}. See {diagnoses.path(name)}, or run: orchestrate explain {name}")
