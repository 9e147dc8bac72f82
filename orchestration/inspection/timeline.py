"""Reads the timeline of a run, from its creation to its end: its events, states and log in the Prefect API."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from logging import WARNING
from typing import Any
from urllib.parse import quote

from orchestration.errors import ApiError
from orchestration.prefect_api import CLOCK_TOLERANCE, JSON, Server
from orchestration.prefect_compat.events import POD_EVENT_PREFIX
from orchestration.protocol import POD_ENDED_EVENT
from orchestration.reconciler.run_events import GIVEN_UP_EVENT
from orchestration.reconciler.state_messages import split_log_tail

LOG_LINES = 10
"""How many lines of the run's log a timeline has."""

RUN_SUBMITTED_EVENT, RUN_EXECUTED_EVENT = "prefect.worker.submitted-flow-run", "prefect.worker.executed-flow-run"
"""Events of a worker. The first: the worker has claimed the run.

The second: the Kubernetes worker has created the run's Job; a worker of another type has seen the run end.
"""

POD_PHASES = ("pending", "running", "succeeded", "failed", "evicted")
"""The ends of the names of pod events. Source: prefect_kubernetes/observer.py."""

EVENTS_PER_PAGE = 50
"""The most events that the API returns at once."""

EVENT_TIME_TOLERANCE = timedelta(seconds=60)
"""By how much the clocks of worker, observer and reconciler may differ from the server's."""

WORKER_LOGGER = "prefect.flow_runs.worker"
"""The logger of a worker. Its lines about a run repeat the worker's events."""


@dataclass(frozen=True)
class TimelineEntry:
    """One entry of a timeline.

    Args:
        time: when it happened.
        source: run, worker, job, pod, state, reconciler or log.
        text: what happened.
    """

    time: datetime
    source: str
    text: str

    def as_json(self) -> JSON:
        """Return the entry as `orchestrate why --json` prints it."""
        return {"at": self.time.isoformat(), "who": self.source, "text": self.text}


async def find_run(server: Server, name: str) -> JSON:
    """Return the newest run with a name, or the run with an id.

    Args:
        server: the Prefect API.
        name: the name or id.

    Raises:
        ApiError: there is no such run.
    """
    body = {"flow_runs": {"name": {"any_": [name]}}, "sort": "EXPECTED_START_TIME_DESC"}
    found = await server.all("/flow_runs/filter", **body)
    if not found and len(name) == 36:
        run = await server.ask("GET", f"/flow_runs/{quote(name, safe='')}", absent=True)
        found = [run] if run else []
    if not found:
        raise ApiError(f"There is no run {name} on {server.url}. `orchestrate runs` lists the unfinished runs")
    return found[0]


async def read_timeline(server: Server, run: Mapping[str, Any]) -> list[TimelineEntry]:
    """Return the timeline of a run, oldest entry first: creation, claims, Jobs, pods, states and the end of the log.

    Args:
        server: the Prefect API.
        run: the run, as the API returns it.
    """
    states = await server.ask("GET", f"/flow_run_states/?flow_run_id={run['id']}")
    states.sort(key=lambda state: str(state["timestamp"]))
    events = await _read_events(server, run)
    entries = [await _creation_entry(server, run, states[0] if states else None)]
    recorded_pods = {event["payload"]["pod"] for event in events if event["event"] == POD_ENDED_EVENT}
    for event in events:
        if event["event"] == POD_ENDED_EVENT:
            entries += _pod_entries(event["payload"])
            continue
        is_pod_event = event["event"].startswith(POD_EVENT_PREFIX)
        if is_pod_event and event["resource"].get("prefect.resource.name") in recorded_pods:
            continue
        if entry := _event_entry(event):
            entries.append(entry)
    jobs = {entry.text.split()[0] for entry in entries if entry.source == "job"}
    entries += _state_entries(states, entries)
    namespace, _, job = str(run["infrastructure_pid"] or "").rpartition(":")
    claims = [state["timestamp"] for state in states if state["type"] == "PENDING"]
    if run["labels"].get("prefect.worker.type") == "kubernetes" and job and job not in jobs and claims:
        # The worker died before it emitted its event.
        entries.append(_job_entry(datetime.fromisoformat(claims[-1]), job, namespace))
    entries += await _read_log_entries(server, run, [state["message"] or "" for state in states])
    return sorted(entries, key=lambda entry: entry.time)


