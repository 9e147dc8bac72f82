"""The work pool's chart on a real cluster: runs, upgrades, drift and faults of the worker, in order."""

import copy
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import yaml

from orchestration.errors import ClusterError
from tests.e2e.light_runs import LIGHT_RUN, light_run
from tests.e2e.pace import DRIFT_SECONDS
from tests.e2e.release import SMALL_REQUESTS, Object, Pool, Release, merge_values
from tests.e2e.runs import create_deployment, get_run, read, start_run, wait_for_log, wait_until_ended
from tests.helm.rendering import environment
from tests.parts import wait_until

POOL_RELEASE = "prefect-work-pool"


def find_job(pool: Pool, run: str) -> Object:
    """Return the run's Job."""
    found = json.loads(pool.namespace.kubectl("get", "jobs", "-l", f"prefect.io/flow-run-id={run}", "-o", "json"))
    [job] = found["items"]
    return dict(job)


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    """Return values for the pool that the deployments of prefect.yaml name."""
    return merge_values(values, {"pool": {"name": "default"}})


@pytest.fixture(scope="module")
def scheduled(pool: Pool, api: httpx.Client) -> str:
    """Create a deployment with a schedule, and return its id. Other tests run until its first run in 90 seconds."""
    first = (datetime.now(UTC) + timedelta(seconds=90)).isoformat()
    schedules = [{"schedule": {"interval": 600, "anchor_date": first}, "active": True}]
    return create_deployment(api, pool, parameters={"text": "by schedule"}, schedules=schedules)


@pytest.fixture(scope="module")
def addresses(server: Release) -> list[str]:
    """Return the addresses of the server's API and databases."""
    ports = {"api": 4200, "database": 5432, "redis": 6379}
    return [f"prefect-server-{name}.{server.namespace.name}:{port}" for name, port in ports.items()]


@pytest.fixture(scope="module")
def plain_run(pool: Pool, api: httpx.Client, addresses: list[str]) -> str:
    """Start a run by the values of its deployment alone, which tries to connect to the addresses; return the run."""
    variables = {"memory_limit": "600Mi", "env": {"GREETING": "deployment"}}
    return start_run(api, create_deployment(api, pool, job_variables=variables), parameters={"addresses": addresses})


def test_pool_starts_from_nothing_without_a_restart(pool: Pool, api: httpx.Client) -> None:
    restarts = pool.restarts()
    assert len(restarts) == 3, "worker, drift and reconciler"
    assert not any(restarts.values()), restarts
    assert "Phase:          Succeeded" in pool.helm("test", POOL_RELEASE)
    found = api.post("/deployments/filter", json={}).json()
    assert {"dbt-pipeline-daily", "backfill"} <= {deployment["name"] for deployment in found}
    [daily] = [deployment for deployment in found if deployment["name"] == "dbt-pipeline-daily"]
    assert daily["work_pool_name"] == "default"
    assert daily["schedules"][0]["schedule"]["cron"] == "0 6 * * *"


