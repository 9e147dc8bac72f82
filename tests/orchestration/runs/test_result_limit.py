"""A deployment stores results up to its limit, and others go on. A storage that is full explains itself."""

import contextlib
import errno
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch
from uuid import uuid4

import fsspec
import pytest
import redis
from prefect import results, task_runners
from prefect.exceptions import SerializationError
from prefect.filesystems import LocalFileSystem, RemoteFileSystem, WritableFileSystem
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer
from prefect.settings import (
    PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK,
    PREFECT_RESULTS_LOCAL_STORAGE_PATH,
    temporary_settings,
)
from prefect.transactions import transaction

from orchestration.errors import SettingsError
from orchestration.protocol import RESULTS_LIMIT_VARIABLE, RESULTS_OWNER_VARIABLE, SIGNING_KEY_VARIABLE
from orchestration.runs import result_limit
from orchestration.runs.result_limit import UNIT_BYTES, Account, FileUnits, ResultNotStoredError
from orchestration.runs.result_signing import derive_key
from orchestration.settings import settings
from tests import parts
from tests.helm.rendering import pod_specs, render
from tests.orchestration.runs.deployed_runs import create_run, execute, log_lines

ONE, ANOTHER = "deployment/one", "deployment/another"

VOLUME_MIB = 32

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a volume that is full")


@contextlib.contextmanager
def _volume(folder: Path, mib: int = VOLUME_MIB) -> Iterator[Path]:
    """Mount a volume of a few MiB."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class Place(NamedTuple):
    """Holds a storage of results of about `VOLUME_MIB`."""

    storage: WritableFileSystem
    limit: str
    full: str
    """The cause in the message of a full storage."""


def _default_block(basepath: str, **settings: Any) -> RemoteFileSystem:
    storage = RemoteFileSystem(basepath=basepath, settings=settings)
    storage._block_document_name = "results"  # as one that is loaded from the server
    return storage


@contextlib.contextmanager
def _on_volume(folder: Path) -> Iterator[Place]:
    with (
        _volume(folder / "results") as mounted,
        temporary_settings({PREFECT_RESULTS_LOCAL_STORAGE_PATH: mounted}),
    ):
        yield Place(LocalFileSystem(basepath=str(mounted)), "25%", os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _in_redis(folder: Path) -> Iterator[Place]:
    with (
        parts.redis_server(folder) as url,
        redis.Redis.from_url(url) as client,
        parts.settings_of(RESULTS_REDIS_URL=url),
        temporary_settings({PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: "remote-file-system/results"}),
    ):
        client.config_set("maxmemory", f"{VOLUME_MIB}mb")
        storage = _default_block(f"redis://{uuid4().hex}/results", ttl=60)
        storage._filesystem = fsspec.filesystem("redis", skip_instance_cache=True, ttl=60)
        yield Place(storage, "25%", "command not allowed when used memory")


@contextlib.contextmanager
def _in_s3(folder: Path) -> Iterator[Place]:
    with (
        _volume(folder / "s3") as mounted,
        parts.s3_server(mounted) as server,
        temporary_settings({PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK: "remote-file-system/results"}),
    ):
        key = {"key": server["AWS_ACCESS_KEY_ID"], "secret": server["AWS_SECRET_ACCESS_KEY"]}
        client = {"endpoint_url": server["endpoint"]}
        yield Place(
            _default_block("s3://results/prefect/test", client_kwargs=client, **key), "8Mi", "InsufficientStorage"
        )


@pytest.fixture(
    params=[
        pytest.param(_on_volume, marks=as_root),
        pytest.param(_in_s3, marks=as_root),
        _in_redis,
    ],
    ids=["volume", "s3", "redis"],
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Yield a small storage of each kind that the chart has."""
    with request.param(tmp_path) as made:
        yield made


@contextlib.contextmanager
def _process(owner: str, limit: str) -> Iterator[None]:
    """Act as a new process of a run of a deployment."""
    replaced = [
        (results, "call_explicitly_sync_block_method"),
        (results, "call_explicitly_async_block_method"),
        (task_runners, "_initialize_process_pool_worker"),
    ]
    with contextlib.ExitStack() as stack:
        for where, name in replaced:
            stack.enter_context(patch.object(where, name, vars(where)[name]))
        stack.enter_context(patch.dict(os.environ, {RESULTS_LIMIT_VARIABLE: limit, RESULTS_OWNER_VARIABLE: owner}))
        result_limit.enforce(None)
        yield


def _store(storage: WritableFileSystem, key: str = "", mib: float = 1) -> None:
    """Store a result of about this size."""
    store = ResultStore(result_storage=storage, serializer=JSONSerializer())
    store.write("." * round(mib * 2**20), key=key or uuid4().hex)


