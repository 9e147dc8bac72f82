"""Tests of `orchestrate memory`: the recommended memory request and limit of a deployment."""

import json
import os
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.__main__ import main
from orchestration.inspection.memory import MIB, MIN_BYTES, STEP_BYTES, memory_need, recommend
from orchestration.protocol import EXCEEDED_LABEL, PEAK_LABEL
from tests.parts import asked, client_of

SIZES = st.integers(1, 2**40)


@given(st.lists(SIZES, min_size=1, max_size=20))
def test_recommendation_covers_all_needs_with_bounded_excess(needs: list[int]) -> None:
    request, limit = recommend(needs)
    assert MIN_BYTES <= request <= limit
    assert request % STEP_BYTES == limit % STEP_BYTES == 0
    assert 1.30 * max(needs) <= limit < max(1.30 * max(needs) + STEP_BYTES, MIN_BYTES + 1)
    assert sum(need * 1.15 <= request for need in needs) * 2 >= len(needs), "half of the runs fit into the request"


@given(SIZES, SIZES, st.floats(1.01, 4))
def test_run_that_exceeded_its_limit_needs_more(peak: int, limit: int, growth: float) -> None:
    found = memory_need({PEAK_LABEL: peak, EXCEEDED_LABEL: limit}, growth)
    assert found > limit
    assert found >= peak
    if peak > limit:  # the retry had a higher limit, and its peak was enough
        assert found == peak


def test_recommendations_of_single_cases() -> None:
    assert recommend([MIB]) == (MIN_BYTES, MIN_BYTES)
    assert recommend([100 * MIB, 200 * MIB, 600 * MIB]) == (256 * MIB, 800 * MIB)
    assert memory_need({}, 1.5) == 0
    assert memory_need({EXCEEDED_LABEL: 300 * MIB, PEAK_LABEL: 300 * MIB}, 1.5) == 450 * MIB


class Deployment:
    """Creates a deployment with its own work pool and flow."""

    def __init__(self, api: httpx.Client, **variables: str) -> None:
        self.api = api
        name = f"memory-{os.getpid()}-{uuid4().hex[:6]}"
        defaults = {"memory_request": {"default": "512Mi"}, "memory_limit": {"default": "1Gi"}}
        template = {"variables": {"properties": defaults}, "job_configuration": {"limit": "{{ memory_limit }}"}}
        self.ask("POST", "/work_pools/", name=name, type="kubernetes", base_job_template=template)
        flow = self.ask("POST", "/flows/", name=name)["id"]
        made = self.ask("POST", "/deployments/", name="d", flow_id=flow, work_pool_name=name, job_variables=variables)
        self.id, self.name = made["id"], f"{name}/d"

    def ask(self, method: str, path: str, **body: Any) -> Any:
        return asked(self.api, method, path, body)

    def run(self, state: str, **labels: int) -> None:
        made = self.ask("POST", f"/deployments/{self.id}/create_flow_run", state={"type": "SCHEDULED"})
        for type_ in ("RUNNING", state):
            self.ask("POST", f"/flow_runs/{made['id']}/set_state", state={"type": type_}, force=True)
        if labels:
            self.ask("PATCH", f"/flow_runs/{made['id']}/labels", **{f"reconciler.{k}": v for k, v in labels.items()})


@pytest.fixture
def api(prefect_server: str) -> Iterator[httpx.Client]:
    with client_of(prefect_server) as client:
        yield client


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["memory", *arguments]) == 0
    return capsys.readouterr().out


def test_report_of_one_deployment(api: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own job variables override the pool's defaults. A killed run counts as needing more than its limit."""
    made = Deployment(api, memory_limit="800Mi", memory_growth="2")
    made.run("COMPLETED", peak=100 * MIB)
    made.run("COMPLETED", peak=200 * MIB)
    made.run("CRASHED", peak=800 * MIB, exceeded=800 * MIB)
    made.run("COMPLETED")  # no recorded memory
    made.run("RUNNING", peak=2000 * MIB)  # not finished
    [found] = json.loads(report(capsys, made.name, "--json"))
    assert found == {
        "deployment": made.name,
        "runs": 3,
        "killed": 1,
        "median": 200 * MIB,
        "most": 1600 * MIB,
        "request": "512Mi",
        "limit": "800Mi",
        "recommended_request": "256Mi",
        "recommended_limit": "2080Mi",
    }
    header, line = report(capsys, made.name).splitlines()
    assert line.split() == [made.name, "3", "1", "200Mi", "1600Mi", "512Mi", "800Mi", "256Mi", "2080Mi"]
    assert header.split()[:-1] == ["DEPLOYMENT", "RUNS", "KILLED", "MEDIAN", "MAX", "REQUEST", "LIMIT"]
    assert header.index("LIMIT") + len("LIMIT") == line.index("800Mi") + len("800Mi"), "the columns are aligned"


def test_report_lists_deployments_with_recorded_memory(api: httpx.Client, capsys: pytest.CaptureFixture[str]) -> None:
    known, unknown = Deployment(api), Deployment(api)
    known.run("COMPLETED", peak=1)
    unknown.run("COMPLETED")
    listed = [row["deployment"] for row in json.loads(report(capsys, "--json"))]
    assert known.name in listed
    assert unknown.name not in listed
    [found] = json.loads(report(capsys, unknown.name, "--json"))
    assert (found["runs"], found["recommended_limit"]) == (0, "")
    assert report(capsys, unknown.name).splitlines()[1].split() == [unknown.name, *"00--", "512Mi", "1024Mi", "-", "-"]
    assert main(["memory", "absent"]) == 1
    assert "There is no deployment absent" in capsys.readouterr().err
