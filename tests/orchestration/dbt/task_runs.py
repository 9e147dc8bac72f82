"""Read flow runs from the Prefect server and results from dbt's files, and run flows in separate processes."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx

from orchestration.dbt import DbtProject
from orchestration.errors import DbtError
from orchestration.settings import ROOT
from tests import server_forks
from tests.parts import Query, wait_until

Object = dict[str, Any]

PAGE_SIZE = 200
"""How many objects a page of the API has at most."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")


class Server:
    """Reads and changes flow runs by the server's API."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    @staticmethod
    def run(state: Any) -> str:
        """Return the id of the flow run with this state."""
        return str(state.state_details.flow_run_id)

    def state(self, run: str) -> Object:
        """Return the flow run's state."""
        found: Object = self._client.get(f"/flow_runs/{run}").raise_for_status().json()["state"]
        return found

    def set_state(self, run: str, kind: str, name: str) -> None:
        """Set the flow run's state, as the UI does to cancel or retry a flow run."""
        content = {"state": {"type": kind, "name": name}, "force": kind == "SCHEDULED"}
        self._client.post(f"/flow_runs/{run}/set_state", json=content).raise_for_status()

    def start(self, deployment: str) -> str:
        """Create a flow run of a deployment; return its id."""
        answer = self._client.post(f"/deployments/{deployment}/create_flow_run", json={}).raise_for_status()
        return str(answer.json()["id"])

    def get(self, path: str, run: str, **filters: Any) -> list[Object]:
        """Return all task runs, logs or artifacts of the flow run."""
        found: list[Object] = []
        by_run = (
            {"flow_runs": {"id": {"any_": [run]}}} if path == "task_runs" else {path: {"flow_run_id": {"any_": [run]}}}
        )
        while True:
            body = by_run | filters | {"offset": len(found), "limit": PAGE_SIZE}
            page = self._client.post(f"/{path}/filter", json=body).raise_for_status().json()
            found += page
            if len(page) < PAGE_SIZE:
                return found

    def nodes(self, run: str, count: int) -> dict[str, Object]:
        """Return the task runs by node, once `count` of them have ended on the server."""

        def recorded() -> dict[str, Object]:
            found = {task["task_key"]: task for task in self.get("task_runs", run) if "dbt" in task["tags"]}
            done = [task for task in found.values() if task["state_type"] in ENDED]
            return found if len(done) == count else {}

        found: dict[str, Object] = wait_until(recorded, f"{count} task runs", 240)
        return found

    def logs(self, run: str) -> list[Object]:
        """Return the log lines, oldest first."""
        return self.get("logs", run, sort="TIMESTAMP_ASC")

    def artifacts(self, run: str) -> dict[str, Object]:
        """Return the artifacts by key."""
        return {artifact["key"]: artifact for artifact in self.get("artifacts", run)}

    def events(self, run: str, prefix: str) -> list[Object]:
        """Return the events of the flow run whose names begin with the prefix."""
        related = {"resources_in_roles": [[f"prefect.flow-run.{run}", "flow-run"]]}
        content = {"filter": {"event": {"prefix": [prefix]}, "related": related}, "limit": 50}
        page = self._client.post("/events/filter", json=content).raise_for_status().json()
        found: list[Object] = page["events"]
        while page["next_page"]:
            page = self._client.get(page["next_page"]).raise_for_status().json()
            found += page["events"]
        return found


def results_of(folder: Path, name: str = "run_results.json") -> dict[str, str]:
    """Return dbt's statuses of the last command, by node."""
    results = json.loads((folder / "target" / name).read_text())["results"]
    return {result["unique_id"]: result["status"] for result in results}


def busy(query: Query) -> int:
    """Return how many other sessions of the database execute a statement or are in a transaction."""
    return int(
        query(
            "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            " and state <> 'idle'"
        )[0][0]
    )


def _environment(shop: Path, api: str, python: Path | None = None) -> dict[str, str]:
    return os.environ | {"PREFECT_API_URL": api, "SHOP": str(shop), "SHOP_PYTHON": str(python or "")}


def start(shop: Path, api: str, flow: str) -> "tuple[subprocess.Popen[str], str]":
    """Run a flow of `shop_flow` in a separate process; return the process and the flow run's id."""
    command = [sys.executable, "-m", "tests.orchestration.dbt.shop_flow", flow]
    process = subprocess.Popen(
        command, env=_environment(shop, api), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    return process, process.stdout.readline().strip()


def run_again(shop: Path, api: str, flow: str, run: str, python: Path) -> "subprocess.CompletedProcess[str]":
    """Run another attempt of a flow run of `shop_flow` in a fork, and return its status and output.

    Args:
        shop: the project.
        api: the URL of the Prefect API.
        flow: the flow's name.
        run: the flow run's id.
        python: the interpreter for dbt.
    """
    command = ["tests.orchestration.dbt.shop_flow", flow, run]
    return server_forks.run(command, _environment(shop, api, python), ROOT)


def build_in_thread(project: DbtProject) -> tuple[threading.Thread, list[DbtError]]:
    """Build in a thread; return the thread, and the list that gets its error."""
    caught: list[DbtError] = []

    def build() -> None:
        try:
            project.build()
        except DbtError as error:
            caught.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    return thread, caught


def execute(shop: Path, api: str, run: str, python: Path | None = None) -> "subprocess.Popen[bytes]":
    """Execute a deployment's flow run like a pod of the work pool, but look for a cancellation every second.

    Args:
        shop: the project.
        api: the URL of the Prefect API.
        run: the flow run's id.
        python: the interpreter for dbt; by default the one with the tested dbt.
    """
    code = (
        "import sys; from orchestration.runs import run_client, supervisor; "
        "run_client.CHECK_INTERVAL_SECONDS, run_client.CHECK_TIMEOUT_SECONDS = 1, 60; "
        "sys.exit(supervisor.main(sys.argv[1:]))"
    )
    identity = {"PREFECT__FLOW_RUN_ID": run, "KUBERNETES_JOB": "job", "TERMINATION_MESSAGE_PATH": os.devnull}
    return subprocess.Popen(
        [sys.executable, "-c", code, "prefect", "flow-run", "execute"],
        env=_environment(shop, api, python) | identity,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # after a given-up run the supervisor kills its process group
    )
