"""The work pool's chart on a real cluster: every run a pod, with what it was given, whatever happens to the worker."""

import copy
import json
from collections.abc import Callable, Iterator
from datetime import datetime

import httpx
import pytest
import yaml

from orchestration.errors import ClusterError
from tests.e2e.release import SMALL_REQUESTS, Object, Pool, Release, merge_values
from tests.e2e.runs import create_deployment, get_run, start_run, wait_for_log, wait_until_ended
from tests.helm.rendering import environment
from tests.parts import wait_until

POOL_RELEASE = "prefect-work-pool"


def find_job(pool: Pool, run: str) -> Object:
    """The run's Job."""
    found = json.loads(pool.namespace.kubectl("get", "jobs", "-l", f"prefect.io/flow-run-id={run}", "-o", "json"))
    [job] = found["items"]
    return dict(job)


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    """Those of the pool that the deployments of prefect.yaml name."""
    return merge_values(values, {"pool": {"name": "default"}})


@pytest.fixture(scope="module")
def each_minute(pool: Pool, api: httpx.Client) -> str:
    """A deployment with a schedule of each minute, which comes round while other tests go on; its id."""
    schedules = [{"schedule": {"cron": "* * * * *"}, "active": True}]
    return create_deployment(api, pool, parameters={"text": "each minute"}, schedules=schedules)


def test_it_starts_from_nothing_without_a_restart(pool: Pool, api: httpx.Client) -> None:
    restarts = pool.restarts()
    assert len(restarts) == 3, "worker, drift and reconciler"
    assert not any(restarts.values()), restarts
    assert "Phase:          Succeeded" in pool.helm("test", POOL_RELEASE)
    found = api.post("/deployments/filter", json={}).json()
    assert {"dbt-pipeline-daily", "backfill"} <= {each["name"] for each in found}
    [daily] = [each for each in found if each["name"] == "dbt-pipeline-daily"]
    assert daily["work_pool_name"] == "default"
    assert daily["schedules"][0]["schedule"]["cron"] == "0 6 * * *"


def test_memory_variables_and_image_of_a_deployment_and_of_a_run_reach_the_pod(
    pool: Pool, api: httpx.Client, image: str, each_minute: str
) -> None:
    repository, _, tag = image.rpartition(":")
    by_digest = f"{repository}@{_digest(repository, tag)}"
    made = create_deployment(api, pool, job_variables={"memory_limit": "600Mi", "env": {"GREETING": "deployment"}})
    of_deployment = start_run(api, made)
    of_run = start_run(
        api, made, job_variables={"memory_limit": "650Mi", "env": {"GREETING": "run"}, "image": by_digest}
    )
    for run, memory, greeting, name in (
        (of_deployment, "600Mi", "deployment", image),
        (of_run, "650Mi", "run", by_digest),
    ):
        assert wait_until_ended(api, run)["state_type"] == "COMPLETED"
        [container] = find_job(pool, run)["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"] == {"memory": memory}
        assert container["resources"]["requests"] == SMALL_REQUESTS
        assert container["image"] == name
        assert wait_for_log(api, run, f"text= GREETING={greeting}")


def _digest(repository: str, tag: str) -> str:
    """The registry's digest of a tag."""
    host, _, name = repository.partition("/")
    accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
    found = httpx.head(f"http://{host}/v2/{name}/manifests/{tag}", headers={"Accept": accept})
    return str(found.raise_for_status().headers["Docker-Content-Digest"])


def test_a_run_has_no_token_no_password_and_no_way_to_the_servers_database(
    pool: Pool, server: Release, api: httpx.Client
) -> None:
    ports = {"api": 4200, "database": 5432, "redis": 6379}
    addresses = [f"prefect-server-{name}.{server.namespace.name}:{port}" for name, port in ports.items()]
    run = start_run(api, create_deployment(api, pool), parameters={"addresses": addresses})
    assert wait_until_ended(api, run)["state_type"] == "COMPLETED"
    lines = wait_for_log(api, run, f"reaches {addresses[-1]}")
    assert "token=False services=False" in lines
    assert [line for line in lines if line.startswith("reaches")] == [
        f"reaches {addresses[0]}: True",
        f"reaches {addresses[1]}: False",
        f"reaches {addresses[2]}: False",
    ]
    manifest = json.dumps(find_job(pool, run))
    assert server.secret("prefect-server-auth", "auth-string") not in manifest
    [container] = find_job(pool, run)["spec"]["template"]["spec"]["containers"]
    # The run's own credential, which is worth nothing beyond the run.
    credential = str(environment(container)["PREFECT_API_AUTH_STRING"])
    assert credential.startswith(f"run-{run}:")
    assert server.secret("prefect-server-api-roles", "run-key") not in manifest


