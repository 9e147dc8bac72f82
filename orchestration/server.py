"""Which Prefect server a flow that is started by hand talks to."""

import contextlib
import os
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import urlopen

from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_DEFAULT_WORK_POOL_NAME,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    temporary_settings,
)


@contextlib.contextmanager
def reachable_server() -> Iterator[None]:
    """Use the checkout's server if one is up, else Prefect's temporary one for this process.

    The checkout's server is `[tool.prefect] api.url` in pyproject.toml, where `prefect server start`
    listens. An address that the environment gives in `PREFECT_API_URL` is meant: if it does not
    answer, that is an error and no reason to run elsewhere.
    """
    url = PREFECT_API_URL.value()
    if url and _answers(url):
        if urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1"):
            _ensure_work_pool(PREFECT_DEFAULT_WORK_POOL_NAME.value())
        yield
    elif url is None or "PREFECT_API_URL" in os.environ:
        yield
    else:
        with temporary_settings({PREFECT_API_URL: None, PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True}):
            yield


def _answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=2) as response:  # noqa: S310 - the operator's own address
            return bool(response.status == 200)
    except OSError:
        return False


def _ensure_work_pool(name: str | None) -> None:
    """Create the default work pool on a new server of this machine, as `prefect deploy` needs one."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    if not name:
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(name)
        except ObjectNotFound:
            from prefect.workers.process import ProcessWorker

            template = ProcessWorker.get_default_base_job_template()
            pool = WorkPoolCreate(name=name, type="process", base_job_template=template)
            with contextlib.suppress(ObjectAlreadyExists):
                client.create_work_pool(pool)
