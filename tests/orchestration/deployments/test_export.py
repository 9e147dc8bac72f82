"""A sync of an export changes nothing, for random files."""

import json
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.orchestration.deployments.conftest import Project
from tests.parts import examples

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)
ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
CRONS = st.builds("{} {} * * {}".format, st.integers(0, 59), st.integers(0, 23), st.sampled_from(["*", "1-5", "0"]))
RRULES = st.builds("FREQ=DAILY;BYHOUR={}".format, st.integers(0, 23))
KINDS = st.one_of(
    st.fixed_dictionaries({"cron": CRONS}, optional={"timezone": ZONES, "day_or": st.booleans()}),
    st.fixed_dictionaries({"interval": st.integers(60, 90000)}, optional={"timezone": ZONES}),
    st.fixed_dictionaries({"rrule": RRULES}, optional={"timezone": ZONES}),
)
SCHEDULES = st.builds(
    lambda kind, more: kind | more,
    KINDS,
    st.fixed_dictionaries(
        {"active": st.booleans()}, optional={"parameters": st.fixed_dictionaries({"day": st.integers(0, 9)})}
    ),
)
TRIGGERS = st.fixed_dictionaries(
    {"expect": st.lists(TEXT, min_size=1, max_size=2, unique=True)},
    optional={"parameters": st.fixed_dictionaries({"day": st.integers(0, 9)}), "enabled": st.booleans()},
)
DEPLOYMENTS = st.fixed_dictionaries(
    {},
    optional={
        "description": TEXT,
        "version": TEXT,
        "tags": st.lists(TEXT, max_size=3, unique=True),
        "parameters": st.fixed_dictionaries({}, optional={"day": st.integers(), "name": TEXT}),
        "enforce_parameter_schema": st.booleans(),
        "paused": st.booleans(),
        "concurrency_limit": st.integers(1, 9)
        | st.fixed_dictionaries(
            {"limit": st.integers(1, 9)}, optional={"collision_strategy": st.sampled_from(["ENQUEUE", "CANCEL_NEW"])}
        ),
        "schedules": st.lists(SCHEDULES, max_size=3, unique_by=str),
        "triggers": st.lists(TRIGGERS, max_size=2),
    },
)
FILES = st.fixed_dictionaries(
    {"deployments": st.lists(DEPLOYMENTS, min_size=4, max_size=8)},
    optional={
        "variables": st.lists(st.fixed_dictionaries({"value": JSON}), max_size=2),
        "remote_file_systems": st.lists(
            st.fixed_dictionaries(
                {"basepath": st.builds("s3://{}".format, TEXT)},
                optional={"settings": st.dictionaries(TEXT, JSON, max_size=2)},
            ),
            max_size=2,
        ),
        "concurrency_limits": st.lists(
            st.fixed_dictionaries({"limit": st.integers(0, 9), "active": st.booleans()}), max_size=2
        ),
        "tag_concurrency_limits": st.lists(st.fixed_dictionaries({"limit": st.integers(0, 9)}), max_size=2),
        "queues": st.lists(st.fixed_dictionaries({}, optional={"concurrency_limit": st.integers(0, 9)}), max_size=2),
    },
)


