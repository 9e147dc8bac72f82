"""A sync while runs are under way: whatever it changes, no run ends otherwise than it would have, and none is lost."""

import contextlib
from typing import Any
from unittest.mock import patch

import pytest

from orchestration.deployments import plan as planning
from tests.orchestration.deployments.conftest import Project

HOURLY = {"interval": 3600, "anchor_date": "2026-01-01T00:00:00Z", "slug": "hourly"}
NIGHTLY = {"cron": "0 3 * * *", "slug": "nightly"}
TRIGGER = {"expect": ["x.y"]}

BASE: dict[str, Any] = {
    "concurrency_limit": 2,
    "description": "Before",
    "parameters": {"day": 1},
    "schedules": [HOURLY],
    "triggers": [TRIGGER],
}

CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "description": {"description": "After"},
    "version": {"version": "2"},
    "tags": {"tags": ["new"]},
    "entrypoint": {"entrypoint": "./flow.py:etl"},
    "pull": {"pull": []},
    "queue": {"work_queue_name": "other"},
    "job-variables": {"job_variables": {"a": "b"}},
    "parameters": {"parameters": {"day": 2}},
    "enforcement": {"enforce_parameter_schema": False},
    "limit-removed": {"concurrency_limit": None},
    "limit-raised": {"concurrency_limit": 5},
    "limit-lowered": {"concurrency_limit": 1},
    "strategy": {"concurrency_limit": {"limit": 2, "collision_strategy": "CANCEL_NEW"}},
    "strategy-and-limit-removed": {"concurrency_limit": None, "description": "After"},
    "paused": {"paused": True},
    "schedule-added": {"schedules": [HOURLY, NIGHTLY]},
    "schedule-changed": {"schedules": [HOURLY | {"interval": 7200}]},
    "schedule-removed": {"schedules": []},
    "schedule-off": {"schedules": [HOURLY | {"active": False}]},
    "trigger-changed": {"triggers": [TRIGGER | {"expect": ["y.z"]}]},
    "trigger-removed": {"triggers": []},
}
"""A deployment each: what a sync changes of it."""


def things(project: Project, *, after: bool) -> dict[str, Any]:
    """All else that a sync can change, before and after."""
    queues = [
        {"name": "q", "priority": 2, "concurrency_limit": 5 if not after else None},
        {"name": "other", "priority": 3 if not after else 1, "description": "" if not after else "Other"},
    ]
    if not after:
        queues.append({"name": "gone", "priority": 4})
    template = {"job_configuration": {"command": "true" if after else "false"}, "variables": {"properties": {}}}
    pool = {"name": project.pool, "type": "process", "base_job_template": template, "queues": queues}
    named = project.own("n")
    return {
        "work_pools": [pool | ({"concurrency_limit": 50, "description": "After"} if after else {})],
        "variables": [{"name": named, "value": int(after)}],
        "remote_file_systems": [{"name": named, "basepath": f"memory://{after}"}],
        "concurrency_limits": [{"name": named, "limit": 5 + after, "active": not after}],
        "tag_concurrency_limits": [{"tag": named, "limit": 5 + after}],
        "automations": [
            {
                "name": named,
                "enabled": not after,
                "trigger": {"type": "event", "expect": ["a.b"], "posture": "Reactive", "threshold": 1, "within": 0},
                "actions": [{"type": "do-nothing"}],
            }
        ],
    }


def deployment(name: str, project: Project, change: dict[str, Any]) -> dict[str, Any]:
    """A deployment in the queue `q`."""
    made = BASE | change
    pool = {"name": project.pool, "work_queue_name": made.pop("work_queue_name", "q")}
    return made | {"name": name, "work_pool": pool | {"job_variables": made.pop("job_variables", {})}}


def start(project: Project, name: str) -> str:
    """A scheduled run; its id."""
    path = f"/deployments/{project.there(name)['id']}/create_flow_run"
    return str(project.api.post(path, json={}).raise_for_status().json()["id"])


def proposed(project: Project, run: str, state: str) -> str:
    """The state that a run is in after this one was proposed; as the engine does, without force."""
    answer = project.api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": state}})
    assert answer.status_code < 300, f"{state}: {answer.status_code} {answer.text}"
    found = answer.json()
    return str((found["state"] or {}).get("name") or found["status"])


def moved(project: Project, run: str, *states: str) -> list[str]:
    return [proposed(project, run, state) for state in states]


def begin(project: Project, name: str) -> dict[str, str]:
    """A run in each state, two of which hold the deployment's two slots; their ids."""
    runs = {state: start(project, name) for state in ("paused", "pending", "running", "waiting")}
    assert moved(project, runs["paused"], "PENDING", "RUNNING", "PAUSED")[-1] == "Paused"
    assert moved(project, runs["pending"], "PENDING") == ["Pending"]
    assert moved(project, runs["running"], "PENDING", "RUNNING")[-1] == "Running"
    assert moved(project, runs["waiting"], "PENDING") == ["AwaitingConcurrencySlot"]
    return runs


