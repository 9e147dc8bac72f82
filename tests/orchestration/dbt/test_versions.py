"""A part of the contract with each tested version of dbt. All but the locked version have separate environments.

`FURTHER_CASES=1 TEST_DBT=1.10 pytest tests/orchestration/dbt` runs all tests of this folder with another version.
"""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from prefect import flow

from orchestration.dbt import DbtResult
from orchestration.dbt.mirror import STATES, UNKNOWN_STATE
from orchestration.dbt.result import FAILED, REUSED, SKIPPED, SUCCEEDED
from orchestration.settings import ROOT
from tests.orchestration.dbt import versions
from tests.orchestration.dbt.conftest import Tiny, use
from tests.orchestration.dbt.projects import FUNCTIONS, replace, without_functions
from tests.orchestration.dbt.task_runs import Server, results_of
from tests.parts import wait_until

VERSIONS = [
    pytest.param(version, marks=pytest.mark.further if version == "1.11" else ()) for version in versions.VERSIONS
]
"""The tested versions. `make test` has the oldest and the locked one, so that it makes no environment of the other."""


def test_docs_list_each_tested_dbt_and_the_newest_is_locked() -> None:
    locked = {
        package["name"]: package["version"] for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    }
    newest = max(versions.VERSIONS, key=lambda version: int(version.split(".")[1]))
    assert versions.VERSIONS[newest] == tuple(f"{name}=={locked[name]}" for name in ("dbt-core", "dbt-postgres"))
    listed = re.findall(r"^\| (1\.\d+\.\d+) \| ([\d.]+) \|", (ROOT / "docs/dbt.md").read_text(), flags=re.M)
    tested = {
        tuple(requirement.partition("==")[2] for requirement in requirements)
        for requirements in versions.VERSIONS.values()
    }
    assert set(listed) == tested


@pytest.mark.parametrize("version", VERSIONS)
def test_every_status_of_dbt_has_a_state(version: str) -> None:
    code = "from dbt.artifacts.schemas.results import NodeStatus; print(*NodeStatus, sep='\\n')"
    listed = subprocess.run([versions.python_of(version), "-c", code], capture_output=True, text=True, check=True)
    statuses = set(listed.stdout.splitlines())
    assert set(FAILED) <= statuses <= STATES.keys()
    assert {*SUCCEEDED, *FAILED, SKIPPED, REUSED} == STATES.keys()


def test_unknown_status_is_neither_failed_nor_done(folder: Path, tmp_path: Path, tiny: Tiny, server: Server) -> None:
    """The next attempt runs the node again. A filter of the child's output simulates a later dbt."""
    python = tmp_path / "later-dbt"
    as_later = r's/("id": "model.small.three", "status": )"success"/\1"postponed"/'
    python.write_text(f"#!/bin/sh\n'{tiny.python}' \"$@\" | sed --unbuffered --regexp-extended '{as_later}'\n")
    python.chmod(0o755)
    project = use(folder, python=python)
    results: list[DbtResult] = []

    @flow(retries=1)
    def daily() -> None:
        results.append(project.build())
        assert len(results) == 2

    state = daily(return_state=True)
    assert state.is_completed(), state.message
    statuses = [{node.name: node.status for node in result.nodes} for result in results]
    assert statuses == [
        {"one": "success", "two": "success", "three": "postponed"},
        {"one": "reused", "two": "reused", "three": "postponed"},
    ]
    assert [node.name for node in results[1].unknown] == ["three"]
    task = server.nodes(server.run(state), 3)["model.small.three"]
    assert (task["state_type"], task["state_name"]) == UNKNOWN_STATE == ("CANCELLED", "Unknown")
    assert task["state"]["message"].startswith("dbt reports the status 'postponed', which is unknown here.")


@pytest.mark.further
@pytest.mark.parametrize(
    "version", [case for case in VERSIONS if case.values != (".".join(map(str, versions.minor())),)]
)
def test_another_dbt_has_the_same_states(version: str, shop: Path, server: Server) -> None:
    """For every kind of node that the version has."""
    if version == "1.10" and FUNCTIONS:
        without_functions(shop)
    replace(shop, "models/models.yml", "values: [gold, silver]", "values: [gold]")
    failure = "test.shop.accepted_values_clean_customers_tier__gold.332332f11b"
    project = use(shop, python=versions.python_of(version))
    attempts: list[dict[str, str]] = []

    @flow(retries=1)
    def daily() -> None:
        try:
            project.build()
        finally:
            attempts.append(results_of(shop))
            if len(attempts) == 1:
                replace(shop, "models/models.yml", "values: [gold]", "values: [gold, silver]")

    state = daily(return_state=True)
    written = json.loads((shop / "target" / "run_results.json").read_text())
    assert f"dbt-core=={written['metadata']['dbt_version']}" in versions.VERSIONS[version]
    first, second = attempts
    assert first[failure] == "fail"
    # The corrected test has another id, because the id contains the values.
    left = {node for node, status in first.items() if status in ("fail", "skipped")} - {failure}
    assert left < {node for node in second if not node.startswith("operation.")}
    assert state.is_completed(), state.message
    expected = {node: STATES["fail" if status == "fail" else "reused"] for node, status in first.items()}
    expected |= {node: STATES[status] for node, status in second.items()}

    def as_expected() -> bool:
        # All task runs ended in the first attempt. The server records their new states with a delay.
        tasks = server.nodes(server.run(state), len(expected))
        return {node: (task["state_type"], task["state_name"]) for node, task in tasks.items()} == expected

    wait_until(as_expected, f"the states {expected}", 240)
