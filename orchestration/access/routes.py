"""The permissions of each role: every route of the Prefect API is in one class, and a role may call some classes.

The server denies a route without a class. A test compares the table with the OpenAPI of each supported Prefect.
"""

import re
from dataclasses import dataclass
from enum import StrEnum

WEBSOCKET = "WEBSOCKET"
"""Stands for the method of a websocket route."""


class Role(StrEnum):
    """The role of a credential: its set of permissions."""

    OPERATOR = "operator"
    """Everything: people who operate the platform, and the server itself."""
    VIEWER = "viewer"
    """Read everything except the values of blocks and variables."""
    WORKER = "worker"
    """Claim runs of its pools and report their states."""
    RECONCILER = "reconciler"
    """Report states of any run, and release its concurrency slots."""
    SYNC = "sync"
    """Write the desired state: all that prefect.yaml declares."""
    RUN = "run"
    """Report the flow run itself, and create other runs."""


READ = """
GET    /version
GET    /metrics
GET    /hello
GET    /csrf-token
GET    /admin/version
GET    /admin/storage
GET    /collections/views/{view}
GET    /flows/{id}
POST   /flows/count
GET    /flows/name/{name}
POST   /flows/filter
POST   /flows/paginate
GET    /flow_runs/{id}
POST   /flow_runs/count
POST   /flow_runs/lateness
POST   /flow_runs/history
GET    /flow_runs/{id}/graph
GET    /flow_runs/{id}/graph-v2
POST   /flow_runs/filter
POST   /flow_runs/paginate
GET    /flow_runs/{id}/logs/download
GET    /task_runs/{id}
POST   /task_runs/count
POST   /task_runs/history
POST   /task_runs/filter
POST   /task_runs/paginate
GET    /flow_run_states/{id}
GET    /flow_run_states/
GET    /task_run_states/{id}
GET    /task_run_states/
GET    /observed-states
GET    /deployments/{id}
GET    /deployments/name/{flow_name}/{deployment_name}
POST   /deployments/filter
POST   /deployments/paginate
POST   /deployments/count
GET    /deployments/{id}/work_queue_check
GET    /deployments/{id}/schedules
GET    /saved_searches/{id}
POST   /saved_searches/filter
POST   /logs/filter
GET    /concurrency_limits/{id}
GET    /concurrency_limits/tag/{tag}
POST   /concurrency_limits/filter
GET    /v2/concurrency_limits/{id_or_name}
POST   /v2/concurrency_limits/filter
GET    /block_types/{id}
GET    /block_types/slug/{slug}
POST   /block_types/filter
GET    /block_schemas/{id}
POST   /block_schemas/filter
GET    /block_schemas/checksum/{checksum}
GET    /block_capabilities/
POST   /block_documents/count
GET    /work_pools/{name}
POST   /work_pools/filter
POST   /work_pools/count
POST   /work_pools/{name}/concurrency_status
GET    /work_pools/{work_pool_name}/queues/{name}
POST   /work_pools/{work_pool_name}/queues/filter
POST   /work_pools/{work_pool_name}/workers/filter
POST   /task_workers/filter
GET    /work_queues/{id}
GET    /work_queues/name/{name}
POST   /work_queues/filter
POST   /work_queues/{id}/concurrency_status
GET    /work_queues/{id}/status
GET    /artifacts/{id}
GET    /artifacts/{key}/latest
POST   /artifacts/filter
POST   /artifacts/latest/filter
POST   /artifacts/count
POST   /artifacts/latest/count
POST   /variables/count
POST   /events/filter
GET    /events/filter/next
POST   /events/count-by/{countable}
GET    /automations/{id}
POST   /automations/filter
POST   /automations/count
GET    /automations/related-to/{resource_id}
POST   /templates/validate
POST   /automations/templates/validate
POST   /ui/flows/count-deployments
POST   /ui/flows/next-runs
POST   /ui/flow_runs/history
POST   /ui/flow_runs/count-task-runs
POST   /ui/schemas/validate
POST   /ui/task_runs/dashboard/counts
POST   /ui/task_runs/count
GET    /ui/task_runs/{id}
WEBSOCKET /logs/out
WEBSOCKET /events/out
"""
"""Read, without the values of blocks and variables. Some filters are POST requests."""

