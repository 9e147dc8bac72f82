"""Schedule the runs of deployments that a sync changes, so that no run is missing when the sync ends.

When a deployment changes, the server deletes its scheduled runs. The server's own scheduler creates them again some
time later. A sync does not wait for that.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from orchestration.deployments.plan import END, Change
from orchestration.deployments.resources import DEPLOYMENT, Name, Object, is_schedule_deleted, pair_schedules
from orchestration.prefect_api import Server

CATCH_UP = timedelta(hours=1)
"""How far back a sync schedules runs again after a sync that was cut off. Earlier runs had their time to start."""

SCHEDULER_PASS_SECONDS = 1.0
"""A typical upper bound of the time from reading a deployment to inserting its runs in the server's own scheduler."""

TIMING_FIELDS = {"schedules", "paused"}
"""Fields of a deployment that decide whether and when it runs."""


async def find_late_runs(server: Server, changes: Sequence[Change], now: str) -> dict[Name, list[str]]:
    """Return the due times of late runs that a sync must schedule again, by deployment.

    When a sync removes a schedule, the server deletes the late runs of all schedules of the deployment.

    Args:
        server: the server.
        changes: the changes of the sync.
        now: when the sync began, ISO 8601.
    """
    late: dict[Name, list[str]] = {}
    for change in changes:
        if change.name[0] != DEPLOYMENT or not change.desired or not change.live:
            continue
        pairs = pair_schedules(change.desired.fields["schedules"], change.live.fields["schedules"])
        if not any(live and is_schedule_deleted(live, desired) for _, live, desired in pairs):
            continue
        kept = {live["id"] for _, live, desired in pairs if live and desired is not None}
        since = datetime.fromisoformat(now) - CATCH_UP
        runs = await server.all(
            "/flow_runs/filter",
            deployments={"id": {"any_": [change.live.id]}},
            flow_runs={
                "state": {"type": {"any_": ["SCHEDULED"]}},
                "expected_start_time": {"after_": since.isoformat(), "before_": now},
            },
            sort="ID_DESC",
        )
        runs_of_kept = [run for run in runs if (run.get("created_by") or {}).get("id") in kept]
        late[change.name] = sorted({run["expected_start_time"] for run in runs_of_kept})
    return late


async def schedule_runs(server: Server, deployment_id: str, since: datetime) -> None:
    """Create the scheduled runs of a deployment.

    Existing runs stay: the server identifies a run by its schedule and its time.

    Args:
        server: the server.
        deployment_id: the deployment.
        since: the earliest due time, but not earlier than `CATCH_UP` ago.
    """
    since = max(since, datetime.now(UTC) - CATCH_UP)
    # The server creates a hundred runs of a schedule, or an hour's. From `since` on these may end before now.
    for body in ({"start_time": since.isoformat()}, {}):
        await server.ask("POST", f"/deployments/{deployment_id}/schedule", body, idempotent=True)


async def schedule_late_runs(server: Server, deployment_id: str, times: Iterable[str]) -> None:
    """Create the runs of a deployment at these due times."""
    for time in times:
        body = {"start_time": time, "end_time": time}
        await server.ask("POST", f"/deployments/{deployment_id}/schedule", body, idempotent=True)


async def reschedule(server: Server, changed: Mapping[str, Change], now: str) -> None:
    """Delete and create the scheduled runs of changed deployments once more.

    The server's own scheduler may read a deployment before a change and insert runs of the old state after it. It does
    not insert a run if there is one of the same schedule and time. So where the times stay the same, its runs came
    before the new ones, and this waits only where times or pauses change.

    Args:
        server: the server.
        changed: the changes of deployments, by the deployment's id.
        now: when the sync began, ISO 8601.
    """
    changes = changed.values()
    if any(change.action == END or change.since or TIMING_FIELDS & change.changed_fields for change in changes):
        await asyncio.sleep(SCHEDULER_PASS_SECONDS)
    for deployment_id, change in changed.items():
        assert change.live
        if change.action == END:
            await pause(server, change.live)
            continue
        assert change.desired
        # Any change of a deployment makes the server delete its scheduled runs.
        body = {"description": change.desired.fields["description"]}
        await server.ask("PATCH", f"/deployments/{deployment_id}", body)
        if change.desired.fields["schedules"] and not is_paused(change.desired, change.live):
            await schedule_runs(server, deployment_id, datetime.fromisoformat(change.since or now))


async def pause(server: Server, deployment: Object) -> None:
    """Pause a deployment. The server deletes its scheduled runs."""
    await server.ask("PATCH", f"/deployments/{deployment.id}", {"paused": True}, absent=True)


def is_paused(desired: Object, live: Object) -> bool:
    """Return whether a deployment is paused after the sync."""
    return bool(live.fields["paused"] if desired.fields["paused"] is None else desired.fields["paused"])
