"""A sync on a real server: what it changes, what it leaves alone, and what it must not lose."""

import asyncio
import functools
import json
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from hashlib import md5
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, patch

import pytest

from orchestration.deployments import live_state, record
from orchestration.prefect_api import Server
from orchestration.settings import ROOT
from tests.orchestration.deployments.conftest import Project
from tests.parts import free_port, wait_until

DAILY = {"cron": "0 6 * * *", "timezone": "Europe/Berlin"}
HOURLY = {"interval": 3600, "anchor_date": "2026-01-01T00:00:00Z", "slug": "hourly"}


def all_other_kinds(project: Project) -> dict[str, Any]:
    return {
        "variables": [{"name": project.unique("region"), "value": {"a": [1, None]}, "tags": ["x"]}],
        "remote_file_systems": [
            {"name": project.unique("results"), "basepath": "s3://bucket/a", "settings": {"b": [1]}}
        ],
        "concurrency_limits": [{"name": project.unique("database"), "limit": 5, "slot_decay_per_second": 0.5}],
        "tag_concurrency_limits": [{"tag": project.unique("warehouse"), "limit": 3}],
        "work_pools": [
            {
                "name": project.pool,
                "type": "process",
                "concurrency_limit": 7,
                "base_job_template": {
                    "job_configuration": {"command": "{{ command }}"},
                    "variables": {"type": "object", "properties": {"command": {"type": "string"}}},
                },
                "queues": [{"name": "urgent", "priority": 1}, {"name": "slow", "priority": 3, "concurrency_limit": 1}],
            }
        ],
        "automations": [
            {
                "name": project.unique("note"),
                "trigger": {"type": "event", "expect": ["a.b"], "posture": "Reactive", "threshold": 1, "within": 0},
                "actions": [{"type": "do-nothing"}],
            }
        ],
    }


def write_all_kinds(project: Project) -> None:
    deployment = {
        "name": "a",
        "tags": ["z", "b"],
        "version": "3",
        "parameters": {"day": 2},
        "concurrency_limit": {"limit": 2, "collision_strategy": "CANCEL_NEW"},
        "work_pool": {"name": project.pool, "work_queue_name": "urgent", "job_variables": {"command": "true"}},
        "schedules": [DAILY | {"slug": "morning"}, {"interval": 600}, {"rrule": "FREQ=DAILY;BYHOUR=3"}],
        "triggers": [{"expect": ["x.y"], "match": {"prefect.resource.id": "thing"}, "parameters": {"day": 4}}],
    }
    project.write(deployment, {"name": "b"}, **all_other_kinds(project))


