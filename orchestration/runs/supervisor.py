"""Supervise the flow run in its container.

    python -I -S /app/orchestration/execution.py prefect flow-run execute

The worker asks for the command `prefect flow-run execute`. The supervisor executes the run by
`orchestration.runs.engine_start`, in one process where Prefect's command takes three. Any other command is executed as
given, and receives SIGTERM itself.

- Termination: on SIGTERM, or if the run is Cancelling, the supervisor sends the engine the reason, then SIGTERM, and at
  the end of the grace period SIGKILL. It sets the run Cancelled or AwaitingRetry only after the engine has ended.
  Prefect's command sets the state first: the next run attempt could begin while this one still cleans up.
- Fencing: a node that is cut off continues to execute after its pod was given up and its run retried. So the supervisor
  asks the Prefect API every `CHECK_INTERVAL_SECONDS` whether its Job is fenced, and kills itself if it is. A retry
  starts `FENCED_WITHIN_SECONDS` after the fencing, when the supervisor has stopped. A supervisor that gets no answer
  asks again every `RECHECK_INTERVAL_SECONDS`: what cannot ask cannot report a state either.
- Cancellation before the beginning: a run that is Cancelled or Cancelling is not executed.
- Budget: a flow may return a Scheduled state, and then a worker claims its run again. A run attempt sets the run
  Crashed instead of beginning if the run's states have more such ends than its disruption budget.
- Claim: a Job's name ends with its claim (`claim_of`), the fencing token. Nothing of a run is executed before the
  Prefect API has answered that the claim was not given away. So a Job that is created late, when another worker has the
  run, executes nothing. The engine loads its modules meanwhile.
- Warm pod: the supervisor starts the engine, and waits until the worker hands a run over
  (`orchestration.runs.hand_over`). From then on the pod is that of this run.
- Report: the termination message has the memory use, the out-of-memory kills and the held leases.
- Concurrency slots: the supervisor releases the slots that the engine still holds when it ends. If the supervisor is
  killed, too, the reconciler releases them by the termination message.

This file and what it imports use the standard library alone: the supervisor must add no time to a run's start.

Log lines of the supervisor have the format of `orchestration.logs`. They go to the same log as those of the flow.
"""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from orchestration import prefect_protocol
from orchestration.protocol import (
    CAUSE_LABEL,
    CLAIM_VARIABLE,
    DEADLINE_VARIABLE,
    DISRUPTIONS_LABEL,
    HAND_OVER_KEY_VARIABLE,
    HAND_OVER_VARIABLE,
    RECHECK_INTERVAL_SECONDS,
    WARM_SECONDS_VARIABLE,
    is_paused_in_process,
    is_retried_in_process,
    whole_number,
)
from orchestration.runs import run_client, termination_message
from orchestration.runs.engine_process import EngineProcess
from orchestration.runs.run_client import RunClient, is_client_error

COMMAND = ["prefect", "flow-run", "execute"]

CANCELLED_STATES = ("CANCELLING", "CANCELLED")

NOT_BEGUN = {"not_begun": 1}
"""The report of a run attempt that executed nothing, as the Prefect API did not answer."""

REPORT_SECONDS = 5.0
"""How much of the pod's grace period is left, when an engine that has not ended is killed, to set the run's state."""


_SIGTERM_SENTENCE = "Its pod was asked to end."

CRASHED_BY_SIGTERM = {"type": "CRASHED", "name": "Crashed", "message": _SIGTERM_SENTENCE}


