"""A flow for faults: it says in which pod it runs, and dies of what it is told, in its first execution alone."""

import os
import signal
import time

from prefect import flow, get_run_logger
from prefect.runtime import flow_run


@flow
def victim(seconds: float = 0, memory: int = 0, killed: bool = False) -> None:
    """Take that long; first use so many MiB of memory, or be killed.

    Args:
        seconds: what it takes.
        memory: MiB; as long as there is less, the first execution dies of it.
        killed: whether the first execution is ended by SIGKILL.
    """
    logger = get_run_logger()
    logger.info("execution %s in %s", flow_run.run_count, os.environ["HOSTNAME"])
    if memory:
        held = bytearray(memory * 2**20)
        held[::4096] = b"x" * len(held[::4096])
    if killed and flow_run.run_count == 1:
        time.sleep(5)  # its log is sent every two seconds
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(seconds)
    logger.info("the end")
