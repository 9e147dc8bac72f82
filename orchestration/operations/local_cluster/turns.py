"""Turns: what a machine has once is used by one process at a time."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def turn(file: Path, *, shared: bool = False) -> Iterator[None]:
    """Wait until nobody else has the turn that `file` stands for.

    Those who share it wait for none of their kind. A process that ends, however it ends, gives its turn back.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_RDONLY | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