def test_first_sync_creates_every_kind_and_second_and_prefect_deploy_change_nothing(project: Project) -> None:
    write_all_kinds(project)
    status, planned = project.run("plan")
    assert status == 2
    assert "10 to create" in planned
    assert "\033[" not in planned
    with patch("sys.stdout.isatty", return_value=True):
        assert "\033[32m+ deployment" in project.run("plan")[1], "in colour on a terminal"
    assert project.deployment("a") is None, "a plan changes nothing"
    project.sync()
    made = project.existing("a")
    assert made["tags"] == ["b", "z"]
    assert made["work_queue_name"] == "urgent"
    assert made["job_variables"] == {"command": "true"}
    assert made["global_concurrency_limit"]["limit"] == 2
    assert len(made["schedules"]) == 3
    assert made["pull_steps"] == [
        {"prefect.deployments.steps.set_working_directory": {"directory": str(project.folder)}}
    ]
    related = project.api.get(f"/automations/related-to/prefect.deployment.{made['id']}").json()
    assert [automation["actions"][0]["parameters"] for automation in related] == [{"day": 4}]
    queues = project.api.post(f"/work_pools/{project.pool}/queues/filter", json={}).json()
    queues.sort(key=lambda queue: queue["priority"])
    assert [queue["name"] for queue in queues] == ["urgent", "default", "slow"]
    project.sync("--prune")
    assert project.existing("a") == made
    # `prefect deploy` reads the same file.
    done = subprocess.run(
        [Path(sys.executable).with_name("prefect"), "--no-prompt", "deploy", "--all"],
        cwd=project.folder, env=_env(project), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    status, planned = project.run("plan", "--json")
    assert status == 2
    # Without a version in the file, Prefect sets a hash of flow.py. Nothing else differs.
    hashed = md5((project.folder / "flow.py").read_bytes(), usedforsecurity=False).hexdigest()
    (change,) = json.loads(planned)["changes"]
    assert (change["action"], change["key"]) == ("change", f"etl/{project.unique('b')}")
    assert change["fields"] == [{"field": "version", "old": hashed, "new": None}]


@pytest.mark.further
def test_file_system_is_a_block_that_prefect_loads(project: Project) -> None:
    from prefect.filesystems import RemoteFileSystem

    name = project.unique("results")

    def synced(**fields: Any) -> Any:
        project.write(remote_file_systems=[{"name": name, **fields}])
        project.sync("--prune")
        return RemoteFileSystem.load(name)

    first = synced(basepath="memory://a/b", settings={"x": {"y": 1}})
    assert (first.basepath, first.settings) == ("memory://a/b", {"x": {"y": 1}})
    changed = synced(basepath="memory://c")
    changed.write_path("one", b"1")
    assert (changed.basepath, changed.settings) == ("memory://c", {})
    assert changed._block_document_id == first._block_document_id, "references to the block stay valid"
    project.write(remote_file_systems=[{"name": name, "basepath": "folder"}])
    assert "basepath" in project.run("plan")[1]
    project.write()
    project.sync("--prune")
    with pytest.raises(ValueError, match="Unable to find block document"):
        RemoteFileSystem.load(name)


def test_sync_changes_only_what_differs_and_schedules_its_runs(project: Project) -> None:
    project.write({"name": "a", "schedules": [HOURLY]}, {"name": "b", "schedules": [HOURLY]})
    project.prepare()
    untouched = project.existing("b")
    path = f"/deployments/{project.existing('a')['id']}/schedule"
    project.api.post(path, json={}).raise_for_status()
    before = [run["expected_start_time"] for run in project.runs("a")]
    assert before
    project.write({"name": "a", "schedules": [HOURLY], "parameters": {"day": 9}}, {"name": "b", "schedules": [HOURLY]})
    status, planned = project.run("plan", "--json")
    assert status == 2
    (change,) = json.loads(planned)["changes"]
    assert change["fields"] == [{"field": "parameters.day", "old": None, "new": 9}]
    output = project.sync()
    assert "1 changed" in output
    assert project.existing("a")["parameters"] == {"day": 9}
    assert project.existing("b") == untouched
    after = project.runs("a")
    assert [run["expected_start_time"] for run in after][: len(before)] == before
    assert {run["parameters"]["day"] for run in after} == {9}


@pytest.mark.further
def test_changed_schedule_keeps_its_id(project: Project) -> None:
    project.write({"name": "a", "schedules": [DAILY, HOURLY]})
    project.prepare()
    before = {schedule["slug"]: schedule["id"] for schedule in project.existing("a")["schedules"]}
    project.write({"name": "a", "schedules": [DAILY | {"cron": "0 7 * * *"}, HOURLY | {"parameters": {"day": 5}}]})
    project.sync()
    after = project.existing("a")["schedules"]
    assert {schedule["slug"]: schedule["id"] for schedule in after} == before
    assert {schedule["slug"]: schedule["parameters"] for schedule in after} == {None: {}, "hourly": {"day": 5}}
    project.write({"name": "a", "schedules": [HOURLY]})
    project.sync()
    assert [schedule["slug"] for schedule in project.existing("a")["schedules"]] == ["hourly"]


@pytest.mark.further
def test_schedule_with_a_new_slug_keeps_late_runs_and_pause(project: Project) -> None:
    often = {"interval": 600, "anchor_date": "2026-01-01T00:00:00Z"}
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "gets": ({}, {"slug": "{}-new"}),
        "renames": ({"slug": "{}-old"}, {"slug": "{}-new"}),
        "replaces": ({"slug": "{}-old"}, {"slug": "{}-new", "replaces": "{}-old", "timezone": "Europe/Berlin"}),
        "loses": ({"slug": "{}-old"}, {}),
    }

    def write(number: int) -> None:
        schedules = {
            name: [
                schedule | {key: value.format(slug) for key, value in both[number].items()}
                for slug, schedule in (("often", often), ("daily", DAILY))
            ]
            for name, both in changes.items()
        }
        project.write(*({"name": name, "schedules": schedule} for name, schedule in schedules.items()))

    def seen(name: str) -> Any:
        made = project.existing(name)
        due = [run["expected_start_time"] for run in project.runs(name)]
        states = sorted(("cron" in schedule["schedule"], schedule["active"]) for schedule in made["schedules"])
        return states, [time for time in due if time < began], len(due) - len(set(due))

    write(0)
    project.prepare()
    began = datetime.now(UTC).isoformat()  # a run may become due between two looks
    before = {}
    for name in changes:
        made = project.existing(name)
        daily = next(schedule["id"] for schedule in made["schedules"] if "cron" in schedule["schedule"])
        path = f"/deployments/{made['id']}"
        project.api.patch(f"{path}/schedules/{daily}", json={"active": False}).raise_for_status()
        start = (datetime.now(UTC) - timedelta(minutes=25)).isoformat()
        body = {"start_time": start, "end_time": datetime.now(UTC).isoformat()}
        project.api.post(f"{path}/schedule", json=body).raise_for_status()
        before[name] = seen(name)
        assert len(before[name][1]) in (2, 3)
    write(1)
    project.sync()
    assert {name: seen(name) for name in changes} == before
    assert {schedule["slug"] for schedule in project.existing("gets")["schedules"]} == {"often-new", "daily-new"}
    assert {schedule["slug"] for schedule in project.existing("loses")["schedules"]} == {None}


