"""Carries out actions. Each action is idempotent, and is skipped if the run has left the state that was read."""

import random
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from orchestration.errors import ClusterError
from orchestration.prefect_api import JSON, RefusedError, Server
from orchestration.protocol import CLAIM_LOST, EXPECTED_STATE_HEADER, LOST_LABEL
from orchestration.reconciler import orphans
from orchestration.reconciler.budget import RetryBudget, decide_retry
from orchestration.reconciler.decide import (
    Action,
    Adopt,
    Cancel,
    Cancelled,
    Crash,
    Explain,
    GiveAway,
    Retry,
    Stop,
    TimeOut,
    Unclaim,
)
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.model import Pod, Run
from orchestration.reconciler.run_events import GIVEN_UP_EVENT, STATE_EVENT_PREFIX, build_run_event
from orchestration.reconciler.state_messages import with_log_tail
from orchestration.work_pools import read_pool_defaults

BEYOND_PREFETCH = timedelta(seconds=60)
"""How far ahead no worker prefetches runs.

If the reconciler dies after it set a run that far ahead, the run starts that much later, with its old memory limit.
"""

MAX_MESSAGE_CHARACTERS = 2000
"""The length of a state's message."""


async def carry_out(server: Server, cluster: Cluster, action: Action, pods: list[Pod], log_lines: int) -> str:
    """Carry out an action, and return what was done, for the log; empty if the run has changed since it was read.

    Args:
        server: the server with the run.
        cluster: the cluster with the run's Jobs.
        action: the action.
        pods: the pods of the run.
        log_lines: how many lines of its pod's log the state of a crashed run shows.

    Raises:
        PipelineError: server or cluster do not answer, or refuse. The next round decides again.
    """
    if isinstance(action, Stop):
        await cluster.delete_job(action.job, action.grace)
        return f"Job {action.job} deleted: {action.sentence}"
    run = action.run
    found = await server.ask("GET", f"/flow_runs/{run.id}", absent=True)
    if found is None or found["state"] is None or found["state"]["id"] != run.state_id:
        return ""
    if isinstance(action, Adopt):
        body = {"infrastructure_pid": f"{cluster.namespace}:{action.job}"}
        await server.ask("PATCH", f"/flow_runs/{run.id}", body)
        return f"run {run.name}: its Job is {action.job}, which its worker did not record"
    if isinstance(action, Explain):
        return await _set_state(server, run, "PENDING", action.state, action.sentence)
    if isinstance(action, GiveAway):
        if not Run.read(found).belongs_to(await cluster.identities(), cluster.namespace):
            return ""  # a worker of another cluster has marked the run since
        return await _set_state(server, run, "PENDING", CLAIM_LOST, action.sentence)
    if isinstance(action, Unclaim):
        # Read again: the Jobs of this round may have been read before the claim was given away.
        if await cluster.has_unfinished_job(run.id):
            return ""
        return await _set_state(server, run, "SCHEDULED", "Scheduled", action.sentence, due=server.now)
    if isinstance(action, Cancel):
        return await _set_state(server, run, "CANCELLING", "Cancelling", action.sentence)
    if isinstance(action, Cancelled):
        await orphans.release_leased_slots(server, pods)
        if action.labels:
            await server.ask("PATCH", f"/flow_runs/{run.id}/labels", action.labels)
        return await _set_state(server, run, "CANCELLED", "Cancelled", action.sentence)
    if isinstance(action, Crash):
        log_tail = await _log_tail(cluster, pods, run, log_lines)
        await orphans.release_leased_slots(server, pods)
        # The cause comes first: every reader of the Crashed state finds it, even if this process dies in between.
        await server.ask("PATCH", f"/flow_runs/{run.id}/labels", action.labels)
        return await _set_state(server, run, "CRASHED", "Crashed", with_log_tail(action.cause.sentence, log_tail))
    if isinstance(action, TimeOut):
        return await _time_out(server, action, pods, await _log_tail(cluster, pods, run, log_lines))
    return await _retry(server, action, found)


async def _time_out(server: Server, action: TimeOut, pods: list[Pod], log_tail: str) -> str:
    run = action.run
    await orphans.release_leased_slots(server, pods)
    await orphans.crash_unfinished(server, run.id, f"Its run {run.name} has timed out")
    if action.labels:
        await server.ask("PATCH", f"/flow_runs/{run.id}/labels", action.labels)
    # Forced: the flow's own retries would turn a proposed failure into another run attempt.
    return await _set_state(server, run, "FAILED", "TimedOut", with_log_tail(action.sentence, log_tail), force=True)


