"""Flows for faults: they say in which pod they run, and die of what they are told, in their first execution alone."""

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
    """Take that long; first use so many MiB of memory, or be killed.

    Args:
        seconds: what its first execution takes; the others at most 5.
        memory: MiB; as long as there is less, the first execution dies of it.
        killed: whether the first execution is ended by SIGKILL.
        deaf: whether SIGTERM does nothing to it.
        slot: the name of a limit of whose slots it holds one meanwhile; empty is none.
    """
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _begin()
    if memory:
        held = bytearray(memory * 2**20)
        held[::4096] = b"x" * len(held[::4096])
    if killed and flow_run.run_count == 1:
        _die()
    # Long enough for whatever is to happen to it; what is tried again has no reason to be slow.
    with concurrency([slot] if slot else []):
        time.sleep(seconds if flow_run.run_count == 1 else min(seconds, 5))
    get_run_logger().info("the end")


ENOUGH = Path("/tmp/enough")  # noqa: S108 - in the pod
"""A file that ends `ticking` early."""


@flow
def ticking(times: int, slot: str = "") -> None:
    """Log every two seconds until there is a file `ENOUGH`; hold a slot of a limit meanwhile, if one is named."""
    _begin()
    with concurrency([slot] if slot else []):
        for number in range(times):
            get_run_logger().info("tick %s", number)
            time.sleep(2)
            if ENOUGH.exists():
                break
    get_run_logger().info("the end")


@flow
def holding() -> None:
    """Die with all of its pod while it and a task hold what there is one of."""
    with concurrency("scarce"):
        hold()


@task(tags=["scarce"])
def hold() -> None:
    """Die while it holds a slot of the limit of that tag."""
    _die(-1)


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


@flow
def piecewise(pieces: int, seconds: float, memory: int = 0) -> None:
    """Take so many steps, and keep a journal of it that no kill can undo, for `tests.long.soak`.

    Args:
        pieces: how many steps.
        seconds: of each.
        memory: MiB; as long as there is less, an execution dies of it.
    """
    os.environ["EXECUTION"] = str(flow_run.run_count)
    os.environ["JOURNAL"] = str(Path(os.environ["PREFECT_RESULTS_LOCAL_STORAGE_PATH"]) / "journal" / str(flow_run.id))
    note("began")
    _begin()
    if memory:
        held = bytearray(memory * 2**20)
        held[::4096] = b"x" * len(held[::4096])
    for number in range(1, pieces + 1):
        piece(number, seconds)
    note("ended")


@task(tags=["piece"])
def piece(number: int, seconds: float) -> None:
    """Hold a slot of the limit by that tag, say in which execution, and four times a second that this one is alive."""
    get_run_logger().info("step %s in execution %s", number, os.environ["EXECUTION"])
    note(f"step {number}")
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.25))
        note("alive")


def note(what: str) -> None:
    """A line of the run's journal: when, which execution, in which pod, what. What is written survives its process."""
    line = f"{time.time():.3f} {os.environ['EXECUTION']} {os.environ['HOSTNAME']} {what}\n"
    journal = Path(os.environ["JOURNAL"])
    journal.parent.mkdir(exist_ok=True)
    with journal.open("a") as file:
        file.write(line)


def _begin() -> None:
    """Say which execution this is, and where and when, by its own clock."""
    where, when = os.environ["HOSTNAME"], datetime.now(UTC).isoformat()
    get_run_logger().info("execution %s in %s at %s", flow_run.run_count, where, when)


def _die(pid: int = 0) -> None:
    """Once the server has what was said so far: it reads log and tasks seconds late.

    Args:
        pid: who is killed; 0 is this process, -1 all of the container.
    """
    get_run_logger().info("dies")
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while not _is_told(client) and time.monotonic() < deadline:
            time.sleep(0.5)
    os.kill(pid or os.getpid(), signal.SIGKILL)


def _is_told(client: SyncPrefectClient) -> bool:
    ours = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[UUID(flow_run.id)]))
    if not any(line.message == "dies" for line in client.read_logs(ours)):
        return False
    with contextlib.suppress(ObjectNotFound):
        return not task_run.id or client.read_task_run(UUID(task_run.id)).state_name == "Running"
    return False
