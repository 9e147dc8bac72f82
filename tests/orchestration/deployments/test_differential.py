"""`orchestrate sync` leaves the same deployments as `prefect deploy`, or refuses the file with its line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from orchestration.__main__ import main
from tests.orchestration.deployments import corpus
from tests.orchestration.deployments.corpus import CORPUS
from tests.orchestration.deployments.differential import Sides, deploying, differences
from tests.parts import client_of, examples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the flows that the corpus names."""
    made = tmp_path_factory.mktemp("corpus")
    (made / "flow.py").write_text(corpus.FLOWS)
    (made / "late.py").write_text(corpus.LATE)
    for name in ("pack/__init__.py", "pack/jobs.py", "my flows/a b.py"):
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text("" if name.endswith("__init__.py") else corpus.PACKAGE)
    return made


@pytest.fixture(scope="module")
def deployer(folder: Path, prefect_server: str) -> Iterator[subprocess.Popen[str]]:
    with deploying(prefect_server, folder) as process:
        yield process


@pytest.fixture
def sides(
    folder: Path,
    prefect_server: str,
    deployer: subprocess.Popen[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Sides]:
    owner = f"c{uuid4().hex[:8]}"
    with client_of(prefect_server) as api:
        variables = corpus.ENVIRONMENT | {"THE_POOL": f"pool-{owner}", "QUEUE": "urgent", "MODULE": "etl"}
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        made = Sides(folder, api, capsys, owner, deployer, variables)
        made.make_pool()
        for name, value in corpus.VARIABLES.items():
            api.post("/variables/", json={"name": f"{owner}_{name}", "value": value}).raise_for_status()
        yield made
        made.clear()
        write(made, "")
        assert made.run("sync", "--prune")[0] == 0  # leaves an empty record


def write(sides: Sides, text: str) -> None:
    """Write a case as prefect.yaml, with the owner, pool and variables of this test."""
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    end = "\r\n" if "\r\n" in text else "\n"
    text = text.removeprefix("\ufeff").replace("POOL", sides.pool).replace("VAR_", f"{sides.owner}_")
    start, text = ("---" + end, text.removeprefix("---" + end)) if text.startswith("---") else ("", text)
    whole = f"{mark}{start}name: {sides.owner}{end}{text}".replace(f"THE_{sides.pool}", "THE_POOL")
    (sides.folder / "prefect.yaml").write_bytes(whole.encode())


def check_same_state(sides: Sides) -> None:
    """Deploy and sync the file: both leave the same state, and neither a plan nor an export of it has changes."""
    failed, expected = sides.deploy()
    assert not failed, failed
    assert expected
    sides.clear()
    failed, found = sides.sync("--prune")
    assert not failed, failed
    versioned = {name for name, deployment in found.items() if deployment["version"]}
    for name, deployment in expected.items():
        if name not in versioned:  # Prefect sets a hash of the flow's file
            deployment["version"] = None
    assert list(differences(expected, found)) == []
    status, output = sides.run("plan", "--prune")
    assert status == 0, output
    status, output = sides.run("export", "--owner", sides.owner, "--mine", "--output", "exported.yaml")
    assert status == 0, output
    status, output = sides.run("plan", "--prune", "exported.yaml")
    assert status == 0, output
    sides.clear()


SAME = [name for name in CORPUS if name not in {*corpus.REFUSED, *corpus.REFUSED_BY_PLAN, *corpus.BEYOND}]


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.further)])
def test_sync_of_the_corpus_leaves_the_same_state_as_prefect_deploy(sides: Sides, every: int) -> None:
    together, others = corpus.combine(SAME, every)
    # With all that an editor may add to a file: a byte order mark, a document marker and carriage returns.
    write(sides, ("\ufeff---\n" + together).replace("\n", "\r\n"))
    check_same_state(sides)
    for file in others:
        write(sides, file)
        check_same_state(sides)


