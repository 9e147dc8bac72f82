"""A sync that is killed at a random moment and run again leaves what an undisturbed one leaves, and no run is lost."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.long.sync_kills import Project, connect, run_rounds

KILLS = 2
"""`make test-long FOR=sync-kills` makes more."""


@pytest.fixture
def project(tmp_path: Path, prefect_server: str) -> Iterator[Project]:
    with connect(prefect_server) as api:
        made = Project(tmp_path, api)
        yield made
        # Its schedules of every few seconds would keep the session's server busy.
        (tmp_path / "nothing.yaml").write_text("name: kills\n")
        made.run("sync", "nothing")


def test_no_kill_changes_what_the_next_sync_leaves(project: Project) -> None:
    seed = random.randrange(10**6)  # noqa: S311 - moments, no secret
    _, outcomes = run_rounds(project, KILLS, random.Random(seed))  # noqa: S311
    assert [each.wrong for each in outcomes if each.wrong] == [], f"seed {seed}"
    assert sum(not each.ended for each in outcomes) == KILLS