def test_pause_survives_a_sync_unless_the_file_resumes(project: Project) -> None:
    project.write({"name": "a", "schedules": [DAILY, HOURLY]})
    project.prepare()
    made = project.existing("a")
    daily = next(schedule["id"] for schedule in made["schedules"] if schedule["slug"] is None)
    project.api.patch(f"/deployments/{made['id']}/schedules/{daily}", json={"active": False}).raise_for_status()
    project.write({"name": "a", "schedules": [DAILY | {"cron": "0 7 * * *"}, HOURLY], "tags": ["new"]})
    project.sync()
    status, planned = project.run("plan")
    assert status == 0
    assert "cron 0 7 * * * Europe/Berlin is paused on the server and stays so" in planned
    [changed] = [schedule for schedule in project.existing("a")["schedules"] if schedule["slug"] is None]
    assert changed["active"] is False
    project.write({"name": "a", "schedules": [DAILY | {"cron": "0 7 * * *", "active": True}, HOURLY]})
    project.sync()
    assert all(schedule["active"] for schedule in project.existing("a")["schedules"])
    project.api.post(f"/deployments/{made['id']}/pause_deployment").raise_for_status()
    assert "is paused on the server and stays so" in project.run("plan")[1]
    project.write({"name": "a", "schedules": [HOURLY], "paused": False})
    project.sync()
    assert not project.existing("a")["paused"]


