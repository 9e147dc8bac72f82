"""Why a run is where it is, on a real server."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from orchestration.__main__ import main

Json = dict[str, Any]


class Pool:
    """A work pool with a deployment of its own."""

    def __init__(self, api: httpx.Client) -> None:
        self.api = api
        self.name = f"timeline-{os.getpid()}-{uuid4().hex[:6]}"
        self.post("/work_pools/", name=self.name, type="kubernetes")
        flow = self.post("/flows/", name=self.name)["id"]
        self.deployment = self.post("/deployments/", name="d", flow_id=flow, work_pool_name=self.name)["id"]

    def post(self, path: str, **body: Any) -> Json:
        answer = self.api.post(path, json=body).raise_for_status()
        return dict(answer.json()) if answer.content else {}

    def run(self, *states: Json, **fields: Any) -> Json:
        body = {"state": {"type": "SCHEDULED"}} | fields
        made = self.post(f"/deployments/{self.deployment}/create_flow_run", **body)
        for state in states:
            self.post(f"/flow_runs/{made['id']}/set_state", state=state, force=True)
        return made


@pytest.fixture
def pool(prefect_server: str) -> Iterator[Pool]:
    with httpx.Client(base_url=prefect_server, timeout=30) as api:
        yield Pool(api)


def why(run: Json, capsys: pytest.CaptureFixture[str]) -> Json:
    capsys.readouterr()
    assert main(["why", run["id"], "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([{"type": "PENDING"}], "was claimed"),
        ([{"type": "PENDING", "name": "ImagePullBackOff", "message": "Pod x does not start"}], "Pod x does not start"),
        ([{"type": "RUNNING"}], "It runs since"),
        ([{"type": "RUNNING"}, {"type": "CANCELLING"}], "to be cancelled since"),
        ([{"type": "CRASHED", "message": "OOMKilled: pod x"}], "It is Crashed: OOMKilled: pod x."),
        ([{"type": "COMPLETED"}], "It is Completed."),
    ],
)
def test_the_diagnosis_of_a_state(
    pool: Pool, capsys: pytest.CaptureFixture[str], states: list[Json], said: str
) -> None:
    assert said in why(pool.run(*states), capsys)["diagnosis"]


def test_what_keeps_a_run_from_being_claimed(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    due = {"state_details": {"scheduled_time": (datetime.now(UTC) - timedelta(minutes=5)).isoformat()}}
    late = pool.run(state={"type": "SCHEDULED"} | due)
    assert f"It is late by 5 min: work pool {pool.name} has no worker" in why(late, capsys)["diagnosis"]
    pool.api.patch(f"/work_pools/{pool.name}", json={"is_paused": True}).raise_for_status()
    assert f"prefect work-pool resume {pool.name}" in why(late, capsys)["diagnosis"]
    assert main(["runs", "--stuck", "--json"]) == 2
    [found] = [each for each in json.loads(capsys.readouterr().out) if each["id"] == late["id"]]
    assert "is paused" in found["why"]
    pool.post(f"/flow_runs/{late['id']}/set_state", state={"type": "RUNNING"}, force=True)
    main(["runs", "--stuck", "--json"])
    assert late["id"] not in capsys.readouterr().out, "it runs"
    main(["runs"])
    assert f"{late['name']}  " in capsys.readouterr().out


def test_the_timeline_is_in_order(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    run = pool.run({"type": "PENDING"}, {"type": "RUNNING"})
    now = datetime.now(UTC).isoformat()
    line = {"name": "x", "level": 20, "message": "a line\nand more", "timestamp": now, "flow_run_id": run["id"]}
    pool.api.post("/logs/", json=[line]).raise_for_status()
    pool.post(f"/flow_runs/{run['id']}/set_state", state={"type": "CRASHED", "message": "Killed"}, force=True)
    found = why(run, capsys)["timeline"]
    assert [each["text"] for each in found if each["who"] == "state"] == [
        "Scheduled", "Pending", "Running", "Crashed: Killed",
    ]  # fmt: skip
    assert [each["at"] for each in found] == sorted(each["at"] for each in found)
    assert main(["why", run["name"]]) == 0
    shown = capsys.readouterr().out
    assert "a line\n" in shown
    assert shown.endswith("It is Crashed: Killed.\n")


def test_a_run_that_is_not_there(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "nobody"]) == 1
    assert "There is no run nobody" in capsys.readouterr().err
