"""Events with the names and fields of Prefect's events, so that the server treats them alike.

This module imports no Prefect, which would double the reconciler's memory.
"""

import functools
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

Json = dict[str, Any]

TASK_RUN_RESOURCE_PREFIX = "prefect.task-run."
"""Begins the resource id of a task run."""

OBJECT_EVENT_PREFIXES = ("prefect.asset.", "prefect.concurrency-limit.")
"""Begin the names of events that a flow run emits about assets and concurrency limits."""

RELATED_EVENT_PREFIXES = ("prefect.artifact.", "prefect.runner.")
"""Begin the names of events that a flow run emits about its artifacts and its end. A related resource is the run."""

POD_EVENT_PREFIX = "prefect.kubernetes.pod."

_ROLES = ("flow-run", "deployment", "flow", "work-pool")
"""Roles of related resources. The labels `prefect.io/ROLE-id` and `prefect.io/ROLE-name` name the resources."""


def pod_event_id(uid: str, phase: str, restarts: int, diagnosis: str | None) -> str:
    """Return the id of a pod's event, which depends on the event's content: the server keeps one of equal events.

    Replaces: the ids of `prefect_kubernetes.observer._replicate_pod_event`
    Why: the reconciler emits each pod's events once, without an observer in each worker
    Until: the observer can run in one process for all workers
    """
    content = {"uid": uid, "phase": phase, "restart_count": restarts, "diagnosis": diagnosis}
    return str(uuid5(NAMESPACE_URL, json.dumps(content, sort_keys=True)))


def pod_resource(uid: str, name: str, namespace: str, diagnosis: str | None) -> Json:
    """Return a pod as the resource of an event.

    Replaces: the resources of `prefect_kubernetes.observer._replicate_pod_event`
    Why: the reconciler emits each pod's events once, without an observer in each worker
    Until: the observer can run in one process for all workers
    """
    found = {
        "prefect.resource.id": f"{POD_EVENT_PREFIX}{uid}",
        "prefect.resource.name": name,
        "kubernetes.namespace": namespace,
    }
    return found | ({"kubernetes.diagnosis": diagnosis} if diagnosis else {})


def resources_of_labels(labels: Mapping[str, str]) -> list[Json]:
    """Return the related resources of an event, by the labels of a run's pod.

    Replaces: `prefect_kubernetes.observer._related_resources_from_labels`
    Why: the reconciler emits each pod's events once, without an observer in each worker
    Until: the observer can run in one process for all workers
    """
    found: list[Json] = []
    for role in _ROLES:
        if id_ := labels.get(f"prefect.io/{role}-id"):
            found.append({"prefect.resource.id": f"prefect.{role}.{id_}", "prefect.resource.role": role})
            if name := labels.get(f"prefect.io/{role}-name"):
                found[-1]["prefect.resource.name"] = name
    if worker := labels.get("prefect.io/worker-name"):
        from slugify import slugify  # Prefect's own dependency, and what its observer uses

        found.append(
            {
                "prefect.resource.id": f"prefect.worker.kubernetes.{slugify(worker)}",
                "prefect.resource.role": "worker",
                "prefect.resource.name": worker,
                "prefect.worker-type": "kubernetes",
                "prefect.version": _prefect_version(),
            }
        )
    return found


@functools.cache
def _prefect_version() -> str:
    return version("prefect")


class PodDiagnosis(StrEnum):
    """Names what is wrong with a pod. Automations filter events by it.

    Replaces: `prefect_kubernetes.diagnostics.DiagnosisCategory`
    Why: the reconciler emits each pod's events once, without an observer in each worker
    Until: the observer can run in one process for all workers
    """

    OOM_KILLED = "OOMKilled"
    EVICTED = "Evicted"
    IMAGE_PULL_ERROR = "ImagePullError"
    UNSCHEDULABLE = "Unschedulable"
    TAINT = "Unschedulable.Taint"
    NODE_AFFINITY = "Unschedulable.NodeAffinity"
    INSUFFICIENT_RESOURCES = "Unschedulable.InsufficientResources"


def unschedulable_diagnosis(message: str) -> PodDiagnosis:
    """Return the category of the Kubernetes scheduler's message about a pod that has no node.

    Replaces: `prefect_kubernetes.diagnostics._categorize_unschedulable`
    Why: the reconciler emits each pod's events once, without an observer in each worker
    Until: the observer can run in one process for all workers
    """
    words = {
        PodDiagnosis.TAINT: ("taint",),
        PodDiagnosis.NODE_AFFINITY: ("affinity", "node selector"),
        PodDiagnosis.INSUFFICIENT_RESOURCES: ("insufficient",),
    }
    found = (kind for kind, some in words.items() if any(word in message.lower() for word in some))
    return next(found, PodDiagnosis.UNSCHEDULABLE)


