"""The target folder of one dbt command: separate, as two commands in one folder mix up their files."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PARSE = "partial_parse.msgpack"
"""dbt's parse of the project, in a target folder."""

SOURCES = "sources.json"
"""The freshness of the sources, in a target folder: dbt's selections `source_status:` read the last one there."""


@contextlib.contextmanager
def target_folder(shared: Path) -> Iterator[Path]:
    """Yield a new target folder, which replaces the content of the shared one after success.

    The folder starts with the partial parse and the freshness of the sources of the shared one. In a checkout that is
    not writable, the folder is temporary and its files are deleted.

    Args:
        shared: the project's target folder.
    """
    try:
        shared.mkdir(exist_ok=True)
        folder, lock = _locked_folder(shared)
    except OSError:
        folder, lock = Path(tempfile.mkdtemp(prefix="dbt-")), None
    try:
        with contextlib.suppress(OSError):
            shutil.copyfile(shared / PARSE, folder / PARSE)
        with contextlib.suppress(OSError):
            shutil.copyfile(shared / SOURCES, folder / SOURCES)
            os.utime(folder / SOURCES, (0, 0))
        yield folder
        if folder.parent == shared:
            with contextlib.suppress(OSError):
                for entry in folder.iterdir():
                    if is_copy(entry):
                        continue
                    if entry.is_dir():
                        shutil.rmtree(shared / entry.name, ignore_errors=True)
                    entry.replace(shared / entry.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def is_copy(file: Path) -> bool:
    """Return whether a file of the target folder is of an earlier command: this one has not written it."""
    return file.name == SOURCES and file.stat().st_mtime == 0


def _locked_folder(shared: Path) -> tuple[Path, int]:
    """Make a folder in `shared`, and remove those that killed commands left.

    Returns:
        The folder, and the file descriptor that locks it.
    """
    shared_descriptor = os.open(shared, os.O_RDONLY)
    try:
        # One process at a time: a new folder that is not locked yet would look abandoned.
        fcntl.flock(shared_descriptor, fcntl.LOCK_EX)
        for other in shared.glob(".run-*"):
            lock = os.open(other, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
        folder = Path(tempfile.mkdtemp(prefix=".run-", dir=shared))
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return folder, lock
    finally:
        os.close(shared_descriptor)