def test_prune_deletes_only_objects_of_the_owner(project: Project) -> None:
    project.write({"name": "a"}, {"name": "b"}, **all_other_kinds(project))
    project.prepare()
    by_hand = project.api.post(
        "/deployments/", json={"name": project.unique("hand"), "flow_id": project.existing("a")["flow_id"]}
    )
    by_hand.raise_for_status()
    other = {"name": f"other-{project.owner}", "work_pools": []}
    project.write({"name": "theirs"}, file="other.yaml", **other)
    project.sync("other.yaml")
    project.write({"name": "a"})
    output = project.sync()
    assert "stay on the server" in output
    assert project.deployment("b")
    output = project.sync("--prune")
    assert "deleted" in output
    assert project.deployment("b") is None
    assert project.deployment("hand")
    assert project.deployment("theirs")
    assert project.api.get(f"/variables/name/{project.unique('region')}").status_code == 404
    assert project.api.get(f"/work_pools/{project.pool}/queues/slow").status_code == 404
    automations = project.api.post("/automations/filter", json={"limit": 200}).json()
    assert project.unique("note") not in [automation["name"] for automation in automations]


@pytest.mark.further
def test_automation_of_a_person_stays_next_to_the_triggers(project: Project) -> None:
    """Also if it only runs the deployment, or has the name of a trigger."""
    trigger = {"name": "landed", "expect": ["orders.landed"]}
    project.write({"name": "a", "triggers": [trigger, {"expect": ["x.y"]}]})
    project.prepare()
    deployment = project.existing("a")["id"]

    def automations() -> list[dict[str, Any]]:
        related = project.api.get(f"/automations/related-to/prefect.deployment.{deployment}").raise_for_status()
        return sorted(related.json(), key=lambda automation: (automation["name"], automation["id"]))

    def add(name: str, *expected: str) -> str:
        body = {
            "name": name,
            "trigger": {"type": "event", "expect": expected, "posture": "Reactive", "threshold": 1, "within": 0},
            "actions": [{"type": "run-deployment", "source": "selected", "deployment_id": deployment}],
        }
        return str(project.api.post("/automations/", json=body).raise_for_status().json()["id"])

    own = automations()
    by_hand = {add("by hand", "orders.late"), add("landed", "orders.late")}
    copy = add("landed", "orders.landed")
    before = automations()
    assert project.run("diff")[0] == 0
    output = project.sync("--prune")
    assert "the automation by hand also runs it" in output
    after = automations()
    assert after == [automation for automation in before if automation["id"] != copy], "a copy of a trigger goes"
    assert all(automation in after for automation in own)
    assert "by hand" not in project.run("export", "--mine")[1]
    # A trigger that leaves the file goes, the others of its name stay.
    project.write({"name": "a"})
    project.sync()
    assert {automation["id"] for automation in automations()} == by_hand
    project.write()
    project.sync("--prune")
    assert project.deployment("a") is None
    for automation_id in by_hand:
        project.api.delete(f"/automations/{automation_id}").raise_for_status()


def test_object_of_another_owner_needs_adopt(project: Project) -> None:
    project.write({"name": "a"})
    project.prepare()
    flow = project.existing("a")["flow_id"]
    body = {"name": project.unique("hand"), "flow_id": flow, "description": "By hand"}
    project.api.post("/deployments/", json=body).raise_for_status()
    project.write({"name": "a"}, {"name": "hand"})
    status, output = project.run("sync")
    assert status == 1
    assert "exists and does not belong to" in output
    assert project.existing("hand")["description"] == "By hand"
    assert "1 adopted" in project.sync("--adopt")
    assert project.existing("hand")["description"] == "Loads a day."
    # An object of another owner needs --from.
    new: dict[str, Any] = {"name": f"new-{project.owner}", "work_pools": []}
    project.write({"name": "hand"}, file="new.yaml", **new)
    status, output = project.run("sync", "--adopt", "new.yaml")
    assert status == 1
    assert f"belongs to {project.owner}" in output
    name = f"deployment:etl/{project.unique('hand')}"
    assert project.run("adopt", name, "--owner", new["name"])[0] == 1
    assert project.run("adopt", name, "--owner", new["name"], "--from", project.owner)[0] == 0
    project.write({"name": "a"})
    project.sync("--prune")
    assert project.deployment("hand"), "it belongs to another owner now"
    project.sync("new.yaml")


