"""The decision: from a run, its Jobs and pods, the time and the policy to what is to be done. Nothing else is known."""

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
    """The run is dead: say so and why.

    Args:
        run: which.
        cause: why.
        lost: its Jobs whose pods nobody saw end: on a node that is cut off they may execute on, and have to be fenced.
    """

    run: Run
    cause: Cause
    lost: tuple[str, ...] = ()

    @property
    def labels(self) -> dict[str, Any]:
        """What the run is given before its state is written: whoever finds it crashed knows the cause."""
        # What begins anew after it was given up waits as long again.
        refused = {REFUSAL_LABEL: ""} if self.run.labels.get(REFUSAL_LABEL) else {}
        return {CAUSE_LABEL: self.cause.kind, LOST_LABEL: bool(self.lost)} | refused | _fences(self.lost)


def _fences(jobs: Sequence[str]) -> dict[str, Any]:
    return {FENCED_LABEL_PREFIX + each: True for each in jobs}


@dataclass(frozen=True)
class _Ending:
    """End a run in a final state; `lost` is as of a crash."""

    run: Run
    sentence: str
    lost: tuple[str, ...] = ()

    @property
    def labels(self) -> dict[str, Any]:
        """What the run is given before its state is written."""
        return _fences(self.lost)


class TimeOut(_Ending):
    """The run took longer than its deadline allows: no retry would take less."""


@dataclass(frozen=True)
class Explain:
    """The run's pod does not start: say why while there is time to cure it."""

    run: Run
    word: str
    sentence: str


@dataclass(frozen=True)
class GiveAway:
    """Its worker went away before it made a Job: from now on no Job of the claim executes the run."""

    run: Run
    sentence: str


@dataclass(frozen=True)
class Unclaim:
    """Its claim was given away, and there is no Job of it: another worker is to take the run."""

    run: Run
    sentence: str


@dataclass(frozen=True)
class Adopt:
    """Its worker went away after it made the Job and before it said so: say so."""

    run: Run
    job: str


@dataclass(frozen=True)
class Cancel:
    """Nobody wants it any more."""

    run: Run
    sentence: str


class Cancelled(_Ending):
    """It was to be cancelled, and nothing of it is left in the cluster."""


@dataclass(frozen=True)
class Retry:
    """It crashed: try again, unless its budget is used up."""

    run: Run
    cause: Cause


@dataclass(frozen=True)
class Stop:
    """A Job that nobody wants any more: delete it and its pods.

    Args:
        job: its name.
        grace: seconds between SIGTERM and SIGKILL; None is what its pods say.
        sentence: why.
    """

    job: str
    grace: int | None
    sentence: str


SLACK = 2.0
"""Seconds by which a Job may seem older than the claim that it was made for: its time has no fractions."""

Action = Crash | TimeOut | Explain | GiveAway | Unclaim | Adopt | Cancel | Cancelled | Retry | Stop


def decide(run: Run | None, jobs: Sequence[Job], pods: Sequence[Pod], now: datetime, policy: Policy) -> list[Action]:
    """What is to be done about one run.

    Args:
        run: None if the API does not have it any more.
        jobs: all of it in the namespace, read at the same time.
        pods: all of it in the namespace, read after both.
        now: the time on the clock that the API's times are on.
        policy: how patient to be.
    """
    jobs = [_with_its_main_container(each, pods, now, policy) for each in jobs]
    if run is None or run.type in FINAL_STATES:
        return _after_the_end(run, jobs, pods, now, policy)
    if run.type not in ("PENDING", "RUNNING", "CANCELLING"):
        return _held_open(run, jobs, pods, now, policy)
    if run.abandoned and run.type != "CANCELLING":
        return [Cancel(run, "Its deployment was deleted")]
    age = (now - run.since).total_seconds()
    if run.state == CLAIM_LOST:
        return _unclaimed(run, jobs, pods)
    stopped, jobs, pods = _without_given_away(run, jobs, pods)
    current = _current(run, jobs)
    name = current.name if current else run.job
    actions: list[Action] = stopped + [
        Stop(each.name, None, f"run {run.name} goes on in Job {name}")
        for each in jobs
        if current and each.created < current.created and _wanted(each, pods)
    ]
    mine = [each for each in pods if each.job == name or not name]
    if run.type == "CANCELLING":
        return actions + _cancelling(run, current, jobs, pods, age, policy)
    if current and current.name != run.job and age > policy.settle:
        actions.append(Adopt(run, current.name))
    live = [each for each in mine if each.live]
    if run.type == "PENDING":
        return actions + _pending(run, current, jobs, pods, live, now, policy)
    # As long as its Job is not over, Kubernetes may make another pod, or has yet to count the one that is gone.
    if live or (current and not current.over and not current.refused and not current.deleted):
        return actions
    return actions + _dead(run, current, jobs, pods, now, policy)


