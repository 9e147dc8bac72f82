"""A sync during runs: whatever it changes, every run ends as it would have without the sync, and no run is lost."""

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
    "metadata": {"description": "After", "version": "2", "tags": ["new"]},
    "execution": {
        "entrypoint": "./flow.py:etl",
        "pull": [],
        "job_variables": {"a": "b"},
        "parameters": {"day": 2},
        "enforce_parameter_schema": False,
    },
    "pool": {"work_pool_name": "second"},
    "queue": {"work_queue_name": "other"},
    "limit-removed": {"concurrency_limit": None},
    "limit-raised": {"concurrency_limit": 5},
    "limit-lowered": {"concurrency_limit": 1},
    "strategy": {"concurrency_limit": {"limit": 2, "collision_strategy": "CANCEL_NEW"}},
    "strategy-and-limit-removed": {"concurrency_limit": None, "description": "After"},
    "paused": {"paused": True},
    "schedule-added": {"schedules": [HOURLY, NIGHTLY], "triggers": [TRIGGER | {"expect": ["y.z"]}]},
    "schedule-changed": {"schedules": [HOURLY | {"interval": 7200}], "triggers": []},
    "schedule-renamed": {"schedules": [HOURLY | {"slug": "each-hour", "parameters": {"day": 3}}]},
    "schedule-removed": {"schedules": []},
    "schedule-off": {"schedules": [HOURLY | {"active": False}]},
}
"""What a sync changes, by deployment."""

HARDEST = ("execution", "pool", "limit-removed", "strategy-and-limit-removed", "paused", "schedule-changed")
"""The changes that could end a run or free its slot."""


