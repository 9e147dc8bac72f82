"""The server's chart on a real cluster: install, refuse, upgrade, roll back, uninstall, in order."""

import base64
import contextlib
import copy
import functools
import json
import re
from collections.abc import Iterator
from uuid import uuid4

import httpx
import pytest

from orchestration.errors import ClusterError
from orchestration.operations import backups, restore
from orchestration.operations.environment import Environment
from orchestration.operations.release_diagnosis import explain_release
from tests.cluster.namespace import Namespace, restricted
from tests.e2e.release import Object, Release, calm_server_values, merge_values
from tests.e2e.runs import read
from tests.parts import wait_until

SERVER_RELEASE = "prefect-server"


@pytest.fixture(scope="module")
def values(image: str) -> Object:
    return calm_server_values(image) | {"backup": {"enabled": True}}


@pytest.fixture(scope="module")
def server(cluster: str, values: Object) -> Iterator[Release]:
    """Install a server in a new namespace that enforces the restricted standard."""
    with restricted(cluster, "server") as namespace:
        release = Release("prefect-server", SERVER_RELEASE, namespace)
        release.deploy(values)
        yield release


@pytest.fixture
def api(server: Release) -> Iterator[httpx.Client]:
    """Yield a client of the Prefect API, with the generated password."""
    with server.api() as client:
        yield client


def test_server_starts_from_nothing_without_a_restart(server: Release) -> None:
    restarts = server.restarts()
    assert len(restarts) == 6, "API, services, migrations, database, Valkey, the first pod of the backups' volume"
    assert not any(restarts.values()), restarts
    assert "Phase:          Succeeded" in server.helm("test", SERVER_RELEASE)


def test_install_job_alone_migrates_the_schema(server: Release) -> None:
    selection = ("--selector", f"app.kubernetes.io/instance={SERVER_RELEASE}", "--all-containers", "--prefix")
    logs = server.namespace.kubectl("logs", *selection, "--tail=-1", "--max-log-requests=20")
    [migration] = [line for line in logs.splitlines() if "The schema went from" in line]
    assert migration.startswith(f"[pod/{SERVER_RELEASE}-migrations-1-")
    assert "The schema went from nothing to" in migration


def test_api_requires_the_password(server: Release, api: httpx.Client) -> None:
    assert api.post("/work_pools/filter", json={}).status_code == 200
    assert api.get(str(api.base_url).replace("/api/", "/")).text.lstrip().lower().startswith("<!doctype html>")
    for auth in (None, ("admin", "wrong")):
        refused = httpx.post(f"{api.base_url}work_pools/filter", json={}, auth=auth, timeout=30)
        assert refused.status_code == 401


def test_events_reach_the_services_through_valkey(api: httpx.Client) -> None:
    """The API's process receives the event, and the services' process stores it."""
    flow = api.post("/flows/", json={"name": f"flow-{uuid4().hex[:6]}"}).json()
    run = api.post("/flow_runs/", json={"flow_id": flow["id"], "state": {"type": "SCHEDULED"}}).json()
    resource = {"id": [f"prefect.flow-run.{run['id']}"]}

    def is_stored() -> bool:
        return bool(read(api, "POST", "/events/filter", json={"filter": {"any_resource": resource}})["events"])

    wait_until(is_stored, "the event to be stored")


def test_services_schedule_runs_without_an_error(server: Release, api: httpx.Client) -> None:
    """A service reports its errors in its log only."""
    flow = api.post("/flows/", json={"name": "scheduled"}).json()
    schedules = [{"schedule": {"cron": "0 6 * * *"}, "active": True}]
    deployment = api.post("/deployments/", json={"name": "daily", "flow_id": flow["id"], "schedules": schedules}).json()
    runs = {"deployments": {"id": {"any_": [deployment["id"]]}}, "limit": 1}
    wait_until(lambda: read(api, "POST", "/flow_runs/filter", json=runs), "the schedule's runs", 300)
    log = server.namespace.kubectl("logs", f"deployment/{SERVER_RELEASE}-services", "--tail=-1")
    assert not [line for line in log.splitlines() if "ERROR" in line or "Traceback" in line]


@pytest.mark.further
def test_other_pods_reach_the_api_and_neither_database_nor_valkey(server: Release, namespace: Namespace) -> None:
    namespace.pod("stranger")
    server.namespace.pod("neighbour")
    home = server.namespace.name
    for source, pod in ((namespace, "stranger"), (server.namespace, "neighbour")):
        reach = functools.partial(source.connects, pod, f"{SERVER_RELEASE}-api.{home}.svc.cluster.local", 4200)
        wait_until(reach, "the cluster's DNS to have the API's address")
        assert not source.connects(pod, f"{SERVER_RELEASE}-database.{home}.svc.cluster.local", 5432)
        assert not source.connects(pod, f"{SERVER_RELEASE}-redis.{home}.svc.cluster.local", 6379)
    server.namespace.kubectl("delete", "pod", "neighbour")


