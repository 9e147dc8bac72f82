"""A part of the contract with each version of dbt that is tested; the others than the locked have their environments.

`TEST_DBT=1.10 pytest tests/orchestration/dbt` runs all tests of this folder with another version.
"""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from prefect import flow

from orchestration.dbt.mirror import STATES
from orchestration.dbt.result import FAILED
from orchestration.settings import ROOT
from tests.orchestration.dbt import versions
from tests.orchestration.dbt.conftest import use
from tests.orchestration.dbt.projects import FUNCTIONS, replace, without_functions
from tests.orchestration.dbt.task_runs import Server, results_of
from tests.parts import wait_until

OTHERS = [version for version in versions.VERSIONS if version != ".".join(map(str, versions.minor()))]


def test_newest_tested_dbt_is_the_locked_one_and_the_docs_list_each() -> None:
    locked = {each["name"]: each["version"] for each in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
    newest = max(versions.VERSIONS, key=lambda version: int(version.split(".")[1]))
    assert versions.VERSIONS[newest] == tuple(f"{name}=={locked[name]}" for name in ("dbt-core", "dbt-postgres"))
    listed = re.findall(r"^\| (1\.\d+\.\d+) \| ([\d.]+) \|", (ROOT / "docs/dbt.md").read_text(), flags=re.M)
    tested = {tuple(each.partition("==")[2] for each in requirements) for requirements in versions.VERSIONS.values()}
    assert set(listed) == tested


@pytest.mark.parametrize("version", versions.VERSIONS)
def test_every_status_of_dbt_has_a_state(version: str) -> None:
    code = "from dbt.artifacts.schemas.results import NodeStatus; print(*NodeStatus, sep='\\n')"
    listed = subprocess.run([versions.python_of(version), "-c", code], capture_output=True, text=True, check=True)
    statuses = set(listed.stdout.splitlines())
    assert set(FAILED) <= statuses <= STATES.keys()


@pytest.mark.parametrize("version", OTHERS)
def test_states_are_those_of_another_dbt(version: str, shop: Path, server: Server) -> None:
    """Of every kind of node that the version has."""
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
    # The corrected test has another id, as that has its values in it.
    left = {node for node, status in first.items() if status in ("fail", "skipped")} - {failure}
    assert left < {node for node in second if not node.startswith("operation.")}
    assert state.is_completed(), state.message
    expected = {node: STATES["fail" if status == "fail" else "reused"] for node, status in first.items()}
    expected |= {node: STATES[status] for node, status in second.items()}

    def as_expected() -> bool:
        # All had ended in the first attempt: the server writes down what came later a moment later.
        tasks = server.nodes(server.run(state), len(expected))
        return {node: (task["state_type"], task["state_name"]) for node, task in tasks.items()} == expected

    wait_until(as_expected, f"the states {expected}", 240)
