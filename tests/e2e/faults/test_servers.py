"""Outages of the Prefect server and its database, and random faults of every component."""

import contextlib
import json
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
    DETECTION_SECONDS,
    POD_START_SECONDS,
    RECOVERY_SECONDS,
    assert_state_within,
    assert_within,
    deploy_victim,
    end_ticking,
    first_claim_time,
    is_ending,
    list_pods,
    record_duration,
    start_running,
)
from tests.e2e.light_runs import LIGHT_RUN
from tests.e2e.pace import GRACE_SECONDS, ROUND_SECONDS, SERVER_OUTAGE_SECONDS
from tests.e2e.release import Object, Pool, Release, merge_values, pool_values
from tests.e2e.runs import create_deployment, get_run, read, start_run, wait_for_log, wait_until_ended
from tests.long.soak import Soak, soak_values
from tests.parts import random_seed, wait_until

SOAK_MINUTES, SOAK_RUNS, SOAK_FAULTS = 1, 5, 2
"""Size of the soak here; `make test-long FOR=soak` runs the full size."""

SOAK_SEQUENCE = ("Job deleted", "leader killed", "API killed")
"""The first faults of the soak here: in a random order the few faults may all be those that hit no run. Pods that are
killed or evicted and killed workers have tests of their own."""


@pytest.fixture(scope="module")
def server(own_server: Release) -> Release:
    return own_server


@pytest.fixture(scope="module")
def values(image: str) -> Object:
    return merge_values(soak_values(pool_values(image)), {"reconciler": {"everySeconds": ROUND_SECONDS}})


