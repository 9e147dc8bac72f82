"""Show dbt's nodes as task runs of the flow run that dbt runs in.

The server derives a task run and its states from events. Prefect's own tasks send the same events
(`orchestration.prefect_compat.events`). The id of a task run is computed from flow run, command and node, so that the
next attempt of the flow run continues the same task runs.

Prefect's synchronous client reads from the API: a flow that calls dbt is synchronous, and
`orchestration.prefect_api` is asynchronous.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

from orchestration.dbt.outbox import Outbox, Unsent
from orchestration.dbt.result import NOT_RUN, REUSED, SKIPPED, Node
from orchestration.prefect_compat import events

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

STATES = {
    "success": ("COMPLETED", "Completed"),
    "pass": ("COMPLETED", "Completed"),
    "no-op": ("COMPLETED", "Completed"),
    "warn": ("COMPLETED", "Warn"),
    REUSED: ("COMPLETED", "Cached"),
    "error": ("FAILED", "Failed"),
    "fail": ("FAILED", "Failed"),
    "runtime error": ("FAILED", "Failed"),
    "partial success": ("FAILED", "Failed"),
    # Neither Completed nor Failed: of Prefect's state types, Cancelled is the nearest.
    SKIPPED: ("CANCELLED", "Skipped"),
}
"""Type and name of a task run's state by dbt's status."""

UNKNOWN_STATE = ("CANCELLED", "Unknown")
"""Type and name for any other status, which a later dbt may bring: not done, so that the next attempt runs the node."""

LOG_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
"""Python's log level by dbt's; any other level counts as info."""

MESSAGE_CHARACTERS = 20_000
"""Longest message of a state: the server drops an event of more than 1.5 MB without an error."""

ASSET_LABEL = "dbt.asset"
"""Label of a task run: the asset key of the relation that the node builds, or nothing."""

FIRST_ATTEMPT_LABEL = "dbt.first-attempt"
"""Label of a task run: when dbt started the command in the first attempt."""

BATCHES_LABEL = "dbt.batches"
"""Label of a task run: the batches of a microbatch model that is not complete."""

PAGE_SIZE = 200
"""Task runs in one answer of the API."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """Identifies a dbt command in a flow run, equally in each attempt of the flow run."""

    flow_run: Any
    """Prefect's FlowRun."""
    flow: Any
    """Prefect's Flow, or None."""
    key: str
    """Unique among the commands of the flow run."""

    @property
    def key_over_attempts(self) -> tuple[UUID, str]:
        """The command's key in all attempts. A subflow has a new flow run in each, under the same task run."""
        return (self.flow_run.parent_task_run_id or self.flow_run.id, self.key)

    @classmethod
    def current(cls, *signature: Any) -> "Call | None":
        """Return the call that the running flow makes now; None outside of a flow.

        Args:
            signature: distinguishes this command from others of the flow: project, command, options, connection.
        """
        from prefect.context import FlowRunContext, TaskRunContext

        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            return None
        task = TaskRunContext.get()
        # A subflow may run in a task of its parent.
        task_run = task.task_run if task and task.task_run.flow_run_id == context.flow_run.id else None
        # Concurrent tasks call in any order, and a task with a stored result does not call again.
        caller = [task_run.task_key, task_run.dynamic_key] if task_run else []
        key = "dbt " + hashlib.sha256(json.dumps([*signature, caller], default=str).encode()).hexdigest()[:8]
        # Prefect counts the calls of a task here; each attempt of the flow or the task begins at 0.
        counter = f"{key} {task_run.run_count}" if task_run else key
        number = int(context.task_run_dynamic_keys.get(counter, -1)) + 1
        context.task_run_dynamic_keys[counter] = number
        return cls(context.flow_run, context.flow, f"{key} {number}")

    def task_run_id(self, node: str) -> UUID:
        """Return the id of a node's task run."""
        return uuid5(NAMESPACE_URL, f"prefect.flow-run.{self.flow_run.id}/{self.key}/{node}")

    def earlier_nodes(self) -> dict[str, Node]:
        """Return the nodes that earlier attempts have finished or begun, by their ids, as the server knows them."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            runs = [self.flow_run.id] if self.flow_run.run_count > 1 else []
            runs += self._siblings(client)
            nodes = [_node(task) for task in self._task_runs(client, runs)] if runs else []
        known = [node for node in nodes if node.done or node.batches]
        # A subflow may have run several times: a finished node comes before others, then the newest one.
        known.sort(key=lambda node: (node.done, node.started is not None and node.started.timestamp()))
        return {node.id: node for node in known}

    def _siblings(self, client: "SyncPrefectClient") -> list[UUID]:
        """Return the runs of this subflow in earlier attempts of its parent flow run."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentTaskRunId

        parent = self.flow_run.parent_task_run_id
        if parent is None:
            return []
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_task_run_id=FlowRunFilterParentTaskRunId(any_=[parent])),
        )
        return [run.id for run in runs if run.id != self.flow_run.id]

    def _task_runs(self, client: "SyncPrefectClient", runs: list[UUID]) -> Iterable[Any]:
        """Yield the task runs of this command in the given flow runs."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        in_runs = FlowRunFilter(id=FlowRunFilterId(any_=runs))
        offset = 0
        while page := client.read_task_runs(flow_run_filter=in_runs, limit=PAGE_SIZE, offset=offset):
            yield from (task for task in page if task.dynamic_key == self.key)
            offset += len(page)


class Mirror:
    """Reports the nodes of one command to the Prefect API: states, log lines, assets and artifacts."""

    def __init__(self, call: Call) -> None:
        from prefect.settings import get_current_settings

        self._call = call
        self._outbox = Outbox()
        self._flow_resources = events.flow_run_resources(call.flow_run, call.flow)
        self._maximum_related = get_current_settings().server.events.maximum_related_resources
        self._referenced: set[str] = set()

    def report_running(self, node: Node, entered_at: datetime | None = None) -> None:
        """Report that a node has started, or how far it has come."""
        entered_at = entered_at or node.started
        assert entered_at
        name = "Retrying" if node.attempts > 1 else "Running"
        self._send_state(node, "RUNNING", name, "", entered_at)

    def report_retry(self, node: Node, message: str, failed_at: datetime) -> None:
        """Report that a node has failed and will run again."""
        self._send_state(node, "SCHEDULED", "AwaitingRetry", message, failed_at)

    def report_end(self, node: Node, by_id: Mapping[str, Node]) -> None:
        """Report the status of a node."""
        kind, name = STATES.get(node.status, UNKNOWN_STATE)
        # A reused node ended long ago, but the server keeps the state with the newest time.
        ended_at = node.ended if node.ended and node.status != REUSED else datetime.now(UTC)
        self._send_state(node, kind, name, state_message(node, by_id), ended_at)
        if node.asset and node.status in ("success", "error"):
            self._send_materialization(node)

    def report_interrupted(self, node: Node, cancelled: bool) -> None:
        """Report that a node was running when the command was interrupted."""
        kind, name = ("CANCELLED", "Cancelled") if cancelled else ("CRASHED", "Crashed")
        self._send_state(
            node, kind, name, "dbt was interrupted; its SQL was cancelled.", node.ended or datetime.now(UTC)
        )

    def log(self, level: str, text: str, node: str = "") -> None:
        """Send a log line, of the node's task run or of the flow run."""
        self._outbox.add_log_line(
            {
                "name": "dbt",
                "level": LOG_LEVELS.get(level, logging.INFO),
                "message": text[:100_000],
                "timestamp": datetime.now(UTC).isoformat(),
                "flow_run_id": str(self._call.flow_run.id),
                "task_run_id": str(self._call.task_run_id(node)) if node else None,
            }
        )

    def create_artifact(self, name: str, kind: str, data: str, description: str) -> None:
        """Create an artifact of the flow run."""
        key = "-".join(name.lower().split())
        content = {"key": key, "type": kind, "data": data, "description": description}
        self._outbox.add_request("/artifacts/", {**content, "flow_run_id": str(self._call.flow_run.id)})

    def close(self) -> Unsent:
        """Send the rest; return what could not be sent."""
        return self._outbox.close()

    def is_flow_run_cancelled(self) -> bool:
        """Return whether the flow run is being cancelled; otherwise its process is being terminated."""
        from prefect.client.orchestration import get_client

        with contextlib.suppress(Exception), get_client(sync_client=True, httpx_settings={"timeout": 2.0}) as client:
            state = client.read_flow_run(self._call.flow_run.id).state
            return state is not None and (state.is_cancelled() or state.is_cancelling())
        return False

    def _send_state(self, node: Node, kind: str, name: str, message: str, entered_at: datetime) -> None:
        task_run = self._call.task_run_id(node.id)
        message = message if len(message) <= MESSAGE_CHARACTERS else f"{message[:MESSAGE_CHARACTERS]} …"
        ended = node.ended if kind not in ("RUNNING", "SCHEDULED") else None
        task: Json = {
            "name": node.title,
            "task_key": node.id,
            "dynamic_key": self._call.key,
            "tags": ["dbt", node.kind],
            "empirical_policy": {},
            "task_inputs": {
                "parents": [
                    {"input_type": "task_run", "id": str(self._call.task_run_id(parent))} for parent in node.parents
                ]
            },
            "run_count": node.attempts,
            "flow_run_run_count": self._call.flow_run.run_count,
            "labels": {ASSET_LABEL: node.asset, FIRST_ATTEMPT_LABEL: node.first_attempt},
        }
        if node.batches:
            task["labels"][BATCHES_LABEL] = json.dumps(node.batches)
        if node.started:
            task["expected_start_time"] = task["start_time"] = node.started.isoformat()
        if ended:
            task["end_time"] = ended.isoformat()
            task["total_run_time"] = node.seconds
        state = {"type": kind, "name": name, "message": message}
        # By task run, so that the outbox replaces a state that is still unsent.
        self._outbox.add_event(
            str(task_run), events.task_run_state_event(task_run, state, entered_at, task, self._flow_resources)
        )

    def _send_materialization(self, node: Node) -> None:
        """Report the asset that a node has built or failed to build, as Prefect's `@materialize` does."""
        for key in node.reads:
            if key not in self._referenced:
                self._referenced.add(key)
                self._send_asset_event(events.asset_referenced_event(key, self._flow_resources))
        asset = {"address": node.asset, "name": node.name}
        if node.description:
            asset["description"] = node.description
        capacity = max(0, self._maximum_related - len(self._flow_resources) - events.MATERIALIZATION_RESOURCES)
        metadata: Json = {"rows": node.rows, "seconds": node.seconds, "materialized": node.materialized}
        if len(node.reads) > capacity:
            metadata["upstream"] = node.reads[:5_000]
        task_run = self._call.task_run_id(node.id)
        upstream = list(node.reads[:capacity])
        succeeded = node.status == "success"
        self._send_asset_event(
            events.asset_materialization_event(succeeded, asset, task_run, upstream, self._flow_resources, metadata)
        )

    def _send_asset_event(self, event: Json) -> None:
        self._outbox.add_event(f"{event['event']} {event['resource']['prefect.resource.id']}", event)


