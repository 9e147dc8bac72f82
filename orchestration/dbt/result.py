"""What a dbt command did: its nodes, and what became of each."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from orchestration.errors import DbtError

FAILED = ("error", "fail", "runtime error", "partial success")
SKIPPED = "skipped"
REUSED = "reused"
"""An earlier attempt of the same run has done it. dbt 1.12 has the word too, for what is as its state says."""
NOT_RUN = ""
"""Selected, but the command was over before it came to it."""


@dataclass
class Node:
    """A node that a command selected, and what became of it."""

    id: str
    """dbt's unique id: model.flights.stg_flights."""
    name: str
    title: str
    """As people say it: `stg_flights`, `not_null · stg_flights.flight_id`."""
    kind: str
    """dbt's resource type: model, seed, snapshot, test, unit_test, source, operation, ..."""
    path: str
    relation: str | None = None
    """The quoted relation that it builds."""
    materialized: str | None = None
    parents: list[str] = field(default_factory=list)
    """Ids of the nodes right above it among those of the command."""
    description: str = ""
    asset: str = ""
    """The address of what it builds: postgres://database/schema/name."""
    reads: list[str] = field(default_factory=list)
    """The addresses of what it is built from, sources too."""

    status: str = NOT_RUN
    """dbt's own word: success, pass, warn, error, fail, skipped, no-op, ...; or `REUSED`."""
    message: str = ""
    started: datetime | None = None
    ended: datetime | None = None
    seconds: float = 0.0
    thread: str = ""
    rows: int | None = None
    """Rows affected, as the database says; None for what has none, a view for one."""
    failures: int | None = None
    """Rows that a test found wrong."""
    attempts: int = 0
    because: str = ""
    """The id of the node whose failure is why this one was skipped."""
    sql: str = ""
    """The compiled SQL of a test that failed."""
    columns: list[str] = field(default_factory=list)
    sample: list[list[Any]] = field(default_factory=list)
    """Some of the rows that it found: see `sample_rows` of `DbtProject`."""

    @property
    def failed(self) -> bool:
        """Whether it ran and did not succeed."""
        return self.status in FAILED

    @property
    def done(self) -> bool:
        """Whether it need not run again."""
        return bool(self.status) and self.status not in (*FAILED, SKIPPED)

    @property
    def reason(self) -> str:
        """Why it failed, in a line: dbt's message without its heading."""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        if len(lines) > 1 and " Error in " in lines[0]:
            lines = lines[1:]
        shown = [line for line in lines if not line.startswith("compiled code at") and set(line) != {"^"}]
        return " ".join(shown)


@dataclass(frozen=True)
class DbtResult:
    """What a dbt command did, node by node in the order in which they ended."""

    command: str
    nodes: list[Node] = field(default_factory=list)
    seconds: float = 0.0
    """From the first node's start to the last one's end."""
    stored: str = ""
    """The URL of the folder with the command's artifacts; empty if they could not be stored."""
    problem: str = ""
    """Why dbt's command fails although no node did: the catalog could not be read, say."""

    @property
    def failed(self) -> list[Node]:
        """The nodes that failed."""
        return [node for node in self.nodes if node.failed]

    @property
    def skipped(self) -> list[Node]:
        """The nodes that did not run because something above them failed."""
        return [node for node in self.nodes if node.status == SKIPPED]

    @property
    def warned(self) -> list[Node]:
        """The nodes that dbt warns of."""
        return [node for node in self.nodes if node.status == "warn"]

    @property
    def reused(self) -> list[Node]:
        """The nodes that an earlier attempt of the same run has done."""
        return [node for node in self.nodes if node.status == REUSED]

    @property
    def built(self) -> list[Node]:
        """The relations that were built or refreshed, by this attempt or an earlier one."""
        kinds = ("model", "seed", "snapshot")
        return [node for node in self.nodes if node.kind in kinds and node.status in ("success", REUSED)]

    def error(self) -> DbtError | None:
        """The failures in one sentence, with what was built all the same; None if all is well."""
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
        """The chain of dependencies that took longest: no number of threads makes the command shorter."""
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
    """The nodes, each after all of its parents; without recursion, as a chain may be long."""
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
