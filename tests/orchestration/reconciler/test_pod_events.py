"""Tests that pod events equal those of Prefect's observer, and that each fires automations once, on a real server."""

import asyncio
import copy
import json
import logging
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import httpx
import pytest
from prefect_kubernetes import observer

from orchestration.prefect_api import Server
from orchestration.prefect_compat.events import POD_EVENT_PREFIX as PREFIX
from orchestration.reconciler.kubernetes_objects import PodObject
from orchestration.reconciler.model import Pod
from orchestration.reconciler.pod_events import PodEvents, build_pod_events
from tests.parts import asked, client_of, wait_until

NOW = datetime.now(UTC).replace(microsecond=0)
FINISHED = f"{NOW + timedelta(seconds=9):%Y-%m-%dT%H:%M:%SZ}"
STARTED = f"{NOW + timedelta(seconds=2):%Y-%m-%dT%H:%M:%SZ}"
RAN = {"startedAt": STARTED, "finishedAt": FINISHED}
UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}


def pod(phase: str, state: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    """Return a pod of a run, as the Kubernetes API returns it."""
    labels = {
        "prefect.io/flow-run-id": str(uuid4()), "prefect.io/flow-run-name": "heron", "prefect.io/flow-id": "f",
        "prefect.io/flow-name": "etl", "prefect.io/deployment-id": "d", "prefect.io/deployment-name": "nightly",
        "prefect.io/work-pool-id": "p", "prefect.io/work-pool-name": "default",
        "prefect.io/worker-name": "prefect-work-pool-worker-7f", "job-name": "heron-1",
    }  # fmt: skip
    containers = [{"name": "prefect-job", "state": state, "restartCount": 0}] if state else []
    created = f"{NOW:%Y-%m-%dT%H:%M:%SZ}"
    return {
        "metadata": {"name": "heron-1-x", "uid": str(uuid4()), "creationTimestamp": created, "labels": labels},
        "spec": {"containers": [{"name": "prefect-job"}], "nodeName": "node-1"},
        "status": {"phase": phase, "containerStatuses": containers, **status},
    }


def read(raw: dict[str, Any]) -> Pod:
    return Pod.read(PodObject.model_validate(raw))


def event_of_observer(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the event that Prefect's observer emits for a pod in this state."""
    emitted = []

    class Client:
        async def emit(self, event: Any) -> None:
            emitted.append(event)

    meta = raw["metadata"]
    with patch.multiple(observer, events_client=Client(), _last_event_cache={}):
        found = observer._replicate_pod_event(
            event={"type": "ADDED", "object": raw}, uid=meta["uid"], name=meta["name"], namespace="ns",
            labels=meta["labels"] | {"prefect.io/flow-run-id": "none"}, status=raw["status"],
            logger=logging.getLogger(__name__),
        )  # fmt: skip
        asyncio.run(found)
    [event] = emitted
    return dict(event.model_dump(mode="json"))


CASES = {
    "pending": pod("Pending"),
    "unschedulable": pod("Pending", conditions=[UNSCHEDULABLE | {"message": "0/1 nodes: 1 Insufficient memory."}]),
    "tainted": pod("Pending", conditions=[UNSCHEDULABLE | {"message": "0/1 nodes: untolerated taint {a: b}."}]),
    "no image": pod("Pending", {"waiting": {"reason": "ErrImagePull", "message": "not found"}}),
    "running": pod("Running", {"running": {"startedAt": STARTED}}, startTime=STARTED),
    "succeeded": pod("Succeeded", {"terminated": {"exitCode": 0, "reason": "Completed"} | RAN}),
    "failed": pod("Failed", {"terminated": {"exitCode": 1, "reason": "Error"} | RAN}),
    "oom": pod("Failed", {"terminated": {"exitCode": 137, "reason": "OOMKilled"} | RAN}),
}


@pytest.mark.parametrize("raw", CASES.values(), ids=CASES)
def test_events_equal_those_of_prefects_observer(raw: dict[str, Any]) -> None:
    ours, theirs = build_pod_events(read(raw), "ns")[-1], event_of_observer(raw)
    ours["resource"].pop("kubernetes.reason", None)
    about = {resource["prefect.resource.role"]: resource for resource in ours["related"]}
    about["flow-run"]["prefect.resource.id"] = "prefect.flow-run.none"
    for name in ("id", "event", "resource"):
        assert ours[name] == theirs[name], name
    assert about == {resource["prefect.resource.role"]: resource for resource in theirs["related"]}
    assert datetime.fromisoformat(ours["occurred"]) == datetime.fromisoformat(theirs["occurred"])


def test_pod_that_is_first_read_at_its_end_has_all_events() -> None:
    found = build_pod_events(read(CASES["failed"]), "ns")
    assert [event["event"].removeprefix(PREFIX) for event in found] == ["pending", "running", "failed"]
    assert [event.get("follows") for event in found] == [None, found[0]["id"], found[1]["id"]]
    never_ran = pod("Failed", reason="Evicted", message="The node was low on memory")
    found = build_pod_events(read(never_ran), "ns")
    assert [event["event"].removeprefix(PREFIX) for event in found] == ["pending", "evicted"]
    assert found[-1]["resource"]["kubernetes.reason"] == found[-1]["resource"]["kubernetes.diagnosis"] == "Evicted"


def test_pod_that_the_cluster_ended_is_evicted() -> None:
    target = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": ""}
    drained = copy.deepcopy(CASES["failed"])
    drained["status"]["conditions"] = [target]
    assert build_pod_events(read(drained), "ns")[-1]["event"] == f"{PREFIX}evicted"


def test_each_event_is_emitted_once_and_fires_automation_once(prefect_server: str) -> None:
    """That includes a new reconciler after another has emitted events, and a request whose answer was lost."""
    stages = [pod("Pending"), *(copy.deepcopy(CASES[case]) for case in ("running", "failed"))]
    for stage in stages[1:]:
        stage["metadata"] = stages[0]["metadata"]
    uid, run = stages[0]["metadata"]["uid"], stages[0]["metadata"]["labels"]["prefect.io/flow-run-id"]
    others = [pod("Succeeded", {"terminated": {"exitCode": 0, "reason": "Completed"} | RAN}) for _ in range(30)]
    with client_of(prefect_server) as api:
        trigger = {
            "type": "event", "posture": "Reactive", "threshold": 1, "expect": [f"{PREFIX}failed"],
            "match": {"prefect.resource.id": f"{PREFIX}{uid}"},
            "match_related": {"prefect.resource.id": f"prefect.flow-run.{run}"},
        }  # fmt: skip
        body = {"name": f"pods-{uid}", "trigger": trigger, "actions": [{"type": "do-nothing"}]}
        automation = asked(api, "POST", "/automations/", body)["id"]

        def events(resource: str) -> list[str]:
            which = {"resource": {"id": [resource]}, "order": "ASC"}
            return [event["event"] for event in asked(api, "POST", "/events/filter", {"filter": which})["events"]]

        async def emit(*pods: dict[str, Any], rounds: int = 2) -> list[str]:
            """Return the ids of the events that a new reconciler sends in some rounds."""
            sent: list[str] = []

            async def note(request: httpx.Request) -> None:
                if request.url.path.endswith("/events"):
                    sent.extend(event["id"] for event in json.loads(request.content))

            hooks = {"request": [note]}
            async with httpx.AsyncClient(base_url=prefect_server, timeout=60, event_hooks=hooks) as client:
                events_of_pods = PodEvents(Server(client, prefect_server), "ns")
                for _ in range(rounds):
                    await events_of_pods.emit([read(raw) for raw in pods])
            return sent

        for stage in stages:
            assert len(asyncio.run(emit(stage))) >= 1
        wait_until(lambda: f"{PREFIX}failed" in events(f"{PREFIX}{uid}"), "the events")
        wait_until(
            lambda: "prefect.automation.triggered" in events(f"prefect.automation.{automation}"), "the automation"
        )
        assert len(asyncio.run(emit(stages[-1], *others))) == 3 * len(others), "the events of the first pod exist"
        wait_until(lambda: len(events(f"{PREFIX}{others[-1]['metadata']['uid']}")) == 3, "the events of the other pods")
        assert asyncio.run(emit(stages[-1], *others)) == []
        # As if the answer was lost, or two reconcilers emit at once.
        with patch.object(PodEvents, "_read_emitted"):
            assert len(asyncio.run(emit(stages[-1], rounds=1))) == 3
        asyncio.run(emit(marker := pod("Pending")))
        wait_until(lambda: events(f"{PREFIX}{marker['metadata']['uid']}"), "the event that was sent later")
        assert events(f"{PREFIX}{uid}") == [f"{PREFIX}{phase}" for phase in ("pending", "running", "failed")]
        assert Counter(events(f"prefect.automation.{automation}"))["prefect.automation.triggered"] == 1
        asked(api, "DELETE", f"/automations/{automation}")


def test_reconciler_does_not_import_prefect() -> None:
    """Prefect takes as much memory as all the rest of the reconciler."""
    code = "import sys, orchestration.reconciler.loop; print('prefect' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
