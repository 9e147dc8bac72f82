"""Follow a run: print its log, and why its pod does not start or how the pod ended."""

import sys
import time
from datetime import datetime

import httpx

from orchestration.errors import ClusterError
from orchestration.operations import release_diagnosis
from orchestration.operations.environment import Environment, Object
from orchestration.protocol import FINAL_STATES
from orchestration.reconciler.kubernetes_objects import PodObject
from orchestration.terminal import cut, one_line

LAST_LINE = "Finished in state"
"""How the last line of a flow's log begins, if the flow reaches its end."""

LOG_DELAY_SECONDS = 30.0
"""How long the log may arrive after the final state. Runs send logs every two seconds, later on a busy machine."""

LOG_DELAY_WHEN_ENDED_SECONDS = 2.0
"""The same for a run that was crashed or cancelled: its log has no known last line."""

POLL_SECONDS = 1.0
LOG_PAGE = 200
"""Log lines in one answer of the API."""

CRASH_LOG_LINES = 20
UUID_LENGTH = 36
STARTING = ("ContainerCreating", "PodInitializing")
"""Reasons of a container that starts as usual."""

LEVELS = {20: "", 30: "WARNING ", 40: "ERROR ", 50: "CRITICAL "}


def find_run(api: httpx.Client, name: str) -> Object:
    """Return the newest run with a name or an id; the newest of all runs if the name is empty.

    Raises:
        ClusterError: there is no such run.
    """
    which: Object = (
        {"name": {"any_": [name]}}
        if name
        else {"start_time": {"is_null_": False}, "parent_task_run_id": {"is_null_": True}}
    )
    body = {"flow_runs": which, "sort": "START_TIME_DESC", "limit": 1}
    found = api.post("/flow_runs/filter", json=body).raise_for_status().json()
    if not found and len(name) == UUID_LENGTH:
        answer = api.get(f"/flow_runs/{name}")
        found = [answer.json()] if answer.status_code == 200 else []
    if not found:
        raise ClusterError(f"There is no run {name or 'yet'}. `make status` lists the newest of each deployment")
    run: Object = found[0]
    return run


def follow(environment: Environment, api: httpx.Client, run: Object) -> bool:
    """Print the log of a run until it ends.

    The run's pod adds what the Prefect API does not know: why it does not start, and its last lines after a crash.

    Returns:
        Whether the run completed.
    """
    printed: set[str] = set()
    state, is_log_complete, deadline = "", False, 0.0
    while True:
        now = api.get(f"/flow_runs/{run['id']}").raise_for_status().json()
        if now["state"]["name"] != state:
            state = now["state"]["name"]
            message = f": {now['state']['message']}" if now["state"]["message"] else ""
            shown = one_line(cut(f"{run['name']} is {state}{message}"))
            print(f"-- {shown}", file=sys.stderr, flush=True)
        for line in _new_logs(api, run["id"], printed):
            level = LEVELS.get(line["level"], "")
            print(f"{datetime.fromisoformat(line['timestamp']):%H:%M:%S} {level}{cut(line['message'])}", flush=True)
            is_last = line["flow_run_id"] == run["id"] and line["message"].startswith(LAST_LINE)
            is_log_complete = is_log_complete or is_last
        if now["state_type"] in FINAL_STATES:
            ended_alone = now["state_type"] in ("COMPLETED", "FAILED")
            delay = LOG_DELAY_SECONDS if ended_alone else LOG_DELAY_WHEN_ENDED_SECONDS
            deadline = deadline or time.monotonic() + delay
            if is_log_complete or time.monotonic() > deadline:
                break
        if now["state_type"] in ("SCHEDULED", "PENDING"):
            for reason in _start_problems(environment, run["id"]):
                if reason not in printed:
                    printed.add(reason)
                    print(f"-- {one_line(cut(reason))}", file=sys.stderr, flush=True)
        time.sleep(POLL_SECONDS)
    if now["state_type"] == "CRASHED":
        for pod in _pods(environment, run["id"]):
            for text in release_diagnosis.log_tail(environment, pod, _main_container(pod), CRASH_LOG_LINES):
                print(f"-- pod: {text}", file=sys.stderr)
    return bool(now["state_type"] == "COMPLETED")


def _new_logs(api: httpx.Client, run: str, printed: set[str]) -> list[Object]:
    """Return the log lines of a run and its subflows whose ids are not in `printed`; add their ids to it."""
    children = {"parent_flow_run_id": {"any_": [run]}}
    subflows = api.post("/flow_runs/filter", json={"flow_runs": children}).raise_for_status().json()
    new: list[Object] = []
    offset = 0
    while True:
        body = {
            "logs": {"flow_run_id": {"any_": [run, *(subflow["id"] for subflow in subflows)]}},
            "sort": "TIMESTAMP_ASC",
            "limit": LOG_PAGE,
            "offset": offset,
        }
        found = api.post("/logs/filter", json=body).raise_for_status().json()
        new += [line for line in found if line["id"] not in printed]
        printed.update(line["id"] for line in found)
        if len(found) < LOG_PAGE:
            return new
        offset += LOG_PAGE


def _pods(environment: Environment, run: str) -> list[Object]:
    return environment.objects("pods", "--selector", f"prefect.io/flow-run-id={run}")


def _main_container(pod: Object) -> str:
    return PodObject.model_validate(pod).main_container.name


def _start_problems(environment: Environment, run: str) -> list[str]:
    """Return why a run's pod does not exist or does not start. Sidecars do not count: they delay neither."""
    problems: list[str] = []
    for pod in _pods(environment, run):
        init_containers = {container["name"] for container in pod["spec"].get("initContainers", [])}
        problems += release_diagnosis.explain_pod(environment, pod, init_containers | {_main_container(pod)})
    for job in environment.objects("jobs", "--selector", f"prefect.io/flow-run-id={run}"):
        selector = f"involvedObject.name={job['metadata']['name']},type=Warning"
        events = environment.objects("events", "--field-selector", selector)
        problems += [f"event of its Job: {event['message']}" for event in events]
    return [line for line in problems if not any(reason in line for reason in STARTING)]