def flow_run_resources(flow_run: Any, flow: Any) -> list[Json]:
    """Return the related resources of an event in a flow run.

    Replaces: `prefect.events.related.related_resources_from_run_context`
    Why: Prefect's function asks the API for each event
    Until: Prefect's function takes a flow run that is known

    Args:
        flow_run: Prefect's FlowRun.
        flow: Prefect's Flow, or None.
    """
    related = [
        {
            "prefect.resource.id": f"prefect.flow-run.{flow_run.id}",
            "prefect.resource.role": "flow-run",
            "prefect.resource.name": flow_run.name,
        },
        {
            "prefect.resource.id": f"prefect.flow.{flow_run.flow_id}",
            "prefect.resource.role": "flow",
            "prefect.resource.name": flow.name if flow else str(flow_run.flow_id),
        },
    ]
    if flow_run.deployment_id:
        related.append(
            {
                "prefect.resource.id": f"prefect.deployment.{flow_run.deployment_id}",
                "prefect.resource.role": "deployment",
            }
        )
    return related


def task_run_state_event(task_run: UUID, state: Json, entered_at: datetime, about: Json, related: list[Json]) -> Json:
    """Return the event from which the server makes a task run and its state.

    Replaces: `prefect.utilities.engine.emit_task_run_state_change_event`
    Why: dbt's nodes become task runs in bulk, and only the newest unsent state of a node is sent
    Until: the Prefect API takes task runs and their states in bulk

    Args:
        task_run: the task run's id.
        state: type, name and message.
        entered_at: when the task run entered the state.
        about: the task run's fields, without its id and its flow run's id.
        related: the flow run and its related resources.
    """
    return {
        "id": str(uuid4()),
        "occurred": entered_at.isoformat(),
        "event": f"prefect.task-run.{state['name']}",
        "resource": {
            "prefect.resource.id": f"prefect.task-run.{task_run}",
            "prefect.resource.name": about["name"],
            "prefect.run-count": str(about["run_count"]),
            "prefect.state-message": state["message"],
            "prefect.state-name": state["name"],
            "prefect.state-timestamp": entered_at.isoformat(),
            "prefect.state-type": state["type"],
            "prefect.orchestration": "client",
        },
        "related": related,
        "payload": {
            "intended": {"from": None, "to": state["type"]},
            "initial_state": None,
            "validated_state": {**state, "state_details": {}, "data": None},
            "task_run": about,
        },
    }


def _asset_event(event: str, resource: Json, related: list[Json], payload: Json) -> Json:
    return {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": resource,
        "related": related,
        "payload": payload,
    }


def asset_referenced_event(address: str, related: list[Json]) -> Json:
    """Return the event of an asset from which another asset was made.

    Replaces: "prefect.asset.referenced" of `prefect.context.AssetContext.emit_events`
    Why: `@materialize` reports only what tasks of Prefect make, and dbt's nodes are not tasks
    Until: Prefect has a function that reports an asset outside a task
    """
    return _asset_event("prefect.asset.referenced", {"prefect.resource.id": address}, related, {})


def asset_materialization_event(
    succeeded: bool, asset: Mapping[str, str], task_run: UUID, upstream: list[str], related: list[Json], metadata: Json
) -> Json:
    """Return the event of an asset that dbt has made.

    Replaces: "prefect.asset.materialization" of `prefect.context.AssetContext.emit_events`
    Why: `@materialize` reports only what tasks of Prefect make, and dbt's nodes are not tasks
    Until: Prefect has a function that reports an asset outside a task

    Args:
        succeeded: whether the asset was made.
        asset: address and name, and description if there is one.
        task_run: the id of the node's task run.
        upstream: addresses of assets from which the asset was made: all of them, or as many as fit into an event.
        related: the flow run and its related resources.
        metadata: fields that Prefect's UI shows with the materialization.
    """
    names = {"address": "prefect.resource.id", "name": "prefect.resource.name"}
    resource = {names.get(key, f"prefect.asset.{key}"): value for key, value in asset.items()}
    about = [
        {"prefect.resource.id": f"prefect.task-run.{task_run}", "prefect.resource.role": "task-run"},
        {"prefect.resource.id": "dbt", "prefect.resource.role": "asset-materialized-by"},
    ]
    about += [{"prefect.resource.id": address, "prefect.resource.role": "asset"} for address in upstream]
    outcome = "succeeded" if succeeded else "failed"
    return _asset_event(f"prefect.asset.materialization.{outcome}", resource, related + about, metadata)


MATERIALIZATION_RESOURCES = 2
"""Related resources of `asset_materialization_event` that are neither `upstream` nor `related`."""
