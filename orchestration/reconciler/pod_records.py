"""What is kept of a run's pods that have ended: how much memory they used, where and when they ran.

A pod and its Job are gone some minutes after their end, most of them of runs that completed and that no round reads. So
a Job is marked, by an annotation, once its ended pods are noted. A round sees that in what it reads anyway, whoever
makes it, and asks nothing about what was noted before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import NAMESPACE_URL, uuid5

from orchestration.prefect_api import JSON, Server
from orchestration.protocol import (
    EXCEEDED_LABEL,
    FINAL_STATES,
    NOTED_ANNOTATION,
    PEAK_LABEL,
    POD_ENDED_EVENT,
    whole_number,
)
from orchestration.quantity import quantity_or_zero
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.model import Job, Pod, Run
from orchestration.reconciler.run_events import build_run_event


@dataclass(frozen=True)
class Note:
    """Pods of a run that ended and are to be noted.

    Args:
        run: which; None if the API does not have it any more.
        job: the name of their Job.
        pods: all of it that have ended.
    """

    run: Run | None
    job: str
    pods: tuple[Pod, ...]

    @property
    def labels(self) -> dict[str, int]:
        """What the run does not say yet. Who was killed for its memory used at least its limit."""
        found = {PEAK_LABEL: 0, EXCEEDED_LABEL: 0}
        for pod in self.pods:
            assert pod.end
            limit = int(quantity_or_zero(pod.memory)) if pod.end.oom else 0
            found[PEAK_LABEL] = max(found[PEAK_LABEL], pod.end.peak, limit)
            found[EXCEEDED_LABEL] = max(found[EXCEEDED_LABEL], limit)
        before = self.run.labels if self.run else {}
        return {name: value for name, value in found.items() if value > whole_number(before.get(name))}


def of_jobs(jobs: Sequence[Job], pods: Sequence[Pod]) -> dict[str, tuple[Pod, ...]]:
    """The ended pods of each Job of which not all are noted."""
    ended: dict[str, list[Pod]] = {}
    for each in pods:
        if each.end:
            ended.setdefault(each.job, []).append(each)
    return {each.name: tuple(ended[each.name]) for each in jobs if len(ended.get(each.name, ())) > each.noted}


def unnoted(run: Run | None, jobs: Sequence[Job], pods: Sequence[Pod]) -> list[Note]:
    """What is to be noted of a run now: nothing while a worker may write its labels, as one of the two would lose."""

    def is_quiet(job: str) -> bool:
        return (
            run is None or run.type in FINAL_STATES | {"PAUSED"} or (run.type == "RUNNING" and run.job not in ("", job))
        )

    return [Note(run, job, ended) for job, ended in of_jobs(jobs, pods).items() if is_quiet(job)]


async def note(server: Server, cluster: Cluster, noted: Note) -> None:
    """Do it. Cut off before the Job is marked, it is done again, and is as done once.

    Raises:
        PipelineError: server or cluster do not answer, or refuse.
    """
    if noted.run:
        if noted.labels:
            await server.ask("PATCH", f"/flow_runs/{noted.run.id}/labels", noted.labels, absent=True)
        events = [_event(noted.run, each) for each in noted.pods]
        await server.ask("POST", "/events", events, idempotent=True)
    await cluster.annotate(noted.job, {NOTED_ANNOTATION: str(len(noted.pods))})


def told(pod: Pod) -> JSON:
    """Of an ended pod, what is told."""
    assert pod.end
    return {
        "pod": pod.name,
        "node": pod.node,
        "job": pod.job,
        "created": pod.created.isoformat(),
        "scheduled": pod.scheduled.isoformat() if pod.scheduled else None,
        "started": pod.began.isoformat() if pod.began else None,
        "ended": pod.end.at.isoformat(),
        "code": pod.end.code,
        "reason": pod.end.reason,
        "peak": pod.end.peak,
    }


def _event(run: Run, pod: Pod) -> JSON:
    assert pod.end
    # The id is that of the pod: the server keeps one event of several reconcilers.
    id_ = str(uuid5(NAMESPACE_URL, f"{run.id}/{pod.name}/{POD_ENDED_EVENT}"))
    return build_run_event(run, POD_ENDED_EVENT, pod.end.at, told(pod), id_)
