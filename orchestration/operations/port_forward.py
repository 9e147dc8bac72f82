"""Reach the Prefect API and UI of an environment from outside the cluster, by a port forward."""

import base64
import contextlib
import json
import os
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from orchestration.api_tls import CERTIFICATE_VARIABLE
from orchestration.errors import ClusterError
from orchestration.operations.environment import SERVER, Environment, Object
from orchestration.prefect_api import Access

AUTH_SECRET = f"{SERVER}-auth"
API_TIMEOUT_SECONDS = 30.0
"""How long a request may take, and how long the server may take to answer the first one."""


def read_credentials(environment: Environment) -> str:
    """Return USER:PASSWORD of the API, from its Secret."""
    found = environment.kubectl("get", "secret", AUTH_SECRET, "--output", 'go-template={{index .data "auth-string"}}')
    return base64.b64decode(found).decode()


def _read_ca(environment: Environment) -> str:
    """Return the certificate of the CA of an API that serves HTTPS; empty for an API that serves HTTP."""
    found: Object = json.loads(environment.kubectl("get", "deployment", f"{SERVER}-api", "--output", "json"))
    pod = found["spec"]["template"]["spec"]
    variables = {variable["name"] for container in pod["containers"] for variable in container.get("env", [])}
    if CERTIFICATE_VARIABLE not in variables:  # a volume `tls` is then a person's
        return ""
    [secret] = [volume["secret"]["secretName"] for volume in pod["volumes"] if volume["name"] == "tls"]
    text = environment.kubectl("get", "secret", secret, "--output", 'go-template={{index .data "ca.crt"}}')
    return base64.b64decode(text).decode()


@contextlib.contextmanager
def ca_file(environment: Environment) -> Iterator[str]:
    """Yield a file with the certificate of the API's CA; an empty name for an API that serves HTTP."""
    with tempfile.NamedTemporaryFile("w", suffix=".crt") as file:
        file.write(_read_ca(environment))
        file.flush()
        yield file.name if file.tell() else ""


@dataclass(frozen=True)
class Forward:
    """A port of this machine that leads to the server.

    Args:
        url: the address of API and UI on this machine.
        process: kubectl, which ends when the pod that it forwards to ends.
        ca: a file with the certificate of the API's CA; empty for an API that serves HTTP.
    """

    url: str
    process: subprocess.Popen[str]
    ca: str


@contextlib.contextmanager
def forward_port(environment: Environment, port: int = 0) -> Iterator[Forward]:
    """Forward a port of this machine to the API and UI while the block lasts.

    Args:
        environment: the environment of the server.
        port: a port of the loopback interface; 0 takes a free one.

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
    # kubectl prints a line for each connection. Unread lines fill the pipe, and after some thousands it stops.
    reader = threading.Thread(target=process.stdout.read, daemon=True)
    try:
        line = process.stdout.readline()
        if "127.0.0.1:" not in line:
            output = [line, *process.stdout.read().splitlines()]
            raise ClusterError(
                f"The server in {environment.namespace} cannot be reached: {output[-1].strip()}. "
                f"Look at its pods: make status ENV={environment.name}"
            )
        reader.start()
        with ca_file(environment) as ca:
            # The certificate has the name `localhost`.
            base = "https://localhost" if ca else "http://127.0.0.1"
            yield Forward(f"{base}:{line.split('127.0.0.1:')[1].split()[0]}", process, ca)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        if reader.is_alive():
            reader.join(60)
        process.stdout.close()


@contextlib.contextmanager
def api_client(environment: Environment) -> Iterator[httpx.Client]:
    """Yield an authenticated client of the environment's Prefect API.

    Raises:
        ClusterError: there is no server, or it does not answer within `API_TIMEOUT_SECONDS`.
    """
    credentials = read_credentials(environment)
    with (
        forward_port(environment) as forward,
        # A synchronous client, which prefect_api does not have: these commands run no event loop.
        # The server closes a connection after 5 s idle. The client closes it earlier, so that no request meets that.
        httpx.Client(
            base_url=f"{forward.url}/api",
            auth=Access(f"{forward.url}/api", credentials),
            verify=ssl.create_default_context(cafile=forward.ca) if forward.ca else True,
            timeout=API_TIMEOUT_SECONDS,
            limits=httpx.Limits(keepalive_expiry=2),
        ) as client,
    ):
        deadline = time.monotonic() + API_TIMEOUT_SECONDS
        while True:
            try:
                client.get("/health").raise_for_status()
                break
            except httpx.HTTPError as error:
                if time.monotonic() > deadline:
                    raise ClusterError(
                        f"The Prefect API in {environment.namespace} does not answer: {error}. "
                        f"Look at its pods: make status ENV={environment.name}"
                    ) from None
                time.sleep(0.2)
        yield client
