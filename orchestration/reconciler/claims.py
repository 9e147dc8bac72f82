"""Finds the Jobs of given-away claims: Jobs that were created after another worker had claimed the run."""

import asyncio
from collections.abc import Iterable, Mapping

from orchestration.prefect_api import Server
from orchestration.protocol import is_given_away
from orchestration.reconciler.model import Job, Run


async def find_given_away_jobs(server: Server, runs: Mapping[str, Run | None], jobs: Iterable[Job]) -> set[str]:
    """Return the names of the Jobs whose claim is over, so that their pods do not execute the run.

    The history of a run is read only if a live Job is not the Job that the run's worker has recorded.

    Args:
        server: the Prefect API.
        runs: the runs by id.
        jobs: the Jobs of these runs.

    Raises:
        ApiError: the server does not answer.
    """
    unrecorded: dict[str, list[Job]] = {}
    for job in jobs:
        run = runs.get(job.run)
        if not run or run.type not in ("PENDING", "RUNNING"):
            continue
        if not job.is_finished and job.name != run.job and job.claim:
            unrecorded.setdefault(run.id, []).append(job)
    requests = (server.ask("GET", f"/flow_run_states/?flow_run_id={run_id}") for run_id in unrecorded)
    histories = await asyncio.gather(*requests)
    return {
        job.name
        for unrecorded_jobs, states in zip(unrecorded.values(), histories, strict=True)
        for job in unrecorded_jobs
        if is_given_away(job.claim, states)
    }
