"""Carrying out what was decided: only if the run is still as it was read, and twice is as once."""

import asyncio
import random
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import quote
from uuid import NAMESPACE_URL, uuid4, uuid5

from orchestration.errors import ClusterError
from orchestration.prefect_api import JSON, RefusedError, Server
from orchestration.protocol import CLAIM_LOST, LOST_LABEL
from orchestration.reconciler import orphans
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
    verdict,
)
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.model import Pod, Retries, Run
from orchestration.reconciler.state_messages import with_log_tail

BEFORE_ANY_WORKER = timedelta(seconds=60)
"""How far ahead no worker looks for runs. Cut off after it, a run starts that much later, with the memory it had."""

LONGEST = 2000
"""Letters of a state's message."""


async def carry_out(server: Server, cluster: Cluster, action: Action, pods: list[Pod]) -> str:
    """Do it; what was done, for people, or nothing if the run is no longer as it was read.

    Args:
        server: of the run.
        cluster: of its Jobs.
        action: what.
        pods: of the run.

    Raises:
        PipelineError: server or cluster do not answer, or refuse: the next round decides anew.
    """
    if isinstance(action, Stop):
        await cluster.stop(action.job, action.grace)
        return f"Job {action.job} deleted: {action.sentence}"
    run = action.run
    found = await server.ask("GET", f"/flow_runs/{run.id}", absent=True)
    if found is None or found["state"] is None or found["state"]["id"] != run.state_id:
        return ""
    if isinstance(action, Adopt):
        body = {"infrastructure_pid": f"{cluster.namespace}:{action.job}"}
        await server.ask("PATCH", f"/flow_runs/{run.id}", body)
        return f"run {run.name}: its Job is {action.job}, which no worker had recorded"
    if isinstance(action, Explain):
        return await _set(server, run, "PENDING", action.word, action.sentence)
    if isinstance(action, GiveAway):
        if not Run.read(found).is_of(await cluster.identities(), cluster.namespace):
            return ""  # meanwhile a worker elsewhere has marked it
        return await _set(server, run, "PENDING", CLAIM_LOST, action.sentence)
    if isinstance(action, Unclaim):
        # Read again, as the Jobs of the round may have been read before the claim was given away.
        if await cluster.has_job(run.id):
            return ""
        return await _set(server, run, "SCHEDULED", "Scheduled", action.sentence, at=server.now)
    if isinstance(action, Cancel):
        return await _set(server, run, "CANCELLING", "Cancelling", action.sentence)
    if isinstance(action, Cancelled):
        await orphans.give_back(server, pods)
        if action.labels:
            await server.ask("PATCH", f"/flow_runs/{run.id}/labels", action.labels)
        return await _set(server, run, "CANCELLED", "Cancelled", action.sentence)
    if isinstance(action, Crash):
        tail = await _log_tail(cluster, pods, run)
        await orphans.give_back(server, pods)
        # First the cause: whoever finds the run crashed knows it, also if this process ends in between.
        await server.ask("PATCH", f"/flow_runs/{run.id}/labels", action.labels)
        return await _set(server, run, "CRASHED", "Crashed", with_log_tail(action.cause.sentence, tail))
    if isinstance(action, TimeOut):
        return await _time_out(server, action, pods, await _log_tail(cluster, pods, run))
    return await _retry(server, action, found)


async def _time_out(server: Server, action: TimeOut, pods: list[Pod], tail: str) -> str:
    run = action.run
    await orphans.give_back(server, pods)
    await orphans.end(server, run.id, f"Its run {run.name} has timed out")
    if action.labels:
        await server.ask("PATCH", f"/flow_runs/{run.id}/labels", action.labels)
    # A flow's own retries would make of a proposed failure another run attempt.
    return await _set(server, run, "FAILED", "TimedOut", with_log_tail(action.sentence, tail), force=True)


async def _log_tail(cluster: Cluster, pods: list[Pod], run: Run) -> str:
    ended = [each for each in pods if each.end and (not run.job or each.job == run.job)]
    if not ended:
        return ""
    try:
        return await cluster.last_lines(max(ended, key=lambda each: each.created))
    except ClusterError:
        return ""  # who has it, the kubelet, may be gone or know nobody yet: that must not keep the run Running


