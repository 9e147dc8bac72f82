"""Warm pods: pods that have imported Prefect and wait for one run each (docs/explanation/warm-pods.md).

A warm pod is the pod of a Job that the worker creates from the base job template with its default job variables. A run
whose own Job would have the same specification takes such a Job: the worker labels Job and pod with the run, and hands
over the environment variables that differ between runs.

- The label of the Job is the lock. The worker names the version of the Job that it read, and Kubernetes refuses the
  second of two labels, or the deletion of a Job that a run has just taken.
- The worker that started last keeps the number of warm pods. It replaces those of earlier workers, which may have
  another template, image or Secret.
"""

import asyncio
import copy
import hashlib
import json
import logging
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from orchestration.access.credentials import AUTH_VARIABLE, credential_hash
from orchestration.errors import ClusterError, ClusterRefusalError
from orchestration.logs import RUN_ID
from orchestration.prefect_protocol import RUN_VARIABLE_PREFIX
from orchestration.protocol import (
    CLAIM_ANNOTATION,
    CLAIM_VARIABLE,
    CREDENTIAL_ANNOTATION,
    FORMER_SIGNING_KEYS_VARIABLE,
    HAND_OVER_ANNOTATION,
    HAND_OVER_KEY_VARIABLE,
    HAND_OVER_VARIABLE,
    POOL_LABEL,
    RUN_LABEL,
    SIGNING_KEY_VARIABLE,
    WARM_LABEL,
    WARM_SECONDS_VARIABLE,
    WARM_TAKEN,
    WARM_WAITING,
    claim_of,
)
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.runs import hand_over

NAME = "warm"
"""The prefix of the names of Jobs of warm pods."""

KEEP_SECONDS = 5.0
"""How often the worker counts the warm pods."""

REPLACE_SECONDS = 1.0
"""How long after a run has taken a warm pod the next is created. Its imports would slow down the run's first line."""

PAUSE_SECONDS = 60.0
"""How long no warm pod is created after one has found no room, or has failed within this time."""

EXPIRY_SECONDS = 300.0
"""How much longer than its maximum age a warm pod waits. The worker replaces it before, unless there is none."""

RETRY_SECONDS = 1.0
"""The pause before the Kubernetes API is asked again that has not answered."""

SHAPE_ANNOTATION, KEEPER_ANNOTATION = "reconciler.warm-shape", "reconciler.warm-keeper"
"""Annotations of the Job of a warm pod: the shape of its specification, and when the worker that created it started."""

VOLUME, MOUNT_PATH, FILE = "hand-over", "/etc/prefect-run", "environment"

VARIABLES_OF_RUNS = (AUTH_VARIABLE, SIGNING_KEY_VARIABLE, FORMER_SIGNING_KEYS_VARIABLE)

LABEL_PREFIXES_OF_RUNS = ("prefect.io/", "app.kubernetes.io/")
"""The prefixes of the labels in which Prefect names the run, its flow and its deployment."""

LABELS_OF_ALL_RUNS = ("app.kubernetes.io/instance", "app.kubernetes.io/component")
"""The labels with these prefixes that are the same for all runs of a release."""

COMMAND, SUPERVISOR = ["prefect", "flow-run", "execute"], "execution.py"
"""The arguments of a container that executes a run, and the file in its command that waits for the run."""

ENDED_CONDITIONS = {"Complete", "Failed", "FailureTarget", "SuccessCriteriaMet"}
"""The conditions of a Job whose pod has ended or is about to."""

ENDED_PHASES = ("Succeeded", "Failed")
"""The phases of a pod whose containers have all ended."""

Manifest = dict[str, Any]


def _is_of_runs(variable: str) -> bool:
    """Return whether an environment variable has another value for each run or deployment."""
    return variable.startswith(RUN_VARIABLE_PREFIX) or variable in VARIABLES_OF_RUNS


def _differs_between_runs(entry: Mapping[str, Any]) -> bool:
    """Return whether a run has another entry of its environment than other runs. A reference is the same for all."""
    return "value" in entry and _is_of_runs(entry["name"])


def _variables_of_run(manifest: Manifest) -> dict[str, str]:
    """Return the environment variables of a run's Job that differ between runs."""
    env = manifest["spec"]["template"]["spec"]["containers"][0]["env"]
    return {entry["name"]: entry["value"] for entry in env if _differs_between_runs(entry)}


