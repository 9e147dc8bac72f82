"""Diagnoses a run: why it is in its state, and which pages of docs/diagnoses explain that."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from orchestration import diagnoses
from orchestration.diagnosis_table import JOB_REFUSED, STARTING_STATES, STATE_DIAGNOSES, Diagnosis
from orchestration.prefect_api import Server
from orchestration.protocol import CAUSE_LABEL, CLAIM_LOST, FINAL_STATES, LOST_LABEL, SETTLED_LABEL
from orchestration.reconciler.state_messages import diagnosis_of, is_job_refusal, is_unclaimed, split_log_tail

STUCK_AFTER = timedelta(seconds=60)
"""How long a run may be late, claimed or Cancelling before it counts as stuck."""

WAITING_STATES = STARTING_STATES | {JOB_REFUSED}
"""Pending states of a claimed run. The message of such a state names what the run waits for."""


@dataclass(frozen=True)
class RunDiagnosis:
    """Why a run is in its state.

    Args:
        sentence: the explanation for people.
        diagnoses: the diagnoses that apply, most specific first; empty if nothing is wrong.
    """

    sentence: str
    diagnoses: tuple[Diagnosis, ...] = ()

    @property
    def pages(self) -> list[str]:
        """Return the paths of the diagnoses' pages."""
        return [diagnoses.path(diagnosis) for diagnosis in self.diagnoses]


async def diagnose_run(server: Server, run: Mapping[str, Any]) -> RunDiagnosis:
    """Return why a run is in its state.

    Args:
        server: the Prefect API.
        run: the run, as the API returns it.
    """
    state, labels = run["state"], run["labels"] or {}
    name, kind, message = state["name"], state["type"], split_log_tail(state["message"] or "")[0]
    now = datetime.now(UTC)
    age = now - datetime.fromisoformat(state["timestamp"])
    if kind in FINAL_STATES:
        return _diagnose_final_state(run, message)
    if kind == "RUNNING":
        job = (run["infrastructure_pid"] or "unknown").rpartition(":")[2]
        return RunDiagnosis(f"It has been running for {_format_duration(age)}, in Job {job}.")
    if kind == "PENDING":
        if name in WAITING_STATES and message:
            return RunDiagnosis(message, (STATE_DIAGNOSES[name],) if name in STATE_DIAGNOSES else ())
        if name == CLAIM_LOST:
            return RunDiagnosis(message, ("claim-lost",))
        worker = labels.get("prefect.worker.name")
        by_worker = f" by worker {worker}" if worker else ""
        sentence = (
            f"It was claimed{by_worker} {_format_duration(age)} ago and has not started: "
            "its pod is starting, or the worker is gone."
        )
        return RunDiagnosis(sentence, ("claim-lost",) if age > STUCK_AFTER else ())
    if kind == "CANCELLING":
        sentence = f"It has been Cancelling for {_format_duration(age)}: its process has the pod's grace period to end."
        return RunDiagnosis(sentence, ("cancelling",))
    due = datetime.fromisoformat(state["state_details"].get("scheduled_time") or run["expected_start_time"])
    # Prefect itself uses the name AwaitingRetry when a flow with retries of its own has failed.
    earlier = _crash_diagnoses(message, labels) if name == "AwaitingRetry" and message.startswith("Retry ") else ()
    if is_unclaimed(message):
        earlier = ("claim-lost",)
    if is_job_refusal(message):
        earlier = ("refused",)
    if due > now:
        return RunDiagnosis(f"It is due in {_format_duration(due - now)}{f': {message}' if message else '.'}", earlier)
    sentence = f"It is late by {_format_duration(now - due)}: {await _find_obstacle(server, run)}"
    return RunDiagnosis(sentence, (*earlier, "late"))


def _diagnose_final_state(run: Mapping[str, Any], message: str) -> RunDiagnosis:
    """Return why a finished run ended.

    Args:
        run: the run, as the API returns it.
        message: the first line of its state's message.
    """
    state, labels = run["state"], run["labels"] or {}
    is_given_up = labels.get(SETTLED_LABEL) == state["id"]
    no_retry = " No retry is left" if is_given_up else ""
    sentence = f"It is {state['name']}{f': {message}' if message else ''}.{no_retry}".replace("..", ".")
    if state["type"] == "FAILED" and diagnosis_of(message) == "deadline":
        return RunDiagnosis(sentence, ("deadline",))
    if state["type"] != "CRASHED":
        return RunDiagnosis(sentence)
    given_up: tuple[Diagnosis, ...] = ("given-up",) if is_given_up else ()
    return RunDiagnosis(sentence, (*_crash_diagnoses(message, labels), *given_up))


def _crash_diagnoses(message: str, labels: Mapping[str, Any]) -> tuple[Diagnosis, ...]:
    """Return the diagnoses of a crash. The reconciler's label is more specific than the message of a process."""
    found = diagnosis_of(message)
    cause = labels.get(CAUSE_LABEL)
    if found == "crash" and cause in ("oom", "disruption"):
        found = cause
    return (found, "fenced") if labels.get(LOST_LABEL) else (found,)


async def _find_obstacle(server: Server, run: Mapping[str, Any]) -> str:
    """Return what keeps a due run from being claimed, and the cure."""
    if run["state"]["name"] == "AwaitingConcurrencySlot":
        return "the deployment's concurrency limit is reached. Its other runs end first"
    name = run.get("work_pool_name")
    if not name:
        return "it has no work pool. Deploy it with one"
    pool = await server.ask("GET", f"/work_pools/{quote(name, safe='')}")
    if pool["is_paused"]:
        return f"work pool {name} is paused. Resume it: prefect work-pool resume {name}"
    path = f"/work_pools/{quote(name, safe='')}/queues/{quote(run['work_queue_name'], safe='')}"
    queue = await server.ask("GET", path)
    if queue["is_paused"]:
        return f"queue {queue['name']} of work pool {name} is paused. Resume it in the UI"
    if pool["status"] == "NOT_READY":
        return f"work pool {name} has no worker. See its pods: kubectl get pods -l app.kubernetes.io/component=worker"
    limited = [item["name"] for item in (pool, queue) if item["concurrency_limit"] is not None]
    if limited:
        return f"the concurrency limit of {' or '.join(limited)} may be reached. Raise it, or wait"
    return "a worker claims it at its next poll, unless the worker serves other queues only"


def _format_duration(time: timedelta) -> str:
    seconds = int(time.total_seconds())
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"
