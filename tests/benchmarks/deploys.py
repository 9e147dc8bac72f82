"""Measure what a person waits for on a cluster: `make up`, `make deploy`, and a run from its request to its end.

    python -m tests.benchmarks.deploys --pairs 7     # or: make bench-deploys

The commands run in a copy of the checkout, on the cluster of `make cluster`. Before each `make up` the cluster is
deleted; the caches stay full. Whole commands are timed from exec to exit. The table is printed and appended to
results.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from orchestration.settings import ROOT
from tests.benchmarks.table import Figure, results_table
from tests.parts import commit_copy_of_checkout

MAKE = ("make", "--silent", "--old-file", ".venv/ready")
"""Use this checkout's virtual environment unchanged."""


def _time_make(folder: Path, *arguments: str) -> float:
    """Return the seconds of a make target; end this process if the target fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    start = time.perf_counter()
    done = subprocess.run([*MAKE, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"make {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def measure(folder: Path, ups: int, pairs: int) -> list[Figure]:
    """Measure the make targets.

    Args:
        folder: a copy of the checkout.
        ups: how often to measure `make up`.
        pairs: how often to measure the other targets.
    """
    up, changed, unchanged, run = [], [], [], []
    for _ in range(ups):
        _time_make(folder, "down")
        up.append(_time_make(folder, "up"))
    flow = folder / "flows" / "report.py"
    text = flow.read_text()
    for number in range(pairs):
        flow.write_text(f"{text}# {number}\n")
        changed.append(_time_make(folder, "deploy"))
        unchanged.append(_time_make(folder, "deploy"))
        run.append(_time_make(folder, "run-on-cluster"))
    return [
        Figure("`make up`, caches full, no cluster: to the end of the daily job's first run", "s", up, "at most 180"),
        Figure("`make deploy` of a changed flow: build, push, pool, deployments, workers", "s", changed, "at most 60"),
        Figure("`make deploy` with nothing changed", "s", unchanged, "at most 15"),
        Figure("`make run-on-cluster`: the daily job as a pod, followed to its end", "s", run),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the make targets, and return the exit status."""
    parser = argparse.ArgumentParser(description="Measure deploys on the local cluster, which is deleted first.")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--ups", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        commit_copy_of_checkout(folder)
        (folder / ".venv").symlink_to(ROOT / ".venv")
        with results_table("Kubernetes 1.35 on one node from packages") as report:
            report(measure(folder, options.ups, options.pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