@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.further)])
def test_refusal_names_the_line_and_changes_nothing(sides: Sides, every: int) -> None:
    for name, message in list(corpus.REFUSED.items())[::every]:
        write(sides, CORPUS[name])
        status, printed = sides.run("sync")
        assert (name, status) == (name, 1)
        assert f"prefect.yaml{message}" in printed, name
        assert printed.count("\n") == 1, "one message, and no part of a plan"
    for name, message in list(corpus.REFUSED_BY_PLAN.items())[::every]:
        write(sides, CORPUS[name])
        status, printed = sides.run("sync")
        assert (name, status) == (name, 1)
        assert message.replace("POOL", sides.pool) in printed, name
        assert "(create)" not in printed
    assert sides.state() == {}


@pytest.mark.further
def test_file_that_only_prefect_deploy_refuses_is_synced(sides: Sides) -> None:
    together, others = corpus.combine(sorted(corpus.BEYOND))
    for file in (together, *others):
        write(sides, file)
        failed, _ = sides.sync("--prune")
        assert not failed, f"{failed} of {file}"
        assert sides.run("plan")[0] == 0, file


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=8)
FILLED = st.sampled_from(
    [
        "{{ $A_TEXT }}",
        "a{{$A_NUMBER}}b",
        "{{ prefect.variables.VAR_text }}",
        "x {{ prefect.variables.VAR_number }}",
        "{{ a | b }}",
    ]
) | TEXT.filter(lambda text: "{{" not in text)
MOMENT, ZONE = datetime(2020, 1, 1, tzinfo=None), timezone(timedelta(hours=5, minutes=30))
ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York"])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from([f"{{{{ prefect.variables.VAR_{name} }}}}" for name in ("mapping", "filled", "list")])
    | FILLED,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(FILLED, inner, max_size=2),
    max_leaves=4,
)
SCHEDULES = st.builds(
    lambda kind, more: kind | more,
    st.builds(lambda minute, hour: {"cron": f"{minute} {hour} * * *"}, st.integers(0, 59), st.integers(0, 23))
    | st.builds(
        lambda interval, anchor: {"interval": interval, "anchor_date": anchor},
        st.integers(1, 10**6) | st.sampled_from(["PT90M", "01:30:00", 0.5]),
        st.datetimes(MOMENT, MOMENT + timedelta(days=3650), timezones=st.sampled_from([None, ZONE])).map(str),
    )
    | st.sampled_from([{"rrule": "FREQ=DAILY;BYHOUR=3"}, {"rrule": "FREQ=WEEKLY;BYDAY=MO"}]),
    st.fixed_dictionaries(
        {},
        optional={
            "timezone": ZONES,
            "active": st.booleans(),
            "parameters": st.fixed_dictionaries({}, optional={"extra": JSON}),
        },
    ),
)
TRIGGERS = st.fixed_dictionaries(
    {"expect": st.lists(FILLED, min_size=1, max_size=2, unique=True)},
    optional={
        "enabled": st.booleans() | st.sampled_from(["{{ $A_TRUTH }}", "{{ prefect.variables.VAR_truth }}"]),
        "posture": st.just("Reactive"),
        "threshold": st.integers(1, 9),
        "match": st.dictionaries(FILLED, FILLED, max_size=2),
        "parameters": st.fixed_dictionaries({}, optional={"extra": JSON, "source": st.just("{{ event.name }}")}),
        "description": FILLED,
    },
)
DEPLOYMENTS = st.fixed_dictionaries(
    {},
    optional={
        "description": FILLED,
        "version": FILLED,
        "tags": st.lists(FILLED | st.integers(0, 9), max_size=3, unique=True),
        "parameters": st.fixed_dictionaries(
            {},
            optional={
                "source": FILLED,
                "day": st.integers() | st.just("{{ prefect.variables.VAR_number }}"),
                "rate": st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
                "on": st.booleans(),
                "extra": JSON,
            },
        ),
        "enforce_parameter_schema": st.booleans(),
        "paused": st.booleans(),
        "concurrency_limit": st.none()
        | st.integers(1, 9)
        | st.fixed_dictionaries(
            {"limit": st.integers(1, 9), "collision_strategy": st.sampled_from(["ENQUEUE", "CANCEL_NEW"])},
            optional={"grace_period_seconds": st.integers(60, 86400)},
        ),
        "schedules": st.lists(SCHEDULES, max_size=3, unique_by=str),
        "triggers": st.lists(TRIGGERS, max_size=2),
        "work_pool": st.fixed_dictionaries(
            {"name": st.just("POOL")},
            optional={
                "work_queue_name": st.sampled_from(["default", "urgent"]),
                "job_variables": st.fixed_dictionaries({}, optional={"cpu": st.integers(0, 9), "env": JSON}),
            },
        ),
    },
)


