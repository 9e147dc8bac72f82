"""Attacks with the credential of a flow run and with the worker's token, on a real cluster."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from uuid import UUID

import httpx
import pytest

from orchestration.access.credentials import RUN_KEY_FILE, sign_run
from orchestration.errors import ClusterError
from orchestration.prefect_api import Access
from orchestration.settings import ROOT
from tests.cluster.namespace import Namespace, restricted
from tests.e2e.light_runs import LIGHT_RUN
from tests.e2e.pace import ROUND_SECONDS
from tests.e2e.release import Object, Pool, Release, copy_credentials, merge_values
from tests.e2e.runs import create_deployment, get_run, start_run, wait_for_log, wait_until_ended
from tests.parts import wait_until


@pytest.fixture(scope="module")
def runs_namespace(cluster: str) -> Iterator[Namespace]:
    """Yield a namespace for the runs alone."""
    with restricted(cluster, "runs") as namespace:
        yield namespace


@pytest.fixture(scope="module")
def values(values: Object, runs_namespace: Namespace) -> Object:
    """Return values for a pool that stores results in the namespace of runs, without sync and drift detection."""
    runs = {"namespace": runs_namespace.name, "results": {"storage": "volume", "volume": {"size": "100Mi"}}}
    reconciler = {"everySeconds": ROUND_SECONDS}  # a test waits for several rounds
    return merge_values(
        values, {"drift": {"enabled": False}, "reconciler": reconciler, "sync": {"files": []}, "runs": runs}
    )


def _read_worker_account(pool: Pool) -> str:
    """Return the name of the worker's service account."""
    return str(pool.pods("worker")[0]["spec"]["serviceAccountName"])


