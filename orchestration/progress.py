"""Progress of long steps on the terminal: the step, its usual duration, and its duration."""

import contextlib
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def step(title: str, usual: str) -> Iterator[None]:
    """Print a title before the block, and the duration in seconds after the block.

    Args:
        title: what the block does.
        usual: the usual duration on 2 cores, such as `5 s`.
    """
    print(f"{title} ({usual}) ...", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