def test_upgrade_failed_upgrade_and_rollback_keep_passwords_and_data(server: Release, values: Object) -> None:
    """The failed upgrade leaves the server running. The rollback takes both upgrades back."""

    def read_secrets() -> list[str]:
        keys = (("auth", "auth-string"), ("database", "password"), ("encryption-key",) * 2, ("redis", "password"))
        return [server.secret(f"{SERVER_RELEASE}-{name}", key) for name, key in keys]

    before = read_secrets()
    database = server.pods("database")[0]["metadata"]["uid"]
    with server.api() as api:
        pool = f"pool-{uuid4().hex[:6]}"
        assert api.post("/work_pools/", json={"name": pool, "type": "kubernetes"}).status_code == 201
    changed = copy.deepcopy(values)
    # Not the settings of all components: the services would be replaced, too.
    changed["api"] |= {"settings": {"PREFECT_SERVER_API_DEFAULT_LIMIT": 123}}
    revision = server.revision()
    server.deploy(changed)
    assert read_secrets() == before
    assert server.pods("database")[0]["metadata"]["uid"] == database, "the database was not restarted"
    wait_until(lambda: len(server.pods("api", terminating=True)) == 1, "the previous pod of the API to be gone")
    environment = server.pods("api")[0]["spec"]["containers"][0]["env"]
    assert {"name": "PREFECT_SERVER_API_DEFAULT_LIMIT", "value": "123"} in environment
    with server.api() as api:
        assert api.get(f"/work_pools/{pool}").status_code == 200
    running = {pod["metadata"]["name"] for pod in server.pods("api")}
    changed["image"]["tag"] = "absent"

    def refused() -> bool:
        states = [
            status.get("state", {}).get("waiting", {}).get("reason")
            for pod in server.pods("api")
            for status in pod["status"].get("initContainerStatuses", [])
        ]
        return bool({"ErrImagePull", "ImagePullBackOff"} & set(states))

    server.deploy(changed, wait=False)
    try:
        wait_until(refused, "the image to be refused")
        with server.api() as api:
            assert api.post("/work_pools/filter", json={}).status_code == 200
        assert running <= {pod["metadata"]["name"] for pod in server.pods("api")}
    finally:
        server.helm("rollback", SERVER_RELEASE, revision, "--wait", "--timeout", "10m")
    wait_until(lambda: len(server.pods("api", terminating=True)) == 1, "the previous pods of the API to be gone")
    assert read_secrets() == before
    with server.api() as api:
        assert api.get(f"/work_pools/{pool}").status_code == 200


