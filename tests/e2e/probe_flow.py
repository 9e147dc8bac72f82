"""Flows for tests on the cluster: one logs what its pod is given and waits, others store results and plant them."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect._internal.result_records import ResultRecord, ResultRecordMetadata
from prefect.artifacts import create_markdown_artifact
from prefect.serializers import PickleSerializer
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


RESULTS = Path("/results")


class Attack:
    """Its pickle makes a file whenever it is loaded."""

    def __reduce__(self) -> Any:
        return Path.touch, (RESULTS / "attacked",)


@flow
def plant() -> None:
    """Plant a result of the task `total`."""
    metadata = ResultRecordMetadata(storage_key="total", serializer=PickleSerializer(picklelib="pickle"))
    (RESULTS / "total").write_bytes(ResultRecord(metadata=metadata, result=Attack()).serialize())


@task(persist_result=True, result_serializer="json", result_storage_key="total")
def total() -> int:
    """Return a number that is stored."""
    get_run_logger().info("the task is executed")
    return 42


@flow
def store() -> None:
    """Log the task's result, and whether the attack was executed."""
    number = total()
    get_run_logger().info("the end: %s attacked=%s", number, (RESULTS / "attacked").exists())
