"""Explain why a release is not ready: the object, the event and the line of a log that show the cause."""

from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import Any

from orchestration.diagnosis_table import WAITING_REASONS
from orchestration.errors import ClusterError
from orchestration.operations.environment import Environment, Object

FAILING_REASONS = frozenset(reason for reason, meaning in WAITING_REASONS.items() if meaning.fails_rollout)
"""Reasons of a waiting container that only a person can cure."""

CRASH_LOOP_RESTARTS = 3
"""Restarts from which a crash loop counts as permanent: a container may wait for another component to start."""

GRACE_SECONDS = 20.0
"""How long a hopeless state may last: a registry may be away briefly, or a Secret be created soon."""

MAX_EVENTS = 20


def release_selector(release: str) -> str:
    """Return the label selector of a release's objects, without the pods of flow runs."""
    return f"app.kubernetes.io/instance={release},prefect.io/role!=flow-run"


def container_statuses(pod: Object) -> list[Object]:
    """Return the statuses of a pod's init containers and containers."""
    status = pod["status"]
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def hopeless_reason(pod: Object) -> str:
    """Return why a pod cannot start until a person repairs it; empty if it may still start.

    The reasons come from the project's one table of diagnoses.
    """
    age = (datetime.now(UTC) - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])).total_seconds()
    for status in container_statuses(pod):
        state = status.get("state", {})
        waiting = state.get("waiting", {})
        reason = waiting.get("reason")
        # Between two restarts the kubelet reports an init container as ended more often than as waiting.
        if reason == "CrashLoopBackOff" or state.get("terminated", {}).get("exitCode"):
            if status["restartCount"] >= CRASH_LOOP_RESTARTS:
                return f"{status['name']}: ended {status['restartCount']} times"
        elif reason in FAILING_REASONS and age > GRACE_SECONDS:
            return f"{status['name']}: {reason}: {waiting.get('message', '')}"
    return ""


def _is_ready(pod: Object) -> bool:
    if pod["status"].get("phase") == "Succeeded":
        return True
    conditions = {condition["type"]: condition["status"] for condition in pod["status"].get("conditions", [])}
    return conditions.get("Ready") == "True"


def explain_pod(environment: Environment, pod: Object, containers: Collection[str] = ()) -> Iterator[str]:
    """Yield lines that say why a pod does not run, and how its containers ended.

    Args:
        environment: the environment of the pod.
        pod: the pod, as the Kubernetes API returns it.
        containers: the names of the containers to explain; all if empty.
    """
    name = pod["metadata"]["name"]
    for condition in pod["status"].get("conditions", []):
        if condition["status"] == "False" and condition.get("reason") == "Unschedulable":
            yield f"pod/{name}: no node takes it: {condition['message']}"
    for status in container_statuses(pod):
        if containers and status["name"] not in containers:
            continue
        state = status.get("state", {}) | {"last": status.get("lastState", {}).get("terminated")}
        if "running" in state and not status["ready"]:
            # The container waits for something or starts slowly. The last line of its log shows which.
            yield from (
                f"pod/{name} {status['name']}: {line}" for line in log_tail(environment, pod, status["name"], 1)
            )
        if waiting := state.get("waiting"):
            yield f"pod/{name} {status['name']}: {waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
        ended: Any = state.get("terminated") or state.get("last")
        if ended and ended["exitCode"]:
            yield f"pod/{name} {status['name']}: {ended['reason']}, exit code {ended['exitCode']}"
            yield from (f"  log: {line}" for line in log_tail(environment, pod, status["name"]))


def log_tail(environment: Environment, pod: Object, container: str, count: int = 5) -> list[str]:
    """Return the last lines of a container's log; of its previous container if the log is empty."""
    for options in ([], ["--previous"]):
        try:
            text = environment.kubectl(
                "logs", pod["metadata"]["name"], "--namespace", pod["metadata"]["namespace"],
                "--container", container, f"--tail={count}", *options,
            )  # fmt: skip
        except ClusterError:
            continue
        if text.strip():
            return text.strip().splitlines()
    return []


def explain_release(environment: Environment, release: str) -> list[str]:
    """Return lines that say what is wrong with a release's objects: pods first, then workloads, then events.

    Empty if nothing is wrong. A Job of a CronJob that failed is no longer wrong once a later one completed.
    """
    kinds = "deployments,statefulsets,replicasets,jobs"
    workloads = environment.objects(kinds, "--selector", release_selector(release))
    cured = set(_cured_jobs(workloads))
    lines: list[str] = []
    names = set()
    for pod in environment.objects("pods", "--selector", release_selector(release)):
        is_wrong = not _is_ready(pod) and not pod["metadata"].get("deletionTimestamp")
        if is_wrong and cured.isdisjoint(_owners(pod)):
            names.add(pod["metadata"]["name"])
            lines += explain_pod(environment, pod)
    for workload in workloads:
        if workload["metadata"]["uid"] in cured:
            continue
        names.add(workload["metadata"]["name"])
        for condition in workload["status"].get("conditions", []):
            if (condition["type"], condition["status"]) in (("ReplicaFailure", "True"), ("Failed", "True")):
                name = f"{workload['kind'].lower()}/{workload['metadata']['name']}"
                lines.append(f"{name}: {condition.get('message')}")
    return lines + _warnings(environment, names)


def _owners(found: Object) -> set[str]:
    """Return the UIDs of an object's owners."""
    return {owner["uid"] for owner in found["metadata"].get("ownerReferences", [])}


def _cured_jobs(workloads: Collection[Object]) -> Iterator[str]:
    """Yield the UIDs of Jobs after which another Job of the same CronJob completed."""
    jobs = [workload for workload in workloads if workload["kind"] == "Job"]
    for job in jobs:
        started = job["status"].get("startTime", "")
        later = [other for other in jobs if other is not job and other["status"].get("completionTime", "") > started]
        if any(_owners(other) & _owners(job) for other in later):
            yield job["metadata"]["uid"]


def _warnings(environment: Environment, names: Collection[str]) -> list[str]:
    """Return the newest Warning events of the named objects, without failed probes and repetitions."""
    events = environment.objects("events", "--field-selector", "type=Warning")
    events.sort(key=lambda event: event.get("lastTimestamp") or event["metadata"]["creationTimestamp"])
    lines: list[str] = []
    for event in events[-MAX_EVENTS:]:
        involved = event["involvedObject"]
        line = f"event of {involved['kind'].lower()}/{involved['name']}: {event['reason']}: {event['message']}"
        if involved["name"] in names and line not in lines and "probe failed" not in event["message"]:
            lines.append(line)
    return lines
