"""Bring a server to the desired state. A sync changes only what differs, and loses no run even if it is killed.

A sync writes into the owner's record what it is about to change, and later what it has changed. So the next sync knows
which objects a killed sync had begun, and that they belong to the owner. It also schedules the runs of deployments that
the killed sync was changing: a change of a deployment makes the server delete its scheduled runs.
"""

import asyncio
import contextlib
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby

from orchestration.deployments import (
    deployment_requests,
    limit_removal,
    live_state,
    object_requests,
    rescheduling,
)
from orchestration.deployments import plan as planning
from orchestration.deployments import record as records
from orchestration.deployments.desired_state import DesiredState
from orchestration.deployments.plan import CREATE, DELETE, END, FINISH, FORGET, KEEP, Change, Plan
from orchestration.deployments.record import Record
from orchestration.deployments.resources import DEPLOYMENT, POOL, QUEUE, Name, display_name
from orchestration.errors import DeploymentsError, PipelineError
from orchestration.prefect_api import RefusedError, Server

MAX_ROUNDS = 10
"""Rounds of plan and changes in one sync. A further round follows when another sync changed the server meanwhile."""

MIN_PROGRESS_CHANGES = 20
"""A sync of more changes shows its progress."""


async def sync(
    server: Server,
    desired: DesiredState,
    *,
    prune: bool = False,
    adopt: bool = False,
    report: Callable[[Plan], None] = lambda _: None,
) -> Plan:
    """Bring the server to the desired state.

    Args:
        server: the server.
        desired: the objects of the files.
        prune: delete objects of the owner that the files no longer have.
        adopt: take over objects without an owner.
        report: called with each plan before its changes; more than once if another sync runs at the same time.

    Returns:
        The first plan, with what the sync did differently.

    Raises:
        DeploymentsError: the server refuses a change. The other changes are made, and the next sync continues.
    """
    first: Plan | None = None
    refusal = ""
    seconds = 0.0
    for number in range(MAX_ROUNDS):
        # Without jitter two syncs that want different things would stay in step, and each find the other's changes.
        await asyncio.sleep(random.uniform(0, number * max(1, seconds)))  # noqa: S311 - no secret
        began = time.monotonic()
        plan = await planning.make(server, desired, prune=prune, adopt=adopt)
        if first is None or plan.changes:
            report(plan)
        first = first or plan
        if not plan.changes:
            return first
        is_uncertain, refusal = await _Execution(server, plan).run()
        seconds = time.monotonic() - began
        # The server refuses what another sync has just done. The next plan shows whether a change is left.
        if is_uncertain:
            continue
        if refusal:
            raise DeploymentsError(refusal)
        return first
    raise DeploymentsError(
        refusal
        or f"The sync of {desired.owner} did not finish: another program keeps changing the same objects. Stop "
        "that program, and sync again"
    )


