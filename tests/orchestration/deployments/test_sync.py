"""Desired state on a real server: what is sent, what is left alone, and what no sync may lose."""

import asyncio
import json
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
from tests.parts import free_port

DAILY = {"cron": "0 6 * * *", "timezone": "Europe/Berlin"}
HOURLY = {"interval": 3600, "anchor_date": "2026-01-01T00:00:00Z", "slug": "hourly"}


def everything(project: Project) -> dict[str, Any]:
    return {
        "variables": [{"name": project.own("region"), "value": {"a": [1, None]}, "tags": ["x"]}],
        "remote_file_systems": [{"name": project.own("results"), "basepath": "s3://bucket/a", "settings": {"b": [1]}}],
        "concurrency_limits": [{"name": project.own("database"), "limit": 5, "slot_decay_per_second": 0.5}],
        "tag_concurrency_limits": [{"tag": project.own("warehouse"), "limit": 3}],
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
                "name": project.own("note"),
                "trigger": {"type": "event", "expect": ["a.b"], "posture": "Reactive", "threshold": 1, "within": 0},
                "actions": [{"type": "do-nothing"}],
            }
        ],
    }


def whole(project: Project) -> None:
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
    project.write(deployment, {"name": "b"}, **everything(project))


def test_a_first_sync_makes_everything_and_a_second_sends_nothing(project: Project) -> None:
    whole(project)
    status, planned = project.run("plan")
    assert status == 2
    assert "10 to create" in planned
    assert "\033[" not in planned
    with patch("sys.stdout.isatty", return_value=True):
        assert "\033[32m+ deployment" in project.run("plan")[1], "in colour on a terminal"
    assert project.deployment("a") is None, "a plan changes nothing"
    project.sync()
    made = project.there("a")
    assert made["tags"] == ["b", "z"]
    assert made["work_queue_name"] == "urgent"
    assert made["job_variables"] == {"command": "true"}
    assert made["global_concurrency_limit"]["limit"] == 2
    assert len(made["schedules"]) == 3
    assert made["pull_steps"] == [
        {"prefect.deployments.steps.set_working_directory": {"directory": str(project.folder)}}
    ]
    related = project.api.get(f"/automations/related-to/prefect.deployment.{made['id']}").json()
    assert [each["actions"][0]["parameters"] for each in related] == [{"day": 4}]
    queues = project.api.post(f"/work_pools/{project.pool}/queues/filter", json={}).json()
    assert [each["name"] for each in sorted(queues, key=lambda each: each["priority"])] == ["urgent", "default", "slow"]
    project.sync("--prune")
    assert project.there("a") == made


def test_a_file_system_is_the_block_that_prefect_loads(project: Project) -> None:
    from prefect.filesystems import RemoteFileSystem

    name = project.own("results")

    def synced(**fields: Any) -> Any:
        project.write(remote_file_systems=[{"name": name, **fields}])
        project.sync("--prune")
        return RemoteFileSystem.load(name)

    first = synced(basepath="memory://a/b", settings={"x": {"y": 1}})
    assert (first.basepath, first.settings) == ("memory://a/b", {"x": {"y": 1}})
    changed = synced(basepath="memory://c")
    changed.write_path("one", b"1")
    assert (changed.basepath, changed.settings) == ("memory://c", {})
    assert changed._block_document_id == first._block_document_id, "what refers to it still finds it"
    project.write(remote_file_systems=[{"name": name, "basepath": "folder"}])
    assert "basepath" in project.run("plan")[1]
    project.write()
    project.sync("--prune")
    with pytest.raises(ValueError, match="Unable to find block document"):
        RemoteFileSystem.load(name)


def test_a_change_touches_what_differs_alone(project: Project) -> None:
    project.write({"name": "a", "schedules": [HOURLY]}, {"name": "b", "schedules": [HOURLY]})
    project.sync()
    untouched = project.there("b")
    project.write({"name": "a", "schedules": [HOURLY], "parameters": {"day": 9}}, {"name": "b", "schedules": [HOURLY]})
    status, planned = project.run("plan", "--json")
    assert status == 2
    (change,) = json.loads(planned)["changes"]
    assert change["fields"] == [{"field": "parameters.day", "old": None, "new": 9}]
    said = project.sync()
    assert "1 changed" in said
    assert project.there("a")["parameters"] == {"day": 9}
    assert project.there("b") == untouched


def test_the_runs_to_come_are_there_when_the_sync_ends(project: Project) -> None:
    project.write({"name": "a", "schedules": [HOURLY]})
    project.sync()
    path = f"/deployments/{project.there('a')['id']}/schedule"
    project.api.post(path, json={}).raise_for_status()
    before = [each["expected_start_time"] for each in project.runs("a")]
    assert before
    project.write({"name": "a", "schedules": [HOURLY], "parameters": {"day": 9}})
    project.sync()
    after = project.runs("a")
    assert [each["expected_start_time"] for each in after][: len(before)] == before
    assert {each["parameters"]["day"] for each in after} == {9}


