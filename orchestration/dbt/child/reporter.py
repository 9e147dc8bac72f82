"""Report what dbt does with the nodes of a command, and retry nodes after transient errors."""

import contextlib
import json
import re
import threading
from collections import Counter
from datetime import UTC, datetime
from typing import Any

from .batches import Batches
from .nodes import Json, describe
from .sample import SQL_BYTES, bounded_rows, cut
from .selection import Selection, is_stopping

BLOCKING_STATUSES = {"error", "fail", "runtime error", "partial success", "skipped"}
"""dbt's statuses of nodes behind which dbt skips nodes."""

_PROGRESS_EVENTS = {
    "LogStartLine", "LogStartBatch", "LogStartOverload", "LogHookStartLine",
    "Formatting", "ConcurrencyLine", "EndOfRunSummary",
}  # fmt: skip
"""dbt's events whose lines repeat what the states of the nodes show."""


class Reporter:
    """Writes the events of one command to stdout.

    Args:
        command: the command from stdin.
        stdout: a text stream with a buffer of one line.
    """

    def __init__(self, command: Json, stdout: Any) -> None:
        self._earlier: dict[str, Json] = command["earlier"]
        self._started: str = command["started"]
        self._only = None if command["only"] is None else set(command["only"])
        self._target: str | None = command["target"]
        self._retries: int = command["retries"]
        self._delay_seconds: float = command["delay"]
        self._transient = re.compile(command["transient"], re.IGNORECASE)
        self._sample_rows: int = command["sample_rows"]
        self._stdout = stdout
        self._lock = threading.Lock()
        self._task: Any = None
        self._batches = Batches()
        self._thread = threading.local()
        """`exception`: the last exception of dbt in the thread."""
        self._known: set[str] = set()
        """The ids of the nodes that were reported."""
        self._open: Counter[str] = Counter()
        """By node, how many of its starts have no end yet."""
        self._status: dict[str, str] = {}
        self._cause: dict[str, str] = {}
        """By skipped node, the failed node that it was skipped for."""
        self.interrupted = threading.Event()

    def send(self, event: str, **content: Any) -> None:
        """Write an event."""
        line = json.dumps({"event": event, **content}, default=str)
        with self._lock:
            self._stdout.write(line + "\n")

    def selected(self, task: Any) -> None:
        """Report the nodes that dbt's task has selected, and leave out those that an earlier attempt has finished."""
        self._task = task
        target = task.config.target_name
        if self._target not in (None, target):
            self.send("other target", target=target)
            raise RuntimeError(f"The target is {target}, and not {self._target}")
        selection = Selection(task, self._only)
        nodes = selection.descriptions()
        earlier = {node["id"]: self._earlier[node["id"]] for node in nodes if node["id"] in self._earlier}
        started = self._started
        moved = [node for node in nodes if node["id"] in earlier and node["asset"] != earlier[node["id"]]["asset"]]
        if moved:
            # The project's Jinja may read any variable, so the tests of the relation count as moved too.
            before, now = earlier[moved[0]["id"]]["asset"], moved[0]["asset"]
            text = f"Nothing is reused: {moved[0]['title']} is {now} now, and was {before} in the earlier attempt."
            self.send("log", level="warn", text=text, id="")
            earlier, started = {}, ""
        done = {node for node, state in earlier.items() if state["done"]}
        begun = {node: state["batches"] for node, state in earlier.items() if state["batches"] and node not in done}
        self._batches.resume(task, begun, started)
        self.send(
            "selected", whole=selection.is_whole_project, left_out=sorted(done), batches=begun,
            started=started or _now(),
        )  # fmt: skip
        self._send_nodes(nodes)
        selection.leave_out(done)

    def _send_nodes(self, nodes: list[Json]) -> None:
        self._known |= {node["id"] for node in nodes}
        config = self._task.config
        self.send("nodes", project=config.project_name, target=config.target_name, nodes=nodes)

    # Run a node -------------------------------------------------------------------------------

    def run(self, original: Any, runner: Any, manifest: Any) -> Any:
        """Run a node as dbt does, again after each transient database error.

        Args:
            original: `BaseRunner.safe_run` of dbt.
            runner: dbt's runner of the node.
            manifest: dbt's manifest.
        """
        name = runner.node.unique_id
        batch = runner.batches[runner.batch_idx] if hasattr(runner, "batch_idx") else None
        if batch and self._batches.begin(name, runner.batches.values()):
            self._send_batches(name)
        result = original(runner, manifest)
        for attempt in range(self._retries):
            failed = str(result.status) in ("error", "runtime error")
            # dbt's message of a failed batch is always the word ERROR.
            message = getattr(self._thread, "exception", "") if batch else result.message or ""
            if is_stopping(self._task) or not (failed and self._transient.search(message)):
                break
            self.send(
                "retry", id=name, attempt=attempt + 1, of=self._retries, message=message,
                delay=self._delay_seconds, at=_now(),
            )  # fmt: skip
            if self.interrupted.wait(self._delay_seconds) or is_stopping(self._task):
                break
            self.send("start", id=name, at=_now())
            result = original(runner, manifest)
        if batch and str(result.status) == "success" and self._batches.end(name, batch):
            self._send_batches(name)
        kind = str(runner.node.resource_type)
        if kind == "test" and str(result.status) in ("fail", "warn"):
            with contextlib.suppress(Exception):  # a sample that cannot be read must not fail the command
                self._send_sample(runner.adapter, result.node, manifest)
        return result

    def _send_batches(self, model: str) -> None:
        """Report the batches of a microbatch model, if it has any."""
        if report := self._batches.report(model):
            self.send("batches", id=model, at=_now(), **report)

    def _send_sample(self, adapter: Any, test: Any, manifest: Any) -> None:
        """Report the SQL of a failed data test, and some of the rows that it finds."""
        sql = test.compiled_code
        shown = cut(sql, SQL_BYTES)
        self.send("rows", id=test.unique_id, sql=shown, columns=[], rows=[])
        if not self._sample_rows:
            return
        with adapter.connection_named(f"rows {test.unique_id}"):
            limited = adapter.execute_macro(
                "get_limit_subquery_sql", macro_resolver=manifest, kwargs={"sql": sql, "limit": self._sample_rows}
            )
            _, table = adapter.execute(str(limited), fetch=True)
        columns, rows = bounded_rows(list(table.column_names), [list(row) for row in table.rows])
        self.send("rows", id=test.unique_id, sql=shown, columns=columns, rows=rows)

    # Events of dbt ----------------------------------------------------------------------------

    def listen(self, event: Any) -> None:
        """Report an event of dbt. dbt calls this in the thread of the event."""
        name = event.info.name
        if name == "NodeStart":
            info = event.data.node_info
            if self._is_first_start(info.unique_id) and info.unique_id in self._known:
                self.send("start", id=info.unique_id, at=_utc(info.node_started_at))
        elif name == "GenericExceptionOnRun":
            self._thread.exception = event.data.exc
        elif name == "NodeFinished":
            self._finished(event.data.node_info, event.data.run_result)
        elif name == "LogHookStartLine":
            self._send_hook(event.data.node_info)
            self.send("start", id=event.data.node_info.unique_id, at=_utc(event.data.node_info.node_started_at))
        elif name == "LogHookEndLine":
            self._send_hook(event.data.node_info)
            self._send_result(self._task.node_results[-1], event.data.node_info.node_finished_at)
        if event.info.level not in ("debug", "test") and name not in _PROGRESS_EVENTS and event.info.msg.strip():
            node = getattr(event.data, "node_info", None)
            self.send("log", level=event.info.level, text=event.info.msg, id=node.unique_id if node else "")

    def _send_hook(self, info: Any) -> None:
        """Report a hook as a node once it runs, as dbt does not select hooks."""
        if info.unique_id not in self._known:
            node = self._task.manifest.nodes[info.unique_id]
            self._send_nodes([describe(node, self._task.manifest, [])])

    def _is_first_start(self, node: str) -> bool:
        """Count a start, and return whether the node itself starts.

        The batches of a microbatch model start and finish within the model, with the model's id.
        """
        with self._lock:
            self._open[node] += 1
            return self._open[node] == 1

    def _is_last_end(self, node: str) -> bool:
        """Count an end, and return whether the node itself ends."""
        with self._lock:
            self._open[node] -= 1
            return self._open[node] == 0

    def _finished(self, info: Any, result: Any) -> None:
        """Report the end of a node, from dbt's event."""
        if not self._is_last_end(info.unique_id):
            return
        self._status[info.unique_id] = result.status
        if info.unique_id not in self._known:
            return
        if result.status == "skipped":
            self._cause[info.unique_id] = self._cause_of_skip(info.unique_id)
        self._send_batches(info.unique_id)
        response = dict(result.adapter_response.items())
        self.send(
            "end",
            id=info.unique_id,
            status=result.status,
            message=result.message,
            at=_utc(info.node_finished_at) if info.node_finished_at else _now(),
            seconds=result.execution_time,
            thread=result.thread,
            rows=_rows_affected(response),
            failures=result.num_failures or None,
            because=self._cause.get(info.unique_id, ""),
        )

    def _cause_of_skip(self, skipped: str) -> str:
        """Return the id of the failed node that a node was skipped for."""
        graph = self._task.graph.graph
        above = set(graph.predecessors(skipped)) if skipped in graph else set()
        above |= set(getattr(self._task, "model_to_unit_test_map", {}).get(skipped, ()))
        unit = self._task.manifest.unit_tests.get(skipped)
        if unit:  # dbt skips a unit test with its model
            above |= set(graph.predecessors(unit.depends_on.nodes[0]))
        blocking = sorted(
            node for node in above if self._status.get(node) in BLOCKING_STATUSES and not self._is_passed_over(node)
        )
        first = next((node for node in blocking if self._status[node] != "skipped"), blocking[0] if blocking else "")
        return self._cause.get(first, first)

    def _is_passed_over(self, node: str) -> bool:
        """Return whether dbt runs the nodes behind a failed node: `on_error: continue`, since dbt 1.12."""
        config = getattr(self._task.manifest.nodes.get(node), "config", None)
        return getattr(getattr(config, "on_error", None), "value", "") == "continue"

    # The end of the command -------------------------------------------------------------------

    def _send_result(self, result: Any, finished: str = "", final: bool = False) -> None:
        """Report the end of a node from dbt's result, where dbt sends no event or the event no longer holds."""
        node, status = result.node, str(result.status)
        self._status[node.unique_id] = status
        self.send(
            "end",
            id=node.unique_id,
            status=status,
            message=result.message or "",
            at=_utc(finished) if finished else _now(),
            seconds=result.execution_time,
            thread=result.thread_id,
            rows=_rows_affected(result.adapter_response or {}),
            failures=result.failures,
            because="",
            final=final,
        )

    def ended(self, outcome: Any) -> None:
        """Report the end of the command, and nodes whose final status differs: with fail-fast dbt skips some late."""
        for result in getattr(outcome.result, "results", None) or []:
            node = getattr(result, "node", None)
            if node is None or node.unique_id not in self._known:
                continue
            if self._status.get(node.unique_id) != str(result.status):
                self._send_result(result, final=True)
        error = str(outcome.exception).strip() or type(outcome.exception).__name__ if outcome.exception else None
        problems = getattr(outcome.result, "errors", None) or []  # of the catalog, which is no node
        self.send("result", success=outcome.success, error=error, problems=[str(problem) for problem in problems])


def _rows_affected(response: Json) -> int | None:
    """Return the rows that the database reports; None where it reports none. Postgres reports -1 for a view."""
    rows = response.get("rows_affected")
    return int(rows) if rows is not None and int(rows) >= 0 else None


def _utc(text: str) -> str:
    """Return one of dbt's times with its time zone, which dbt leaves out."""
    return text if text.endswith(("Z", "+00:00")) else f"{text}+00:00"


def _now() -> str:
    return datetime.now(UTC).isoformat()
