"""A real Prefect server with access control for all tests of the folder."""

from collections.abc import Iterator

import pytest

from tests.orchestration.access.guarded_server import GuardedServer, guarded_server


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    with guarded_server(tmp_path_factory.mktemp("guarded")) as server:
        yield server
