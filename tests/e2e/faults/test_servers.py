"""Random faults of every component, and stopped services of the Prefect server."""

import json
import random
from datetime import UTC, datetime

import pytest

from tests.cluster.namespace import proxied
from tests.e2e.faults.victims import record_duration
from tests.e2e.pace import ROUND_SECONDS
from tests.e2e.release import Object, Pool, Release, merge_values, pool_values
from tests.long.soak import Soak, soak_values
from tests.parts import random_seed, wait_until

SOAK_MINUTES, SOAK_RUNS, SOAK_FAULTS = 1, 5, 2
"""Size of the soak here; `make test-long FOR=soak` runs the full size."""

SOAK_SEQUENCE = ("Job deleted", "leader killed", "API killed")
"""The first faults of the soak here: in a random order the few faults may all be those that hit no run. Pods that are
killed or evicted and killed workers have tests of their own."""


pytestmark = pytest.mark.further


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
