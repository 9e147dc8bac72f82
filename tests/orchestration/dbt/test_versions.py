"""Another version of dbt than the flow's own environment has, in an environment of its own."""

import json
import shutil
from pathlib import Path

import pytest
from prefect import flow

from orchestration.dbt.mirror import STATES
from tests.interpreters import interpreter
from tests.orchestration.dbt.conftest import use
from tests.orchestration.dbt.projects import replace
from tests.orchestration.dbt.task_runs import Server, results_of
from tests.parts import wait_until

DBT = ("dbt-core==1.10.23", "dbt-postgres==1.10.2")


@pytest.fixture(scope="module")
def older() -> Path:
    """The interpreter of an environment with dbt 1.10."""
    return interpreter(DBT[0], DBT)


def test_states_are_those_of_an_older_dbt(older: Path, shop: Path, server: Server) -> None:
    """Of every kind of node that it knows; functions came with 1.11."""
    shutil.rmtree(shop / "functions")
    (shop / "models" / "doubled_amounts.sql").unlink()
    replace(shop, "models/models.yml", "values: [gold, silver]", "values: [gold]")
    failure = "test.shop.accepted_values_clean_customers_tier__gold.332332f11b"
    project = use(shop, python=older)
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
    assert written["metadata"]["dbt_version"] == "1.10.23"
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
