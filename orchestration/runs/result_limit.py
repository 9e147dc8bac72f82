"""Limit how much each deployment stores, and explain in one line why a result is not stored.

All runs of a work pool write to one storage. If one deployment fills it, the results of all others are not stored. So
before a process writes a record, it compares what its deployment has stored with the limit.

- Accounting: for each `UNIT_BYTES` that a process stores, it adds one byte to the folder `.stored/deployment/ID` of the
  storage, in a new file; in Redis a member of a sorted set. The length of the folder's files is the deployment's use in
  units. Nothing scans the results or locks anything.
- Small runs: each process begins with a random part of a unit. So many runs that store less than a unit each count
  correctly on average.
- Deletion: these files are as old as the results that they count. What deletes old results deletes them, too.
- Replaced results: each write counts until its time is over.

The limit is soft. The process of the run checks it, so hostile code can leave out the check. Concurrent runs of one
deployment see each other's use after `RECOUNT_SECONDS` at most.
"""

import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID, uuid4

import fsspec
from prefect.blocks.core import BlockNotSavedError
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import SerializationError
from prefect.filesystems import LocalFileSystem, RemoteFileSystem
from prefect.logging import get_logger
from prefect.settings import get_current_settings

from orchestration.errors import PipelineError, SettingsError
from orchestration.prefect_compat import results
from orchestration.prefect_protocol import FLOW_RUN_ID_VARIABLE
from orchestration.protocol import RESULTS_LIMIT_VARIABLE, RESULTS_OWNER_VARIABLE
from orchestration.quantity import parse_quantity

UNIT_BYTES = 2**20
"""How much a process stores for each byte that it adds to the folder of its deployment."""

FILE_BYTES = 2**14
"""The least that a record counts on a volume: ext4 has one inode for 16 KiB."""

RECOUNT_SECONDS = 60.0
"""For how long a process relies on its last count."""

_FULL = re.compile("quota|full|insufficientstorage", re.IGNORECASE)
"""Matches the error codes of S3 servers: InsufficientStorage, QuotaExceeded, XMinioStorageFull."""


class ResultNotStoredError(PipelineError, SerializationError):
    """A result that is not stored as the storage is full, or the limit of the deployment is reached.

    The run continues. Prefect logs a SerializationError in one line, and any other error with its traceback.
    """


class Units(Protocol):
    """Counts the units that one deployment has stored."""

    def count(self) -> int:
        """Return the units of all runs whose results are still stored."""

    def add(self, units: int) -> None:
        """Record more units."""

    def capacity(self) -> int:
        """Return the size of the storage in bytes; 0 if it is not known."""


class FileUnits:
    """Counts units as the length of the files in a folder.

    Args:
        files: the file system of the storage.
        base: the folder or URL of the storage.
        owner: the subfolder of the deployment.
    """

    def __init__(self, files: Any, base: str, owner: str) -> None:
        self._files = files
        self._base = base
        self._folder = f"{base.rstrip('/')}/.stored/{owner}"

    def count(self) -> int:
        """Return the length of all files."""
        self._files.invalidate_cache()  # of listings
        return sum(int(entry["size"]) for entry in self._files.find(self._folder, detail=True).values())

    def add(self, units: int) -> None:
        """Write a file."""
        self._files.makedirs(self._folder, exist_ok=True)
        self._files.pipe_file(f"{self._folder}/{uuid4().hex}", b"." * units)

    def capacity(self) -> int:
        """Return the size of the volume; 0 for a bucket."""
        if not isinstance(self._files, fsspec.get_filesystem_class("file")):
            return 0
        base = Path(self._base)
        return shutil.disk_usage(next(folder for folder in (base, *base.parents) if folder.exists())).total


class Account:
    """Compares what a deployment has stored in one storage with its limit.

    An error while it counts does not keep a run from storing results.

    Args:
        open_units: returns what counts the stored units.
        limit: a quantity, or a share of the storage such as `25%`.
        least: bytes that a record takes at least.
    """

    def __init__(self, open_units: Callable[[], Units], limit: str, least: int) -> None:
        self.limit = 0
        """The limit in bytes; 0 for none, and while it is not known."""
        self._limit = limit
        self._open_units = open_units
        self._units: Units | None = None
        self._least = least
        self._count = 0
        self._counted_at = -math.inf
        self._rest = secrets.randbelow(UNIT_BYTES)
        self._lock = threading.Lock()
        self._is_warned = False

    def admits(self, size: int) -> bool:
        """Return whether a record of `size` bytes fits into the limit."""
        with self._lock:
            if time.monotonic() - self._counted_at >= RECOUNT_SECONDS:
                self._counted_at = time.monotonic()
                with self._warned():
                    self._recount()
            return not self.limit or self.used() + max(size, self._least) <= self.limit

    def _recount(self) -> None:
        self._units = self._units or self._open_units()
        self.limit = _bytes(self._limit, self._units.capacity())
        if self.limit:
            self._count = self._units.count()

    def used(self) -> int:
        """Return about how many bytes the deployment has stored, by the last count."""
        return self._count * UNIT_BYTES

    def add(self, size: int) -> None:
        """Count a record of `size` bytes that has been stored."""
        if not self.limit or not self._units:
            return
        with self._lock:
            units, self._rest = divmod(self._rest + max(size, self._least), UNIT_BYTES)
            self._count += units
            if units:
                with self._warned():
                    self._units.add(units)

    @contextmanager
    def _warned(self) -> Iterator[None]:
        """Log the first error as a warning."""
        try:
            yield
        except Exception as error:
            if not self._is_warned:
                get_logger("results").warning(
                    "Stored results are not counted for %s: %s", RESULTS_LIMIT_VARIABLE, error
                )
            self._is_warned = True


