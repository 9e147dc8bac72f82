"""Measure runs that come together: how many a minute and at what cost, how late, and how fairly they begin.

    python -m tests.benchmarks.bursts --pairs 5     # or: make bench-bursts

On the local cluster, with the charts' own waits, one after the other:

- bursts of runs of one second: runs a minute, and the processor seconds of each part of the machine for a run;
- runs that are due at a time, alone and together: how long after it their first lines run;
- a deployment with a limit of one run and many runs in its queue: what they delay a run of another deployment, how soon
  a free slot is used, and whether they begin in order;
- many runs in a queue of low priority: how many of them begin before a run in a queue of high priority.

The table is printed and appended to results.md.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import __main__ as local_cluster
from orchestration.operations.local_cluster import node_processes
from tests.benchmarks import first_line_flow
from tests.benchmarks.cluster import read_first_line, values_of_pool, wait_until_completed
from tests.benchmarks.idle import read_later_usage, read_usage
from tests.benchmarks.table import Figure, percentile, results_table
from tests.cluster.namespace import new
from tests.e2e.release import Pool, Release, build_image, install_pool, probe_config_map, server_values
from tests.e2e.runs import create_deployment, get_run, read, start_run
from tests.parts import wait_until

BURST_RUNS, TOGETHER_RUNS, MANY_RUNS = 20, 8, 50

MEASUREMENTS = ("bursts", "lateness", "fairness", "priority")

LEAD_SECONDS = 15.0
"""How long before its time a run is scheduled: longer than a worker's prefetch."""

NODE_PARTS = {
    "kubelet": "kubelet, containerd",
    "containerd": "kubelet, containerd",
    "kube-apiserver": "Kubernetes API, etcd",
    "etcd": "Kubernetes API, etcd",
}
"""The part of the machine that a process of the node belongs to; "other processes of the node" if it is not here."""

RUNS_PART = "pods of the runs"
"""The rest of the machine's seconds: the runs' containers, and the processes of containerd that start them."""


@contextlib.contextmanager
def installed() -> Iterator[tuple[httpx.Client, Pool]]:
    """Install both charts in a new namespace while the block lasts; yield a client of the API, and the pool."""
    with contextlib.ExitStack() as stack:
        namespace = stack.enter_context(new(stack.enter_context(local_cluster.shared()), "bursts"))
        image = build_image()
        server = Release("prefect-server", "prefect-server", namespace)
        server.deploy(server_values(image))
        probe = probe_config_map(Path(first_line_flow.__file__))
        pool = install_pool(server, namespace, values_of_pool(image), probe)
        api = stack.enter_context(server.api())
        wait_until_completed(api, start_run(api, deploy(api, pool)))  # the first loads what later ones find in caches
        yield api, pool


def deploy(api: httpx.Client, pool: Pool, seconds: float = 0, **fields: Any) -> str:
    """Create a deployment whose runs sleep for some seconds after their first line; return its id."""
    return create_deployment(
        api, pool, entrypoint="/probe/flow.py:first_line", parameters={"seconds": seconds}, **fields
    )


def wait_for_runs(api: httpx.Client, runs: Sequence[str]) -> float:
    """Wait until all runs have completed, and return when the last one has, in seconds since 1970."""
    ended = [wait_until_completed(api, run) for run in runs]
    return max(datetime.fromisoformat(run["state"]["timestamp"]).timestamp() for run in ended)


def read_node() -> dict[str, float]:
    """Return the processor seconds of the machine, and of each part of the node among them."""
    machine, own = psutil.cpu_times(), os.times()
    found = {"machine": machine.user + machine.nice + machine.system + machine.irq + machine.softirq}
    found["this benchmark"] = own.user + own.system + own.children_user + own.children_system
    for name in node_processes.COMPONENTS:
        pid = node_processes.process_id(name)
        if pid is not None:
            part = NODE_PARTS.get(name, "other processes of the node")
            times = psutil.Process(pid).cpu_times()
            found[part] = found.get(part, 0) + times.user + times.system
    return found


