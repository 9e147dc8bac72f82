"""Ownership of objects: a flow run writes only itself and the subflow runs in its process."""

import json
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import httpx

from orchestration.access.routes import Route
from orchestration.prefect_compat.events import OBJECT_EVENT_PREFIXES, RELATED_EVENT_PREFIXES, TASK_RUN_RESOURCE_PREFIX

MAX_REMEMBERED_OBJECTS = 10_000
"""The size of the cache of subflow runs' root runs, and of those of task runs."""

UNRECORDED_SECONDS = 2.0
"""How long a task run that the server does not have yet is not looked up again for the run that has named it.

The server creates task runs from their events, and may do so seconds later. The first events of a task run follow each
other within milliseconds. Within this time a run that knows the id of another run's task run may send events about it,
as it may before the server has recorded the task run.
"""

MAX_SUBFLOW_DEPTH = 50

SCHEDULED_KEY_PREFIX = "scheduled "
"""Begins the idempotency keys of the server's scheduler. Source: `prefect.server.models.deployments`."""

REPORT_KEY_PREFIX = "drift-"
"""Begins the keys of the drift reports' artifacts."""


class DeniedError(Exception):
    """The role or the run has no permission for the request. The message names the reason."""


class UnavailableError(Exception):
    """The owner of an object cannot be read from the server. A retry may succeed."""


class Ownership:
    """Checks that a flow run writes only its own objects, with reads of the API.

    Args:
        api: a client of the API with the server's credential.
    """

    def __init__(self, api: httpx.AsyncClient) -> None:
        self._api = api
        self._roots: dict[UUID, UUID] = {}
        self._task_run_roots: dict[UUID, UUID] = {}
        self._unrecorded: dict[UUID, tuple[UUID, float]] = {}

    async def check_request(self, run_id: UUID, route: Route, parameters: dict[str, str], body: bytes) -> None:
        """Check a request of a flow run.

        Raises:
            DeniedError: the request writes an object of another run.
            UnavailableError: the owner of the object cannot be read.
        """
        kind = route.path.split("/")[1]
        if route.access == "emit-events":
            for event in _objects(body):
                await self.check_event(run_id, event)
        elif route.access == "create-runs":
            for created in _objects(body):
                await self._check_creation(run_id, created)
        elif route.access == "report-runs" and kind == "flow_runs":
            await self._require_own(run_id, parameters["id"])
            if route.method == "PATCH" and any("infrastructure_pid" in changed for changed in _objects(body)):
                # The worker deletes the Job of this name when the run is cancelled.
                raise DeniedError("A flow run may not name its infrastructure")
        elif route.access == "report-runs" and "id" in parameters:
            found = await self._read(f"/{kind}/{parameters['id']}")
            if found is None or (kind == "artifacts" and not found.get("flow_run_id")):
                raise DeniedError(f"{kind} {parameters['id']} does not belong to flow run {run_id}")
            await self._require_own(run_id, found.get("flow_run_id"))
        elif route.access == "report-runs":
            for written in _objects(body):
                await self._require_own(run_id, written.get("flow_run_id"))
                if kind != "task_runs":
                    await self._require_own_task_run(run_id, written.get("task_run_id"))
                if kind == "artifacts" and str(written.get("key") or "").startswith(REPORT_KEY_PREFIX):
                    raise DeniedError(f"Artifacts with a key that begins with {REPORT_KEY_PREFIX} are drift reports")

    async def check_event(self, run_id: UUID, event: dict[str, Any]) -> None:
        """Check an event that a flow run emits. The server creates task runs and cancels runs by events.

        Raises:
            DeniedError: the event is about an object of another run.
            UnavailableError: the owner of the object cannot be read.
        """
        name = event.get("event")
        if not isinstance(name, str):
            raise DeniedError("The event has no name")
        if not name.startswith("prefect.") or name.startswith(OBJECT_EVENT_PREFIXES):
            return
        resource = event.get("resource")
        identifier = str(resource.get("prefect.resource.id")) if isinstance(resource, dict) else ""
        if name.startswith("prefect.flow-run"):
            await self._require_own(run_id, identifier.removeprefix("prefect.flow-run."))
        elif name.startswith("prefect.task-run"):
            payload = event.get("payload")
            task_run = payload.get("task_run") if isinstance(payload, dict) else None
            # For the server these fields override those of the resources.
            if isinstance(task_run, dict) and not {"id", "flow_run_id"}.isdisjoint(task_run):
                raise DeniedError("The event of a task run may not name the task run or its flow run in its payload")
            for flow_run in _related_flow_runs(event):
                await self._require_own(run_id, flow_run)
            await self._require_own_task_run(run_id, identifier.removeprefix(TASK_RUN_RESOURCE_PREFIX))
        elif name.startswith(RELATED_EVENT_PREFIXES):
            for flow_run in _related_flow_runs(event):
                await self._require_own(run_id, flow_run)
        else:
            raise DeniedError(f"A flow run may not emit {name}")

    async def _check_creation(self, run_id: UUID, created: dict[str, Any]) -> None:
        parent = created.get("parent_task_run_id")
        if parent is not None:
            await self._require_own_task_run(run_id, parent, must_exist=True)
        if str(created.get("idempotency_key") or "").startswith(SCHEDULED_KEY_PREFIX):
            # The scheduler would skip its own run with this key.
            raise DeniedError(f"An idempotency key may not begin with {SCHEDULED_KEY_PREFIX!r}")

    async def _require_own(self, run_id: UUID, written: Any) -> None:
        """Raise DeniedError unless this is the id of the run or of its subflow run, or None."""
        if written is None:
            return
        target = _parse_id(written)
        if target != run_id and await self._find_root(run_id, target) != run_id:
            raise DeniedError(f"Flow run {run_id} may not write to flow run {target}")

    async def _require_own_task_run(self, run_id: UUID, written: Any, *, must_exist: bool = False) -> None:
        """Raise DeniedError if the task run belongs to another run.

        The server creates most task runs from events, so a task run may not exist yet.
        """
        if written is None:
            return
        target = _parse_id(written)
        if self._task_run_roots.get(target) == run_id:
            return
        named_by, until = self._unrecorded.get(target, (None, 0.0))
        if named_by == run_id and time.monotonic() < until and not must_exist:
            return
        found = await self._read(f"/task_runs/{target}")
        if found is None:
            if must_exist:
                raise DeniedError(f"Task run {target} does not exist")
            _remember(self._unrecorded, target, (run_id, time.monotonic() + UNRECORDED_SECONDS))
            return
        owner = found.get("flow_run_id")
        if owner is None or (UUID(owner) != run_id and await self._find_root(run_id, UUID(owner)) != run_id):
            raise DeniedError(f"Flow run {run_id} may not write to task run {target}")
        _remember(self._task_run_roots, target, run_id)

    async def _find_root(self, run_id: UUID, target: UUID) -> UUID | None:
        """Return the run whose process executes a subflow run, or `run_id` if it is one of the ancestors.

        None if an ancestor is missing, or there are more than `MAX_SUBFLOW_DEPTH`.
        """
        if target in self._roots:
            return self._roots[target]
        current = target
        for _ in range(MAX_SUBFLOW_DEPTH):
            if current == run_id:
                _remember(self._roots, target, current)
                return current
            run = await self._read(f"/flow_runs/{current}")
            if run is None:
                return None
            # A run of a deployment always executes in a separate process.
            if run.get("deployment_id") or not run.get("parent_task_run_id"):
                return current
            parent = await self._read(f"/task_runs/{run['parent_task_run_id']}")
            if parent is None or not parent.get("flow_run_id"):
                return None
            current = UUID(parent["flow_run_id"])
        return None

    async def _read(self, path: str) -> dict[str, Any] | None:
        """Return an object of the API; None if it does not exist.

        Raises:
            UnavailableError: the server answers with any other status.
        """
        answer = await self._api.get(path)
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        if answer.status_code != httpx.codes.OK:
            raise UnavailableError(f"The server answers {answer.status_code} to GET {path}. Try again")
        found: dict[str, Any] = answer.json()
        return found


