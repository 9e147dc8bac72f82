"""The work pool of the tests of `orchestrate why` and `orchestrate runs`."""

from collections.abc import Iterator

import pytest

from tests.orchestration.inspection.work_pool import WorkPool
from tests.parts import client_of


@pytest.fixture
def pool(prefect_server: str) -> Iterator[WorkPool]:
    with client_of(prefect_server) as api:
        yield WorkPool(api)