def test_a_schedule_of_each_minute_fires_by_itself_and_runs_as_a_pod(
    pool: Pool, api: httpx.Client, each_minute: str
) -> None:
    """With the parameters of the deployment; its logs, states and artifact are in the API."""
    runs = {"deployments": {"id": {"any_": [each_minute]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}

    def first() -> Object | None:
        found = api.post("/flow_runs/filter", json=runs).json()
        return found[0] if found else None

    run: Object = wait_until(first, "the schedule's first run to complete", 150)
    api.delete(f"/deployments/{each_minute}")
    assert run["auto_scheduled"] is True
    assert wait_for_log(api, run["id"], "text=each minute")
    states = api.get("/flow_run_states/", params={"flow_run_id": run["id"]}).json()
    assert [state["type"] for state in sorted(states, key=lambda state: state["timestamp"])][-2:] == [
        "RUNNING",
        "COMPLETED",
    ]
    artifacts = api.post("/artifacts/filter", json={"artifacts": {"flow_run_id": {"any_": [run["id"]]}}}).json()
    assert [artifact["data"] for artifact in artifacts] == ["# each minute"]
    pod = json.loads(pool.namespace.kubectl("get", "pods", "-l", f"prefect.io/flow-run-id={run['id']}", "-o", "json"))
    [pod] = pod["items"]
    assert pod["metadata"]["ownerReferences"][0]["kind"] == "Job"
    assert pod["metadata"]["labels"]["prefect.io/role"] == "flow-run"


def test_ten_runs_at_once_complete_though_the_worker_is_replaced_among_them(pool: Pool, api: httpx.Client) -> None:
    """The worker that is deleted makes the Jobs of what it has claimed; its successor takes the rest."""
    made = create_deployment(api, pool)
    [worker] = pool.pods("worker")
    runs = [start_run(api, made, parameters={"text": str(number)}) for number in range(10)]

    def some_claimed() -> bool:
        return any(get_run(api, run)["state_type"] != "SCHEDULED" for run in runs)

    wait_until(some_claimed, "the worker to claim runs", 120)
    pool.namespace.kubectl("delete", "pod", worker["metadata"]["name"], "--wait=false")
    outcomes = [wait_until_ended(api, run, 300) for run in runs]
    assert {outcome["state_type"] for outcome in outcomes} == {"COMPLETED"}
    assert {outcome["run_count"] for outcome in outcomes} == {1}


def _max_concurrent_runs(api: httpx.Client, runs: list[str]) -> int:
    """How many of the ended runs held a slot of their pool at the same time: from Pending to the end."""
    moments = []
    for run in runs:
        states = api.get("/flow_run_states/", params={"flow_run_id": run}).json()
        times = {state["type"]: datetime.fromisoformat(state["timestamp"]) for state in states}
        moments += [(times["PENDING"], 1), (times["COMPLETED"], -1)]
    most = now = 0
    for _, change in sorted(moments):
        now += change
        most = max(most, now)
    return most


def test_an_upgrade_changes_pool_and_template_and_a_rollback_takes_it_back(
    pool: Pool, values: Object, api: httpx.Client
) -> None:
    """The pool's new limit holds; a run that is under way is not disturbed by either."""
    made = create_deployment(api, pool)
    under_way = start_run(api, made, parameters={"seconds": 60})
    wait_until(lambda: get_run(api, under_way)["state_type"] == "RUNNING", "the run to run", 120)
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
    runs = [start_run(api, made, parameters={"seconds": 2}) for _ in range(5)]
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
    assert wait_until_ended(api, under_way)["state_type"] == "COMPLETED"
    assert get_run(api, under_way)["run_count"] == 1


def _deployment_in_file(name: str, text: str, cron: str) -> Object:
    """A deployment of the probe on the pool `files`, as a file has it."""
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


@pytest.fixture
def of_files(pool: Pool, values: Object) -> Iterator[tuple[Release, Callable[[str, str], None]]]:
    """A second release, of the pool `files`, and how it is deployed: with which of `FILES`, and how much for a run."""
    texts = {name: yaml.safe_dump(each) for name, each in FILES.items()}
    pool.namespace.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "files"}, "data": texts})
    release = Release("prefect-work-pool", "files", pool.namespace)

    def deploy(file: str, memory: str) -> None:
        volumes = {
            "volumes": [{"name": name, "configMap": {"name": name}} for name in ("files", "probe")],
            "volumeMounts": [{"name": name, "mountPath": f"/{name}"} for name in ("files", "probe")],
        }
        wanted = merge_values(values, {"pool": {"name": "files"}})
        wanted["sync"] = {"files": [f"/files/{file}"], "pod": volumes, "backoffLimit": 0}
        wanted["runs"]["resources"]["limits"]["memory"] = memory
        release.deploy(wanted)

    try:
        yield release, deploy
    finally:
        release.helm("uninstall", release.name, "--wait", "--ignore-not-found")


