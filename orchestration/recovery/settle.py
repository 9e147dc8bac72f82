"""Settle the runs of a restored database against what was executed since the backup.

The database is as it was at the backup. Runs that it calls Scheduled or Running may have been executed since, and a run
that it does not have may be executing. Settling happens before any process of the server uses the database, in one
transaction, so no run starts on what the backup says.

Evidence of a run, the strongest first:

1. a final state in the replaced database, if there is one
2. a live pod of the run's newest Job
3. another state in the replaced database
4. how the pod of the newest Job ended

Kubernetes deletes the Jobs of finished runs after `runs.ttlSecondsAfterFinished`, and without the replaced database
nothing else tells that a run was executed. A run without evidence that was due before the workers stopped is therefore
held: it becomes Paused, and a person resumes or cancels it.

A run that another cluster executes, or a pool of another type than Kubernetes, has no Job here. It keeps the state of
the newest database that has it, and a person looks.
"""

import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from orchestration.prefect_compat import server_records
from orchestration.prefect_compat.server_internals import schedule_dates
from orchestration.prefect_compat.server_records import Record
from orchestration.protocol import CLUSTER_LABEL, FINAL_STATES, NAMESPACE_LABEL, SETTLED_LABEL, claim_of
from orchestration.reconciler.snapshot import CRASH_READ_FOR
from orchestration.recovery.executions import Evidence, Execution, Outcome
from orchestration.recovery.executions import read as read_executions
from orchestration.terminal import one_line

HELD = "Held"
"""The name of the Paused state of a run of which nothing tells whether it was executed since the backup."""

KEPT_COLUMNS = (
    "name", "parameters", "idempotency_key", "tags", "auto_scheduled", "expected_start_time", "job_variables",
)  # fmt: skip
"""The columns of the replaced database with which a run is created again."""

MAX_DATES = 100_000
"""How many dates of one schedule are looked at."""

KEPT_DETAILS = ("scheduled_time", "pause_reschedule", "pause_timeout", "pause_key", "run_input_keyset")
"""The details of a state of the replaced database that the same state has afterwards."""

LEASE = "deployment_concurrency_lease_id"
"""The detail of a state that names the lease of the run's concurrency slot, which is in Redis."""

DATES_AT_ONCE = 500
"""How many dates are asked for at once. Prefect returns up to 1,000."""


@dataclass(frozen=True)
class Settlement:
    """What is done about a run, and why.

    Args:
        run: the run's id; empty for scheduled times that have no run.
        name: the run's name, or the deployment's.
        before: the name of its state in the backup; empty if the backup does not have the run.
        after: the name of its state afterwards; empty if it has none.
        reason: the evidence.
        needs_person: whether a person has to decide or to look.
        state: the state to set; None to set none.
        labels: the labels to set.
        job: its Job as NAMESPACE:NAME; empty to keep the recorded one.
        creates: the fields of the run if it has to be created.
        is_live: whether it is being executed.
        holds_slot: whether it holds a concurrency slot if it is being executed.
    """

    run: str
    name: str
    before: str
    after: str
    reason: str
    needs_person: bool = False
    state: Record | None = None
    labels: Mapping[str, Any] = field(default_factory=dict)
    job: str = ""
    creates: Record | None = None
    is_live: bool = False
    holds_slot: bool = True

    def as_json(self) -> Record:
        """Return the settlement as it is printed."""
        columns = ("run", "name", "before", "after", "reason", "needs_person")
        return {column: getattr(self, column) for column in columns}


@dataclass(frozen=True)
class Moment:
    """When the database was backed up, and since when no worker claims runs.

    Args:
        backup: the time of the backup.
        stopped: since when no worker claims runs.
    """

    backup: datetime
    stopped: datetime


