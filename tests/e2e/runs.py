"""Flow runs of the probe: create, start, wait for and read them by the Prefect API."""

import contextlib
from typing import Any
from uuid import uuid4

import httpx

from tests.e2e.release import Object, Pool
from tests.parts import wait_until


def create_deployment(api: httpx.Client, pool: Pool, **fields: Any) -> str:
    """Create a deployment of the probe in a pool and return its id.

    Args:
        api: client of the Prefect API.
        pool: the release of the work pool.
        fields: fields of the deployment that replace the defaults.
    """
    flow = read(api, "POST", "/flows/", json={"name": "probe"})
    body = {
        "name": f"probe-{uuid4().hex[:6]}",
        "flow_id": flow["id"],
        "entrypoint": "/probe/flow.py:probe",
        "path": "/app",
        "work_pool_name": pool.work_pool,
    }
    return str(read(api, "POST", "/deployments/", json=body | fields)["id"])


def start_run(api: httpx.Client, deployment_id: str, **fields: Any) -> str:
    """Schedule a run of the deployment for now and return its id. Its key prevents a second run if `read` repeats."""
    body = {"state": {"type": "SCHEDULED"}, "idempotency_key": uuid4().hex} | fields
    return str(read(api, "POST", f"/deployments/{deployment_id}/create_flow_run", json=body)["id"])


def read(api: httpx.Client, method: str, path: str, **options: Any) -> Any:
    """Return the JSON of an answer of the Prefect API. Ask again after a 5xx or no answer: a busy node may be late.

    The request must be one that may be repeated.
    """

    def answered() -> httpx.Response | None:
        with contextlib.suppress(httpx.TransportError):
            answer = api.request(method, path, **options)
            return answer if answer.status_code < 500 else None
        return None

    found: httpx.Response = wait_until(answered, f"an answer to {method} {path}")
    return found.raise_for_status().json()


def get_run(api: httpx.Client, run: str) -> Object:
    """Return the run as the Prefect API has it."""
    found: Object = read(api, "GET", f"/flow_runs/{run}")
    return found


def wait_until_ended(api: httpx.Client, run: str, seconds: float = 300) -> Object:
    """Wait until the run is in a final state and return the run."""
    final = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
    found: Object = wait_until(
        lambda: (now := get_run(api, run))["state_type"] in final and now, f"run {run} to end", seconds
    )
    return found


def read_log(api: httpx.Client, run: str) -> list[str]:
    """Return the messages that the run has logged so far."""
    found: list[str] = []
    while True:
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "limit": 200, "offset": len(found)}
        page = read(api, "POST", "/logs/filter", json=body)
        found += [str(log["message"]) for log in page]
        if len(page) < 200:
            return found


def wait_for_log(api: httpx.Client, run: str, last: str, seconds: float = 180) -> list[str]:
    """Wait for a line that begins with `last`, and return all messages: the server stores logs later than states."""

    def read_if_complete() -> list[str]:
        found = read_log(api, run)
        return found if any(line.startswith(last) for line in found) else []

    messages: list[str] = wait_until(read_if_complete, f"{last!r} in the run's logs", seconds)
    return messages