class ResultLimit:
    """Admits the records that the runs of one deployment may store in the default storage.

    Args:
        limit: the limit for each deployment: a quantity, a share of the storage such as `25%`, or empty for none.

    Raises:
        SettingsError: the limit is neither.
    """

    def __init__(self, limit: str) -> None:
        self._limit = limit
        self._accounts: dict[str, Account] = {}
        _bytes(limit, 0)

    @contextmanager
    def storing(self, block: Any, size: int) -> Iterator[None]:
        """Check the limit before the block of a `with` stores a record, and count the record after it.

        Args:
            block: the storage.
            size: bytes of the record.

        Raises:
            ResultNotStoredError: the storage is full, or the limit is reached.
        """
        account = self._account_of(block) if self._limit and _is_default(block) else None
        place = getattr(block, "basepath", "") or block.get_block_type_slug()
        if account and not account.admits(size):
            raise ResultNotStoredError(
                f"The result is not stored: this deployment has stored about {_mebibytes(account.used())} in {place}, "
                f"and its limit is {_mebibytes(account.limit)}. A retry executes the task again. Wait until older "
                "results are deleted, store fewer with persist_result=False, or raise runs.results.limit."
            )
        try:
            yield
        except Exception as error:
            if not (cause := _why_full(error)):
                raise
            own = ""
            if account and account.limit:
                own = f" This deployment has stored about {_mebibytes(account.used())} there."
            raise ResultNotStoredError(
                f"The result is not stored: {place} is full ({cause}).{own} A retry executes the task again. "
                "Enlarge the storage, or lower runs.results.keepDays or runs.results.limit."
            ) from error
        if account:
            account.add(size)

    def _account_of(self, block: LocalFileSystem | RemoteFileSystem) -> Account:
        base = str(block.basepath)
        if base not in self._accounts:
            least = FILE_BYTES if isinstance(block, LocalFileSystem) else 0
            self._accounts[base] = Account(lambda: _units_of(block, base), self._limit, least)
        return self._accounts[base]


def _units_of(block: LocalFileSystem | RemoteFileSystem, base: str) -> Units:
    if isinstance(block, LocalFileSystem):
        return FileUnits(fsspec.filesystem("file"), base, _owner())
    if base.startswith("redis://"):
        units: Units = block.filesystem.units(f"{base}/.stored/{_owner()}")
        return units
    return FileUnits(block.filesystem, base, _owner())


def _is_default(block: Any) -> bool:
    """Return whether a storage is the default storage of this process."""
    default = get_current_settings().results
    if not default.default_storage_block:
        return isinstance(block, LocalFileSystem) and Path(block.basepath or ".") == default.local_storage_path
    if isinstance(block, RemoteFileSystem):
        with suppress(BlockNotSavedError):
            return block.get_block_placeholder() == f"prefect.blocks.{default.default_storage_block}".replace("/", ".")
    return False


def _owner() -> str:
    """Return whose results this process stores: `deployment/ID`, or `flow/ID` for a run without a deployment."""
    if owner := os.environ.get(RESULTS_OWNER_VARIABLE):
        return owner
    with get_client(sync_client=True) as client:
        return owner_of(client.read_flow_run(UUID(os.environ[FLOW_RUN_ID_VARIABLE])))


def owner_of(flow_run: FlowRun) -> str:
    """Return whose results a flow run stores."""
    return f"deployment/{flow_run.deployment_id}" if flow_run.deployment_id else f"flow/{flow_run.flow_id}"


def _bytes(limit: str, capacity: int) -> int:
    """Return a limit in bytes; 0 for none.

    Raises:
        SettingsError: the limit is neither a quantity nor a share.
    """
    try:
        share = re.fullmatch(r"(\d{1,2}|100)%", limit, re.ASCII)
        return int(capacity * Decimal(share[1]) / 100 if share else parse_quantity(limit or "0"))
    except ValueError:
        raise SettingsError(
            f"{RESULTS_LIMIT_VARIABLE}={limit!r} is neither a quantity nor a percentage. Set it to 10Gi or 25%"
        ) from None


def _why_full(error: Exception) -> str:
    """Return why a storage that has refused a record is full. Empty if the storage is not full."""
    if isinstance(error, OSError) and error.errno in results.FULL_ERRORS:
        return error.strerror or os.strerror(error.errno)
    response = getattr(error.__cause__, "response", None)  # of S3
    code = str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""
    return code if _FULL.search(code) else ""


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def enforce(flow_run: FlowRun | None) -> None:
    """Let this process and its process pools store results within the limit of the environment.

    Args:
        flow_run: the run of this process; None to ask the Prefect API before the first result is stored.

    Raises:
        SettingsError: the limit is invalid.
    """
    if flow_run:
        os.environ[RESULTS_OWNER_VARIABLE] = owner_of(flow_run)
    guard_this_process()
    results.prepare_child_processes(guard_this_process)


def guard_this_process() -> None:
    """Let this process store results within the limit of the environment."""
    results.guard_writes(ResultLimit(os.environ[RESULTS_LIMIT_VARIABLE]).storing)
