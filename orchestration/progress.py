"""What a long step says: what it does, how long such a step takes, and how long it took."""

import contextlib
import sys
import time
from collections.abc import Iterator


@contextlib.contextmanager
def step(what: str, usual: str) -> Iterator[None]:
    """Print `what` before the block and its seconds after it; `usual` is what it takes on 2 cores."""
    print(f"{what} ({usual}) ...", end="", file=sys.stderr, flush=True)
    start = time.monotonic()
    try:
        yield
    except BaseException:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
