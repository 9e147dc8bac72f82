"""The flow of the benchmark of starts: it logs when its first line ran, and when its container started."""

import os
import time
from pathlib import Path

from prefect import flow, get_run_logger


def read_container_start() -> float:
    """Return when the container's first process started, in seconds since 1970."""
    ticks = int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


@flow
def first_line(seconds: float = 0) -> None:
    """Log the time of the first line and the start of the container, and go on for some seconds."""
    now = time.time()
    get_run_logger().info("first line at %.3f in a container of %.3f", now, read_container_start())
    time.sleep(seconds)
