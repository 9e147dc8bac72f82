"""The events of pods that Prefect's own observer emits: same names, resources and ids, from what a round reads.

An event's id is made of what it says, so that the server keeps one of several. A reconciler that begins asks the server
which events are there already: automations forget after half an hour which they have seen.

Names, resources and ids are those of Prefect's observer, which calls every failed container evicted; here a pod
is evicted that the cluster ended, and any other one failed.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

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

BATCH = 100
"""Events in a request."""

PODS = 12
"""Pods of which a request asks for events: each has four at most, and an answer has 50."""

TIGHT = timedelta(minutes=5)
"""How far apart two events of a pod may be of which the later one says that it follows the other."""


class PodEvents:
    """Tells the server once what happens to pods.

    Args:
        server: gets the events.
        namespace: of the pods.
    """

    def __init__(self, server: Server, namespace: str) -> None:
        self._server, self._namespace = server, namespace
        self._told: dict[str, set[str]] = {}
        """Ids of events, by the pod's."""
        self._seen: dict[str, tuple[Any, ...]] = {}
        """What was read of each pod, as far as it makes events."""
        self._is_new = True

    def forget(self) -> None:
        """Note that another reconciler tells from now on."""
        self._told, self._seen, self._is_new = {}, {}, True

    async def tell(self, pods: Sequence[Pod]) -> None:
        """Send the events that were not sent.

        Args:
            pods: all that there are, with what was read of them.

        Raises:
            ApiError: the server does not answer, or refuses events; what it refuses is not sent again.
        """
        if self._is_new and pods:
            await self._ask(pods)
            self._is_new = False
        seen = {each.uid: (each.phase, each.started, each.waiting, each.live, each.restarts) for each in pods}
        changed = [each for each in pods if self._seen.get(each.uid) != seen[each.uid]]
        self._told = {uid: self._told.get(uid, set()) for uid in seen}
        found = [(each.uid, event) for each in changed for event in events_of(each, self._namespace)]
        for batch in _parts([each for each in found if each[1]["id"] not in self._told[each[0]]], BATCH):
            refused = None
            try:
                await self._server.ask("POST", "/events", [event for _, event in batch], idempotent=True)
            except RefusedError as error:
                refused = error
            for uid, event in batch:
                self._told[uid].add(event["id"])
            if refused:
                raise refused
        self._seen = seen

    async def _ask(self, pods: Sequence[Pod]) -> None:
        """Note which of the pods' events the server has."""
        for some in _parts(pods, PODS):
            which: JSON = {
                "event": {"prefix": [PREFIX]},
                "resource": {"id": [f"{PREFIX}{each.uid}" for each in some]},
                "occurred": {"since": min(each.created for each in some).isoformat()},
            }
            answer = await self._server.ask("POST", "/events/filter", {"filter": which}, idempotent=True)
            for each in answer["events"]:
                uid = each["resource"]["prefect.resource.id"].removeprefix(PREFIX)
                self._told.setdefault(uid, set()).add(each["id"])


def _parts(found: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(found), size):
        yield list(found[start : start + size])


def events_of(pod: Pod, namespace: str) -> list[JSON]:
    """Return what has happened to a pod, oldest first."""
    diagnosis = _diagnosis(pod)
    happened: list[tuple[str, datetime, JSON, PodDiagnosis | None]] = [("Pending", pod.created, {}, None)]
    if pod.live and not pod.started and diagnosis:
        happened.append(("Pending", pod.created, {}, diagnosis))
    if pod.began:
        happened.append(("Running", pod.began, {}, None))
    if pod.end:
        why = {} if pod.phase == "Succeeded" else {"kubernetes.reason": pod.end.reason}
        happened.append((pod.phase, pod.end.at, why, diagnosis))
    made: list[JSON] = []
    for of, at, more, category in happened:
        name = "evicted" if of == "Failed" and cause_of_end([pod]).kind == "disruption" else of.lower()
        made.append(
            {
                "id": pod_event_id(pod.uid, of, pod.restarts, category),
                "event": PREFIX + name,
                "occurred": at.isoformat(),
                "resource": pod_resource(pod.uid, pod.name, namespace, category) | more,
                "related": resources_of_labels(pod.labels),
                "payload": {},
            }
        )
    for first, second in pairwise(made):
        if datetime.fromisoformat(second["occurred"]) - datetime.fromisoformat(first["occurred"]) < TIGHT:
            second["follows"] = first["id"]
    return made


def _diagnosis(pod: Pod) -> PodDiagnosis | None:
    """Prefect's category of what is wrong with a pod, if anything."""
    if pod.end:
        if pod.end.oom:
            return PodDiagnosis.OOM_KILLED
        return PodDiagnosis.EVICTED if pod.end.reason == "Evicted" else None
    if not pod.waiting:
        return None
    word, said = pod.waiting
    if word in ("ErrImagePull", "ImagePullBackOff"):
        return PodDiagnosis.IMAGE_PULL_ERROR
    return unschedulable_diagnosis(said) if word == "Unschedulable" else None
