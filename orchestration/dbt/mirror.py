"""dbt's nodes as task runs of the flow run that dbt runs in.

A task run is what its events say it is: Prefect's own tasks report theirs the same way
(`orchestration.prefect_compat.events`), and the server makes task runs and states of them. Ids follow
from flow run, command and node, so that another attempt of the same flow run continues the same task runs.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_URL, UUID, uuid5

from orchestration.dbt.outbox import Outbox, Unsent
from orchestration.dbt.result import REUSED, Node
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
    # Not Completed and not Failed; Prefect has no type of its own for it.
    "skipped": ("CANCELLED", "Skipped"),
}
"""Type and name of a task run's state by dbt's status."""

LEVELS = {"debug": 10, "info": 20, "warn": 30, "error": 40}

MESSAGE = 20_000
"""Characters of a state's message: the server drops an event of more than 1.5 MB without an error."""

PAGE = 200
"""Task runs in an answer of the API."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A dbt command in a flow run: the same one in each attempt of it."""

    flow_run: Any
    """Prefect's FlowRun."""
    flow: Any
    """Prefect's Flow, or None."""
    key: str
    """Different from that of any other command of the flow run."""

    @property
    def memory(self) -> tuple[UUID, str]:
        """What is the same in each attempt; a subflow is a new flow run in each, under the same task run."""
        return (self.flow_run.parent_task_run_id or self.flow_run.id, self.key)

    @classmethod
    def current(cls, *signature: Any) -> "Call | None":
        """The call that the running flow makes now; None outside of a flow."""
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            return None
        key = "dbt " + hashlib.sha256(json.dumps(signature, default=str).encode()).hexdigest()[:8]
        # Prefect counts the calls of a task in here; each attempt begins anew.
        number = int(context.task_run_dynamic_keys.get(key, -1)) + 1
        context.task_run_dynamic_keys[key] = number
        return cls(context.flow_run, context.flow, f"{key} {number}")

    def task_run(self, node: str) -> UUID:
        """The id of a node's task run."""
        return uuid5(NAMESPACE_URL, f"prefect.flow-run.{self.flow_run.id}/{self.key}/{node}")

    def earlier(self) -> dict[str, Any]:
        """The task runs of the nodes that earlier attempts have done, by the node's id."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            runs = [self.flow_run.id] if self.flow_run.run_count > 1 else []
            runs += self._siblings(client)
            return {task.task_key: task for task in self._done(client, runs)} if runs else {}

    def _siblings(self, client: "SyncPrefectClient") -> list[UUID]:
        """The runs of a subflow in earlier attempts of its parent: each is a new flow run, and may have done a part."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterParentTaskRunId

        parent = self.flow_run.parent_task_run_id
        if parent is None:
            return []
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_task_run_id=FlowRunFilterParentTaskRunId(any_=[parent])),
        )
        return [run.id for run in runs if run.id != self.flow_run.id]

    def _done(self, client: "SyncPrefectClient", runs: list[UUID]) -> Iterable[Any]:
        from prefect.client.schemas.filters import (
            FlowRunFilter,
            FlowRunFilterId,
            TaskRunFilter,
            TaskRunFilterState,
            TaskRunFilterStateType,
        )
        from prefect.client.schemas.objects import StateType

        done = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.COMPLETED])))
        of = FlowRunFilter(id=FlowRunFilterId(any_=runs))
        offset = 0
        while page := client.read_task_runs(flow_run_filter=of, task_run_filter=done, limit=PAGE, offset=offset):
            yield from (task for task in page if task.dynamic_key == self.key)
            offset += len(page)