@given(file=FILES)
@settings(
    max_examples=examples(0.02),  # each sends requests to a server ten times
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_sync_of_an_export_changes_nothing(project: Project, file: dict[str, Any]) -> None:
    named: dict[str, Any] = {}
    for kind in ("variables", "remote_file_systems", "concurrency_limits", "tag_concurrency_limits"):
        key = "tag" if kind == "tag_concurrency_limits" else "name"
        named[kind] = [entry | {key: project.unique(f"n{n}")} for n, entry in enumerate(file.get(kind, []))]
    queues = [entry | {"name": f"q{n}"} for n, entry in enumerate(file.get("queues", []))]
    named["work_pools"] = [{"name": project.pool, "type": "process", "queues": queues}]
    deployments = [entry | {"name": f"d{n}"} for n, entry in enumerate(file["deployments"])]
    project.write(*deployments, **named)
    project.sync("--prune")
    status, output = project.run("export", "--owner", project.owner, "--mine", "--output", "exported.yaml")
    assert status == 0, output
    status, output = project.run("plan", "--prune", "exported.yaml")
    assert status == 0, output
    project.prepare("--prune", "exported.yaml")


FILLED = "{{ $HOME }}"
CRON = {"schedule": {"cron": "0 6 * * *", "timezone": "UTC"}, "active": True}


def test_export_of_what_other_programs_made_is_a_valid_file_without_changes(project: Project) -> None:
    """What a file cannot express is left out with the reason."""
    project.write({"name": "a"})
    project.sync()
    synced = project.existing("a")

    def add(path: str, name: str, **fields: Any) -> str:
        answer = project.api.post(path, json={"name": project.unique(name), **fields})
        return str(answer.raise_for_status().json()["id"])

    def deployment(name: str, **fields: Any) -> str:
        same = {"entrypoint": "flow.py:etl", "work_pool_name": project.pool, "description": "Loads a day."}
        same |= {key: synced[key] for key in ("flow_id", "parameter_openapi_schema")}
        return add("/deployments/", name, **same, **fields)

    def trigger(of: str, name: str, text: str, **action: Any) -> None:
        event = {"type": "event", "expect": ["a.b"], "posture": "Reactive", "threshold": 1, "within": 0}
        run = {"type": "run-deployment", "source": "selected", "deployment_id": of, **action}
        add("/automations/", name, trigger=event, actions=[run], description=text)

    left_out = {
        f"variable {project.unique('filled').replace('-', '_')}": "has a placeholder in its value",
        f"work-pool {project.unique('filled')}": "has a placeholder in its base_job_template",
        f"deployment etl/{project.unique('pull')}": "has a placeholder in its pull",
        f"deployment etl/{project.unique('context')}": "has a placeholder in its schedules",
        f"deployment etl/{project.unique('fired')}": "has a placeholder in its triggers",
        f"deployment etl/{project.unique('over')}": "has a schedule that a sync refuses: rrule",
    }
    project.api.post(
        "/variables/", json={"name": project.unique("filled").replace("-", "_"), "value": {"a": FILLED}}
    ).raise_for_status()
    variables = {"type": "object", "properties": {"a": {"type": "string", "default": FILLED}}}
    template = {"job_configuration": {"a": "{{ a }}"}, "variables": variables}
    add("/work_pools/", "filled", type="process", base_job_template=template)
    deployment("pull", pull_steps=[{"step": {"directory": FILLED}}])
    deployment("context", schedules=[CRON | {"parameters": {"name": "{{ ctx.flow_run.name }}"}}])
    deployment("over", schedules=[{"schedule": {"rrule": "FREQ=DAILY;UNTIL=20200101T000000", "timezone": "UTC"}}])
    trigger(deployment("fired"), "on", FILLED)
    trigger(deployment("kept", tags=["b", "a", "b"]), "at", "At a.b", parameters={"name": "{{ event.name }}"})
    event = {"type": "event", "expect": ["a.b"], "posture": "Reactive", "threshold": 1, "within": 0}
    add("/automations/", "quiet", trigger=event, actions=[], actions_on_trigger=[{"type": "do-nothing"}])
    status, output = project.run("export", "--output", "exported.yaml")
    assert status == 0, output
    for name, reason in left_out.items():
        assert f"Left out: {name} {reason}" in output
    exported = yaml.safe_load((project.folder / "exported.yaml").read_text())
    # Other tests leave objects without an owner on the server.
    for kind in [key for key in exported if isinstance(exported[key], list)]:
        exported[kind] = [entry for entry in exported[kind] if project.owner in str(entry.get("name"))]
    (project.folder / "exported.yaml").write_text(yaml.safe_dump(exported))
    status, output = project.run("plan", "--adopt", "--json", "exported.yaml")
    found = {change["key"]: (change["action"], change["fields"]) for change in json.loads(output)["changes"]}
    assert found == {f"etl/{project.unique('kept')}": ("adopt", []), project.unique("quiet"): ("adopt", [])}


@pytest.mark.further
def test_schedule_that_a_deployment_has_twice_is_exported_once(project: Project) -> None:
    project.write({"name": "a", "schedules": [{"cron": "0 6 * * *"}]})
    project.sync()
    path = f"/deployments/{project.existing('a')['id']}/schedules"
    project.api.post(path, json=[CRON]).raise_for_status()
    status, output = project.run("export", "--mine", "--output", "exported.yaml")
    assert status == 0, output
    project.sync("exported.yaml")
    assert len(project.existing("a")["schedules"]) == 1


def test_export_leaves_out_and_counts_objects_of_other_owners(project: Project) -> None:
    other = f"other-{project.owner}"
    project.write({"name": "a"})
    project.sync()
    project.write({"name": "theirs"}, file="other.yaml", name=other, work_pools=[])
    project.sync("other.yaml")
    status, output = project.run("export")
    assert status == 0
    assert f"name: {project.owner}\n" in output
    assert project.unique("a") in output
    assert project.unique("theirs") not in output
    assert f"Left out: 1 of {other}. Export them by --owner '{other}'" in output
