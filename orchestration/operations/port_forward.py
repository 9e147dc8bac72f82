"""The Prefect API of an environment, from outside of its cluster."""

import base64
import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from orchestration.errors import ClusterError
from orchestration.operations.environment import SERVER, Environment
from orchestration.prefect_api import Access

SECRET = f"{SERVER}-auth"


def user(environment: Environment) -> str:
    """USER:PASSWORD of the API."""
    found = environment.kubectl("get", "secret", SECRET, "--output", 'go-template={{index .data "auth-string"}}')
    return base64.b64decode(found).decode()


@dataclass(frozen=True)
class Forward:
    """A port of this machine that leads to the server.

    Args:
        url: of the API and UI.
        process: kubectl, which ends with the pod that it leads to.
    """

    url: str
    process: subprocess.Popen[str]


@contextlib.contextmanager
def forwarded(environment: Environment, port: int = 0) -> Iterator[Forward]:
    """A way from this machine to the API and UI, while the block lasts.

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
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    # It has a line for each connection, and with nobody to read them makes no more after some thousands.
    reader = threading.Thread(target=process.stdout.read, daemon=True)
    try:
        line = process.stdout.readline()
        if "127.0.0.1:" not in line:
            said = [line, *process.stdout.read().splitlines()]
            raise ClusterError(f"The server in {environment.namespace} cannot be reached: {said[-1].strip()}")
        reader.start()
        yield Forward(f"http://127.0.0.1:{line.split('127.0.0.1:')[1].split()[0]}", process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)
        if reader.is_alive():
            reader.join(10)
        process.stdout.close()


@contextlib.contextmanager
def connected(environment: Environment) -> Iterator[httpx.Client]:
    """A client of the API, as its user, while the block lasts.

    Raises:
        ClusterError: there is no server, or it does not answer within 30 s.
    """
    auth = user(environment)
    with (
        forwarded(environment) as way,
        # A server closes what is idle for 5 s, which a request may meet; a client is to be first.
        httpx.Client(
            base_url=f"{way.url}/api",
            auth=Access(f"{way.url}/api", auth),
            timeout=30,
            limits=httpx.Limits(keepalive_expiry=2),
        ) as client,
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