def _unclaimed(run: Run, jobs: Sequence[Job], pods: Sequence[Pod]) -> list[Action]:
    """Of a run whose claim was given away: whatever Kubernetes creates from here on executes nothing."""
    if any(not each.over for each in jobs) or any(each.live for each in pods):
        why = f"the claim of run {run.name} was given away"
        return [Stop(each.name, None, why) for each in jobs if _wanted(each, pods)]
    return [Unclaim(run, run.message)]


def _without_given_away(
    run: Run, jobs: Sequence[Job], pods: Sequence[Pod]
) -> tuple[list[Action], Sequence[Job], Sequence[Pod]]:
    """Stop the Jobs of earlier claims; return the other Jobs and their pods."""
    late = {each.name for each in jobs if each.given_away}
    if not late:
        return [], jobs, pods
    why = f"run {run.name} was claimed again before this Job was created"
    stopped: list[Action] = [Stop(each.name, None, why) for each in jobs if each.given_away and _wanted(each, pods)]
    return stopped, [each for each in jobs if not each.given_away], [each for each in pods if each.job not in late]


def is_steady(run: Run, jobs: Sequence[Job], pods: Sequence[Pod]) -> bool:
    """Whether a run executes in the one pod of its one Job: as long as it does, nothing is decided about it.

    As long as it says Running it need not be read again: what executed it anew would have another Job. If its state is
    another one by then, as after a retry in its process, what is decided of the old one is not done, and it is read.
    """
    return (
        (run.type, run.abandoned) == ("RUNNING", False)
        and [each.name for each in jobs] == [run.job]
        and [(each.job, each.live, each.started, each.deleted) for each in pods] == [(run.job, True, True, None)]
    )


def _current(run: Run, jobs: Sequence[Job]) -> Job | None:
    """The Job of the run's newest claim, as far as one is known: the recorded one, or one that was made after it."""
    recorded = next((each for each in jobs if each.name == run.job), None)
    later = [each for each in jobs if not each.over and (recorded is None or each.created > recorded.created)]
    return max(later, key=lambda each: each.created) if later else recorded


def _executes(job: Job, pods: Sequence[Pod]) -> bool:
    """Whether a Job that is not being deleted may execute its run, also in a pod that Kubernetes has yet to make."""
    its = [each for each in pods if each.job == job.name]
    return not job.deleted and (not job.over or any(each.live and not each.deleted for each in its))


def _wanted(job: Job, pods: Sequence[Pod]) -> bool:
    """Whether something of a Job is alive, a sidecar too, and nobody has asked for its deletion."""
    lingers = any(each.lingers and not each.deleted for each in pods if each.job == job.name)
    return _executes(job, pods) or (lingers and not job.deleted)


def _with_its_main_container(job: Job, pods: Sequence[Pod], now: datetime, policy: Policy) -> Job:
    """Return the Job, over if the main container of its pod has ended and a sidecar holds the pod open.

    Kubernetes would wait for the sidecar, and make no further pod meanwhile.
    """
    its = [each for each in pods if each.job == job.name]
    if job.over or any(each.live for each in its):
        return job
    return replace(job, over=any(each.lingers and (job.once or _is_held_open(each, now, policy)) for each in its))


def _is_held_open(pod: Pod, now: datetime, policy: Policy) -> bool:
    return pod.lingers and pod.end is not None and (now - pod.end.at).total_seconds() > policy.sidecars


def _held_open(run: Run, jobs: Sequence[Job], pods: Sequence[Pod], now: datetime, policy: Policy) -> list[Action]:
    """Delete Jobs of which only sidecars run on."""
    held = {each.job for each in pods if _is_held_open(each, now, policy) and not each.deleted}
    sentence = f"the main container of run {run.name} has ended"
    return [Stop(each.name, None, sentence) for each in jobs if each.name in held and not _executes(each, pods)]


def _dead(
    run: Run, current: Job | None, jobs: Sequence[Job], pods: Sequence[Pod], now: datetime, policy: Policy
) -> list[Action]:
    """Of a run whose execution, in a pod of its current Job, is over, though it says nothing of it."""
    name = current.name if current else run.job
    seen = [each for each in pods if each.end and (each.job == name or not name)]
    # What a process has to say it has said when it ends, as it waits for answers; but when did one that is gone end?
    known = any(each.end and each.end.seen and each.end.at >= run.since for each in seen)
    if not known and (now - run.since).total_seconds() < policy.settle:
        return []
    its = [each for each in jobs if each.name == name or not name]
    lost = _lost(run, current, jobs, pods)
    if sentence := causes.exceeded_deadline(current, seen):
        return [TimeOut(run, sentence, lost)]
    return [Crash(run, causes.cause_of_end(seen, its), lost)]


def _lost(run: Run, current: Job | None, jobs: Sequence[Job], pods: Sequence[Pod]) -> tuple[str, ...]:
    """The Jobs whose pods may have executed the run and were not seen to end."""
    # One that is over and that its worker has not recorded may be what executed, and what is older was over before.
    names = {each.name for each in jobs if current is None or each.created >= current.created}
    recorded = current.name if current else run.job
    ended = {each.job for each in pods if each.end and each.end.seen}
    return tuple(sorted({*names, *filter(None, [recorded])} - ended))


