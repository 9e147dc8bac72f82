"""Decides what to do about a run, from the run, its Jobs and pods, the time and the policy alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from orchestration.diagnosis_table import JOB_REFUSED, STARTING_STATES
from orchestration.protocol import (
    CAUSE_LABEL,
    CLAIM_LOST,
    FENCED_LABEL_PREFIX,
    FINAL_STATES,
    LOST_LABEL,
    REFUSAL_LABEL,
    RETRIED_LABEL,
    SETTLED_LABEL,
)
from orchestration.reconciler import causes
from orchestration.reconciler.causes import Cause
from orchestration.reconciler.model import Job, Pod, Policy, Refusal, Run
from orchestration.reconciler.state_messages import NO_JOB_FOR_CLAIM, split_log_tail


@dataclass(frozen=True)
class Crash:
    """Set a run to Crashed whose pod is dead.

    Args:
        run: the run.
        cause: why the run crashed.
        lost: its Jobs whose pods no component saw end. They may still be executing on a node that is cut off, and are
            fenced.
    """

    run: Run
    cause: Cause
    lost: tuple[str, ...] = ()

    @property
    def labels(self) -> dict[str, Any]:
        """Return the labels to write before the state, so that every reader of the Crashed state finds the cause."""
        # A retry by hand of a run that was given up has the whole waiting time again.
        refusal = {REFUSAL_LABEL: ""} if self.run.labels.get(REFUSAL_LABEL) else {}
        return {CAUSE_LABEL: self.cause.kind, LOST_LABEL: bool(self.lost)} | refusal | _fences(self.lost)


def _fences(jobs: Sequence[str]) -> dict[str, Any]:
    return {FENCED_LABEL_PREFIX + job: True for job in jobs}


@dataclass(frozen=True)
class _Ending:
    """Set a run to a final state. `lost` has the Jobs to fence, as in `Crash`."""

    run: Run
    sentence: str
    lost: tuple[str, ...] = ()

    @property
    def labels(self) -> dict[str, Any]:
        """Return the labels to write before the state."""
        return _fences(self.lost)


class TimeOut(_Ending):
    """Set a run to TimedOut that exceeded its deadline. A retry would exceed the deadline too."""


@dataclass(frozen=True)
class Explain:
    """Set the Pending state that names why a run's pod does not start, while there is time for the cure."""

    run: Run
    state: str
    sentence: str


@dataclass(frozen=True)
class GiveAway:
    """Set a run to ClaimLost whose worker died before it created a Job. No Job of that claim may execute the run."""

    run: Run
    sentence: str


@dataclass(frozen=True)
class Unclaim:
    """Schedule a run whose claim was given away and that has no Job, so that another worker can claim it."""

    run: Run
    sentence: str


@dataclass(frozen=True)
class Adopt:
    """Record on a run the Job that its worker created and did not record."""

    run: Run
    job: str


@dataclass(frozen=True)
class Cancel:
    """Set a run to Cancelling whose deployment was deleted."""

    run: Run
    sentence: str


class Cancelled(_Ending):
    """Set a Cancelling run to Cancelled once nothing of it is left in the cluster."""


@dataclass(frozen=True)
class Retry:
    """Retry a crashed run if its retry budget allows that."""

    run: Run
    cause: Cause


@dataclass(frozen=True)
class Stop:
    """Delete a Job and its pods.

    Args:
        job: the name of the Job.
        grace: seconds between SIGTERM and SIGKILL; None for the grace period of the pods.
        sentence: why the Job is deleted.
    """

    job: str
    grace: int | None
    sentence: str


CLAIM_TOLERANCE_SECONDS = 2.0
"""By how much a Job may seem older than its claim. The Job's creation time has no fractions of a second."""

Action = Crash | TimeOut | Explain | GiveAway | Unclaim | Adopt | Cancel | Cancelled | Retry | Stop