def measure_bursts(api: httpx.Client, pool: Pool, bursts: int) -> list[Figure]:
    """Start `BURST_RUNS` runs of a second at once, several times; return their rate, and the seconds of each part.

    The kubelet reads the installation's pods up to ten seconds after the burst, so they have some idle seconds more.
    """
    deployment = deploy(api, pool, 1)
    rates: list[float] = []
    spent: list[dict[str, float]] = []
    for number in range(bursts):
        usage = {name: used for name, used in read_usage(pool.namespace).items() if name != "runs"}
        node, begin = read_node(), time.time()
        runs = [start_run(api, deployment) for _ in range(BURST_RUNS)]
        rates.append(60 * BURST_RUNS / (wait_for_runs(api, runs) - begin))
        later = read_node()
        seconds = {part: later[part] - node[part] for part in node}
        later_usage = read_later_usage(pool.namespace, usage, time.time())
        seconds |= {component: later_usage[component][1] - used[1] for component, used in usage.items()}
        machine = seconds.pop("machine")
        spent.append({RUNS_PART: machine - sum(seconds.values()), **seconds, "all parts": machine})
        print(f"{number + 1} of {bursts}: {rates[-1]:.0f} runs a minute", file=sys.stderr, flush=True)
    rows = [Figure(f"burst of {BURST_RUNS} runs of 1 s", "runs/min", rates, "goal: at least 45")]
    for part in spent[0]:
        note = "goal: at most 3.0" if part == "all parts" else ""
        rows.append(Figure(f"of a run: {part}", "processor s", [burst[part] / BURST_RUNS for burst in spent], note))
    return rows


def measure_lateness(api: httpx.Client, pool: Pool, number: int, times: int, goal: str = "") -> Figure:
    """Schedule runs for one time, several times; return how long after it each first line ran, in s."""
    deployment = deploy(api, pool)
    late: list[float] = []
    for repetition in range(times):
        due = datetime.now(UTC) + timedelta(seconds=LEAD_SECONDS)
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due.isoformat()}}
        runs = [start_run(api, deployment, state=state) for _ in range(number)]
        wait_for_runs(api, runs)
        late += [read_first_line(api, run)[0] - due.timestamp() for run in runs]
        print(f"{repetition + 1} of {times}: {number} due, median {median(late):.2f} s", file=sys.stderr, flush=True)
    title = "a run that is due alone" if number == 1 else f"{number} runs that are due together"
    note = f"p95 {percentile(late, 95):.2f}" + (f"; goal: {goal}" if goal else "")
    return Figure(f"{title}: from its time to its first line", "s", late, note)


@contextlib.contextmanager
def queued(api: httpx.Client, deployment: str, number: int) -> Iterator[list[str]]:
    """Start many runs of a deployment, and delete at the end of the block those that have not begun."""
    runs = [start_run(api, deployment) for _ in range(number)]
    try:
        wait_until(lambda: get_run(api, runs[0])["start_time"], "the first run of the queue to begin")
        yield runs
    finally:
        api.patch(f"/deployments/{deployment}", json={"paused": True}).raise_for_status()
        for run in reversed(runs):
            if not get_run(api, run)["start_time"]:
                api.delete(f"/flow_runs/{run}").raise_for_status()


def begun(api: httpx.Client, deployment: str) -> list[dict[str, Any]]:
    """Return the runs of a deployment that have begun, by the time of their start."""
    body = {
        "deployments": {"id": {"any_": [deployment]}},
        "flow_runs": {"start_time": {"is_null_": False}},
        "sort": "START_TIME_ASC",
    }
    found: list[dict[str, Any]] = read(api, "POST", "/flow_runs/filter", json=body)
    return found