def test_a_schedule_that_changes_stays_the_same_schedule(project: Project) -> None:
    project.write({"name": "a", "schedules": [DAILY, HOURLY]})
    project.sync()
    before = {each["slug"]: each["id"] for each in project.there("a")["schedules"]}
    project.write({"name": "a", "schedules": [DAILY | {"cron": "0 7 * * *"}, HOURLY | {"parameters": {"day": 5}}]})
    project.sync()
    after = project.there("a")["schedules"]
    assert {each["slug"]: each["id"] for each in after} == before
    assert {each["slug"]: each["parameters"] for each in after} == {None: {}, "hourly": {"day": 5}}
    project.write({"name": "a", "schedules": [HOURLY]})
    project.sync()
    assert [each["slug"] for each in project.there("a")["schedules"]] == ["hourly"]


def test_a_schedule_whose_slug_changes_keeps_its_late_runs_and_its_pause(project: Project) -> None:
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
                each | {key: value.format(slug) for key, value in both[number].items()}
                for slug, each in (("often", often), ("daily", DAILY))
            ]
            for name, both in changes.items()
        }
        project.write(*({"name": name, "schedules": each} for name, each in schedules.items()))

    def seen(name: str) -> Any:
        made = project.there(name)
        due = [run["expected_start_time"] for run in project.runs(name)]
        now = datetime.now(UTC).isoformat()
        states = sorted(("cron" in each["schedule"], each["active"]) for each in made["schedules"])
        return states, [each for each in due if each < now], len(due) - len(set(due))

    write(0)
    project.sync()
    before = {}
    for name in changes:
        made = project.there(name)
        daily = next(each["id"] for each in made["schedules"] if "cron" in each["schedule"])
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
    assert {each["slug"] for each in project.there("gets")["schedules"]} == {"often-new", "daily-new"}
    assert {each["slug"] for each in project.there("loses")["schedules"]} == {None}


def test_what_was_paused_stays_paused_unless_the_file_says_otherwise(project: Project) -> None:
    project.write({"name": "a", "schedules": [DAILY, HOURLY]})
    project.sync()
    made = project.there("a")
    daily = next(each["id"] for each in made["schedules"] if each["slug"] is None)
    project.api.patch(f"/deployments/{made['id']}/schedules/{daily}", json={"active": False}).raise_for_status()
    project.write({"name": "a", "schedules": [DAILY | {"cron": "0 7 * * *"}, HOURLY], "tags": ["new"]})
    project.sync()
    status, planned = project.run("plan")
    assert status == 0
    assert "cron 0 7 * * * Europe/Berlin is paused on the server and stays so" in planned
    assert [each["active"] for each in project.there("a")["schedules"] if each["slug"] is None] == [False]
    project.write({"name": "a", "schedules": [DAILY | {"cron": "0 7 * * *", "active": True}, HOURLY]})
    project.sync()
    assert all(each["active"] for each in project.there("a")["schedules"])
    project.api.post(f"/deployments/{made['id']}/pause_deployment").raise_for_status()
    assert "is paused on the server and stays so" in project.run("plan")[1]
    project.write({"name": "a", "schedules": [HOURLY], "paused": False})
    project.sync()
    assert not project.there("a")["paused"]


def test_prune_deletes_our_own_and_spares_others(project: Project) -> None:
    project.write({"name": "a"}, {"name": "b"}, **everything(project))
    project.sync()
    by_hand = project.api.post(
        "/deployments/", json={"name": project.own("hand"), "flow_id": project.there("a")["flow_id"]}
    )
    by_hand.raise_for_status()
    other = {"name": f"other-{project.owner}", "work_pools": []}
    project.write({"name": "theirs"}, file="other.yaml", **other)
    project.sync("other.yaml")
    project.write({"name": "a"})
    said = project.sync()
    assert "stay on the server" in said
    assert project.deployment("b")
    said = project.sync("--prune")
    assert "deleted" in said
    assert project.deployment("b") is None
    assert project.deployment("hand")
    assert project.deployment("theirs")
    assert project.api.get(f"/variables/name/{project.own('region')}").status_code == 404
    assert project.api.get(f"/work_pools/{project.pool}/queues/slow").status_code == 404
    automations = project.api.post("/automations/filter", json={"limit": 200}).json()
    assert project.own("note") not in [each["name"] for each in automations]


