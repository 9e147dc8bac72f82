"""Runs while the Prefect server or its database is away, and under random faults of every part."""

import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from orchestration.errors import ClusterError
from tests.cluster.namespace import proxied
from tests.e2e.faults.victims import (
    BACK,
    SEEN,
    START,
    claimed,
    ending,
    in_time,
    pods,
    said_in_time,
    took,
    under_way,
    victim,
)
from tests.e2e.pace import GRACE_SECONDS, SERVER_AWAY_SECONDS
from tests.e2e.release import Object, Pool, Release, pool_values
from tests.e2e.runs import deployment, ended, logged, run_of, start
from tests.long.soak import Soak, soaked
from tests.parts import wait_until

SOAK_MINUTES, SOAK_RUNS = 2, 15
"""`make test-long FOR=soak` takes longer."""


@pytest.fixture(scope="module")
def server(own_server: Release) -> Release:
    return own_server


@pytest.fixture(scope="module")
def values(image: str) -> Object:
    return soaked(pool_values(image))


# The first test of the file: at its end nothing may be left in the namespace.
def test_random_faults_lose_no_run_and_execute_none_twice_at_a_time(
    server: Release, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(10**6)  # noqa: S311 - faults, no secret
    with proxied(pool.namespace.context) as kubernetes:
        seen = Soak(server, pool, kubernetes, random.Random(seed)).make(SOAK_MINUTES, SOAK_RUNS)  # noqa: S311
    assert seen.wrong == [], f"seed {seed}\n{capsys.readouterr().out}"
    assert len(seen.runs) == SOAK_RUNS
    assert len(seen.faults) >= 4
    assert sum(map(len, seen.executions.values())) > SOAK_RUNS, "no fault hit a run"


def test_run_is_cancelled_though_the_server_dies_meanwhile(server: Release, pool: Pool) -> None:
    with server.api() as api:
        run, _ = under_way(api, pool, victim(api, pool), seconds=300)
        api.post(f"/flow_runs/{run}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    with without_server(server):
        time.sleep(SERVER_AWAY_SECONDS / 4)
    back = datetime.now(UTC)
    with server.api() as api:
        said_in_time(api, run, "Cancelled", back, GRACE_SECONDS + SEEN)
        wait_until(lambda: all(map(ending, pods(pool, run))), "its pod to end", SEEN)


@contextlib.contextmanager
def without_server(server: Release) -> Iterator[None]:
    """Kill the Prefect API, and leave its namespace without one while the block lasts."""
    server.namespace.kubectl("scale", "deployment/prefect-server-api", "--replicas=0")
    server.namespace.kubectl(
        "delete", "pod", "-l", "app.kubernetes.io/component=api", "--force", "--grace-period=0", "--wait=false"
    )
    try:
        yield
    finally:
        server.namespace.kubectl("scale", "deployment/prefect-server-api", "--replicas=1")
        server.namespace.kubectl("rollout", "status", "deployment/prefect-server-api", "--timeout=300s")


def test_server_outage_and_killed_database_lose_no_run(server: Release, pool: Pool) -> None:
    """A run under way completes in its first execution with its whole log; what fell due meanwhile is executed once.

    Each part has its own client, as a client goes by the server's pod.
    """
    namespace = server.namespace
    with server.api() as api:
        minutely = victim(api, pool, schedules=[{"schedule": {"cron": "* * * * *"}}])
        run = start(api, deployment(api, pool, entrypoint="/probe/flow.py:ticking"), parameters={"times": 600})
        logged(api, run, "tick 5", 120)
    # Not while a run of the schedule is claimed: what is cut off then is let go, and another claims it a minute later.
    wait_until(lambda: 25 < datetime.now(UTC).second < 45, "a moment between two of the schedule", 90)
    began = datetime.now(UTC)
    with without_server(server):
        time.sleep(SERVER_AWAY_SECONDS)
    back = datetime.now(UTC)
    missed = {
        moment
        for number in range(1, SERVER_AWAY_SECONDS // 60 + 3)
        if began < (moment := began.replace(second=0, microsecond=0) + timedelta(minutes=number)) < back
    }
    assert missed

    def of_the_schedule(api: httpx.Client) -> dict[datetime, list[Object]]:
        body = {"deployments": {"id": {"any_": [minutely]}}, "limit": 200}
        made: dict[datetime, list[Object]] = defaultdict(list)
        for each in api.post("/flow_runs/filter", json=body).raise_for_status().json():
            made[datetime.fromisoformat(each["expected_start_time"])].append(each)
        return made

    with server.api() as api:
        wait_until(
            lambda: all(each["start_time"] for moment in missed for each in of_the_schedule(api)[moment]),
            "the missed runs to begin",
            180,
        )
        for each in (each for moment in missed for each in of_the_schedule(api)[moment]):
            in_time("a missed run is claimed", back, claimed(api, each["id"]), BACK - START)
            took("it begins", back, datetime.fromisoformat(each["start_time"]))
        assert run_of(api, run)["state_type"] == "RUNNING"
    database = "pod/prefect-server-database-0"
    before = namespace.kubectl("get", database, "-o", "jsonpath={.metadata.uid}")
    namespace.kubectl("delete", database, "--force", "--grace-period=0")
    wait_until(
        lambda: (
            namespace.kubectl("get", database, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}")
            not in ("", before)
        ),
        "another pod of the database",
    )
    namespace.kubectl("wait", database, "--for=condition=Ready", "--timeout=300s")

    def answers_again() -> bool:
        # 500 while the database is away, and until the cluster's DNS has its new address; connections may break.
        with contextlib.suppress(httpx.HTTPError, ClusterError), server.api() as api:
            return api.get(f"/flow_runs/{run}").is_success
        return False

    wait_until(answers_again, "the API to have its database again", 90)
    with server.api() as api:
        [pod] = pods(pool, run)
        pool.namespace.kubectl("exec", pod["metadata"]["name"], "--", "touch", "/tmp/enough")  # noqa: S108 - in the pod
        found = ended(api, run)
        assert (found["state_type"], found["run_count"]) == ("COMPLETED", 1)
        ticks = [int(line.split()[1]) for line in logged(api, run, "the end", 90) if line.startswith("tick")]
        # A client that had no answer from a database that was killed sends its lines again.
        assert {*ticks} == {*range(max(ticks) + 1)}
        assert 2 * max(ticks) > SERVER_AWAY_SECONDS
        for moment in missed:
            [once] = of_the_schedule(api)[moment]
            assert (ended(api, once["id"])["state_type"], once["run_count"]) == ("COMPLETED", 1)