def measure_fairness(api: httpx.Client, pool: Pool, number: int, times: int) -> list[Figure]:
    """Measure what a limited deployment with a long queue does to another one, and how it uses its slot."""
    limited, free = deploy(api, pool, 1, concurrency_limit=1), deploy(api, pool)

    def start_times() -> list[float]:
        found = []
        for _ in range(times):
            run = start_run(api, free)
            wait_for_runs(api, [run])
            created = datetime.fromisoformat(get_run(api, run)["created"]).timestamp()
            found.append(read_first_line(api, run)[0] - created)
        return found

    alone = start_times()
    with queued(api, limited, number) as runs:
        beside = start_times()
        wait_until(lambda: len(begun(api, limited)) > times, "the queue to advance", 600)
    executed = [str(run["id"]) for run in begun(api, limited)]
    wait_for_runs(api, executed)
    lines = [read_first_line(api, run)[0] for run in executed]
    ends = [datetime.fromisoformat(get_run(api, run)["end_time"]).timestamp() for run in executed]
    gaps = [line - end for end, line in zip(ends, lines[1:], strict=False)]
    overtaking = sum(any(older not in executed[:place] for older in runs[: runs.index(run)])
                     for place, run in enumerate(executed))  # fmt: skip
    start = median(alone)
    return [
        Figure("a run of another deployment, no queue: created to first line", "s", alone),
        Figure(
            f"the same beside {number} queued runs of a deployment with a limit of 1", "s", beside,
            f"goal: less than {start + 0.5:.2f}",
        ),
        Figure(
            "from the end of a limited run to the first line of the next one", "s", gaps, f"goal: {start + 0.5:.2f}"
        ),
        Figure(f"of {len(executed)} limited runs, those that began before an older one", "runs", [float(overtaking)]),
    ]  # fmt: skip


def measure_priority(api: httpx.Client, pool: Pool, number: int, times: int) -> list[Figure]:
    """Start runs of priority 1 while many of priority 2 wait for the one slot of the pool."""
    queues = f"/work_pools/{pool.work_pool}/queues"
    read(api, "POST", queues, json={"name": "later", "priority": 2})
    api.patch(f"/work_pools/{pool.work_pool}", json={"concurrency_limit": 1}).raise_for_status()
    later, urgent = deploy(api, pool, 1, work_queue_name="later"), deploy(api, pool)
    passed: list[float] = []
    with queued(api, later, number):
        for _ in range(times):
            run = start_run(api, urgent)
            wait_for_runs(api, [run])
            created, start = (datetime.fromisoformat(get_run(api, run)[key]) for key in ("created", "start_time"))
            starts = [datetime.fromisoformat(other["start_time"]) for other in begun(api, later)]
            passed.append(sum(created < other < start for other in starts))
    api.patch(f"/work_pools/{pool.work_pool}", json={"concurrency_limit": None}).raise_for_status()
    name = f"runs of priority 2, of {number} waiting, that begin before a run of priority 1"
    return [Figure(name, "runs", passed, "a pool with one slot")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; return the exit status: 1 without a cluster."""
    parser = argparse.ArgumentParser(description="Measure runs that come together.")
    parser.add_argument("--pairs", type=int, default=5, help="how often each is measured")
    parser.add_argument("--queued", type=int, default=300, help="runs that wait for a slot")
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS, help="what to measure")
    options = parser.parse_args(arguments)
    pairs: int = options.pairs
    queue: int = options.queued
    try:
        with (
            results_table(f"Kubernetes, both charts on one node, load {os.getloadavg()[0]:.1f} before") as report,
            installed() as (api, pool),
        ):
            if "bursts" in options.only:
                report(measure_bursts(api, pool, pairs))
            if "lateness" in options.only:
                report([measure_lateness(api, pool, 1, 3 * pairs, "median 0.3, p95 1")])
                report([measure_lateness(api, pool, TOGETHER_RUNS, pairs, "median 1.5, p95 3")])
                report([measure_lateness(api, pool, MANY_RUNS, 1)])
            if "fairness" in options.only:
                report(measure_fairness(api, pool, queue, 2 * pairs))
            if "priority" in options.only:
                report(measure_priority(api, pool, queue, pairs))
    except ClusterError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