def decide(
    run: Record,
    execution: Execution | None,
    previous: Record | None,
    moment: Moment,
    *,
    clusters: Collection[str] = (),
    start_unknown: bool = False,
    is_cluster_read: bool = True,
) -> Settlement | None:
    """Return the settlement of a run of the restored database; None if the run stays as it is.

    Args:
        run: the run in the restored database.
        execution: its newest execution in the cluster.
        previous: the run in the replaced database.
        moment: the times of the backup and of the stop.
        clusters: the identities of the cluster that showed the executions; empty if they are not known.
        start_unknown: let runs without evidence start as they are.
        is_cluster_read: whether Jobs and pods were read. Else their absence tells nothing.
    """
    state = run["state"]
    previous_type = previous["state"]["type"] if previous else ""
    if execution and execution.is_live and previous_type not in FINAL_STATES:
        # The pod of a run that had ended at the backup may still live, for example as long as a sidecar does.
        is_later = execution.created_at > _time_of(state)
        return _live(run, execution, previous or run) if is_later or state["type"] not in FINAL_STATES else None
    if previous and previous_type not in ("PENDING", "RUNNING", "CANCELLING"):
        return _as_before(run, previous)
    if state["type"] in FINAL_STATES - {"CRASHED"} and not previous:
        return None
    if execution and any(_is_over_before(execution, known["state"]) for known in (run, previous) if known):
        execution = None
    if not execution and (place := _place_elsewhere(previous or run, run["pool_type"], clusters)):
        return _elsewhere(run, previous or run, f"it is executed by {place}, whose executions are not known here")
    unread = "Jobs and pods were not read"
    if previous and not is_cluster_read:
        # Its pod may be alive. The reconciler finds its Job, or that it is gone.
        return _elsewhere(run, previous, f"it was {previous['state']['name']} before the restore, and {unread}")
    if execution and execution.outcome is Outcome.COMPLETED and state["type"] == "PAUSED" and not previous:
        # The engine ends with exit code 0 when its flow is suspended, too.
        reason = (
            f"the pod of Job {execution.job} ended with exit code 0: it was suspended, or resumed and completed since"
        )
        return _unchanged(run, reason)
    if execution and execution.outcome in (Outcome.COMPLETED, Outcome.FAILED):
        return _ended(run, execution)
    seen = f"Job {execution.job} shows no end" if execution else "no Job or pod of it is left"
    seen = seen if is_cluster_read else unread
    if previous:
        seen = f"it was {previous['state']['name']} before the restore, and {seen}"
    if state["type"] == "CRASHED":
        reason = f"{seen}: it may have been retried since. It is not retried again"
        return _unchanged(run, reason, {SETTLED_LABEL: state["id"]})
    if "CANCELLING" in (state["type"], previous_type):
        reason = f"{seen}, and it was being cancelled"
        return _set(run, {"type": "CANCELLED", "name": "Cancelled", "message": _message(reason)}, reason)
    if state["type"] == "PAUSED":
        return None
    if state["type"] == "SCHEDULED" and not execution and not previous:
        due = datetime.fromisoformat(run["next_scheduled_start_time"] or run["expected_start_time"])
        if due > moment.stopped:
            return None
    if start_unknown and state["type"] == "SCHEDULED":
        return _unchanged(run, f"{seen}: it starts, as asked")
    reason = f"{seen}: whether it was executed since the backup is unknown"
    if run["deployment_id"] is None:
        return _set(run, {"type": "CRASHED", "name": "Crashed", "message": _message(reason)}, reason, needs_person=True)
    message = _message(f"{reason}. Resume it to execute it, or cancel it")
    # With `pause_reschedule` a resumed run becomes Scheduled, and a worker claims it.
    held = {"type": "PAUSED", "name": HELD, "message": message, "state_details": {"pause_reschedule": True}}
    return _set(run, held, reason, needs_person=True)


def _is_over_before(execution: Execution, state: Record) -> bool:
    """Return whether an execution had ended when a state was set: what it tells is part of that state."""
    if execution.ended_at and execution.ended_at < _time_of(state):
        return True
    # A worker creates the Job of an attempt after the run is scheduled.
    return state["type"] == "SCHEDULED" and execution.created_at < _time_of(state)


def _place_elsewhere(newest: Record, pool_type: str, clusters: Collection[str]) -> str:
    """Return where a run in progress is executed if that is not in this cluster; else empty."""
    if newest["state"]["type"] not in ("PENDING", "RUNNING", "CANCELLING") or newest["deployment_id"] is None:
        return ""
    if pool_type != "kubernetes":
        return f"a work pool of type {pool_type}" if pool_type else "a process without a work pool"
    cluster = (newest["labels"] or {}).get(CLUSTER_LABEL, "")
    return f"cluster {cluster}" if cluster and clusters and cluster not in clusters else ""