class Supervisor:
    """Executes a run by an engine, ends the engine on SIGTERM or cancellation, and then sets the run's state.

    Args:
        client: the client of the Prefect API for this run and Job.
        warm_engine: the engine of a warm pod; None to start an engine.
        environment: the variables that were handed over to the warm pod.
    """

    def __init__(
        self,
        client: RunClient,
        warm_engine: EngineProcess | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._client = client
        self._environment = environment
        self._asked_to_end = threading.Event()
        self._is_cancelling = False
        self._is_fenced = False
        self._is_cancelled = False  # before it began
        self.report: dict[str, int] = {}
        """More entries of the termination message, next to memory and leases."""
        # Prefect's worker sets the variable: `reschedule`, or `relinquish` for a Job that Kubernetes retries.
        self._after_sigterm = os.environ.get("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "reschedule")
        self._has_deadline = bool(os.environ.get(DEADLINE_VARIABLE))
        self._disruption: tuple[int, int] | None = None
        self._exceeded_budget = -1  # the disruption budget that the flow's own schedules exceed
        grace = float(os.environ.get("GRACE_SECONDS") or 30)
        self._end_seconds = max(grace - REPORT_SECONDS, grace / 2)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._asked_to_end.set())
        self._engine = warm_engine or EngineProcess()

    def run(self) -> int:
        """Wait until the engine has ended, and set the run's state; return the exit status."""
        for target in (self._watch_run, self._end_when_asked):
            threading.Thread(target=target, daemon=True).start()
        code = self._engine.process.wait()
        if leases := termination_message.read_leases():
            _write_message({"leases": self._client.release_leases(leases)})
        if self._is_fenced:
            _end_fenced(self._client.job)
        if self._is_cancelled:
            return self._conclude(0)
        run = self._read_run()
        if is_retried_in_process(run) and _has_left_process(run):
            self._forget_retries_in_process(run)
        # A run that is cancelled while its flow ends is not Cancelled yet: the server refused the flow's own state.
        if self._asked_to_end.is_set() or self._exceeded_budget >= 0 or run.get("state_type") == "CANCELLING":
            return self._conclude(code)
        return code

    def _watch_run(self) -> None:
        """Let the engine begin; then kill it if its Job is fenced, and ask for its end if the run is Cancelling."""
        try:
            run = self._client.read_run_to_begin()
        except TimeoutError as error:
            _log_not_begun(error)
            self.report = NOT_BEGUN
            self._engine.send_signal(signal.SIGKILL)
            return
        if run and run.get("state_type") in CANCELLED_STATES:
            self._is_cancelled = True
            self._engine.send_signal(signal.SIGKILL)
            return
        if run is None:
            self._is_fenced = True
            self._engine.send_signal(signal.SIGKILL)
            return
        # Meanwhile this thread polls, so that a fenced Job ends in time.
        threading.Thread(target=self._begin, args=[run], daemon=True).start()
        for run in self._client.poll_run():
            if self._client.is_fenced(run):
                self._is_fenced = True
                self._engine.send_signal(signal.SIGKILL)
            if run.get("state_type") == "CANCELLING":
                self._is_cancelling = True
                self._asked_to_end.set()

    def _begin(self, run: dict[str, Any]) -> None:
        """Let the engine begin with the run and its deployment, which it then need not read.

        Kill it if the flow has scheduled the run more often than its disruption budget allows.
        """
        if self._client.own_schedules:
            with contextlib.suppress(Exception):  # without an answer the run begins, and the next attempt counts again
                budget = self._client.disruption_retries(run)
                if self._client.own_schedules > budget:
                    self._exceeded_budget = budget
                    self._engine.send_signal(signal.SIGKILL)
                    return
        deployment: dict[str, Any] = {}
        with contextlib.suppress(Exception):
            deployment = self._client.read_deployment(run)
        self._engine.begin(run, deployment, self._environment)

    def _end_when_asked(self) -> None:
        """End the engine within the grace period, once this process is asked to end or the run is Cancelling."""
        self._asked_to_end.wait()
        deadline = time.monotonic() + self._end_seconds
        reasons = {"reschedule": prefect_protocol.RESCHEDULE, "relinquish": prefect_protocol.RELINQUISH}
        reason = reasons.get(self._after_sigterm, b"")
        if self._is_cancelling or self._read_run().get("state_type") == "CANCELLING":
            reason = prefect_protocol.CANCEL
        if reason and not self._engine.announce_sigterm(reason, deadline - time.monotonic()):
            self._engine.send_signal(signal.SIGKILL)
            return
        run = self._read_run()
        # In any other state the engine is about to end.
        is_alive = run.get("state_type", "") in ("PENDING", "RUNNING", "CANCELLING", "SCHEDULED", "")
        if is_alive or is_paused_in_process(run):
            self._engine.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._engine.process.wait(max(deadline - time.monotonic(), 0))
            self._engine.send_signal(signal.SIGKILL)

    def _read_run(self) -> dict[str, Any]:
        """Return the run; empty if the API does not answer."""
        with contextlib.suppress(Exception):
            return self._client.read_run()
        return {}

    def _forget_retries_in_process(self, run: dict[str, Any]) -> None:
        """Let a worker claim the run again, whose process has ended. Wait until the API answers."""
        while True:
            try:
                self._client.forget_retries_in_process(run)
                return
            except Exception as error:
                if is_client_error(error):
                    return
                time.sleep(RECHECK_INTERVAL_SECONDS)

    def _conclude(self, code: int) -> int:
        """Set the state of a run whose engine was ended, unless the run has a final state or another Job.

        Args:
            code: the engine's exit status.

        Returns:
            The exit status of this process.
        """
        from email.utils import parsedate_to_datetime

        while True:  # until the pod's grace period is over
            try:
                run = self._client.read_run()
                # A retry pauses again, at the same place.
                state = "RUNNING" if is_paused_in_process(run) else run["state_type"]
                if self._client.is_fenced(run):
                    _end_fenced(self._client.job)
                # A warm pod that has just got its run may be faster than the worker that records the Job.
                if not self._client.is_current_job(run) and self._exceeded_budget < 0:
                    return 0
                if state in ("PENDING", "RUNNING", "CANCELLING") and self._client.is_given_away():
                    _end_fenced(self._client.job)
                if state == "CANCELLING":
                    self._client.set_state({"type": "CANCELLED"}, str(run["state_id"]))
                elif state in ("PENDING", "RUNNING") and self._exceeded_budget >= 0:
                    # The reconciler retries no run with this cause and a used budget. A person may.
                    self._client.set_labels({DISRUPTIONS_LABEL: self._exceeded_budget, CAUSE_LABEL: "disruption"})
                    crashed = _crashed(self._exceeded_budget, "Its flow has scheduled it again.")
                    self._client.set_state(crashed, str(run["state_id"]))
                    return 0
                elif state in ("PENDING", "RUNNING") and self._after_sigterm == "relinquish":
                    return code or 1  # so that Kubernetes retries the pod
                elif state in ("PENDING", "RUNNING", "SCHEDULED") and self._after_sigterm == "reschedule":
                    if self._has_deadline:
                        return code or 1  # the reconciler knows whether the deadline has passed: then nothing retries
                    if is_retried_in_process(run) and not is_paused_in_process(run):
                        # No worker would claim the run if it were Scheduled. The reconciler counts and retries it.
                        self._client.set_labels({CAUSE_LABEL: "disruption"})
                        self._client.set_state(CRASHED_BY_SIGTERM, str(run["state_id"]))
                        return 0
                    if state == "SCHEDULED":
                        return code
                    number, budget = self._count_disruption(run)
                    # This node's clock may be wrong. It counts only where the server's time is not known.
                    date = self._client.server_date
                    now = parsedate_to_datetime(date) if date else datetime.now(UTC)
                    self._client.set_state(after_sigterm(number, budget, now), str(run["state_id"]))
                    return 0
                return code
            except Exception as error:
                if is_client_error(error):
                    return code
                time.sleep(RECHECK_INTERVAL_SECONDS)

    def _count_disruption(self, run: dict[str, Any]) -> tuple[int, int]:
        """Draw once on the run's disruption budget; return the number of this retry, and the budget."""
        if self._disruption is None:
            number = whole_number((run.get("labels") or {}).get(DISRUPTIONS_LABEL)) + 1
            self._disruption = number, self._client.disruption_retries(run)
        number, budget = self._disruption
        # The same number again if an answer is lost: the label may have been set.
        self._client.set_labels({DISRUPTIONS_LABEL: number} if number <= budget else {CAUSE_LABEL: "disruption"})
        return number, budget


def _has_left_process(run: Mapping[str, Any]) -> bool:
    """Return whether a run is suspended, resumed after that, or scheduled by its flow, so that no process has it."""
    if run["state_type"] == "PAUSED":
        return not is_paused_in_process(run)
    return bool(run["state_type"] == "SCHEDULED" and run["state_name"] != "AwaitingRetry")


def after_sigterm(number: int, budget: int, now: datetime) -> dict[str, Any]:
    """Return the state of a run whose pod was asked to end.

    Args:
        number: the number of the retry after a disruption that would follow, from 1 on.
        budget: how many retries after a disruption the run has.
        now: the time on the Prefect API's clock.
    """
    reason = _SIGTERM_SENTENCE
    if number > budget:
        return _crashed(budget, reason)
    message = f"Retry {number} of {budget} after a disruption. {reason}"
    details = {"scheduled_time": now.isoformat()}
    return {"type": "SCHEDULED", "name": "AwaitingRetry", "message": message, "state_details": details}


def _crashed(budget: int, reason: str) -> dict[str, Any]:
    """Return the state of a run whose disruption budget is used up."""
    message = f"No retry: all {budget} after a disruption are used up. {reason}"
    return {"type": "CRASHED", "name": "Crashed", "message": message}


def _log_error(message: str) -> None:
    """Log an error with the id of the run."""
    # Imported late: of all run attempts few log anything, and the import takes 11 ms.
    import logging

    from orchestration import logs

    logs.configure(is_strict=False)
    run = os.environ.get(prefect_protocol.FLOW_RUN_ID_VARIABLE, "")
    logging.getLogger("orchestration.runs.supervisor").error("%s", message, extra={logs.RUN_ID: run})


def _write_message(message: dict[str, Any]) -> None:
    """Replace the termination message. A run attempt does not fail for the lack of one."""
    try:
        termination_message.write(message)
    except OSError as error:
        _log_error(f"The termination message {termination_message.MESSAGE_PATH} cannot be written: {error}.")


def _end_fenced(job: str) -> None:
    """Kill the process group of this process, as its Job was fenced or its claim given away."""
    _log_error(f"Job {job} was given up, and its run may execute in another Job. This run attempt ends.")
    _write_message({"fenced": 1})
    os.killpg(0, signal.SIGKILL)


def _end_when_fenced(client: RunClient) -> None:
    """Poll the run, and end this process group when its Job is fenced."""
    for run in client.poll_run():
        if client.is_fenced(run):
            _end_fenced(client.job)


def _log_not_begun(error: TimeoutError) -> None:
    _log_error(f"{error}. The flow has not begun, and this run attempt ends.")


def _end_without_run(engine: EngineProcess) -> int:
    """End a warm pod; return its exit status, which is not 0 if its engine has failed."""
    if engine.is_alive():
        engine.send_signal(signal.SIGKILL)
        engine.process.wait()
        return 0
    code = engine.process.wait()
    return 128 - code if code < 0 else code or 1


def main(command: list[str]) -> int:
    """Execute a command to its end.

    Returns:
        The command's exit status; 128 and the signal's number if a signal ended the command.
    """
    engine: EngineProcess | None = None
    environment: dict[str, str] = {}
    if file := os.environ.get(HAND_OVER_VARIABLE):
        # Imported late: no other pod needs it, and each run would wait for the import.
        from orchestration.runs import hand_over

        key, seconds = os.environ.pop(HAND_OVER_KEY_VARIABLE), float(os.environ[WARM_SECONDS_VARIABLE])
        engine = EngineProcess()
        run_client.import_http()
        environment = hand_over.wait_for_run(file, key, seconds, engine.is_alive)
        if not environment:
            return _end_without_run(engine)
        os.environ.update(environment)
    names = ("PREFECT_API_URL", prefect_protocol.FLOW_RUN_ID_VARIABLE, "KUBERNETES_JOB")
    url, run_id, job = (os.environ.get(name, "") for name in names)
    # A job variable may have the name of the claim's variable.
    claim = environment.get(CLAIM_VARIABLE, "")
    client = RunClient(url, run_id, job, claim) if url and run_id and job else None
    report: dict[str, int] = {}
    if client and command == COMMAND:
        supervisor = Supervisor(client, engine, environment)
        code, report = supervisor.run(), supervisor.report
    else:
        # tini signals the whole group, so the command has received the signal. This process waits for its end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        if client:
            try:
                run = client.read_run_to_begin()
            except TimeoutError as error:
                _log_not_begun(error)
                _write_message(NOT_BEGUN)
                return 1
            if run is None:
                _end_fenced(client.job)
            if run and run.get("state_type") in CANCELLED_STATES:
                return 0
            threading.Thread(target=_end_when_fenced, args=[client], daemon=True).start()
        code = subprocess.call(command)
    leases = termination_message.read_leases()
    _write_message(termination_message.memory_report() | report | ({"leases": leases} if leases else {}))
    return code if code >= 0 else 128 - code
