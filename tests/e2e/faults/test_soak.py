"""Two minutes of random faults lose no run, double none and leave nothing; `make test-long FOR=soak` takes longer."""

import random

import pytest

from tests.cluster.namespace import proxied
from tests.e2e.release import Object, Pool, Release, pool_values
from tests.long.soak import Soak, soaked

MINUTES, RUNS = 2, 15


@pytest.fixture(scope="module")
def server(own_server: Release) -> Release:
    return own_server


@pytest.fixture(scope="module")
def values(image: str) -> Object:
    return soaked(pool_values(image))


def test_random_faults_lose_no_run_and_double_none(
    server: Release, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(10**6)  # noqa: S311 - faults, no secret
    with proxied(pool.namespace.context) as kubernetes:
        seen = Soak(server, pool, kubernetes, random.Random(seed)).make(MINUTES, RUNS)  # noqa: S311
    assert seen.wrong == [], f"seed {seed}\n{capsys.readouterr().out}"
    assert len(seen.runs) == RUNS
    assert len(seen.faults) >= 4
    assert sum(map(len, seen.executions.values())) > RUNS, "nothing was hit"