@dataclass
class _Execution:
    """Makes the changes of one plan.

    Args:
        server: the server.
        plan: the changes.
        started: when the execution began, ISO 8601.
        flow_ids: ids of flows by name.
        rescheduled: changes of deployments whose runs are scheduled again at the end, by the deployment's id.
    """

    server: Server
    plan: Plan
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat())
    flow_ids: dict[str, str] = field(default_factory=dict)
    rescheduled: dict[str, Change] = field(default_factory=dict)

    async def run(self) -> tuple[bool, str]:
        """Make the changes and record them.

        Returns:
            Whether the server may have another state: another sync ran, or the effect of a request is unknown. And the
            first refusal, or "".
        """
        server, plan = self.server, self.plan
        late = await rescheduling.find_late_runs(server, plan.changes, self.started)
        doubtful, conflict = server.ambiguous_retries, False
        began = await records.update(server, plan.owner, lambda record: self._record_start(record, late))
        done: list[Change] = []
        failures: list[str] = []
        progress = _Progress(len(plan.changes))
        try:
            # A refusal ends the sync after the changes of that kind, as objects of later kinds may depend on it.
            for _, changes in groupby(plan.changes, lambda change: (change.name[0], change.desired is None)):
                if failures:
                    break
                for change in changes:
                    try:
                        await self._make(change, began.late.get(change.name, ()))
                    except RefusedError as error:
                        where = change.desired.where + ": " if change.desired else ""
                        failures.append(f"{where}{display_name(change.name)}: {error}")
                        conflict |= error.status == 409
                    else:
                        done.append(change)
                        progress.advance()
            await rescheduling.reschedule(server, self.rescheduled, self.started)
        finally:
            progress.clear()
            # Also after an interrupt or a lost connection: the next sync need not repeat what is recorded as done.
            with contextlib.suppress(PipelineError) if sys.exc_info()[0] else contextlib.nullcontext():
                previous_serial = await _record_done(server, plan.owner, done)
        is_uncertain = conflict or previous_serial != began.serial or server.ambiguous_retries > doubtful
        more = f"\n{len(failures) - 1} more were refused" if len(failures) > 1 else ""
        return is_uncertain, f"{failures[0]}{more}" if failures else ""

    def _record_start(self, record: Record, late: dict[Name, list[str]]) -> None:
        """Write into the record what this is about to change."""
        for name, times in late.items():
            record.late[name] = sorted({*record.late.get(name, ()), *times})
        for change in self.plan.changes:
            if change.action == END or (change.action == DELETE and _pauses_first(change)):
                record.ending.add(change.name[1])
            if change.action not in (END, FORGET):
                record.applied.setdefault(change.name, None)
                record.begun.setdefault(change.name, self.started)

    async def _make(self, change: Change, late: Sequence[str]) -> None:
        """Make one change.

        Args:
            change: the change. Its action changes if a run has begun since the plan was made.
            late: due times of late runs to schedule again.
        """
        server = self.server
        if change.action == FORGET:
            return
        if change.action == DELETE:
            await self._delete(change)
        elif change.action == END:
            assert change.live
            await rescheduling.pause(server, change.live)
            self.rescheduled[change.live.id] = change
        elif change.name[0] == DEPLOYMENT:
            assert change.desired
            if change.live is None:
                await deployment_requests.create(server, change.desired, self.flow_ids)
            else:
                await self._keep_used_limit(change)
                await deployment_requests.change(server, change, self.rescheduled, self.started, late)
        elif change.action == CREATE:
            assert change.desired
            await object_requests.create(server, change.desired)
        elif change.action != FINISH:
            await object_requests.change(server, change)

    async def _delete(self, change: Change) -> None:
        """Delete an object, unless a run has begun since the plan was made."""
        assert change.live
        if reason := await self._reason_to_keep(change):
            self.plan.deferred.append(f"{display_name(change.name)} {reason}")
            if change.name[0] == DEPLOYMENT:
                change.action = END
                self.rescheduled[change.live.id] = change
            else:
                change.action = KEEP
            return
        await object_requests.delete(self.server, change.live)

    async def _reason_to_keep(self, change: Change) -> str:
        """Return why an object cannot be deleted, as a run has begun since the plan was made; "" if it can."""
        live = change.live
        assert live
        if live.kind == DEPLOYMENT:
            # The server schedules no run of a paused deployment. So this also finds a run that began before the pause.
            await rescheduling.pause(self.server, live)
            if busy := await live_state.count_unfinished_runs(self.server, [live]):
                runs = f"{busy[live.id]} run{'s have' if busy[live.id] > 1 else ' has'}"
                return f"stays, paused: {runs} begun meanwhile. The first sync after their end deletes it"
        if live.kind in (POOL, QUEUE):
            ending = [other.live.fields for other in self.plan.changes if other.action == END and other.live]
            used = {fields["work_pool_name"] for fields in ending}
            used |= {f"{fields['work_pool_name']}/{fields['work_queue_name']}" for fields in ending}
            if live.key in used or await live_state.find_pools_and_queues_in_use(self.server, [live]):
                return "stays: a run has entered it meanwhile. The first sync after that run's end deletes it"
        return ""

    async def _keep_used_limit(self, change: Change) -> None:
        """Keep a deployment's concurrency limit if a run has taken a slot since the plan was made."""
        desired, live = change.desired, change.live
        if not desired or not live or not limit_removal.removes_limit(desired, live):
            return
        raw = await self.server.ask("GET", f"/deployments/{live.id}", absent=True)
        if raw and limit_removal.must_wait(desired, live, raw):
            self.plan.deferred.append(limit_removal.note(desired, raw))
            change.desired = limit_removal.keep_limit(desired, live)
            change.fields = [difference for difference in change.fields if not difference[0].startswith("concurrency_")]


def _pauses_first(change: Change) -> bool:
    """Return whether a deletion pauses its deployment first. A deployment that an operator has paused is paused."""
    return bool(change.name[0] == DEPLOYMENT and change.live and not change.live.fields["paused"])


async def _record_done(server: Server, owner: str, done: Sequence[Change]) -> str:
    """Write into the record what was changed, and return the record's serial before that."""
    previous_serial = ""

    def finish(record: Record) -> None:
        nonlocal previous_serial
        previous_serial = previous_serial or record.serial
        for change in done:
            record.begun.pop(change.name, None)
            if change.action == END:
                continue
            record.late.pop(change.name, None)
            record.ending.discard(change.name[1] if change.name[0] == DEPLOYMENT else "")
            if change.action == KEEP:
                continue
            if change.desired is None:
                record.applied.pop(change.name, None)
                record.masked.pop(change.name, None)
            else:
                record.applied[change.name] = change.desired.recorded_fields
                record.masked[change.name] = sorted(change.desired.masked)

    await records.update(server, owner, finish)
    return previous_serial


class _Progress:
    """Shows on a terminal how many changes are made."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.is_shown = total > MIN_PROGRESS_CHANGES and sys.stderr.isatty()

    def advance(self) -> None:
        self.done += 1
        if self.is_shown:
            # `orchestration.terminal` would escape the carriage return as if a hostile name contained it.
            print(f"\r{self.done} of {self.total}", end="", file=sys.__stderr__, flush=True)

    def clear(self) -> None:
        if self.is_shown:
            print("\r" + " " * 20 + "\r", end="", file=sys.__stderr__, flush=True)