def test_an_upgrade_brings_the_server_to_what_the_files_say_and_a_rollback_takes_it_back(
    of_files: tuple[Release, Callable[[str, str], None]], api: httpx.Client
) -> None:
    """Added, changed, removed, the template too, while a run of what is removed is under way: that one completes."""
    release, deploy = of_files

    def there() -> dict[str, Object]:
        pools = {"name": {"any_": ["files"]}}
        found = api.post("/deployments/filter", json={"work_pools": pools}).raise_for_status().json()
        return {each["name"]: each for each in found}

    def memory() -> str:
        found = api.get("/work_pools/files").raise_for_status().json()
        return str(found["base_job_template"]["variables"]["properties"]["memory_limit"]["default"])

    def said(found: Object) -> tuple[str, str]:
        [schedule] = found["schedules"]
        return found["parameters"]["text"], schedule["schedule"]["cron"]

    deploy("first.yaml", "700Mi")
    revision = release.revision()
    before = there()
    first = {name: said(each) for name, each in before.items()}
    assert first == {"a": ("first", "0 6 * * *"), "b": ("first", "30 6 * * *")}
    under_way = start_run(api, before["b"]["id"], parameters={"seconds": 600, "until": "enough"})
    wait_until(lambda: get_run(api, under_way)["state_type"] == "RUNNING", "the run to run", 120)

    deploy("second.yaml", "640Mi")
    assert get_run(api, under_way)["state_type"] == "RUNNING"
    now = there()
    assert said(now["a"]) == ("second", "0 7 * * *")
    assert now["a"]["id"] == before["a"]["id"], "it keeps its runs"
    assert said(now["c"]) == ("second", "30 7 * * *")
    assert now["b"]["paused"], "nothing of it starts any more"
    assert memory() == "640Mi"
    api.post("/variables/", json={"name": "enough", "value": True}).raise_for_status()
    outcome = wait_until_ended(api, under_way)
    assert (outcome["state_type"], outcome["run_count"]) == ("COMPLETED", 1)
    deploy("second.yaml", "640Mi")
    assert set(there()) == {"a", "c"}

    release.helm("rollback", release.name, revision, "--wait", "--timeout", "10m")
    assert {name: said(each) for name, each in there().items()} == first
    assert not any(each["paused"] for each in there().values())
    assert memory() == "700Mi"


def _count_drifted_objects(pool: Pool) -> float:
    """How many things drift counts, as Prometheus would read it."""
    [pod] = pool.pods("drift")
    path = f"/api/v1/namespaces/{pool.namespace.name}/pods/{pod['metadata']['name']}:8080/proxy/metrics"
    lines = pool.namespace.kubectl("get", "--raw", path).splitlines()
    counts = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("desired_state_drifted_objects")]
    assert counts
    return sum(counts)


def test_what_somebody_changes_on_the_server_is_seen_as_drift(pool: Pool, api: httpx.Client) -> None:
    """In the UI as an artifact and for an alert as a metric, until it is as the last sync left it."""
    wait_until(lambda: _count_drifted_objects(pool) == 0, "nothing to have drifted")
    daily = api.get("/deployments/name/dbt-pipeline/dbt-pipeline-daily").raise_for_status().json()

    def describe(text: str) -> None:
        api.patch(f"/deployments/{daily['id']}", json={"description": text}).raise_for_status()

    def artifacts() -> list[Object]:
        body = {"artifacts": {"key": {"like_": "drift-%"}}, "sort": "CREATED_DESC"}
        found: list[Object] = api.post("/artifacts/filter", json=body).raise_for_status().json()
        return found

    describe("by hand")
    wait_until(lambda: _count_drifted_objects(pool) == 1, "the metric to count it")
    # The metric comes first, and an artifact of an earlier look may be there.
    wait_until(lambda: "dbt-pipeline/dbt-pipeline-daily" in str(artifacts()[:1]), "the artifact to name it")
    describe(daily["description"])
    wait_until(lambda: _count_drifted_objects(pool) == 0, "the metric to be back")


