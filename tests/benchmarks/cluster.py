"""Measure the time from a run's creation to the first line of user code, phase by phase, next to floors.

    python -m tests.benchmarks.cluster --pairs 15     # or: make bench-cluster

On one cluster and one Prefect server, in alternation and one at a time:

- a run of this project's pool;
- a run of Prefect's own worker: `prefect worker start` with the default base job template of prefect-kubernetes;
- three floors without any Prefect server: a Job that prints, one that imports Prefect and prints, and one that also has
  a volume;
- with `--before CHECKOUT`: a run of the pool that the charts and the image of another checkout make.

All use the same image, except `--before`. A random pause before each start keeps starts from falling into step with a
worker's polls. The table is printed and appended to results.md, and the medians of the phases are drawn in
docs/images/first-line.svg.
"""

import argparse
import contextlib
import json
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from uuid import uuid4

import httpx
import matplotlib as mpl
from matplotlib.figure import Figure as Picture

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import __main__ as local_cluster
from orchestration.protocol import RUN_LABEL
from orchestration.settings import ROOT
from tests.benchmarks import first_line_flow
from tests.benchmarks.table import Figure, results_table
from tests.cluster.namespace import RESTRICTED, Namespace, new, proxied
from tests.e2e.faults.victims import fault_values, list_states
from tests.e2e.release import (
    Object,
    Pool,
    Release,
    build_image,
    connection_values,
    install_pool,
    merge_values,
    pool_values,
    probe_config_map,
    server_values,
)
from tests.e2e.runs import create_deployment, read_log, start_run, wait_for_log, wait_until_ended
from tests.parts import wait_until

FLOW_FILE = Path(first_line_flow.__file__)

PICTURE = ROOT / "docs/images/first-line.svg"

CLAIM, JOB, POD, RUNNING, LINE = PHASES = (
    "waiting for the claim",
    "claim to Job created",
    "Job to container started",
    "container to Running",
    "Running to first line",
)
"""The phases of a start, in order. A floor has `POD`, and `RUNNING` until its first line."""

COLOURS = ("#e76f51", "#f4a261", "#e9c46a", "#2a9d8f", "#264653")

OURS, BEFORE, PREFECTS = "this project", "before", "Prefect's worker"

IMPORTS = "from prefect import flow, get_run_logger"

FLOORS = {
    "a Job that prints": ("", ()),
    "a Job that imports Prefect": (IMPORTS, ()),
    "the same with a volume": (IMPORTS, ({"name": "tmp", "emptyDir": {}},)),
}
"""The imports before the first line, and the volumes, by floor."""

LONGEST_PAUSE_SECONDS = 2.0
"""The upper bound of the random pause before a start."""

Start = Callable[[], dict[str, float]]
"""Makes one start, waits for its end, and returns the seconds of its phases."""


@contextlib.contextmanager
def watched_jobs(url: str) -> Iterator[dict[str, float]]:
    """Yield when each run's first Job was created, by the id of the run, which is updated while the block lasts.

    Args:
        url: a proxy to the API of Kubernetes, whose own timestamps are whole seconds.
    """
    created: dict[str, float] = {}
    is_over = threading.Event()

    def watch(client: httpx.Client) -> None:
        query = {"watch": "1", "labelSelector": RUN_LABEL}
        while not is_over.is_set():
            # Kubernetes ends a watch now and then, and the proxy ends after the block.
            with (
                contextlib.suppress(httpx.HTTPError),
                client.stream("GET", "/apis/batch/v1/jobs", params=query) as answer,
            ):
                for line in answer.iter_lines():
                    now, event = time.time(), json.loads(line)
                    if event["type"] == "ADDED":
                        created.setdefault(event["object"]["metadata"]["labels"][RUN_LABEL], now)
            is_over.wait(0.2)

    with httpx.Client(base_url=url, timeout=None) as client:  # noqa: S113 - a watch lasts
        threading.Thread(target=watch, args=[client], daemon=True).start()
        try:
            yield created
        finally:
            is_over.set()


def wait_until_completed(api: httpx.Client, run: str) -> Object:
    """Wait until a run has ended, and return it.

    Raises:
        ClusterError: the run is not Completed.
    """
    ended = wait_until_ended(api, run)
    if ended["state_type"] != "COMPLETED":
        raise ClusterError(f"Run {run} is {ended['state_name']}: {ended['state']['message']} {read_log(api, run)}")
    return ended


def read_first_line(api: httpx.Client, run: str) -> tuple[float, float]:
    """Return when a run's first line ran, and when its container started, in seconds since 1970."""
    [line] = [line for line in wait_for_log(api, run, "first line at") if line.startswith("first line at")]
    first, container = (float(number) for number in re.findall(r"[\d.]+", line))
    return first, container


def measure_run(api: httpx.Client, deployment: str, jobs: dict[str, float]) -> dict[str, float]:
    """Start a run, wait until it has ended, and return the seconds of its phases."""
    run = start_run(api, deployment)
    ended = wait_until_completed(api, run)
    first, container = read_first_line(api, run)
    times: dict[str, float] = {}
    for state in list_states(api, run):
        times.setdefault(state["name"], datetime.fromisoformat(state["timestamp"]).timestamp())
    created = datetime.fromisoformat(ended["created"]).timestamp()
    moments = (created, times["Pending"], jobs[run], container, times["Running"], first)
    return dict(zip(PHASES, (later - earlier for earlier, later in pairwise(moments)), strict=True))