READ_VALUES = """
GET    /block_types/slug/{slug}/block_documents
GET    /block_types/slug/{slug}/block_documents/name/{block_document_name}
POST   /block_documents/filter
GET    /block_documents/{id}
GET    /variables/{id}
GET    /variables/name/{name}
POST   /variables/filter
"""
"""Read the values of blocks, which hold secrets, and of variables."""

CREATE_RUNS = """
POST   /flows/
POST   /flow_runs/
POST   /deployments/{id}/create_flow_run
POST   /deployments/{id}/create_flow_run/bulk
"""
"""Create flow runs, and the flow of a run without deployment."""

REPORT_RUNS = """
PATCH  /flow_runs/{id}
POST   /flow_runs/{id}/set_state
POST   /flow_runs/{id}/resume
PATCH  /flow_runs/{id}/labels
POST   /flow_runs/{id}/input
POST   /flow_runs/{id}/input/filter
GET    /flow_runs/{id}/input/{key}
DELETE /flow_runs/{id}/input/{key}
POST   /task_runs/
PATCH  /task_runs/{id}
POST   /task_runs/{id}/set_state
POST   /logs/
POST   /artifacts/
PATCH  /artifacts/{id}
"""
"""Write states, inputs, logs, artifacts and task runs of a flow run. A run's credential may write its own only."""

EMIT_EVENTS = """
POST   /events
WEBSOCKET /events/in
"""

HOLD_SLOTS = """
POST   /concurrency_limits/increment
POST   /concurrency_limits/decrement
POST   /v2/concurrency_limits/increment
POST   /v2/concurrency_limits/increment-with-lease
POST   /v2/concurrency_limits/decrement
POST   /v2/concurrency_limits/decrement-with-lease
POST   /v2/concurrency_limits/leases/{lease_id}/renew
"""
"""Acquire and release concurrency slots."""

CLAIM_RUNS = """
POST   /work_pools/{name}/get_scheduled_flow_runs
POST   /work_pools/{work_pool_name}/workers/heartbeat
WEBSOCKET /work_pools/{work_pool_name}/workers/connect
"""

WRITE_DESIRED_STATE = """
PATCH  /flows/{id}
POST   /deployments/
PATCH  /deployments/{id}
DELETE /deployments/{id}
POST   /deployments/{id}/schedule
POST   /deployments/{id}/resume_deployment
POST   /deployments/{id}/pause_deployment
POST   /deployments/{id}/schedules
PATCH  /deployments/{id}/schedules/{schedule_id}
DELETE /deployments/{id}/schedules/{schedule_id}
POST   /concurrency_limits/
DELETE /concurrency_limits/{id}
DELETE /concurrency_limits/tag/{tag}
POST   /v2/concurrency_limits/
PATCH  /v2/concurrency_limits/{id_or_name}
DELETE /v2/concurrency_limits/{id_or_name}
POST   /block_types/
PATCH  /block_types/{id}
POST   /block_types/install_system_block_types
POST   /block_schemas/
POST   /block_documents/
PATCH  /block_documents/{id}
DELETE /block_documents/{id}
POST   /work_pools/
PATCH  /work_pools/{name}
DELETE /work_pools/{name}
POST   /work_pools/{work_pool_name}/queues
PATCH  /work_pools/{work_pool_name}/queues/{name}
DELETE /work_pools/{work_pool_name}/queues/{name}
PATCH  /work_queues/{id}
DELETE /work_queues/{id}
POST   /variables/
PATCH  /variables/{id}
DELETE /variables/{id}
PATCH  /variables/name/{name}
DELETE /variables/name/{name}
POST   /automations/
PUT    /automations/{id}
PATCH  /automations/{id}
DELETE /automations/{id}
"""
"""Write what prefect.yaml and the values of the chart declare."""

