"""The result of a dbt command: its nodes and the outcome of each."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from orchestration.errors import DbtError

SUCCEEDED = ("success", "pass", "no-op", "warn")
"""dbt's statuses of nodes that need not run again."""
FAILED = ("error", "fail", "runtime error", "partial success")
"""dbt's statuses of nodes for which dbt's command fails."""
SKIPPED = "skipped"
"""dbt's status of nodes that did not run, because a node above failed."""
REUSED = "reused"
"""An earlier attempt of the flow run finished the node. dbt 1.12 has this status too: the state holds the result."""
NOT_RUN = ""
"""The node was selected, but the command ended before it ran."""


@dataclass
class Node:
    """A node that a command selected, with its outcome once it has one."""

    id: str
    """dbt's unique id: `model.flights.stg_flights`."""
    name: str
    title: str
    """The name that people read: `stg_flights`, `not_null · stg_flights.flight_id`."""
    kind: str
    """dbt's resource type: model, seed, snapshot, test, unit_test, source, operation, ..."""
    path: str
    relation: str | None = None
    """The quoted name of the relation that the node builds."""
    materialized: str | None = None
    parents: list[str] = field(default_factory=list)
    """The ids of the nearest nodes above, among those of the command."""
    description: str = ""
    asset: str = ""
    """The asset key of the relation that the node builds: `postgres://database/schema/name`."""
    reads: list[str] = field(default_factory=list)
    """The asset keys of the relations that the node reads, sources included."""

    status: str = NOT_RUN
    """dbt's status (success, pass, warn, error, fail, skipped, no-op, ...), `REUSED` or `NOT_RUN`."""
    message: str = ""
    started: datetime | None = None
    ended: datetime | None = None
    seconds: float = 0.0
    thread: str = ""
    rows: int | None = None
    """Rows affected, as the database reports; None where it reports none, as of a view."""
    failures: int | None = None
    """Rows that a test found."""
    attempts: int = 0
    first_attempt: str = ""
    """When dbt started the command in the first attempt: until then microbatch models have batches."""
    batches: dict[str, list[list[str]]] | None = None
    """The successful and the failed batches of a microbatch model that is not complete, as ranges of time."""
    because: str = ""
    """The id of the failed node that this node was skipped for."""
    sql: str = ""
    """The compiled SQL of a failed test."""
    columns: list[str] = field(default_factory=list)
    sample: list[list[Any]] = field(default_factory=list)
    """Some of the rows that a failed test found: see `sample_rows` of `DbtProject`."""

    @property
    def failed(self) -> bool:
        """Whether the node ran and failed."""
        return self.status in FAILED

    @property
    def done(self) -> bool:
        """Whether a retry leaves the node out."""
        return self.status in (*SUCCEEDED, REUSED)

    @property
    def reason(self) -> str:
        """Why the node failed, in one line: dbt's message without its heading."""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        if len(lines) > 1 and " Error in " in lines[0]:
            lines = lines[1:]
        shown = [line for line in lines if not line.startswith("compiled code at") and set(line) != {"^"}]
        return " ".join(shown)


@dataclass(frozen=True)
class DbtResult:
    """The result of a dbt command: its nodes in the order in which they ended."""

    command: str
    nodes: list[Node] = field(default_factory=list)
    seconds: float = 0.0
    """From the first node's start to the last node's end."""
    stored: str = ""
    """The URL of the folder with the command's artifacts; empty if storing them failed."""
    problem: str = ""
    """Why the command failed although no node failed, such as an unreadable catalog."""

    @property
    def failed(self) -> list[Node]:
        """The nodes that failed."""
        return [node for node in self.nodes if node.failed]

    @property
    def skipped(self) -> list[Node]:
        """The nodes that did not run, because a node above failed."""
        return [node for node in self.nodes if node.status == SKIPPED]

    @property
    def warned(self) -> list[Node]:
        """The nodes that ended with a warning."""
        return [node for node in self.nodes if node.status == "warn"]

    @property
    def reused(self) -> list[Node]:
        """The nodes that an earlier attempt of the flow run has finished."""
        return [node for node in self.nodes if node.status == REUSED]

    @property
    def unknown(self) -> list[Node]:
        """The nodes with a status that this version does not know: neither failed nor done."""
        return [node for node in self.nodes if node.status not in (*SUCCEEDED, *FAILED, SKIPPED, REUSED, NOT_RUN)]

    @property
    def built(self) -> list[Node]:
        """The nodes whose relations were built, by this attempt of the flow run or an earlier one."""
        kinds = ("model", "seed", "snapshot")
        return [node for node in self.nodes if node.kind in kinds and node.status in ("success", REUSED)]

    def error(self) -> DbtError | None:
        """Return the failures in one sentence, with the relations that were built; None if no node failed."""
        if self.problem and not self.failed:
            return DbtError(
                f"dbt {self.command} failed: {self.problem.removesuffix('.')}. Correct the cause and run again.", self
            )
        if not self.failed:
            return None
        reasons = "; ".join(f"{node.kind} {node.name} ({node.path}): {node.reason}" for node in self.failed[:5])
        more = f"; and {len(self.failed) - 5} more" if len(self.failed) > 5 else ""
        skipped = f", {len(self.skipped)} skipped behind" if self.skipped else ""
        return DbtError(
            f"dbt {self.command}: {len(self.failed)} of {len(self.nodes)} nodes failed{skipped}: "
            f"{reasons}{more}. Built, each whole and up to date: {_listed(self.built)}. "
            "Correct the cause and run again.",
            self,
        )

    def critical_path(self) -> list[Node]:
        """Return the chain of dependencies that took longest: more threads cannot make the command shorter."""
        by_id = {node.id: node for node in self.nodes}
        longest: dict[str, tuple[float, str]] = {}

        def length(node: Node) -> float:
            return longest[node.id][0]

        for node in _parents_first(by_id):
            above = max((by_id[parent] for parent in node.parents if parent in by_id), key=length, default=None)
            longest[node.id] = (node.seconds + (length(above) if above else 0.0), above.id if above else "")
        path: list[Node] = []
        last = max(self.nodes, key=length, default=None)
        while last:
            path.append(last)
            last = by_id.get(longest[last.id][1])
        return path[::-1]


def _parents_first(nodes: dict[str, Node]) -> Iterable[Node]:
    """Yield each node after all of its parents, without recursion: a chain may be long."""
    seen: set[str] = set()
    for root in nodes.values():
        stack = [(root, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                yield node
            elif node.id not in seen:
                seen.add(node.id)
                stack.append((node, True))
                stack += [(nodes[parent], False) for parent in node.parents if parent in nodes]


def _listed(nodes: list[Node], shown: int = 20) -> str:
    names = [node.name for node in nodes[:shown]]
    if len(nodes) > shown:
        names.append(f"and {len(nodes) - shown} more")
    return ", ".join(names) or "nothing"
