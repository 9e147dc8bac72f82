"""Tests that a claim has one Job at most and a run one run attempt at a time, with a slow Kubernetes API, on real APIs.

The test stands in for the kubelet: it executes the supervisor of each Job that it finds.
"""

import abc
import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import httpx
import pytest
from kubernetes_asyncio.client import ApiClient, Configuration
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, PREFECT_WORKER_QUERY_SECONDS, temporary_settings

from orchestration import protocol
from orchestration.health import Pulse
from orchestration.prefect_api import Server
from orchestration.protocol import RUN_LABEL, claim_of, is_given_away
from orchestration.reconciler import kubernetes_client as kubernetes
from orchestration.reconciler.loop import Reconciler
from orchestration.reconciler.model import Policy
from orchestration.settings import ROOT
from orchestration.worker import kubernetes_worker
from tests.cluster.namespace import Namespace, proxied
from tests.parts import asked, client_of
from tests.relay import stalled

CLAIM, GIVEN_AWAY_AFTER, REQUEST = 16.0, 20.0, 1.0
"""Seconds: the worker's `CLAIM_TIMEOUT_SECONDS`, the reconciler's `Policy.claim_seconds`, and its timeout of a
request to Kubernetes."""

EXECUTES = """
import os, sys, time, urllib.request
sys.path.insert(0, os.environ["CODE"])
from orchestration.runs.run_client import RunClient
notes = open(os.environ["NOTES"], "a", buffering=1)
api = RunClient(*(os.environ[name] for name in ("PREFECT_API_URL", "PREFECT__FLOW_RUN_ID", "KUBERNETES_JOB")))
def say(state):
    while True:  # as Prefect's client does: a server on SQLite refuses what meets another transaction
        try:
            return api.set_state({"type": state}, "")
        except Exception:
            time.sleep(0.5)
notes.write(f"{time.time()} begins\\n")
say("RUNNING")
time.sleep(3)
notes.write(f"{time.time()} ends\\n")
say("COMPLETED")
"""
"""What a run's container executes, without an import of Prefect."""

TEMPLATE = {
    "variables": {"type": "object", "properties": {}},
    "job_configuration": {
        "command": "true",
        "job_manifest": {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"generateName": "a-run-with-a-name-that-is-longer-than-a-job-s-name-may-be-of-one-"},
            # Suspended: no node executes it.
            "spec": {
                "suspend": True,
                "backoffLimit": 0,
                "template": {
                    "spec": {
                        "parallelism": 1,
                        "completions": 1,
                        "restartPolicy": "Never",
                        "containers": [{"name": "prefect-job", "image": "none"}],
                    }
                },
            },
        },
    },
}


def state(id_: str, type_: str, name: str = "") -> dict[str, str]:
    return {"id": f"0199c0de-0000-7000-8000-{id_:>012}", "type": type_, "name": name or type_.title()}


def test_claim_is_over_once_given_away_or_taken_by_another_worker() -> None:
    claimed = [state("0", "SCHEDULED"), state("a1", "PENDING"), state("1", "PENDING", "Submitting")]
    job, later = "heron-0000000000a1", "heron-0000000000b2"
    again = [*claimed, state("2", "SCHEDULED"), state("b2", "PENDING")]
    for states, is_over in (
        ([], False),
        (claimed, False),
        ([*claimed, state("2", "PENDING", "Unschedulable"), state("3", "RUNNING")], False),
        ([*claimed, state("3", "RUNNING"), state("4", "SCHEDULED", "AwaitingRetry"), state("5", "RUNNING")], False),
        ([*claimed, state("2", "PENDING", protocol.CLAIM_LOST)], True),
        (again[:-1], True),
        (again, True),
        ([*again, state("6", "RUNNING")], True),
    ):
        assert is_given_away(claim_of(job), states) == is_over, states
    assert not is_given_away(claim_of(later), again)
    assert not is_given_away(claim_of("heron-x7k2p"), again), "a Job of a worker that writes no claim into the name"
    assert [claim_of(job_name) for job_name in (job, "heron-x7k2p", "0000000000a1", "")] == ["0000000000a1", "", "", ""]


