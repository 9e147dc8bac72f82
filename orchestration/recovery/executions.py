"""Collect evidence of executed flow runs from a cluster, their Jobs and pods, in a file.

The process that settles runs after a restore has no access to the Kubernetes API. A person's kubectl collects the Jobs
and pods, and the file is the input of `orchestrate settle`.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestration.errors import SettingsError
from orchestration.protocol import CLAIM_ANNOTATION, MAIN_CONTAINER_ANNOTATION, POOL_LABEL, RUN_LABEL
from orchestration.reconciler.kubernetes_objects import JobObject, LeanPodObject, PodObject
from orchestration.reconciler.model import Job, Pod, is_run_id

Object = dict[str, Any]

_UNREAD_FIELDS = ("uid", "message")
"""Fields that the reconciler reads and a settlement does not."""


class Outcome(StrEnum):
    """How far the newest execution of a run has come, by its Job and pods."""

    WAITING = "waiting"
    """Its flow has not begun, and its pod may still start."""
    RUNNING = "running"
    COMPLETED = "completed"
    """Its main container ended with exit code 0, and nothing asked it to end."""
    FAILED = "failed"
    """Its main container ended with another exit code, and nothing asked it to end."""
    UNKNOWN = "unknown"
    """Its pod is gone, or was ended from outside: how far the flow came is not known."""


@dataclass(frozen=True)
class Execution:
    """The newest execution of a flow run that a cluster shows.

    Args:
        run: the run's id.
        name: the run's name.
        job: the name of the Job.
        namespace: the namespace of the Job.
        cluster: the first identity of the cluster; empty if none could be read.
        pool: the id of the work pool.
        flow: the id of the run's flow; empty if the Job does not name it.
        flow_name: the name of the flow.
        deployment: the id of its deployment; empty if it has none.
        outcome: how far the execution has come.
        created_at: when the Job was created.
        started_at: when the main container started; None if it has not started, or if that is unknown.
        ended_at: when the main container ended; None if it has not ended, or if that is unknown.
        exit_code: the exit code of the main container; None without one.
        claim: the Job's claim of the run; empty if its worker recorded none.
    """

    run: str
    name: str
    job: str
    namespace: str
    cluster: str
    pool: str
    flow: str
    flow_name: str
    deployment: str
    outcome: Outcome
    created_at: datetime
    started_at: datetime | None = None
    ended_at: datetime | None = None
    exit_code: int | None = None
    claim: str = ""

    @property
    def is_live(self) -> bool:
        """Whether the execution may still do something."""
        return self.outcome in (Outcome.WAITING, Outcome.RUNNING)


@dataclass(frozen=True)
class Evidence:
    """Holds a cluster's evidence of executed flow runs.

    Args:
        clusters: the identities with which workers of the cluster label runs; empty if they are not known.
        executions: the newest execution of each run, by the run's id.
    """

    clusters: Collection[str] = ()
    executions: Mapping[str, Execution] = field(default_factory=dict)


def pack(clusters: Collection[str], objects: Iterable[Object]) -> bytes:
    """Return the Jobs and pods of runs as a compressed file, with the fields that `read` needs.

    Args:
        clusters: the identities of the cluster, as far as they can be read: the UID of its namespace kube-system, and
            the hash of its certificate authority.
        objects: Jobs and pods, as the Kubernetes API returns them.
    """
    packed = []
    for raw in objects:
        kind: type[JobObject | PodObject] = JobObject if raw["kind"] == "Job" else LeanPodObject
        if raw["kind"] == "Pod" and not LeanPodObject.model_validate(raw).has_usual_main_container:
            kind = PodObject
        lean = kind.model_validate(raw).model_dump(mode="json", by_alias=True, exclude_defaults=True)
        _drop_unread(lean)
        packed.append({"kind": raw["kind"], "namespace": raw["metadata"]["namespace"], "object": lean})
    return gzip.compress(
        json.dumps({"clusters": [*clusters], "objects": packed}, separators=(",", ":")).encode(), mtime=0
    )


def _drop_unread(part: Any) -> None:
    """Drop what a settlement does not read, in place: all runs have to fit into one ConfigMap."""
    if isinstance(part, dict):
        for key in _UNREAD_FIELDS:
            part.pop(key, None)
        if "annotations" in part:
            read = (MAIN_CONTAINER_ANNOTATION, CLAIM_ANNOTATION)
            part["annotations"] = {name: text for name, text in part["annotations"].items() if name in read}
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _drop_unread(value)


def read(file: Path, pools: Iterable[str]) -> Evidence:
    """Return what a cluster shows of the runs of some work pools.

    Args:
        file: a file with the content that `pack` returns.
        pools: the ids of the work pools. Runs of other servers may be on the same cluster.

    Raises:
        SettingsError: the file is absent or damaged.
    """
    try:
        document = json.loads(gzip.decompress(file.read_bytes()))
        return Evidence(document["clusters"], _newest_executions(document, frozenset(pools)))
    except (OSError, EOFError, ValueError, TypeError, LookupError, ValidationError) as error:
        cause = str(error).splitlines()[0]
        raise SettingsError(f"{file} is no list of Jobs and pods: {cause}. `make restore` writes such a file") from None


def _newest_executions(document: Mapping[str, Any], pools: frozenset[str]) -> dict[str, Execution]:
    jobs: dict[tuple[str, str], tuple[Job, Mapping[str, str]]] = {}
    pods: dict[tuple[str, str], list[Pod]] = defaultdict(list)
    for entry in document["objects"]:
        raw, namespace = entry["object"], entry["namespace"]
        labels = raw["metadata"].get("labels", {})
        if labels.get(POOL_LABEL) not in pools or not is_run_id(labels.get(RUN_LABEL, "")):
            continue
        if entry["kind"] == "Job":
            job = Job.read(JobObject.model_validate(raw))
            jobs[namespace, job.name] = job, labels
        else:
            pod = Pod.read(PodObject.model_validate(raw))
            pods[namespace, pod.job].append(pod)
    found: dict[str, Execution] = {}
    for (namespace, name), (job, labels) in jobs.items():
        execution = _execution(job, pods[namespace, name], labels, namespace, next(iter(document["clusters"]), ""))
        other = found.get(job.run)
        if other is None or (execution.is_live, execution.created_at) > (other.is_live, other.created_at):
            found[job.run] = execution
    return found


def _execution(job: Job, pods: list[Pod], labels: Mapping[str, str], namespace: str, cluster: str) -> Execution:
    newest = max(pods, key=lambda pod: (pod.is_live, pod.created_at), default=None)
    return Execution(
        run=job.run,
        name=labels.get("prefect.io/flow-run-name", job.run),
        job=job.name,
        namespace=namespace,
        cluster=cluster,
        pool=labels[POOL_LABEL],
        flow=labels.get("prefect.io/flow-id", ""),
        flow_name=labels.get("prefect.io/flow-name", ""),
        deployment=labels.get("prefect.io/deployment-id", ""),
        outcome=_outcome(job, newest),
        created_at=job.created_at,
        started_at=newest.started_at if newest else None,
        ended_at=newest.end.time if newest and newest.end else None,
        exit_code=newest.end.code if newest and newest.end else None,
        claim=job.claim,
    )


def _outcome(job: Job, pod: Pod | None) -> Outcome:
    if pod is None:
        return Outcome.UNKNOWN if job.is_finished or job.is_deleted else Outcome.WAITING
    if pod.end is None:
        if pod.has_started:
            return Outcome.RUNNING
        return Outcome.UNKNOWN if pod.deleted_at else Outcome.WAITING
    # On SIGTERM the supervisor schedules the run again, and ends with exit code 0.
    if pod.end.disruption or pod.deleted_at or job.exceeded_deadline is not None or pod.end.code is None:
        return Outcome.UNKNOWN
    if pod.end.code == 0:
        return Outcome.COMPLETED
    return Outcome.FAILED
