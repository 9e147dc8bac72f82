"""Track one dbt command: the state of its nodes, which is mirrored and logged as dbt reports it."""

import logging
from collections import deque
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from orchestration.dbt import summary
from orchestration.dbt.artifacts import StoredCommand
from orchestration.dbt.mirror import LOG_LEVELS, Call, Mirror
from orchestration.dbt.process import DbtProcess
from orchestration.dbt.result import FAILED, NOT_RUN, REUSED, SKIPPED, DbtResult, Node
from orchestration.errors import DbtError

TEST_KINDS = ("test", "unit_test")

logger = logging.getLogger(__name__)


class CommandRun:
    """Keeps the nodes of a running command, and reports each change to the Prefect API and the log.

    Args:
        command: dbt's command.
        call: identifies the command in its flow run; None outside of a flow.
        earlier: the nodes that earlier attempts of the flow run have finished or begun, by their ids.
    """

    def __init__(self, command: str, call: Call | None, earlier: Mapping[str, Node]) -> None:
        self.command = command
        self.call = call
        self.earlier = earlier
        self.nodes: dict[str, Node] = {}
        self.target = ""
        """The profile's target, which dbt reports."""
        self._left_out: set[str] = set()
        """The ids of the nodes that dbt leaves out, because earlier attempts have finished them."""
        self._begun: dict[str, Any] = {}
        """The batches of microbatch models that earlier attempts have begun, by the models' ids."""
        self._started = ""
        self.whole_project = False
        """Whether the command has selected the whole project."""
        self.stopping = False
        """Whether the command is being interrupted: nodes that fail now were cancelled."""
        self._outcome: dict[str, Any] | None = None
        self._ended: list[Node] = []
        self._errors: deque[str] = deque(maxlen=3)
        """The last errors of dbt's log that belong to no node."""
        self._running: dict[str, Node] = {}
        self._mirror = Mirror(call) if call else None
        self._logger: Any = logger
        if call:
            from prefect.logging import get_run_logger

            self._logger = get_run_logger()

    # Events of the child process.

    def apply(self, event: dict[str, Any]) -> None:
        """Apply an event of the child process; for the events see `orchestration.dbt.child`."""
        match event["event"]:
            case "other target":
                self.target = event["target"]
            case "selected":
                self.whole_project = event["whole"]
                self._left_out, self._begun = set(event["left_out"]), event["batches"]
                self._started = event["started"]
            case "nodes":
                self.target = event["target"]
                for description in event["nodes"]:
                    self.nodes[description["id"]] = node = Node(**description)
                    node.first_attempt, node.batches = self._started, self._begun.get(node.id)
                    if node.id in self._left_out:
                        self._reuse(node, self.earlier[node.id])
            case "start":
                node = self.nodes[event["id"]]
                node.started = datetime.fromisoformat(event["at"])
                node.attempts += 1
                self._running[node.id] = node
                if self._mirror:
                    self._mirror.report_running(node)
            case "batches":
                node = self.nodes[event["id"]]
                node.batches = {key: event[key] for key in ("successful", "failed")} if event["failed"] else None
                if self._mirror and not node.status:
                    self._mirror.report_running(node, datetime.fromisoformat(event["at"]))
            case "retry":
                node = self.nodes[event["id"]]
                text = f"{event['message'].strip()}\nAnother attempt in {event['delay']:g} s."
                self.log("warn", f"{node.title}: {text}", node.id)
                if self._mirror:
                    self._mirror.report_retry(node, text, datetime.fromisoformat(event["at"]))
            case "rows":
                node = self.nodes[event["id"]]
                node.sql, node.columns, node.sample = event["sql"], event["columns"], event["rows"]
            case "end":
                self._end(self.nodes[event["id"]], event)
            case "log":
                self._log_line(event["level"], event["text"], event["id"])
            case "interrupted":
                self.stopping = True
            case "result":
                self._outcome = event

    def _reuse(self, node: Node, finished: Node) -> None:
        """Take over the result of an earlier attempt."""
        node.status = REUSED
        node.attempts, node.started, node.ended = finished.attempts, finished.started, finished.ended
        node.seconds, node.rows = finished.seconds, finished.rows
        self._ended.append(node)
        if self._mirror:
            self._mirror.report_end(node, self.nodes)

    def _end(self, node: Node, event: dict[str, Any]) -> None:
        if self.stopping and event["status"] in (*FAILED, SKIPPED):
            return
        self._running.pop(node.id, None)
        if node.status and (node.status == REUSED or not event.get("final")):
            return
        if not node.status:
            self._ended.append(node)
        node.status, node.message, node.because = event["status"], event["message"] or "", event["because"]
        node.ended, node.seconds = datetime.fromisoformat(event["at"]), event["seconds"]
        node.thread, node.rows, node.failures = event["thread"], event["rows"], event["failures"]
        node.started = node.started or node.ended
        if self._mirror:
            self._mirror.report_end(node, self.nodes)
        if node.sql:
            self.log("error" if node.failed else "warn", summary.rows_as_text(node), node.id, terminal=False)

    def _log_line(self, level: str, text: str, node_id: str) -> None:
        """Log a line of dbt; the lines of passing tests only at their task runs, not on the terminal."""
        node = self.nodes.get(node_id)
        passing_test = level == "info" and node is not None and node.kind in TEST_KINDS
        if level == "error" and not node:
            self._errors.append(" ".join(text.split())[:500])
        self.log(level, text, node_id if node else "", terminal=not passing_test)

    def log(self, level: str, text: str, node: str = "", *, terminal: bool = True) -> None:
        """Log a line at the node's task run, or at the flow run without a node, and on the terminal."""
        if self._mirror:
            self._mirror.log(level, text, node)
        if terminal:
            self._logger.log(LOG_LEVELS.get(level, logging.INFO), text, extra={"send_to_api": False})

    # The end of the command.

    def process_ended(self) -> None:
        """Report the nodes that were running when the child process ended as cancelled or crashed."""
        if self._running and self._mirror:
            cancelled = self._mirror.is_flow_run_cancelled()
            for node in self._running.values():
                self._mirror.report_interrupted(node, cancelled)

    def raise_if_incomplete(self, process: DbtProcess, project: Path) -> None:
        """Raise if dbt did not complete the command; failed nodes are no reason.

        Args:
            process: the child process, which has ended.
            project: the project's folder, for the message.

        Raises:
            KeyboardInterrupt: dbt was interrupted. A signal to the process group interrupts dbt, but not a flow that
                waits for dbt in a thread.
            DbtError: dbt died or could not start, or stopped without a failed node.
        """
        if self.stopping:
            raise KeyboardInterrupt(f"dbt {self.command} was interrupted")
        if self._outcome is None:
            raise DbtError(
                f"dbt {self.command} ended with status {process.exit_status} before it was done: "
                f"{process.last_stderr or 'it printed no reason'}. Finished nodes are complete: run it again."
            )
        ended = [node for node in self.nodes.values() if node.status not in (NOT_RUN, REUSED)]
        if self._outcome["error"] and not any(node.failed for node in ended):
            reason = " ".join(part.strip() for part in self._outcome["error"].split("\n") if part.strip())
            stopped, consequence = "stopped", "Finished nodes are complete: run it again"
            if not ended:
                stopped, consequence = "could not start", "Nothing was built"
            raise DbtError(f"dbt {self.command} {stopped} on {project}: {reason.removesuffix('.')}. {consequence}.")

    def result(self) -> DbtResult:
        """Return the nodes that have ended, and how long they took."""
        timed = [node for node in self._ended if node.started and node.ended and node.status != REUSED]
        seconds = 0.0
        if timed:
            first = min(node.started for node in timed if node.started)
            seconds = (max(node.ended for node in timed if node.ended) - first).total_seconds()
        return DbtResult(self.command, list(self._ended), seconds, problem=self._problem())

    def _problem(self) -> str:
        """Return why dbt fails the command if no node failed; empty otherwise."""
        if self._outcome is None or self._outcome["success"] or any(node.failed for node in self._ended):
            return ""
        reasons = self._outcome["problems"] or list(self._errors) or ["dbt gave no reason"]
        return "; ".join(" ".join(text.split()) for text in reasons)

    def summarise(self, result: DbtResult, before: StoredCommand | None) -> None:
        """Show the summary in the log and as artifacts of the flow run.

        Args:
            result: the result of this command.
            before: the command to compare with.
        """
        self.log("info", summary.text(result, before))
        if self._mirror and result.nodes:
            headline = summary.counts(result)
            self._mirror.create_artifact(f"dbt {self.command}", "markdown", summary.markdown(result, before), headline)
            if picture := summary.gantt(result):
                self._mirror.create_artifact(
                    f"dbt {self.command} threads", "image", summary.as_data_url(picture), headline
                )

    def close(self) -> None:
        """Send the rest to the API within a time limit, and warn of what could not be sent."""
        if self._mirror and (unsent := self._mirror.close()):
            self._logger.warning(
                "The Prefect API did not take %s events and %s lines of log of this run (%s). dbt was not disturbed.",
                unsent.events,
                unsent.lines,
                unsent.reason,
                extra={"send_to_api": False},
            )