def test_a_worker_that_no_longer_watches_is_started_again(pool: Pool, values: Object) -> None:
    """Without the right to watch, its watchers give up; polling alone would have kept it green.

    It watches where no reconciler does.
    """
    namespace = pool.namespace
    pool.deploy(merge_values(values, {"reconciler": {"enabled": False}}))
    try:
        [old] = pool.pods("worker")
        with namespace.without("rolebinding", f"{POOL_RELEASE}-worker"):
            namespace.kubectl("delete", "pod", old["metadata"]["name"])
            wait_until(lambda: any(pool.restarts().values()), "the worker's container to be restarted", 240)
            [worker] = pool.pods("worker")
            before = namespace.kubectl("logs", worker["metadata"]["name"], "--previous")
            assert "No longer watching" in before
        namespace.kubectl("rollout", "status", f"deployment/{POOL_RELEASE}-worker", "--timeout=180s")
    finally:
        pool.deploy(values)


def test_what_the_server_refuses_fails_the_release_with_the_reason(
    pool: Pool, values: Object, api: httpx.Client
) -> None:
    """And the worker that was there before goes on."""
    running = {pod["metadata"]["name"] for pod in pool.pods("worker")}
    api.post("/work_pools/", json={"name": "taken", "type": "process"}).raise_for_status()
    wrong: dict[str, Object] = {
        "work pool taken exists and is of type process, not kubernetes": {"pool": {"name": "taken"}},
        "Authentication failed (401)": {"api": {"auth": {"rolesSecret": "wrong"}}},
        "/app/absent.yaml does not exist": {"sync": {"files": ["/app/absent.yaml"]}},
    }
    data = {"worker": "a:b", "reconciler": "a:b", "sync": "a:b", "run-key": "k" * 32}
    pool.namespace.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "wrong"}, "stringData": data})
    for reason, change in wrong.items():
        with pytest.raises(ClusterError) as caught:
            pool.deploy(merge_values(merge_values(values, change), {"sync": {"backoffLimit": 0}}))
        assert "sync" in str(caught.value)
        log = pool.namespace.kubectl("logs", f"job/{POOL_RELEASE}-sync", "-c", "sync")
        assert reason in log
        assert "Traceback" not in log
    assert {pod["metadata"]["name"] for pod in pool.pods("worker")} == running


WAREHOUSE = {"name": "WAREHOUSE_URL", "valueFrom": {"secretKeyRef": {"name": "warehouse", "key": "url"}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"api": {"auth": {"existingSecret": "absent", "rolesSecret": ""}}},
            "api.auth.existingSecret names the Secret absent: namespace",
        ),
        (
            {"api": {"auth": {"key": "user", "rolesSecret": ""}}},
            "names the key user: Secret prefect-server-auth",
        ),
        (
            {"api": {"auth": {"rolesSecret": "prefect-server-auth"}}},
            "api.auth.rolesSecret names the key worker: Secret prefect-server-auth",
        ),
        ({"runs": {"env": [WAREHOUSE]}}, "runs.env: WAREHOUSE_URL names the Secret warehouse: namespace"),
    ],
)
def test_a_missing_secret_is_found_before_anything_is_changed(
    pool: Pool, values: Object, change: Object, message: str
) -> None:
    revisions = pool.helm("history", POOL_RELEASE, "-o", "json")
    with pytest.raises(ClusterError) as caught:
        pool.deploy(merge_values(values, change))
    assert message in str(caught.value)
    assert pool.helm("history", POOL_RELEASE, "-o", "json") == revisions


def test_uninstalled_nothing_stays_but_the_pool_on_the_server(pool: Pool, values: Object, api: httpx.Client) -> None:
    pool.deploy(values)
    pool.helm("uninstall", POOL_RELEASE, "--wait")
    kinds = "deploy,jobs,roles,rolebindings,services,secrets,configmaps,networkpolicies,serviceaccounts,pods"
    listed = json.loads(
        pool.namespace.kubectl("get", kinds, "-l", f"app.kubernetes.io/instance={POOL_RELEASE}", "-o", "json")
    )
    left = [f"{each['kind']}/{each['metadata']['name']}" for each in listed["items"]]
    assert [name for name in left if not name.startswith("Pod/")] == []
    assert api.get(f"/work_pools/{pool.work_pool}").status_code == 200
