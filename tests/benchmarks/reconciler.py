"""Measure a round of the reconciler over many live runs, and its requests next to many finished runs.

    python -m tests.benchmarks.reconciler --rounds 10     # or: make bench-reconciler; POSTGRES=URL of one with pg_trgm

The runs are Running on a real Prefect server. Their Jobs and pods are on the local cluster, where kwok keeps the pods
Running on a simulated node. Runs and pods agree, so a round only reads. `orchestrate reconcile` runs in a separate
process, and its metrics give the times of its rounds. The table is printed and appended to results.md.
"""

import argparse
import asyncio
import contextlib
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import yaml
from prometheus_client.parser import text_string_to_metric_families

from orchestration.errors import ClusterError
from orchestration.health import Pulse
from orchestration.operations.local_cluster import __main__ as local_cluster
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.agent import SIMULATED
from orchestration.prefect_api import Server
from orchestration.protocol import CLUSTER_LABEL, POOL_LABEL, RUN_LABEL
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.loop import Reconciler
from orchestration.reconciler.model import Policy
from orchestration.settings import ROOT
from tests.benchmarks.deployments import POOL, new_server, postgres_version
from tests.benchmarks.table import Figure, results_table
from tests.cluster.namespace import proxied, restricted
from tests.e2e.faults.victims import fault_values
from tests.e2e.release import Object, pool_values
from tests.helm.rendering import render
from tests.parts import end_process, free_port, wait_until

LIVE_RUNS = (100, 300, 1000, 3000, 5000)

FINISHED_RUNS = (0, 1000, 10000)
"""Numbers of finished runs next to the first number of live runs. The last number stays for the other numbers."""

RETRY_SECONDS = 600
"""Seconds for which requests are repeated that the Prefect server answers by 503."""

CONCURRENT_REQUESTS = 16
"""Concurrent requests that create runs, Jobs and pods."""

STAGES = Path(__file__).with_name("stages.yaml")

POD_ADDRESSES = "10.246.0.0/16"
"""Addresses of the simulated pods. Nothing else uses them."""


@contextlib.contextmanager
def simulated_node(context: str) -> Iterator[str]:
    """Simulate a node on which pods are Running at once while the block lasts, and yield its name."""
    name = f"simulated-{uuid4().hex[:8]}"
    amounts = {"cpu": "1000", "memory": "1000Gi", "pods": "10000"}
    node = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {"taints": [{"key": SIMULATED, "effect": "NoSchedule"}]},
        "status": {"allocatable": amounts, "capacity": amounts},
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "kubeconfig"
        flat = ["config", "view", "--raw", "--minify", "--flatten"]
        config.write_text(binaries.kubectl("--context", context, *flat))
        config.chmod(0o600)
        binaries.kubectl("--context", context, "create", "-f", "-", text=json.dumps(node))
        with (Path(folder) / "log").open("w") as log:
            command = [str(binaries.program("kwok")), "--kubeconfig", str(config), "--manage-single-node", name]
            kwok = subprocess.Popen(
                [*command, "--cidr", POD_ADDRESSES, "--config", str(STAGES)],
                stdout=log,
                stderr=subprocess.STDOUT,
                # An API server whose etcd is old refuses to stream lists, and each refusal makes it wait longer.
                env=os.environ | {"KUBE_FEATURE_WatchListClient": "false"},
            )
        try:
            binaries.kubectl("--context", context, "wait", f"node/{name}", "--for=condition=Ready", "--timeout=30s")
            yield name
        finally:
            end_process(kwok, 60)  # with thousands of pods the end takes a while
            binaries.kubectl("--context", context, "delete", "node", name, "--wait=false")