def _fill(storage: WritableFileSystem, most: int) -> tuple[int, str]:
    """Store results of 1 MiB until one is refused; return the number of stored ones, and the message."""
    for number in range(most):
        try:
            _store(storage)
        except ResultNotStoredError as error:
            return number, str(error)
    return most, ""


def test_deployment_at_its_limit_leaves_room_for_others(place: Place) -> None:
    with _process(ONE, place.limit):
        number, message = _fill(place.storage, 20)
        assert 6 <= number <= 8
        assert re.search(r"this deployment has stored about [78] MiB in \S+, and its limit is 8 MiB\. .*"
                         r"raise runs\.results\.limit\.", message)  # fmt: skip
    with _process(ONE, place.limit):
        assert _fill(place.storage, 3)[0] <= 1, "the next run of the deployment"
    with _process(ANOTHER, place.limit):
        assert 6 <= _fill(place.storage, 20)[0] <= 8
    with _process(ONE, "12Mi"):
        assert 3 <= _fill(place.storage, 20)[0] <= 5, "a higher limit"


def test_full_storage_is_explained(place: Place) -> None:
    with _process(ONE, ""):
        number, message = _fill(place.storage, VOLUME_MIB + 1)
        assert 0 < number <= VOLUME_MIB
        assert f" is full ({place.full}" in message
        assert "This deployment has stored" not in message, "without a limit, nothing is counted"
    with _process(ANOTHER, place.limit):
        with pytest.raises(ResultNotStoredError, match=r"This deployment has stored about 0 MiB there\. .*Enlarge the"):
            _store(place.storage, "large", 6)
        assert not ResultStore(result_storage=place.storage, serializer=JSONSerializer()).exists("large")


@as_root
def test_full_volume_keeps_no_part_of_a_result(tmp_path: Path) -> None:
    with _on_volume(tmp_path) as place, _process(ONE, ""):
        with pytest.raises(ResultNotStoredError):
            _store(place.storage, "large", VOLUME_MIB + 1)
        assert not list((tmp_path / "results").iterdir())
        _store(place.storage, "small", VOLUME_MIB / 2)


@as_root
def test_storage_of_a_flow_has_no_limit(tmp_path: Path) -> None:
    own = LocalFileSystem(basepath=str(tmp_path / "own"))
    with _on_volume(tmp_path), _process(ONE, "1Mi"):
        assert _fill(own, 3) == (3, "")
    assert not (tmp_path / "own" / ".stored").exists()


def _units(folder: Path) -> FileUnits:
    return FileUnits(fsspec.filesystem("file"), str(folder), ONE)