def test_changed_template_and_job_variables_do_not_change_a_run_s_identity(pool: Pool, api: httpx.Client) -> None:
    """Attack: change the pool's template on the server, which every run's credential can do."""
    on_server = f"/work_pools/{pool.work_pool}"
    template = api.get(on_server).raise_for_status().json()["base_job_template"]
    spec = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    spec["serviceAccountName"] = _read_worker_account(pool)
    spec["automountServiceAccountToken"] = True
    spec["containers"][0]["envFrom"] = [{"secretRef": {"name": "prefect-database"}}]
    del template["variables"]["properties"]["service_account_name"]
    template["variables"]["properties"]["labels"].pop("propertyNames")
    api.patch(on_server, json={"base_job_template": template}).raise_for_status()

    labels = {"app.kubernetes.io/name": "prefect-server", "app.kubernetes.io/component": "api"}
    refused = start_run(api, create_deployment(api, pool, job_variables={"labels": labels}))
    found = wait_until_ended(api, refused)
    assert found["state_type"] == "CRASHED"
    assert "labels: the key 'app.kubernetes.io/name' is reserved" in found["state"]["message"]

    run = start_run(api, create_deployment(api, pool, job_variables=LIGHT_RUN))

    def find_pod() -> Object | None:
        selector = f"prefect.io/flow-run-id={run}"
        found = json.loads(pool.runs_namespace.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        return found[0] if found else None

    created: Object = wait_until(find_pod, "the run's pod")["spec"]
    assert created["serviceAccountName"].endswith("-runs")
    assert created["automountServiceAccountToken"] is False
    assert "envFrom" not in created["containers"][0]
    assert wait_until_ended(api, run)["state_type"] == "COMPLETED"

    # By now the reconciler has had several rounds.
    history = api.get("/flow_run_states/", params={"flow_run_id": refused}).raise_for_status().json()
    history.sort(key=lambda state: state["timestamp"])
    # The server calls a run Late that waits for a busy worker.
    names = [state["name"] for state in history if state["name"] != "Late"]
    assert names == ["Scheduled", "Pending", "Crashed"]
    assert not pool.runs_namespace.kubectl("get", "jobs", "-l", f"prefect.io/flow-run-id={refused}", "-o", "name")


ACCOUNT_PERMISSIONS: dict[str, set[tuple[str, str]]] = {
    "worker": {("jobs.batch", verb) for verb in ("create", "get", "delete")},
    "reconciler": {
        *(("jobs.batch", verb) for verb in ("list", "watch", "patch", "delete")),
        *(("pods", verb) for verb in ("list", "watch", "deletecollection")),
        ("pods/log", "get"),
        ("events", "list"),
    },
}
"""What each service account may do in the namespace of runs, as pairs of a resource and a verb."""

OF_ALL_ACCOUNTS = "authentication.k8s.io", "authorization.k8s.io"
"""API groups with what every account may do: ask who it is, and what it may do."""


def _list_permissions(namespace: Namespace, account: str) -> set[tuple[str, str]]:
    """Return what a service account may do in a namespace, as pairs of a resource and a verb."""
    listed = namespace.kubectl("auth", "can-i", "--list", f"--as={account}", "--no-headers")
    found = set()
    for line in listed.splitlines():
        resource, verbs = line.split(" ", 1)[0], re.findall(r"\[([^\]]*)\]", line)[-1].split()
        if resource and not resource.endswith(OF_ALL_ACCOUNTS):
            found |= {(resource, verb) for verb in verbs}
    return found


@pytest.mark.parametrize("component", ACCOUNT_PERMISSIONS)
def test_account_may_do_what_it_needs_and_only_in_the_namespace_of_runs(pool: Pool, component: str) -> None:
    """No account may read a Secret. In the release's namespace the reconciler may write its Lease."""
    [pod] = pool.pods(component)
    account = f"system:serviceaccount:{pool.namespace.name}:{pod['spec']['serviceAccountName']}"
    everywhere = {("namespaces", "get")}  # kube-system only
    assert _list_permissions(pool.runs_namespace, account) == ACCOUNT_PERMISSIONS[component] | everywhere
    lease = {("leases.coordination.k8s.io", verb) for verb in ("create", "get", "update")}
    expected = everywhere | (lease if component == "reconciler" else set())
    assert _list_permissions(pool.namespace, account) == expected


@pytest.fixture(scope="module")
def other_team(pool: Pool, server: Release, api: httpx.Client, values: Object) -> Iterator[Pool]:
    """Yield the release of a second team on the same server, with its own two namespaces, and without pods."""
    context = pool.namespace.context
    with restricted(context, "team") as namespace, restricted(context, "team-runs") as runs:
        copy_credentials(server, namespace)
        team = Pool(pool.chart, pool.name, namespace, namespace.name, runs.name)
        idle = {"worker": {"replicas": 0}, "reconciler": {"replicas": 0}, "pool": {"name": team.work_pool}}
        idle["runs"] = {"namespace": runs.name, "results": {"storage": "none"}}
        options = [f"--set-json={key}={json.dumps(value)}" for key, value in merge_values(values, idle).items()]
        team.helm("install", team.name, str(ROOT / "helm" / team.chart), "--no-hooks", *options)
        api.post("/work_pools/", json={"name": team.work_pool, "type": "kubernetes"}).raise_for_status()
        yield team


def _list_accounts(team: Pool) -> list[str]:
    """Return the service accounts of a team that have a token or execute runs."""
    places = {"worker": team.namespace, "reconciler": team.namespace, "runs": team.runs_namespace}
    return [
        f"system:serviceaccount:{namespace.name}:{team.name}-{component}" for component, namespace in places.items()
    ]


def test_accounts_of_two_teams_may_do_nothing_in_the_namespaces_of_the_other(pool: Pool, other_team: Pool) -> None:
    everywhere = {("namespaces", "get")}  # kube-system only
    worker, _, of_runs = _list_accounts(other_team)
    assert _list_permissions(other_team.runs_namespace, worker) == ACCOUNT_PERMISSIONS["worker"] | everywhere
    assert not _list_permissions(other_team.runs_namespace, of_runs)
    for team, other in ((pool, other_team), (other_team, pool)):
        for namespace in (other.namespace, other.runs_namespace):
            for account in _list_accounts(team):
                assert _list_permissions(namespace, account) <= everywhere, (namespace.name, account)


def test_runs_of_two_teams_read_and_do_not_change_the_runs_of_the_other(
    pool: Pool, other_team: Pool, server: Release, api: httpx.Client
) -> None:
    teams = (pool, other_team)
    deployments = {team.work_pool: create_deployment(api, team) for team in teams}
    runs = {name: start_run(api, deployment, state={"type": "PAUSED"}) for name, deployment in deployments.items()}
    key = server.secret("prefect-server-api-roles", RUN_KEY_FILE)
    for team, other in (teams, teams[::-1]):
        credential = Access(str(api.base_url).rstrip("/"), sign_run(key, UUID(runs[team.work_pool])))
        attacked = runs[other.work_pool]
        attacks: dict[str, tuple[str, Object | None]] = {
            f"/flow_runs/{attacked}/set_state": ("POST", {"state": {"type": "CANCELLED"}, "force": True}),
            f"/flow_runs/{attacked}": ("DELETE", None),
            f"/deployments/{deployments[other.work_pool]}": ("PATCH", {"paused": True}),
            f"/work_pools/{other.work_pool}": ("PATCH", {"is_paused": True}),
            f"/work_pools/{other.work_pool}/get_scheduled_flow_runs": ("POST", {}),
        }
        for path, (method, body) in attacks.items():
            assert api.request(method, path, json=body, auth=credential).status_code == 403, path
        own = f"/flow_runs/{runs[team.work_pool]}/labels"
        assert api.patch(own, json={"a": "b"}, auth=credential).status_code == 204
        # docs/explanation/security-model.md says so.
        body = {"flow_runs": {"id": {"any_": list(runs.values())}}}
        listed = api.post("/flow_runs/filter", json=body, auth=credential).raise_for_status().json()
        assert {run["id"]: run["state_type"] for run in listed} == dict.fromkeys(runs.values(), "PAUSED")


@pytest.mark.further
def test_move_that_leaves_runs_in_progress_alone_is_refused(pool: Pool, values: Object) -> None:
    revisions = pool.helm("history", pool.name, "-o", "json")
    with pytest.raises(ClusterError) as caught:
        pool.deploy(merge_values(values, {"runs": {"namespace": ""}}))
    assert f"Add {pool.runs_namespace.name} to runs.formerNamespaces" in str(caught.value)
    with pytest.raises(ClusterError) as caught:
        pool.deploy(merge_values(values, {"runs": {"formerNamespaces": ["absent"]}}))
    assert "names absent: the cluster has no such namespace" in str(caught.value)
    assert pool.helm("history", pool.name, "-o", "json") == revisions


def _change_pod(job: Object, change: Callable[[Object], object]) -> Object:
    changed = copy.deepcopy(job)
    change(changed["spec"]["template"])
    return changed


def _volume(pod: Object, name: str) -> Object:
    found: Object = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == name)
    return found


