"""Flow runs of the probe, as tests ask a server for them."""

from typing import Any
from uuid import uuid4

import httpx

from tests.e2e.release import Object, Pool
from tests.parts import wait_until


def deployment(api: httpx.Client, pool: Pool, **fields: Any) -> str:
    """A new deployment of the probe in a pool; its id."""
    flow = api.post("/flows/", json={"name": "probe"}).raise_for_status().json()
    body = {
        "name": f"probe-{uuid4().hex[:6]}",
        "flow_id": flow["id"],
        "entrypoint": "/probe/flow.py:probe",
        "path": "/app",
        "work_pool_name": pool.work_pool,
    }
    made = api.post("/deployments/", json=body | fields)
    return str(made.raise_for_status().json()["id"])


def start(api: httpx.Client, deployment_id: str, **fields: Any) -> str:
    """A run of the deployment, now; its id."""
    made = api.post(f"/deployments/{deployment_id}/create_flow_run", json={"state": {"type": "SCHEDULED"}} | fields)
    return str(made.raise_for_status().json()["id"])


def run_of(api: httpx.Client, run: str) -> Object:
    found: Object = api.get(f"/flow_runs/{run}").raise_for_status().json()
    return found


def ended(api: httpx.Client, run: str, seconds: float = 120) -> Object:
    """The run, once it is over."""
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    found: Object = wait_until(
        lambda: (now := run_of(api, run))["state_type"] in final and now, f"run {run} to end", seconds
    )
    return found


def lines(api: httpx.Client, run: str) -> list[str]:
    """What the run has logged so far."""
    found: list[str] = []
    while True:
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "offset": len(found)}
        page = api.post("/logs/filter", json=body).raise_for_status().json()
        found += [str(each["message"]) for each in page]
        if len(page) < 200:
            return found


def logged(api: httpx.Client, run: str, last: str, seconds: float = 30) -> list[str]:
    """What the run logged, once the line that begins with `last` has arrived: logs follow the states."""

    def all_of_them() -> list[str]:
        found = lines(api, run)
        return found if any(line.startswith(last) for line in found) else []

    arrived: list[str] = wait_until(all_of_them, f"{last!r} in the run's logs", seconds)
    return arrived