def _elsewhere(run: Record, newest: Record, reason: str) -> Settlement:
    """Return the settlement of a run whose execution is not shown: its state in the newest database."""
    reason = f"{reason}. Look whether it is in progress"
    state: Record | None = None
    is_recorded = run["infrastructure_pid"] == newest["infrastructure_pid"]
    if run["state"]["type"] != newest["state"]["type"] or not is_recorded:
        state = {key: newest["state"][key] for key in ("type", "name")}
        state |= {"message": _message(reason), "state_details": _lease(newest)}
        if claim := claim_of((newest["infrastructure_pid"] or "").rpartition(":")[2]):
            state["id"] = str(UUID(f"{uuid4().hex[:20]}{claim}"))
    return Settlement(
        run["id"], run["name"], run["state"]["name"], newest["state"]["name"], reason, True, state,
        newest["labels"] or {}, newest["infrastructure_pid"] or "", None, True,
    )  # fmt: skip


def decide_unknown(execution: Execution, previous: Record | None, queue: str) -> Settlement | None:
    """Return the settlement of a run that the restored database does not have; None if nothing is left of the run.

    Args:
        execution: its newest execution in the cluster.
        previous: the run in the replaced database.
        queue: the id of the default queue of its work pool.
    """
    if not execution.is_live or (previous and previous["state"]["type"] in FINAL_STATES):
        return None
    if not execution.flow or (execution.outcome is Outcome.WAITING and not previous):
        reason = f"its flow has not begun, and its parameters are not in the backup. Job {execution.job} is deleted"
        return Settlement(execution.run, execution.name, "", "", f"{reason}. Start it again", needs_person=True)
    kept = {column: previous[column] for column in KEPT_COLUMNS} if previous else {"name": execution.name}
    kept.setdefault("expected_start_time", execution.created_at)
    fields = kept | {
        "id": execution.run,
        "flow_id": execution.flow,
        "deployment_id": execution.deployment or None,
        "work_queue_id": queue or None,
    }
    absent = {"id": execution.run, "name": execution.name, "state": {"type": "", "name": ""}}
    found = _live(absent, execution, previous or absent)
    note = "" if queue else ". Its work pool is not in the backup: create it again"
    return Settlement(
        found.run, found.name, "", found.after, f"{found.reason}. It began after the backup{note}", not queue,
        found.state, found.labels, found.job, fields, True, found.holds_slot,
    )  # fmt: skip


def decide_lost(
    previous: Record,
    execution: Execution | None,
    moment: Moment,
    *,
    queue: str,
    has_deployment: bool,
    clusters: Collection[str] = (),
    is_cluster_read: bool = True,
) -> Settlement | None:
    """Return the settlement of an unfinished run that only the replaced database has, and whose pod is not live.

    Args:
        previous: the run in the replaced database.
        execution: its newest execution in the cluster.
        moment: the times of the backup and of the stop.
        queue: the id of its work queue in the restored database; empty if there is none.
        has_deployment: whether the restored database has its deployment.
        clusters: the identities of the cluster that showed the executions; empty if they are not known.
        is_cluster_read: whether Jobs and pods were read.
    """
    state = previous["state"]
    lacks = "" if has_deployment or not previous["deployment_id"] else "deployment"
    lacks = lacks or ("" if queue or not previous["pool_type"] else "work pool")
    if lacks and state["type"] in ("SCHEDULED", "PAUSED"):
        reason = f"it was {state['name']} before the restore, and its {lacks} is not in the backup"
        return Settlement(
            previous["id"], previous["name"], "", "", f"{reason}. Create the {lacks}, and start the run again", True
        )
    unset = {"id": "", "type": "", "name": "", "message": "", "timestamp": state["timestamp"], "state_details": {}}
    absent = previous | {"state": unset, "infrastructure_pid": ""}
    if not has_deployment:
        absent["deployment_id"] = None
    found = decide(absent, execution, previous, moment, clusters=clusters, is_cluster_read=is_cluster_read)
    fields = {column: previous[column] for column in (*KEPT_COLUMNS, "id", "flow_id", "deployment_id")}
    fields["work_queue_id"] = queue or None
    return found and replace(found, creates=fields, reason=f"{found.reason}. The backup does not have it")


