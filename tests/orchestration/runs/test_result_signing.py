"""A run loads only stored results that a run of the same deployment has signed."""

import asyncio
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect import flow, flow_engine, results, task, task_runners
from prefect._internal.result_records import ResultRecord, ResultRecordMetadata
from prefect.cache_policies import INPUTS
from prefect.filesystems import LocalFileSystem, RemoteFileSystem, WritableFileSystem
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer, PickleSerializer
from prefect.transactions import atransaction, transaction

from orchestration.errors import SettingsError
from orchestration.prefect_compat import results as compat
from orchestration.protocol import FORMER_SIGNING_KEYS_VARIABLE, SIGNING_KEY_VARIABLE
from orchestration.runs import signed_results
from orchestration.runs.result_signing import (
    ResultSigner,
    UntrustedResultError,
    derive_key,
    read_master_keys,
)
from tests import parts

MASTER = b"0123456789abcdef0123456789abcdef"
OURS, THEIRS = "deployment/ours", "deployment/theirs"


few = settings(max_examples=parts.examples(0.3))


def _signer(scope: str = OURS) -> ResultSigner:
    return ResultSigner(derive_key(MASTER, scope))


@few
@given(st.text(), st.binary())
def test_signed_record_is_verified(location: str, content: bytes) -> None:
    stored = _signer().sign(location, content)
    assert stored != content
    assert _signer().verify(location, stored) == content


