"""What a flow run can do with its credential of the Prefect API, tried on a real cluster."""

import json

import httpx
import pytest

from tests.e2e.release import Object, Pool, merged
from tests.e2e.runs import deployment, ended, start
from tests.parts import wait_until


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    """Those of a pool without deployments of its own."""
    return merged(values, {"drift": {"enabled": False}, "sync": {"files": []}})


def test_run_cannot_give_the_next_run_another_identity(pool: Pool, api: httpx.Client) -> None:
    """By the pool's template, which the credential of every run can change, or by job variables."""
    on_server = f"/work_pools/{pool.work_pool}"
    template = api.get(on_server).raise_for_status().json()["base_job_template"]
    spec = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    spec["serviceAccountName"] = f"{pool.name}-prefect-work-pool-worker"
    spec["automountServiceAccountToken"] = True
    spec["containers"][0]["envFrom"] = [{"secretRef": {"name": "prefect-database"}}]
    del template["variables"]["properties"]["service_account_name"]
    template["variables"]["properties"]["labels"].pop("propertyNames")
    api.patch(on_server, json={"base_job_template": template}).raise_for_status()

    labels = {"app.kubernetes.io/name": "prefect-server", "app.kubernetes.io/component": "api"}
    refused = start(api, deployment(api, pool, job_variables={"labels": labels}))
    found = ended(api, refused)
    assert found["state_type"] == "CRASHED"
    assert "labels: the key 'app.kubernetes.io/name' is kept" in found["state"]["message"]

    run = start(api, deployment(api, pool))

    def pod() -> Object | None:
        selector = f"prefect.io/flow-run-id={run}"
        found = json.loads(pool.namespace.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        return found[0] if found else None

    made: Object = wait_until(pod, "the run's pod", 60)["spec"]
    assert made["serviceAccountName"].endswith("-runs")
    assert made["automountServiceAccountToken"] is False
    assert "envFrom" not in made["containers"][0]
    assert ended(api, run)["state_type"] == "COMPLETED"

    # The reconciler has looked several times since.
    history = api.get("/flow_run_states/", params={"flow_run_id": refused}).raise_for_status().json()
    history.sort(key=lambda each: each["timestamp"])
    assert [each["name"] for each in history] == ["Scheduled", "Pending", "Crashed"]
    assert not pool.namespace.kubectl("get", "jobs", "-l", f"prefect.io/flow-run-id={refused}", "-o", "name")