def _time_of(state: Record) -> datetime:
    """Return when a state was set. The API and the database have different types."""
    return datetime.fromisoformat(str(state["timestamp"])) if state["timestamp"] else datetime.min.replace(tzinfo=UTC)


def _live(run: Record, execution: Execution, newest: Record) -> Settlement:
    """Return the settlement of a run whose pod is alive.

    Args:
        run: the run in the restored database.
        execution: its execution.
        newest: the run in the newest database that has it.
    """
    job = f"{execution.namespace}:{execution.job}"
    is_running = execution.outcome is Outcome.RUNNING
    type_, name = ("RUNNING", "Running") if is_running else ("PENDING", "Pending")
    if newest["state"]["type"] == "CANCELLING":
        type_, name = "CANCELLING", "Cancelling"
    reason = f"Job {execution.job} {'executes it' if is_running else 'starts it'}"
    details = _lease(newest)
    is_paused = newest["state"]["type"] == "PAUSED" and execution.created_at <= _time_of(newest["state"])
    if is_paused:
        # The flow waits for a person, and would take `Running` for an approval.
        type_, name, details = "PAUSED", newest["state"]["name"], _kept_details(newest["state"])
        reason = f"Job {execution.job} waits until a person resumes it"
    labels = {NAMESPACE_LABEL: execution.namespace}
    if execution.cluster:
        labels[CLUSTER_LABEL] = execution.cluster
    live: Record = {"type": type_, "name": name, "message": _message(reason), "state_details": details}
    if claim := execution.claim:
        # The id of a claim's state ends with the claim: a later claim fences this Job.
        live["id"] = str(UUID(f"{uuid4().hex[:20]}{claim}"))
    state: Record | None = live
    is_recorded = run.get("infrastructure_pid") == job and run["state"]["type"] == type_
    if is_recorded and not (is_paused and _kept_details(run["state"]) != details):
        state, labels, job, name = None, {}, "", run["state"]["name"]
    # The server releases the slot of a run that is paused.
    return Settlement(
        run["id"], run["name"], run["state"]["name"], name, reason, False, state, labels, job, None, True, not is_paused
    )


def _lease(newest: Record) -> Record:
    """Return the lease of the run's concurrency slot: with it the server releases the slot once, not twice."""
    lease = newest["state"].get("state_details", {}).get(LEASE)
    return {LEASE: lease} if lease else {}


def _kept_details(state: Record) -> Record:
    return {key: state["state_details"][key] for key in KEPT_DETAILS if state["state_details"].get(key)}


def _as_before(run: Record, previous: Record) -> Settlement | None:
    """Return the settlement of a run that has the state of the replaced database."""
    old, new = run["state"], previous["state"]
    if (old["type"], old["name"], old["message"]) == (new["type"], new["name"], new["message"]):
        return None
    if old["type"] in FINAL_STATES and new["type"] in FINAL_STATES:
        return None
    reason = "so it was before the restore"
    state: Record = {key: new[key] for key in ("type", "name", "message")} | {"state_details": _kept_details(new)}
    labels = {}
    if new["type"] == "CRASHED":
        state["id"] = str(uuid4())
        labels = {SETTLED_LABEL: state["id"]}
        reason = f"{reason}. It is not retried again"
    return _set(run, state, reason, labels=labels)


def _ended(run: Record, execution: Execution) -> Settlement:
    """Return the settlement of a run whose pod has ended."""
    reason = f"the pod of Job {execution.job} ended with exit code {execution.exit_code}"
    is_completed = execution.outcome is Outcome.COMPLETED
    type_, name = ("COMPLETED", "Completed") if is_completed else ("FAILED", "Failed")
    state = {"type": type_, "name": name, "message": _message(reason)}
    labels = {NAMESPACE_LABEL: execution.namespace}
    return _set(
        run, state, reason, needs_person=not is_completed, labels=labels, job=f"{execution.namespace}:{execution.job}"
    )


def _set(
    run: Record,
    state: Record,
    reason: str,
    *,
    needs_person: bool = False,
    labels: Mapping[str, Any] | None = None,
    job: str = "",
) -> Settlement:
    before = run["state"]["name"]
    return Settlement(run["id"], run["name"], before, state["name"], reason, needs_person, state, labels or {}, job)


def _unchanged(run: Record, reason: str, labels: Mapping[str, Any] | None = None) -> Settlement:
    name = run["state"]["name"]
    return Settlement(run["id"], run["name"], name, name, reason, needs_person=True, labels=labels or {})


