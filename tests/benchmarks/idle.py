"""Measure what an idle installation takes: the processor time and memory of each component of both charts.

    python -m tests.benchmarks.idle --pairs 5     # or: make bench-idle

The charts are installed with their default values, except for the images. A few runs are executed, as there are in any
installation. Then nothing happens, and the kubelet's statistics are read at the begin and the end of each period. With
`--before CHECKOUT` the charts and the image of another checkout are installed, too, and measured in the same periods.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import __main__ as local_cluster
from orchestration.settings import ROOT
from tests.benchmarks import first_line_flow
from tests.benchmarks.table import Figure, describe_commit, results_table
from tests.cluster.namespace import Namespace, new
from tests.e2e.release import Object, Release, build_image, install_pool, pool_values, probe_config_map, server_values
from tests.e2e.runs import create_deployment, start_run, wait_until_ended
from tests.parts import wait_until

SETTLE_SECONDS, PERIOD_SECONDS = 120, 60
"""How long the installation rests before the first period, and the length of a period."""

COMPONENTS = ("api", "services", "worker", "reconciler", "drift")
DATABASES = ("database", "redis")

GOAL = "goal: at most 4 % and 600 MiB"

Usage = dict[str, tuple[float, float, float]]
"""By component: the time of the reading in s, the processor time since the start in s, and the memory in MiB."""


def install(namespace: Namespace, checkout: Path, runs: int) -> None:
    """Install both charts of a checkout with their defaults, and execute some runs."""
    image = build_image(checkout)
    server = Release("prefect-server", "prefect-server", namespace, checkout=checkout)
    server.deploy({key: _images_of(value) for key, value in server_values(image).items() if _images_of(value)})
    values = pool_values(image)
    probe = {"volumes": values["runs"]["pod"]["volumes"], "volumeMounts": values["runs"]["pod"]["volumeMounts"]}
    chosen = {"image": values["image"], "runs": {"pod": probe}, "drift": {"enabled": True}}
    pool = install_pool(server, namespace, chosen, probe_config_map(Path(first_line_flow.__file__)), checkout)
    with server.api() as api:
        deployment = create_deployment(api, pool, entrypoint="/probe/flow.py:first_line")
        for _ in range(runs):
            wait_until_ended(api, start_run(api, deployment))


def _images_of(values: Object) -> Object:
    """Return the images among the values, without requests and limits."""
    if "repository" in values:
        return values
    parts = {key: _images_of(value) for key, value in values.items() if isinstance(value, dict)}
    return {key: value for key, value in parts.items() if value}


def read_usage(namespace: Namespace) -> Usage:
    """Read from the kubelet what each component of a namespace has taken, the sum of its replicas."""
    component_of = {
        pod["metadata"]["name"]: (pod["metadata"]["labels"].get("app.kubernetes.io/component", ""), pod["spec"])
        for pod in json.loads(namespace.kubectl("get", "pods", "-o", "json"))["items"]
        if pod["status"]["phase"] == "Running"
    }
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for node in {spec["nodeName"] for _, spec in component_of.values()}:
        answer = json.loads(namespace.kubectl("get", "--raw", f"/api/v1/nodes/{node}/proxy/stats/summary"))
        for pod in answer["pods"]:
            name = pod["podRef"]["name"]
            if pod["podRef"]["namespace"] != namespace.name or name not in component_of:
                continue
            processor = pod["cpu"]
            found[component_of[name][0]].append(
                (
                    datetime.fromisoformat(processor["time"]).timestamp(),
                    processor["usageCoreNanoSeconds"] / 1e9,
                    pod["memory"]["workingSetBytes"] / 2**20,
                )
            )
    return {
        component: (
            sum(time for time, _, _ in readings) / len(readings),
            sum(seconds for _, seconds, _ in readings),
            sum(size for _, _, size in readings),
        )
        for component, readings in found.items()
    }


def measure(pairs: int, runs: int, before: Path | None) -> dict[str, list[dict[str, tuple[float, float]]]]:
    """Return for each way and period what each component takes: percent of a core, and MiB.

    Args:
        pairs: the number of periods.
        runs: how many runs are executed before.
        before: another checkout, or None.
    """
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(local_cluster.shared())
        ways = {"this project": ROOT} | ({"before": before} if before else {})
        namespaces = {}
        for way, checkout in ways.items():
            namespaces[way] = stack.enter_context(new(context, "idle"))
            install(namespaces[way], checkout, runs)
        time.sleep(SETTLE_SECONDS)
        found: dict[str, list[dict[str, tuple[float, float]]]] = {way: [] for way in ways}
        for number in range(pairs):
            begin = {way: read_usage(namespace) for way, namespace in namespaces.items()}
            time.sleep(PERIOD_SECONDS)
            for way, namespace in namespaces.items():
                end = read_later_usage(namespace, begin[way], time.time() - PERIOD_SECONDS / 2)
                found[way].append(
                    {
                        component: (100 * (seconds - begin[way][component][1]) / (now - begin[way][component][0]), size)
                        for component, (now, seconds, size) in end.items()
                        if component in begin[way]
                    }
                )
            totals = ", ".join(f"{way} {total(periods[-1])[0]:.2f} %" for way, periods in found.items())
            print(f"{number + 1} of {pairs}: {totals}", file=sys.stderr, flush=True)
        return found


def read_later_usage(namespace: Namespace, begin: Usage, since: float) -> Usage:
    """Read the usage once the kubelet, which reads a pod every 10 s or so, has a reading of each component since then.

    Args:
        namespace: the namespace of the pods.
        begin: an earlier reading with the components.
        since: seconds since 1970.
    """

    def later() -> Usage | None:
        usage = read_usage(namespace)
        return usage if all(usage[component][0] > since for component in begin) else None

    found: Usage = wait_until(later, "newer readings of the kubelet", 60)
    return found


def total(period: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Return the sum over all components except the databases."""
    return (
        sum(period[component][0] for component in COMPONENTS if component in period),
        sum(period[component][1] for component in COMPONENTS if component in period),
    )


def figures(found: dict[str, list[dict[str, tuple[float, float]]]]) -> list[Figure]:
    """Return the rows of the table: of each way the sum, then each component."""
    rows = []
    for way, periods in found.items():
        totals = [total(period) for period in periods]
        rows.append(Figure(f"{way}: all but the databases", "% of a core", [value for value, _ in totals], GOAL))
        rows.append(Figure(f"{way}: all but the databases", "MiB", [size for _, size in totals], GOAL))
        for component in (*COMPONENTS, *DATABASES):
            readings = [period[component] for period in periods if component in period]
            if readings:
                rows.append(Figure(f"{way}: {component}", "% of a core", [value for value, _ in readings]))
                rows.append(Figure(f"{way}: {component}", "MiB", [size for _, size in readings]))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; return the exit status: 1 without a cluster."""
    parser = argparse.ArgumentParser(description="Measure what an idle installation takes.")
    parser.add_argument("--pairs", type=int, default=5, help="periods of a minute")
    parser.add_argument("--runs", type=int, default=10, help="runs that are executed before")
    parser.add_argument("--before", type=Path, help="another checkout, which is measured as well")
    options = parser.parse_args(arguments)
    parts = f"Kubernetes, both charts on one node, load {os.getloadavg()[0]:.1f} at the begin"
    if options.before:
        parts += f", before is {describe_commit(options.before)}"
    try:
        with results_table(parts) as report:
            report(figures(measure(options.pairs, options.runs, options.before and options.before.resolve())))
    except ClusterError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
