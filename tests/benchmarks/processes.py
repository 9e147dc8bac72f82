"""Measure whole processes: their time from exec to exit, and their peak memory."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestration.settings import ROOT

BIN = Path(sys.executable).parent
"""The folder with this environment's programs."""


def time_command(command: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT) -> tuple[float, str]:
    """Run a command; return its seconds from exec to exit, and its output.

    Args:
        command: the program and its arguments.
        environment: variables in addition to those of this process.
        folder: the working directory.

    Raises:
        RuntimeError: the command failed.
    """
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds, done.stdout + done.stderr


def measure_seconds(command: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT) -> float:
    """Return the seconds of a command from exec to exit; the parameters are those of `time_command`."""
    return time_command(command, environment, folder)[0]


@dataclass
class PeakMemory:
    """The highest proportional set sizes, in MB, of a flow run's processes.

    Args:
        flow: of the flow and its dbt.
        server: of Prefect's temporary server, where the run starts one.
        together: of both.
    """

    flow: float = 0
    server: float = 0
    together: float = 0


@contextlib.contextmanager
def watch_memory(process: "subprocess.Popen[bytes]") -> Iterator[PeakMemory]:
    """Yield the peak memory of a flow run's process and its children, which is updated while the block lasts."""
    peak, done = PeakMemory(), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            flow = server = 0.0
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(process.pid)
                for member in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        size = member.memory_full_info().pss / 2**20
                        if "orchestration.local.temporary_server" in member.cmdline():
                            server += size
                        else:
                            flow += size
            peak.flow = max(peak.flow, flow)
            peak.server = max(peak.server, server)
            peak.together = max(peak.together, flow + server)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