def _message(reason: str) -> str:
    return f"Settled after a restore: {reason}."


async def settle(
    file: Path | None, moment: Moment, *, replaced: str = "", start_unknown: bool = False
) -> list[Settlement]:
    """Settle the runs of the database that Prefect's settings name, in one transaction; return what was done.

    Args:
        file: the Jobs and pods of runs, from `executions.pack`; None if they were not read.
        moment: the times of the backup and of the stop.
        replaced: the database that the restore replaces, as a URL of libpq; empty if there is none.
        start_unknown: let runs without evidence start as they are.

    Raises:
        SettingsError: the file is absent or damaged.
    """
    async with server_records.transaction() as session:
        previous: dict[str, Record] = {}
        previous_pools: dict[str, str] = {}
        if replaced:
            try:
                previous_pools = server_records.read_previous_pools(replaced)
            except server_records.UnreadableError as error:
                print(f"The replaced database cannot be read, and is no evidence: {error}.", file=sys.stderr)
                replaced = ""
        pools = await server_records.read_pools(session)
        evidence = read_executions(file, pools.keys() | previous_pools.keys()) if file else Evidence()
        executions = evidence.executions
        crashed_since = moment.backup - CRASH_READ_FOR
        runs = await server_records.read_runs(session, executions.keys(), crashed_since)
        ids = {run["id"] for run in runs}
        if replaced:
            previous = server_records.read_previous_runs(replaced, ids | executions.keys())
            # A run that had ended at the backup may have been retried since.
            retried = await server_records.read_runs(session, previous.keys() - ids, crashed_since)
            runs += [run for run in retried if run["id"] not in ids]
            ids |= previous.keys() & {run["id"] for run in runs}
        found = [
            decide(
                run,
                executions.get(run["id"]),
                previous.get(run["id"]),
                moment,
                clusters=evidence.clusters,
                start_unknown=start_unknown,
                is_cluster_read=file is not None,
            )
            for run in runs
            if run["deployment_id"] or not run["parent_task_run_id"]
        ]
        default_queues = dict(pools.values())
        queue_of = {pool: default_queues.get(name, "") for pool, name in previous_pools.items()}
        queue_of |= {pool: queue for pool, (_, queue) in pools.items()}
        deployments_left, queues_left = await server_records.read_places(session)
        found += [
            decide_unknown(execution, previous.get(execution.run), queue_of.get(execution.pool, ""))
            for execution in executions.values()
            if execution.run not in ids and (execution.is_live or execution.run not in previous)
        ]
        lost = [
            run
            for run_id, run in previous.items()
            if run_id not in ids
            and run["state"]["type"] not in FINAL_STATES
            and not (run_id in executions and executions[run_id].is_live)
            and (run["deployment_id"] or not run["parent_task_run_id"])
        ]
        # The scheduler makes the run of a time again, with another id, when a deployment is changed.
        taken = await server_records.read_keys(
            session, [run["idempotency_key"] for run in lost if run["idempotency_key"]]
        )
        found += [
            decide_lost(
                run,
                executions.get(run["id"]),
                moment,
                queue=run["work_queue_id"] if run["work_queue_id"] in queues_left else queue_of.get(run["pool"], ""),
                has_deployment=run["deployment_id"] in deployments_left,
                clusters=evidence.clusters,
                is_cluster_read=file is not None,
            )
            for run in lost
            if run["state"]["type"] != "SCHEDULED" or run["idempotency_key"] not in taken
        ]
        done = [settlement for settlement in found if settlement]
        live = {settlement.run for settlement in done if settlement.is_live}
        done += await _settle_subflows(session, runs, live, previous)
        for settlement in done:
            await _carry_out(session, settlement, executions, previous)
        deployments = {run["id"]: run["deployment_id"] for run in runs}
        deployments |= {
            run: executions[run].deployment if run in executions else previous[run]["deployment_id"]
            for run in live
            if run not in ids
        }
        holders = [settlement.run for settlement in done if settlement.is_live and settlement.holds_slot]
        await server_records.reset_slots(session, [deployments[run] for run in holders])
        return done + await _find_times_without_run(session, moment, replaced)