def test_many_small_runs_count_right_on_average(tmp_path: Path) -> None:
    """Each run stores 64 KiB, a sixteenth of a unit. The expected count is 100, and its standard deviation 10."""
    units = _units(tmp_path)
    for _ in range(1600):
        account = Account(lambda: units, "100Gi", 0)
        account.admits(0)
        for _ in range(4):
            account.add(UNIT_BYTES // 64)
    assert 50 <= units.count() <= 150


def test_record_takes_a_file_of_a_volume(tmp_path: Path) -> None:
    units = _units(tmp_path)
    account = Account(lambda: units, "1Gi", result_limit.FILE_BYTES)
    account.admits(1)
    for _ in range(UNIT_BYTES // result_limit.FILE_BYTES):
        account.add(1)
    assert units.count() == 1


def test_concurrent_runs_of_a_deployment_share_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, another = (Account(lambda: _units(tmp_path), "8Mi", 0) for _ in "12")
    assert one.admits(UNIT_BYTES)
    assert another.admits(UNIT_BYTES)
    one.add(8 * UNIT_BYTES)
    assert another.admits(UNIT_BYTES), "for up to RECOUNT_SECONDS"
    monkeypatch.setattr(result_limit, "RECOUNT_SECONDS", 0)
    assert not another.admits(UNIT_BYTES)


def test_storage_that_cannot_be_counted_stores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".stored").touch()
    account = Account(lambda: _units(tmp_path), "8Mi", 0)
    for _ in range(2):
        assert account.admits(UNIT_BYTES)
        account.add(UNIT_BYTES)
    assert len([line for line in caplog.messages if "Stored results are not counted for RESULTS_LIMIT" in line]) == 1


def test_units_in_redis_expire_with_their_results(tmp_path: Path, use_settings: Callable[..., None]) -> None:
    with parts.redis_server(tmp_path) as url, redis.Redis.from_url(url) as client:
        use_settings(RESULTS_REDIS_URL=url)
        units = fsspec.filesystem("redis", skip_instance_cache=True, ttl=2).units("redis://release/results/.stored/one")
        assert units.capacity() == 0, "no maxmemory"
        units.add(3)
        assert units.count() == 3
        time.sleep(1.2)
        units.add(4)
        assert units.count() == 7
        parts.wait_until(lambda: units.count() == 4, "the first units to expire")
        parts.wait_until(lambda: not client.dbsize(), "the sorted set to expire")
        units = fsspec.filesystem("redis", skip_instance_cache=True).units("redis://release/results/.stored/one")
        units.add(3)
        assert (units.count(), client.ttl("release/results/.stored/one")) == (3, -1)


def test_redis_user_who_may_not_count_stores(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _in_redis(tmp_path) as place:
        url = settings().results_redis_url
        assert url
        with redis.Redis.from_url(url.get_secret_value()) as client:
            client.execute_command("ACL", "SETUSER", "runs", "on", ">secret", "~*", "+set", "+get")
        with parts.settings_of(RESULTS_REDIS_URL=url.get_secret_value().replace("//:", "//runs:")):
            storage: Any = place.storage
            storage._filesystem = fsspec.filesystem("redis", skip_instance_cache=True, ttl=60)
        with _process(ONE, place.limit):
            assert _fill(storage, 12) == (12, "")
    assert len([line for line in caplog.messages if "Stored results are not counted for RESULTS_LIMIT" in line]) == 1


@pytest.mark.parametrize("limit", ["lots", "-1Gi", "101%", "%", "1 Gi"])
def test_wrong_limit_is_refused(limit: str) -> None:
    with pytest.raises(SettingsError, match=rf"RESULTS_LIMIT='{limit}' .*Set it to 10Gi or 25%"):
        result_limit.ResultLimit(limit)


def test_runs_of_a_deployment_have_one_owner() -> None:
    run: Any = SimpleNamespace(deployment_id="d", flow_id="f")
    assert result_limit.owner_of(run) == "deployment/d"
    run.deployment_id = None
    assert result_limit.owner_of(run) == "flow/f"


def test_prefect_logs_a_result_that_is_not_stored_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As for each task: Prefect rolls the transaction back, and does not fail."""
    assert issubclass(ResultNotStoredError, SerializationError)
    storage = LocalFileSystem(basepath=str(tmp_path))
    rolled_back: list[str] = []
    store = ResultStore(result_storage=storage, serializer=JSONSerializer())
    with (
        temporary_settings({PREFECT_RESULTS_LOCAL_STORAGE_PATH: tmp_path}),
        _process(ONE, "1Mi"),
        transaction(key="paid", store=store) as made,
    ):
        made.stage("." * 2**21, on_rollback_hooks=[lambda _: rolled_back.append("paid")])
    [line] = [record for record in caplog.records if "The result is not stored" in record.getMessage()]
    assert not line.exc_info
    assert rolled_back == ["paid"]


def _delete_old_results(folder: Path) -> None:
    """Delete what is older than 7 days, by the command of the chart's pod."""
    objects = render("prefect-work-pool", {"image": {"tag": "1"}, "runs": {"results": {"storage": "volume"}}})
    [clean] = pod_specs(objects)["StatefulSet/test-prefect-work-pool-results"]["containers"]
    [find] = re.findall(r"while (find /results [^;]+);", clean["args"][0])
    subprocess.run(shlex.split(find.replace("/results", str(folder))), check=True)


@as_root
def test_deleted_results_make_room(tmp_path: Path) -> None:
    with _on_volume(tmp_path) as place:
        folder = tmp_path / "results"
        with _process(ONE, place.limit):
            assert _fill(place.storage, 20)[0] < 20
        for name, _, files in os.walk(folder):
            for file in files:
                os.utime(Path(name, file), (0, 0))
        _delete_old_results(folder)
        with _process(ONE, place.limit):
            assert _fill(place.storage, 6) == (6, "")


def test_run_at_its_limit_completes_and_others_keep_their_results(prefect_server: str, tmp_path: Path) -> None:
    """The tasks of the runs are in a process pool."""
    folder = tmp_path / "results"
    variables = {
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(folder),
        RESULTS_LIMIT_VARIABLE: "2Mi",
        SIGNING_KEY_VARIABLE: derive_key(b"m" * 32, "deployment/ours"),
    }
    with parts.client_of(prefect_server) as api:
        for number, (deployment, count, refused) in enumerate((("flood", 3, 2), ("other", 1, 0)), 1):
            run = create_run(api, "storing_flow.py:store", Path(__file__).parent, deployment, results=count)
            assert execute(run, prefect_server, variables) == 0
            assert api.get(f"/flow_runs/{run}").json()["state_type"] == "COMPLETED"
            lines = log_lines(api, run)
            assert len([line for line in lines if "The result is not stored: this deployment has" in line]) == refused
            assert len([file for file in folder.iterdir() if file.is_file()]) == number, "one result of each"
        owners = {file.parent.name for file in (folder / ".stored" / "deployment").rglob("*") if file.is_file()}
        assert len(owners) == 2
