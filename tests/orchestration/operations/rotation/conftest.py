"""The Kubernetes API server that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.cluster import apiserver


@pytest.fixture(scope="package")
def kubernetes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[apiserver.ApiServer]:
    """Run an API server without nodes. `installed` clears it for the next installation."""
    with apiserver.alone(tmp_path_factory.mktemp("kubernetes")) as api:
        yield api