@pytest.mark.further
def test_pruned_deployment_is_deleted_after_its_runs_end(project: Project) -> None:
    project.write({"name": "a"}, {"name": "b", "schedules": [HOURLY]})
    project.prepare()
    run = project.start("b")
    project.write({"name": "a"})
    output = project.sync("--prune")
    assert "1 unfinished run" in output
    assert project.existing("b")["paused"]
    assert [scheduled["id"] for scheduled in project.runs("b")] == [run], "the pause deletes scheduled runs"
    project.state(run, "COMPLETED")
    assert "1 deleted" in project.sync("--prune")
    assert project.deployment("b") is None


def test_deployment_paused_by_a_prune_is_resumed_when_the_file_has_it_again(project: Project) -> None:
    project.write({"name": "a"}, {"name": "b", "schedules": [HOURLY]})
    project.prepare()
    project.start("b")
    project.write({"name": "a"})
    project.sync("--prune")
    project.write({"name": "a"}, {"name": "b", "schedules": [HOURLY]})
    project.sync("--prune")
    assert not project.existing("b")["paused"]
    assert len(project.runs("b")) > 1
    # Later an operator can pause it again.
    project.api.post(f"/deployments/{project.existing('b')['id']}/pause_deployment").raise_for_status()
    assert project.run("plan", "--prune")[0] == 0


@pytest.mark.further
def test_invalid_job_variables_are_refused_before_any_change(project: Project) -> None:
    template = {
        "job_configuration": {"command": "{{ command }}"},
        "variables": {"type": "object", "properties": {"command": {"type": "string"}}},
    }
    bad = {"name": "bad", "work_pool": {"name": project.pool, "job_variables": {"command": 5}}}
    pool = {"name": project.pool, "type": "process", "base_job_template": template}
    project.write(bad, {"name": "good"}, work_pools=[pool])
    status, output = project.run("sync")
    assert status == 1
    assert (
        f"prefect.yaml:14: deployment etl/{project.unique('bad')}: the work pool {project.pool} takes no such" in output
    )
    assert project.deployment("good") is None
    bad["work_pool"]["job_variables"]["command"] = "true"  # type: ignore[index]
    project.write(bad, {"name": "good"}, work_pools=[pool])
    project.prepare()


@pytest.mark.further
def test_refused_object_is_named_and_the_others_are_synced(project: Project) -> None:
    good = {"name": project.unique("good"), "type": "process"}
    template: dict[str, Any] = {"job_configuration": {"a": "{{ b }}"}, "variables": {"properties": {}}}
    bad = {"name": project.unique("bad"), "type": "process", "base_job_template": template}
    project.write(work_pools=[bad, good])
    status, output = project.run("sync")
    assert status == 1
    assert "prefect.yaml:" in output
    assert f"work-pool {project.unique('bad')}" in output
    assert "Traceback" not in output
    assert project.api.get(f"/work_pools/{project.unique('good')}").status_code == 200
    template["variables"]["properties"]["b"] = {"type": "string"}
    project.write(work_pools=[bad, good])
    assert "was cut off" in project.run("plan")[1]
    project.prepare()


