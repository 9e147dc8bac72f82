"""Create runs of deployments, and execute them as their pods do."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from orchestration.settings import ROOT


def execute(run: str, url: str, variables: dict[str, str]) -> int:
    """Execute a run as a pod does, with a disk that is deleted at the end; return the exit status."""
    with tempfile.TemporaryDirectory() as disk:
        pod = {"PREFECT_API_URL": url, "PREFECT_HOME": disk, "PYTHONPATH": str(ROOT), "PREFECT__FLOW_RUN_ID": run}
        pod["TERMINATION_MESSAGE_PATH"] = f"{disk}/message"
        command = [sys.executable, "-m", "orchestration.runs.engine_start"]
        return subprocess.run(command, env=os.environ | variables | pod, cwd=disk, capture_output=True).returncode


def log_lines(api: httpx.Client, run: str) -> list[str]:
    """Return the log messages of the run and its subflows."""
    body: dict[str, Any] = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
    runs = [run, *(subflow["id"] for subflow in api.post("/flow_runs/filter", json=body).raise_for_status().json())]
    body = {"logs": {"flow_run_id": {"any_": runs}}, "sort": "TIMESTAMP_ASC", "limit": 200}
    return [entry["message"] for entry in api.post("/logs/filter", json=body).raise_for_status().json()]


def create_run(api: httpx.Client, entrypoint: str, folder: Path, deployment: str = "durable", **parameters: Any) -> str:
    """Create a run of a deployment of a flow in a file of this folder. Calls with equal names share the deployment."""
    flow_id = api.post("/flows/", json={"name": entrypoint}).raise_for_status().json()["id"]
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}
    body = {"name": deployment, "flow_id": flow_id, "entrypoint": entrypoint, "pull_steps": [step]}
    made = api.post("/deployments/", json=body).raise_for_status().json()["id"]
    return str(
        api.post(f"/deployments/{made}/create_flow_run", json={"parameters": parameters})
        .raise_for_status()
        .json()["id"]
    )