def other_objects(project: Project, *, after: bool) -> dict[str, Any]:
    """Return all other objects that a sync can change, before or after the change."""
    queues = [
        {"name": "q", "priority": 2, "concurrency_limit": 5 if not after else None},
        {"name": "other", "priority": 3 if not after else 1, "description": "" if not after else "Other"},
    ]
    if not after:
        queues.append({"name": "gone", "priority": 4})
    template = {"job_configuration": {"command": "true" if after else "false"}, "variables": {"properties": {}}}
    pool = {"name": project.pool, "type": "process", "base_job_template": template, "queues": queues}
    named = project.unique("n")
    return {
        "work_pools": [
            pool | ({"concurrency_limit": 50, "description": "After"} if after else {}),
            pool | {"name": project.unique("second")},
        ],
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
    """Return a deployment in the queue `q` of the first pool, with a change."""
    made = BASE | change
    pool_name = project.unique(made.pop("work_pool_name")) if "work_pool_name" in made else project.pool
    pool = {"name": pool_name, "work_queue_name": made.pop("work_queue_name", "q")}
    return made | {"name": name, "work_pool": pool | {"job_variables": made.pop("job_variables", {})}}


def start(project: Project, name: str) -> str:
    """Create a scheduled run, and return its id."""
    path = f"/deployments/{project.existing(name)['id']}/create_flow_run"
    return str(project.api.post(path, json={}).raise_for_status().json()["id"])


def propose(project: Project, run: str, state: str) -> str:
    """Propose a state without force, as the engine does, and return the name of the run's state afterwards."""
    answer = project.api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": state}})
    assert answer.status_code < 300, f"{state}: {answer.status_code} {answer.text}"
    found = answer.json()
    return str((found["state"] or {}).get("name") or found["status"])


def propose_all(project: Project, run: str, *states: str) -> list[str]:
    return [propose(project, run, state) for state in states]


def begin(project: Project, name: str) -> dict[str, str]:
    """Create a run in each state, and return their ids. Two runs hold the deployment's two slots."""
    runs = {state: start(project, name) for state in ("paused", "pending", "running", "waiting")}
    assert propose_all(project, runs["paused"], "PENDING", "RUNNING", "PAUSED")[-1] == "Paused"
    assert propose_all(project, runs["pending"], "PENDING") == ["Pending"]
    assert propose_all(project, runs["running"], "PENDING", "RUNNING")[-1] == "Running"
    assert propose_all(project, runs["waiting"], "PENDING") == ["AwaitingConcurrencySlot"]
    return runs


def end(project: Project, runs: dict[str, str]) -> dict[str, str]:
    """End the runs as a worker and the engine do, and return their last states."""
    ends = {
        "running": propose_all(project, runs["running"], "COMPLETED")[-1],
        "pending": propose_all(project, runs["pending"], "RUNNING", "COMPLETED")[-1],
        "waiting": propose_all(project, runs["waiting"], "PENDING", "COMPLETED")[-1],
    }
    project.api.post(f"/flow_runs/{runs['paused']}/resume").raise_for_status()
    ends["paused"] = propose_all(project, runs["paused"], "PENDING", "COMPLETED")[-1]
    return ends


@pytest.mark.parametrize("names", [HARDEST, pytest.param(tuple(CHANGES), marks=pytest.mark.further)], ids=len)
def test_runs_in_progress_complete_whatever_a_sync_changes(project: Project, names: tuple[str, ...]) -> None:
    project.write(*(deployment(name, project, {}) for name in names), **other_objects(project, after=False))
    project.sync()
    runs = {name: begin(project, name) for name in names}
    project.write(*(deployment(name, project, CHANGES[name]) for name in names), **other_objects(project, after=True))
    output = project.sync("--prune")
    assert "its concurrency_limit stays while 2 runs hold a slot" in output
    expected = dict.fromkeys(("running", "pending", "waiting", "paused"), "Completed")
    # CANCEL_NEW cancels a run that finds no slot, also one that waited. By then the two slots are free.
    assert {name: end(project, started) for name, started in runs.items()} == dict.fromkeys(names, expected)
    output = project.sync("--prune")
    assert "2 changed" in output
    assert project.existing("limit-removed")["global_concurrency_limit"] is None
    assert project.existing("strategy-and-limit-removed")["description"] == "After"


def test_limit_is_kept_when_a_run_takes_a_slot_during_the_sync(project: Project) -> None:
    project.write(deployment("a", project, {}), **other_objects(project, after=False))
    project.prepare()
    project.write(deployment("a", project, {"concurrency_limit": None}), **other_objects(project, after=False))
    runs = {"one": start(project, "a")}
    with during_sync(lambda: propose_all(project, runs["one"], "PENDING", "RUNNING")):
        status, output = project.run("sync")
    assert status == 0, output
    assert "its concurrency_limit stays while 1 run holds a slot" in output
    assert project.run("plan")[0] == 0
    assert propose_all(project, runs["one"], "COMPLETED") == ["Completed"]
    assert "1 changed" in project.sync()
    assert project.existing("a")["global_concurrency_limit"] is None


def test_deployment_is_kept_when_a_run_begins_during_the_prune(project: Project) -> None:
    pools = other_objects(project, after=False)
    project.write(deployment("a", project, {}), deployment("b", project, {}), **pools)
    project.prepare()
    run, other = start(project, "a"), project.existing("b")["id"]
    (project.folder / "nothing.yaml").write_text(f"name: {project.owner}\n")
    with during_sync(lambda: propose_all(project, run, "PENDING")):
        status, output = project.run("sync", "--prune", "nothing.yaml")
    assert status == 0, output
    assert "stays, paused: 1 run has begun meanwhile" in output
    assert project.api.get(f"/deployments/{other}").status_code == 404
    assert project.existing("a")["paused"]
    assert project.api.get(f"/work_pools/{project.pool}").status_code == 200
    assert propose_all(project, run, "RUNNING", "COMPLETED")[-1] == "Completed"
    project.sync("--prune", "nothing.yaml")
    assert project.deployment("a") is None
    assert project.api.get(f"/work_pools/{project.pool}").status_code == 404


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.further), "during"])
def test_queue_with_a_run_is_pruned_later(project: Project, when: str) -> None:
    unscheduled = deployment("a", project, {"schedules": []})  # the server may schedule runs in the queue at any time
    project.write(unscheduled, **other_objects(project, after=False))
    project.prepare()
    runs: list[str] = []

    def run_in_the_queue() -> None:
        path, pool = f"/deployments/{project.existing('a')['id']}", {"work_pool_name": project.pool}
        project.api.patch(path, json=pool | {"work_queue_name": "gone"}).raise_for_status()
        runs.append(start(project, "a"))
        project.api.patch(path, json=pool | {"work_queue_name": "q"}).raise_for_status()

    if when == "before":
        run_in_the_queue()
    project.write(unscheduled, **other_objects(project, after=True))
    with during_sync(run_in_the_queue) if when == "during" else contextlib.nullcontext():
        status, output = project.run("sync", "--prune")
    assert status == 0, output
    assert f"work-queue {project.pool}/gone stays" in output
    assert project.api.get(f"/flow_runs/{runs[0]}").json()["work_queue_name"] == "gone"
    assert propose_all(project, runs[0], "PENDING", "COMPLETED")[-1] == "Completed"
    assert "1 deleted" in project.sync("--prune")


@pytest.mark.further
def test_deployment_kept_by_a_prune_is_resumed_when_the_file_has_it_again(project: Project) -> None:
    project.write(deployment("a", project, {}), **other_objects(project, after=False))
    project.prepare()
    run = start(project, "a")
    (project.folder / "nothing.yaml").write_text(f"name: {project.owner}\n")
    with during_sync(lambda: propose_all(project, run, "PENDING")):
        project.run("sync", "--prune", "nothing.yaml")
    assert project.existing("a")["paused"]
    project.sync("--prune")
    assert not project.existing("a")["paused"]


def during_sync(action: Any) -> Any:
    """Run an action once in a sync, between its plan and its first change."""
    original = planning.make
    done: list[bool] = []

    async def make(*arguments: Any, **options: Any) -> Any:
        plan = await original(*arguments, **options)
        if not done:
            done.append(True)
            action()
        return plan

    return patch.object(planning, "make", make)
