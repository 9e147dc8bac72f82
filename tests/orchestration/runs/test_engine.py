"""Execution of a flow run by the container's command, with a real server: exit statuses and states."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest

from orchestration.prefect_api import Server
from orchestration.reconciler.model import End, Pod
from orchestration.reconciler.orphans import release_leased_slots
from orchestration.settings import ROOT
from tests.parts import asked, client_of, free_port, kill_run_processes, wait_until
from tests.relay import relayed

FLOW = """
import asyncio, ctypes, os, signal, subprocess, sys, time
from datetime import datetime, timezone
from pathlib import Path
from prefect import flow, pause_flow_run, suspend_flow_run, task
from prefect.concurrency.asyncio import concurrency as concurrency_async
from prefect.concurrency.sync import concurrency
from prefect.states import Scheduled
import sibling

NOTES = Path(os.environ["NOTES"])

def note(what):
    with NOTES.open("a") as file:
        file.write(f"{what}\\n")

@task
def step(cleanup):
    try:
        note("working")
        time.sleep(600)
    finally:
        time.sleep(cleanup)
        note("cleaned up")

async def hold():
    async with concurrency_async("held"):
        note("working")
        await asyncio.sleep(600)

@flow(on_cancellation=[lambda *_: note("hook")], on_crashed=[lambda *_: note("crashed")])
def ends(how="completes", cleanup=1.0):
    child = [sys.executable, "-c", "import sibling; print(sibling.NAME)"]
    note(f"{sibling.NAME} {subprocess.check_output(child, text=True).strip()} {Path('flow.py').exists()}")
    if how == "fails":
        raise ValueError(how)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "signals its parent":
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(600)
    if how == "schedules itself":
        return Scheduled(scheduled_time=datetime.now(timezone.utc))
    if how == "exits":
        os._exit(0)
    if how == "ignores SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note("working")
        time.sleep(600)
    if how == "works":
        step(cleanup)
    if how == "keeps Python's lock":
        try:
            note("working")
            ctypes.PyDLL(None).sleep(9)
            note("released")
            time.sleep(600)
        finally:
            note("cleaned up")
    if how == "holds":
        with concurrency("absent"), concurrency("held", occupy=2):
            with concurrency("held", occupy=3):
                note("inside")
            asyncio.run(hold())
    if how == "ends when asked":
        note("working")
        while not NOTES.with_name("end").exists():
            time.sleep(0.05)

@flow
def retried(then="works"):
    if not NOTES.exists():
        note("failed")
        raise ValueError
    if then == "suspends":
        suspend_flow_run(timeout=3600, key="approval")
        note("approved")
    elif then == "schedules itself":
        if NOTES.read_text().split() == ["failed"]:
            note("scheduled")
            return Scheduled(scheduled_time=datetime.now(timezone.utc))
    else:
        step(0)

@flow
def paused():
    try:
        note("working")
        pause_flow_run(timeout=3600, poll_interval=1)
        note("approved")
    finally:
        note("cleaned up")
