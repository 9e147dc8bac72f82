"""Random graphs with random failures: each node ends as on dbt's command line."""

import os
import random
from pathlib import Path

import pytest
from prefect import flow

from orchestration import warehouse
from orchestration.dbt import DbtResult
from orchestration.dbt.mirror import STATES
from tests.orchestration.dbt.conftest import LONG, Tiny, use
from tests.orchestration.dbt.projects import command_line, random_dag, tables
from tests.orchestration.dbt.task_runs import Server
from tests.parts import Query, random_seed

SEEDS = [3, *(random_seed() for _ in range(50 if LONG else "RANDOM_SEED" in os.environ))]
"""Seeds of the graphs. The first graph is the same each time, and the only one in CI. `RANDOM_SEED` adds one."""


def _assert_as_on_the_command_line(folder: Path, query: Query, server: Server, tiny: Tiny) -> set[str]:
    """Build the project in both ways and compare; return dbt's statuses."""
    _, expected = command_line(folder, "build", environment=warehouse.environment(), dbt=tiny.dbt)
    expected_tables = tables(query)
    query("drop schema if exists analytics cascade")

    results: list[DbtResult] = []

    @flow
    def daily() -> None:
        results.append(use(folder).build(check=False))

    run = server.run(daily(return_state=True))
    assert {node.id: node.status for node in results[0].nodes} == expected
    tasks = server.nodes(run, len(expected))
    states = {node: (task["state_type"], task["state_name"]) for node, task in tasks.items()}
    assert states == {node: STATES[status] for node, status in expected.items()}
    assert tables(query) == expected_tables
    return set(expected.values())


@pytest.mark.parametrize("graph", range(len(SEEDS)))
def test_graph_ends_as_on_the_command_line(
    graph: int, tmp_path: Path, database: str, query: Query, server: Server, tiny: Tiny
) -> None:
    """The first graph has all outcomes. `RANDOM_SEED` repeats another; the folder's name has the seed."""
    seed = SEEDS[graph]
    chance = random.Random(seed)  # noqa: S311 - a graph, no secret
    folder = random_dag(tmp_path / f"seed_{seed}", chance, nodes=chance.randrange(5, 40) if graph else 40)
    try:
        outcomes = _assert_as_on_the_command_line(folder, query, server, tiny)
    except AssertionError as error:
        error.add_note(f"the same graph again: RANDOM_SEED={seed}")
        raise
    if graph == 0:
        assert outcomes == {"success", "error", "skipped", "pass", "fail", "warn"}
