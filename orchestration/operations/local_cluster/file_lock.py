"""Lock what a machine has once, across processes."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def hold_lock(file: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a file while the block lasts. Wait for it first.

    The kernel releases the lock of a process that ends, even by SIGKILL.

    Args:
        file: the file to lock; it is created if it does not exist.
        shared: hold the lock together with other shared holders, and exclude only exclusive ones.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