def test_two_concurrent_syncs_succeed(project: Project) -> None:
    """The two want the same of four deployments, and other schedules of four."""
    schedules = [DAILY, HOURLY, {"cron": "*/5 * * * *"}]
    triggers = [{"expect": ["x.y"]}]
    project.write({"name": "a"}, {"name": "e"})
    project.prepare()
    same, different = "abcd", "efgh"
    wanted = {name: {"name": name, "schedules": schedules, "triggers": triggers} for name in same + different}
    project.write(*wanted.values(), file="one.yaml")
    others = {name: wanted[name] | {"schedules": [DAILY]} for name in different}
    project.write(*(wanted | others).values(), file="two.yaml")
    command = [sys.executable, "-m", "orchestration", "sync", "--prune"]
    both = [
        subprocess.Popen(
            [*command, file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_env(project)
        )
        for file in ("one.yaml", "two.yaml")
    ]
    outputs = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(output[-1500:] for output in outputs)
    planned = json.loads(project.run("plan", "--prune", "one.yaml", "--json")[1])["changes"]
    assert {change["key"] for change in planned} <= {f"etl/{project.unique(name)}" for name in different}, outputs
    project.sync("--prune", "one.yaml")
    for name in same + different:
        assert len(project.existing(name)["schedules"]) == 3
        related = project.api.get(f"/automations/related-to/prefect.deployment.{project.existing(name)['id']}").json()
        assert len(related) == 1


KILLED = """
import os
import sys
from orchestration.__main__ import main
from orchestration.prefect_api import Server

ask, left = Server.ask, int(sys.argv[1])

async def ask_until_killed(self, method, path, *rest, **more):
    global left
    if method != "GET" and not path.endswith("filter"):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), 9)
    return await ask(self, method, path, *rest, **more)

Server.ask = ask_until_killed
sys.exit(main(sys.argv[2:]))
"""
"""Runs `orchestrate`, which is killed before a write: `python -c KILLED WRITES_BEFORE ARGUMENTS`."""


def test_sync_that_was_killed_between_two_writes_is_completed_by_the_next(project: Project) -> None:
    """`make test-long FOR=sync-kills` kills at random moments, under schedules of every few seconds."""
    project.write({"name": "a", "schedules": [DAILY]}, {"name": "old", "schedules": [DAILY]})
    project.prepare()
    triggers = [{"expect": ["x.y"]}]
    wanted = [{"name": name, "schedules": [HOURLY], "triggers": triggers, "parameters": {"day": 2}} for name in "ab"]
    project.write(*wanted)
    changes = json.loads(project.run("plan", "--prune", "--json")[1])["changes"]
    command = [sys.executable, "-c", KILLED, "6", "sync", "--prune"]
    done = subprocess.run(command, cwd=project.folder, env=_env(project), capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stdout + done.stderr
    left = json.loads(project.run("plan", "--prune", "--json")[1])["changes"]
    assert left
    assert left != changes, "the kill came before the first change"
    project.sync("--prune")
    assert project.deployment("old") is None

    def scheduled(name: str) -> list[dict[str, Any]]:
        """Return the runs once the server's scheduler has made those of a new deployment."""
        return found if len(found := project.runs(name)) >= 3 else []

    for name in "ab":
        related = project.api.get(f"/automations/related-to/prefect.deployment.{project.existing(name)['id']}").json()
        assert len(related) == 1
        runs: list[dict[str, Any]] = wait_until(functools.partial(scheduled, name), f"the runs of {name}")
        assert len({run["expected_start_time"] for run in runs}) == len(runs)
        assert all(run["parameters"]["day"] == 2 for run in runs)


def _env(project: Project) -> dict[str, str]:
    import os

    return os.environ | {"PREFECT_API_URL": str(project.api.base_url).rstrip("/"), "PYTHONPATH": str(ROOT)}


def sync_before_first(read: Callable[[Server], Awaitable[Any]], project: Project) -> AsyncMock:
    """Return a replacement of `read` that syncs the project before the first read."""
    done: list[str] = []

    async def read_late(asked: Server) -> Any:
        if not done:
            done.append("the sync itself also reads")
            await asyncio.to_thread(project.sync)
        return await read(asked)

    return AsyncMock(side_effect=read_late)


def test_sync_during_a_look_is_no_drift(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write({"name": "a"})
    project.prepare()
    project.write({"name": "a", "description": "Another"})
    late = sync_before_first(live_state.read_all, project)
    monkeypatch.setattr(live_state, "read_all", late)
    assert project.run("diff")[0] == 0
    assert late.await_count > 1


@pytest.mark.further
def test_first_sync_during_a_look_is_found(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write({"name": "a"})
    late = sync_before_first(record.read_all, project)
    monkeypatch.setattr(record, "read_all", late)
    assert project.run("diff")[0] == 0
    assert late.await_count > 1


def test_drift_names_field_values_and_time(project: Project) -> None:
    project.write({"name": "a", "schedules": [DAILY]}, {"name": "b"})
    project.prepare()
    assert project.run("diff")[0] == 0
    made = project.existing("a")
    project.api.patch(f"/deployments/{made['id']}", json={"description": "Other"}).raise_for_status()
    when = datetime.fromisoformat(project.existing("a")["updated"])
    project.api.delete(f"/deployments/{project.existing('b')['id']}").raise_for_status()
    status, output = project.run("diff")
    assert status == 2
    assert "Loads a day. -> Other" in output
    assert f"{when:%Y-%m-%d}" in output
    assert "(deleted" in output
    found = json.loads(project.run("diff", "--json")[1])["drift"]
    assert [item["action"] for item in found] == ["changed", "deleted"]
    # An operator's pause is no drift.
    project.sync()
    project.api.post(f"/deployments/{project.existing('a')['id']}/pause_deployment").raise_for_status()
    assert project.run("diff")[0] == 0
    assert "has never synced" in project.run("diff", "--owner", "absent-owner")[1]


@pytest.mark.parametrize(
    ("is_up", "reason"),
    [(False, "does not answer"), pytest.param(True, "not a Prefect API", marks=pytest.mark.further)],
)
def test_unreachable_api_is_an_error_and_not_an_empty_server(project: Project, is_up: bool, reason: str) -> None:
    """An empty answer would make a sync create everything, and a prune delete everything."""
    project.write({"name": "a"})
    environment = _env(project)
    url = environment["PREFECT_API_URL"].removesuffix("/api") if is_up else f"http://127.0.0.1:{free_port()}/api"
    command = [sys.executable, "-m", "orchestration", "plan"]
    done = subprocess.run(
        command, env=environment | {"PREFECT_API_URL": url}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.further
def test_unknown_pool_or_queue_and_changed_pool_type_are_refused(project: Project) -> None:
    project.write({"name": "a", "work_pool": {"name": project.pool + "x"}})
    status, output = project.run("plan")
    assert status == 1
    assert f"Did you mean {project.pool}?" in output
    project.write({"name": "a", "work_pool": {"name": project.pool, "work_queue_name": "urgnt"}})
    assert "uses the queue urgnt" in project.run("plan")[1]
    project.write({"name": "a"})
    project.prepare()
    project.write({"name": "a"}, work_pools=[{"name": project.pool, "type": "docker"}])
    status, output = project.run("sync")
    assert status == 1
    assert "is of type process, not docker" in output


def test_values_of_the_environment_are_masked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan, sync and diff name the fields, and neither the values in the files nor those on the server."""
    variable = {"name": project.unique("token"), "value": {"bearer": "{{ $SYNC_TOKEN }}"}}

    def write(name: str) -> None:
        project.write({"name": "a", "parameters": {"name": name, "day": 2}}, variables=[variable])

    monkeypatch.setenv("SYNC_TOKEN", "first secret")
    write("Bearer {{ $SYNC_TOKEN }}")
    created = [project.run("plan")[1], project.run("plan", "--json")[1], project.sync()]
    monkeypatch.setenv("SYNC_TOKEN", "second secret")
    changed = [project.run("plan")[1], project.run("plan", "--json")[1], project.sync()]
    parameters = {"name": "third secret", "day": 3}
    project.api.patch(f"/deployments/{project.existing('a')['id']}", json={"parameters": parameters}).raise_for_status()
    drifted = [project.run("diff", "--owner", project.owner, *json)[1] for json in ((), ("--json",))]
    write("plain")
    replaced = [project.run("plan")[1]]
    for output in (*created, *changed, *drifted, *replaced):
        assert "secret" not in output
    for output in (changed[0], drifted[0], replaced[0]):
        assert re.search(r"parameters\.name +\*\*\* -> \*\*\*", output), output
    assert re.search(r"parameters\.day +2 -> 3", drifted[0]), "other fields are shown"
    assert "value.bearer" in changed[0]