"""


LONG = "long " * 40_000
"""A description that is longer than a pipe takes at once."""

POD = Pod("pod", "run", "job", datetime.now(UTC))


EXECUTION = ("grace", "after", "every", "begin", "deadline", "python", "prefects")
"""Parameters of `Run.execute`."""


class Run:
    """Creates a deployment and a run of the flow, and executes the run as its container does."""

    def __init__(self, api: httpx.Client, url: str, folder: Path, **fields: Any) -> None:
        self.api, self.url, self.folder = api, url, folder
        (folder / "code").mkdir()
        (folder / "code/flow.py").write_text(FLOW)
        (folder / "code/sibling.py").write_text("NAME = 'sibling'")
        flow = self.ask("POST", "/flows/", name="ends")["id"]
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(folder / "code")}}
        body = {"name": folder.name, "flow_id": flow, "entrypoint": "flow.py:ends", "pull_steps": [step]}
        self.deployment = self.ask("POST", "/deployments/", **body | fields)["id"]

    def ask(self, method: str, path: str, /, **body: Any) -> Any:
        return asked(self.api, method, path, body or None)

    def claim(self, **parameters: Any) -> str:
        """Create the run as claimed by a worker; return the name of the claim's Job."""
        path = f"/deployments/{self.deployment}/create_flow_run"
        made = self.ask("POST", path, parameters=parameters, state={"type": "PENDING"})
        self.id = made["id"]
        return f"job-{made['state']['id'][-12:]}"

    def start(self, job: str = "", **options: Any) -> None:
        """Execute the run in the pod of its claim's Job; without a Job, create the run first.

        Options of `execute` go to `execute`. All other options are parameters of the flow.
        """
        execution = {name: options.pop(name) for name in EXECUTION if name in options}
        if not job:
            self.claim(**options)
        self.execute(job or "job", **execution)

    def execute(
        self,
        job: str = "job",
        grace: int = 60,
        after: str = "reschedule",
        every: float = 0.5,
        begin: float = 240,
        deadline: str = "",
        python: str = sys.executable,
        prefects: bool = False,
    ) -> None:
        """Execute the run as its container does, or by Prefect's own command.

        Args:
            job: the name of the Job.
            grace: the grace period in seconds.
            after: Prefect's behaviour after SIGTERM.
            every: the supervisor's check interval in seconds. The usual interval would only prolong the tests.
            begin: how many seconds the supervisor waits for the API.
            deadline: the Job's deadline in seconds; empty for none.
            python: the interpreter.
            prefects: whether to use Prefect's own command.
        """
        code = (
            "import sys; from orchestration.runs import run_client, supervisor; "
            f"run_client.CHECK_INTERVAL_SECONDS, run_client.BEGIN_TIMEOUT_SECONDS = {every}, {begin}; "
            "run_client.CHECK_TIMEOUT_SECONDS = 60; "
            "sys.exit(supervisor.main(sys.argv[1:]))"
        )
        env = os.environ | {
            "PREFECT_API_URL": self.url, "PREFECT__FLOW_RUN_ID": self.id, "KUBERNETES_JOB": job,
            "PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": after, "GRACE_SECONDS": str(grace),
            "TERMINATION_MESSAGE_PATH": str(self.folder / "message"), "NOTES": str(self.folder / "notes"),
            "TMPDIR": str(self.folder), "PYTHONPATH": str(ROOT),
            "ACTIVE_DEADLINE_SECONDS": deadline,
        }  # fmt: skip
        with (self.folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                [python, *(["-m"] if prefects else ["-c", code]), "prefect", "flow-run", "execute"],
                env=env, cwd=self.folder, start_new_session=True, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        return dict(self.ask("GET", f"/flow_runs/{self.id}")["state"])

    def labels(self) -> dict[str, Any]:
        return dict(self.ask("GET", f"/flow_runs/{self.id}")["labels"])

    def notes(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / "notes").read_text().splitlines()
        return []

    def wait_for_note(self, note: str) -> None:
        wait_until(lambda: note in self.notes(), note)

    def engine(self) -> int:
        """Return the id of the engine's process."""
        found = wait_until(lambda: psutil.Process(self.process.pid).children(), "the engine")
        return int(found[0].pid)

    def fence(self) -> None:
        """Fence the run's Job."""
        self.ask("PATCH", f"/flow_runs/{self.id}/labels", **{"reconciler.fenced.job": True})

    def message(self) -> dict[str, Any]:
        """Return the termination message."""
        return dict(json.loads((self.folder / "message").read_text()))

    def active_slots(self) -> int:
        """Return how many slots of the concurrency limit are taken."""
        return int(self.ask("GET", "/v2/concurrency_limits/held")["active_slots"])

    async def release_slots(self, *pods: Pod) -> None:
        """Release the slots of pods that have ended, as the reconciler does."""
        async with httpx.AsyncClient(base_url=self.url, timeout=75) as client:
            await release_leased_slots(Server(client, self.url), list(pods))

    def ended(self) -> tuple[int, str]:
        """Wait until the process ends; return its exit status and the name of the run's state."""
        return self.process.wait(300), self.state()["name"]


@pytest.fixture
def run(prefect_server: str, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Yield a function that creates a run, which is not started."""
    with client_of(prefect_server) as api, contextlib.ExitStack() as stack:

        def end(made: Run) -> None:
            if hasattr(made, "process"):
                kill_run_processes(made.id)
                made.process.wait()

        def make(**fields: Any) -> Run:
            made = Run(api, prefect_server, tmp_path, **fields)
            stack.callback(end, made)
            return made

        yield make


@pytest.mark.parametrize(
    ("how", "code", "state"),
    [
        ("completes", 0, "Completed"),
        pytest.param("fails", 0, "Failed", marks=pytest.mark.further),
        ("killed", 137, "Running"),
        pytest.param("exits", 0, "Running", marks=pytest.mark.further),
    ],
)
def test_exit_status_and_state_are_those_of_the_flow(run: Callable[..., Run], how: str, code: int, state: str) -> None:
    """Child processes import from the working directory, too. A killed engine leaves the state to the reconciler.

    The deployment of the run that completes is longer than a pipe takes at once.
    """
    made = run(description=LONG if how == "completes" else None)
    made.start(how=how)
    assert made.ended() == (code, state)
    assert made.notes() == ["sibling sibling True"]
    assert made.message().keys() <= {"peak", "limit", "oom_kills"}
    assert "Warning" not in (made.folder / "log").read_text()


@pytest.mark.further
def test_code_in_a_folder_is_copied(run: Callable[..., Run], tmp_path: Path) -> None:
    made = run(pull_steps=None, path=str(tmp_path / "code"))
    made.start()
    assert made.ended() == (0, "Completed")
    assert made.notes() == ["sibling sibling True"]


def test_log_ends_with_the_reason_if_the_flow_cannot_be_loaded(run: Callable[..., Run]) -> None:
    made = run(entrypoint="absent.py:ends")
    made.start()
    assert made.ended() == (1, "Pending")
    assert "absent.py" in (made.folder / "log").read_text().splitlines()[-1]


def test_run_is_rescheduled_after_sigterm_once_its_tasks_have_cleaned_up(run: Callable[..., Run]) -> None:
    made = run()
    made.start(how="works", cleanup=2)
    made.wait_for_note("working")
    made.process.terminate()
    while True:
        state = made.state()["name"]
        if "cleaned up" in made.notes():
            break
        assert state == "Running"
        time.sleep(0.1)
    assert made.ended() == (0, "AwaitingRetry")
    assert made.notes()[1:] == ["working", "cleaned up"]
    assert made.state()["message"] == "Retry 1 of 10 after a disruption. Its pod was asked to end."
    assert made.state()["state_details"]["scheduled_time"]
    assert made.labels()["reconciler.disruptions"] == 1


@pytest.mark.further
def test_sigterm_draws_on_the_disruption_budget(run: Callable[..., Run]) -> None:
    """A flow that sends SIGTERM to its own supervisor is not retried for ever."""
    made = run(job_variables={"disruption_retries": 1})
    made.start(how="signals its parent")
    assert made.ended() == (0, "AwaitingRetry")
    made.execute()
    assert made.ended() == (0, "Crashed")
    assert made.state()["message"] == "No retry: all 1 after a disruption are used up. Its pod was asked to end."
    assert (made.labels()["reconciler.disruptions"], made.labels()["reconciler.cause"]) == (1, "disruption")


@pytest.mark.parametrize("budget", [0, pytest.param(1, marks=pytest.mark.further)])
def test_flow_that_schedules_its_own_run_draws_on_the_disruption_budget(run: Callable[..., Run], budget: int) -> None:
    """Otherwise a flow that returns a Scheduled state is executed for ever. A person may retry the crashed run."""
    made = run(job_variables={"disruption_retries": budget})
    made.start(how="schedules itself")
    for _ in range(budget + 1):
        assert made.ended() == (1, "Scheduled")
        made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": "PENDING"})
        made.execute()
    assert made.ended() == (0, "Crashed")
    assert len(made.notes()) == budget + 1
    used_up = f"No retry: all {budget} after a disruption are used up. Its flow has scheduled it again."
    assert made.state()["message"] == used_up
    assert (made.labels()["reconciler.disruptions"], made.labels()["reconciler.cause"]) == (budget, "disruption")
    if not budget:
        return
    made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": "PENDING"}, force=True)
    made.execute()
    assert made.ended() == (1, "Scheduled")
    assert len(made.notes()) == 3


@pytest.mark.parametrize("delay", [0, pytest.param(600, marks=pytest.mark.further)])
def test_run_whose_process_retries_its_flow_is_left_to_the_reconciler(run: Callable[..., Run], delay: int) -> None:
    """No worker would claim such a run if it were Scheduled. With a delay it waits as AwaitingRetry."""
    made = run(entrypoint="flow.py:retried", job_variables={"disruption_retries": 1})
    made.claim()
    policy = {"retries": 1, "retry_delay": delay}
    made.ask("PATCH", f"/flow_runs/{made.id}", empirical_policy=policy)
    made.execute()
    if delay:
        wait_until(lambda: made.state()["name"] == "AwaitingRetry", "the wait for the retry")
    else:
        made.wait_for_note("working")
    made.process.terminate()
    assert made.ended() == (0, "Crashed")
    assert made.state()["message"] == "Its pod was asked to end."
    assert made.labels()["reconciler.cause"] == "disruption"
    assert "reconciler.disruptions" not in made.labels(), "the reconciler counts the retry"


def test_sigterm_of_a_job_with_a_deadline_is_left_to_the_reconciler(run: Callable[..., Run]) -> None:
    """The reconciler knows whether the deadline has passed, after which nothing is retried."""
    made = run()
    made.start(how="works", deadline="20")
    made.wait_for_note("working")
    made.process.terminate()
    code, state = made.ended()
    assert code
    assert state == "Running"
    assert made.notes()[1:] == ["working", "cleaned up"]


@pytest.mark.further
def test_state_is_left_alone_if_kubernetes_retries_the_pod(run: Callable[..., Run]) -> None:
    made = run()
    made.start(how="works", after="relinquish")
    made.wait_for_note("working")
    made.process.terminate()
    assert made.ended() == (1, "Running")
    assert made.notes()[1:] == ["working", "cleaned up"]


@pytest.mark.parametrize("notified", ["by polling", pytest.param("by SIGTERM", marks=pytest.mark.further)])
def test_cancelled_run_executes_its_hooks(run: Callable[..., Run], notified: str) -> None:
    made = run()
    made.start(how="works")
    made.wait_for_note("working")
    if notified == "by SIGTERM":
        made.process.send_signal(signal.SIGSTOP)
    made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": "CANCELLING"})
    if notified == "by SIGTERM":
        made.process.terminate()
        made.process.send_signal(signal.SIGCONT)
    assert made.ended() == (0, "Cancelled")
    assert made.notes()[1:] == ["working", "cleaned up", "hook"]


@pytest.mark.further
def test_run_that_ends_before_it_sees_the_cancellation_is_cancelled(run: Callable[..., Run]) -> None:
    made = run()
    made.start(how="ends when asked", every=600)
    made.wait_for_note("working")
    made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": "CANCELLING"})
    (made.folder / "end").touch()
    assert made.ended() == (0, "Cancelled")


@pytest.mark.parametrize(
    ("state", "final_state"),
    [("RUNNING", "AwaitingRetry"), pytest.param("CANCELLING", "Cancelled", marks=pytest.mark.further)],
)
def test_flow_that_ignores_sigterm_is_killed_in_time_to_set_the_state(
    run: Callable[..., Run], state: str, final_state: str
) -> None:
    made = run()
    made.start(how="ignores SIGTERM", grace=10)
    made.wait_for_note("working")
    engine, began = made.engine(), time.monotonic()
    if state == "CANCELLING":
        made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": state})
    made.process.terminate()
    made.process.wait(300)  # the flow would take 600 s
    assert time.monotonic() - began >= 5
    assert made.state()["name"] == final_state
    wait_until(lambda: not psutil.pid_exists(engine), "the engine to be gone")


@pytest.mark.further
def test_flow_that_keeps_pythons_lock_has_the_whole_grace_period(run: Callable[..., Run]) -> None:
    made = run()
    made.start(how="keeps Python's lock")
    made.wait_for_note("working")
    made.process.terminate()
    assert made.ended() == (0, "AwaitingRetry")
    assert made.notes()[1:] == ["working", "released", "cleaned up"]


DUE_FLOW = """
import asyncio
from datetime import UTC, datetime, timedelta

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import Pending, Scheduled

from orchestration.runs import engine

engine.adapt_prefect()


@flow
def first_line():
    return datetime.now(UTC)


@flow
async def first_line_async():
    return datetime.now(UTC)


async def claim(flow, due):
    async with get_client() as client:
        run = await client.create_flow_run(flow, state=Scheduled(scheduled_time=due))
        await client.set_flow_run_state(run.id, Pending())
        return await client.read_flow_run(run.id)


for number in range(8):
    flow_of_run = first_line_async if number % 2 else first_line
    due = datetime.now(UTC) + timedelta(seconds=1 + number / 8)
    run = asyncio.run(claim(flow_of_run, due))
    first = run_flow(flow_of_run, flow_run=run)
    if number % 2:
        first = asyncio.run(first)
    print((first - due).total_seconds())
"""


def test_first_line_never_comes_before_the_due_time(prefect_server: str, tmp_path: Path) -> None:
    """The server rounds the time until then to whole seconds: without a hold, half of the runs begin too early."""
    (tmp_path / "due.py").write_text(DUE_FLOW)
    env = os.environ | {"PREFECT_API_URL": prefect_server, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "due.py"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    late = [float(line) for line in done.stdout.split()]
    assert len(late) == 8
    assert min(late) >= 0, late


@pytest.mark.parametrize(
    ("then", "state"),
    [("suspends", "Suspended"), pytest.param("schedules itself", "Scheduled", marks=pytest.mark.further)],
)
def test_run_whose_process_has_retried_its_flow_can_be_claimed_once_it_has_left_the_process(
    run: Callable[..., Run], then: str, state: str
) -> None:
    """Workers get no run that Prefect marks as retried in its process."""
    pool = uuid4().hex
    made = run(entrypoint="flow.py:retried")
    made.ask("POST", "/work_pools/", name=pool, type="process")
    made.ask("PATCH", f"/deployments/{made.deployment}", work_pool_name=pool)
    made.claim(then=then)
    made.ask("PATCH", f"/flow_runs/{made.id}", empirical_policy={"retries": 1, "retry_delay": 0})
    made.execute()
    assert made.ended()[1] == state
    if then == "suspends":
        made.ask("POST", f"/flow_runs/{made.id}/resume")
    [found] = made.ask("POST", f"/work_pools/{pool}/get_scheduled_flow_runs")
    assert found["flow_run"]["id"] == made.id
    made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": "PENDING"})
    made.execute()
    assert made.ended() == (0, "Completed")
    assert made.notes() == ["failed", {"suspends": "approved", "schedules itself": "scheduled"}[then]]


@pytest.mark.further
def test_paused_run_is_rescheduled_after_sigterm(run: Callable[..., Run]) -> None:
    """Its process waits, and cleans up. The next run attempt pauses again."""
    made = run(entrypoint="flow.py:paused")
    made.start()
    wait_until(lambda: made.state()["type"] == "PAUSED", "the pause")
    made.process.terminate()
    assert made.ended() == (0, "AwaitingRetry")
    assert made.notes() == ["working", "cleaned up"]
    assert made.labels()["reconciler.disruptions"] == 1
    made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": "PENDING"})
    made.execute()
    wait_until(lambda: made.state()["type"] == "PAUSED", "the second pause")


@pytest.mark.parametrize("state", ["CANCELLING", pytest.param("CANCELLED", marks=pytest.mark.further)])
def test_run_that_was_cancelled_before_its_pod_started_is_not_executed(run: Callable[..., Run], state: str) -> None:
    made = run()
    job = made.claim()
    made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": state}, force=True)
    made.start(job=job)
    assert made.ended() == (0, "Cancelled")
    assert made.notes() == []


@pytest.mark.parametrize("given_away", [pytest.param(False, marks=pytest.mark.further), True])
def test_claim_executes_its_run_unless_it_was_given_away(
    run: Callable[..., Run], given_away: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim is that of the Job's name, whatever a job variable says."""
    monkeypatch.setenv("RUN_CLAIM", "0123456789ab")
    made = run()
    job = made.claim()
    if given_away:
        for type_ in ("SCHEDULED", "PENDING"):
            made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": type_})
    made.start(job=job)
    assert made.ended() == ((-signal.SIGKILL, "Pending") if given_away else (0, "Completed"))
    assert made.notes() == ([] if given_away else ["sibling sibling True"])
    assert ("fenced" in made.message()) == given_away


@pytest.mark.further
def test_late_job_sets_no_state_of_a_run_that_another_worker_has(run: Callable[..., Run]) -> None:
    """The Job is deleted before its supervisor knows that another worker has the run."""
    made = run()
    port = free_port()
    real, made.url = made.url, f"http://127.0.0.1:{port}/api"
    job = made.claim()
    for type_ in ("SCHEDULED", "PENDING"):
        made.ask("POST", f"/flow_runs/{made.id}/set_state", state={"type": type_})
    made.start(job=job)
    made.engine()
    made.process.terminate()
    with relayed(port, real):
        assert made.ended() == (-signal.SIGKILL, "Pending")
    assert made.notes() == []


def test_run_does_not_begin_before_the_api_has_answered(run: Callable[..., Run]) -> None:
    made = run()
    port = free_port()
    real, made.url = made.url, f"http://127.0.0.1:{port}/api"
    job = made.claim()
    made.start(job=job, begin=1)
    assert made.process.wait(300) == 137
    assert "does not answer: " in (made.folder / "log").read_text()
    assert made.message()["not_begun"] == 1
    assert (made.state()["name"], made.notes()) == ("Pending", [])
    made.start(job=job)
    made.engine()
    with relayed(port, real):
        assert made.ended() == (0, "Completed")


@pytest.mark.parametrize("dies", ["engine", "supervisor", pytest.param("fenced", marks=pytest.mark.further)])
def test_concurrency_slots_are_released_by_supervisor_or_reconciler(run: Callable[..., Run], dies: str) -> None:
    """The supervisor releases them, also when fenced. If it is killed, the reconciler reads the termination message."""
    made = run()
    made.ask("POST", "/v2/concurrency_limits/", name="held", limit=10)
    try:
        made.start(how="holds")
        made.wait_for_note("working")
        assert made.active_slots() == 3
        engine = made.engine()
        if dies == "supervisor":
            made.process.kill()
        if dies == "fenced":
            made.fence()
        else:
            os.killpg(engine, signal.SIGKILL)
        made.process.wait(300)
        if dies != "supervisor":
            assert made.active_slots() == 0
            return
        assert made.active_slots() == 3
        assert len(made.message()["leases"]) == 2
        ended = End(datetime.now(UTC), 137, "Error", leases=tuple(made.message()["leases"]))
        asyncio.run(made.release_slots(replace(POD, end=replace(ended, is_confirmed=False))))
        assert made.active_slots() == 3, "on a node that is cut off the engine may still run"
        asyncio.run(made.release_slots(replace(POD, end=ended), replace(POD, end=ended)))
        assert made.active_slots() == 0
    finally:
        made.ask("DELETE", "/v2/concurrency_limits/held")


@pytest.mark.further
def test_run_that_has_another_job_keeps_its_state(run: Callable[..., Run]) -> None:
    made = run()
    made.start(how="works")
    made.wait_for_note("working")
    made.ask("PATCH", f"/flow_runs/{made.id}", infrastructure_pid="namespace:another")
    made.process.terminate()
    assert made.ended() == (0, "Running")
    assert made.notes()[1:] == ["working", "cleaned up"]


@pytest.mark.further
def test_engine_that_has_not_begun_is_killed_at_once(run: Callable[..., Run]) -> None:
    made = run()
    made.start(how="works")
    made.engine()
    made.process.terminate()
    assert made.ended() == (0, "AwaitingRetry")
    assert made.notes() == []


def test_fenced_job_ends_with_its_engine(run: Callable[..., Run]) -> None:
    made = run()
    made.start(how="works")
    made.wait_for_note("working")
    engine = made.engine()
    made.fence()
    assert made.ended() == (-signal.SIGKILL, "Running")
    assert made.message() == {"fenced": 1}
    wait_until(lambda: not psutil.pid_exists(engine), "the engine to be gone")
    assert "cleaned up" not in made.notes()


@pytest.mark.further
def test_engine_of_a_fenced_job_is_killed_before_it_reads_its_run(run: Callable[..., Run]) -> None:
    made = run(description=LONG)
    made.start(how="works")
    engine = made.engine()
    wait_until(lambda: "orchestration.runs.engine_start" in psutil.Process(engine).cmdline(), "the engine's exec")
    os.kill(engine, signal.SIGSTOP)
    # The supervisor first reads the run to let it begin, and then polls.
    time.sleep(2)
    made.fence()
    assert made.process.wait(300) == -signal.SIGKILL
    wait_until(lambda: not psutil.pid_exists(engine), "the engine to be gone")
    assert made.notes() == []
    assert made.message() == {"fenced": 1}


@pytest.mark.further
def test_fenced_job_sets_no_state_after_sigterm(run: Callable[..., Run]) -> None:
    made = run()
    made.start(how="works", every=600)
    made.wait_for_note("working")
    made.fence()
    made.process.terminate()
    assert made.ended() == (-signal.SIGKILL, "Running")
    assert made.message() == {"fenced": 1}


def test_state_is_set_once_the_api_is_back(run: Callable[..., Run]) -> None:
    made = run()
    port = free_port()
    real, made.url = made.url, f"http://127.0.0.1:{port}/api"
    with relayed(port, real):
        made.start(how="works")
        made.wait_for_note("working")
    made.process.terminate()
    made.wait_for_note("cleaned up")
    with relayed(port, real):
        assert made.ended() == (0, "AwaitingRetry")


SETUP = """\
import asyncio, sys
if "with retries" in sys.argv:
    from orchestration.runs import engine
    engine.LONGEST_RETRY_PAUSE_SECONDS = 0.5
from prefect.client.orchestration import get_client
async def ask():
    async with get_client() as client:
        await client.read_flows()
"""

CLIENTS = {
    "asynchronous": "asyncio.run(ask())",
    "synchronous": "with get_client(sync_client=True) as client: client.read_flows()",
}


@pytest.mark.parametrize(
    "client",
    [
        pytest.param(CLIENTS["asynchronous"], id="asynchronous"),
        pytest.param(CLIENTS["synchronous"], id="synchronous", marks=pytest.mark.further),
    ],
)
def test_first_request_is_retried_while_the_api_is_down(prefect_server: str, client: str) -> None:
    port = free_port()
    env = os.environ | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT_LOGGING_LEVEL": "DEBUG"}
    command = [sys.executable, "-c", f"{SETUP}{client}\nprint('answered')"]
    without_retries = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "ConnectError" in without_retries.stderr
    many = env | {"PREFECT_CLIENT_MAX_RETRIES": "30"}
    with subprocess.Popen(
        [*command, "with retries"], env=many, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout
        output = ""
        pauses: list[float] = []
        for line in process.stdout:
            output += line
            pauses += map(float, re.findall(r"Another attempt will be made in ([\d.]+)s", line))
            if len(pauses) == 4:
                break
        else:
            raise AssertionError(output)
        assert max(pauses) < 0.5 * 1.5
        with relayed(port, prefect_server):
            assert process.stdout.read().splitlines()[-1] == "answered"
    assert process.returncode == 0


USER = {
    "flows/common.py": "X = 'flows.common'\n",
    "flows/team/common.py": "X = 'common'\n",
    "orchestration/__init__.py": "",
    "orchestration/rates.py": "X = 'orchestration.rates'\n",
    "src/pkg/util.py": "X = 'src.pkg.util'\n",
    "src/pkg/steps.py": """
import site, sys
from pathlib import Path
def install():
    here = Path.cwd()
    Path(site.getsitepackages()[0], "installed.pth").write_text(f"{here / 'src'}\\n")
    sys.path.insert(0, str(here / "old"))
    import helper
    sys.path.remove(str(here / "old"))
""",
    "old/helper.py": "X = 'old/helper'\n",
    "helper.py": "X = 'helper'\n",
    "flows/team/etl.py": """
import importlib, os, sys
from pathlib import Path
from prefect import flow

NAMES = "flows.common", "common", "orchestration.rates", "src.pkg.util", "pkg.util", "flows.team.common", "helper"

@flow
def a():
    for name in NAMES:
        try:
            found = importlib.import_module(name).X
        except Exception as error:
            found = type(error).__name__
        with open(os.environ["NOTES"], "a") as file:
            file.write(f"{name}: {found}\\n")
""",
}


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """Return the interpreter of an environment with this environment's packages, in which pull steps may install."""
    folder = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "inherited.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path) + "\n")
    return folder / "bin" / "python"


@pytest.mark.parametrize(
    "entrypoint", ["flows/team/etl.py:a", pytest.param("flows.team.etl.a", marks=pytest.mark.further)]
)
def test_users_code_is_imported_as_under_prefects_command(
    run: Callable[..., Run], tmp_path: Path, environment: Path, entrypoint: str
) -> None:
    """The repository has folders with this project's names, without `__init__.py`, and a package to install."""
    repository = tmp_path / "repository"
    for name, content in USER.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(content)
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *arguments], check=True)
    clone = {"id": "clone", "repository": f"file://{repository}", "branch": "main"}
    made = run(
        entrypoint=entrypoint,
        pull_steps=[
            {"prefect.deployments.steps.git_clone": clone},
            {"prefect.deployments.steps.set_working_directory": {"directory": "{{ clone.directory }}"}},
            {"src.pkg.steps.install": {}},
        ],
    )
    found = []
    for prefects in (True, False):
        made.start(python=str(environment), prefects=prefects)
        assert made.ended() == (0, "Completed"), (made.folder / "log").read_text()
        found.append(made.notes())
        (made.folder / "notes").unlink()
        for file in environment.parent.parent.glob("lib/python*/site-packages/installed.pth"):
            file.unlink()
    assert found[1] == found[0]
    assert dict(note.split(": ") for note in found[0]) == {
        "flows.common": "flows.common",
        "common": "common" if ":" in entrypoint else "ModuleNotFoundError",
        "orchestration.rates": "orchestration.rates",
        "src.pkg.util": "src.pkg.util",
        "pkg.util": "src.pkg.util",
        "flows.team.common": "common",
        "helper": "helper",
    }
