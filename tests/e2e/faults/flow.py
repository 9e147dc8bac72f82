"""Flows for fault tests: they log in which pod they run, and fail as asked in their first run attempt only."""

import contextlib
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from prefect import flow, get_run_logger, task
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run, task_run

from orchestration.runs.idempotency import idempotency_key


@flow
def victim(seconds: float = 0, memory: int = 0, killed: bool = False, deaf: bool = False, slot: str = "") -> None:
    """Sleep; before that use memory or die, if asked.

    Args:
        seconds: how long the first run attempt sleeps; later attempts sleep at most 5.
        memory: MiB to use in every attempt; an attempt with a lower memory limit is OOM-killed.
        killed: whether the first attempt ends by SIGKILL.
        deaf: whether the flow ignores SIGTERM.
        slot: name of a concurrency limit; the flow holds one of its slots while it sleeps. Empty for none.
    """
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _begin()
    if memory:
        held = bytearray(memory * 2**20)
        held[::4096] = b"x" * len(held[::4096])
    if killed and flow_run.run_count == 1:
        _die()
    # The first attempt lasts until the test's fault; a retry has no reason to be slow.
    with concurrency([slot] if slot else []):
        time.sleep(seconds if flow_run.run_count == 1 else min(seconds, 5))
    get_run_logger().info("the end")


STOP_FILE = Path("/tmp/enough")  # noqa: S108 - in the pod
"""A file that ends `ticking` early."""


@flow
def ticking(times: int, slot: str = "") -> None:
    """Log a line every two seconds until `STOP_FILE` exists.

    Args:
        times: how many lines at most.
        slot: name of a concurrency limit; the flow holds one of its slots meanwhile. Empty for none.
    """
    _begin()
    with concurrency([slot] if slot else []):
        for number in range(times):
            get_run_logger().info("tick %s", number)
            time.sleep(2)
            if STOP_FILE.exists():
                break
    get_run_logger().info("the end")


@flow
def holding() -> None:
    """Hold the only slot of a limit and of a tag's limit."""
    with concurrency("scarce"):
        hold()


@task(tags=["scarce"])
def hold() -> None:
    """Sleep while the task holds a slot of its tag's limit."""
    time.sleep(600)


@flow
def stepwise() -> None:
    """Take five steps, some of them in subflows; the first run attempt dies in the fourth step."""
    os.environ["ATTEMPT"] = str(flow_run.run_count)
    results = [step(1), *steps([2]), *steps([3, 4]), step(5)]
    get_run_logger().info("the end: %s", results)


@flow
def steps(numbers: list[int]) -> list[str]:
    """Take the steps with these numbers."""
    return [step(number) for number in numbers]


@task
def step(number: int) -> str:
    """Return the step's number and the run attempt that took it; the first attempt dies in the fourth step."""
    attempt = os.environ["ATTEMPT"]
    get_run_logger().info("step %s in attempt %s with key %s", number, attempt, idempotency_key())
    if number == 4 and attempt == "1":
        _die()
    return f"{number} by {attempt}"


@flow
def piecewise(pieces: int, seconds: float, memory: int = 0) -> None:
    """Take steps and write a journal that survives every kill, for `tests.long.soak`.

    Args:
        pieces: number of steps.
        seconds: duration of each step.
        memory: MiB to use; an attempt with a lower memory limit is OOM-killed.
    """
    os.environ["ATTEMPT"] = str(flow_run.run_count)
    os.environ["JOURNAL"] = str(Path(os.environ["PREFECT_RESULTS_LOCAL_STORAGE_PATH"]) / "journal" / str(flow_run.id))
    write_journal("began")
    _begin()
    if memory:
        held = bytearray(memory * 2**20)
        held[::4096] = b"x" * len(held[::4096])
    for number in range(1, pieces + 1):
        piece(number, seconds)
    write_journal("ended")


@task(tags=["piece"])
def piece(number: int, seconds: float) -> None:
    """Take one step while holding a slot of the tag's limit; write four times a second that the attempt is alive."""
    get_run_logger().info("step %s in attempt %s", number, os.environ["ATTEMPT"])
    write_journal(f"step {number}")
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.25))
        write_journal("alive")


def write_journal(what: str) -> None:
    """Append a line to the run's journal: time, run attempt, pod, `what`. A written line survives its process."""
    line = f"{time.time():.3f} {os.environ['ATTEMPT']} {os.environ['HOSTNAME']} {what}\n"
    journal = Path(os.environ["JOURNAL"])
    journal.parent.mkdir(exist_ok=True)
    with journal.open("a") as file:
        file.write(line)


def _begin() -> None:
    """Log the number of the run attempt, its pod and the pod's clock."""
    pod, now = os.environ["HOSTNAME"], datetime.now(UTC).isoformat()
    get_run_logger().info("attempt %s in %s at %s", flow_run.run_count, pod, now)


def _die() -> None:
    """End by SIGKILL once the server has the log and task states so far, which it stores seconds late."""
    get_run_logger().info("dies")
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while not _is_on_server(client) and time.monotonic() < deadline:
            time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_on_server(client: SyncPrefectClient) -> bool:
    ours = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(flow_run.id)]))
    if not any(line.message == "dies" for line in client.read_logs(ours)):
        return False
    with contextlib.suppress(ObjectNotFound):
        return not task_run.id or client.read_task_run(UUID(task_run.id)).state_name == "Running"
    return False
