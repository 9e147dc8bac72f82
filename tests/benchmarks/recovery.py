"""Measure how soon a killed run is retried, and compare a run's start with that by Prefect's command.

    python -m tests.benchmarks.recovery --kills 10     # or: make bench-recovery

The retry is timed from SIGKILL of the run's processes to the first line of the next run attempt. Starts are compared in
alternating pairs.

The local cluster executes one run at a time. The reconciler looks every second, and the worker listens to events. The
moments of death and of the first line come from the run's journal, which is written four times a second; all others
come from the run's states. The table is printed and appended to results.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise

import httpx

from orchestration.errors import ClusterError
from orchestration.protocol import PEAK_LABEL
from tests.benchmarks.table import Figure, results_table
from tests.e2e.faults.victims import kill_pod, list_pods, list_states, wait_for_state
from tests.e2e.release import Pool
from tests.e2e.runs import create_deployment, get_run, start_run, wait_for_log, wait_until_ended
from tests.long.soak import Line, installed_charts, read_journals
from tests.parts import wait_until

PARTS = (
    "until the run is Crashed: the kubelet reports the pod's end, and the reconciler reads the report",
    "until the run is AwaitingRetry",
    "until a worker has claimed the run",
    "until the run is Running: Job, pod, imports, loading the flow",
    "until the first line",
)
"""The parts of the time between a kill and the first line of the next run attempt."""


def find_milestones(api: httpx.Client, run: str, journal: Sequence[Line]) -> list[float]:
    """Return the moment of death and the ends of `PARTS`, in seconds since 1970."""
    first, second = dict.fromkeys(line.pod for line in journal)
    listed = [
        (state["name"], datetime.fromisoformat(state["timestamp"]).timestamp()) for state in list_states(api, run)
    ]
    names = [name for name, _ in listed]
    crashed = names.index("Crashed")
    later = dict(reversed(listed[crashed:]))  # the first state of each name
    return [
        max(line.time for line in journal if line.pod == first),
        *(later[name] for name in ("Crashed", "AwaitingRetry", "Pending", "Running")),
        min(line.time for line in journal if line.pod == second),
    ]


def measure_recovery(api: httpx.Client, pool: Pool, kills: int) -> list[Figure]:
    """Kill runs one after the other, and measure how soon each is retried."""
    deployment = create_deployment(api, pool, entrypoint="/probe/flow.py:piecewise")
    totals: list[float] = []
    parts: list[list[float]] = [[] for _ in PARTS]
    for number in range(kills):
        run = start_run(api, deployment, parameters={"pieces": 1, "seconds": 30 + number / 10})
        wait_for_log(api, run, "step 1", 120)
        [pod] = list_pods(pool, run)
        kill_pod(pool, pod["metadata"]["name"])
        wait_for_state(api, run, "Crashed", 60)
        wait_for_log(api, run, "attempt 2 in", 120)
        found = find_milestones(api, run, read_journals(pool)[run])
        totals.append(found[-1] - found[0])
        for seconds, (earlier, later) in zip(parts, pairwise(found), strict=True):
            seconds.append(later - earlier)
        print(f"{number + 1} of {kills}: {totals[-1]:.1f} s", file=sys.stderr, flush=True)
        api.delete(f"/flow_runs/{run}").raise_for_status()
        pool.namespace.kubectl("delete", "jobs", "-l", f"prefect.io/flow-run-id={run}")
        pool.namespace.kubectl("wait", "pods", "-l", f"prefect.io/flow-run-id={run}", "--for=delete", "--timeout=60s")
    whole = "from SIGKILL of a run's processes to the first line of the next run attempt"
    return [
        Figure(whole, "s", totals, "at most 6 at the median"),
        *(Figure(f"of that: {part}", "s", seconds) for part, seconds in zip(PARTS, parts, strict=True)),
    ]


PREFECT_COMMAND = "python -m prefect flow-run execute"
"""Prefect's own command, in a form that `orchestration.runs.supervisor` executes as given: it replaces the form without
`python -m`."""


def measure_starts(api: httpx.Client, pool: Pool, pairs: int) -> list[Figure]:
    """Measure time and memory of runs that do nothing, by the engine and by Prefect's command, in alternating pairs."""
    ways = {"in one process": {}, "by `prefect flow-run execute`": {"command": PREFECT_COMMAND}}
    deployments = {
        way: create_deployment(api, pool, entrypoint="/probe/flow.py:victim", job_variables=variables)
        for way, variables in ways.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    memory: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(pairs):
        for way in [*ways] if number % 2 else [*reversed(ways)]:
            run = start_run(api, deployments[way])
            wait_until_ended(api, run)
            times = {state["name"]: datetime.fromisoformat(state["timestamp"]) for state in list_states(api, run)}
            seconds[way].append((times["Running"] - times["Pending"]).total_seconds())
            peak = wait_until(lambda run=run: get_run(api, run)["labels"].get(PEAK_LABEL), "the run's peak memory")  # type: ignore[misc]
            memory[way].append(peak / 2**20)
    return [
        *(Figure(f"from claim to Running, {way}", "s", values) for way, values in seconds.items()),
        *(Figure(f"peak memory of an empty flow, {way}", "MiB", values) for way, values in memory.items()),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure retries and starts, and return the exit status: 1 without a cluster."""
    parser = argparse.ArgumentParser(description="Measure how soon a killed run is retried.")
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args(arguments)
    parts = f"Kubernetes, both charts on one node, load {os.getloadavg()[0]:.1f} before"
    try:
        with results_table(parts) as report, installed_charts() as (server, pool), server.api() as api:
            report(measure_recovery(api, pool, options.kills))
            report(measure_starts(api, pool, options.kills))
    except ClusterError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