def _node(task_run: Any) -> Node:
    """Return the outcome of a node as its task run shows it."""
    return Node(
        task_run.task_key,
        task_run.name,
        task_run.name,
        kind="",
        path="",
        asset=str(task_run.labels.get(ASSET_LABEL, "")),
        status=REUSED if task_run.state_type == "COMPLETED" else NOT_RUN,
        attempts=task_run.run_count,
        started=task_run.start_time,
        ended=task_run.end_time,
        seconds=task_run.total_run_time.total_seconds(),
        first_attempt=str(task_run.labels.get(FIRST_ATTEMPT_LABEL, "")),
        batches=json.loads(task_run.labels.get(BATCHES_LABEL, "null")),
    )


def state_message(node: Node, by_id: Mapping[str, Node]) -> str:
    """Return the message of a node's state.

    Args:
        node: the node, with its outcome.
        by_id: all nodes of the command by their ids.
    """
    rows = "" if node.rows is None else f", {node.rows:,} rows"
    match node.status:
        case "skipped":
            cause = by_id.get(node.because)
            if cause is None:
                return node.message or "Skipped."
            outcome = "did not pass" if cause.kind in ("test", "unit_test") else "failed"
            return f"Skipped, because {cause.title} {outcome}."
        case "reused":
            return node.message or "Finished by an earlier attempt of this run."
        case "success" | "pass" | "no-op":
            return f"{node.message or node.status} in {node.seconds:.2f} s{rows}"
        case status if status not in STATES:
            return f"dbt reports the status {status!r}, which is unknown here. {node.message}".strip()
        case _:
            return node.message or node.status