def decide(run: Run | None, jobs: Sequence[Job], pods: Sequence[Pod], now: datetime, policy: Policy) -> list[Action]:
    """Return the actions for one run.

    Args:
        run: the run; None if the API does not have it.
        jobs: all Jobs of the run in the namespace, read at the same time as the run.
        pods: all pods of the run in the namespace, read after run and Jobs.
        now: the time, on the clock of the APIs' times.
        policy: how long to wait before each action.
    """
    jobs = [_finish_with_main_container(job, pods, now, policy) for job in jobs]
    if run is None or run.type in FINAL_STATES:
        return _decide_finished(run, jobs, pods, now, policy)
    if run.type not in ("PENDING", "RUNNING", "CANCELLING") and not run.waits_in_process:
        return _stop_held_open_jobs(run, jobs, pods, now, policy)
    if run.is_deployment_deleted and run.type != "CANCELLING":
        return [Cancel(run, "Its deployment was deleted")]
    age = (now - run.since).total_seconds()
    if run.state == CLAIM_LOST:
        return _decide_claim_lost(run, jobs, pods)
    stopped, jobs, pods = _stop_given_away_jobs(run, jobs, pods)
    current = _current_job(run, jobs)
    name = current.name if current else run.job
    actions: list[Action] = stopped + [
        Stop(job.name, None, f"run {run.name} continues in Job {name}")
        for job in jobs
        if current and job.created_at < current.created_at and _is_undeleted(job, pods)
    ]
    if run.type == "CANCELLING":
        return actions + _decide_cancelling(run, current, jobs, pods, age, policy)
    if current and current.name != run.job and age > policy.settle_seconds:
        actions.append(Adopt(run, current.name))
    live = [pod for pod in pods if pod.is_live and (pod.job == name or not name)]
    if run.type == "PENDING":
        return actions + _decide_pending(run, current, jobs, pods, live, now, policy)
    # Until its Job is finished, Kubernetes may create another pod, or has yet to count the pod that is gone.
    if live or (current and not current.is_finished and not current.refusal and not current.is_deleted):
        return actions
    return actions + _decide_dead(run, current, jobs, pods, now, policy)


def _decide_claim_lost(run: Run, jobs: Sequence[Job], pods: Sequence[Pod]) -> list[Action]:
    """Return the actions for a run whose claim was given away. No Job that Kubernetes creates now executes the run."""
    undeleted = [job for job in jobs if _is_undeleted(job, pods)]
    # A Job that a sidecar holds open counts as finished here. Kubernetes calls it unfinished, so it is deleted first.
    if undeleted or any(not job.is_finished for job in jobs) or any(pod.is_live for pod in pods):
        return [Stop(job.name, None, f"the claim of run {run.name} was given away") for job in undeleted]
    return [Unclaim(run, run.message)]


def _stop_given_away_jobs(
    run: Run, jobs: Sequence[Job], pods: Sequence[Pod]
) -> tuple[list[Action], Sequence[Job], Sequence[Pod]]:
    """Return the actions that stop the Jobs of earlier claims, and the other Jobs with their pods."""
    given_away = {job.name for job in jobs if job.is_given_away}
    if not given_away:
        return [], jobs, pods
    sentence = f"run {run.name} was claimed again before this Job was created"
    stopped: list[Action] = [
        Stop(job.name, None, sentence) for job in jobs if job.is_given_away and _is_undeleted(job, pods)
    ]
    other_jobs = [job for job in jobs if not job.is_given_away]
    return stopped, other_jobs, [pod for pod in pods if pod.job not in given_away]


def is_steady(run: Run, jobs: Sequence[Job], pods: Sequence[Pod]) -> bool:
    """Return whether a run is executing in the one pod of its one Job, so that there is nothing to decide.

    While such a run stays Running, it need not be read again: a new run attempt would have another Job. A retry within
    the process changes the state's id. A decision about the old state is then not carried out, and the run is read.
    """
    return (
        (run.type, run.is_deployment_deleted) == ("RUNNING", False)
        and [job.name for job in jobs] == [run.job]
        and [(pod.job, pod.is_live, pod.has_started, pod.deleted_at) for pod in pods] == [(run.job, True, True, None)]
    )


def _current_job(run: Run, jobs: Sequence[Job]) -> Job | None:
    """Return the Job of the run's newest known claim: the recorded Job, or a live Job that was created after it."""
    recorded = next((job for job in jobs if job.name == run.job), None)
    later = [job for job in jobs if not job.is_finished and (recorded is None or job.created_at > recorded.created_at)]
    return max(later, key=lambda job: job.created_at) if later else recorded


def _may_execute(job: Job, pods: Sequence[Pod]) -> bool:
    """Return whether an undeleted Job may execute its run, in a live pod or in a pod that is yet to be created."""
    has_live_pod = any(pod.is_live and not pod.deleted_at for pod in pods if pod.job == job.name)
    return not job.is_deleted and (not job.is_finished or has_live_pod)


def _is_undeleted(job: Job, pods: Sequence[Pod]) -> bool:
    """Return whether a container of a Job is alive, a sidecar included, and no deletion was requested."""
    has_sidecar = any(pod.has_live_sidecar and not pod.deleted_at for pod in pods if pod.job == job.name)
    return _may_execute(job, pods) or (has_sidecar and not job.is_deleted)


