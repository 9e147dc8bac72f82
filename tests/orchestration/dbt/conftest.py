"""A project with every kind of node, and what the server has of its runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration import warehouse
from orchestration.dbt import DbtProject
from tests.orchestration.dbt.projects import every_kind
from tests.orchestration.dbt.task_runs import Server
from tests.parts import client_of


@pytest.fixture
def server(prefect_server: str) -> Iterator[Server]:
    """What the session's Prefect server has."""
    with client_of(prefect_server) as client:
        yield Server(client)


@pytest.fixture
def shop(tmp_path: Path, database: str) -> Path:
    """A project with every kind of node."""
    return every_kind(tmp_path / "shop")


@pytest.fixture
def project(shop: Path) -> Iterator[DbtProject]:
    """That project as flows use it."""
    project = DbtProject(shop, environment=warehouse.environment, artifacts=f"{shop}.kept")
    yield project
    project.close()
