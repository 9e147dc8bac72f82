"""Records on a run how its pods ended: how much memory they used, and where and when they ran.

Kubernetes removes a pod and its Job some minutes after they end. Most of their runs completed, and no round reads
completed runs. So an annotation of the Job counts its ended pods that are recorded. A round reads the annotation with
the Job, whichever reconciler wrote it, and sends no request about recorded pods.
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
class PodRecord:
    """The ended pods of one Job, to be recorded on their run.

    Args:
        run: the run; None if the API does not have it.
        job: the name of the Job.
        pods: all pods of the Job that have ended.
    """

    run: Run | None
    job: str
    pods: tuple[Pod, ...]

    @property
    def labels(self) -> dict[str, int]:
        """Return the labels of the run that change. A pod that was OOMKilled used at least its memory limit."""
        values = {PEAK_LABEL: 0, EXCEEDED_LABEL: 0}
        for pod in self.pods:
            assert pod.end
            limit = int(quantity_or_zero(pod.memory)) if pod.end.oom else 0
            values[PEAK_LABEL] = max(values[PEAK_LABEL], pod.end.peak, limit)
            values[EXCEEDED_LABEL] = max(values[EXCEEDED_LABEL], limit)
        current = self.run.labels if self.run else {}
        return {name: value for name, value in values.items() if value > whole_number(current.get(name))}


def unrecorded_pods(jobs: Sequence[Job], pods: Sequence[Pod]) -> dict[str, tuple[Pod, ...]]:
    """Return the ended pods of each Job that has ended pods without a record, by the Job's name."""
    ended: dict[str, list[Pod]] = {}
    for pod in pods:
        if pod.end:
            ended.setdefault(pod.job, []).append(pod)
    return {job.name: tuple(ended[job.name]) for job in jobs if len(ended.get(job.name, ())) > job.recorded_pods}


def build_pod_records(run: Run | None, jobs: Sequence[Job], pods: Sequence[Pod]) -> list[PodRecord]:
    """Return the records to write now.

    While a worker may write the run's labels, there are none: one of the two writers would overwrite the other.

    Args:
        run: the run; None if the API does not have it.
        jobs: the Jobs of the run.
        pods: the pods of the run.
    """

    def is_safe(job: str) -> bool:
        if run is None or run.type in FINAL_STATES | {"PAUSED"}:
            return True
        return run.type == "RUNNING" and run.job not in ("", job)

    return [PodRecord(run, job, ended) for job, ended in unrecorded_pods(jobs, pods).items() if is_safe(job)]


async def write_pod_record(server: Server, cluster: Cluster, record: PodRecord) -> None:
    """Write a record: the run's labels, one event for each pod, and at last the Job's annotation.

    It is idempotent: a record that was interrupted before the annotation is written again, with the same result.

    Raises:
        PipelineError: server or cluster do not answer, or refuse.
    """
    if record.run:
        if record.labels:
            await server.ask("PATCH", f"/flow_runs/{record.run.id}/labels", record.labels, absent=True)
        events = [build_pod_ended_event(record.run, pod) for pod in record.pods]
        await server.ask("POST", "/events", events, idempotent=True)
    await cluster.annotate(record.job, {NOTED_ANNOTATION: str(len(record.pods))})


def build_pod_ended_event(run: Run, pod: Pod) -> JSON:
    """Return the event of a pod that has ended. Its id depends on the pod alone, so the server keeps one event."""
    assert pod.end
    payload = {
        "pod": pod.name,
        "node": pod.node,
        "job": pod.job,
        "created": pod.created_at.isoformat(),
        "scheduled": pod.scheduled_at.isoformat() if pod.scheduled_at else None,
        "started": pod.started_at.isoformat() if pod.started_at else None,
        "ended": pod.end.time.isoformat(),
        "code": pod.end.code,
        "reason": pod.end.reason,
        "peak": pod.end.peak,
    }
    id_ = str(uuid5(NAMESPACE_URL, f"{run.id}/{pod.name}/{POD_ENDED_EVENT}"))
    return build_run_event(run, POD_ENDED_EVENT, pod.end.time, payload, id_)