async def job_manifest(pool_id: str) -> Object:
    """Return the Job of a run from the chart's pool by Prefect's templating, with labels as a worker adds."""
    from prefect.client.orchestration import PrefectClient
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    rendered = render("prefect-work-pool", fault_values(pool_values("localhost:5000/prefect-orchestration:bench")))
    [sync] = [
        found for found in rendered if found["kind"] == "ConfigMap" and found["metadata"]["name"].endswith("-sync")
    ]
    [pool] = yaml.safe_load(sync["data"]["pool.yaml"])["work_pools"]
    nowhere = PrefectClient("http://127.0.0.1:9/api")  # the template needs nothing from the server
    made = await KubernetesWorkerJobConfiguration.from_template_and_values(
        pool["base_job_template"], {}, client=nowhere
    )
    made._populate_env_in_manifest()
    job: Object = made.job_manifest
    names = ("deployment-id", "deployment-name", "deployment-updated", "flow-id", "flow-name", "flow-run-name")
    labels = {f"prefect.io/{name}": "x" * 36 for name in (*names, "version", "work-pool-name", "worker-name")}
    for meta in (job["metadata"], job["spec"]["template"].setdefault("metadata", {})):
        meta["labels"] = meta.get("labels", {}) | labels | {POOL_LABEL: pool_id}
    return job


