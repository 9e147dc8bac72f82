"""A worker that is managed by kubectl, in another namespace than the pool: it joins the pool and loses no run."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import yaml

from orchestration.operations.local_cluster import binaries
from orchestration.settings import ROOT
from tests.cluster.namespace import Namespace
from tests.e2e.light_runs import LIGHT_RUN, light_run
from tests.e2e.pace import QUERY_SECONDS
from tests.e2e.release import Object, Pool, Release, copy_credentials, merge_values
from tests.e2e.runs import create_deployment, get_run, read, start_run, wait_for_log, wait_until_ended
from tests.parts import wait_until

EXAMPLE = ROOT / "k8s" / "worker" / "overlays" / "example"
WORKER = "deployment/prefect-work-pool-worker"
WORKERS = "app.kubernetes.io/component=worker"


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    """Return values for a pool without a worker, so that the workers of kubectl take every run."""
    return merge_values(values, {"worker": {"replicas": 0}, "drift": {"enabled": False}, "sync": {"files": []}})


@pytest.fixture(scope="module")
def overlay(server: Release, pool: Pool, image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an overlay of the example: a new namespace, this checkout's image, and the pool's server."""
    folder = tmp_path_factory.mktemp("overlay").resolve()
    (folder / "namespace").mkdir()
    name, home = f"runs-{uuid4().hex[:8]}", server.namespace.name
    repository, _, tag = image.rpartition(":")
    environment = [
        {"name": "PREFECT_API_URL", "value": f"http://prefect-server-api.{home}:4200/api"},
        {"name": "WORK_POOL", "value": pool.work_pool},
        {"name": "PREFECT_WORKER_QUERY_SECONDS", "value": str(QUERY_SECONDS)},
    ]
    worker = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "prefect-work-pool-worker"},
        "spec": {"template": {"spec": {"containers": [{"name": "worker", "env": environment}]}}},
    }
    path = "/spec/egress/1/to/0/namespaceSelector/matchLabels/kubernetes.io~1metadata.name"
    egress = {
        "target": {"kind": "NetworkPolicy", "name": "prefect-work-pool-.*"},
        "patch": json.dumps([{"op": "replace", "path": path, "value": home}]),
    }
    changes: dict[Path, Object] = {
        folder: {
            "images": [{"name": "localhost:5000/prefect-orchestration", "newName": repository, "newTag": tag}],
            "patches": [{"patch": json.dumps(worker)}],
        },
        folder / "namespace": {"patches": [egress]},
    }
    for where, change in changes.items():
        # kustomize accepts no absolute path.
        base = os.path.relpath(EXAMPLE / where.relative_to(folder), where)
        (where / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": name, "resources": [base]} | change))
    return folder


@pytest.fixture(scope="module")
def away(server: Release, pool: Pool, overlay: Path, probe: Object) -> Iterator[Namespace]:
    """Yield the worker's namespace, with a worker that is ready."""
    namespace = Namespace(
        pool.namespace.context, yaml.safe_load((overlay / "kustomization.yaml").read_text())["namespace"]
    )
    try:
        namespace.kubectl("apply", "-k", str(overlay / "namespace"))
        copy_credentials(server, namespace)
        namespace.apply(probe)
        namespace.kubectl("apply", "-k", str(overlay))
        namespace.kubectl("rollout", "status", WORKER, "--timeout=300s")
        yield namespace
    finally:
        namespace.kubectl("delete", "namespace", namespace.name, "--wait=false", "--ignore-not-found")


def list_worker_pods(away: Namespace, *, terminating: bool = False) -> list[str]:
    """Return the names of the workers' pods, with `terminating` also those of terminating ones."""
    listed = json.loads(away.kubectl("get", "pods", "-l", WORKERS, "-o", "json"))["items"]
    return [pod["metadata"]["name"] for pod in listed if terminating or not pod["metadata"].get("deletionTimestamp")]


def start_burst(api: httpx.Client, deployment: str, count: int) -> list[str]:
    """Start `count` runs at once, wait until a worker has claimed one, and return the runs."""
    runs = [start_run(api, deployment, parameters={"text": str(number)}) for number in range(count)]

    def is_one_claimed() -> bool:
        return any(get_run(api, run)["state_type"] != "SCHEDULED" for run in runs)

    wait_until(is_one_claimed, "a worker to claim runs", pause=0.1)  # before all of them have Jobs
    return runs


def assert_all_completed_once(api: httpx.Client, runs: list[str]) -> None:
    outcomes = [wait_until_ended(api, run) for run in runs]
    assert {(outcome["state_type"], outcome["run_count"]) for outcome in outcomes} == {("COMPLETED", 1)}


def test_worker_joins_the_pool_and_starts_pods_in_its_namespace(
    server: Release, pool: Pool, away: Namespace, api: httpx.Client
) -> None:
    """The worker uses the current template of the pool, which is not in the manifests."""
    assert not pool.pods("worker")
    on_server = f"/work_pools/{pool.work_pool}"
    [online] = wait_until(lambda: read(api, "POST", f"{on_server}/workers/filter", json={}), "the worker's heartbeat")
    assert online["status"] == "ONLINE"
    template = read(api, "GET", on_server)["base_job_template"]
    template["variables"]["properties"]["memory_limit"]["default"] = "640Mi"
    api.patch(on_server, json={"base_job_template": template}).raise_for_status()
    addresses = [
        f"prefect-server-{component}.{server.namespace.name}:{port}"
        for component, port in (("api", 4200), ("database", 5432))
    ]
    deployment = create_deployment(api, pool, parameters={"addresses": addresses})

    def run_by_the_new_template() -> tuple[str, Object] | None:
        run = start_run(api, deployment)
        assert wait_until_ended(api, run)["state_type"] == "COMPLETED"
        found = json.loads(away.kubectl("get", "pods", "-l", f"prefect.io/flow-run-id={run}", "-o", "json"))["items"]
        [pod] = found
        return (run, pod) if pod["spec"]["containers"][0]["resources"]["limits"]["memory"] == "640Mi" else None

    run, pod = wait_until(run_by_the_new_template, "a run by the new template", 600)
    assert pod["spec"]["serviceAccountName"] == "prefect-work-pool-runs"
    assert [line for line in wait_for_log(api, run, f"reaches {addresses[-1]}") if line.startswith("reaches")] == [
        f"reaches {addresses[0]}: True",
        f"reaches {addresses[1]}: False",
    ]
    assert not json.loads(pool.namespace.kubectl("get", "jobs", "-l", "prefect.io/flow-run-id", "-o", "json"))["items"]


@pytest.mark.further
def test_apply_keeps_the_number_of_replicas(away: Namespace, overlay: Path, api: httpx.Client) -> None:
    away.kubectl("scale", WORKER, "--replicas=2")
    away.kubectl("apply", "-k", str(overlay))
    away.kubectl("rollout", "status", WORKER, "--timeout=300s")
    assert len(list_worker_pods(away)) == 2
    assert "Worker" in away.kubectl("logs", WORKER)


@pytest.mark.further
def test_rolling_restart_under_a_burst_loses_no_run(pool: Pool, away: Namespace, api: httpx.Client) -> None:
    before = list_worker_pods(away)
    runs = start_burst(api, create_deployment(api, pool, job_variables=LIGHT_RUN), 6)
    away.kubectl("rollout", "restart", WORKER)
    away.kubectl("rollout", "status", WORKER, "--timeout=300s")
    assert_all_completed_once(api, runs)
    assert not set(before) & set(list_worker_pods(away))


@pytest.mark.further
def test_deleted_worker_submits_its_claimed_runs(pool: Pool, away: Namespace, api: httpx.Client) -> None:
    away.kubectl("scale", WORKER, "--replicas=1")
    # A terminating worker claims runs until it receives its signal.
    wait_until(lambda: len(list_worker_pods(away, terminating=True)) == 1, "one worker to be gone")
    [worker] = list_worker_pods(away)
    runs = start_burst(api, create_deployment(api, pool, job_variables=LIGHT_RUN), 8)
    command = (binaries.kubectl_program(), "--context", away.context, "-n", away.name, "logs", "--follow", worker)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as log:
        assert log.stdout
        try:
            assert log.stdout.readline(), "the log of the worker"
            away.kubectl("delete", "pod", worker)
            assert "Shutting down. Claimed runs to submit first:" in log.stdout.read()
        finally:
            log.terminate()
    assert_all_completed_once(api, runs)


@pytest.mark.further
def test_deleted_overlay_leaves_nothing_and_claimed_runs_complete(
    pool: Pool, away: Namespace, overlay: Path, api: httpx.Client
) -> None:
    """The run in progress completes, too. Unclaimed runs wait for the next worker."""
    away.kubectl("rollout", "status", WORKER, "--timeout=300s")
    in_progress = start_run(api, create_deployment(api, pool, job_variables=light_run(20)))
    wait_until(lambda: get_run(api, in_progress)["state_type"] == "RUNNING", "the run to run", 300)
    # The worker has a minute for the Jobs of its claims, on a busy machine, too, and no reconciler is here.
    runs = start_burst(api, create_deployment(api, pool, job_variables=LIGHT_RUN), 3)
    away.kubectl("delete", "-k", str(overlay))
    wait_until(lambda: not away.kubectl("get", "all", "-l", WORKERS, "-o", "name"), "all of it to be gone")
    claimed = [run for run in runs if get_run(api, run)["state_type"] != "SCHEDULED"]
    assert claimed
    assert_all_completed_once(api, [in_progress, *claimed])
    away.kubectl("apply", "-k", str(overlay))
    assert_all_completed_once(api, runs)
