"""A sync that is killed at a random time and repeated leaves the state of an undisturbed sync, and loses no run."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.long.sync_kills import Project, connect, run_rounds
from tests.parts import random_seed

pytestmark = pytest.mark.further

KILLS = 1
"""The seed's kill comes while the sync changes the server. `make test-long FOR=sync-kills` kills more often."""


@pytest.fixture
def project(tmp_path: Path, prefect_server: str) -> Iterator[Project]:
    with connect(prefect_server) as api:
        made = Project(tmp_path, api)
        yield made
        # Schedules of every few seconds would keep the server busy that all tests share.
        (tmp_path / "nothing.yaml").write_text("name: kills\n")
        made.run("sync", "nothing")


def test_sync_after_a_kill_leaves_the_same_state(project: Project) -> None:
    seed = random_seed()
    _, outcomes = run_rounds(project, KILLS, random.Random(seed))  # noqa: S311 - no secret
    assert [outcome.wrong for outcome in outcomes if outcome.wrong] == [], f"seed {seed}"
    assert sum(not outcome.ended for outcome in outcomes) == KILLS
