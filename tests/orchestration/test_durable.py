"""A run whose process is killed, and that is executed again: what had finished is not done again."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow, task

from orchestration.errors import PipelineError
from orchestration.idempotency import idempotency_key
from orchestration.settings import ROOT

FLOWS = ROOT / "tests" / "e2e" / "faults"


def _execute(run: str, url: str, results: Path) -> None:
    """Execute a run as a pod does."""
    environment = os.environ | {
        "PREFECT_API_URL": url,
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(results),
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "prefect", "flow-run", "execute", run]
    subprocess.run(command, env=environment, cwd=FLOWS, capture_output=True, check=True)


def _lines(api: httpx.Client, run: str) -> list[str]:
    """What the run and the flows that it called have logged."""
    body: dict[str, Any] = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
    runs = [run, *(each["id"] for each in api.post("/flow_runs/filter", json=body).raise_for_status().json())]
    body = {"logs": {"flow_run_id": {"any_": runs}}, "sort": "TIMESTAMP_ASC", "limit": 200}
    return [each["message"] for each in api.post("/logs/filter", json=body).raise_for_status().json()]


def test_a_run_that_was_killed_goes_on_where_it_was(prefect_server: str, tmp_path: Path) -> None:
    with httpx.Client(base_url=prefect_server, timeout=60) as api:
        flow_id = api.post("/flows/", json={"name": "stepwise"}).raise_for_status().json()["id"]
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(FLOWS)}}
        body = {"name": "durable", "flow_id": flow_id, "entrypoint": "flow.py:stepwise", "pull_steps": [step]}
        made = api.post("/deployments/", json=body).raise_for_status().json()["id"]
        run = api.post(f"/deployments/{made}/create_flow_run", json={}).raise_for_status().json()["id"]
        _execute(run, prefect_server, tmp_path)
        assert api.get(f"/flow_runs/{run}").json()["state_type"] == "CRASHED"
        again = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}}
        api.post(f"/flow_runs/{run}/set_state", json=again).raise_for_status()
        _execute(run, prefect_server, tmp_path)
        assert api.get(f"/flow_runs/{run}").json()["state_type"] == "COMPLETED"
        lines = _lines(api, run)
    taken = [re.findall(r"step (\d) in execution (\d) with key (\S+)", line) for line in lines]
    steps = [each for found in taken for each in found]
    assert Counter((number, execution) for number, execution, _ in steps) == Counter(
        [("1", "1"), ("2", "1"), ("3", "1"), ("4", "1"), ("4", "2"), ("5", "2")]
    )
    assert [each for each in lines if each.startswith("the end")] == [
        "the end: ['1 by 1', '2 by 1', '3 by 1', '4 by 2', '5 by 2']"
    ]
    assert len({key for number, _, key in steps if number == "4"}) == 1, "what was half done has the same key again"
    assert len({key for _, _, key in steps}) == 5


@task
def _key(value: object) -> str:
    return idempotency_key()


@pytest.mark.usefixtures("prefect_server")
def test_a_key_is_of_a_run_and_of_inputs() -> None:
    @flow
    def keys() -> list[str]:
        return [_key(value) for value in (1, 2, 2)]

    one, another = keys(), keys()
    assert one[1] == one[2]
    assert len({*one, *another}) == 4


@pytest.mark.usefixtures("prefect_server")
def test_what_has_no_key_is_said() -> None:
    with pytest.raises(PipelineError, match="Call it inside of a task"):
        idempotency_key()

    @flow
    def unhashable() -> str:
        return str(_key(object.__new__(_Unhashable)))

    with pytest.raises(PipelineError, match="cannot be hashed"):
        unhashable()


class _Unhashable:
    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")