async def _retry(server: Server, action: Retry, found: JSON) -> str:
    run = action.run
    told = verdict(run, action.cause, await _retries(server, found))
    if not told.again:
        await orphans.end(server, run.id, f"Its run {run.name} has crashed")
        await server.ask("PATCH", f"/flow_runs/{run.id}/labels", told.labels)
        await _event(server, run, "given-up", told.sentence)
        return f"run {run.name}: {told.sentence}"
    # First counted, then tried: cut off in between it is tried without being counted again.
    await server.ask("PATCH", f"/flow_runs/{run.id}/labels", told.labels)
    if not run.labels.get(LOST_LABEL):  # else it may go on for a while
        await orphans.release(server, run.id)
    delay = told.delay * random.uniform(1, 1.25)  # noqa: S311 - so that many do not come back at once
    message = f"{told.sentence}. {action.cause.sentence}"
    if told.memory:
        # Only what is scheduled may get other variables, and no worker is to take it before.
        later = server.now + BEFORE_ANY_WORKER
        if not await _set(server, run, "SCHEDULED", "Scheduled", f"Gets {told.memory} of memory first", at=later):
            return ""
        variables = (found.get("job_variables") or {}) | {"memory_limit": told.memory}
        await server.ask("PATCH", f"/flow_runs/{run.id}", {"job_variables": variables})
    at = server.now + timedelta(seconds=delay)
    return await _set(server, run, "SCHEDULED", "AwaitingRetry", message, at=at)


async def _retries(server: Server, found: JSON) -> Retries | None:
    """The policy of a run: its own job variables, its deployment's, the pool's defaults; None without a deployment."""
    deployment = await server.ask("GET", f"/deployments/{found['deployment_id']}", absent=True)
    if deployment is None:
        return None
    name = found.get("work_pool_name")
    defaults = await pool_defaults(server, name) if name else {}
    given = {**(deployment.get("job_variables") or {}), **(found.get("job_variables") or {})}
    return Retries.of(defaults | given)


async def pool_defaults(server: Server, pool: str) -> JSON:
    """What a work pool gives to runs that do not say otherwise, by job variable; nothing of a pool that is gone.

    Args:
        server: of the pool.
        pool: its name.

    Raises:
        ApiError: the server does not answer.
    """
    found = await server.ask("GET", f"/work_pools/{quote(pool, safe='')}", absent=True) or {}
    properties = (found.get("base_job_template") or {}).get("variables", {}).get("properties", {})
    return {name: each.get("default") for name, each in properties.items()}


async def _set(
    server: Server, run: Run, type_: str, name: str, message: str, *, at: datetime | None = None, force: bool = False
) -> str:
    """Propose a state, or force it; what it is now, for people, or nothing if the server did not accept it."""
    # The same from whoever decides it of the same state: the server takes one of them.
    details: dict[str, Any] = {"transition_id": str(uuid5(NAMESPACE_URL, f"{run.state_id}/{type_}/{name}"))}
    if at:
        details["scheduled_time"] = at.isoformat()
    state = {"type": type_, "name": name, "message": message[:LONGEST], "state_details": details}
    try:
        answer = await server.ask("POST", f"/flow_runs/{run.id}/set_state", {"state": state, "force": force})
    except RefusedError as error:
        if error.status == 404:
            return ""
        raise
    if answer["status"] != "ACCEPT":
        return ""
    await _event(server, run, name.lower(), message)
    headline = message.partition("\n")[0]
    return f"run {run.name} is {name}: {headline}"


async def _event(server: Server, run: Run, name: str, message: str) -> None:
    """Say on the run's page who decided it, and of which state."""
    event = {
        "id": str(uuid4()),
        "occurred": server.now.isoformat(),
        "event": f"reconciler.flow-run.{name}",
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name},
        "payload": {"of": {"state": run.state, "since": run.since.isoformat()}, "evidence": message[:LONGEST]},
    }
    await server.ask("POST", "/events", [event])


async def gather(actions: list[Any], at_once: int = 8) -> list[Any]:
    """The results of some coroutines, or their exceptions; a few at a time."""
    turns = asyncio.Semaphore(at_once)

    async def one(coroutine: Any) -> Any:
        async with turns:
            return await coroutine

    return await asyncio.gather(*map(one, actions), return_exceptions=True)
