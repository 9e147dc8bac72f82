"""The hand-over of a run to a warm pod: the environment variables that differ between runs.

A warm pod was created before its run was known. The worker hands the run over by an annotation of the pod, and the
kubelet writes the annotation to a file in the container (downward API). Log collectors copy annotations, and one of the
variables is the run's credential. So the worker encrypts the variables with a key. Only the specifications of the pod
and of its Job have the key, where those of other runs have the credential.

The supervisor imports this module, which therefore imports the standard library alone.
"""

import base64
import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping

POLL_SECONDS = 0.02
"""How often a warm pod looks at the file. A look takes 20 microseconds."""


def encrypt(variables: Mapping[str, str], key: str) -> str:
    """Return environment variables as the text of an annotation.

    Args:
        variables: the variables.
        key: a random key for this one text: the cipher is a stream that depends on the key alone.
    """
    return base64.b64encode(_apply_stream(json.dumps(variables).encode(), key)).decode()


def decrypt(text: str, key: str) -> dict[str, str]:
    """Return the environment variables in a text of `encrypt`.

    Raises:
        ValueError: the text was made with another key, or is damaged.
    """
    return dict(json.loads(_apply_stream(base64.b64decode(text), key)))


def _apply_stream(content: bytes, key: str) -> bytes:
    stream = hashlib.shake_256(key.encode()).digest(len(content))
    return bytes(one ^ other for one, other in zip(content, stream, strict=True))


def wait_for_run(file: str, key: str, seconds: float, is_ready: Callable[[], bool]) -> dict[str, str]:
    """Wait until a run is handed over; return its environment variables.

    Args:
        file: the file with the text, empty until then.
        key: the key of the text.
        seconds: how long to wait.
        is_ready: whether the pod can still execute a run.

    Returns:
        Empty if the time has passed, or if the pod cannot execute a run.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and is_ready():
        # While the kubelet replaces the file, it may be absent.
        with contextlib.suppress(FileNotFoundError), open(file) as opened:  # noqa: PTH123 - no pathlib here
            if text := opened.read():
                return decrypt(text, key)
        time.sleep(POLL_SECONDS)
    return {}
