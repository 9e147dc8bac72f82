"""Measure how long it takes from a SIGKILL of a run's processes to the first line of its next execution, and what a run
takes to begin beside one that is executed by Prefect's own command, in alternating pairs.

    python -m tests.benchmarks.recovery --kills 10     # or: make bench-recovery

One run at a time on the local cluster, with the reconciler looking every second and the worker asking every two. When
processes died and when user code began is from the run's journal, written four times a second; the rest is from its
states. The table is printed and appended to results.md.
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
from tests.benchmarks.run import Figure, results_table
from tests.e2e.faults.victims import kill_pod, list_pods, list_states, wait_for_state
from tests.e2e.release import Pool
from tests.e2e.runs import create_deployment, get_run, start_run, wait_for_log, wait_until_ended
from tests.long.soak import Line, installed_charts, read_journals
from tests.parts import wait_until

PARTS = (
    "until it is Crashed: the kubelet says that the pod has ended, and the reconciler hears it",
    "until it is to be tried again",
    "until a worker has claimed it",
    "until it is Running: Job, pod, imports, the flow is loaded",
    "until its first line",
)
"""What happens between a kill and the next execution's first line."""


def find_milestones(api: httpx.Client, run: str, journal: Sequence[Line]) -> list[float]:
    """The ends of `PARTS`, and before them the moment of death, in seconds since 1970."""
    first, second = dict.fromkeys(each.pod for each in journal)
    listed = [(each["name"], datetime.fromisoformat(each["timestamp"]).timestamp()) for each in list_states(api, run)]
    names = [name for name, _ in listed]
    crashed = names.index("Crashed")
    later = dict(reversed(listed[crashed:]))  # the first of a name wins
    return [
        max(each.at for each in journal if each.pod == first),
        *(later[name] for name in ("Crashed", "AwaitingRetry", "Pending", "Running")),
        min(each.at for each in journal if each.pod == second),
    ]


def measure_recovery(api: httpx.Client, pool: Pool, kills: int) -> list[Figure]:
    """The rows of the table."""
    made = create_deployment(api, pool, entrypoint="/probe/flow.py:piecewise")
    totals: list[float] = []
    parts: list[list[float]] = [[] for _ in PARTS]
    for number in range(kills):
        run = start_run(api, made, parameters={"pieces": 1, "seconds": 30 + number / 10})
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
    whole = "from SIGKILL of a run's processes to the next execution's first line"
    return [
        Figure(whole, "s", totals, "at most 6 at the median"),
        *(Figure(f"of that: {part}", "s", seconds) for part, seconds in zip(PARTS, parts, strict=True)),
    ]


PREFECT_COMMAND = "python -m prefect flow-run execute"
"""Prefect's own command, in words that `orchestration.runs.supervisor` does not take for what it does better."""


def measure_starts(api: httpx.Client, pool: Pool, pairs: int) -> list[Figure]:
    """What runs that do nothing take from their claim until they are Running, and of memory, each way."""
    ways = {"in one process": {}, "by `prefect flow-run execute`": {"command": PREFECT_COMMAND}}
    made = {
        way: create_deployment(api, pool, entrypoint="/probe/flow.py:victim", job_variables=each)
        for way, each in ways.items()
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    memory: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(pairs):
        for way in [*ways] if number % 2 else [*reversed(ways)]:
            run = start_run(api, made[way])
            wait_until_ended(api, run)
            times = {each["name"]: datetime.fromisoformat(each["timestamp"]) for each in list_states(api, run)}
            seconds[way].append((times["Running"] - times["Pending"]).total_seconds())
            peak = wait_until(lambda run=run: get_run(api, run)["labels"].get(PEAK_LABEL), "its memory")  # type: ignore[misc]
            memory[way].append(peak / 2**20)
    return [
        *(Figure(f"from claim to Running, {way}", "s", each) for way, each in seconds.items()),
        *(Figure(f"memory of an empty flow at the most, {way}", "MiB", each) for way, each in memory.items()),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and append it to the results."""
    parser = argparse.ArgumentParser(description="Measure how soon a killed run goes on.")
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
