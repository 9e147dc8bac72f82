"""Print the figures of a benchmark as a table, and append the table to results.md."""

import contextlib
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil

from orchestration.operations.local_cluster import binaries
from orchestration.settings import ROOT

RESULTS = Path(__file__).with_name("results.md")


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Args:
        name: what was measured.
        unit: the unit of the values.
        values: one value of each repetition.
        note: the goal, or what the value depends on.
    """

    name: str
    unit: str
    values: list[float]
    note: str = ""

    def row(self) -> str:
        """Return the row as Markdown: n, median, p90, min, max."""
        values = self.values
        digits = 0 if min(values) >= 1000 else 2
        shown = (statistics.median(values), percentile(values, 90), min(values), max(values))
        figures = " | ".join(f"{value:,.{digits}f}" for value in shown)
        return f"| {self.name} | {self.unit} | {len(values)} | {figures} | {self.note} |"

    @property
    def record(self) -> dict[str, object]:
        """The row for a file of results."""
        values = self.values
        shown = {"median": statistics.median(values), "p99": percentile(values, 99), "max": max(values)}
        rounded = {name: round(value, 3) for name, value in shown.items()}
        return {"name": self.name, "unit": self.unit, "n": len(values), "note": self.note} | rounded


def percentile(values: list[float], percent: int) -> float:
    """Return the smallest value that at least `percent` of the values do not exceed."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


@contextlib.contextmanager
def results_table(parts: str) -> Iterator[Callable[[Iterable[Figure]], None]]:
    """Yield a function that prints each figure as soon as it is measured.

    When the block ends, also by an error or Ctrl-C, the figures so far are appended to results.md.

    Args:
        parts: the programs that were measured with, and their versions.
    """
    rows = [_heading(parts)]
    print(rows[0], flush=True)

    def report(figures: Iterable[Figure]) -> None:
        for figure in figures:
            rows.append(figure.row())
            print(rows[-1], flush=True)

    try:
        yield report
    finally:
        if len(rows) > 1:
            with RESULTS.open("a") as results:
                results.write("\n".join(rows) + "\n")


def describe_databases() -> str:
    """Return names and versions of the PostgreSQL and the Redis that `tests.parts` starts; install what is missing."""
    binaries.install_packages({"pg_lsclusters": "postgresql", "redis-server": "redis-server"})
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    postgres = subprocess.check_output([programs / "postgres", "--version"], text=True).split()[2]
    redis = subprocess.check_output(["redis-server", "--version"], text=True).split()[2].removeprefix("v=")
    return f"PostgreSQL {postgres} and Redis {redis} of this machine"


def _heading(parts: str) -> str:
    """Return the head of a table: date, commit, machine and parts."""
    return (
        f"\n## {datetime.now(UTC):%Y-%m-%d}, {describe_commit()}\n\n{platform.machine()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GB, Python {platform.python_version()}, {parts}.\n\n"
        "| what | unit | n | median | p90 | min | max | |\n|---|---|---:|---:|---:|---:|---:|---|"
    )


def describe_commit(checkout: Path = ROOT) -> str:
    """Return the commit of a checkout that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()
