"""Which Prefect server a flow that is started by hand talks to."""

import contextlib
import os
from collections.abc import Iterator
from urllib.request import urlopen

from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE, temporary_settings


@contextlib.contextmanager
def reachable_server() -> Iterator[None]:
    """Use the checkout's server if one is up, else Prefect's temporary one for this process.

    The checkout's server is `[tool.prefect] api.url` in pyproject.toml, where `prefect server start`
    listens. An address that the environment gives in `PREFECT_API_URL` is meant: if it does not
    answer, that is an error and no reason to run elsewhere.
    """
    url = PREFECT_API_URL.value()
    if url is None or "PREFECT_API_URL" in os.environ or _answers(url):
        yield
        return
    with temporary_settings({PREFECT_API_URL: None, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True}):
        yield


def _answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
