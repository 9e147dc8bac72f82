"""Durable results: a run that is killed and retried repeats no finished task."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import redis
import s3fs
import yaml
from prefect import flow, task

from orchestration.errors import PipelineError
from orchestration.runs.idempotency import idempotency_key
from orchestration.settings import ROOT
from tests import parts
from tests.helm.rendering import Object, environment, render
from tests.parts import client_of

FLOWS = ROOT / "tests" / "e2e" / "faults"

Storage = Callable[[str], dict[str, str]]
"""Creates a release's storage on the server at a URL; returns the environment variables of a run's container."""


def _release(folder: Path, url: str, **results: Any) -> dict[str, Any]:
    """Sync the chart's work pool with these results; return the variables of a run's container in the template."""
    values: Object = {"image": {"tag": "1"}, "pool": {"name": f"pool-{uuid4().hex[:8]}"}, "runs": {"results": results}}
    release = f"release-{uuid4().hex[:8]}"
    objects = render("prefect-work-pool", values, release)
    [file] = [each["data"]["pool.yaml"] for each in objects if "pool.yaml" in each.get("data", {})]
    (folder / "pool.yaml").write_text(file)
    command = [sys.executable, "-m", "orchestration", "sync", "--owner", release, str(folder / "pool.yaml")]
    subprocess.run(command, env=os.environ | {"PREFECT_API_URL": url}, cwd=ROOT, capture_output=True, check=True)
    [pool] = yaml.safe_load(file)["work_pools"]
    [container] = pool["base_job_template"]["job_configuration"]["job_manifest"]["spec"]["template"]["spec"][
        "containers"
    ]
    variables = environment(container)
    return {name: value for name, value in variables.items() if name != "KUBERNETES_JOB"}


def _volume(folder: Path) -> Iterator[Storage]:
    def made(url: str) -> dict[str, str]:
        variables = _release(folder, url, storage="volume")
        assert variables["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] == "/results"
        return variables | {"PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(folder / "results")}

    yield made
    assert any((folder / "results").iterdir())


def _s3(folder: Path) -> Iterator[Storage]:
    with parts.s3_server(folder) as server:
        endpoint = server.pop("endpoint")
        s3 = {"bucket": "results", "endpoint": endpoint, "region": "us-east-1"}
        yield lambda url: _release(folder, url, storage="s3", s3=s3) | server
        key, secret = server.values()
        there = s3fs.S3FileSystem(key=key, secret=secret, endpoint_url=endpoint, skip_instance_cache=True)
        assert [each.split("/")[:2] for each in there.ls("results")] == [["results", "prefect"]]


def _redis(folder: Path) -> Iterator[Storage]:
    def made(url: str) -> dict[str, str]:
        variables = _release(folder, url, storage="redis", redis={"existingSecret": "results"}, keepDays=2)
        assert variables["RESULTS_REDIS_URL"] == {"secretKeyRef": {"name": "results", "key": "url"}}
        return variables | {"RESULTS_REDIS_URL": server}

    with parts.redis_server(folder) as server:
        yield made
        with redis.Redis.from_url(server) as there:
            keys = list(there.scan_iter("prefect/release-*/results/*"))
            assert keys
            assert len(keys) == there.dbsize()
            assert all(86400 < there.ttl(key) <= 2 * 86400 for key in keys)


@pytest.fixture(params=[_volume, _s3, _redis], ids=["volume", "s3", "redis"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Yield each storage of results that the chart has; check at the end that the results are in it."""
    yield from request.param(tmp_path)


def _execute(run: str, url: str, variables: dict[str, str]) -> int:
    """Execute a run as a pod does, with a disk that is deleted at the end; return the exit status."""
    with tempfile.TemporaryDirectory() as disk:
        pod = {"PREFECT_API_URL": url, "PREFECT_HOME": disk, "PYTHONPATH": str(ROOT), "PREFECT__FLOW_RUN_ID": run}
        pod["TERMINATION_MESSAGE_PATH"] = f"{disk}/message"
        command = [sys.executable, "-m", "orchestration.runs.engine"]
        return subprocess.run(command, env=os.environ | variables | pod, cwd=FLOWS, capture_output=True).returncode


def _lines(api: httpx.Client, run: str) -> list[str]:
    """Return the log messages of the run and its subflows."""
    body: dict[str, Any] = {"flow_runs": {"parent_flow_run_id": {"any_": [run]}}}
    runs = [run, *(each["id"] for each in api.post("/flow_runs/filter", json=body).raise_for_status().json())]
    body = {"logs": {"flow_run_id": {"any_": runs}}, "sort": "TIMESTAMP_ASC", "limit": 200}
    return [each["message"] for each in api.post("/logs/filter", json=body).raise_for_status().json()]


def test_retry_of_a_killed_run_continues_after_the_finished_tasks(prefect_server: str, storage: Storage) -> None:
    variables = storage(prefect_server)
    with client_of(prefect_server) as api:
        flow_id = api.post("/flows/", json={"name": "stepwise"}).raise_for_status().json()["id"]
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(FLOWS)}}
        body = {"name": "durable", "flow_id": flow_id, "entrypoint": "flow.py:stepwise", "pull_steps": [step]}
        made = api.post("/deployments/", json=body).raise_for_status().json()["id"]
        run = api.post(f"/deployments/{made}/create_flow_run", json={}).raise_for_status().json()["id"]
        assert _execute(run, prefect_server, variables) == -signal.SIGKILL
        for state in ({"type": "CRASHED"}, {"type": "SCHEDULED", "name": "AwaitingRetry"}):
            api.post(f"/flow_runs/{run}/set_state", json={"state": state}).raise_for_status()
        assert _execute(run, prefect_server, variables) == 0
        assert api.get(f"/flow_runs/{run}").json()["state_type"] == "COMPLETED"
        lines = _lines(api, run)
    taken = [re.findall(r"step (\d) in attempt (\d) with key (\S+)", line) for line in lines]
    steps = [each for found in taken for each in found]
    assert Counter((number, execution) for number, execution, _ in steps) == Counter(
        [("1", "1"), ("2", "1"), ("3", "1"), ("4", "1"), ("4", "2"), ("5", "2")]
    )
    assert [each for each in lines if each.startswith("the end")] == [
        "the end: ['1 by 1', '2 by 1', '3 by 1', '4 by 2', '5 by 2']"
    ]
    assert len({key for number, _, key in steps if number == "4"}) == 1, "the retried step has the same key"
    assert len({key for _, _, key in steps}) == 5


@task
def _key(value: object) -> str:
    return idempotency_key()


@pytest.mark.usefixtures("prefect_server")
def test_idempotency_key_depends_on_run_and_inputs() -> None:
    @flow
    def keys() -> list[str]:
        return [_key(value) for value in (1, 2, 2)]

    one, another = keys(), keys()
    assert one[1] == one[2]
    assert len({*one, *another}) == 4


@pytest.mark.usefixtures("prefect_server")
def test_missing_idempotency_key_is_an_error_with_the_cause() -> None:
    with pytest.raises(PipelineError, match="Call it inside a task"):
        idempotency_key()

    @flow
    def unhashable() -> str:
        return str(_key(object.__new__(_Unhashable)))

    with pytest.raises(PipelineError, match="cannot be hashed"):
        unhashable()


class _Unhashable:
    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")