async def _settle_subflows(
    session: Any, runs: Sequence[Record], live: set[str], previous: Mapping[str, Record]
) -> list[Settlement]:
    """Return the settlements of subflows, which are executed in the pod of their parent, whose parent is not live."""
    subflows = [
        run
        for run in runs
        if run["parent_task_run_id"] and not run["deployment_id"] and run["state"]["type"] not in FINAL_STATES
    ]
    parents = await server_records.read_parents(session, {run["parent_task_run_id"] for run in subflows})
    alive = set(live)
    # A subflow of a live run is live, and so are the subflows of that subflow.
    while more := {run["id"] for run in subflows if parents.get(run["parent_task_run_id"]) in alive} - alive:
        alive |= more
    reason = "its parent has ended"
    crashed = {"type": "CRASHED", "name": "Crashed", "message": _message(reason)}
    return [
        (_as_before(run, previous[run["id"]]) if run["id"] in previous else None) or _set(run, dict(crashed), reason)
        for run in subflows
        if run["id"] not in alive
    ]


async def _carry_out(
    session: Any, settlement: Settlement, executions: Mapping[str, Execution], previous: Mapping[str, Record]
) -> None:
    if settlement.creates:
        run = settlement.run
        flow_name = previous[run]["flow_name"] if run in previous else executions[run].flow_name
        await server_records.create_run(session, flow_name, settlement.creates)
    if settlement.state:
        await server_records.set_run_state(session, settlement.run, settlement.state, settlement.labels, settlement.job)
    elif settlement.labels:
        await server_records.label_run(session, settlement.run, settlement.labels)


async def _find_times_without_run(session: Any, moment: Moment, replaced: str) -> list[Settlement]:
    """Return the deployments with scheduled times since the backup for which neither database has a run.

    The scheduler makes runs an hour or three runs ahead, and none for a time in the past.
    """
    found: Counter[str] = Counter()
    times: dict[str, list[datetime]] = {}
    for schedule in await server_records.read_schedules(session):
        start = moment.backup + timedelta(microseconds=1)
        form = {key: value for key, value in schedule["schedule"].items() if value is not None}
        dates = read_dates(form, start, moment.stopped)
        keys = {server_records.schedule_key(schedule["deployment_id"], schedule["id"], date): date for date in dates}
        known = await server_records.read_keys(session, keys.keys()) if keys else set()
        if keys and replaced:
            known |= server_records.read_previous_keys(replaced, keys.keys())
        missing = [date for key, date in keys.items() if key not in known]
        if missing:
            found[schedule["deployment"]] += len(missing)
            times.setdefault(schedule["deployment"], []).extend(missing)
    return [
        Settlement(
            "",
            name,
            "",
            "",
            f"{count} scheduled times from {_minute(min(times[name]))} to {_minute(max(times[name]))} have no run in "
            "the backup. None is started for them",
            needs_person=True,
        )
        for name, count in found.items()
    ]


def read_dates(form: Mapping[str, Any], start: datetime, end: datetime) -> list[datetime]:
    """Return the dates of a schedule in the form of the API, up to `MAX_DATES`."""
    dates: list[datetime] = []
    while len(dates) < MAX_DATES:
        found = schedule_dates(form, DATES_AT_ONCE, start, end)
        dates += found
        if len(found) < DATES_AT_ONCE:
            break
        start = found[-1] + timedelta(microseconds=1)
    return dates


def _minute(date: datetime) -> str:
    return f"{date.astimezone(UTC):%Y-%m-%d %H:%M}"


def print_settlements(found: Sequence[Settlement], *, as_json: bool) -> None:
    """Print one line for each run, those that a person has to look at last; or JSON."""
    if as_json:
        print(json.dumps([settlement.as_json() for settlement in found], indent=2))
        return
    for needs_person, heading in ((False, "Settled:"), (True, "For a person:")):
        part = [settlement for settlement in found if settlement.needs_person is needs_person]
        rows = [
            (settlement.name, f"{settlement.before or 'absent'} -> {settlement.after or 'none'}", settlement.reason)
            for settlement in part
        ]
        print(heading if rows else f"{heading} none.")
        widths = [max((len(one_line(row[column])) for row in rows), default=0) for column in (0, 1)]
        for name, change, reason in rows:
            print(f"  {one_line(name):<{widths[0]}}  {change:<{widths[1]}}  {one_line(reason)}")