def _finish_with_main_container(job: Job, pods: Sequence[Pod], now: datetime, policy: Policy) -> Job:
    """Return the Job, finished if its pod's main container has ended and a sidecar holds the pod open.

    Kubernetes waits for the sidecar, and creates no replacement pod meanwhile.
    """
    own = [pod for pod in pods if pod.job == job.name]
    if job.is_finished or any(pod.is_live for pod in own):
        return job
    is_finished = any(pod.has_live_sidecar and (job.makes_one_pod or _is_held_open(pod, now, policy)) for pod in own)
    return replace(job, is_finished=is_finished)


def _is_held_open(pod: Pod, now: datetime, policy: Policy) -> bool:
    """Return whether a sidecar has held a pod open for longer than the policy allows."""
    if not pod.has_live_sidecar or pod.end is None:
        return False
    return (now - pod.end.time).total_seconds() > policy.sidecar_seconds


def _stop_held_open_jobs(
    run: Run, jobs: Sequence[Job], pods: Sequence[Pod], now: datetime, policy: Policy
) -> list[Action]:
    """Return the actions that delete the Jobs of which only sidecars are running."""
    held_open = {pod.job for pod in pods if _is_held_open(pod, now, policy) and not pod.deleted_at}
    sentence = f"the main container of run {run.name} has ended"
    return [Stop(job.name, None, sentence) for job in jobs if job.name in held_open and not _may_execute(job, pods)]


def _decide_dead(
    run: Run, current: Job | None, jobs: Sequence[Job], pods: Sequence[Pod], now: datetime, policy: Policy
) -> list[Action]:
    """Return the actions for a run without a final state whose current Job has no live pod."""
    name = current.name if current else run.job
    ended = [pod for pod in pods if pod.end and (pod.job == name or not name)]
    # A process reports before it ends, as it waits for answers. When a process ended that is gone is unknown.
    is_end_known = any(pod.end and pod.end.is_confirmed and pod.end.time >= run.since for pod in ended)
    if not is_end_known and (now - run.since).total_seconds() < policy.settle_seconds:
        return []
    lost = _lost_jobs(run, current, jobs, pods)
    if sentence := causes.exceeded_deadline(current, ended):
        return [TimeOut(run, sentence, lost)]
    current_jobs = [job for job in jobs if job.name == name or not name]
    return [Crash(run, causes.cause_of_end(ended, current_jobs), lost)]


def _lost_jobs(run: Run, current: Job | None, jobs: Sequence[Job], pods: Sequence[Pod]) -> tuple[str, ...]:
    """Return the Jobs whose pods may have executed the run and were not seen to end."""
    # A finished Job that its worker did not record may have executed the run. Older Jobs ended before.
    names = {job.name for job in jobs if current is None or job.created_at >= current.created_at}
    recorded = current.name if current else run.job
    ended = {pod.job for pod in pods if pod.end and pod.end.is_confirmed}
    return tuple(sorted({*names, *filter(None, [recorded])} - ended))


def _decide_finished(
    run: Run | None, jobs: Sequence[Job], pods: Sequence[Pod], now: datetime, policy: Policy
) -> list[Action]:
    """Return the actions for a finished or deleted run: delete its Jobs, and retry a crashed run."""
    undeleted = [job for job in jobs if _is_undeleted(job, pods)]
    if run is None:
        return [Stop(job.name, None, "its run was deleted") for job in undeleted]
    age = (now - run.since).total_seconds()
    held_open = _stop_held_open_jobs(run, jobs, pods, now, policy)
    if run.type == "CRASHED":
        executing = [job for job in jobs if _may_execute(job, pods)]
        if executing and age > policy.crashed_pod_seconds:
            return [*held_open, *(Stop(job.name, 0, f"run {run.name} has crashed") for job in executing)]
        if (
            executing
            or any(pod.is_live for pod in pods)
            or run.labels.get(SETTLED_LABEL) == run.state_id
            or not run.deployment
        ):
            return held_open
        own_pods = [pod for pod in pods if pod.job == run.job]
        own_job = next((job for job in jobs if job.name == run.job), None)
        if sentence := causes.exceeded_deadline(own_job, own_pods):
            return [*held_open, TimeOut(run, sentence)]
        return [*held_open, Retry(run, _cause_of_crash(run, pods))]
    if age < policy.finished_pod_seconds:
        return held_open
    return [Stop(job.name, None, f"run {run.name} is {run.state}") for job in undeleted]