@few
@given(st.text(), st.binary(), st.data())
def test_record_with_a_flipped_bit_is_refused(location: str, content: bytes, data: st.DataObject) -> None:
    stored = bytearray(_signer().sign(location, content))
    bit = data.draw(st.integers(0, len(stored) * 8 - 1))
    stored[bit // 8] ^= 1 << bit % 8
    with pytest.raises(UntrustedResultError):
        _signer().verify(location, bytes(stored))


@few
@given(st.text(), st.binary(), st.binary(min_size=1))
def test_record_with_added_or_removed_bytes_is_refused(location: str, content: bytes, more: bytes) -> None:
    stored = _signer().sign(location, content)
    for changed in (stored + more, more + stored, stored[: -len(more)]):
        with pytest.raises(UntrustedResultError):
            _signer().verify(location, changed)


@few
@given(st.text(), st.text(), st.binary())
def test_record_of_another_location_is_refused(one: str, another: str, content: bytes) -> None:
    stored = _signer().sign(one, content)
    for location in {another, one + another, one[:-1]} - {one}:
        with pytest.raises(UntrustedResultError):
            _signer().verify(location, stored)
    if another:
        # Bytes cannot move from the content to the location.
        moved = _signer().sign(one, another.encode() + content).replace(b"\n" + another.encode(), b"\n", 1)
        with pytest.raises(UntrustedResultError):
            _signer().verify(one + another, moved)


@few
@given(st.text(), st.binary(), st.text())
def test_record_of_another_deployment_is_refused(location: str, content: bytes, scope: str) -> None:
    if scope != OURS:
        with pytest.raises(UntrustedResultError):
            _signer().verify(location, _signer(scope).sign(location, content))


@pytest.mark.parametrize("stored", [b"", b"{}", b"hmac-sha256:1:", b"hmac-sha256:1:" + b"0" * 64 + b"\n", "text", None])
def test_unsigned_record_is_refused(stored: Any) -> None:
    with pytest.raises(UntrustedResultError):
        _signer().verify("here", stored)


def test_derived_keys_differ_and_hide_the_master_key() -> None:
    keys = {derive_key(master, scope) for master in (MASTER, MASTER[::-1]) for scope in (OURS, THEIRS, "")}
    assert len(keys) == 6
    assert all(len(bytes.fromhex(key)) == 32 for key in keys)
    assert MASTER.hex() not in keys


@pytest.mark.parametrize("key", ["", "00", "g" * 64, "0" * 63])
def test_wrong_key_is_refused(key: str) -> None:
    with pytest.raises(SettingsError, match=r"RESULTS_SIGNING_KEY .*64 hexadecimal digits"):
        ResultSigner(key)


def test_master_key_is_read_from_the_secrets_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    assert read_master_keys(file) == []
    phrase, binary = b"a key that a person has made, of some words", bytes(range(256))
    for content, keys in (
        (MASTER + b"\n", [MASTER]),
        (MASTER[::-1] + b" \n" + MASTER + b"\n", [MASTER[::-1], MASTER, MASTER[::-1] + b" \n" + MASTER]),
        (phrase, [phrase]),
        (binary, [binary.strip()]),
    ):
        file.write_bytes(content)
        assert read_master_keys(file) == keys
    for content, message in (
        (MASTER[:31], "Key 1 of .* has 31 bytes"),
        (MASTER + b"\n" + MASTER[:31], "Key 2 of .* has 31 bytes"),
        (b"", "Key 1 of .* has 0 bytes"),
    ):
        file.write_bytes(content)
        with pytest.raises(SettingsError, match=rf"{message}.*openssl rand"):
            read_master_keys(file)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_master_keys(tmp_path)


@contextmanager
def _signed(scope: str | None, *masters: bytes) -> Iterator[None]:
    """Act as the process of a run of a deployment, by default with one master key. None: a run without a key."""
    replaced = [
        (results, "call_explicitly_sync_block_method"),
        (results, "call_explicitly_async_block_method"),
        (LocalFileSystem, "_resolve_path"),
        (ResultStore, "exists"),
        (ResultStore, "aexists"),
        (flow_engine.FlowRunEngine, "load_subflow_run"),
        (flow_engine.AsyncFlowRunEngine, "load_subflow_run"),
        (task_runners, "_initialize_process_pool_worker"),
    ]
    with ExitStack() as stack:
        for where, name in replaced:
            stack.enter_context(patch.object(where, name, vars(where)[name]))
        key, *former = [derive_key(master, scope) for master in masters or [MASTER]] if scope else [""]
        variables = {SIGNING_KEY_VARIABLE: key, FORMER_SIGNING_KEYS_VARIABLE: " ".join(former)}
        stack.enter_context(patch.dict(os.environ, variables))
        signed_results.require_signatures.cache_clear()
        signed_results.require_signatures()
        yield
    signed_results.require_signatures.cache_clear()


Storage = tuple[WritableFileSystem, Callable[[str], bytes], Callable[[str, bytes], object]]
"""A storage, and functions that read and write its files without Prefect, as an attacker does."""


def _volume(folder: Path) -> Storage:
    made = folder / "results"
    made.mkdir()
    return (
        LocalFileSystem(basepath=str(made)),
        lambda k: (made / k).read_bytes(),
        lambda k, c: (made / k).write_bytes(c),
    )


@pytest.fixture(params=["volume", "redis"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, use_settings: Callable[..., None]) -> Iterator[Storage]:
    """Yield a storage of each kind that the chart offers."""
    if request.param == "volume":
        yield _volume(tmp_path)
        return
    with parts.redis_server(tmp_path) as url:
        use_settings(RESULTS_REDIS_URL=url)
        made = RemoteFileSystem(basepath=f"redis://{uuid4().hex}/results")
        made._filesystem = there = fsspec.filesystem("redis", skip_instance_cache=True)
        yield (
            made,
            lambda key: bytes(there.cat_file(f"{made.basepath}/{key}")),
            lambda key, content: there.pipe_file(f"{made.basepath}/{key}", content),
        )


class _Attack:
    """Creates a file when its pickle is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self._marker,)


def _planted(key: str, value: object) -> bytes:
    metadata = ResultRecordMetadata(storage_key=key, serializer=PickleSerializer(picklelib="pickle"))
    return ResultRecord(metadata=metadata, result=value).serialize()


def _saved(storage: WritableFileSystem) -> WritableFileSystem:
    """Save the storage as a block on the server, which flows need."""
    if storage._block_document_id is None:
        storage.save(f"results-{uuid4().hex[:8]}")
    return storage


def _flow(storage: WritableFileSystem, executed: list[str], serializer: str = "json", **options: Any) -> Any:
    """Return a flow with one task, `total`, which stores its result and records each execution."""
    options = {"result_storage_key": "total"} | options

    @task(persist_result=True, result_serializer=serializer, **options)
    def total(number: int) -> int:
        executed.append("total")
        return number + 1

    @flow(result_storage=_saved(storage))
    def report() -> int:
        return total(41)

    return report


def _stored(storage: WritableFileSystem, executed: list[str], key: str = "total") -> int:
    """Load a result, or execute and store it, as Prefect does for a task. `_flow` has real tasks."""
    store = ResultStore(result_storage=storage, serializer=JSONSerializer())
    with transaction(key=key, store=store, write_on_commit=True) as made:
        if made.is_committed():
            record = made.read()
            assert record
            return int(record.result)
        executed.append(key)
        made.stage(42)
    return 42


@pytest.mark.parametrize("serializer", ["json", pytest.param("pickle", marks=pytest.mark.further)])
@pytest.mark.usefixtures("prefect_server")
def test_planted_pickle_is_not_executed(
    serializer: str, storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files, read, write = storage
    executed: list[str] = []
    report, marker = _flow(files, executed, serializer), tmp_path / "attacked"
    write("total", _planted("total", _Attack(marker)))
    with _signed(OURS):
        assert report() == 42
        assert executed == ["total"]
        assert not marker.exists()
        assert len([line for line in caplog.messages if "Not loaded: the stored result" in line]) == 1
        assert read("total").startswith(b"hmac-sha256:1:")
        assert report() == 42
    assert executed == ["total"], "the run loads the record that it has signed"


@pytest.mark.further
@pytest.mark.usefixtures("prefect_server")
def test_planted_pickle_is_executed_in_a_run_without_a_key(tmp_path: Path) -> None:
    files, _, write = _volume(tmp_path)
    marker = tmp_path / "attacked"
    write("total", _planted("total", _Attack(marker)))
    with _signed(None):
        _flow(files, [])()
    assert marker.exists(), "the attack of the other tests has an effect"


def test_record_of_another_deployment_is_a_miss(storage: Storage) -> None:
    executed: list[str] = []
    for scope, executions in ((THEIRS, 1), (OURS, 2), (OURS, 2), (THEIRS, 3), (None, 4), (OURS, 5)):
        with _signed(scope):
            assert _stored(storage[0], executed) == 42
        assert len(executed) == executions


def test_rotation_of_the_master_key_keeps_results(tmp_path: Path) -> None:
    new, executed = MASTER[::-1], list[str]()
    files, read, _ = _volume(tmp_path)
    for masters, executions in (((MASTER,), 1), ((new, MASTER), 1), ((new,), 2), ((MASTER, new), 2), ((MASTER,), 3)):
        with _signed(OURS, *masters):
            assert _stored(files, executed) == 42
        assert len(executed) == executions, "with a former key alone, a run does not load what the new key signs"
    with _signed(THEIRS, new, MASTER):
        assert _stored(files, executed) == 42
    assert len(executed) == 4, "also a former key is of one deployment"
    with _signed(OURS, new, MASTER):
        assert _stored(files, executed) == 42
    location = f"local-file-system:{tmp_path / 'results' / 'total'}"
    assert ResultSigner(derive_key(new, OURS)).verify(location, read("total")), "the first key signs"


def test_record_at_another_key_is_a_miss(storage: Storage) -> None:
    files, read, write = storage
    executed: list[str] = []
    with _signed(OURS):
        _stored(files, executed, "other")
        write("total", read("other"))
        assert _stored(files, executed) == 42
    assert executed == ["other", "total"]


def test_record_behind_a_link_is_a_miss(tmp_path: Path) -> None:
    files, _, _ = _volume(tmp_path)
    folder, executed = tmp_path / "results", list[str]()
    with _signed(OURS):
        _stored(files, executed, "other")
        (folder / "total").symlink_to("other")
        _stored(files, executed)
        assert executed == ["other", "total"], "a link does not rename a record"
        # The record that was written through the link has the link's name, not the name of the linked file.
        _stored(files, executed, "other")
    assert executed == ["other", "total", "other"]


def test_storage_at_the_end_of_a_link_is_used(tmp_path: Path) -> None:
    _volume(tmp_path)
    (tmp_path / "link").symlink_to("results")
    executed: list[str] = []
    with _signed(OURS):
        for _ in range(2):
            assert _stored(LocalFileSystem(basepath=str(tmp_path / "link")), executed) == 42
    assert len(executed) == 1


@pytest.mark.parametrize("spoiled", [pytest.param("metadata", marks=pytest.mark.further), "content"])
@pytest.mark.usefixtures("prefect_server")
def test_separate_metadata_and_content_are_both_verified(spoiled: str, tmp_path: Path) -> None:
    files, _, _ = _volume(tmp_path)
    executed: list[str] = []
    keys = tmp_path / "keys"
    options: dict[str, Any] = {"cache_policy": INPUTS.configure(key_storage=keys), "result_storage_key": None}
    with _signed(OURS):
        for _ in range(2):
            assert _flow(files, executed, **options)() == 42
        assert len(executed) == 1
        [metadata] = keys.iterdir()
        key = ResultRecordMetadata.load_bytes(metadata.read_bytes().partition(b"\n")[2]).storage_key
        content = tmp_path / "results" / str(key)
        marker = tmp_path / "attacked"
        if spoiled == "metadata":
            record = ResultRecordMetadata(storage_key=key, serializer=PickleSerializer(picklelib="pickle"))
            metadata.write_bytes(record.dump_bytes())
        else:
            content.write_bytes(PickleSerializer(picklelib="pickle").dumps(_Attack(marker)))
        assert _flow(files, executed, **options)() == 42
        assert not marker.exists()
        assert len(executed) == 2
        assert _flow(files, executed, **options)() == 42
    assert len(executed) == 2


def test_planted_record_does_not_commit_an_async_transaction(storage: Storage, tmp_path: Path) -> None:
    files, read, write = storage
    store, marker = ResultStore(result_storage=files, serializer=JSONSerializer()), tmp_path / "attacked"

    async def commit() -> bool:
        async with atransaction(key="paid", store=store.model_copy(deep=True), write_on_commit=True) as found:
            committed = found.is_committed()
            assert not committed or (await found.read()).result == "once"  # type: ignore[union-attr]
            found.stage("once")
            return committed

    write("paid", _planted("paid", _Attack(marker)))
    with _signed(OURS):
        assert [asyncio.run(commit()) for _ in range(2)] == [False, True]
        write("paid", read("paid")[:-1] + b" ")
        assert asyncio.run(commit()) is False
    assert not marker.exists()


def test_planted_record_does_not_commit_a_transaction(tmp_path: Path) -> None:
    files, _, write = _volume(tmp_path)
    store, marker = ResultStore(result_storage=files, serializer=JSONSerializer()), tmp_path / "attacked"
    write("paid", _planted("paid", _Attack(marker)))
    with _signed(OURS):
        for committed in (False, True):
            with transaction(key="paid", store=store.model_copy(deep=True)) as found:
                assert found.is_committed() == committed
                found.stage("once")
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.usefixtures("prefect_server")
def test_planted_result_of_a_flow_is_not_loaded(tmp_path: Path) -> None:
    files, _, write = _volume(tmp_path)

    @flow(result_storage=_saved(files), persist_result=True)
    def answer() -> int:
        return 42

    with _signed(OURS):
        state: Any = answer(return_state=True)
        [stored] = (tmp_path / "results").iterdir()
        state.data = state.data.metadata  # as in a state from the server
        assert asyncio.run(state.aresult(retry_result_failure=False)) == 42
        marker = tmp_path / "attacked"
        write(stored.name, PickleSerializer(picklelib="pickle").dumps(_Attack(marker)))
        with pytest.raises(UntrustedResultError, match="is not signed"):
            asyncio.run(state.aresult(retry_result_failure=False))
    assert not marker.exists()
    # Prefect leaves a connection open. A later garbage collection would warn, and fail another test.
    del state
    gc.collect()


def test_run_without_a_key_stores_unsigned_records(tmp_path: Path) -> None:
    files, read, _ = _volume(tmp_path)
    with _signed(None):
        store = ResultStore(result_storage=files, serializer=JSONSerializer())
        store.write(42, key="total")
    assert ResultRecord.deserialize(read("total")).result == 42
    shutil.rmtree(tmp_path / "results")


def test_local_storage_names_a_file_by_its_path(tmp_path: Path) -> None:
    files, _, write = _volume(tmp_path)
    assert isinstance(files, LocalFileSystem)
    write("one", b"")
    (tmp_path / "results" / "two").symlink_to("one")
    (tmp_path / "results" / "out").symlink_to("/etc/hostname")
    with _signed(OURS):
        assert [compat._location(files, path).rpartition("/")[2] for path in ("one", "two", "x/../two")] == [
            "one",
            "two",
            "two",
        ]
        with pytest.raises(ValueError, match="outside of the base path"):
            files.read_path("out")
        with pytest.raises(ValueError, match="outside of the base path"):
            files.read_path("../results2")