def test_what_is_not_ours_is_taken_over_on_purpose_alone(project: Project) -> None:
    project.write({"name": "a"})
    project.sync()
    flow = project.there("a")["flow_id"]
    body = {"name": project.own("hand"), "flow_id": flow, "description": "By hand"}
    project.api.post("/deployments/", json=body).raise_for_status()
    project.write({"name": "a"}, {"name": "hand"})
    status, said = project.run("sync")
    assert status == 1
    assert "exists and does not belong to" in said
    assert project.there("hand")["description"] == "By hand"
    assert "1 adopted" in project.sync("--adopt")
    assert project.there("hand")["description"] == "Loads a day."
    # What another owner has needs more than that.
    new: dict[str, Any] = {"name": f"new-{project.owner}", "work_pools": []}
    project.write({"name": "hand"}, file="new.yaml", **new)
    status, said = project.run("sync", "--adopt", "new.yaml")
    assert status == 1
    assert f"belongs to {project.owner}" in said
    name = f"deployment:etl/{project.own('hand')}"
    assert project.run("adopt", name, "--owner", new["name"])[0] == 1
    assert project.run("adopt", name, "--owner", new["name"], "--from", project.owner)[0] == 0
    project.write({"name": "a"})
    project.sync("--prune")
    assert project.deployment("hand"), "it is another's now"
    project.sync("new.yaml")


def test_a_deleted_deployment_lets_its_runs_finish(project: Project) -> None:
    project.write({"name": "a"}, {"name": "b", "schedules": [HOURLY]})
    project.sync()
    run = project.start("b")
    project.write({"name": "a"})
    said = project.sync("--prune")
    assert "1 unfinished run" in said
    assert project.there("b")["paused"]
    assert [each["id"] for each in project.runs("b")] == [run], "nothing more is scheduled"
    project.state(run, "COMPLETED")
    assert "1 deleted" in project.sync("--prune")
    assert project.deployment("b") is None


def test_a_deployment_that_comes_back_is_resumed(project: Project) -> None:
    project.write({"name": "a"}, {"name": "b", "schedules": [HOURLY]})
    project.sync()
    project.start("b")
    project.write({"name": "a"})
    project.sync("--prune")
    project.write({"name": "a"}, {"name": "b", "schedules": [HOURLY]})
    project.sync("--prune")
    assert not project.there("b")["paused"]
    assert len(project.runs("b")) > 1
    # And it is an operator's again to pause.
    project.api.post(f"/deployments/{project.there('b')['id']}/pause_deployment").raise_for_status()
    assert project.run("plan", "--prune")[0] == 0


def test_job_variables_that_the_pool_does_not_take_are_refused_before_anything_changes(project: Project) -> None:
    template = {
        "job_configuration": {"command": "{{ command }}"},
        "variables": {"type": "object", "properties": {"command": {"type": "string"}}},
    }
    bad = {"name": "bad", "work_pool": {"name": project.pool, "job_variables": {"command": 5}}}
    pool = {"name": project.pool, "type": "process", "base_job_template": template}
    project.write(bad, {"name": "good"}, work_pools=[pool])
    status, said = project.run("sync")
    assert status == 1
    assert f"prefect.yaml:14: deployment etl/{project.own('bad')}: the work pool {project.pool} takes no such" in said
    assert project.deployment("good") is None
    bad["work_pool"]["job_variables"]["command"] = "true"  # type: ignore[index]
    project.write(bad, {"name": "good"}, work_pools=[pool])
    project.sync()


def test_a_refusal_is_named_with_its_line_and_the_rest_is_done(project: Project) -> None:
    good = {"name": project.own("good"), "value": 1}
    project.write(variables=[{"name": project.own("bad"), "value": "x" * 10_000}, good])
    status, said = project.run("sync")
    assert status == 1
    assert "prefect.yaml:" in said
    assert f"variable {project.own('bad')}" in said
    assert "Traceback" not in said
    assert project.api.get(f"/variables/name/{project.own('good')}").status_code == 200
    project.write(variables=[{"name": project.own("bad"), "value": "x"}, good])
    assert "was cut off" in project.run("plan")[1]
    project.sync()


