"""Durable results: a run that is killed and retried repeats no finished task."""

import functools
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
import s3fs
import yaml
from prefect import flow, task
from prefect._internal.result_records import ResultRecord, ResultRecordMetadata
from prefect.serializers import PickleSerializer
from prefect.settings import PREFECT_API_URL, temporary_settings

from orchestration.__main__ import main
from orchestration.errors import PipelineError
from orchestration.protocol import SIGNING_KEY_VARIABLE
from orchestration.runs.idempotency import idempotency_key
from orchestration.runs.result_signing import derive_key
from orchestration.settings import ROOT
from tests import parts
from tests.helm.rendering import Object, environment, render
from tests.orchestration.runs.deployed_runs import create_run, execute, log_lines
from tests.parts import client_of

FLOWS = ROOT / "tests" / "e2e" / "faults"

KEY = derive_key(b"m" * 32, "deployment/ours")

Storage = Callable[[str], dict[str, str]]
"""Creates a release's storage on the server at a URL; returns the environment variables of a run's container."""


def _release(folder: Path, url: str, **results: Any) -> dict[str, Any]:
    """Sync the chart's work pool with these results; return the variables of a run's container in the template."""
    values: Object = {"image": {"tag": "1"}, "pool": {"name": f"pool-{uuid4().hex[:8]}"}, "runs": {"results": results}}
    release = f"release-{uuid4().hex[:8]}"
    objects = render("prefect-work-pool", values, release)
    [file] = [manifest["data"]["pool.yaml"] for manifest in objects if "pool.yaml" in manifest.get("data", {})]
    (folder / "pool.yaml").write_text(file)
    with temporary_settings({PREFECT_API_URL: url}):
        assert main(["sync", "--owner", release, str(folder / "pool.yaml")]) == 0
    [pool] = yaml.safe_load(file)["work_pools"]
    [container] = pool["base_job_template"]["job_configuration"]["job_manifest"]["spec"]["template"]["spec"][
        "containers"
    ]
    variables = environment(container)
    own = {name: value for name, value in variables.items() if name != "KUBERNETES_JOB"}
    # The worker adds the key to the run's Job.
    return own | {SIGNING_KEY_VARIABLE: KEY}


