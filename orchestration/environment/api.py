"""The Prefect API of an environment, from outside of its cluster."""

import base64
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import httpx

from orchestration.environment.target import SERVER, Environment
from orchestration.errors import ClusterError

SECRET = f"{SERVER}-auth"


def user(environment: Environment) -> str:
    """USER:PASSWORD of the API."""
    found = environment.kubectl("get", "secret", SECRET, "--output", 'go-template={{index .data "auth-string"}}')
    return base64.b64decode(found).decode()


@contextlib.contextmanager
def forwarded(environment: Environment, port: int = 0) -> Iterator[str]:
    """The address of the API and UI on this machine, while the block lasts.

    Args:
        environment: where the server is.
        port: of the loopback interface; 0 is any that is free.

    Raises:
        ClusterError: there is no server, or the port is taken.
    """
    command = ["kubectl", "--context", environment.context, "--namespace", environment.namespace]
    process = subprocess.Popen(
        [*command, "port-forward", f"service/{SERVER}-api", f"{port or ''}:4200"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stderr
    try:
        line = process.stdout.readline()
        if "127.0.0.1:" not in line:
            said = process.stderr.read().strip().splitlines()
            raise ClusterError(f"The server in {environment.namespace} cannot be reached: {said[-1] if said else line}")
        yield f"http://127.0.0.1:{line.split('127.0.0.1:')[1].split()[0]}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)
        process.stdout.close()
        process.stderr.close()


@contextlib.contextmanager
def connected(environment: Environment) -> Iterator[httpx.Client]:
    """A client of the API, as its user, while the block lasts.

    Raises:
        ClusterError: there is no server, or it does not answer within 30 s.
    """
    name, _, password = user(environment).partition(":")
    with (
        forwarded(environment) as url,
        httpx.Client(base_url=f"{url}/api", auth=(name, password), timeout=30) as client,
    ):
        deadline = time.monotonic() + 30
        while True:
            try:
                client.get("/health").raise_for_status()
                break
            except httpx.HTTPError as error:
                if time.monotonic() > deadline:
                    raise ClusterError(f"The Prefect API in {environment.namespace} does not answer: {error}") from None
                time.sleep(0.2)
        yield client