# The first test of the file: the soak asserts that no pod, Job or slot is left in the namespace.
def test_random_faults_lose_no_run_and_overlap_no_attempts(
    server: Release, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random_seed()
    with proxied(pool.namespace.context) as kubernetes:
        soak = Soak(server, pool, kubernetes, random.Random(seed), SOAK_SEQUENCE)  # noqa: S311
        outcome = soak.run(SOAK_MINUTES, SOAK_RUNS, SOAK_FAULTS)
    assert outcome.wrong == [], f"seed {seed}\n{capsys.readouterr().out}"
    assert len(outcome.runs) == SOAK_RUNS
    assert len(outcome.faults) >= SOAK_FAULTS
    assert sum(map(len, outcome.attempts.values())) > SOAK_RUNS, "no fault hit a run"


@contextlib.contextmanager
def server_down(server: Release) -> Iterator[None]:
    """Kill the Prefect API and keep it at zero replicas while the block lasts."""
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
    """A run in progress completes in its first attempt with its whole log; runs that fell due are executed once.

    A run that is being cancelled when the outage begins is Cancelled after the outage.

    Each part opens its own client, because a client is forwarded to one pod of the server.
    """
    namespace = server.namespace
    with server.api() as api:
        every_minute = [{"schedule": {"cron": "* * * * *"}}]
        minutely = deploy_victim(api, pool, schedules=every_minute, job_variables=LIGHT_RUN)
        ticking = create_deployment(api, pool, entrypoint="/probe/flow.py:ticking")
        run = start_run(api, ticking, parameters={"times": 600})
        unwanted, _ = start_running(api, pool, deploy_victim(api, pool), seconds=900)
        wait_for_log(api, run, "tick 5", 300)
        # Not while a worker claims a scheduled run: a claim that is cut off is released and takes a minute longer.
        wait_until(lambda: 25 < datetime.now(UTC).second < 45, "a moment between two scheduled runs", 90)
        api.post(f"/flow_runs/{unwanted}/set_state", json={"state": {"type": "CANCELLING"}}).raise_for_status()
    began = datetime.now(UTC)
    with server_down(server):
        time.sleep(SERVER_OUTAGE_SECONDS)
    back = datetime.now(UTC)
    missed = {
        moment
        for number in range(1, SERVER_OUTAGE_SECONDS // 60 + 3)
        if began < (moment := began.replace(second=0, microsecond=0) + timedelta(minutes=number)) < back
    }
    assert missed

    def scheduled_runs(api: httpx.Client) -> dict[datetime, list[Object]]:
        body = {"deployments": {"id": {"any_": [minutely]}}, "limit": 200}
        by_time: dict[datetime, list[Object]] = defaultdict(list)
        for found in read(api, "POST", "/flow_runs/filter", json=body):
            by_time[datetime.fromisoformat(found["expected_start_time"])].append(found)
        return by_time

    def all_missed_have_begun() -> bool:
        by_time = scheduled_runs(api)
        return all(
            by_time[moment] and all(scheduled_run["start_time"] for scheduled_run in by_time[moment])
            for moment in missed
        )

    claim_seconds = RECOVERY_SECONDS - POD_START_SECONDS
    with server.api() as api:
        assert_state_within(api, unwanted, "Cancelled", back, GRACE_SECONDS + DETECTION_SECONDS)
        wait_until(lambda: all(map(is_ending, list_pods(pool, unwanted))), "its pod to end", DETECTION_SECONDS)
        wait_until(all_missed_have_begun, "the missed runs to begin", 300)
        # Further runs would take the processor from other tests.
        api.patch(f"/deployments/{minutely}", json={"paused": True}).raise_for_status()
        for missed_run in (found for moment in missed for found in scheduled_runs(api)[moment]):
            assert_within("a missed run is claimed", back, first_claim_time(api, missed_run["id"]), claim_seconds)
            record_duration("the missed run begins", back, datetime.fromisoformat(missed_run["start_time"]))
        assert get_run(api, run)["state_type"] == "RUNNING"
    database = "pod/prefect-server-database-0"
    before = namespace.kubectl("get", database, "-o", "jsonpath={.metadata.uid}")
    # Not by --force: the next pod could start while the killed Postgres still writes to the volume.
    namespace.kubectl("delete", database, "--grace-period=1")
    wait_until(
        lambda: (
            namespace.kubectl("get", database, "--ignore-not-found", "-o", "jsonpath={.metadata.uid}")
            not in ("", before)
        ),
        "a new pod of the database",
    )
    namespace.kubectl("wait", database, "--for=condition=Ready", "--timeout=300s")

    def has_database() -> bool:
        # The API answers 500 until the cluster's DNS has the database's new address; connections may break.
        with contextlib.suppress(httpx.HTTPError, ClusterError), server.api() as api:
            return api.get(f"/flow_runs/{run}").is_success
        return False

    wait_until(has_database, "the API to reach its database")
    with server.api() as api:
        [pod] = list_pods(pool, run)
        end_ticking(pool, pod["metadata"]["name"])
        found = wait_until_ended(api, run)
        assert (found["state_type"], found["run_count"]) == ("COMPLETED", 1)
        ticks = [int(line.split()[1]) for line in wait_for_log(api, run, "the end", 180) if line.startswith("tick")]
        # A client whose request met the killed database sends its lines again, so lines may be doubled.
        assert {*ticks} == {*range(max(ticks) + 1)}
        assert 2 * max(ticks) > SERVER_OUTAGE_SECONDS
        for moment in missed:
            [once] = scheduled_runs(api)[moment]
            assert (wait_until_ended(api, once["id"])["state_type"], once["run_count"]) == ("COMPLETED", 1)


SERVICES = "app.kubernetes.io/component=services"

STOP_SERVICES = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    command, process = (folder / "cmdline").read_bytes(), int(folder.name)
    if b"orchestration.server_process" in command and process not in (1, os.getpid()):
        os.kill(process, signal.SIGSTOP)
"""


def test_stopped_services_are_not_ready_and_restart(server: Release) -> None:
    namespace = server.namespace

    def find_services() -> Object:
        pods = json.loads(namespace.kubectl("get", "pods", "--selector", SERVICES, "--output", "json"))["items"]
        found: Object = {"ready": False, "restartCount": 0}
        for pod in pods:
            if not pod["metadata"].get("deletionTimestamp"):
                found |= {"pod": pod["metadata"]["name"], **next(iter(pod["status"].get("containerStatuses", [])), {})}
        return found

    if find_services()["restartCount"]:
        # Kubernetes delays the restart of a container that was restarted before, by up to 5 minutes.
        namespace.kubectl("delete", "pods", "--selector", SERVICES)
    wait_until(lambda: find_services()["ready"], "the services to be ready", 300)
    before = find_services()
    namespace.kubectl("exec", before["pod"], "--", "python", "-c", STOP_SERVICES)
    stopped = datetime.now(UTC)
    wait_until(lambda: not find_services()["ready"], "the stopped services not to be ready")
    record_duration("stopped services are not ready", stopped, datetime.now(UTC))
    wait_until(
        lambda: (now := find_services())["restartCount"] > before["restartCount"] and now["ready"],
        "the kubelet to restart the services",
        300,
    )
    record_duration("stopped services are ready again", stopped, datetime.now(UTC))
    assert find_services()["pod"] == before["pod"]
