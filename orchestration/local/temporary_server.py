"""Give a flow on the command line a Prefect server: the checkout's, or a temporary one.

`python -m orchestration.local.temporary_server FD` is the process of the temporary server. FD is the bound socket that
the process inherits.
"""

import contextlib
import importlib
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
from orchestration.garbage_collection import paused_for_imports
from orchestration.prefect_compat.server_internals import TEMPORARY_SERVER_APP, temporary_server_variables


@contextlib.contextmanager
def reachable_server() -> Iterator[None]:
    """Use the checkout's server if it answers, else a temporary server for the block.

    The checkout's server is `[tool.prefect] api.url` in pyproject.toml, where `prefect server start` listens. The
    variable `PREFECT_API_URL` rules out a temporary server: if its server does not answer, the flow fails.

    Raises:
        PipelineError: the temporary server does not start.
    """
    url = PREFECT_API_URL.value()
    # A busy server may take seconds to answer. Without a server the connection is refused at once.
    if url and _answers(url, timeout=10):
        if urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1"):
            _ensure_work_pool(PREFECT_DEFAULT_WORK_POOL_NAME.value())
        yield
    elif "PREFECT_API_URL" in os.environ:
        yield
    else:
        missing = f" at {url}" if url else ""
        print(f"No Prefect server is up{missing}: this run has a temporary one.", file=sys.stderr)
        # The temporary server has no UI, so logs must not link to pages of one.
        with temporary_server() as api_url, temporary_settings({PREFECT_API_URL: api_url, PREFECT_UI_URL: ""}):
            yield


@contextlib.contextmanager
def temporary_server() -> Iterator[str]:
    """Start a Prefect server on the database in `PREFECT_HOME`, yield its API's URL, and stop it after the block.

    Like the server that Prefect starts without `PREFECT_API_URL`, this is `create_app` without UI and background
    services. The differences: it starts in parallel with the flow's imports, the flow's memory does not hold the
    server's modules (60 MB), no other process can take the port, and the server ends with a killed flow.

    Raises:
        PipelineError: the server did not start; has the last line of its stderr.
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
    stderr_lines: list[str] = []
    reader = threading.Thread(target=lambda stream: stderr_lines.extend(stream), args=[server.stderr], daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS.value()
        while not _answers(url, timeout=2):
            if server.poll() is not None or time.monotonic() > deadline:
                server.kill()
                reader.join()
                reason = " ".join(line.strip() for line in stderr_lines[-1:]) or "it printed no reason"
                raise PipelineError(
                    f"The temporary Prefect server did not start: {reason}. Check that {PREFECT_HOME.value()} is "
                    "writable and has free space, or start a server with: prefect server start"
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
    # Without prefect_api: its client retries and is asynchronous, and this is one probe of a process on this machine.
    try:
        with urlopen(f"{url}/health", timeout=timeout) as response:  # noqa: S310 - the operator's address
            return bool(response.status == 200)
    except OSError:
        return False


def _ensure_work_pool(name: str | None) -> None:
    """Create the default work pool on a server of this machine that lacks it, because `prefect deploy` needs a pool."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    if not name:
        return
    # Prefect's own client, as prefect_api has no synchronous one, and its schemas write what `prefect deploy` reads.
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
    """Run the temporary server until stdin closes."""
    import uvicorn

    def end_with_parent() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ |= temporary_server_variables()
    with paused_for_imports():
        importlib.import_module(TEMPORARY_SERVER_APP.partition(":")[0])
    uvicorn.run(TEMPORARY_SERVER_APP, factory=True, fd=descriptor, log_level="error", lifespan="on")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