async def _creation_entry(server: Server, run: Mapping[str, Any], first: Mapping[str, Any] | None) -> TimelineEntry:
    """Return the entry that names the run's creator and due time.

    Args:
        server: the Prefect API.
        run: the run, as the API returns it.
        first: the first state of the run, if it has any.
    """
    deployment = None
    if run["deployment_id"]:
        deployment = await server.ask("GET", f"/deployments/{run['deployment_id']}", absent=True)
    created_by = run["created_by"] or {}
    if created_by.get("type") == "SCHEDULE":
        schedules = (deployment or {}).get("schedules", [])
        own = [schedule["schedule"] for schedule in schedules if schedule["id"] == created_by["id"]]
        rule = f" ({_schedule_rule(own[0])})" if own else ""
        creator = f"schedule {created_by['display_value']}{rule}"
    elif created_by:
        creator = f"{created_by['type'].lower()} {created_by['display_value']}"
    else:
        creator = "another run" if run["parent_task_run_id"] else "a person or a program, by the API"
    scheduled = first if first and first["type"] == "SCHEDULED" else None
    due = (scheduled and scheduled["state_details"].get("scheduled_time")) or run["expected_start_time"]
    of_deployment = f" of deployment {deployment['name']}" if deployment else ""
    has_message = scheduled and scheduled["message"] and scheduled["message"] != "Flow run scheduled"
    message = f": {scheduled['message']}" if scheduled and has_message else ""
    text = f"created by {creator}{of_deployment}, due at {_format_time(due)}{message}"
    return TimelineEntry(datetime.fromisoformat(run["created"]), "run", text)


def _schedule_rule(schedule: Mapping[str, Any]) -> str:
    """Return a schedule's rule and time zone as people write them."""
    rule = schedule.get("cron") or schedule.get("rrule") or f"every {timedelta(seconds=schedule.get('interval') or 0)}"
    return f"{rule}, {schedule['timezone']}" if schedule.get("timezone") else str(rule)


def _format_time(time: str) -> str:
    return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M:%S}"


async def _read_events(server: Server, run: Mapping[str, Any]) -> list[JSON]:
    """Return the events of worker, observer and reconciler about a run, oldest first."""
    names = [RUN_SUBMITTED_EVENT, RUN_EXECUTED_EVENT, GIVEN_UP_EVENT, POD_ENDED_EVENT]
    names += [POD_EVENT_PREFIX + phase for phase in POD_PHASES]
    found: dict[str, JSON] = {}
    since = datetime.fromisoformat(run["created"]) - EVENT_TIME_TOLERANCE
    while True:
        until = datetime.now(UTC) + EVENT_TIME_TOLERANCE
        event_filter = {
            "any_resource": {"id": [f"prefect.flow-run.{run['id']}"]},
            "event": {"name": names},
            "occurred": {"since": since.isoformat(), "until": until.isoformat()},
            "order": "ASC",
        }
        answer = await server.ask("POST", "/events/filter", {"filter": event_filter, "limit": EVENTS_PER_PAGE})
        page = answer["events"]
        new = [event for event in page if event["id"] not in found]
        found |= {event["id"]: event for event in new}
        if len(page) < EVENTS_PER_PAGE or not new:
            return list(found.values())
        since = datetime.fromisoformat(page[-1]["occurred"])