def explain_unfit(manifest: Manifest) -> str:
    """Return why the Jobs of a base job template cannot be those of warm pods, and the cure; empty if they can."""
    return next(_unfit_parts(manifest["spec"]), "")


def _unfit_parts(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in the specification of a Job excludes warm pods, each with its cure."""
    pod = spec["template"]["spec"]
    main = pod["containers"][0]
    if (limit := spec.get("backoffLimit")) != 0:
        yield f"backoffLimit is {limit}, so that a second pod may wait in vain: set it to 0"
    for seconds in filter(None, (spec.get("activeDeadlineSeconds"), pod.get("activeDeadlineSeconds"))):
        yield f"activeDeadlineSeconds is {seconds}, so that the time of waiting would count: set it to null"
    for rule in (spec.get("podFailurePolicy") or {}).get("rules") or ():
        if (action := rule["action"]) != "FailJob":
            yield f"an action of podFailurePolicy is {action}, so that a second pod may wait in vain: set it to FailJob"
    if (number := len(pod["containers"])) > 1:
        yield (
            f"the number of containers is {number}, so that a warm pod would not end: set it to 1, and put the others "
            "into initContainers with restartPolicy: Always"
        )
    if main.get("args") != COMMAND:
        yield f"args is {main.get('args')}, so that the pod would not wait for a run: set it to {' '.join(COMMAND)}"
    if not any(SUPERVISOR in word for word in main.get("command") or ()):
        yield (
            f"command is {main.get('command')}, so that the pod would not wait for a run: set it to the default of "
            "runs.entrypoint"
        )
    by_reference = {entry["name"] for entry in main["env"] if "value" not in entry}
    for name in re.findall(r"\$\(([^()]+)\)", json.dumps(main)):
        if _is_of_runs(name) and name not in by_reference:
            yield f"a value is $({name}), so that it would have no run in a warm pod: set it to a value for all runs"
    containers = [main, *(pod.get("initContainers") or ())]
    for entry in (entry for container in containers for entry in container.get("env") or ()):
        path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        label = path.partition("['")[2].removesuffix("']")
        if label.startswith(LABEL_PREFIXES_OF_RUNS) and label not in LABELS_OF_ALL_RUNS:
            yield f"{entry['name']} is {path}, so that it would have no run in a warm pod: set it to another field"


def shape_of(manifest: Manifest) -> str:
    """Return a hash of all of a Job's specification that does not differ between runs with the same job variables."""
    spec = copy.deepcopy(manifest["spec"])
    meta, pod = spec["template"]["metadata"], spec["template"]["spec"]
    # Prefect's labels name the run. All others may decide what an admission webhook adds to the pod.
    meta["labels"] = {
        name: text for name, text in meta["labels"].items() if not name.startswith(LABEL_PREFIXES_OF_RUNS)
    }
    main = pod["containers"][0]
    main["env"] = [entry for entry in main["env"] if not _differs_between_runs(entry)]
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def warm_manifest(manifest: Manifest, seconds: float) -> Manifest:
    """Return the Job of a warm pod.

    Args:
        manifest: the Job of any run with the default job variables.
        seconds: after how many seconds the pod ends if no run has taken it.
    """
    made = copy.deepcopy(manifest)
    pod = made["spec"]["template"]
    for meta in (made["metadata"], pod["metadata"]):
        meta["labels"] = {
            name: text for name, text in meta["labels"].items() if name not in (RUN_LABEL, "prefect.io/flow-run-name")
        } | {WARM_LABEL: WARM_WAITING}
    made["metadata"].pop("name", None)
    made["metadata"]["generateName"] = f"{NAME}-"
    main = pod["spec"]["containers"][0]
    main["env"] = [
        *(entry for entry in main["env"] if not _differs_between_runs(entry)),
        {"name": HAND_OVER_VARIABLE, "value": f"{MOUNT_PATH}/{FILE}"},
        {"name": HAND_OVER_KEY_VARIABLE, "value": secrets.token_hex(32)},
        {"name": WARM_SECONDS_VARIABLE, "value": str(seconds)},
    ]
    main["volumeMounts"] = [
        *main.get("volumeMounts", []),
        {"name": VOLUME, "mountPath": MOUNT_PATH, "readOnly": True},
    ]
    field = {"fieldPath": f"metadata.annotations['{HAND_OVER_ANNOTATION}']"}
    volume = {"name": VOLUME, "downwardAPI": {"items": [{"path": FILE, "fieldRef": field}]}}
    pod["spec"]["volumes"] = [*pod["spec"].get("volumes", []), volume]
    return made


@dataclass(frozen=True)
class WarmJob:
    """The Job of a warm pod that no run has taken.

    Args:
        name: the Job's name.
        version: the version of the Job that was read.
        created_at: when it was created.
        shape: the shape of its specification.
        keeper: when the worker that created it started.
        has_ended: whether its pod has ended or is about to.
        has_failed: whether its pod has failed.
    """

    name: str
    version: str
    created_at: datetime
    shape: str
    keeper: str
    has_ended: bool
    has_failed: bool

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> "WarmJob":
        """Return the Job that the Kubernetes API returned."""
        meta, annotations = raw["metadata"], raw["metadata"].get("annotations") or {}
        conditions = {
            condition["type"]
            for condition in raw.get("status", {}).get("conditions") or ()
            if condition["status"] == "True"
        }
        return cls(
            meta["name"],
            meta["resourceVersion"],
            datetime.fromisoformat(meta["creationTimestamp"]),
            annotations.get(SHAPE_ANNOTATION, ""),
            annotations.get(KEEPER_ANNOTATION, ""),
            not conditions.isdisjoint(ENDED_CONDITIONS) or "deletionTimestamp" in meta,
            "Failed" in conditions,
        )


class WarmPods:
    """Keeps a number of warm pods of a work pool, and gives them to runs.

    Args:
        replicas: how many pods wait.
        max_age_seconds: after how long a waiting pod is replaced. Secrets in its environment are as old as the pod.
        logger: the worker's logger.
    """

    def __init__(self, replicas: int, max_age_seconds: float, logger: logging.Logger | Any) -> None:
        self._replicas, self._max_age = replicas, timedelta(seconds=max_age_seconds)
        self._logger = logger
        self._cluster: Cluster | None = None
        self._started = ""
        self._paused_until = self._superseded_until = datetime.min.replace(tzinfo=UTC)
        self._is_taken = asyncio.Event()

    def connect(self, cluster: Cluster) -> None:
        """Use a cluster from now on. Without a cluster no run finds a warm pod."""
        self._cluster = cluster

    @property
    def max_wait_seconds(self) -> float:
        """Return after how many seconds a warm pod ends that no worker replaces."""
        return self._max_age.total_seconds() + EXPIRY_SECONDS

    def annotate(self, manifest: Manifest, shape: str) -> Manifest:
        """Return the manifest of a warm pod's Job with the annotations by which `keep` and `take` know the Job."""
        manifest["metadata"]["annotations"] |= {SHAPE_ANNOTATION: shape, KEEPER_ANNOTATION: self._started}
        return manifest

    async def wait(self) -> None:
        """Wait until the warm pods are to be counted."""
        try:
            await asyncio.wait_for(self._is_taken.wait(), KEEP_SECONDS)
            await asyncio.sleep(REPLACE_SECONDS)
        except TimeoutError:
            pass
        self._is_taken.clear()

    async def keep(self, pool: str, shape: str, *, is_room_needed: bool) -> int:
        """Delete the warm pods that no run may take; return how many are to be created.

        Args:
            pool: the id of the work pool.
            shape: the shape of the Jobs that runs with default job variables have now.
            is_room_needed: whether runs wait for room. All warm pods then give way.

        Raises:
            ClusterError: the Kubernetes API does not answer, or refuses a request.
        """
        assert self._cluster
        jobs = [WarmJob.read(raw) for raw in await self._list("jobs", pool)]
        now = self._now
        self._started = self._started or now.isoformat(timespec="microseconds")
        alive = [job for job in jobs if not job.has_ended]
        without_node = [raw for raw in await self._list("pods", pool) if _has_no_node(raw)]
        stuck = {job.name for job in alive} & {raw["metadata"]["labels"].get("job-name") for raw in without_node}
        early = [job.name for job in jobs if job.has_failed and (now - job.created_at).total_seconds() < PAUSE_SECONDS]
        if (stuck or early or is_room_needed) and self._paused_until < now:
            self._paused_until = now + timedelta(seconds=PAUSE_SECONDS)
            reason = f"{early[0]} failed soon after its start. See its log" if early else "there is no room"
            self._logger.warning("No warm pods are created for %.0f s: %s.", PAUSE_SECONDS, reason)
        own = [
            job
            for job in sorted(alive, key=lambda job: (job.created_at, job.name))
            if (job.keeper, job.shape) == (self._started, shape)
            and job.name not in stuck
            and now - job.created_at < self._max_age
            and not is_room_needed
        ][: self._replicas]
        for job in alive:
            if job.keeper <= self._started and job not in own:
                await self._delete(job.name, job.version)
        if any(job.keeper > self._started for job in alive):
            # For a moment all pods of the newer worker may have a run. It would delete what this worker makes.
            self._superseded_until = now + timedelta(seconds=2 * PAUSE_SECONDS)
        return 0 if max(self._superseded_until, self._paused_until) > now else self._replicas - len(own)

    async def take(self, manifest: Manifest, claim: UUID) -> str:
        """Give a warm pod to a run; return the name of its Job.

        Args:
            manifest: the Job that the run would get.
            claim: the id of the state that is the claim.

        Returns:
            Empty if there is no warm pod for this run. No warm pod executes the run then.

        Raises:
            ClusterError: a Job may have the run's label, and cannot be deleted. The run must get no other Job.
        """
        if not self._cluster:
            return ""
        try:
            candidates = await self._find_candidates(manifest)
        except ClusterError as error:
            self._warn(manifest, "Warm pods cannot be listed: %s. The run gets a new pod.", error)
            return ""
        for job, pod in candidates:
            if await self._label_job(job, manifest, claim):
                self._is_taken.set()
                if await self._label_pod(pod, manifest, claim):
                    return job.name
                await self._delete(job.name)
                return ""
        return ""

    async def _find_candidates(self, manifest: Manifest) -> list[tuple[WarmJob, Mapping[str, Any]]]:
        """Return the Jobs with the shape of a run's Job and their pods, oldest first."""
        pool, shape = manifest["metadata"]["labels"].get(POOL_LABEL, ""), shape_of(manifest)
        raw_jobs, raw_pods = await asyncio.gather(self._list("jobs", pool), self._list("pods", pool))
        pods = {raw["metadata"]["labels"].get("job-name"): raw for raw in raw_pods if _is_ready(raw)}
        found = [job for job in map(WarmJob.read, raw_jobs) if job.name in pods and not job.has_ended]
        fit = [job for job in found if job.shape == shape and self._now - job.created_at < self._max_age]
        return [(job, pods[job.name]) for job in sorted(fit, key=lambda job: (job.created_at, job.name))]

    async def _label_job(self, job: WarmJob, manifest: Manifest, claim: UUID) -> bool:
        """Label a Job with a run unless another run has taken the Job; return whether this run has it.

        An unanswered request may take effect late. So it is repeated until there is an answer.
        """
        assert self._cluster
        meta, path = manifest["metadata"], self._path("jobs", job.name)
        annotations = meta["annotations"] | {CLAIM_ANNOTATION: f"{claim} {self._now.isoformat()}"}
        if credential := _variables_of_run(manifest).get(AUTH_VARIABLE):
            annotations[CREDENTIAL_ANNOTATION] = credential_hash(credential)
        labels = meta["labels"] | {WARM_LABEL: WARM_TAKEN}
        body = {"metadata": {"resourceVersion": job.version, "labels": labels, "annotations": annotations}}
        is_repeated = False
        while True:
            try:
                if await self._cluster.ask("PATCH", path, body, absent=(404, 409)):
                    return True
                found = await self._cluster.ask("GET", path, absent=(404,))
                if not found:
                    return False
                now = found["metadata"]
                if str((now.get("annotations") or {}).get(CLAIM_ANNOTATION, "")).startswith(str(claim)):
                    return True
                if now["labels"].get(WARM_LABEL) != WARM_WAITING or RUN_LABEL in now["labels"]:
                    return False
                if WarmJob.read(found).has_ended:
                    return False
                # Only its status has changed. An unanswered request has named an older version: it has no effect now.
                body["metadata"]["resourceVersion"] = now["resourceVersion"]
            except ClusterRefusalError as error:
                if is_repeated:
                    raise
                self._warn(manifest, "Job %s cannot be given to the run: %s. Trying another pod.", job.name, error)
                return False
            except ClusterError as error:
                self._warn(manifest, "Job %s has not got the run: %s. Asking again.", job.name, error)
                is_repeated = True
                await asyncio.sleep(RETRY_SECONDS)

    async def _label_pod(self, pod: Mapping[str, Any], manifest: Manifest, claim: UUID) -> bool:
        """Label the pod of a Job with the Job's run, and hand the run over; return whether the pod has the run."""
        assert self._cluster
        meta, name = manifest["spec"]["template"]["metadata"], pod["metadata"]["name"]
        variables = _variables_of_run(manifest) | {CLAIM_VARIABLE: claim_of(f"-{claim}")}
        annotations = (meta.get("annotations") or {}) | {
            HAND_OVER_ANNOTATION: hand_over.encrypt(variables, _hand_over_key(pod))
        }
        body = {"metadata": {"labels": meta["labels"] | {WARM_LABEL: WARM_TAKEN}, "annotations": annotations}}
        is_repeated = False
        while True:
            try:
                found = await self._cluster.ask("PATCH", self._path("pods", name), body, absent=(404,))
                # A pod that has ended or is gone may have had the run from the first request.
                return is_repeated or (found is not None and found["status"].get("phase") not in ENDED_PHASES)
            except ClusterRefusalError as error:
                if is_repeated:
                    raise
                self._warn(manifest, "Pod %s cannot be given to the run: %s. The run gets a new pod.", name, error)
                return False
            except ClusterError as error:
                self._warn(manifest, "Pod %s has not got the run: %s. Asking again.", name, error)
                is_repeated = True
                await asyncio.sleep(RETRY_SECONDS)

    async def _delete(self, job: str, version: str = "") -> None:
        """Delete a Job and its pod. With a version, only if the Job has not changed since."""
        assert self._cluster
        body: dict[str, Any] = {"propagationPolicy": "Background"}
        if version:
            body["preconditions"] = {"resourceVersion": version}
        await self._cluster.ask("DELETE", self._path("jobs", job), body, absent=(404, 409))

    async def _list(self, kind: str, pool: str) -> list[dict[str, Any]]:
        """Return the Jobs or pods of warm pods that no run has taken."""
        assert self._cluster
        # A run may forge the first label by its job variables. It cannot remove the last one.
        query = {"labelSelector": f"{WARM_LABEL}={WARM_WAITING},{POOL_LABEL}={pool},!{RUN_LABEL}"}
        found: list[dict[str, Any]] = (await self._cluster.ask("GET", self._path(kind), query=query))["items"]
        return found

    def _path(self, kind: str, name: str = "") -> str:
        assert self._cluster
        group = "/apis/batch/v1" if kind == "jobs" else "/api/v1"
        return f"{group}/namespaces/{self._cluster.namespace}/{kind}{'/' if name else ''}{name}"

    def _warn(self, manifest: Manifest, message: str, *values: object) -> None:
        """Log a warning about the run of a Job."""
        self._logger.warning(message, *values, extra={RUN_ID: manifest["metadata"]["labels"].get(RUN_LABEL, "")})

    @property
    def _now(self) -> datetime:
        """Return the time of the Kubernetes API, which is that of its objects."""
        assert self._cluster
        return datetime.now(UTC) + self._cluster.ahead


def _conditions(pod: Mapping[str, Any]) -> dict[str, str]:
    return {condition["type"]: condition["status"] for condition in pod["status"].get("conditions") or ()}


def _is_ready(pod: Mapping[str, Any]) -> bool:
    """Return whether a warm pod runs on a node that answers."""
    is_ready = _conditions(pod).get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]
    return is_ready and bool(_hand_over_key(pod))


def _has_no_node(pod: Mapping[str, Any]) -> bool:
    return _conditions(pod).get("PodScheduled") == "False"


def _hand_over_key(pod: Mapping[str, Any]) -> str:
    """Return the key in the specification of a warm pod; empty if there is none."""
    entries = (entry for container in pod["spec"]["containers"] for entry in container.get("env") or ())
    return next((str(entry.get("value", "")) for entry in entries if entry["name"] == HAND_OVER_KEY_VARIABLE), "")