@functools.cache
def _volume_release(url: str) -> dict[str, str]:
    """Return the variables of a run whose results are on a volume. The tests share the release."""
    with tempfile.TemporaryDirectory() as folder:
        variables = _release(Path(folder), url, storage="volume")
    assert variables["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] == "/results"
    return variables


def _volume(folder: Path) -> Iterator[Storage]:
    yield lambda url: _volume_release(url) | {"PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(folder / "results")}
    assert any((folder / "results").iterdir())


def _s3(folder: Path) -> Iterator[Storage]:
    with parts.s3_server(folder) as server:
        endpoint = server.pop("endpoint")
        s3 = {"bucket": "results", "endpoint": endpoint, "region": "us-east-1"}
        yield lambda url: _release(folder, url, storage="s3", s3=s3) | server
        key, secret = server.values()
        there = s3fs.S3FileSystem(key=key, secret=secret, endpoint_url=endpoint, skip_instance_cache=True)
        assert [path.split("/")[:2] for path in there.ls("results")] == [["results", "prefect"]]


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


@pytest.fixture(
    params=[
        pytest.param(_volume, id="volume", marks=pytest.mark.further),  # retries on the cluster have a volume, too
        pytest.param(_s3, id="s3"),
        pytest.param(_redis, id="redis", marks=pytest.mark.further),
    ]
)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """Yield each storage of results that the chart has; check at the end that the results are in it."""
    yield from request.param(tmp_path)


def _steps(lines: list[str]) -> list[tuple[str, str, str]]:
    """The number, run attempt and idempotency key of each step that was executed."""
    taken = [re.findall(r"step (\d) in attempt (\d) with key (\S+)", line) for line in lines]
    return [step for found in taken for step in found]


def test_retry_of_a_killed_run_continues_after_the_finished_tasks(prefect_server: str, storage: Storage) -> None:
    variables = storage(prefect_server)
    with client_of(prefect_server) as api:
        run = create_run(api, "flow.py:stepwise", FLOWS)
        assert execute(run, prefect_server, variables) == -signal.SIGKILL
        for state in ({"type": "CRASHED"}, {"type": "SCHEDULED", "name": "AwaitingRetry"}):
            api.post(f"/flow_runs/{run}/set_state", json={"state": state}).raise_for_status()
        assert execute(run, prefect_server, variables) == 0
        assert api.get(f"/flow_runs/{run}").json()["state_type"] == "COMPLETED"
        lines = log_lines(api, run)
    steps = _steps(lines)
    assert Counter((number, execution) for number, execution, _ in steps) == Counter(
        [("1", "1"), ("2", "1"), ("3", "1"), ("4", "1"), ("4", "2"), ("5", "2")]
    )
    assert [line for line in lines if line.startswith("the end")] == [
        "the end: ['1 by 1', '2 by 1', '3 by 1', '4 by 2', '5 by 2']"
    ]
    assert len({key for number, _, key in steps if number == "4"}) == 1, "the retried step has the same key"
    assert len({key for _, _, key in steps}) == 5


class _Attack:
    """Its pickle makes a file whenever it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self._marker,)


ATTACKS = [
    ("planted", "is not signed"),
    pytest.param("foreign", "has a signature of another deployment", marks=pytest.mark.further),
    pytest.param("deleted", "", marks=pytest.mark.further),
]
"""The attacks on the results of the previous run attempt, and why the results are not loaded."""


def _plant(file: Path, marker: Path) -> None:
    metadata = ResultRecordMetadata(storage_key=str(file), serializer=PickleSerializer(picklelib="pickle"))
    file.write_bytes(ResultRecord(metadata=metadata, result=_Attack(marker)).serialize())


@pytest.mark.parametrize(("attack", "reason"), ATTACKS)
def test_planted_deleted_and_foreign_results_are_executed_again(
    prefect_server: str, tmp_path: Path, attack: str, reason: str
) -> None:
    """Also the subflow that had completed, whose result no cache key leads to."""
    variables = next(_volume(tmp_path))(prefect_server)
    marker = tmp_path / "attacked"
    with client_of(prefect_server) as api:
        run = create_run(api, "flow.py:stepwise", FLOWS)
        assert execute(run, prefect_server, variables) == -signal.SIGKILL
        for state in ({"type": "CRASHED"}, {"type": "SCHEDULED", "name": "AwaitingRetry"}):
            api.post(f"/flow_runs/{run}/set_state", json={"state": state}).raise_for_status()
        stored = [file for file in (tmp_path / "results").iterdir() if file.is_file()]
        assert len(stored) >= 4, "three steps and a subflow"
        if attack == "planted":
            for file in stored:
                _plant(file, marker)
        elif attack == "deleted":
            for file in stored:
                file.unlink()
        else:
            variables = variables | {SIGNING_KEY_VARIABLE: derive_key(b"m" * 32, "deployment/theirs")}
        assert execute(run, prefect_server, variables) == 0
        assert api.get(f"/flow_runs/{run}").json()["state_type"] == "COMPLETED"
        lines = log_lines(api, run)
    assert not marker.exists()
    assert [number for number, attempt, _ in _steps(lines) if attempt == "2"] == ["1", "2", "3", "4", "5"]
    assert f"the end: {[f'{number} by 2' for number in range(1, 6)]}" in lines
    if reason:
        assert len([line for line in lines if line.startswith("Not loaded: ") and reason in line]) >= 3


@pytest.mark.further
def test_process_of_a_task_loads_no_planted_result(prefect_server: str, tmp_path: Path) -> None:
    variables = next(_volume(tmp_path))(prefect_server)
    (tmp_path / "results").mkdir()
    marker = tmp_path / "attacked"
    _plant(tmp_path / "results" / "total", marker)
    with client_of(prefect_server) as api:
        for executions in (1, 0):
            run = create_run(api, "pooled_flow.py:pooled", Path(__file__).parent)
            assert execute(run, prefect_server, variables) == 0
            lines = log_lines(api, run)
            assert lines.count("the task is executed") == executions
            assert "the end: 42" in lines
    assert not marker.exists()


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