class LoadGenerator:
    """Creates runs, and the Jobs and pods of live runs.

    Args:
        runner: runs the requests.
        api: URL of the Prefect API.
        kubernetes: URL of the Kubernetes API.
        namespace: the namespace of the Jobs and pods.
        node: the node of the pods.
    """

    def __init__(self, runner: asyncio.Runner, api: str, kubernetes: str, namespace: str, node: str) -> None:
        self.runner, self.namespace, self.node = runner, namespace, node
        self.prefect = httpx.AsyncClient(base_url=api, timeout=120)
        self.kubernetes = httpx.AsyncClient(base_url=kubernetes, timeout=120)
        self.turns = asyncio.Semaphore(CONCURRENT_REQUESTS)
        pool = runner.run(self.ask(self.prefect, "GET", f"/work_pools/{POOL}"))
        flow = runner.run(self.ask(self.prefect, "POST", "/flows/", {"name": POOL}))
        body = {"name": POOL, "flow_id": flow["id"], "work_pool_name": POOL}
        self.deployment = runner.run(self.ask(self.prefect, "POST", "/deployments/", body))["id"]
        self.job = runner.run(job_manifest(pool["id"]))
        self.cluster = runner.run(self.ask(self.kubernetes, "GET", "/api/v1/namespaces/kube-system"))["metadata"]["uid"]

    def close(self) -> None:
        """Close the connections."""
        self.runner.run(self.prefect.aclose())
        self.runner.run(self.kubernetes.aclose())

    def create(self, create_one: Callable[[], Coroutine[Any, Any, None]], number: int) -> None:
        """Create `number` runs, and wait until all pods are Running.

        Args:
            create_one: `create_finished_run` or `create_live_run`.
            number: number of runs.
        """

        async def create_all() -> None:
            await asyncio.gather(*(create_one() for _ in range(number)))

        began = time.monotonic()
        self.runner.run(create_all())
        wait_until(lambda: not self.runner.run(self.has_pending_pods()), "all pods to be Running", 600)
        print(f"{number:,} runs created in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    async def ask(self, client: httpx.AsyncClient, method: str, path: str, body: Any = None) -> Any:
        """Send a request, and return the JSON of the answer.

        Raises:
            RuntimeError: the request failed, or was answered by 503 for `RETRY_SECONDS`.
        """
        deadline = time.monotonic() + RETRY_SECONDS
        async with self.turns:
            # A server on SQLite answers 503 to a request that meets another transaction, and changes nothing.
            while (answer := await client.request(method, path, json=body)).status_code == 503:
                if time.monotonic() > deadline:
                    break
                await asyncio.sleep(0.1)
        if answer.is_error:
            raise RuntimeError(f"{method} {path} ended with {answer.status_code}: {answer.text[:500]}")
        return answer.json() if answer.content else None

    async def create_finished_run(self) -> None:
        """Create a run that is Completed."""
        body = {"state": {"type": "COMPLETED"}}
        await self.ask(self.prefect, "POST", f"/deployments/{self.deployment}/create_flow_run", body)

    async def create_live_run(self) -> None:
        """Create a run that is Running, and its Job and pod."""
        name = f"bench-{uuid4().hex[:12]}"
        body = {"name": name, "state": {"type": "RUNNING"}, "labels": {CLUSTER_LABEL: self.cluster}}
        run = await self.ask(self.prefect, "POST", f"/deployments/{self.deployment}/create_flow_run", body)
        recorded = {"infrastructure_pid": f"{self.namespace}:{name}"}
        await self.ask(self.prefect, "PATCH", f"/flow_runs/{run['id']}", recorded)
        job: Object = copy.deepcopy(self.job) | {"apiVersion": "batch/v1", "kind": "Job"}
        pod: Object = copy.deepcopy(self.job["spec"]["template"]) | {"apiVersion": "v1", "kind": "Pod"}
        labels = {RUN_LABEL: run["id"]}
        job["metadata"] = {"name": name, "labels": job["metadata"]["labels"] | labels}
        # No controller has this name, so none creates a pod for the Job.
        job["spec"]["managedBy"] = "tests/bench"
        labels |= {"job-name": name, SIMULATED: ""}
        pod["metadata"] = {"name": f"{name}-0", "labels": pod["metadata"]["labels"] | labels}
        pod["spec"]["nodeName"] = self.node
        pod["spec"].pop("serviceAccountName", None)
        pod["spec"].pop("priorityClassName", None)
        await self.ask(self.kubernetes, "POST", f"/apis/batch/v1/namespaces/{self.namespace}/jobs", job)
        await self.ask(self.kubernetes, "POST", f"/api/v1/namespaces/{self.namespace}/pods", pod)

    async def has_pending_pods(self) -> bool:
        """Return whether a pod is not Running."""
        path = f"/api/v1/namespaces/{self.namespace}/pods?fieldSelector=status.phase%21%3DRunning&limit=1"
        return bool((await self.ask(self.kubernetes, "GET", path))["items"])


def measure_rounds(
    api: str, kubernetes: str, namespace: str, live: int, number: int
) -> tuple[list[float], list[float], float]:
    """Measure rounds of `orchestrate reconcile`.

    The first round, which opens the connections, does not count.

    Args:
        api: URL of the Prefect API.
        kubernetes: URL of the Kubernetes API.
        namespace: the namespace of the Jobs.
        live: number of live runs that a round must see.
        number: number of rounds.

    Returns:
        Seconds and processor seconds by round, and the peak memory of the process in MB.

    Raises:
        RuntimeError: the reconciler failed, made a change, or did not see all live runs.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "orchestration", "reconcile", "--pool", POOL, "--namespace", namespace),
        *("--kubernetes", kubernetes),
        *("--lease", "bench", "--identity", "bench", "--every", "1", "--port", str(port)),
    ]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PREFECT_API_URL": api}, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            seconds: list[float] = []
            processor: list[float] = []
            before: tuple[float, float, float] | None = None
            deadline = time.monotonic() + 60 + 20 * number
            while len(seconds) < number:
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"orchestrate reconcile makes no rounds:\n{log.read()}")
                time.sleep(0.05)
                try:
                    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
                except httpx.TransportError:
                    continue
                found = {
                    sample.name: sample.value
                    for family in text_string_to_metric_families(text)
                    for sample in family.samples
                }
                count, total = (found.get(f"reconciler_round_seconds_{name}", 0.0) for name in ("count", "sum"))
                times = psutil.Process(process.pid).cpu_times()
                now = (count, total, times.user + times.system)
                if before and count > before[0]:
                    rounds = count - before[0]
                    seconds += [(total - before[1]) / rounds] * (rounds == 1)
                    processor += [now[2] - before[2]] * (rounds == 1)
                if count and (before is None or count > before[0]):
                    before = now
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
            log.seek(0)
            output, seen = log.read(), found["reconciler_live_runs"]
            if output or seen != live:
                raise RuntimeError(f"runs and pods disagree; {seen:.0f} of {live} live runs were seen:\n{output}")
            return seconds, processor, peak
        finally:
            end_process(process)


@dataclass
class RoundParts:
    """The requests of rounds, and the seconds from requests to the heads of their answers.

    A round asks both APIs at the same time.

    Args:
        requests: number of requests in the last round.
        prefect: seconds in which the Prefect API answered, by round.
        kubernetes: seconds in which the Kubernetes API answered, by round.
    """

    requests: int = 0
    prefect: list[float] = field(default_factory=list)
    kubernetes: list[float] = field(default_factory=list)


async def measure_parts(api: str, kubernetes: str, namespace: str, rounds: int) -> RoundParts:
    """Measure the parts of rounds in this process. The first round, which opens the connections, does not count."""
    found = RoundParts()
    waited: dict[str, float] = {}
    sent: dict[int, float] = {}

    async def before(request: httpx.Request) -> None:
        found.requests += 1
        sent[id(request)] = time.perf_counter()

    async def after(response: httpx.Response) -> None:
        host = response.request.url.port
        waited[str(host)] = waited.get(str(host), 0) + time.perf_counter() - sent.pop(id(response.request))

    hooks: dict[str, list[Any]] = {"request": [before], "response": [after]}
    async with (
        httpx.AsyncClient(base_url=api, timeout=30, event_hooks=hooks) as prefect,
        httpx.AsyncClient(base_url=kubernetes, timeout=30, event_hooks=hooks) as client,
    ):
        cluster = Cluster(client, namespace)
        reconciler = Reconciler(Server(prefect, api), [cluster], POOL, Policy(), None, Pulse(60))
        for number in range(rounds + 1):
            found.requests = 0
            waited.clear()
            await reconciler.round()
            if number:
                found.prefect.append(waited[str(prefect.base_url.port)])
                found.kubernetes.append(waited[str(client.base_url.port)])
    return found


def measure(postgres: str, rounds: int, live: Sequence[int], over: Sequence[int]) -> Iterator[Figure]:
    """Yield the rows of the table as they are measured.

    Args:
        postgres: URL of a Postgres server for the database; empty for SQLite.
        rounds: number of rounds for each row.
        live: numbers of live runs, growing.
        over: numbers of finished runs, growing, next to the first number of live runs.
    """
    with contextlib.ExitStack() as stack:
        context = stack.enter_context(local_cluster.shared())
        namespace = stack.enter_context(restricted(context, "bench")).name
        node = stack.enter_context(simulated_node(context))
        kubernetes = stack.enter_context(proxied(context))
        api = stack.enter_context(new_server(postgres))
        with asyncio.Runner() as runner:
            load = LoadGenerator(runner, api, kubernetes, namespace, node)
            existing = 0
            load.create(load.create_live_run, live[0])
            for number in over:
                if number > existing:
                    load.create(load.create_finished_run, number - existing)
                existing = number
                name = f"a round over {live[0]:,} live runs, {number:,} finished"
                parts = runner.run(measure_parts(api, kubernetes, namespace, 1))
                yield Figure(f"requests of {name}", "", [parts.requests])
                yield Figure(name, "s", measure_rounds(api, kubernetes, namespace, live[0], rounds)[0])
            existing = live[0]
            for number in live:
                if number > existing:
                    load.create(load.create_live_run, number - existing)
                existing = number
                seconds, processor, memory = measure_rounds(api, kubernetes, namespace, number, rounds)
                goal = {1000: "at most 1"}.get(number, "")
                yield Figure(f"a round over {number:,} live runs, {over[-1]:,} finished", "s", seconds, goal)
                yield Figure("processor time of such a round", "s", processor)
                goal = {1000: "at most 150"}.get(number, "")
                yield Figure("peak memory of the reconciler's process", "MB", [memory], goal)
                parts = runner.run(measure_parts(api, kubernetes, namespace, rounds))
                yield Figure("requests of such a round", "", [parts.requests])
                yield Figure("of its time: until the Prefect API answers", "s", parts.prefect)
                yield Figure("of its time: until the Kubernetes API answers", "s", parts.kubernetes)
            load.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure rounds, and return the exit status: 1 without a cluster."""
    parser = argparse.ArgumentParser(description="Measure rounds of the reconciler over many runs.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--live", type=int, nargs="+", default=LIVE_RUNS, help="numbers of live runs, growing")
    parser.add_argument("--over", type=int, nargs="+", default=FINISHED_RUNS, help="numbers of finished runs, growing")
    parser.add_argument("--postgres", metavar="URL", default="", help="of a Postgres with pg_trgm; by default SQLite")
    options = parser.parse_args(arguments)
    database = postgres_version(options.postgres) if options.postgres else "SQLite"
    parts = f"Prefect's server on {database}, load {os.getloadavg()[0]:.1f} before"
    try:
        with results_table(parts) as report, tempfile.TemporaryDirectory() as home:
            os.environ |= {"PREFECT_HOME": home, "DO_NOT_TRACK": "1"}
            report(measure(options.postgres, options.rounds, options.live, options.over))
    except ClusterError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