@pytest.mark.further
def test_memory_variables_and_image_of_deployment_and_run_reach_the_pod(
    pool: Pool, api: httpx.Client, image: str, plain_run: str, scheduled: str
) -> None:
    repository, _, tag = image.rpartition(":")
    by_digest = f"{repository}@{_digest(repository, tag)}"
    variables = {"memory_limit": "650Mi", "env": {"GREETING": "run"}, "image": by_digest}
    changed_run = start_run(api, get_run(api, plain_run)["deployment_id"], job_variables=variables)
    for run, memory, greeting, name in (
        (plain_run, "600Mi", "deployment", image),
        (changed_run, "650Mi", "run", by_digest),
    ):
        assert wait_until_ended(api, run)["state_type"] == "COMPLETED"
        [container] = find_job(pool, run)["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == {"memory": memory, "ephemeral-storage": "12Gi"}
        assert container["resources"]["requests"] == SMALL_REQUESTS | {"ephemeral-storage": "64Mi"}
        assert container["image"] == name
        assert wait_for_log(api, run, f"text= GREETING={greeting}")


def _digest(repository: str, tag: str) -> str:
    """Return the registry's digest of a tag."""
    host, _, name = repository.partition("/")
    accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
    found = httpx.head(f"http://{host}/v2/{name}/manifests/{tag}", headers={"Accept": accept}, timeout=60)
    return str(found.raise_for_status().headers["Docker-Content-Digest"])


@pytest.mark.usefixtures("scheduled")
def test_run_has_no_token_no_password_and_no_connection_to_the_databases(
    pool: Pool, server: Release, api: httpx.Client, plain_run: str, addresses: list[str]
) -> None:
    assert wait_until_ended(api, plain_run)["state_type"] == "COMPLETED"
    lines = wait_for_log(api, plain_run, f"reaches {addresses[-1]}")
    assert "token=False services=False" in lines
    assert [line for line in lines if line.startswith("reaches")] == [
        f"reaches {addresses[0]}: True",
        f"reaches {addresses[1]}: False",
        f"reaches {addresses[2]}: False",
    ]
    job = find_job(pool, plain_run)
    manifest = json.dumps(job)
    assert server.secret("prefect-server-auth", "auth-string") not in manifest
    [container] = job["spec"]["template"]["spec"]["containers"]
    # The run's own credential, which is worth nothing beyond the run.
    credential = str(environment(container)["PREFECT_API_AUTH_STRING"])
    assert credential.startswith(f"run-{plain_run}:")
    assert server.secret("prefect-server-api-roles", "run-key") not in manifest


def test_schedule_starts_a_run_as_a_pod(pool: Pool, api: httpx.Client, scheduled: str) -> None:
    """The run has the parameters of the deployment. Its logs, states and artifact are in the API."""
    runs = {"deployments": {"id": {"any_": [scheduled]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}

    def find_completed_run() -> Object | None:
        found = read(api, "POST", "/flow_runs/filter", json=runs)
        return found[0] if found else None

    run: Object = wait_until(find_completed_run, "the schedule's first run to complete", 900)
    api.delete(f"/deployments/{scheduled}").raise_for_status()
    assert run["auto_scheduled"] is True
    assert wait_for_log(api, run["id"], "text=by schedule")
    states = api.get("/flow_run_states/", params={"flow_run_id": run["id"]}).json()
    assert [state["type"] for state in sorted(states, key=lambda state: state["timestamp"])][-2:] == [
        "RUNNING",
        "COMPLETED",
    ]
    artifacts = api.post("/artifacts/filter", json={"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}).json()
    assert [artifact["data"] for artifact in artifacts] == ["# by schedule"]
    pod = json.loads(pool.namespace.kubectl("get", "pods", "-l", f"prefect.io/flow-run-id={run['id']}", "-o", "json"))
    [pod] = pod["items"]
    assert pod["metadata"]["ownerReferences"][0]["kind"] == "Job"
    assert pod["metadata"]["labels"]["prefect.io/role"] == "flow-run"


def test_ten_runs_complete_while_the_worker_is_replaced(pool: Pool, api: httpx.Client) -> None:
    """The deleted worker creates the Jobs of the runs that it has claimed. Its successor claims the other runs."""
    deployment = create_deployment(api, pool, job_variables=LIGHT_RUN)
    [worker] = pool.pods("worker")
    runs = [start_run(api, deployment) for _ in range(10)]

    def is_one_claimed() -> bool:
        return any(get_run(api, run)["state_type"] != "SCHEDULED" for run in runs)

    wait_until(is_one_claimed, "the worker to claim runs", pause=0.1)  # before all of them have Jobs
    pool.namespace.kubectl("delete", "pod", worker["metadata"]["name"], "--wait=false")
    outcomes = [wait_until_ended(api, run, 300) for run in runs]
    assert {outcome["state_type"] for outcome in outcomes} == {"COMPLETED"}
    assert {outcome["run_count"] for outcome in outcomes} == {1}


def _max_concurrent_runs(api: httpx.Client, runs: list[str]) -> int:
    """Return how many of the runs held a slot of their pool at the same time, from Pending to Completed."""
    moments = []
    for run in runs:
        states = read(api, "GET", "/flow_run_states/", params={"flow_run_id": run})
        times = {state["type"]: datetime.fromisoformat(state["timestamp"]) for state in states}
        moments += [(times["PENDING"], 1), (times["COMPLETED"], -1)]
    most = now = 0
    for _, change in sorted(moments):
        now += change
        most = max(most, now)
    return most


def test_upgrade_changes_pool_and_template_and_rollback_restores_both(
    pool: Pool, values: Object, api: httpx.Client
) -> None:
    """The pool's new limit is kept. A running run completes in spite of upgrade and rollback."""
    running = start_run(api, create_deployment(api, pool, job_variables=light_run(60)))
    wait_until(lambda: get_run(api, running)["state_type"] == "RUNNING", "the run to run", 300)
    changed = copy.deepcopy(values)
    changed["pool"] |= {"concurrencyLimit": 3, "queues": [{"name": "urgent", "priority": 1, "concurrencyLimit": 1}]}
    changed["runs"]["resources"]["limits"]["memory"] = "640Mi"
    before = pool.revision()
    pool.deploy(changed)
    pool.wait_for_one_worker()
    found = api.get(f"/work_pools/{pool.work_pool}").json()
    assert found["concurrency_limit"] == 3
    assert found["base_job_template"]["variables"]["properties"]["memory_limit"]["default"] == "640Mi"
    queues = {queue["name"]: queue for queue in api.post(f"/work_pools/{pool.work_pool}/queues/filter", json={}).json()}
    assert queues["urgent"]["priority"] == 1
    assert queues["urgent"]["concurrency_limit"] == 1
    deployment = create_deployment(api, pool, job_variables=LIGHT_RUN)
    runs = [start_run(api, deployment) for _ in range(5)]
    assert {wait_until_ended(api, run, 240)["state_type"] for run in runs} == {"COMPLETED"}
    assert _max_concurrent_runs(api, runs) <= 3
    assert (
        find_job(pool, runs[0])["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "640Mi"
    )
    pool.helm("rollback", POOL_RELEASE, before, "--wait", "--timeout", "10m")
    found = api.get(f"/work_pools/{pool.work_pool}").json()
    assert found["concurrency_limit"] is None
    assert found["base_job_template"]["variables"]["properties"]["memory_limit"]["default"] == "700Mi"
    queues = api.post(f"/work_pools/{pool.work_pool}/queues/filter", json={}).json()
    assert [queue["name"] for queue in queues] == ["default"]
    assert wait_until_ended(api, running)["state_type"] == "COMPLETED"
    assert get_run(api, running)["run_count"] == 1


def _deployment_in_file(name: str, text: str, cron: str) -> Object:
    """Return a deployment of the probe on the pool `files`, as it is written in a file."""
    return {
        "name": name,
        "entrypoint": "/probe/flow.py:probe",
        "parameters": {"text": text},
        "work_pool": {"name": "files"},
        "schedules": [{"cron": cron, "timezone": "UTC"}],
    }


FILES = {
    "first.yaml": {
        "deployments": [_deployment_in_file("a", "first", "0 6 * * *"), _deployment_in_file("b", "first", "30 6 * * *")]
    },
    "second.yaml": {
        "deployments": [
            _deployment_in_file("a", "second", "0 7 * * *"),
            _deployment_in_file("c", "second", "30 7 * * *"),
        ]
    },
}


class FilesRelease(Release):
    """A second release, of the pool `files`, whose deployments are those of one of `FILES`.

    It has no reconciler: a worker watches its runs only without one, and a test needs that.
    """

    def deploy_file(self, values: Object, file: str, memory: str) -> None:
        """Deploy a file; `memory` is the memory limit of runs."""
        volumes = {
            "volumes": [{"name": name, "configMap": {"name": name}} for name in ("files", "probe")],
            "volumeMounts": [{"name": name, "mountPath": f"/{name}"} for name in ("files", "probe")],
        }
        changed = merge_values(values, {"pool": {"name": "files"}, "reconciler": {"enabled": False}})
        changed["sync"] = {"files": [f"/files/{file}"], "pod": volumes, "backoffLimit": 0}
        changed["drift"] = {"enabled": False}
        changed["runs"]["resources"]["limits"]["memory"] = memory
        self.deploy(changed)


@pytest.fixture(scope="module")
def files_release(pool: Pool, values: Object) -> Iterator[FilesRelease]:
    """Yield the second release, with the first file."""
    texts = {name: yaml.safe_dump(content) for name, content in FILES.items()}
    pool.namespace.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "files"}, "data": texts})
    release = FilesRelease("prefect-work-pool", "files", pool.namespace)
    try:
        release.deploy_file(values, "first.yaml", "700Mi")
        yield release
    finally:
        release.helm("uninstall", release.name, "--wait", "--ignore-not-found")


@pytest.fixture(scope="module")
def first_revision(files_release: FilesRelease) -> str:
    """Return the second release's revision with the first file."""
    return files_release.revision()


def _read_deployments(api: httpx.Client) -> dict[str, Object]:
    pools = {"name": {"any_": ["files"]}}
    found = api.post("/deployments/filter", json={"work_pools": pools}).raise_for_status().json()
    return {deployment["name"]: deployment for deployment in found}


def _read_memory_limit(api: httpx.Client) -> str:
    found = api.get("/work_pools/files").raise_for_status().json()
    return str(found["base_job_template"]["variables"]["properties"]["memory_limit"]["default"])


def _text_and_cron(deployment: Object) -> tuple[str, str]:
    [schedule] = deployment["schedules"]
    return deployment["parameters"]["text"], schedule["schedule"]["cron"]


FIRST = {"a": ("first", "0 6 * * *"), "b": ("first", "30 6 * * *")}
"""Text and cron of the deployments in the first file."""


@pytest.mark.further
@pytest.mark.usefixtures("first_revision")
def test_upgrade_syncs_the_files(files_release: FilesRelease, values: Object, api: httpx.Client) -> None:
    """Deployments are added, changed and removed, and the template changes. A run of a removed deployment completes."""
    before = _read_deployments(api)
    assert {name: _text_and_cron(deployment) for name, deployment in before.items()} == FIRST
    running = start_run(api, before["b"]["id"], parameters={"seconds": 600, "until": "enough"})
    wait_until(lambda: get_run(api, running)["state_type"] == "RUNNING", "the run to run", 300)

    files_release.deploy_file(values, "second.yaml", "640Mi")
    assert get_run(api, running)["state_type"] == "RUNNING"
    now = _read_deployments(api)
    assert _text_and_cron(now["a"]) == ("second", "0 7 * * *")
    assert now["a"]["id"] == before["a"]["id"], "the deployment keeps its runs"
    assert _text_and_cron(now["c"]) == ("second", "30 7 * * *")
    assert now["b"]["paused"], "a paused deployment starts no run"
    assert _read_memory_limit(api) == "640Mi"
    api.post("/variables/", json={"name": "enough", "value": True}).raise_for_status()
    outcome = wait_until_ended(api, running)
    assert (outcome["state_type"], outcome["run_count"]) == ("COMPLETED", 1)
    files_release.deploy_file(values, "second.yaml", "640Mi")
    assert set(_read_deployments(api)) == {"a", "c"}


@pytest.mark.further
def test_worker_that_stops_watching_is_restarted(files_release: FilesRelease) -> None:
    """Without the right to watch, the worker's watchers give up, while it still polls the server."""
    namespace, name = files_release.namespace, f"{files_release.name}-prefect-work-pool-worker"
    files_release.wait_for_one_worker()
    [old] = files_release.pods("worker")
    with namespace.without("rolebinding", name):
        namespace.kubectl("delete", "pod", old["metadata"]["name"])

        def find_restarted() -> str:
            for pod in files_release.pods("worker"):
                if any(status["restartCount"] for status in pod["status"].get("containerStatuses", [])):
                    return str(pod["metadata"]["name"])
            return ""

        worker = wait_until(find_restarted, "the worker's container to be restarted", 300)
        assert "No longer watching" in namespace.kubectl("logs", worker, "--previous")
    namespace.kubectl("rollout", "status", f"deployment/{name}", "--timeout=300s")


@pytest.mark.further
def test_rollback_restores_the_previous_files(
    files_release: FilesRelease, first_revision: str, api: httpx.Client
) -> None:
    assert {name: _text_and_cron(deployment) for name, deployment in _read_deployments(api).items()} != FIRST
    files_release.helm("rollback", files_release.name, first_revision, "--wait", "--timeout", "10m")
    restored = _read_deployments(api)
    assert {name: _text_and_cron(deployment) for name, deployment in restored.items()} == FIRST
    assert not any(deployment["paused"] for deployment in restored.values())
    assert _read_memory_limit(api) == "700Mi"
    # An idle worker takes the processor from other tests.
    files_release.helm("uninstall", files_release.name, "--wait")


def _count_drifted_objects(pool: Pool) -> float:
    """Return the number of drifted objects in the metrics of drift detection; -1 before its first look."""
    [pod] = pool.pods("drift")
    path = f"/api/v1/namespaces/{pool.namespace.name}/pods/{pod['metadata']['name']}:8080/proxy/metrics"
    lines = pool.namespace.kubectl("get", "--raw", path).splitlines()
    counts = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("desired_state_drifted_objects")]
    return sum(counts) if counts else -1


@pytest.mark.further
def test_manual_change_on_the_server_is_reported_as_drift(pool: Pool, api: httpx.Client) -> None:
    """An artifact and a metric report the drift until the object equals the last sync again."""
    wait_until(lambda: _count_drifted_objects(pool) == 0, "nothing to have drifted", 180 + DRIFT_SECONDS)
    daily = api.get("/deployments/name/dbt-pipeline/dbt-pipeline-daily").raise_for_status().json()

    def describe(text: str) -> None:
        api.patch(f"/deployments/{daily['id']}", json={"description": text}).raise_for_status()

    def list_artifacts() -> list[Object]:
        body = {"artifacts": {"key": {"like_": "drift-%"}}, "sort": "CREATED_DESC"}
        found: list[Object] = api.post("/artifacts/filter", json=body).raise_for_status().json()
        return found

    describe("by hand")
    wait_until(lambda: _count_drifted_objects(pool) == 1, "the metric to count it", 180 + DRIFT_SECONDS)
    # The metric comes first. The newest artifact may be that of an earlier check.
    wait_until(lambda: "dbt-pipeline/dbt-pipeline-daily" in str(list_artifacts()[:1]), "the artifact to name it")
    describe(daily["description"])
    wait_until(lambda: _count_drifted_objects(pool) == 0, "the metric to be zero again", 180 + DRIFT_SECONDS)


@pytest.mark.further
def test_refused_sync_fails_the_release_with_the_cause(pool: Pool, values: Object) -> None:
    """The previous worker keeps running."""
    pool.wait_for_one_worker()
    running = {pod["metadata"]["name"] for pod in pool.pods("worker")}
    data = {"worker": "a:b", "reconciler": "a:b", "sync": "a:b", "run-key": "k" * 32}
    pool.namespace.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "wrong"}, "stringData": data})
    with pytest.raises(ClusterError) as caught:
        pool.deploy(merge_values(values, {"api": {"auth": {"rolesSecret": "wrong"}}, "sync": {"backoffLimit": 0}}))
    assert "sync" in str(caught.value)
    log = pool.namespace.kubectl("logs", f"job/{POOL_RELEASE}-sync", "-c", "sync")
    assert "Authentication failed (401)" in log
    assert "Traceback" not in log
    assert {pod["metadata"]["name"] for pod in pool.pods("worker")} == running