@pytest.mark.parametrize("same", [True, False])
def test_two_syncs_at_once(project: Project, same: bool) -> None:
    schedules = [DAILY, HOURLY, {"cron": "*/5 * * * *"}]
    triggers = [{"expect": ["x.y"]}]
    project.write({"name": "a"})
    project.sync()
    names = "bcdefgh"
    project.write(
        *({"name": each, "schedules": schedules, "triggers": triggers} for each in "a" + names), file="one.yaml"
    )
    project.write(
        *({"name": each, "schedules": schedules if same else [DAILY], "triggers": triggers} for each in "a" + names),
        file="two.yaml",
    )
    command = [sys.executable, "-m", "orchestration", "sync", "--prune"]
    both = [
        subprocess.Popen(
            [*command, file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_env(project)
        )
        for file in ("one.yaml", "two.yaml")
    ]
    said = [each.communicate(timeout=400)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], "\n".join(each[-1500:] for each in said)
    if same:
        assert project.run("plan", "--prune", "one.yaml")[0] == 0, said
    else:
        project.sync("--prune", "one.yaml")
    for each in "a" + names:
        assert len(project.there(each)["schedules"]) == 3
        related = project.api.get(f"/automations/related-to/prefect.deployment.{project.there(each)['id']}").json()
        assert len(related) == 1


def _env(project: Project) -> dict[str, str]:
    import os

    return os.environ | {"PREFECT_API_URL": str(project.api.base_url).rstrip("/"), "PYTHONPATH": str(ROOT)}


def synced_before(read: Callable[[Server], Awaitable[Any]], project: Project) -> AsyncMock:
    """What a look reads, the first time only after a sync that comes in between."""
    came: list[str] = []

    async def late(asked: Server) -> Any:
        if not came:
            came.append("a sync reads as well")
            await asyncio.to_thread(project.sync)
        return await read(asked)

    return AsyncMock(side_effect=late)


def test_a_sync_in_the_midst_of_a_look_is_no_drift(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write({"name": "a"})
    project.sync()
    project.write({"name": "a", "description": "Another"})
    late = synced_before(live_state.read_all, project)
    monkeypatch.setattr(live_state, "read_all", late)
    assert project.run("diff")[0] == 0
    assert late.await_count > 1


def test_a_first_sync_in_the_midst_of_a_look_is_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write({"name": "a"})
    late = synced_before(record.read_all, project)
    monkeypatch.setattr(record, "read_all", late)
    assert project.run("diff")[0] == 0
    assert late.await_count > 1


def test_drift_says_what_was_changed_and_when(project: Project) -> None:
    project.write({"name": "a", "schedules": [DAILY]}, {"name": "b"})
    project.sync()
    assert project.run("diff")[0] == 0
    made = project.there("a")
    project.api.patch(f"/deployments/{made['id']}", json={"description": "Other"}).raise_for_status()
    when = datetime.fromisoformat(project.there("a")["updated"])
    project.api.delete(f"/deployments/{project.there('b')['id']}").raise_for_status()
    status, said = project.run("diff")
    assert status == 2
    assert "Loads a day. -> Other" in said
    assert f"{when:%Y-%m-%d}" in said
    assert "(deleted" in said
    found = json.loads(project.run("diff", "--json")[1])["drift"]
    assert [each["action"] for each in found] == ["changed", "deleted"]
    # Pausing is the operators', no drift.
    project.sync()
    project.api.post(f"/deployments/{project.there('a')['id']}/pause_deployment").raise_for_status()
    assert project.run("diff")[0] == 0
    assert "has never synced" in project.run("diff", "--owner", "nobody")[1]


def test_the_server_decides_nothing_it_is_not_asked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """No API, one that fails, one that does not know us: an error each, and never read as an empty server."""
    project.write({"name": "a"})
    environment = _env(project)
    command = [sys.executable, "-m", "orchestration", "plan"]
    for url, reason in (
        (f"http://127.0.0.1:{free_port()}/api", "does not answer"),
        (environment["PREFECT_API_URL"].removesuffix("/api"), "no Prefect API"),
    ):
        done = subprocess.run(
            command, env=environment | {"PREFECT_API_URL": url}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stdout
        assert reason in done.stderr
        assert "Traceback" not in done.stderr


def test_pools_queues_and_types(project: Project) -> None:
    project.write({"name": "a", "work_pool": {"name": project.pool + "x"}})
    status, said = project.run("plan")
    assert status == 1
    assert f"Did you mean {project.pool}?" in said
    project.write({"name": "a", "work_pool": {"name": project.pool, "work_queue_name": "urgnt"}})
    assert "uses the queue urgnt" in project.run("plan")[1]
    project.write({"name": "a"})
    project.sync()
    project.write({"name": "a"}, work_pools=[{"name": project.pool, "type": "docker"}])
    status, said = project.run("sync")
    assert status == 1
    assert "is of type process, not docker" in said


def test_prefects_own_deploy_reads_the_same_file(project: Project) -> None:
    whole(project)
    project.sync()
    done = subprocess.run(
        [Path(sys.executable).with_name("prefect"), "--no-prompt", "deploy", "--all"],
        cwd=project.folder, env=_env(project), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    status, planned = project.run("plan", "--json")
    assert status == 2
    # Where the file gives no version, Prefect gives its flow's: a hash of flow.py. All else is as sync left it.
    hashed = md5((project.folder / "flow.py").read_bytes(), usedforsecurity=False).hexdigest()
    (change,) = json.loads(planned)["changes"]
    assert (change["action"], change["key"]) == ("change", f"etl/{project.own('b')}")
    assert change["fields"] == [{"field": "version", "old": hashed, "new": None}]