def _event_entry(event: Mapping[str, Any]) -> TimelineEntry | None:
    """Return the entry of an event; None if the event adds nothing."""
    time, name, resource = datetime.fromisoformat(event["occurred"]), event["event"], event["resource"]
    subject = resource.get("prefect.resource.name", "")
    if name == RUN_SUBMITTED_EVENT:
        return TimelineEntry(time, "worker", f"{subject} claimed it")
    if name == RUN_EXECUTED_EVENT:
        # The server may add the run a second time, without the worker's labels.
        related: JSON = next(
            (resource for resource in event["related"] if "prefect.infrastructure.identifier" in resource), {}
        )
        identifier = related.get("prefect.infrastructure.identifier", "")
        if resource.get("prefect.worker-type") != "kubernetes":
            code = related.get("prefect.infrastructure.status-code", "")
            return TimelineEntry(time, "worker", f"{subject} saw {identifier} end with status {code}")
        namespace, _, job = identifier.rpartition(":")
        return _job_entry(time, job, namespace) if job else None
    if name.startswith(POD_EVENT_PREFIX):
        phase, diagnosis = name.removeprefix(POD_EVENT_PREFIX), resource.get("kubernetes.diagnosis", "")
        # Prefect's observer calls a pod evicted whose container ended with any reason, an error included.
        reason = resource.get("kubernetes.reason") or diagnosis or ("Failed" if phase == "failed" else "Completed")
        texts = {"pending": f"does not start: {diagnosis}" if diagnosis else "created", "running": "started"}
        return TimelineEntry(time, "pod", f"{subject} {texts.get(phase, f'ended: {reason}')}")
    return TimelineEntry(time, "reconciler", str((event.get("payload") or {}).get("evidence") or name))


def _job_entry(time: datetime, job: str, namespace: str) -> TimelineEntry:
    return TimelineEntry(time, "job", f"{job} created in namespace {namespace}")


def _pod_entries(record: Mapping[str, Any]) -> list[TimelineEntry]:
    """Return the entries of a pod that has ended, from the reconciler's record of it."""
    pod = record["pod"]
    code = "" if record["code"] is None else f", exit code {record['code']}"
    peak = f", with at most {record['peak'] / 2**20:.0f} MiB of memory" if record["peak"] else ""
    texts = {
        "created": f"{pod} created",
        "scheduled": f"{pod} scheduled on {record['node']}",
        "started": f"{pod} started",
        "ended": f"{pod} ended: {record['reason']}{code}{peak}",
    }
    return [
        TimelineEntry(datetime.fromisoformat(record[moment]), "pod", text)
        for moment, text in texts.items()
        if record[moment]
    ]


def _state_entries(states: Sequence[Mapping[str, Any]], others: Sequence[TimelineEntry]) -> list[TimelineEntry]:
    """Return the entries of the states that no other entry covers.

    The entry of the creation covers the first state, a worker's entry covers its claim, and a pod's entry covers what
    the pod waits for.

    Args:
        states: all states of the run, oldest first.
        others: the entries of the run's creation, worker, Jobs and pods.
    """
    entries = []
    for number, state in enumerate(states):
        time = datetime.fromisoformat(state["timestamp"])
        if number == 0 and state["type"] == "SCHEDULED":
            continue
        claim_ended = next((later["timestamp"] for later in states[number:] if later["type"] != "PENDING"), None)
        until = datetime.fromisoformat(claim_ended) if claim_ended else datetime.max.replace(tzinfo=UTC)
        if number == 0 or states[number - 1]["type"] != "PENDING":
            claimed = time
        sources = {entry.source for entry in others if claimed - CLOCK_TOLERANCE <= entry.time < until}
        if state["name"] in ("Pending", "Submitting") and "worker" in sources and not state["message"]:
            continue
        if state["name"] == "InfrastructurePending" and "pod" in sources:
            continue
        message = f": {state['message']}" if state["message"] else ""
        due = state["state_details"].get("scheduled_time") if state["type"] == "SCHEDULED" else None
        due_text = f", due at {_format_time(due)}" if due and datetime.fromisoformat(due) > time else ""
        entries.append(TimelineEntry(time, "state", f"{state['name']}{due_text}{message}"))
    return entries


async def _read_log_entries(
    server: Server, run: Mapping[str, Any], state_messages: Sequence[str]
) -> list[TimelineEntry]:
    """Return the last lines of a run's log that neither the worker's events nor the messages of states repeat."""
    log_filter = {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "sort": "TIMESTAMP_DESC", "limit": 5 * LOG_LINES}
    in_states = {
        line.rpartition(" - ")[2] for message in state_messages for line in split_log_tail(message)[1].splitlines()
    }
    entries = [
        TimelineEntry(datetime.fromisoformat(line["timestamp"]), "log", line["message"])
        for line in await server.ask("POST", "/logs/filter", log_filter)
        if not (line["name"] == WORKER_LOGGER and line["level"] < WARNING)
    ]
    return [entry for entry in entries[:LOG_LINES] if entry.text.partition("\n")[0] not in in_states]