WAREHOUSE = {"name": "WAREHOUSE_URL", "valueFrom": {"secretKeyRef": {"name": "warehouse", "key": "url"}}}

MISSING: dict[str, Object] = {
    "api.auth.rolesSecret names the Secret absent: namespace": {"api": {"auth": {"rolesSecret": "absent"}}},
    "api.auth.existingSecret names the Secret absent: namespace": {
        "api": {"auth": {"existingSecret": "absent", "rolesSecret": ""}}
    },
    "names the key user: Secret prefect-server-api-roles": {
        "api": {"auth": {"existingSecret": "prefect-server-api-roles", "key": "user", "rolesSecret": ""}}
    },
    "api.auth.rolesSecret names the key worker: Secret incomplete": {"api": {"auth": {"rolesSecret": "incomplete"}}},
    "runs.env: WAREHOUSE_URL names the Secret warehouse: namespace": {"runs": {"env": [WAREHOUSE]}},
}
"""Changes of the values that name a missing Secret or key, by a part of the message."""


@pytest.mark.further
def test_missing_secret_is_refused_before_anything_is_changed(pool: Pool, values: Object) -> None:
    incomplete = {"kind": "Secret", "metadata": {"name": "incomplete"}, "stringData": {"sync": "a:b"}}
    pool.namespace.apply({"apiVersion": "v1", **incomplete})
    revisions = pool.helm("history", POOL_RELEASE, "-o", "json")
    for message, change in MISSING.items():
        with pytest.raises(ClusterError) as caught:
            pool.deploy(merge_values(values, change))
        assert message in str(caught.value)
    assert pool.helm("history", POOL_RELEASE, "-o", "json") == revisions


@pytest.mark.further
def test_uninstall_keeps_only_the_pool_on_the_server(pool: Pool, values: Object, api: httpx.Client) -> None:
    pool.deploy(values)
    kinds = "deploy,jobs,roles,rolebindings,services,secrets,configmaps,networkpolicies,serviceaccounts,pods"

    def list_objects() -> list[str]:
        selector = f"app.kubernetes.io/instance={POOL_RELEASE}"
        listed = json.loads(pool.namespace.kubectl("get", kinds, "-l", selector, "-o", "json"))
        return [f"{found['kind']}/{found['metadata']['name']}" for found in listed["items"] if found["kind"] != "Pod"]

    assert f"Deployment/{POOL_RELEASE}-worker" in list_objects()
    pool.helm("uninstall", POOL_RELEASE, "--wait")
    assert list_objects() == [f"ServiceAccount/{POOL_RELEASE}-drift"]
    assert api.get(f"/work_pools/{pool.work_pool}").status_code == 200