def measure_job(
    kubernetes: httpx.Client, namespace: Namespace, image: str, imports: str, volumes: Sequence[Object]
) -> dict[str, float]:
    """Create a Job that prints the time of its first line; return the seconds of its phases."""
    name = f"floor-{uuid4().hex[:8]}"
    code = f"{imports}\nimport time\nnow = time.time()\n{_container_start_source()}\nprint(now, read_container_start())"
    container = {
        "name": "floor",
        "image": image,
        "command": ["python", "-c", code],
        "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}},
        "volumeMounts": [{"name": volume["name"], "mountPath": f"/{volume['name']}"} for volume in volumes],
    }
    pod = {
        "containers": [container],
        "volumes": [*volumes],
        "restartPolicy": "Never",
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
    }
    spec = {"backoffLimit": 0, "ttlSecondsAfterFinished": 30, "template": {"spec": pod}}
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}
    created = time.time()
    kubernetes.post(f"/apis/batch/v1/namespaces/{namespace.name}/jobs", json=manifest).raise_for_status()
    pods = f"/api/v1/namespaces/{namespace.name}/pods"

    def find_ended() -> str:
        found = kubernetes.get(pods, params={"labelSelector": f"job-name={name}"}).raise_for_status().json()["items"]
        return next(
            (listed_pod["metadata"]["name"] for listed_pod in found if listed_pod["status"]["phase"] == "Succeeded"), ""
        )

    ended = wait_until(find_ended, f"the end of the Job {name}", 60)
    first, started = map(float, kubernetes.get(f"{pods}/{ended}/log").raise_for_status().text.split())
    return {POD: started - created, RUNNING: first - started}


def _container_start_source() -> str:
    """Return the source of `read_container_start` with its imports, for a process that has not the function."""
    source = FLOW_FILE.read_text()
    function = source[source.index("def read_container_start") : source.index("@flow")]
    return f"import os\nfrom pathlib import Path\n{function}"