ADMINISTER = """
DELETE /flows/{id}
POST   /flows/bulk_delete
DELETE /flow_runs/{id}
POST   /flow_runs/bulk_delete
POST   /flow_runs/bulk_set_state
DELETE /task_runs/{id}
POST   /deployments/get_scheduled_flow_runs
POST   /deployments/bulk_delete
PUT    /saved_searches/
DELETE /saved_searches/{id}
POST   /concurrency_limits/tag/{tag}/reset
DELETE /block_types/{id}
DELETE /block_schemas/{id}
DELETE /work_pools/{work_pool_name}/workers/{name}
POST   /work_queues/
POST   /work_queues/{id}/get_runs
DELETE /artifacts/{id}
DELETE /automations/owned-by/{resource_id}
GET    /admin/settings
PUT    /admin/storage
DELETE /admin/storage
WEBSOCKET /task_runs/subscriptions/scheduled
"""
"""Delete history, and call what only Prefect's own tools call."""

OPEN = """
GET    /health
GET    /ready
"""
"""Probes: the server answers them without a credential."""

CLASSES = {
    "open": OPEN,
    "read": READ,
    "read-values": READ_VALUES,
    "create-runs": CREATE_RUNS,
    "report-runs": REPORT_RUNS,
    "emit-events": EMIT_EVENTS,
    "hold-slots": HOLD_SLOTS,
    "claim-runs": CLAIM_RUNS,
    "write-desired-state": WRITE_DESIRED_STATE,
    "administer": ADMINISTER,
}
"""The routes of each class, by its name."""

PERMISSIONS: dict[Role, frozenset[str]] = {
    Role.OPERATOR: frozenset(CLASSES),
    Role.VIEWER: frozenset({"read"}),
    Role.WORKER: frozenset({"read", "read-values", "report-runs", "emit-events", "hold-slots", "claim-runs"}),
    Role.RECONCILER: frozenset({"read", "report-runs", "emit-events", "hold-slots"}),
    Role.SYNC: frozenset({"read", "read-values", "create-runs", "report-runs", "emit-events", "write-desired-state"}),
    Role.RUN: frozenset({"read", "read-values", "create-runs", "report-runs", "emit-events", "hold-slots"}),
}
"""The classes that each role may call. A run's credential is further limited to its own runs."""

WRITES = frozenset(CLASSES) - {"open", "read", "read-values", "claim-runs"}
"""Classes whose calls go to the audit log."""


@dataclass(frozen=True)
class Route:
    """A route of the Prefect API: method, path as OpenAPI writes it, and class."""

    method: str
    path: str
    access: str


def read_routes() -> tuple[Route, ...]:
    """Return every route of the table."""
    return tuple(
        Route(method, path, name)
        for name, lines in CLASSES.items()
        for method, path in (line.split() for line in lines.strip().splitlines())
    )


class RouteTable:
    """Finds the routes of a request.

    A request that several routes match needs the permission of each: Prefect may take any of them.
    """

    def __init__(self, routes: tuple[Route, ...] | None = None) -> None:
        self._routes: dict[tuple[str, int], list[tuple[Route, re.Pattern[str]]]] = {}
        for route in routes or read_routes():
            pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^/]+)", re.escape(route.path))
            key = (route.method, route.path.count("/"))
            self._routes.setdefault(key, []).append((route, re.compile(pattern)))

    def find(self, method: str, path: str) -> list[tuple[Route, dict[str, str]]]:
        """Return the routes that a request may reach, each with its path parameters.

        Prefect redirects a path with a missing or superfluous slash at its end to the route with the right path.
        """
        if found := self._match(method, path):
            return found
        return self._match(method, path.removesuffix("/") if path.endswith("/") else path + "/")

    def _match(self, method: str, path: str) -> list[tuple[Route, dict[str, str]]]:
        candidates = self._routes.get((method, path.count("/")), ())
        matches = ((route, pattern.fullmatch(path)) for route, pattern in candidates)
        return [(route, match.groupdict()) for route, match in matches if match]
