"""Flows for faults: they say in which pod they run, and die of what they are told, in their first execution alone."""

import os
import signal
import time

from prefect import flow, get_run_logger, task
from prefect.runtime import flow_run

from orchestration.idempotency import idempotency_key


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
        _die()
    time.sleep(seconds)
    logger.info("the end")


@flow
def ticking(times: int) -> None:
    """Log every two seconds."""
    for number in range(times):
        get_run_logger().info("tick %s", number)
        time.sleep(2)
    get_run_logger().info("the end")


@flow
def stepwise() -> None:
    """Take five steps, some of them in flows of their own, and die in the fourth."""
    os.environ["EXECUTION"] = str(flow_run.run_count)
    results = [step(1), *steps([2]), *steps([3, 4]), step(5)]
    get_run_logger().info("the end: %s", results)


@flow
def steps(numbers: list[int]) -> list[str]:
    """Those of the numbers."""
    return [step(number) for number in numbers]


@task
def step(number: int) -> str:
    """What says in which execution it was taken; the fourth does not end in the first one."""
    execution = os.environ["EXECUTION"]
    get_run_logger().info("step %s in execution %s with key %s", number, execution, idempotency_key())
    if number == 4 and execution == "1":
        _die()
    return f"{number} by {execution}"


def _die() -> None:
    time.sleep(5)  # its log is sent every two seconds
    os.kill(os.getpid(), signal.SIGKILL)