def _remember(cache: dict[UUID, Any], key: UUID, value: Any) -> None:
    if key not in cache and len(cache) >= MAX_REMEMBERED_OBJECTS:
        cache.pop(next(iter(cache)))
    cache[key] = value


def _parse_id(written: Any) -> UUID:
    try:
        return UUID(written)
    except (ValueError, TypeError, AttributeError):
        raise DeniedError(f"{str(written)[:60]!r} is not the id of an object") from None


def _objects(body: bytes) -> list[dict[str, Any]]:
    """Return the JSON objects of a request's body, which is an object or a list of objects.

    Raises:
        DeniedError: the body is anything else.
    """
    try:
        # FastAPI uses the same parser: both take the last value of a key that occurs twice.
        content = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        raise DeniedError("The request's body is not JSON") from None
    objects = content if isinstance(content, list) else [content]
    if not all(isinstance(item, dict) for item in objects):
        raise DeniedError("The request's body is neither a JSON object nor a list of JSON objects")
    return objects


def _related_flow_runs(event: dict[str, Any]) -> Iterator[str]:
    """Yield the ids of the flow runs that an event relates to."""
    related = event.get("related")
    for resource in related if isinstance(related, list) else ():
        if isinstance(resource, dict) and resource.get("prefect.resource.role") == "flow-run":
            yield str(resource.get("prefect.resource.id")).removeprefix("prefect.flow-run.")