MASTER_KEY = "prefect-work-pool-results-signing"
"""The Secret with the master key, from which the worker derives the key of each deployment."""

ATTACKS: dict[str, Callable[[Object], object]] = {
    "service account": lambda pod: pod["spec"].update(serviceAccountName="prefect-work-pool-worker"),
    "token": lambda pod: pod["spec"].update(automountServiceAccountToken=True),
    "host namespaces": lambda pod: pod["spec"].update(hostNetwork=True),
    "Secret or ConfigMap": lambda pod: pod["spec"]["containers"][0].update(
        envFrom=[{"secretRef": {"name": "prefect-database"}}]
    ),
    "Secret or ConfigMap that": lambda pod: pod["spec"]["containers"][0]["env"].append(
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "prefect-database", "key": "password"}}}
    ),
    "environment refers to a Secret": lambda pod: pod["spec"]["containers"][0]["env"].append(
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": MASTER_KEY, "key": "signing-key"}}}
    ),
    "a volume that the": lambda pod: _volume(pod, "results").update(
        {"persistentVolumeClaim": None, "secret": {"secretName": MASTER_KEY}}
    ),
    "a volume": lambda pod: pod["spec"]["volumes"].append({"name": "root", "hostPath": {"path": "/"}}),
    "a volume that the chart's values do not name": lambda pod: pod["spec"]["volumes"].append(
        {"name": "s", "secret": {"secretName": "s"}}
    ),
    "The run has a volume": lambda pod: _volume(pod, "tmp").update(
        emptyDir=None, projected={"sources": [{"secret": {"name": "prefect-server-api-roles"}}]}
    ),
    "that the chart's values do not name: add it to runs.pod.volumes": lambda pod: _volume(pod, "tmp").update(
        emptyDir=None, csi={"driver": "secrets-store.csi.k8s.io"}
    ),
    "app.kubernetes.io/component": lambda pod: pod["metadata"]["labels"].update(
        {"app.kubernetes.io/name": "prefect-server", "app.kubernetes.io/component": "api"}
    ),
    "prefect.io/role": lambda pod: pod["metadata"]["labels"].pop("prefect.io/role"),
    "app.kubernetes.io/instance": lambda pod: pod["metadata"]["labels"].update({"app.kubernetes.io/instance": "other"}),
}
"""Changes to the Job of a run, by a part of the API server's message when it denies the Job."""


def test_worker_token_cannot_create_a_changed_job(pool: Pool, api: httpx.Client) -> None:
    run = start_run(api, create_deployment(api, pool, job_variables=LIGHT_RUN))
    assert wait_until_ended(api, run)["state_type"] == "COMPLETED"
    selector = f"prefect.io/flow-run-id={run}"
    [job] = json.loads(pool.runs_namespace.kubectl("get", "jobs", "-l", selector, "-o", "json"))["items"]
    job["metadata"] = {"name": "stolen", "labels": job["metadata"]["labels"]}
    del job["status"], job["spec"]["selector"]
    for label in ("batch.kubernetes.io/controller-uid", "controller-uid", "job-name", "batch.kubernetes.io/job-name"):
        job["spec"]["template"]["metadata"]["labels"].pop(label, None)
    worker = f"--as=system:serviceaccount:{pool.namespace.name}:{_read_worker_account(pool)}"

    def create(changed: Object) -> str:
        try:
            options = ("--dry-run=server", "-o", "name", "-f", "-")
            return pool.runs_namespace.kubectl("create", worker, *options, text=json.dumps(changed))
        except ClusterError as refused:
            return str(refused)

    assert create(job).strip() == "job.batch/stolen"
    for message, change in ATTACKS.items():
        assert message in create(_change_pod(job, change)), message


