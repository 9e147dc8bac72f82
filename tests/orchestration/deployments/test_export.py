"""A sync of an export changes nothing, for random files."""

from typing import Any

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
    {"deployments": st.lists(DEPLOYMENTS, min_size=2, max_size=5)},
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
    max_examples=examples(0.05),  # each sends requests to a server ten times
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
    project.sync("--prune", "exported.yaml")


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
