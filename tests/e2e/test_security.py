"""What a flow run can do with its credential of the Prefect API, tried on a real cluster."""

import copy
import json
from collections.abc import Callable

import httpx
import pytest

from orchestration.errors import ClusterError
from tests.e2e.release import Object, Pool, merge_values
from tests.e2e.runs import create_deployment, start_run, wait_until_ended
from tests.parts import wait_until


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    """Those of a pool without deployments of its own."""
    return merge_values(values, {"drift": {"enabled": False}, "sync": {"files": []}})


def _account_of_worker(pool: Pool) -> str:
    return str(pool.pods("worker")[0]["spec"]["serviceAccountName"])


def test_run_cannot_give_the_next_run_another_identity(pool: Pool, api: httpx.Client) -> None:
    """By the pool's template, which the credential of every run can change, or by job variables."""
    on_server = f"/work_pools/{pool.work_pool}"
    template = api.get(on_server).raise_for_status().json()["base_job_template"]
    spec = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    spec["serviceAccountName"] = _account_of_worker(pool)
    spec["automountServiceAccountToken"] = True
    spec["containers"][0]["envFrom"] = [{"secretRef": {"name": "prefect-database"}}]
    del template["variables"]["properties"]["service_account_name"]
    template["variables"]["properties"]["labels"].pop("propertyNames")
    api.patch(on_server, json={"base_job_template": template}).raise_for_status()

    labels = {"app.kubernetes.io/name": "prefect-server", "app.kubernetes.io/component": "api"}
    refused = start_run(api, create_deployment(api, pool, job_variables={"labels": labels}))
    found = wait_until_ended(api, refused)
    assert found["state_type"] == "CRASHED"
    assert "labels: the key 'app.kubernetes.io/name' is kept" in found["state"]["message"]

    run = start_run(api, create_deployment(api, pool))

    def pod() -> Object | None:
        selector = f"prefect.io/flow-run-id={run}"
        found = json.loads(pool.namespace.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        return found[0] if found else None

    made: Object = wait_until(pod, "the run's pod", 60)["spec"]
    assert made["serviceAccountName"].endswith("-runs")
    assert made["automountServiceAccountToken"] is False
    assert "envFrom" not in made["containers"][0]
    assert wait_until_ended(api, run)["state_type"] == "COMPLETED"

    # The reconciler has looked several times since.
    history = api.get("/flow_run_states/", params={"flow_run_id": refused}).raise_for_status().json()
    history.sort(key=lambda each: each["timestamp"])
    assert [each["name"] for each in history] == ["Scheduled", "Pending", "Crashed"]
    assert not pool.namespace.kubectl("get", "jobs", "-l", f"prefect.io/flow-run-id={refused}", "-o", "name")


def _change_pod(job: Object, change: Callable[[Object], object]) -> Object:
    made = copy.deepcopy(job)
    change(made["spec"]["template"])
    return made


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
    "a volume": lambda pod: pod["spec"]["volumes"].append({"name": "root", "hostPath": {"path": "/"}}),
    "a volume that the chart's values do not name": lambda pod: pod["spec"]["volumes"].append(
        {"name": "s", "secret": {"secretName": "s"}}
    ),
    "app.kubernetes.io/component": lambda pod: pod["metadata"]["labels"].update(
        {"app.kubernetes.io/name": "prefect-server", "app.kubernetes.io/component": "api"}
    ),
    "prefect.io/role": lambda pod: pod["metadata"]["labels"].pop("prefect.io/role"),
    "app.kubernetes.io/instance": lambda pod: pod["metadata"]["labels"].update({"app.kubernetes.io/instance": "other"}),
}
"""What is changed in the Job of a run, by a part of what the API server says to it."""


def test_token_of_the_worker_makes_no_other_job(pool: Pool, api: httpx.Client) -> None:
    run = start_run(api, create_deployment(api, pool))
    assert wait_until_ended(api, run)["state_type"] == "COMPLETED"
    selector = f"prefect.io/flow-run-id={run}"
    [job] = json.loads(pool.namespace.kubectl("get", "jobs", "-l", selector, "-o", "json"))["items"]
    job["metadata"] = {"name": "stolen", "labels": job["metadata"]["labels"]}
    del job["status"], job["spec"]["selector"]
    for each in ("batch.kubernetes.io/controller-uid", "controller-uid", "job-name", "batch.kubernetes.io/job-name"):
        job["spec"]["template"]["metadata"]["labels"].pop(each, None)
    worker = f"--as=system:serviceaccount:{pool.namespace.name}:{_account_of_worker(pool)}"

    def create(changed: Object) -> str:
        try:
            options = ("--dry-run=server", "-o", "name", "-f", "-")
            return pool.namespace.kubectl("create", worker, *options, text=json.dumps(changed))
        except ClusterError as refused:
            return str(refused)

    assert create(job).strip() == "job.batch/stolen"
    for said, change in ATTACKS.items():
        assert said in create(_change_pod(job, change)), said