class Mirror:
    """Shows the nodes of one command as task runs."""

    def __init__(self, call: Call) -> None:
        from prefect.settings import get_current_settings

        self._call = call
        self._outbox = Outbox()
        self._flow = events.flow_run_resources(call.flow_run, call.flow)
        self._related = get_current_settings().server.events.maximum_related_resources
        self._referenced: set[str] = set()

    def running(self, node: Node, message: str = "") -> None:
        """A node has started."""
        assert node.started
        name = "Retrying" if node.attempts > 1 else "Running"
        self._state(node, "RUNNING", name, message, node.started)

    def retrying(self, node: Node, message: str, at: datetime) -> None:
        """A node's attempt has failed, and there will be another one."""
        self._state(node, "SCHEDULED", "AwaitingRetry", message, at)

    def ended(self, node: Node, by_id: Mapping[str, Node]) -> None:
        """A node has a status."""
        kind, name = STATES[node.status]
        # A reused node ended long ago; the server keeps the state that is newest.
        at = node.ended if node.ended and node.status != REUSED else datetime.now(UTC)
        self._state(node, kind, name, message_of(node, by_id), at)
        if node.asset and node.status in ("success", "error"):
            self._materialized(node)

    def stopped(self, node: Node, cancelled: bool) -> None:
        """A node was running when the command was ended."""
        kind, name = ("CANCELLED", "Cancelled") if cancelled else ("CRASHED", "Crashed")
        self._state(node, kind, name, "dbt was interrupted; its SQL was cancelled.", node.ended or datetime.now(UTC))

    def log(self, level: str, text: str, node: str = "") -> None:
        """A line of dbt's log, at the node's task run or the flow run."""
        self._outbox.line(
            {
                "name": "dbt",
                "level": LEVELS.get(level, 20),
                "message": text[:100_000],
                "timestamp": datetime.now(UTC).isoformat(),
                "flow_run_id": str(self._call.flow_run.id),
                "task_run_id": str(self._call.task_run(node)) if node else None,
            }
        )

    def artifact(self, name: str, kind: str, data: str, description: str) -> None:
        """An artifact of the flow run."""
        key = "-".join(name.lower().split())
        content = {"key": key, "type": kind, "data": data, "description": description}
        self._outbox.request("/artifacts/", {**content, "flow_run_id": str(self._call.flow_run.id)})

    def close(self) -> Unsent:
        """Send what is left; what could not be sent."""
        return self._outbox.close()

    def cancelled(self) -> bool:
        """Whether somebody cancels the flow run: then what it does is cancelled, else it crashes."""
        from prefect.client.orchestration import get_client

        with contextlib.suppress(Exception), get_client(sync_client=True, httpx_settings={"timeout": 2.0}) as client:
            state = client.read_flow_run(self._call.flow_run.id).state
            return state is not None and (state.is_cancelled() or state.is_cancelling())
        return False

    def _state(self, node: Node, kind: str, name: str, message: str, at: datetime) -> None:
        task_run = self._call.task_run(node.id)
        message = message if len(message) <= MESSAGE else f"{message[:MESSAGE]} …"
        ended = node.ended if kind not in ("RUNNING", "SCHEDULED") else None
        about: Json = {
            "name": node.title,
            "task_key": node.id,
            "dynamic_key": self._call.key,
            "tags": ["dbt", node.kind],
            "empirical_policy": {},
            "task_inputs": {
                "parents": [
                    {"input_type": "task_run", "id": str(self._call.task_run(parent))} for parent in node.parents
                ]
            },
            "run_count": node.attempts,
            "flow_run_run_count": self._call.flow_run.run_count,
        }
        if node.started:
            about["expected_start_time"] = about["start_time"] = node.started.isoformat()
        if ended:
            about["end_time"] = ended.isoformat()
            about["total_run_time"] = node.seconds
        state = {"type": kind, "name": name, "message": message}
        # Coalesced by the task run: a state that nobody has seen yet gives way to the next.
        self._outbox.event(str(task_run), events.task_run_state_event(task_run, state, at, about, self._flow))

    def _materialized(self, node: Node) -> None:
        """What a node has built, as Prefect's `@materialize` reports it."""
        for address in node.reads:
            if address not in self._referenced:
                self._referenced.add(address)
                self._asset(events.asset_referenced_event(address, self._flow))
        asset = {"address": node.asset, "name": node.name}
        if node.description:
            asset["description"] = node.description
        room = max(0, self._related - len(self._flow) - events.MATERIALIZATION_RESOURCES)
        metadata: Json = {"rows": node.rows, "seconds": node.seconds, "materialized": node.materialized}
        if len(node.reads) > room:
            metadata["upstream"] = node.reads[:5_000]
        task_run = self._call.task_run(node.id)
        upstream = list(node.reads[:room])
        succeeded = node.status == "success"
        self._asset(events.asset_materialization_event(succeeded, asset, task_run, upstream, self._flow, metadata))

    def _asset(self, event: Json) -> None:
        self._outbox.event(f"{event['event']} {event['resource']['prefect.resource.id']}", event)


def message_of(node: Node, by_id: Mapping[str, Node]) -> str:
    """A node's status in a sentence."""
    rows = "" if node.rows is None else f", {node.rows:,} rows"
    match node.status:
        case "skipped":
            above = by_id.get(node.because)
            if above is None:
                return node.message or "Skipped."
            what = "did not pass" if above.kind in ("test", "unit_test") else "failed"
            return f"Skipped, because {above.title} {what}."
        case "reused":
            return "Done by an earlier attempt of this run; not again."
        case "success" | "pass" | "no-op":
            return f"{node.message or node.status} in {node.seconds:.2f} s{rows}"
        case _:
            return node.message or node.status
