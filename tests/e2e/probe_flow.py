"""A flow for tests on the cluster: it logs what its pod is given, and waits as long as its parameters say."""

import os
import socket
import time
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.variables import Variable


@task
def wait(seconds: float, until: str = "") -> None:
    """Wait; with `until`, at most until the server has a variable of that name."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not (until and Variable.get(until)):
        time.sleep(min(left, 2) if until else left)


def is_reachable(address: str) -> bool:
    """Tell whether HOST:PORT accepts a connection."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 3).close()
    except OSError:
        return False
    return True


@flow
def probe(text: str = "", seconds: float = 0, addresses: list[str] | None = None, until: str = "") -> None:
    """Log the text and the pod's environment, wait, and log which addresses accept a connection."""
    logger = get_run_logger()
    logger.info("text=%s GREETING=%s", text, os.environ.get("GREETING"))
    token = Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists()
    logger.info(
        "token=%s services=%s", token, any(name.endswith("_SERVICE_HOST") for name in os.environ if "PREFECT" in name)
    )
    wait(seconds, until)
    for address in addresses or []:
        logger.info("reaches %s: %s", address, is_reachable(address))
    create_markdown_artifact(f"# {text}", key="probe")