RUN_ATTACKS = """
import httpx, os, sys
from orchestration.prefect_api import Access

url, other, deployment, pool = os.environ["PREFECT_API_URL"], *sys.argv[1:]
api = httpx.Client(base_url=url, auth=Access(url, os.environ["PREFECT_API_AUTH_STRING"]), timeout=30)
attacks = {
    "state": ("POST", f"/flow_runs/{other}/set_state", {"state": {"type": "CANCELLED"}, "force": True}),
    "delete": ("DELETE", f"/flow_runs/{other}", None),
    "pool": ("PATCH", f"/work_pools/{pool}", {"base_job_template": {}}),
    "deployment": ("PATCH", f"/deployments/{deployment}", {"paused": True}),
    "automation": ("POST", "/automations/", {}),
    "variable": ("POST", "/variables/", {"name": "planted", "value": 1}),
    "claim": ("POST", f"/work_pools/{pool}/get_scheduled_flow_runs", {}),
    "settings": ("GET", "/admin/settings", None),
}
for name, (method, path, body) in attacks.items():
    print(name, api.request(method, path, json=body).status_code)
print("create", api.post(f"/deployments/{deployment}/create_flow_run", json={"state": {"type": "PAUSED"}}).status_code)
print("own", api.patch(f"/flow_runs/{os.environ['PREFECT__FLOW_RUN_ID']}/labels", json={"a": "b"}).status_code)
"""
"""Try requests with the credential of a flow run, and print the status of each answer."""


def test_run_writes_itself_alone(pool: Pool, server: Release, api: httpx.Client) -> None:
    deployment = create_deployment(api, pool)
    other = start_run(api, deployment, state={"type": "PAUSED"})
    run = start_run(api, deployment, parameters={"seconds": 300})
    selector = f"prefect.io/flow-run-id={run}"
    wait_until(lambda: get_run(api, run)["state_type"] == "RUNNING", "the run to begin", 300)
    [pod] = json.loads(pool.runs_namespace.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
    command = ("exec", pod["metadata"]["name"], "--", "python", "-c", RUN_ATTACKS, other, deployment, pool.work_pool)
    answers = dict(line.split() for line in pool.runs_namespace.kubectl(*command).splitlines())

    assert answers.pop("create") == "201"
    assert answers.pop("own") == "204"
    assert len(answers) == 8
    assert set(answers.values()) == {"403"}, answers
    assert api.get(f"/flow_runs/{other}").json()["state_type"] == "PAUSED"

    def list_denied() -> list[str]:
        log = server.namespace.kubectl("logs", "deployment/prefect-server-api", "--since=30m")
        lines = [json.loads(line) for line in log.splitlines() if line.startswith('{"audit"')]
        return [line["path"] for line in lines if line["user"] == f"run-{run}" and line["status"] == 403]

    # The container runtime writes the log a little later.
    wait_until(lambda: len(list_denied()) >= len(answers), "the audit log")
    assert list_denied() == [  # no call of Prefect's own client is among them
        f"/flow_runs/{other}/set_state",
        f"/flow_runs/{other}",
        f"/work_pools/{pool.work_pool}",
        f"/deployments/{deployment}",
        "/automations/",
        "/variables/",
        f"/work_pools/{pool.work_pool}/get_scheduled_flow_runs",
        "/admin/settings",
    ]
    api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    assert wait_until_ended(api, run)["state_type"] == "CANCELLED"


@pytest.mark.further
def test_run_cannot_plant_a_result_of_another_deployment(pool: Pool, api: httpx.Client) -> None:
    """Attack: plant a pickle in the storage of results, and store a result as another deployment."""
    planted = start_run(api, create_deployment(api, pool, entrypoint="/probe/flow.py:plant"))
    assert wait_until_ended(api, planted)["state_type"] == "COMPLETED"
    ours, theirs = (create_deployment(api, pool, entrypoint="/probe/flow.py:store") for _ in range(2))
    for deployment, executions in ((ours, 1), (ours, 0), (theirs, 1), (ours, 1)):
        run = start_run(api, deployment)
        assert wait_until_ended(api, run)["state_type"] == "COMPLETED"
        lines = wait_for_log(api, run, "the end: ")
        assert "the end: 42 attacked=False" in lines
        assert lines.count("the task is executed") == executions
        warned = [line for line in lines if line.startswith("Not loaded: the stored result ")]
        assert len(warned) == executions
    for kind in ("jobs", "pods"):
        found = pool.runs_namespace.kubectl("get", kind, "-l", "prefect.io/flow-run-id", "-o", "json")
        assert MASTER_KEY not in found
