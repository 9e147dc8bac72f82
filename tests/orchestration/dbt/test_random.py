"""Random graphs with random failures: each node ends as on dbt's command line."""

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

GRAPHS = 50 if LONG else 1
"""Random graphs, in addition to one that is the same each time."""


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


def test_fixed_graph_has_all_outcomes(tmp_path: Path, database: str, query: Query, server: Server, tiny: Tiny) -> None:
    folder = random_dag(tmp_path / "random", random.Random(3), nodes=40)  # noqa: S311 - the same each time
    outcomes = _assert_as_on_the_command_line(folder, query, server, tiny)
    assert outcomes == {"success", "error", "skipped", "pass", "fail", "warn"}


@pytest.mark.parametrize("graph", range(GRAPHS))
def test_random_graph_ends_as_on_the_command_line(
    graph: int, tmp_path: Path, database: str, query: Query, server: Server, tiny: Tiny
) -> None:
    """`RANDOM_SEED` repeats a graph; the folder's name has the seed."""
    seed = random_seed()
    chance = random.Random(seed)  # noqa: S311 - a graph, no secret
    folder = random_dag(tmp_path / f"seed_{seed}", chance, nodes=chance.randrange(5, 40))
    try:
        _assert_as_on_the_command_line(folder, query, server, tiny)
    except AssertionError as error:
        error.add_note(f"the same graph again: RANDOM_SEED={seed}")
        raise
