"""Why a release does not become ready: which object, which event, which line of a log."""

from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from typing import Any

from orchestration.diagnosis_table import WAITING_REASONS
from orchestration.errors import ClusterError
from orchestration.operations.environment import Environment, Object

HOPELESS = frozenset(reason for reason, meaning in WAITING_REASONS.items() if meaning.fails_rollout)
"""Why a container waits for what only a person can change."""

PATIENCE = 20.0
"""Seconds that such a state may last: a registry may be briefly away, a Secret about to be made."""


def of_release(release: str) -> str:
    """The selector of a release's objects; its runs' pods are not among them, and their troubles not its own."""
    return f"app.kubernetes.io/instance={release},prefect.io/role!=flow-run"


def _statuses(pod: Object) -> list[Object]:
    status = pod["status"]
    return [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]


def hopeless(pod: Object) -> str:
    """Why a pod will not start without a person; empty if it may."""
    age = (datetime.now(UTC) - datetime.fromisoformat(pod["metadata"]["creationTimestamp"])).total_seconds()
    for status in _statuses(pod):
        waiting = status.get("state", {}).get("waiting", {})
        if waiting.get("reason") in HOPELESS and age > PATIENCE:
            return f"{status['name']}: {waiting['reason']}: {waiting.get('message', '')}"
        if waiting.get("reason") == "CrashLoopBackOff" and status["restartCount"] >= 3:
            return f"{status['name']}: ended {status['restartCount']} times"
    return ""


def _ready(pod: Object) -> bool:
    if pod["status"].get("phase") == "Succeeded":
        return True
    conditions = {each["type"]: each["status"] for each in pod["status"].get("conditions", [])}
    return conditions.get("Ready") == "True"


def troubles(environment: Environment, pod: Object, containers: Collection[str] = ()) -> Iterator[str]:
    """What keeps a pod from running, and how its containers ended; only of those containers, if some are named."""
    name = pod["metadata"]["name"]
    for condition in pod["status"].get("conditions", []):
        if condition["status"] == "False" and condition.get("reason") == "Unschedulable":
            yield f"pod/{name}: no node takes it: {condition['message']}"
    for status in _statuses(pod):
        if containers and status["name"] not in containers:
            continue
        state = status.get("state", {}) | {"last": status.get("lastState", {}).get("terminated")}
        if "running" in state and not status["ready"]:
            # It waits for something, or is slow: the end of its log says which.
            yield from (
                f"pod/{name} {status['name']}: {line}" for line in last_lines(environment, name, status["name"], 1)
            )
        if waiting := state.get("waiting"):
            yield f"pod/{name} {status['name']}: {waiting.get('reason')}: {waiting.get('message', '')}".rstrip(": ")
        ended: Any = state.get("terminated") or state.get("last")
        if ended and ended["exitCode"]:
            yield f"pod/{name} {status['name']}: {ended['reason']}, exit code {ended['exitCode']}"
            yield from (f"  log: {line}" for line in last_lines(environment, name, status["name"]))


def last_lines(environment: Environment, pod: str, container: str, count: int = 5) -> list[str]:
    """The end of a container's log, of its run before if it has none yet."""
    for more in ([], ["--previous"]):
        try:
            text = environment.kubectl("logs", pod, "--container", container, f"--tail={count}", *more)
        except ClusterError:
            continue
        if text.strip():
            return text.strip().splitlines()
    return []


def why(environment: Environment, release: str) -> list[str]:
    """What is wrong with a release's objects, the most telling first; empty if nothing is seen."""
    found: list[str] = []
    names = set()
    for pod in environment.objects("pods", "--selector", of_release(release)):
        if not _ready(pod) and not pod["metadata"].get("deletionTimestamp"):
            names.add(pod["metadata"]["name"])
            found += troubles(environment, pod)
    for each in environment.objects("deployments,statefulsets,replicasets,jobs", "--selector", of_release(release)):
        names.add(each["metadata"]["name"])
        for condition in each["status"].get("conditions", []):
            if (condition["type"], condition["status"]) in (("ReplicaFailure", "True"), ("Failed", "True")):
                found.append(f"{each['kind'].lower()}/{each['metadata']['name']}: {condition.get('message')}")
    events = environment.objects("events", "--field-selector", "type=Warning")
    events.sort(key=lambda each: each.get("lastTimestamp") or each["metadata"]["creationTimestamp"])
    seen = set()
    for event in events[-20:]:
        about = event["involvedObject"]
        line = f"event of {about['kind'].lower()}/{about['name']}: {event['reason']}: {event['message']}"
        if about["name"] in names and line not in seen and "probe failed" not in event["message"]:
            seen.add(line)
            found.append(line)
    return found
