"""Start a run of a deployment."""

import json
from typing import Any

import httpx

from orchestration.errors import ClusterError
from orchestration.operations.environment import Object
from orchestration.terminal import one_line


def start(api: httpx.Client, deployment: str, parameters: dict[str, Any]) -> Object:
    """Start a run of a deployment now, and return it.

    Args:
        api: a client of the Prefect API.
        deployment: FLOW/NAME.
        parameters: the parameters of the run.

    Raises:
        ClusterError: the deployment does not exist, or it refuses the parameters.
    """
    found = api.get(f"/deployments/name/{deployment}")
    if found.status_code == 404:
        listed = api.post("/deployments/filter", json={}).raise_for_status().json()
        flows = {flow["id"]: flow["name"] for flow in api.post("/flows/filter", json={}).raise_for_status().json()}
        names = ", ".join(sorted(f"{flows[known['flow_id']]}/{known['name']}" for known in listed))
        raise ClusterError(f"There is no deployment {deployment}. There are: {one_line(names) or 'none'}")
    known = found.raise_for_status().json()["parameter_openapi_schema"].get("properties", {})
    # The server accepts unknown parameters, and the run would fail in its pod.
    if unknown := sorted(set(parameters) - set(known)):
        raise ClusterError(f"{deployment} has no parameter {', '.join(unknown)}. It has: {', '.join(known)}")
    body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
    made = api.post(f"/deployments/{found.json()['id']}/create_flow_run", json=body)
    if made.status_code in (409, 422):
        raise ClusterError(f"{deployment} refuses the parameters {json.dumps(parameters)}: {made.json().get('detail')}")
    run: Object = made.raise_for_status().json()
    return run