def _after_the_end(
    run: Run | None, jobs: Sequence[Job], pods: Sequence[Pod], now: datetime, policy: Policy
) -> list[Action]:
    """Nothing of a run that is over or gone lives on, and one that crashed is tried again."""
    wanted = [each for each in jobs if _wanted(each, pods)]
    if run is None:
        return [Stop(each.name, None, "its run was deleted") for each in wanted]
    age = (now - run.since).total_seconds()
    if run.type == "CRASHED":
        held = _held_open(run, jobs, pods, now, policy)
        executing = [each for each in jobs if _executes(each, pods)]
        if executing and age > policy.crashed:
            return [*held, *(Stop(each.name, 0, f"run {run.name} has crashed") for each in executing)]
        if (
            executing
            or any(each.live for each in pods)
            or run.labels.get(SETTLED_LABEL) == run.state_id
            or not run.deployment
        ):
            return held
        its = [each for each in pods if each.job == run.job]
        if sentence := causes.exceeded_deadline(next((each for each in jobs if each.name == run.job), None), its):
            return [*held, TimeOut(run, sentence)]
        return [*held, Retry(run, _of_crash(run, pods))]
    if age < policy.linger:
        return _held_open(run, jobs, pods, now, policy)
    return [Stop(each.name, None, f"run {run.name} is {run.state}") for each in wanted]


def _of_crash(run: Run, pods: Sequence[Pod]) -> Cause:
    """Why a run crashed that somebody else found dead, or this reconciler before."""
    ended = [each for each in pods if each.job == run.job and each.end]
    seen = causes.cause_of_end(ended) if ended else Cause("crash", run.message)
    # Counted already and cut off before it was tried, or noted by whoever wrote the crash.
    counted = str(run.labels.get(RETRIED_LABEL, "")).split()
    label = counted[1] if counted and counted[0] == run.state_id else run.labels.get(CAUSE_LABEL)
    noted = next((kind for kind in causes.KINDS if kind == label), None)
    if noted or seen.kind == "crash":
        # What was said of it when it happened says more than an exit code.
        sentence, _ = split_log_tail(run.message)
        return Cause(noted or "crash", sentence or seen.sentence, seen.memory)
    return seen


def _cancelling(
    run: Run, current: Job | None, jobs: Sequence[Job], pods: Sequence[Pod], age: float, policy: Policy
) -> list[Action]:
    left = [each for each in jobs if _wanted(each, pods)]
    if not left and not any(each.live for each in pods):
        if age < policy.settle:
            return []
        return [Cancelled(run, "Nothing of it is left in the cluster", _lost(run, current, jobs, pods))]
    if age < policy.cancel and not run.abandoned:
        return []
    return [Stop(each.name, None, f"run {run.name} is to be cancelled since {age:.0f} s") for each in left]


def _pending(
    run: Run,
    current: Job | None,
    jobs: Sequence[Job],
    pods: Sequence[Pod],
    live: Sequence[Pod],
    now: datetime,
    policy: Policy,
) -> list[Action]:
    """Of a run that was claimed and has not begun, with the live pods of its current Job."""
    if any(each.started for each in live):
        return []
    of_this_claim = current and (
        run.state in STARTING_STATES or current.created.timestamp() >= run.since.timestamp() - SLACK
    )
    if live or (current and not current.over and not current.deleted):
        assert current
        found = causes.waiting_state(current, live)
        return _explained(run, found, (now - current.created).total_seconds(), policy) if found else []
    # A Job that is over or gone may be of an earlier claim, and this one's not yet made.
    if current and of_this_claim:
        return _dead(run, current, jobs, pods, now, policy)
    age = (now - run.since).total_seconds()
    if run.state == JOB_REFUSED:
        return _refused(run, now, policy)
    if age <= policy.claim:
        return []
    return [GiveAway(run, f"{NO_JOB_FOR_CLAIM} within {age:.0f} s of claiming it")]


def _refused(run: Run, now: datetime, policy: Policy) -> list[Action]:
    """Of a run whose Job Kubernetes did not take: a worker asks again, each time after as long as a claim may take."""
    refusal = Refusal.read(run.labels)
    waited = (now - (refusal.since if refusal else run.since)).total_seconds()
    if waited > (policy.capacity if refusal and refusal.waits_for_capacity else policy.pending):
        return [_given_up(run, run.message, waited)]
    return [GiveAway(run, run.message)] if (now - run.since).total_seconds() > policy.claim else []


def _explained(run: Run, found: tuple[str, str], waited: float, policy: Policy) -> list[Action]:
    word, sentence = found
    if waited > (policy.capacity if causes.waits_for_capacity(word, sentence) else policy.pending):
        return [_given_up(run, sentence, waited)]
    return [] if run.state == word else [Explain(run, word, sentence)]


def _given_up(run: Run, sentence: str, waited: float) -> Crash:
    return Crash(run, Cause("start", f"{sentence.rstrip('.')}. Given up after {waited:.0f} s"))