def install_prefects_worker(server: Release, namespace: Namespace, image: str) -> Pool:
    """Start `prefect worker start` in a namespace without services, whose variables Prefect would take for settings."""
    from prefect_kubernetes.worker import KubernetesWorker

    pool = "upstream"
    template = KubernetesWorker.get_default_base_job_template()
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    # The one change of the default template: the flow's file.
    pod["volumes"] = [{"name": "probe", "configMap": {"name": "probe"}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "probe", "mountPath": "/probe"}]
    with server.api() as api:
        body = {"name": pool, "type": "kubernetes", "base_job_template": template}
        api.post("/work_pools/", json=body).raise_for_status()
    named = {"name": "upstream-worker"}
    rules = [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["get", "list", "watch", "create", "patch", "delete"]},
        {"apiGroups": [""], "resources": ["pods", "pods/log", "pods/status", "events"],
         "verbs": ["get", "list", "watch"]},
    ]  # fmt: skip
    password = {"name": "prefect-server-auth", "key": "auth-string"}
    container = {
        "name": "worker",
        "image": image,
        "args": ["prefect", "worker", "start", "--type", "kubernetes", "--pool", pool],
        "env": [
            {"name": "PREFECT_HOME", "value": "/tmp/prefect"},  # noqa: S108 - in the pod
            {"name": "PREFECT_API_URL", "value": connection_values(server, pool)["api"]["url"]},
            {"name": "PREFECT_API_AUTH_STRING", "valueFrom": {"secretKeyRef": password}},
            {"name": "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES", "value": namespace.name},
            {"name": "PREFECT_KUBERNETES_CLUSTER_UID", "value": "local"},
        ],
        "securityContext": RESTRICTED,
        "resources": {"requests": {"cpu": "10m", "memory": "200Mi"}, "limits": {"memory": "768Mi"}},
    }
    labels = {"app": "upstream-worker"}
    spec = {
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels},
            "spec": {"serviceAccountName": named["name"], "enableServiceLinks": False, "containers": [container]},
        },
    }
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", **named}
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": named}
    subjects = [{"kind": "ServiceAccount", **named}]
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": password["name"]}}
    namespace.apply(
        probe_config_map(FLOW_FILE),
        secret | {"stringData": {password["key"]: server.secret(password["name"], password["key"])}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": named},
        rbac | {"kind": "Role", "rules": rules},
        rbac | {"kind": "RoleBinding", "roleRef": role, "subjects": subjects},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": named, "spec": spec},
    )
    namespace.kubectl("rollout", "status", "deployment/upstream-worker", "--timeout=180s")
    return Pool("none", "none", namespace, work_pool=pool)


def values_of_pool(image: str) -> Object:
    """Return the values of a pool at the chart's defaults, except small requests and neither sync nor drift."""
    return fault_values(pool_values(image))


@contextlib.contextmanager
def installed(before: Path | None) -> Iterator[tuple[Release, dict[str, Pool], str]]:
    """Install everything in new namespaces while the block lasts; yield the server, the pools by way, and the image."""
    probe = probe_config_map(FLOW_FILE)
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(local_cluster.shared())
        namespace = stack.enter_context(new(context, "bench"))
        image = build_image()
        server = Release("prefect-server", "prefect-server", namespace)
        server.deploy(server_values(image))
        pools = {OURS: install_pool(server, namespace, values_of_pool(image), probe)}
        if before:
            other = stack.enter_context(new(context, "bench-before"))
            values = merge_values(values_of_pool(build_image(before)), connection_values(server, "before"))
            pools[BEFORE] = install_pool(server, other, values, probe, before)
        pools[PREFECTS] = install_prefects_worker(server, stack.enter_context(new(context, "bench-prefect")), image)
        yield server, pools, image


def measure(pairs: int, minutes: float, before: Path | None) -> dict[str, list[dict[str, float]]]:
    """Return the phases of each start, by way.

    Args:
        pairs: how many starts of each way.
        minutes: begin no further round of starts after this time.
        before: another checkout, or None.
    """
    with installed(before) as (server, pools, image), server.api() as api, contextlib.ExitStack() as stack:
        url = stack.enter_context(proxied(server.namespace.context))
        kubernetes = stack.enter_context(httpx.Client(base_url=url, timeout=30))
        jobs = stack.enter_context(watched_jobs(url))
        entrypoint = "/probe/flow.py:first_line"
        theirs = {"image": image, "namespace": pools[PREFECTS].namespace.name, "finished_job_ttl": 60}
        deployments = {
            way: create_deployment(api, pool, entrypoint=entrypoint, job_variables=theirs if way == PREFECTS else {})
            for way, pool in pools.items()
        }
        starts: dict[str, Start] = {
            way: lambda deployment=deployment: measure_run(api, deployment, jobs)  # type: ignore[misc]
            for way, deployment in deployments.items()
        }
        for floor, needs in FLOORS.items():
            starts[floor] = lambda needs=needs: measure_job(kubernetes, server.namespace, image, *needs)  # type: ignore[misc]
        for start in starts.values():
            start()  # the first of each loads what later ones find in caches
        found: dict[str, list[dict[str, float]]] = {way: [] for way in starts}
        end = time.monotonic() + 60 * minutes
        for number in range(pairs):
            if number and time.monotonic() > end:
                break
            for way in [*starts] if number % 2 else [*reversed(starts)]:
                time.sleep(random.uniform(0, LONGEST_PAUSE_SECONDS))  # noqa: S311 - no secret
                found[way].append(starts[way]())
            totals = ", ".join(f"{way} {sum(phases[-1].values()):.2f} s" for way, phases in found.items())
            print(f"{number + 1} of {pairs}: {totals}", file=sys.stderr, flush=True)
        return found


def figures(found: dict[str, list[dict[str, float]]]) -> list[Figure]:
    """Return the rows of the table: for each way the whole time, and of a run each phase."""
    rows = []
    for way, starts in found.items():
        rows.append(Figure(f"{way}: created to first line", "s", [sum(phases.values()) for phases in starts]))
        rows += [Figure(f"{way}: {phase}", "s", [phases[phase] for phases in starts]) for phase in starts[0]]
    return rows


def draw(found: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Draw the medians of the phases of each way as a stacked bar."""
    ways = sorted(found, key=lambda way: median(sum(phases.values()) for phases in found[way]), reverse=True)
    picture = Picture(figsize=(9, 0.6 * len(ways) + 1.2), layout="constrained")
    axes = picture.subplots()
    ends = dict.fromkeys(ways, 0.0)
    for phase, colour in zip(PHASES, COLOURS, strict=True):
        medians = [median(phases.get(phase, 0.0) for phases in found[way]) for way in ways]
        axes.barh(ways, medians, left=[ends[way] for way in ways], color=colour, label=phase)
        ends = {way: ends[way] + seconds for way, seconds in zip(ways, medians, strict=True)}
    for number, way in enumerate(ways):
        axes.text(ends[way] + 0.05, number, f"{ends[way]:.2f} s", va="center")
    axes.set(xlabel=f"seconds, medians of n = {len(found[ways[0]])}", xlim=(0, 1.1 * max(ends.values())))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    # Text as text, and no random ids: the picture changes only with its figures.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "first-line"}):
        picture.savefig(file, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, append and draw; return the exit status: 1 without a cluster."""
    parser = argparse.ArgumentParser(description="Measure the time from a run's creation to its first line.")
    parser.add_argument("--pairs", type=int, default=15, help="starts of each way")
    parser.add_argument("--minutes", type=float, default=60, help="begin no further round of starts after this time")
    parser.add_argument("--before", type=Path, help="another checkout, whose pool is measured as well")
    options = parser.parse_args(arguments)
    parts = f"Kubernetes, both charts on one node, load {os.getloadavg()[0]:.1f} before"
    try:
        with results_table(parts) as report:
            found = measure(options.pairs, options.minutes, options.before and options.before.resolve())
            report(figures(found))
    except ClusterError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    draw(found, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
