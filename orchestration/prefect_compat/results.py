"""The private interfaces of Prefect's stored results: each read and write of a record passes one check."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

import prefect
from prefect import flow_engine, results, task_runners
from prefect._internal.result_records import ResultRecordMetadata
from prefect.exceptions import MissingContextError
from prefect.filesystems import LocalFileSystem, NullFileSystem
from prefect.logging import get_logger, get_run_logger
from prefect.results import ResultStore
from prefect.utilities.annotations import NotSet

from orchestration.prefect_compat import warn_if_untested

warn_if_untested("prefect", prefect.__version__)

_RESULTS: Any = results

_INITIALIZE = task_runners._initialize_process_pool_worker

FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
"""The numbers of the errors of a full file system."""


def guard_writes(guard: Callable[[Any, int], AbstractContextManager[None]]) -> None:
    """Enter a context around each write of a record. Leave no part of a record in a local storage that is full.

    Replaces: `call_explicitly_sync_block_method`, `call_explicitly_async_block_method` of `prefect.results`
    Why: every write of a record calls one of these two, for each storage of a flow, task or cache policy
    Until: a result store has hooks for the bytes of its records

    Args:
        guard: takes the storage and the number of bytes, and returns the context.
    """
    call_block, acall_block = _RESULTS.call_explicitly_sync_block_method, _RESULTS.call_explicitly_async_block_method

    @contextmanager
    def guarded(block: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        if method != "write_path" or isinstance(block, NullFileSystem):
            yield
            return
        with guard(block, len(kwargs["content"])):
            try:
                yield
            except OSError as error:
                if isinstance(block, LocalFileSystem) and error.errno in FULL_ERRORS:
                    # A retry would find the part, and warn that its signature is wrong.
                    with suppress(OSError):
                        block._resolve_path(args[0]).unlink()
                raise

    def call(block: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with guarded(block, method, args, kwargs):
            return call_block(block, method, args, kwargs)

    async def acall(block: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with guarded(block, method, args, kwargs):
            return await acall_block(block, method, args, kwargs)

    _RESULTS.call_explicitly_sync_block_method = call
    _RESULTS.call_explicitly_async_block_method = acall


class Signer(Protocol):
    """Signs records for their location, and verifies signed records."""

    def sign(self, location: str, content: bytes) -> bytes:
        """Return the signed record to store."""

    def verify(self, location: str, stored: bytes) -> bytes:
        """Return the content of a signed record, or raise an error."""


def sign_records(signer: Signer, untrusted: type[Exception]) -> None:
    """Let this process store and load only signed records.

    A record without a valid signature is a cache miss, with one warning for each location.

    Replaces: `call_explicitly_sync_block_method`, `call_explicitly_async_block_method` of `prefect.results`
    Why: every read and write of a record calls one of these two, for each storage of a flow, task or cache policy
    Until: a result store has hooks for the bytes of its records

    Args:
        signer: the signer with the key of this process.
        untrusted: the error that the signer raises for an invalid signature.
    """
    calls = _CheckedCalls(signer, untrusted)
    _RESULTS.call_explicitly_sync_block_method = calls.call
    _RESULTS.call_explicitly_async_block_method = calls.acall
    keep_links_out()
    check_separate_results(calls)
    rerun_unreadable_subflows(untrusted)


class _CheckedCalls:
    """Signs what storage blocks write, and verifies what they read."""

    def __init__(self, signer: Signer, untrusted: type[Exception]) -> None:
        self._signer = signer
        self._untrusted = untrusted
        self._call = _RESULTS.call_explicitly_sync_block_method
        self._acall = _RESULTS.call_explicitly_async_block_method
        self._warned: set[str] = set()
        self._lock = threading.Lock()

    def call(self, block: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self._call(block, method, args, self._signed(block, method, args, kwargs))
        return self._verified(block, method, args, found)

    async def acall(self, block: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = await self._acall(block, method, args, self._signed(block, method, args, kwargs))
        return self._verified(block, method, args, found)

    def _signed(self, block: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if method != "write_path" or isinstance(block, NullFileSystem):
            return kwargs
        return kwargs | {"content": self._signer.sign(_location(block, args[0]), kwargs["content"])}

    def _verified(self, block: Any, method: str, args: tuple[Any, ...], found: Any) -> Any:
        if method != "read_path" or found is None:
            return found
        location = _location(block, args[0])
        try:
            return self._signer.verify(location, found)
        except self._untrusted as error:
            self._warn(location, error)
            raise

    def _warn(self, location: str, error: Exception) -> None:
        with self._lock:
            if location in self._warned:
                return
            self._warned.add(location)
        try:
            logger: Any = get_run_logger()
        except MissingContextError:
            logger = get_logger("results")
        logger.warning("Not loaded: %s. Its task or flow is executed again.", error)


def _location(block: Any, path: str) -> str:
    """Return a record's location: the type of the storage block, and the path in the storage.

    A storage key and the absolute path of its file have the same location.
    """
    resolve = getattr(block, "_resolve_path", None)
    resolved = resolve(path) if resolve else None
    return f"{type(block).get_block_type_slug()}:{path if resolved is None else resolved}"


def keep_links_out() -> None:
    """Name a file in a local storage by its path, and do not follow symbolic links.

    With a planted link, a record would have the name of another record.

    Replaces: `LocalFileSystem._resolve_path`
    Why: Prefect takes the file that a link leads to as a record's storage key
    Until: Prefect's local storage does not follow links
    """
    resolve = LocalFileSystem._resolve_path

    @wraps(resolve)
    def resolved(self: LocalFileSystem, path: str) -> Path:
        resolve(self, path)  # raises an error for a path outside the storage
        base = Path(self.basepath or ".").expanduser().resolve()
        named = Path(os.path.normpath(base / Path(path or "").expanduser()))
        if named != base and base not in named.parents:
            # The path names the storage's folder through a link.
            return resolve(self, path)
        return named

    LocalFileSystem._resolve_path = resolved  # type: ignore[method-assign]


def check_separate_results(calls: _CheckedCalls) -> None:
    """Let a result exist only if both its metadata and its content have a valid signature.

    Replaces: `ResultStore.exists`, `ResultStore.aexists`
    Why: with a cache policy's own storage Prefect checks the metadata alone, and fails when it reads the content
    Until: a result store handles an unreadable record as absent
    """
    exists, aexists = ResultStore.exists, ResultStore.aexists

    def is_separate(store: ResultStore) -> bool:
        return store.metadata_storage is not None and not isinstance(store.metadata_storage, NullFileSystem)

    def content_key(metadata: bytes) -> str | None:
        return ResultRecordMetadata.load_bytes(metadata).storage_key

    @wraps(exists)
    def checked_exists(self: ResultStore, key: str) -> bool:
        found = exists(self, key)
        if not found or not is_separate(self):
            return found
        storage = self.result_storage or _RESULTS.get_default_result_storage(_sync=True)
        with suppress(Exception):
            metadata = calls.call(self.metadata_storage, "read_path", (key,), {})
            return calls.call(storage, "read_path", (content_key(metadata),), {}) is not None
        return False

    @wraps(aexists)
    async def checked_aexists(self: ResultStore, key: str) -> bool:
        found = await aexists(self, key)
        if not found or not is_separate(self):
            return found
        storage = self.result_storage or await _RESULTS.aget_default_result_storage()
        with suppress(Exception):
            metadata = await calls.acall(self.metadata_storage, "read_path", (key,), {})
            return await calls.acall(storage, "read_path", (content_key(metadata),), {}) is not None
        return False

    ResultStore.exists = checked_exists  # type: ignore[method-assign]
    ResultStore.aexists = checked_aexists  # type: ignore[method-assign]


def rerun_unreadable_subflows(untrusted: type[Exception]) -> None:
    """Execute a completed subflow again if its result is not trusted or no longer stored, when its parent is retried.

    Replaces: `load_subflow_run` of `FlowRunEngine` and `AsyncFlowRunEngine` in `prefect.flow_engine`
    Why: Prefect reuses a completed subflow's stored result, and fails the parent when it cannot read the result
    Until: Prefect executes a subflow again when it cannot read the stored result
    """
    load, aload = flow_engine.FlowRunEngine.load_subflow_run, flow_engine.AsyncFlowRunEngine.load_subflow_run

    def is_reused(engine: Any, found: Any) -> bool:
        return found is not None and engine._return_value is not NotSet and found.state.is_completed()

    def drop_unusable(engine: Any, found: Any, error: Exception) -> Any:
        """Return the subflow run, or None if its result cannot be used. Prefect handles all other errors."""
        # The storages report a record that is not there by one of these two.
        if not isinstance(error, (untrusted, ValueError, FileNotFoundError)):
            return found
        engine._return_value = NotSet
        return None

    @wraps(load)
    def load_trusted(self: Any, parent_task_run: Any, client: Any, context: Any) -> Any:
        found: Any = load(self, parent_task_run=parent_task_run, client=client, context=context)
        if is_reused(self, found):
            try:
                found.state.result(raise_on_failure=False, retry_result_failure=False, _sync=True)
            except Exception as error:
                return drop_unusable(self, found, error)
        return found

    @wraps(aload)
    async def aload_trusted(self: Any, parent_task_run: Any, client: Any, context: Any) -> Any:
        found: Any = await aload(self, parent_task_run=parent_task_run, client=client, context=context)
        if is_reused(self, found):
            try:
                await found.state.aresult(raise_on_failure=False, retry_result_failure=False)
            except Exception as error:
                return drop_unusable(self, found, error)
        return found

    flow_engine.FlowRunEngine.load_subflow_run = load_trusted  # type: ignore[method-assign]
    flow_engine.AsyncFlowRunEngine.load_subflow_run = aload_trusted  # type: ignore[method-assign]


def prepare_child_processes(prepare: Callable[[], None]) -> None:
    """Call a function in each process of Prefect's process pool, before the first task, after those of earlier calls.

    Replaces: `prefect.task_runners._initialize_process_pool_worker`
    Why: such a process starts without the changes that this module makes to Prefect
    Until: a result store has hooks for the bytes of its records

    Args:
        prepare: a function at the top level of a module, as it is pickled.
    """
    current: Any = task_runners._initialize_process_pool_worker
    earlier = current.prepare if isinstance(current, _PreparedChild) else ()
    task_runners._initialize_process_pool_worker = _PreparedChild(*earlier, prepare)  # type: ignore[assignment]


class _PreparedChild:
    """Initializes a process of the process pool, which receives this object as a pickle."""

    def __init__(self, *prepare: Callable[[], None]) -> None:
        self.prepare = prepare

    def __call__(self, *args: Any) -> None:
        for prepare in self.prepare:
            prepare()
        _INITIALIZE(*args)
