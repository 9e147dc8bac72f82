"""A real Prefect server with access control for all tests of the folder."""

from collections.abc import Iterator

import pytest

from tests.orchestration.access.guarded_server import GuardedServer, guarded_server
from tests.server_schema import server_database


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    with server_database() as database, guarded_server(tmp_path_factory.mktemp("guarded"), **database) as server:
        yield server
