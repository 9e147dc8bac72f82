"""Emits the events of pods that Prefect's own observer emits, with the same names, resources and ids.

An event's id depends on its content, so the server keeps one event of several reconcilers. A new reconciler asks the
server which events exist: automations remember only for half an hour which events they have seen.

One name differs. Prefect's observer calls every failed container evicted. Here, a pod that the cluster ended is
evicted, and any other failed pod is failed.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, TypeVar

from orchestration.prefect_api import JSON, RefusedError, Server
from orchestration.prefect_compat.events import POD_EVENT_PREFIX as PREFIX
from orchestration.prefect_compat.events import (
    PodDiagnosis,
    pod_event_id,
    pod_resource,
    resources_of_labels,
    unschedulable_diagnosis,
)
from orchestration.reconciler.causes import cause_of_end
from orchestration.reconciler.model import Pod

EVENTS_PER_REQUEST = 100

PODS_PER_QUERY = 12
"""How many pods one query for events names. A pod has four events at most, and an answer has 50."""

FOLLOWS_WITHIN = timedelta(minutes=5)
"""How far apart two events of a pod may be for the later event to name the earlier event as its predecessor."""

Item = TypeVar("Item")


class PodEvents:
    """Emits each event of a pod once.

    Args:
        server: the Prefect API, which receives the events.
        namespace: the namespace of the pods.
    """

    def __init__(self, server: Server, namespace: str) -> None:
        self._server, self._namespace = server, namespace
        self._emitted: dict[str, set[str]] = {}
        """The ids of emitted events, by the pod's UID."""
        self._observed: dict[str, tuple[Any, ...]] = {}
        """The fields of each pod that its events depend on, as last read, by the pod's UID."""
        self._is_new = True

    def forget(self) -> None:
        """Forget the emitted events: another reconciler is the leader now."""
        self._emitted, self._observed, self._is_new = {}, {}, True

    async def emit(self, pods: Sequence[Pod]) -> None:
        """Emit the events of pods that were not emitted before.

        Args:
            pods: all pods that exist.

        Raises:
            ApiError: the server does not answer, or refuses events. Refused events are not sent again.
        """
        if self._is_new and pods:
            await self._read_emitted(pods)
            self._is_new = False
        observed = {pod.uid: (pod.phase, pod.has_started, pod.waiting, pod.is_live, pod.restarts) for pod in pods}
        changed = [pod for pod in pods if self._observed.get(pod.uid) != observed[pod.uid]]
        self._emitted = {uid: self._emitted.get(uid, set()) for uid in observed}
        events = [(pod.uid, event) for pod in changed for event in build_pod_events(pod, self._namespace)]
        new = [(uid, event) for uid, event in events if event["id"] not in self._emitted[uid]]
        for batch in _batches(new, EVENTS_PER_REQUEST):
            refusal = None
            try:
                await self._server.ask("POST", "/events", [event for _, event in batch], idempotent=True)
            except RefusedError as error:
                refusal = error
            for uid, event in batch:
                self._emitted[uid].add(event["id"])
            if refusal:
                raise refusal
        self._observed = observed

    async def _read_emitted(self, pods: Sequence[Pod]) -> None:
        """Read which of the pods' events the server has."""
        for batch in _batches(pods, PODS_PER_QUERY):
            event_filter: JSON = {
                "event": {"prefix": [PREFIX]},
                "resource": {"id": [f"{PREFIX}{pod.uid}" for pod in batch]},
                "occurred": {"since": min(pod.created_at for pod in batch).isoformat()},
            }
            answer = await self._server.ask("POST", "/events/filter", {"filter": event_filter}, idempotent=True)
            for event in answer["events"]:
                uid = event["resource"]["prefect.resource.id"].removeprefix(PREFIX)
                self._emitted.setdefault(uid, set()).add(event["id"])


def _batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def build_pod_events(pod: Pod, namespace: str) -> list[JSON]:
    """Return all events of a pod until now, oldest first.

    Args:
        pod: the pod.
        namespace: the namespace of the pod.
    """
    diagnosis = _diagnosis(pod)
    changes: list[tuple[str, datetime, JSON, PodDiagnosis | None]] = [("Pending", pod.created_at, {}, None)]
    if pod.is_live and not pod.has_started and diagnosis:
        changes.append(("Pending", pod.created_at, {}, diagnosis))
    if pod.started_at:
        changes.append(("Running", pod.started_at, {}, None))
    if pod.end:
        reason = {} if pod.phase == "Succeeded" else {"kubernetes.reason": pod.end.reason}
        changes.append((pod.phase, pod.end.time, reason, diagnosis))
    events: list[JSON] = []
    for phase, occurred, reason, category in changes:
        is_evicted = phase == "Failed" and cause_of_end([pod]).kind == "disruption"
        events.append(
            {
                "id": pod_event_id(pod.uid, phase, pod.restarts, category),
                "event": PREFIX + ("evicted" if is_evicted else phase.lower()),
                "occurred": occurred.isoformat(),
                "resource": pod_resource(pod.uid, pod.name, namespace, category) | reason,
                "related": resources_of_labels(pod.labels),
                "payload": {},
            }
        )
    for first, second in pairwise(events):
        gap = datetime.fromisoformat(second["occurred"]) - datetime.fromisoformat(first["occurred"])
        if gap < FOLLOWS_WITHIN:
            second["follows"] = first["id"]
    return events


def _diagnosis(pod: Pod) -> PodDiagnosis | None:
    """Return Prefect's category for the failure of a pod; None if nothing has failed."""
    if pod.end:
        if pod.end.oom:
            return PodDiagnosis.OOM_KILLED
        return PodDiagnosis.EVICTED if pod.end.reason == "Evicted" else None
    if not pod.waiting:
        return None
    reason, message = pod.waiting
    if reason in ("ErrImagePull", "ImagePullBackOff"):
        return PodDiagnosis.IMAGE_PULL_ERROR
    return unschedulable_diagnosis(message) if reason == "Unschedulable" else None
