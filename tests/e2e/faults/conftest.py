"""A server and a pool whose runs are victims of faults, watched by a reconciler."""

from collections.abc import Iterator

import pytest

from tests.e2e.faults.victims import FLOWS, TOOK, watched
from tests.e2e.release import Object, probe_of


@pytest.fixture(autouse=True)
def _took(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the test says of how soon it was goes into its report."""
    TOOK.clear()
    yield
    request.node.user_properties.extend(("took", each) for each in TOOK)


@pytest.fixture(scope="module")
def probe() -> Object:
    return probe_of(FLOWS)


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    made = watched(values)
    # A victim may want a Secret that is not there.
    made["runs"]["variables"] = {"secret": {"type": "string", "default": "prefect-server-auth"}}
    secret = {"name": '{{ "{{ secret }}" }}', "key": "auth-string"}
    made["runs"]["env"] = [{"name": "SECRET", "valueFrom": {"secretKeyRef": secret}}]
    made["reconciler"]["pendingTimeoutSeconds"] = 45
    return made
