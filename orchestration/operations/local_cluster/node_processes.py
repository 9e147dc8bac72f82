"""Start, find and stop the processes of the local node. Each has a pid file and a log below `STATE`."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster.binaries import LONG_LIVED
from orchestration.operations.local_cluster.node_layout import STATE

COMPONENTS = (
    "registry",
    "containerd",
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "agent",
)
"""The processes of a node that is up."""

SECOND_NODE_COMPONENTS = ("kubelet-2", "containerd-2")

TESTS_PROCESS = "TESTS_PROCESS"
"""Environment variable with the id of the test process that started a program (tests/reporting.py). The node's
processes do not have it: they outlive the tests."""

START_TIMEOUT_SECONDS = 300.0
"""How long a component may take to be ready on a busy machine."""

STOP_TIMEOUT_SECONDS = 5.0
"""How long a process has between SIGTERM and SIGKILL."""


def process_id(name: str) -> int | None:
    """Return the id of a component's process; None if it does not run."""
    try:
        pid, start_time = (STATE / "run" / f"{name}.pid").read_text().split()
        # After a reboot another process may have the same id.
        return int(pid) if _start_time(int(pid)) == start_time else None
    except (OSError, ValueError):
        return None


def _start_time(pid: int) -> str:
    """Return when a process started, in ticks since boot; empty for a zombie.

    Raises:
        OSError: the process does not exist.
    """
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if state == "Z":
        with contextlib.suppress(ChildProcessError):  # this process is not its parent
            os.waitpid(pid, os.WNOHANG)
        return ""
    return fields[18]


def stopped_components() -> list[str]:
    """Return the components of a node that do not run."""
    return [name for name in COMPONENTS if process_id(name) is None]


def start(name: str, *command: str, environment: Mapping[str, str] = {}) -> None:
    """Start a component unless it runs.

    Args:
        name: the name of its pid file and log.
        command: the program and its arguments.
        environment: variables in addition to those of this process.
    """
    if process_id(name) is not None:
        return
    log = os.open(STATE / "log" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # Not subprocess.Popen: it warns when a process outlives this one, and the node's processes do.
    pid = os.posix_spawnp(
        command[0],
        command,
        {name: value for name, value in {**LONG_LIVED, **os.environ, **environment}.items() if name != TESTS_PROCESS},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
        ],
        setsid=True,
    )
    os.close(log)
    (STATE / "run" / f"{name}.pid").write_text(f"{pid} {_start_time(pid)}")


def stop(name: str) -> None:
    """Stop a component by SIGTERM, then by SIGKILL."""
    pid = process_id(name)
    if pid is None:
        return
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        while process_id(name) is not None and time.monotonic() < deadline:
            time.sleep(0.05)


def wait_for(condition: Callable[[], bool], failure: str, name: str, seconds: float = START_TIMEOUT_SECONDS) -> None:
    """Wait until a component is ready.

    Args:
        condition: whether it is ready.
        failure: what to report after the timeout.
        name: the component whose log shows the cause.
        seconds: the timeout.

    Raises:
        ClusterError: the component ended, or the timeout has passed.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        log = STATE / "log" / f"{name}.log"
        if process_id(name) is None:
            last_line = " ".join(log.read_text().strip().splitlines()[-1:])
            raise ClusterError(f"{name} ended: {last_line}. Its log is {log}")
        if time.monotonic() > deadline:
            raise ClusterError(f"After {seconds:.0f} s {failure}. Look at {log}")
        time.sleep(0.1)


def process_ids() -> set[int]:
    """Return the ids of the node's processes. They serve all tests, so no test is charged for them."""
    names = (*COMPONENTS, *SECOND_NODE_COMPONENTS)
    return {pid for name in names if (pid := process_id(name)) is not None}


def pod_processor_seconds() -> dict[str, float]:
    """Return the processor seconds of each namespace's pods since the node's agent started; empty without agent."""
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, float] = json.loads((STATE / "processor.json").read_text())
        return found
    return {}
