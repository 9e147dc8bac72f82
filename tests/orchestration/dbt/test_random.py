"""Random graphs with random failures: every node ends as dbt's command line says."""

import os
import random
from pathlib import Path

import pytest
from prefect import flow

from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult
from orchestration.dbt.mirror import STATES
from tests.orchestration.dbt.projects import command_line, random_dag, tables
from tests.orchestration.dbt.task_runs import Server
from tests.parts import Query

GRAPHS = int(os.environ.get("RANDOM_GRAPHS", "2"))
"""More of them: `RANDOM_GRAPHS=50 make test TESTS=tests/orchestration/dbt/test_random.py`."""


@pytest.mark.parametrize("graph", range(GRAPHS))
def test_states_are_those_of_the_command_line(
    graph: int, tmp_path: Path, database: str, query: Query, server: Server
) -> None:
    seed = int(os.environ.get("RANDOM_SEED", random.SystemRandom().randrange(10**6)))
    again = f"the same graph again: RANDOM_SEED={seed}"
    chance = random.Random(seed)  # noqa: S311 - a graph, no secret
    folder = random_dag(tmp_path / "random", chance, nodes=chance.randrange(5, 40))
    _, expected = command_line(folder, "build", environment=warehouse.environment())
    expected_tables = tables(query)
    query("drop schema if exists analytics cascade")

    results: list[DbtResult] = []

    @flow
    def daily() -> None:
        results.append(DbtProject(folder, environment=warehouse.environment).build(check=False))

    run = server.run(daily(return_state=True))
    assert {node.id: node.status for node in results[0].nodes} == expected, again
    tasks = server.nodes(run, len(expected))
    states = {node: (task["state_type"], task["state_name"]) for node, task in tasks.items()}
    assert states == {node: STATES[status] for node, status in expected.items()}, again
    assert tables(query) == expected_tables, again
