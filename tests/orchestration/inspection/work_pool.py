"""A work pool with runs, and `orchestrate why` about a run."""

import json
import os
from typing import Any
from uuid import uuid4

import httpx
import pytest

from orchestration.__main__ import main
from tests.parts import asked

Json = dict[str, Any]


class WorkPool:
    """Creates a work pool with one deployment, and runs of that deployment.

    Args:
        api: a client of the Prefect API.
    """

    def __init__(self, api: httpx.Client) -> None:
        self.api = api
        self.name = f"timeline-{os.getpid()}-{uuid4().hex[:6]}"
        self.post("/work_pools/", name=self.name, type="kubernetes")
        flow = self.post("/flows/", name=self.name)["id"]
        self.deployment = self.post("/deployments/", name="d", flow_id=flow, work_pool_name=self.name)["id"]

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        return asked(self.api, method, path, body, **headers)

    def post(self, path: str, **body: Any) -> Json:
        return dict(self.ask("POST", path, body) or {})

    def run(self, *states: Json, **fields: Any) -> Json:
        """Create a run and set its states, one after the other.

        Args:
            states: the states after Scheduled.
            fields: further fields of the request that creates the run.
        """
        body = {"state": {"type": "SCHEDULED"}} | fields
        run = self.post(f"/deployments/{self.deployment}/create_flow_run", **body)
        for state in states:
            self.post(f"/flow_runs/{run['id']}/set_state", state=state, force=True)
        return run


def why(run: Json, capsys: pytest.CaptureFixture[str]) -> Json:
    """Return what `orchestrate why --json` prints about a run."""
    capsys.readouterr()
    assert main(["why", run["id"], "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))
