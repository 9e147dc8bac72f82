"""Which Prefect server a flow that is started by hand talks to.

`python -m orchestration.local.temporary_server FD` is the temporary server itself, on a bound socket that it inherits.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import urlopen

from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_DEFAULT_WORK_POOL_NAME,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_UI_URL,
    get_current_settings,
    temporary_settings,
)

from orchestration.errors import PipelineError
from orchestration.prefect_compat.server_internals import TEMPORARY_SERVER_APP, temporary_server_variables


@contextlib.contextmanager
def reachable_server() -> Iterator[None]:
    """Use the checkout's server if one is up, else a temporary one for the block.

    The checkout's server is `[tool.prefect] api.url` in pyproject.toml, where `prefect server start`
    listens. An address that the environment gives in `PREFECT_API_URL` is meant: if it does not
    answer, that is an error and no reason to run elsewhere.

    Raises:
        PipelineError: the temporary server does not start.
    """
    url = PREFECT_API_URL.value()
    # One that is busy is not absent: where nobody listens that is said at once.
    if url and _answers(url, timeout=10):
        if urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1"):
            _ensure_work_pool(PREFECT_DEFAULT_WORK_POOL_NAME.value())
        yield
    elif "PREFECT_API_URL" in os.environ:
        yield
    else:
        missing = f" at {url}" if url else ""
        print(f"No Prefect server is up{missing}: this run has a temporary one.", file=sys.stderr)
        # It serves no UI, so there is no page to point to.
        with temporary_server() as own, temporary_settings({PREFECT_API_URL: own, PREFECT_UI_URL: ""}):
            yield


@contextlib.contextmanager
def temporary_server() -> Iterator[str]:
    """The API's URL of a Prefect server on the database in `PREFECT_HOME`; it ends with the block.

    It is the server that Prefect itself starts where it has no address, `create_app` without UI and
    background services, but beside the flow's imports and not after them, without the server's
    modules in the flow's memory (60 MB), on a port that nobody can take in between, and ended with
    the flow even if that is killed.

    Raises:
        PipelineError: it did not start, with its last words.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        server = subprocess.Popen(
            [sys.executable, "-m", "orchestration.local.temporary_server", str(listener.fileno())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            text=True,
            env=os.environ | get_current_settings().to_environment_variables(exclude_unset=True),
        )
    assert server.stdin
    assert server.stderr
    last_words: list[str] = []
    reader = threading.Thread(target=lambda stream: last_words.extend(stream), args=[server.stderr], daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        while not _answers(url, timeout=2):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                reader.join()
                said = " ".join(line.strip() for line in last_words[-1:]) or "it said nothing"
                raise PipelineError(
                    f"The temporary Prefect server did not start: {said}. See that {PREFECT_HOME.value()} can be "
                    "written to and has room, or start a server with: prefect server start"
                )
            time.sleep(0.05)
        yield url
    finally:
        server.stdin.close()
        server.terminate()
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        reader.join()
        server.stderr.close()


def _answers(url: str, timeout: float) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=timeout) as response:  # noqa: S310 - the operator's own address
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


def _serve(descriptor: int) -> None:
    """Be the temporary server until stdin closes."""
    import uvicorn

    def end_with_parent() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ |= temporary_server_variables()
    uvicorn.run(TEMPORARY_SERVER_APP, factory=True, fd=descriptor, log_level="error", lifespan="on")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
