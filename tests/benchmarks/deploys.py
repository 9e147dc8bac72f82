"""Measure what a person waits for on a cluster: `make up`, `make deploy`, a run from request to end.

    python -m tests.benchmarks.deploys --pairs 7     # or: make bench-deploys

In a copy of the checkout and a namespace of its own, on the cluster of `make cluster`, which is made anew for each
`make up`: caches are full, the cluster is not there. Whole commands are timed from exec to exit; the table is
appended to results.md.
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
from tests.benchmarks.run import Figure, results_table
from tests.parts import copy_of_checkout

MAKE = ("make", "--silent", "--old-file", ".venv/ready")


def _timed(folder: Path, *arguments: str) -> float:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    start = time.perf_counter()
    done = subprocess.run([*MAKE, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"make {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - start


def measure(folder: Path, ups: int, pairs: int) -> list[Figure]:
    """The figures, from a copy of the checkout."""
    up, changed, unchanged, run = [], [], [], []
    for _ in range(ups):
        _timed(folder, "down")
        up.append(_timed(folder, "up"))
    flow = folder / "flows" / "report.py"
    text = flow.read_text()
    for number in range(pairs):
        flow.write_text(f"{text}# {number}\n")
        changed.append(_timed(folder, "deploy"))
        unchanged.append(_timed(folder, "deploy"))
        run.append(_timed(folder, "run-on-cluster"))
    return [
        Figure("`make up`, caches full, no cluster: to the end of the daily job's first run", "s", up, "at most 180"),
        Figure("`make deploy` of a changed flow: build, push, pool, deployments, workers", "s", changed, "at most 60"),
        Figure("`make deploy` with nothing changed", "s", unchanged, "at most 15"),
        Figure("`make run-on-cluster`: the daily job as a pod, followed to its end", "s", run),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and append it to the results."""
    parser = argparse.ArgumentParser(description="Measure deploys on the local cluster, which is taken away first.")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--ups", type=int, default=3)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_of_checkout(folder)
        (folder / ".venv").symlink_to(ROOT / ".venv")
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
        subprocess.run(
            ["git", "-c", "user.name=bench", "-c", "user.email=bench@example.com", "commit", "-qm", "A copy"],
            cwd=folder, check=True,
        )  # fmt: skip
        with results_table("Kubernetes 1.35 on one node from packages") as report:
            report(measure(folder, options.ups, options.pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