def _cause_of_crash(run: Run, pods: Sequence[Pod]) -> Cause:
    """Return why a run crashed that another component, or this reconciler in an earlier round, set to Crashed."""
    ended = [pod for pod in pods if pod.job == run.job and pod.end]
    observed = causes.cause_of_end(ended) if ended else Cause("crash", run.message)
    # The retry was counted and then interrupted, or the component that wrote the state recorded the cause.
    counted = str(run.labels.get(RETRIED_LABEL, "")).split()
    label = counted[1] if counted and counted[0] == run.state_id else run.labels.get(CAUSE_LABEL)
    recorded = next((kind for kind in causes.KINDS if kind == label), None)
    if recorded or observed.kind == "crash":
        # The message of the crash is more specific than an exit code.
        sentence, _ = split_log_tail(run.message)
        return Cause(recorded or "crash", sentence or observed.sentence, observed.memory)
    return observed


def _decide_cancelling(
    run: Run, current: Job | None, jobs: Sequence[Job], pods: Sequence[Pod], age: float, policy: Policy
) -> list[Action]:
    """Return the actions for a Cancelling run: delete its Jobs, then set it to Cancelled."""
    undeleted = [job for job in jobs if _is_undeleted(job, pods)]
    if not undeleted and not any(pod.is_live for pod in pods):
        if age < policy.settle_seconds:
            return []
        return [Cancelled(run, "Nothing of it is left in the cluster", _lost_jobs(run, current, jobs, pods))]
    if age < policy.cancel_seconds and not run.is_deployment_deleted:
        return []
    return [Stop(job.name, None, f"run {run.name} has been Cancelling for {age:.0f} s") for job in undeleted]


def _decide_pending(
    run: Run,
    current: Job | None,
    jobs: Sequence[Job],
    pods: Sequence[Pod],
    live: Sequence[Pod],
    now: datetime,
    policy: Policy,
) -> list[Action]:
    """Return the actions for a claimed run that has not started.

    Args:
        run: the run.
        current: the Job of its newest known claim.
        jobs: all Jobs of the run, except those of given-away claims.
        pods: all pods of these Jobs.
        live: the live pods of the current Job.
        now: the time, on the clock of the APIs' times.
        policy: how long to wait before each action.
    """
    if any(pod.has_started for pod in live):
        return []
    claimed = run.since.timestamp() - CLAIM_TOLERANCE_SECONDS
    age = (now - run.since).total_seconds()
    is_late = age > policy.claim_seconds
    is_of_this_claim = current and (run.state in STARTING_STATES or current.created_at.timestamp() >= claimed)
    if live or (current and not current.is_finished and not current.is_deleted):
        assert current
        if current.warm_claim and not live:
            # Its worker ended before it handed the run over to the pod, which waits in vain.
            return [GiveAway(run, f"{NO_JOB_FOR_CLAIM} within {age:.0f} s of claiming it")] if is_late else []
        waiting = causes.waiting_state(current, live)
        return _decide_waiting(run, waiting, (now - current.created_at).total_seconds(), policy) if waiting else []
    # A finished or deleted Job may belong to an earlier claim while the Job of this claim does not exist yet.
    if current and is_of_this_claim:
        return _decide_dead(run, current, jobs, pods, now, policy)
    if run.state == JOB_REFUSED:
        return _decide_job_refused(run, now, policy)
    return [GiveAway(run, f"{NO_JOB_FOR_CLAIM} within {age:.0f} s of claiming it")] if is_late else []


def _decide_job_refused(run: Run, now: datetime, policy: Policy) -> list[Action]:
    """Return the actions for a run whose Job Kubernetes refused.

    The claim is given away after as long as a claim may take. Then a worker claims the run and tries again.
    """
    refusal = Refusal.read(run.labels)
    waited = (now - (refusal.since if refusal else run.since)).total_seconds()
    waits_for_capacity = refusal and refusal.waits_for_capacity
    if waited > (policy.capacity_seconds if waits_for_capacity else policy.pending_seconds):
        return [_give_up(run, run.message, waited)]
    return [GiveAway(run, run.message)] if (now - run.since).total_seconds() > policy.claim_seconds else []


def _decide_waiting(run: Run, waiting: tuple[str, str], waited: float, policy: Policy) -> list[Action]:
    """Return the actions for a run whose pod does not start.

    Args:
        run: the run.
        waiting: the name and the message of the state that explains the wait.
        waited: for how many seconds the Job has existed.
        policy: how long to wait before the run is given up.
    """
    state, sentence = waiting
    if waited > (policy.capacity_seconds if causes.waits_for_capacity(state, sentence) else policy.pending_seconds):
        return [_give_up(run, sentence, waited)]
    return [] if run.state == state else [Explain(run, state, sentence)]


def _give_up(run: Run, sentence: str, waited: float) -> Crash:
    return Crash(run, Cause("start", f"{sentence.rstrip('.')}. Given up after {waited:.0f} s"))