class Kubelet:
    """Executes each Job of a namespace once, as its pod's container would."""

    def __init__(self, api: httpx.Client, url: str, folder: Path) -> None:
        self.api, self.url, self.folder = api, url, folder
        self.jobs: dict[str, set[str]] = defaultdict(set)
        self.processes: list[subprocess.Popen[bytes]] = []

    async def work(self, kubernetes_url: str, namespace: str) -> None:
        async with httpx.AsyncClient(base_url=kubernetes_url, timeout=30) as client:
            while True:
                listed = (await client.get(f"/apis/batch/v1/namespaces/{namespace}/jobs")).raise_for_status().json()
                for item in listed["items"]:
                    run, job = item["metadata"]["labels"][RUN_LABEL], item["metadata"]["name"]
                    if job not in self.jobs[run]:
                        self.jobs[run].add(job)
                        self.execute(run, job)
                await asyncio.sleep(0.1)

    def execute(self, run: str, job: str) -> None:
        env = {
            "PATH": os.environ["PATH"], "CODE": str(ROOT), "KUBERNETES_JOB": job,
            "PREFECT_API_URL": self.url, "PREFECT__FLOW_RUN_ID": run, "NOTES": str(self.folder / run),
            "TERMINATION_MESSAGE_PATH": str(self.folder / job),
        }  # fmt: skip
        python = [sys.executable, "-I", "-S"]
        command = [*python, str(ROOT / "orchestration/execution.py"), *python, "-c", EXECUTES]
        self.processes.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True))

    def is_idle(self) -> bool:
        """Return whether all processes have ended."""
        return all(process.poll() is not None for process in self.processes)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def notes(self, run: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [line.split()[1] for line in (self.folder / run).read_text().splitlines()]
        return []

    def state(self, run: str) -> str:
        return str(asked(self.api, "GET", f"/flow_runs/{run}")["state"]["type"])

    def history(self, run: str) -> str:
        """Return what happened to a run, for the message of a failure."""
        states = asked(self.api, "GET", f"/flow_run_states/?flow_run_id={run}")
        lines = [f"{run_state['timestamp'][14:22]} {run_state['name']} {run_state['id'][-12:]}" for run_state in states]
        return ", ".join([*lines, f"Jobs {sorted(self.jobs[run])}", *self.notes(run)])


ID = rb"([0-9a-f]{8}-[0-9a-f-]{27})"
REQUESTED, ANSWERED = rb'"PREFECT__FLOW_RUN_ID", "value": "' + ID, rb'prefect.io/flow-run-id":"' + ID
"""How the request that creates a Job, and its answer, name the run."""


class Stalls:
    """Delays the requests that create the Jobs of some runs, and some requests of the reconciler."""

    def __init__(self, kubelet: Kubelet) -> None:
        self.kubelet = kubelet
        self.cases: dict[str, str] = {}
        self.asked: dict[str, int] = defaultdict(int)
        self.answered: set[str] = set()
        self.held = self.reconciler = 0

    def worker(self, data: bytes, way: str) -> None:
        """Hold the first request that creates a Job, or its answer, as the run's case demands."""
        found = re.search(REQUESTED if way == "asked" else ANSWERED, data)
        if not found:
            return
        run = found[1].decode()
        case = self.cases[run]
        if way == "asked":
            self.asked[run] += 1
            if self.asked[run] == 1 and case == "until another executes":
                self.wait(lambda: "begins" in self.kubelet.notes(run))
            if case == "until another has claimed":
                number = self.asked[run]
                self.wait(lambda: self.asked[run] == 2 if number == 1 else len(self.kubelet.jobs[run]) > 0)
            if self.asked[run] == 1 and case == "until it is given away":
                before = self.given_away(run)
                self.wait(lambda: self.given_away(run) > before)
        elif run not in self.answered:
            self.answered.add(run)
            if case == "its answer":
                self.wait(lambda: "begins" in self.kubelet.notes(run))
            if case == "its answer is lost":
                raise ConnectionResetError

    def given_away(self, run: str) -> int:
        """Return how often a claim of the run was given away."""
        states = asked(self.kubelet.api, "GET", f"/flow_run_states/?flow_run_id={run}")
        return sum(run_state["name"] == protocol.CLAIM_LOST for run_state in states)

    def wait(self, condition: Callable[[], bool]) -> None:
        self.held += 1
        deadline = time.monotonic() + 180
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.3)
        self.held -= 1

    def hold_some(self, _: bytes, way: str) -> None:
        """Hold each third request, and each fifth answer, for longer than the reconciler's timeout."""
        self.reconciler += 1
        if self.reconciler < 60 and self.reconciler % (3 if way == "asked" else 5) == 0:
            time.sleep(1.3 * REQUEST)


CASES = (
    "until another executes", "until another has claimed", "until it is given away", "its answer",
    "its answer is lost",
)  # fmt: skip