def end(project: Project, runs: dict[str, str]) -> dict[str, str]:
    """The runs' ends, each in the way that a worker and the engine bring it about."""
    ends = {
        "running": moved(project, runs["running"], "COMPLETED")[-1],
        "pending": moved(project, runs["pending"], "RUNNING", "COMPLETED")[-1],
        "waiting": moved(project, runs["waiting"], "PENDING", "COMPLETED")[-1],
    }
    project.api.post(f"/flow_runs/{runs['paused']}/resume").raise_for_status()
    ends["paused"] = moved(project, runs["paused"], "PENDING", "COMPLETED")[-1]
    return ends


def test_no_change_under_a_run_changes_its_end(project: Project) -> None:
    project.write(*(deployment(name, project, {}) for name in CHANGES), **things(project, after=False))
    project.sync()
    runs = {name: begin(project, name) for name in CHANGES}
    project.write(
        *(deployment(name, project, change) for name, change in CHANGES.items()), **things(project, after=True)
    )
    said = project.sync("--prune")
    assert "its concurrency_limit stays while 2 runs hold a slot" in said
    expected = dict.fromkeys(("running", "pending", "waiting", "paused"), "Completed")
    # CANCEL_NEW cancels what finds no slot, also of what waited; the two slots are free by then.
    assert {name: end(project, each) for name, each in runs.items()} == dict.fromkeys(CHANGES, expected)
    said = project.sync("--prune")
    assert "2 changed" in said
    assert project.there("limit-removed")["global_concurrency_limit"] is None
    assert project.there("strategy-and-limit-removed")["description"] == "After"


def test_a_limit_whose_slot_is_taken_while_a_sync_begins_is_removed_later(project: Project) -> None:
    project.write(deployment("a", project, {}), **things(project, after=False))
    project.sync()
    project.write(deployment("a", project, {"concurrency_limit": None}), **things(project, after=False))
    runs = {"one": start(project, "a")}
    with after_planning(lambda: moved(project, runs["one"], "PENDING", "RUNNING")):
        status, said = project.run("sync")
    assert status == 0, said
    assert "its concurrency_limit stays while 1 run holds a slot" in said
    assert project.run("plan")[0] == 0
    assert moved(project, runs["one"], "COMPLETED") == ["Completed"]
    assert "1 changed" in project.sync()
    assert project.there("a")["global_concurrency_limit"] is None


def test_a_run_that_begins_while_a_sync_prunes_keeps_its_deployment(project: Project) -> None:
    pools = things(project, after=False)
    project.write(deployment("a", project, {}), deployment("b", project, {}), **pools)
    project.sync()
    run, other = start(project, "a"), project.there("b")["id"]
    (project.folder / "nothing.yaml").write_text(f"name: {project.owner}\n")
    with after_planning(lambda: moved(project, run, "PENDING")):
        status, said = project.run("sync", "--prune", "nothing.yaml")
    assert status == 0, said
    assert "stays, paused: 1 run has begun meanwhile" in said
    assert project.api.get(f"/deployments/{other}").status_code == 404
    assert project.there("a")["paused"]
    assert project.api.get(f"/work_pools/{project.pool}").status_code == 200
    assert moved(project, run, "RUNNING", "COMPLETED")[-1] == "Completed"
    project.sync("--prune", "nothing.yaml")
    assert project.deployment("a") is None
    assert project.api.get(f"/work_pools/{project.pool}").status_code == 404


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_queue_with_a_run_is_pruned_later(project: Project, when: str) -> None:
    project.write(deployment("a", project, {}), **things(project, after=False))
    project.sync()
    runs: list[str] = []

    def run_in_the_queue() -> None:
        path, pool = f"/deployments/{project.there('a')['id']}", {"work_pool_name": project.pool}
        project.api.patch(path, json=pool | {"work_queue_name": "gone"}).raise_for_status()
        runs.append(start(project, "a"))
        project.api.patch(path, json=pool | {"work_queue_name": "q"}).raise_for_status()

    if when == "before":
        run_in_the_queue()
    project.write(deployment("a", project, {}), **things(project, after=True))
    with after_planning(run_in_the_queue) if when == "meanwhile" else contextlib.nullcontext():
        status, said = project.run("sync", "--prune")
    assert status == 0, said
    assert f"work-queue {project.pool}/gone stays" in said
    assert project.api.get(f"/flow_runs/{runs[0]}").json()["work_queue_name"] == "gone"
    assert moved(project, runs[0], "PENDING", "COMPLETED")[-1] == "Completed"
    assert "1 deleted" in project.sync("--prune")


def test_a_pruned_deployment_that_comes_back_is_not_left_paused(project: Project) -> None:
    project.write(deployment("a", project, {}), **things(project, after=False))
    project.sync()
    run = start(project, "a")
    (project.folder / "nothing.yaml").write_text(f"name: {project.owner}\n")
    with after_planning(lambda: moved(project, run, "PENDING")):
        project.run("sync", "--prune", "nothing.yaml")
    assert project.there("a")["paused"]
    project.sync("--prune")
    assert not project.there("a")["paused"]


def after_planning(happens: Any) -> Any:
    """Let something happen between a sync's look and its first change."""
    made = planning.make
    came: list[bool] = []

    async def make(*arguments: Any, **options: Any) -> Any:
        plan = await made(*arguments, **options)
        if not came:
            came.append(True)
            happens()
        return plan

    return patch.object(planning, "make", make)
