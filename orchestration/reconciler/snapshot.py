"""Reads the input of a round: the runs of a work pool, their Jobs and pods."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from urllib.parse import quote

from orchestration import prefect_api
from orchestration.errors import ClusterError
from orchestration.prefect_api import JSON, Server
from orchestration.reconciler import claims, pod_records
from orchestration.reconciler.concurrency import gather_bounded
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.model import USUAL_WAITING_REASONS, Job, Pod, Run

LIVE_STATES = ["PENDING", "RUNNING", "CANCELLING"]

CRASH_READ_FOR = timedelta(hours=1)
"""For how long after its crash a run is read. A reconciler that is down for less still retries the run."""

CONTAINER_DELAY = timedelta(seconds=20)
"""How long a pod may have a node and no container before its events are read."""

POD_DELAY = timedelta(seconds=3)
"""How long a Job may have no pod before its events are read."""


@dataclass(frozen=True)
class Snapshot:
    """The runs of a work pool, their Jobs and pods, as one round has read them.

    Args:
        runs: the runs by id; None for a run that the API does not have.
        jobs: the Jobs by run id.
        pods: the pods by run id.
    """

    runs: Mapping[str, Run | None]
    jobs: Mapping[str, Sequence[Job]]
    pods: Mapping[str, Sequence[Pod]]

    @property
    def live_runs(self) -> int:
        """Return how many runs are Pending, Running or Cancelling."""
        return sum(run is not None and run.type in LIVE_STATES for run in self.runs.values())

    @property
    def is_live(self) -> bool:
        """Return whether a run, a Job or a pod is live. If none is, time alone never requires an action."""
        jobs = [job for jobs in self.jobs.values() for job in jobs]
        pods = [pod for pods in self.pods.values() for pod in pods]
        return (
            self.live_runs > 0
            or not all(job.is_finished for job in jobs)
            or any(pod.is_live or pod.has_live_sidecar for pod in pods)
        )


async def read_snapshot(server: Server, cluster: Cluster, pool: str, steady: Mapping[str, Run]) -> Snapshot:
    """Read a work pool's runs and Jobs, and after them the pods, so that the pods are never older than the runs.

    The requests to both APIs run concurrently.

    Args:
        server: the Prefect API.
        cluster: the cluster with the Jobs and pods.
        pool: the name of the work pool.
        steady: the runs that were steady in an earlier round, by id. They are counted, and read only if one of them is
            no longer Running.

    Raises:
        PipelineError: one of the APIs does not answer. The round then does nothing.
    """
    clusters = await cluster.identities()
    pool_id = (await server.ask("GET", f"/work_pools/{quote(pool, safe='')}"))["id"]
    # In the state AwaitingRetry a run's process may wait before it retries the flow, and in Paused for a person.
    unfinished = {"operator": "or_", "type": {"any_": LIVE_STATES}, "name": {"any_": ["AwaitingRetry", "Paused"]}}
    recently = (server.now - CRASH_READ_FOR).isoformat()
    unchanged, live, crashed, jobs = await asyncio.gather(
        _read_steady_runs(server, pool, steady),
        _read_runs(server, pool, {"state": unfinished, "id": {"not_any_": [*steady]}}),
        _read_runs(server, pool, {"state": {"type": {"any_": ["CRASHED"]}}, "end_time": {"after_": recently}}),
        cluster.list_jobs(pool_id, server.ahead),
    )
    known = [*unchanged, *live, *crashed]
    own = [run for run in known if run.belongs_to(clusters, cluster.namespace)]
    deleted, pods = await asyncio.gather(
        _find_deleted_deployments(server, sorted({run.deployment for run in own} - {""})),
        cluster.list_pods(pool_id, server.ahead),
    )
    runs: dict[str, Run | None] = {run.id: replace(run, is_deployment_deleted=run.deployment in deleted) for run in own}
    jobs = await _with_refusals_and_ends(cluster, jobs, pods, server)
    pods = await _with_event_reasons(cluster, pods, server)
    # Pods and Jobs that are alive without a live run: their run has finished or was deleted.
    unknown = {pod.run for pod in pods if pod.is_live or pod.has_live_sidecar}
    unknown |= {job.run for job in jobs if not job.is_finished}
    # And ended pods that are not recorded yet.
    unknown |= {pod.run for ended in pod_records.unrecorded_pods(jobs, pods).values() for pod in ended}
    unknown -= {run.id for run in known}
    runs |= await _read_runs_by_id(server, sorted(unknown))
    given_away = await claims.find_given_away_jobs(server, runs, jobs)
    jobs = [replace(job, is_given_away=True) if job.name in given_away else job for job in jobs]
    jobs_by_run: dict[str, list[Job]] = defaultdict(list)
    pods_by_run: dict[str, list[Pod]] = defaultdict(list)
    for job in jobs:
        jobs_by_run[job.run].append(job)
    for pod in pods:
        pods_by_run[pod.run].append(pod)
    return Snapshot(runs, jobs_by_run, pods_by_run)


async def _with_refusals_and_ends(cluster: Cluster, jobs: list[Job], pods: list[Pod], server: Server) -> list[Job]:
    """Return the Jobs, those without a pod with the refusal, and those whose one pod has ended as finished."""
    with_pods = {pod.job for pod in pods}
    without_pod = [
        job.name
        for job in jobs
        if job.name not in with_pods and not job.is_finished and server.now - job.created_at > POD_DELAY
    ]
    answers = await gather_bounded([cluster.read_refusal(name) for name in without_pod])
    refusals = {name: answer for name, answer in zip(without_pod, answers, strict=True) if isinstance(answer, str)}
    # Kubernetes sets a Job's condition some time after its pod has ended, and long after an outage of its API.
    ended = {pod.job for pod in pods if pod.end}
    return [
        replace(
            job,
            refusal=refusals.get(job.name, ""),
            is_finished=job.is_finished or (job.makes_one_pod and job.name in ended),
        )
        for job in jobs
    ]


async def _with_event_reasons(cluster: Cluster, pods: list[Pod], server: Server) -> list[Pod]:
    """Return the pods, those whose containers cannot be created with the reason, which only events have."""
    if not any(_is_creating(pod, server) for pod in pods):
        return pods
    try:
        reasons = await cluster.read_stuck_pods()
    except ClusterError:
        return pods
    return [replace(pod, waiting=reasons.get(pod.name)) if _is_creating(pod, server) else pod for pod in pods]


def _is_creating(pod: Pod, server: Server) -> bool:
    """Return whether a pod has had a node and no container for longer than a usual start takes."""
    is_usual = pod.waiting is None or pod.waiting[0] in USUAL_WAITING_REASONS
    if not pod.is_live or pod.has_started or not is_usual or pod.scheduled_at is None:
        return False
    return server.now - pod.scheduled_at > CONTAINER_DELAY


async def _read_runs(server: Server, pool: str, run_filter: JSON) -> list[Run]:
    pages = server.pages("/flow_runs/filter", flow_runs=run_filter, work_pools={"name": {"any_": [pool]}})
    return [Run.read(raw) async for page in pages for raw in page if raw["state"]]


async def _read_steady_runs(server: Server, pool: str, steady: Mapping[str, Run]) -> list[Run]:
    """Return the steady runs that are still Running as they were read before, and the others as they are now.

    If one of them was deleted, return only the others: a run with a live pod is then read by its id.
    """
    if not steady:
        return []
    running: JSON = {"id": {"any_": [*steady]}, "state": {"type": {"any_": ["RUNNING"]}}}
    count = await server.ask("POST", "/flow_runs/count", {"flow_runs": running}, idempotent=True)
    if count == len(steady):
        return [*steady.values()]
    others = await _read_runs(server, pool, running | {"state": {"type": {"not_any_": ["RUNNING"]}}})
    if count + len(others) < len(steady):
        return others
    return [*others, *(steady[run_id] for run_id in steady.keys() - {run.id for run in others})]


async def _find_deleted_deployments(server: Server, ids: Sequence[str]) -> set[str]:
    """Return the ids that the server has no deployment for. A run keeps the id of its deleted deployment."""
    if not ids:
        return set()
    deployment_filter = {"deployments": {"id": {"any_": ids}}}
    if await server.ask("POST", "/deployments/count", deployment_filter, idempotent=True) == len(ids):
        return set()  # the count alone is cheaper than the deployments
    return {*ids} - {raw["id"] for raw in await server.all("/deployments/filter", **deployment_filter)}


async def _read_runs_by_id(server: Server, ids: Sequence[str]) -> dict[str, Run | None]:
    """Return the runs by id; None for a run that the API does not have."""
    found: dict[str, Run | None] = dict.fromkeys(ids)
    for start in range(0, len(ids), prefect_api.PAGE_SIZE):
        run_filter = {"id": {"any_": ids[start : start + prefect_api.PAGE_SIZE]}}
        for raw in await server.all("/flow_runs/filter", flow_runs=run_filter):
            found[raw["id"]] = Run.read(raw) if raw["state"] else None
    return found
