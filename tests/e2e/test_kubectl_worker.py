"""A worker that kubectl alone manages, in a namespace of its own: it joins a pool, and loses no run when it goes."""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import yaml

from orchestration.settings import ROOT
from tests.cluster.namespace import Namespace
from tests.e2e.release import Object, Pool, Release, copy_credentials, merge_values
from tests.e2e.runs import create_deployment, get_run, start_run, wait_for_log, wait_until_ended
from tests.parts import wait_until

EXAMPLE = ROOT / "k8s" / "worker" / "overlays" / "example"
WORKER = "deployment/prefect-work-pool-worker"
WORKERS = "app.kubernetes.io/component=worker"


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    """Those of a pool whose release has no worker: every run is taken by one of kubectl's."""
    return merge_values(values, {"worker": {"replicas": 0}, "drift": {"enabled": False}, "sync": {"files": []}})


@pytest.fixture(scope="module")
def overlay(server: Release, pool: Pool, image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example in a namespace of the module's own, with this checkout's image and the pool's server."""
    folder = tmp_path_factory.mktemp("overlay").resolve()
    (folder / "namespace").mkdir()
    name, home = f"runs-{uuid4().hex[:8]}", server.namespace.name
    repository, _, tag = image.rpartition(":")
    environment = [
        {"name": "PREFECT_API_URL", "value": f"http://prefect-server-api.{home}:4200/api"},
        {"name": "WORK_POOL", "value": pool.work_pool},
        {"name": "PREFECT_WORKER_QUERY_SECONDS", "value": "2"},
    ]
    worker = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "prefect-work-pool-worker"},
        "spec": {"template": {"spec": {"containers": [{"name": "worker", "env": environment}]}}},
    }
    path = "/spec/egress/1/to/0/namespaceSelector/matchLabels/kubernetes.io~1metadata.name"
    ways = {
        "target": {"kind": "NetworkPolicy", "name": "prefect-work-pool-.*"},
        "patch": json.dumps([{"op": "replace", "path": path, "value": home}]),
    }
    changes: dict[Path, Object] = {
        folder: {
            "images": [{"name": "localhost:5000/prefect-orchestration", "newName": repository, "newTag": tag}],
            "patches": [{"patch": json.dumps(worker)}],
        },
        folder / "namespace": {"patches": [ways]},
    }
    for where, change in changes.items():
        # kustomize takes no absolute path.
        base = os.path.relpath(EXAMPLE / where.relative_to(folder), where)
        (where / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": name, "resources": [base]} | change))
    return folder


@pytest.fixture(scope="module")
def away(server: Release, pool: Pool, overlay: Path, probe: Object) -> Iterator[Namespace]:
    """The worker's namespace, in which one has joined the pool."""
    made = Namespace(pool.namespace.context, yaml.safe_load((overlay / "kustomization.yaml").read_text())["namespace"])
    try:
        made.kubectl("apply", "-k", str(overlay / "namespace"))
        copy_credentials(server, made)
        made.apply(probe)
        made.kubectl("apply", "-k", str(overlay))
        made.kubectl("rollout", "status", WORKER, "--timeout=180s")
        yield made
    finally:
        made.kubectl("delete", "namespace", made.name, "--wait=false", "--ignore-not-found")


def list_worker_pods(away: Namespace) -> list[str]:
    """The names of the workers' pods, but for those that are ending."""
    listed = json.loads(away.kubectl("get", "pods", "-l", WORKERS, "-o", "json"))["items"]
    return [pod["metadata"]["name"] for pod in listed if not pod["metadata"].get("deletionTimestamp")]


def start_burst(api: httpx.Client, made: str, count: int) -> list[str]:
    """So many runs at once, the first of which is claimed by now."""
    runs = [start_run(api, made, parameters={"text": str(number)}) for number in range(count)]

    def claimed() -> bool:
        return any(get_run(api, run)["state_type"] != "SCHEDULED" for run in runs)

    wait_until(claimed, "a worker to claim runs", 120)
    return runs


def assert_all_completed_once(api: httpx.Client, runs: list[str]) -> None:
    outcomes = [wait_until_ended(api, run, 180) for run in runs]
    assert {(outcome["state_type"], outcome["run_count"]) for outcome in outcomes} == {("COMPLETED", 1)}


def test_it_joins_the_pool_and_a_run_is_a_pod_beside_it(
    server: Release, pool: Pool, away: Namespace, api: httpx.Client
) -> None:
    """With the pool's template as it is at the time, which no part of the manifests has."""
    assert not pool.pods("worker")
    on_server = f"/work_pools/{pool.work_pool}"
    [online] = wait_until(lambda: api.post(f"{on_server}/workers/filter", json={}).json(), "the worker's sign")
    assert online["status"] == "ONLINE"
    template = api.get(on_server).json()["base_job_template"]
    template["variables"]["properties"]["memory_limit"]["default"] = "640Mi"
    api.patch(on_server, json={"base_job_template": template}).raise_for_status()
    addresses = [
        f"prefect-server-{what}.{server.namespace.name}:{port}" for what, port in (("api", 4200), ("database", 5432))
    ]
    made = create_deployment(api, pool, parameters={"addresses": addresses})

    def with_the_new_template() -> tuple[str, Object] | None:
        run = start_run(api, made)
        assert wait_until_ended(api, run)["state_type"] == "COMPLETED"
        found = json.loads(away.kubectl("get", "pods", "-l", f"prefect.io/flow-run-id={run}", "-o", "json"))["items"]
        [pod] = found
        return (run, pod) if pod["spec"]["containers"][0]["resources"]["limits"] == {"memory": "640Mi"} else None

    run, pod = wait_until(with_the_new_template, "a run by the new template", 300)
    assert pod["spec"]["serviceAccountName"] == "prefect-work-pool-runs"
    assert [line for line in wait_for_log(api, run, f"reaches {addresses[-1]}") if line.startswith("reaches")] == [
        f"reaches {addresses[0]}: True",
        f"reaches {addresses[1]}: False",
    ]
    assert not json.loads(pool.namespace.kubectl("get", "jobs", "-l", "prefect.io/flow-run-id", "-o", "json"))["items"]


def test_scaled_it_stays_so_when_it_is_applied_again(away: Namespace, overlay: Path, api: httpx.Client) -> None:
    away.kubectl("scale", WORKER, "--replicas=2")
    away.kubectl("apply", "-k", str(overlay))
    away.kubectl("rollout", "status", WORKER, "--timeout=180s")
    assert len(list_worker_pods(away)) == 2
    assert "Worker" in away.kubectl("logs", WORKER)


def test_a_rolling_restart_under_a_burst_loses_no_run(pool: Pool, away: Namespace, api: httpx.Client) -> None:
    before = list_worker_pods(away)
    runs = start_burst(api, create_deployment(api, pool), 6)
    away.kubectl("rollout", "restart", WORKER)
    away.kubectl("rollout", "status", WORKER, "--timeout=180s")
    assert_all_completed_once(api, runs)
    assert not set(before) & set(list_worker_pods(away))


def test_a_worker_that_is_deleted_finishes_its_claims(pool: Pool, away: Namespace, api: httpx.Client) -> None:
    away.kubectl("scale", WORKER, "--replicas=1")
    wait_until(lambda: len(list_worker_pods(away)) == 1, "one worker to go")
    [worker] = list_worker_pods(away)
    runs = start_burst(api, create_deployment(api, pool), 8)
    with ThreadPoolExecutor() as beside:
        log = beside.submit(away.kubectl, "logs", "--follow", worker)
        away.kubectl("delete", "pod", worker)
    assert "Asked to end; claimed runs that are submitted first:" in log.result()
    assert_all_completed_once(api, runs)


def test_deleted_nothing_of_it_stays_and_all_runs_go_on(
    pool: Pool, away: Namespace, overlay: Path, api: httpx.Client
) -> None:
    """The one in progress and those that were claimed; the others wait for a worker."""
    away.kubectl("rollout", "status", WORKER, "--timeout=180s")
    made = create_deployment(api, pool)
    in_progress = start_run(api, made, parameters={"seconds": 20})
    wait_until(lambda: get_run(api, in_progress)["state_type"] == "RUNNING", "the run to run", 120)
    runs = start_burst(api, made, 6)
    away.kubectl("delete", "-k", str(overlay))
    wait_until(lambda: not away.kubectl("get", "all", "-l", WORKERS, "-o", "name"), "all of it to go", 90)
    claimed = [run for run in runs if get_run(api, run)["state_type"] != "SCHEDULED"]
    assert claimed
    assert_all_completed_once(api, [in_progress, *claimed])
    away.kubectl("apply", "-k", str(overlay))
    assert_all_completed_once(api, runs)
