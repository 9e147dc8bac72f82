"""A flow for tests on the cluster: it shows what its pod is given, and takes as long as it is told."""

import os
import socket
import time
from pathlib import Path

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.variables import Variable


@task
def wait(seconds: float, until: str = "") -> None:
    """Take that long, or that at the most until the server has a variable of that name."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not (until and Variable.get(until)):
        time.sleep(min(left, 2) if until else left)


def reaches(address: str) -> bool:
    """Whether HOST:PORT accepts a connection."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 3).close()
    except OSError:
        return False
    return True


@flow
def probe(text: str = "", seconds: float = 0, addresses: list[str] | None = None, until: str = "") -> None:
    """Log the text and the pod's variables, wait, and say which addresses are reached."""
    logger = get_run_logger()
    logger.info("text=%s GREETING=%s", text, os.environ.get("GREETING"))
    token = Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists()
    logger.info(
        "token=%s services=%s", token, any(name.endswith("_SERVICE_HOST") for name in os.environ if "PREFECT" in name)
    )
    wait(seconds, until)
    for address in addresses or []:
        logger.info("reaches %s: %s", address, reaches(address))
    create_markdown_artifact(f"# {text}", key="probe")
