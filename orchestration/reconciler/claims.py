"""Which Jobs are of a claim that was given away: their creation was delayed until another worker had the run."""

import asyncio
from collections.abc import Iterable, Mapping

from orchestration.prefect_api import Server
from orchestration.protocol import claim_of, is_given_away
from orchestration.reconciler.model import Job, Run


async def given_away(server: Server, runs: Mapping[str, Run | None], jobs: Iterable[Job]) -> set[str]:
    """Return the names of the Jobs whose pods execute nothing, as their claim is over.

    The history of a run is read only where a live Job is not the one that its worker has recorded.

    Args:
        server: of the runs.
        runs: by id.
        jobs: of them.

    Raises:
        ApiError: the server does not answer.
    """
    doubtful: dict[str, list[str]] = {}
    for job in jobs:
        run = runs.get(job.run)
        if run and run.type in ("PENDING", "RUNNING") and not job.over and job.name != run.job and claim_of(job.name):
            doubtful.setdefault(run.id, []).append(job.name)
    histories = await asyncio.gather(*(server.ask("GET", f"/flow_run_states/?flow_run_id={run}") for run in doubtful))
    return {
        name
        for names, states in zip(doubtful.values(), histories, strict=True)
        for name in names
        if is_given_away(name, states)
    }