def test_restored_backup_replaces_the_database_and_holds_unknown_runs(
    server: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = Environment("test", server.namespace.context, server.namespace.name)
    with server.api() as api:
        flow = api.post("/flows/", json={"name": f"flow-{uuid4().hex[:6]}"}).json()["id"]
        deployment = api.post("/deployments/", json={"name": "restored", "flow_id": flow}).json()["id"]
        run = api.post(f"/deployments/{deployment}/create_flow_run", json={"state": {"type": "SCHEDULED"}}).json()
        backups.back_up(environment)
        assert "The backup of prefect is verified: " in capsys.readouterr().out
        assert api.delete(f"/deployments/{deployment}").status_code == 204
        assert api.get(f"/flow_runs/{run['id']}").status_code == 404, "it went with its deployment"
    backups.list_backups(environment, as_json=False)
    [line, last] = capsys.readouterr().out.splitlines()
    assert re.match(r"\d{8}T\d{6}Z +\d+\.\d MiB +\d+ rows  schema \w+  plain", line)
    assert re.match(r"Last verified: \d{4}-", last)
    with pytest.raises(ClusterError, match="There is no backup absent in file:///backups"):
        restore.restore(environment, "absent", identity=None, start_unknown=False)
    restore.restore(environment, "newest", identity=None, start_unknown=False)
    # A person deleted the run since the backup, so the replaced database does not tell what it did.
    printed = capsys.readouterr().out
    assert re.search(rf"For a person:(.*\n)+ +{run['name']} +(Scheduled|Late) -> Held", printed), printed
    with server.api() as api:
        assert api.get(f"/deployments/{deployment}").status_code == 200
        assert api.get(f"/flow_runs/{run['id']}").json()["state_name"] == "Held"
    assert {
        workload["metadata"]["name"]: workload["spec"]["replicas"] for workload in environment.objects("deployments")
    } == {f"{SERVER_RELEASE}-{name}": 1 for name in ("api", "services", "redis")}


@pytest.mark.further
def test_missing_secret_is_refused_before_anything_is_changed(server: Release, values: Object) -> None:
    revisions = server.helm("history", SERVER_RELEASE, "-o", "json")
    with pytest.raises(ClusterError) as caught:
        server.deploy(copy.deepcopy(values) | {"auth": {"existingSecret": "absent"}})
    assert "auth.existingSecret names the Secret absent: namespace" in str(caught.value)
    assert server.helm("history", SERVER_RELEASE, "-o", "json") == revisions


EXTERNAL_DATABASE: Object = {
    "database": {"bundled": {"enabled": False}, "external": {"existingSecret": "db"}},
    "redis": {"bundled": {"enabled": False}},
    "services": {"separate": False},
    "backup": {"enabled": False},
}
"""Values of a server with an external database, in as few pods as possible."""


@pytest.mark.further
def test_wrong_password_of_an_external_database_is_reported(
    namespace: Namespace, server: Release, values: Object
) -> None:
    url = f"postgresql+asyncpg://prefect:wrong@{SERVER_RELEASE}-database.{server.namespace.name}:5432/prefect"
    encoded = base64.b64encode(url.encode()).decode()
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "db"}, "data": {"connection-url": encoded}}
    namespace.apply(secret)
    release = Release("prefect-server", "other", namespace)

    def read_log() -> str:
        try:
            return namespace.kubectl("logs", "job/other-prefect-server-migrations-1")
        except ClusterError:
            return ""

    with server.namespace.without("networkpolicy", f"{SERVER_RELEASE}-database"):
        # A pod of the API would fail in the same way, several times, and import Prefect each time.
        release.deploy(merge_values(values | EXTERNAL_DATABASE, {"api": {"replicas": 0}}), wait=False)
        log = wait_until(lambda: "cannot be used" in (text := read_log()) and text, "the reason", 300)
        last = log.strip().splitlines()[-1]
        assert 'password authentication failed for user "prefect"' in last
        assert "wrong@" not in log
        assert "Check the Secret" in last
        assert "Traceback" not in log
        environment = Environment("test", namespace.context, namespace.name)
        # Each attempt of the Job logs the message at another time.
        message = last.partition(" ERROR ")[2]
        assert message
        wait_until(
            lambda: any(message in line for line in explain_release(environment, "other")),
            "the reason in the diagnosis",
        )


@pytest.mark.further
def test_unreachable_database_is_named(namespace: Namespace, values: Object) -> None:
    """The pods that wait for the database name it, and the diagnosis of a failed deploy repeats their message."""
    url = "postgresql+asyncpg://prefect:secret@nowhere.invalid:5432/prefect"
    namespace.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "db"}, "stringData": {"connection-url": url}}
    )
    release = Release("prefect-server", "other", namespace)
    release.deploy(copy.deepcopy(values) | EXTERNAL_DATABASE, wait=False)
    environment = Environment("test", namespace.context, namespace.name)

    def is_waiting() -> bool:
        logs = ("logs", "deployment/other-prefect-server-api", "--container=wait-for-migrations")
        with contextlib.suppress(ClusterError):  # the container has not started
            return "Waiting for the database" in namespace.kubectl(*logs)
        return False

    # Cheaper than the diagnosis, which reads all objects, events and logs.
    wait_until(is_waiting, "the pod to wait", 300)

    def find_waiting_lines() -> list[str]:
        return [line for line in explain_release(environment, "other") if "Waiting for the database" in line]

    [line, *_] = wait_until(find_waiting_lines, "the reason", 300)
    message = r"Waiting for the database postgresql\+asyncpg://prefect:\*\*\*@nowhere\.invalid"
    assert re.search(rf"wait-for-migrations: \S+Z INFO {message}", line), line


@pytest.mark.further
def test_uninstall_keeps_only_the_volume_and_its_secrets(server: Release) -> None:
    server.helm("uninstall", SERVER_RELEASE, "--wait")
    # Jobs of `make backups` and `make restore` belong to the CronJob, so Kubernetes deletes them a little later.
    wait_until(lambda: not json.loads(server.namespace.kubectl("get", "jobs", "-o", "json"))["items"], "no Job")
    kinds = "deploy,sts,jobs,services,secrets,configmaps,networkpolicies,serviceaccounts,pvc"
    listed = json.loads(server.namespace.kubectl("get", kinds, "-o", "json"))["items"]
    left = sorted(f"{found['kind']}/{found['metadata']['name']}" for found in listed)
    assert left == [
        "ConfigMap/kube-root-ca.crt",
        f"PersistentVolumeClaim/data-{SERVER_RELEASE}-database-0",
        f"PersistentVolumeClaim/{SERVER_RELEASE}-backups",
        f"Secret/{SERVER_RELEASE}-database",
        f"Secret/{SERVER_RELEASE}-encryption-key",
        "ServiceAccount/default",
        f"ServiceAccount/{SERVER_RELEASE}-database",
        f"ServiceAccount/{SERVER_RELEASE}-redis",
    ]