async def _log_tail(cluster: Cluster, pods: list[Pod], run: Run, lines: int) -> str:
    """Return the end of the log of the run's newest pod that has ended; empty if there is none."""
    ended = [pod for pod in pods if pod.end and (not run.job or pod.job == run.job)]
    if not ended or not lines:
        return ""
    try:
        return await cluster.read_log_tail(max(ended, key=lambda pod: pod.created_at), lines)
    except ClusterError:
        return ""  # the kubelet has the log, and may be gone or refuse requests: that must not keep the run Running


async def _retry(server: Server, action: Retry, found: JSON) -> str:
    run = action.run
    decision = decide_retry(run, action.cause, await read_budget(server, found))
    if not decision.is_retried:
        await orphans.crash_unfinished(server, run.id, f"Its run {run.name} has crashed")
        await server.ask("PATCH", f"/flow_runs/{run.id}/labels", decision.labels)
        await _emit(server, run, GIVEN_UP_EVENT, decision.sentence)
        return f"run {run.name}: {decision.sentence}"
    # First counted, then retried: a reconciler that dies in between does not count the retry twice.
    await server.ask("PATCH", f"/flow_runs/{run.id}/labels", decision.labels)
    if not run.labels.get(LOST_LABEL):  # a lost run attempt may still be executing, and holds its slots until fenced
        await orphans.release_tag_slots(server, run.id)
    # Jitter, so that many retries are not due at the same time.
    delay = decision.delay_seconds * random.uniform(1, 1.25)  # noqa: S311 - not a secret
    message = f"{decision.sentence}. {action.cause.sentence}"
    if decision.memory_limit:
        # Only a Scheduled run may get other job variables, and no worker may claim the run before that.
        due = server.now + BEYOND_PREFETCH
        reason = f"Gets {decision.memory_limit} of memory first"
        state_id = await _propose_state(server, run, "SCHEDULED", "Scheduled", reason, due=due)
        if not state_id:
            return ""
        run = replace(run, state_id=state_id)
        variables = (found.get("job_variables") or {}) | {"memory_limit": decision.memory_limit}
        await server.ask("PATCH", f"/flow_runs/{run.id}", {"job_variables": variables})
    due = server.now + timedelta(seconds=delay)
    return await _set_state(server, run, "SCHEDULED", "AwaitingRetry", message, due=due)


async def read_budget(server: Server, found: JSON) -> RetryBudget | None:
    """Return the retry budget of a run; None if its deployment was deleted.

    The run's own job variables come before those of the deployment, and these before the defaults of the pool.

    Args:
        server: the server with the run.
        found: the run, as the API returns it.

    Raises:
        ApiError: the server does not answer.
    """
    deployment = await server.ask("GET", f"/deployments/{found['deployment_id']}", absent=True)
    if deployment is None:
        return None
    pool = found.get("work_pool_name")
    defaults = await read_pool_defaults(server, pool) if pool else {}
    variables = {**(deployment.get("job_variables") or {}), **(found.get("job_variables") or {})}
    return RetryBudget.from_job_variables(defaults | variables)


async def _set_state(
    server: Server, run: Run, type_: str, name: str, message: str, *, due: datetime | None = None, force: bool = False
) -> str:
    """Propose or force a state, and return what the run is now, for the log; empty if the server did not accept."""
    if not await _propose_state(server, run, type_, name, message, due=due, force=force):
        return ""
    headline = message.partition("\n")[0]
    return f"run {run.name} is {name}: {headline}"


async def _propose_state(
    server: Server, run: Run, type_: str, name: str, message: str, *, due: datetime | None = None, force: bool = False
) -> str:
    """Propose or force a state in place of the one that was read, and emit the event; return the id of the new state.

    Returns:
        Empty if the server did not accept, as the run has another state by now.
    """
    # Every replica that decides this about this state sends the same id, and the server takes one of them.
    details: dict[str, Any] = {"transition_id": str(uuid5(NAMESPACE_URL, f"{run.state_id}/{type_}/{name}"))}
    if due:
        details["scheduled_time"] = due.isoformat()
    state = {"type": type_, "name": name, "message": message[:MAX_MESSAGE_CHARACTERS], "state_details": details}
    try:
        answer = await server.ask(
            "POST",
            f"/flow_runs/{run.id}/set_state",
            {"state": state, "force": force},
            headers={EXPECTED_STATE_HEADER: run.state_id},
        )
    except RefusedError as error:
        if error.status == 404:
            return ""
        raise
    if answer["status"] != "ACCEPT":
        return ""
    await _emit(server, run, f"{STATE_EVENT_PREFIX}{name.lower()}", message)
    return str(answer["state"]["id"])


async def _emit(server: Server, run: Run, name: str, evidence: str) -> None:
    """Emit an event on the run's page: who decided, about which state, with which evidence."""
    decided_about = {"state": run.state, "since": run.since.isoformat()}
    payload = {"of": decided_about, "evidence": evidence[:MAX_MESSAGE_CHARACTERS]}
    await server.ask("POST", "/events", [build_run_event(run, name, server.now, payload)])