@contextlib.asynccontextmanager
async def running(tasks: list[Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
    started = [asyncio.create_task(coroutine) for coroutine in tasks]
    try:
        yield started
    finally:
        for task in started:
            task.cancel()
        await asyncio.wait(started)


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let workers watch no cluster, and claim with timeouts of seconds in place of a minute."""
    monkeypatch.setattr(kubernetes_worker, "CLAIM_TIMEOUT_SECONDS", CLAIM)
    monkeypatch.setenv("PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED", "false")
    for name in ("DELAY_SECONDS", "JITTER_MAX_SECONDS"):
        monkeypatch.setenv(f"PREFECT_INTEGRATIONS_KUBERNETES_WORKER_CREATE_JOB_RETRY_{name}", "0")
    with temporary_settings({PREFECT_LOGGING_TO_API_ENABLED: False, PREFECT_WORKER_QUERY_SECONDS: 2}):
        yield


@pytest.mark.usefixtures("short_timeouts", "closed_worker_channels")
def test_run_executes_once_however_late_kubernetes_creates_a_job(
    prefect_server: str, namespace: Namespace, tmp_path: Path
) -> None:
    name = f"claims-{uuid4().hex[:6]}"
    with client_of(prefect_server) as api, proxied(namespace.context) as url, contextlib.ExitStack() as stack:
        asked(api, "POST", "/work_pools/", {"name": name, "type": "kubernetes", "base_job_template": TEMPLATE})
        flow = asked(api, "POST", "/flows/", {"name": name})["id"]
        made = asked(api, "POST", "/deployments/", {"name": "d", "flow_id": flow, "work_pool_name": name})["id"]
        kubelet = stack.enter_context(contextlib.closing(Kubelet(api, prefect_server, tmp_path)))
        stalls = Stalls(kubelet)
        body = {"state": {"type": "SCHEDULED"}}
        runs = {case: asked(api, "POST", f"/deployments/{made}/create_flow_run", body)["id"] for case in CASES}
        stalls.cases = {run: case for case, run in runs.items()}
        with stalled(url, stalls.worker) as worker_url, stalled(url, stalls.hold_some) as reconciler_url:
            asyncio.run(
                _until_ended(
                    prefect_server, name, namespace.name, url, worker_url, reconciler_url, kubelet, stalls, runs
                )
            )
            jobs = dict(kubelet.jobs)
        ends = {case: (kubelet.state(run), kubelet.notes(run)) for case, run in runs.items()}
        assert ends == dict.fromkeys(CASES, ("COMPLETED", ["begins", "ends"]))
        for case, run in runs.items():
            states = asked(api, "GET", f"/flow_run_states/?flow_run_id={run}")
            claims = {run_state["id"][-12:] for run_state in states if run_state["name"] == "Pending"}
            made_for = [claim_of(job) for job in jobs[run]]
            assert len(set(made_for)) == len(made_for), f"{case}: a claim has two Jobs"
            assert claims.issuperset(made_for), case


async def _until_ended(
    server: str,
    pool: str,
    namespace: str,
    url: str,
    worker_url: str,
    reconciler_url: str,
    kubelet: Kubelet,
    stalls: Stalls,
    runs: dict[str, str],
) -> None:
    """Run worker and reconciler until all runs and all processes of late Jobs have ended."""

    class Stalled(kubernetes_worker.Worker, abc.ABC):
        @contextlib.asynccontextmanager
        async def _get_configured_kubernetes_client(self, _: Any) -> AsyncIterator[ApiClient]:
            async with ApiClient(Configuration(host=worker_url)) as client:
                yield client

    async with (
        httpx.AsyncClient(base_url=server, timeout=75) as for_prefect,
        httpx.AsyncClient(base_url=reconciler_url, timeout=REQUEST) as for_kubernetes,
    ):
        cluster = kubernetes.Cluster(for_kubernetes, namespace)
        policy = Policy(settle_seconds=0.5, claim_seconds=GIVEN_AWAY_AFTER)
        with patch.object(kubernetes, "WATCH_SECONDS", 5):
            reconciler = Reconciler(Server(for_prefect, server), [cluster], pool, policy, None, Pulse(60))
            tested = Stalled(namespace=namespace, work_pool_name=pool, create_pool_if_not_found=False)
            tested._cluster = await cluster.identity()
            parts = [tested.start(), reconciler.run(0.5), kubelet.work(url, namespace)]
            async with running(parts) as started:

                async def have_ended() -> bool:
                    assert not any(task.done() for task in started), [task for task in started if task.done()]
                    found = [await asyncio.to_thread(kubelet.state, run) for run in runs.values()]
                    return set(found) == {"COMPLETED"} and not stalls.held and kubelet.is_idle()

                end = time.monotonic() + 480
                while not await have_ended():
                    if time.monotonic() > end:
                        pytest.fail("\n".join(f"{case}: {kubelet.history(run)}" for case, run in runs.items()))
                    await asyncio.sleep(1)
