"""Start a run in an environment and follow it: what it logs, or why its pod does not start."""

import json
import sys
import time
from datetime import datetime
from typing import Any

import httpx

from orchestration.errors import ClusterError
from orchestration.operations import release_diagnosis
from orchestration.operations.environment import Environment, Object
from orchestration.protocol import FINAL_STATES
from orchestration.reconciler.kubernetes_objects import PodObject

LAST = "Finished in state"
"""How the last line begins that a flow logs which comes to its end."""

LATE = 10.0
"""Seconds that a log may follow the state: it is sent every two seconds, by machines that have other work."""


def start(api: httpx.Client, deployment: str, parameters: dict[str, Any]) -> Object:
    """A run of the deployment FLOW/NAME, now.

    Raises:
        ClusterError: there is no such deployment, or it refuses the parameters.
    """
    found = api.get(f"/deployments/name/{deployment}")
    if found.status_code == 404:
        listed = api.post("/deployments/filter", json={}).raise_for_status().json()
        flows = {each["id"]: each["name"] for each in api.post("/flows/filter", json={}).raise_for_status().json()}
        names = ", ".join(sorted(f"{flows[each['flow_id']]}/{each['name']}" for each in listed))
        raise ClusterError(f"There is no deployment {deployment}. There are: {names or 'none'}")
    known = found.raise_for_status().json()["parameter_openapi_schema"].get("properties", {})
    # The server lets them pass, and the run fails in its pod.
    if unknown := sorted(set(parameters) - set(known)):
        raise ClusterError(f"{deployment} has no parameter {', '.join(unknown)}. It has: {', '.join(known)}")
    body = {"state": {"type": "SCHEDULED"}, "parameters": parameters}
    made = api.post(f"/deployments/{found.json()['id']}/create_flow_run", json=body)
    if made.status_code in (409, 422):
        raise ClusterError(f"{deployment} refuses the parameters {json.dumps(parameters)}: {made.json().get('detail')}")
    run: Object = made.raise_for_status().json()
    return run


def named(api: httpx.Client, name: str) -> Object:
    """The newest run of that name or id; of all, if the name is empty.

    Raises:
        ClusterError: there is none.
    """
    which: Object = (
        {"name": {"any_": [name]}}
        if name
        else {"start_time": {"is_null_": False}, "parent_task_run_id": {"is_null_": True}}
    )
    body = {"flow_runs": which, "sort": "START_TIME_DESC", "limit": 1}
    found = api.post("/flow_runs/filter", json=body).raise_for_status().json()
    if not found and len(name) == 36:
        by_id = api.get(f"/flow_runs/{name}")
        found = [by_id.json()] if by_id.status_code == 200 else []
    if not found:
        raise ClusterError(f"There is no run {name or 'yet'}. `make status` lists the newest of each deployment")
    run: Object = found[0]
    return run


def follow(environment: Environment, api: httpx.Client, run: Object) -> bool:
    """Print the run's log as it comes, until its end; whether it completed.

    What the API was never told is taken from the run's pod: why it does not start, how it died.
    """
    told: set[str] = set()
    state, complete, until = "", False, 0.0
    while True:
        now = api.get(f"/flow_runs/{run['id']}").raise_for_status().json()
        over = now["state_type"] in FINAL_STATES
        if now["state"]["name"] != state:
            state = now["state"]["name"]
            message = f": {now['state']['message']}" if now["state"]["message"] else ""
            print(f"-- {run['name']} is {state}{message}", file=sys.stderr, flush=True)
        for each in _new_logs(api, run["id"], told):
            level = {20: "", 30: "WARNING ", 40: "ERROR ", 50: "CRITICAL "}.get(each["level"], "")
            print(f"{datetime.fromisoformat(each['timestamp']):%H:%M:%S} {level}{each['message']}", flush=True)
            complete = complete or (each["flow_run_id"] == run["id"] and each["message"].startswith(LAST))
        if over:
            # Of one that was ended nobody knows what its last line is.
            until = until or time.monotonic() + (LATE if now["state_type"] in ("COMPLETED", "FAILED") else 2)
            if complete or time.monotonic() > until:
                break
        if now["state_type"] in ("SCHEDULED", "PENDING"):
            for line in _pod_troubles(environment, run["id"]):
                if line not in told:
                    told.add(line)
                    print(f"-- {line}", file=sys.stderr, flush=True)
        time.sleep(1)
    if now["state_type"] == "CRASHED":
        for pod in _pods(environment, run["id"]):
            main = PodObject.model_validate(pod).main_container.name
            for line in release_diagnosis.last_lines(environment, pod["metadata"]["name"], main, 20):
                print(f"-- pod: {line}", file=sys.stderr)
    return bool(now["state_type"] == "COMPLETED")


def _new_logs(api: httpx.Client, run: str, told: set[str]) -> list[Object]:
    """What the run and its subflows have logged since."""
    children = {"parent_flow_run_id": {"any_": [run]}}
    below = api.post("/flow_runs/filter", json={"flow_runs": children}).raise_for_status().json()
    new: list[Object] = []
    offset = 0
    while True:
        body = {
            "logs": {"flow_run_id": {"any_": [run, *(each["id"] for each in below)]}},
            "sort": "TIMESTAMP_ASC",
            "limit": 200,
            "offset": offset,
        }
        found = api.post("/logs/filter", json=body).raise_for_status().json()
        new += [each for each in found if each["id"] not in told]
        told.update(each["id"] for each in found)
        if len(found) < 200:
            return new
        offset += 200


def _pods(environment: Environment, run: str) -> list[Object]:
    return environment.objects("pods", "--selector", f"prefect.io/flow-run-id={run}")


def _pod_troubles(environment: Environment, run: str) -> list[str]:
    """Why the run's pod is not made or does not start; a sidecar keeps it from neither."""
    troubles: list[str] = []
    for pod in _pods(environment, run):
        init = {each["name"] for each in pod["spec"].get("initContainers", [])}
        troubles += release_diagnosis.troubles(
            environment, pod, init | {PodObject.model_validate(pod).main_container.name}
        )
    for job in environment.objects("jobs", "--selector", f"prefect.io/flow-run-id={run}"):
        about = f"involvedObject.name={job['metadata']['name']},type=Warning"
        troubles += [
            f"event of its Job: {each['message']}" for each in environment.objects("events", "--field-selector", about)
        ]
    return [line for line in troubles if "ContainerCreating" not in line and "PodInitializing" not in line]