@given(
    deployments=st.lists(DEPLOYMENTS, min_size=3, max_size=5),
    pull=st.none()
    | st.just([])
    | st.just([{"prefect.deployments.steps.set_working_directory": {"directory": "/{{ $A_TEXT }}"}}]),
)
@settings(
    max_examples=examples(0.02),  # each deploys, syncs and exports
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_sync_of_a_random_file_leaves_the_same_state_as_prefect_deploy(
    sides: Sides, deployments: list[dict[str, Any]], pull: list[dict[str, Any]] | None
) -> None:
    named = [
        {"name": f"g{number}", "entrypoint": "flow.py:etl", "work_pool": {"name": "POOL"}} | entry
        for number, entry in enumerate(deployments)
    ]
    document = {"deployments": named} | ({} if pull is None else {"pull": pull})
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    write(sides, text)
    status, output = sides.run("check")
    if status:  # The sync refuses the file with its line, even if Prefect accepts it.
        assert output.startswith("prefect.yaml:"), output
        return
    check_same_state(sides)


DEPLOYS = """
import sys
from flow import named
from prefect.flows import Flow

name, pool, folder = sys.argv[1:]
more = {"work_pool_name": pool, "print_next_steps": False, "ignore_warnings": True}
named.deploy(f"{name}-image", image="x", build=False, push=False, cron="0 1 * * *", tags=["b", "a"], **more)
remote = Flow.from_source(source=folder, entrypoint="flow.py:etl")
remote.deploy(f"{name}-source", interval=60, parameters={"day": 3}, concurrency_limit=2, **more)
named.to_deployment(f"{name}-served", cron="0 2 * * *").apply()
named.to_deployment(f"{name}-placeholder", description="{{ $A_TEXT }}", work_pool_name=pool).apply()
"""


@pytest.mark.further
def test_export_of_deployments_made_in_python_needs_no_change(sides: Sides) -> None:
    name = sides.owner
    (sides.folder / "deploys.py").write_text(DEPLOYS)
    command = [sys.executable, "deploys.py", name, sides.pool, str(sides.folder)]
    url = str(sides.api.base_url).rstrip("/")
    subprocess.run(
        command, cwd=sides.folder, env=os.environ | {"PREFECT_API_URL": url}, check=True, capture_output=True
    )
    status, output = sides.run("export", "--owner", name)
    assert status == 0, output
    assert f"Left out: deployment Named flow/{name}-served has no work pool: the process that serves its flow" in output
    assert f"Left out: deployment Named flow/{name}-placeholder has a placeholder in its description" in output
    document = yaml.safe_load(output.partition("Left out")[0])
    # Other tests leave objects without an owner on the server.
    document["deployments"] = [entry for entry in document["deployments"] if name in entry["name"]]
    assert len(document["deployments"]) == 2
    (sides.folder / "prefect.yaml").write_text(yaml.safe_dump({key: document[key] for key in ("name", "deployments")}))
    status, output = sides.run("plan", "--adopt", "--json")
    found = json.loads(output)["changes"]
    assert [(change["action"], change["fields"]) for change in found] == [("adopt", []), ("adopt", [])]
    for deployment in sides.api.post("/deployments/filter", json={"deployments": {"name": {"like_": name}}}).json():
        sides.api.delete(f"/deployments/{deployment['id']}").raise_for_status()


@pytest.mark.parametrize("command", ["plan", "sync", "check"])
def test_unreadable_file_is_refused_without_a_traceback(
    folder: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    files = {
        "utf-16.yaml": "name: x\n".encode("utf-16"),
        "bytes.yaml": b"name: \xff\xfe\n",
        "tab.yaml": b"name: x\n\tdeployments: []\n",
        "two.yaml": b"name: x\n---\nname: y\n",
        "directive.yaml": b"%YAML 9.9\n---\nname: x\n",
        "control.yaml": b"name: \x07\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        assert main([command, name]) == 1
        assert name in capsys.readouterr().err
    assert main([command, str(folder / "pack")]) == 1
    assert "cannot be read" in capsys.readouterr().err
