"""What becomes of a run whose node is drained, hears nothing for a while, or is gone while the run lives on.

The runs are on a second node, so that nothing else is.
"""

import copy
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from orchestration.operations.local_cluster import node
from orchestration.protocol import FENCED_LABEL_PREFIX, FENCED_WITHIN_SECONDS
from tests.e2e.faults.victims import (
    completed,
    pods,
    processes,
    said_in_time,
    scarce,
    state_named,
    state_so_far,
    states,
    taken,
    under_way,
    victim,
)
from tests.e2e.pace import KUBELET_AWAY_SECONDS
from tests.e2e.release import Object, Pool
from tests.e2e.runs import deployment, logged, run_of
from tests.parts import wait_until


@pytest.fixture(scope="module")
def second(cluster: str) -> Iterator[node.Node]:
    if cluster != node.CONTEXT:
        pytest.skip(f"{cluster} is not the node from packages, which has a second one")
    with node.second() as made:
        yield made


@pytest.fixture(scope="module")
def values(values: Object, second: node.Node) -> Object:
    made = copy.deepcopy(values)
    there = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [second.name]}]}
    preferred = [{"weight": 100, "preference": there}]
    made["runs"]["pod"] |= {
        "tolerations": [{"key": second.taint, "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}},
    }
    return made


def on_the_second(api: httpx.Client, pool: Pool, deployment_id: str, **parameters: object) -> tuple[str, str]:
    """A run under way there; its id and its pod."""
    run, name = under_way(api, pool, deployment_id, **parameters)
    [pod] = pods(pool, run)
    assert pod["spec"]["nodeName"] == node.SECOND.name
    return run, name


def test_drained_run_keeps_its_crash_budget(pool: Pool, api: httpx.Client, second: node.Node) -> None:
    run, _ = on_the_second(api, pool, victim(api, pool, job_variables={"crash_retries": 0}), seconds=60)
    began = datetime.now(UTC)
    node.kubectl("drain", second.name, "--force", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=90s")
    try:
        said_in_time(api, run, "AwaitingRetry", began)
        completed(api, run)
    finally:
        node.kubectl("uncordon", second.name)
    found = run_of(api, run)
    assert found["run_count"] == 2
    assert not found["labels"].get("reconciler.crashes")


def test_run_survives_an_absent_kubelet(pool: Pool, api: httpx.Client, second: node.Node) -> None:
    times = 15 + KUBELET_AWAY_SECONDS // 2
    run, pod = on_the_second(api, pool, deployment(api, pool, entrypoint="/probe/flow.py:ticking"), times=times)
    node.stop_kubelet(second)
    time.sleep(KUBELET_AWAY_SECONDS)
    node.start_kubelet(second)
    completed(api, run)
    assert run_of(api, run)["run_count"] == 1
    assert [each["metadata"]["name"] for each in pods(pool, run)] == [pod]
    lines = [line.split()[1] for line in logged(api, run, "the end") if line.startswith("tick")]
    assert sorted(map(int, lines)) == [*range(times)]


def test_attempt_on_a_lost_node_stops_before_the_retry_begins(pool: Pool, api: httpx.Client, second: node.Node) -> None:
    made = deployment(api, pool, entrypoint="/probe/flow.py:ticking", job_variables={"crash_retries": 0})
    slot = scarce(api, "lost")
    run, _ = on_the_second(api, pool, made, times=150, slot=slot)
    wait_until(lambda: taken(api, slot) == 1, "the slot to be taken")
    job = run_of(api, run)["infrastructure_pid"].rpartition(":")[2]
    old = processes(run, job)
    assert old
    seen: list[int] = []
    node.stop_kubelet(second)
    try:
        node.kubectl("delete", "node", second.name)

        # The control plane takes its time until it believes that it is gone.
        def crash() -> Object | None:
            if found := state_so_far(api, run, "Crashed"):
                return found
            seen[:] = processes(run, job)
            return None

        crashed = wait_until(crash, f"Crashed of {run}", 120)
        fenced = time.monotonic()
        assert "its node is " in crashed["message"]  # lost, or gone
        assert run_of(api, run)["labels"][FENCED_LABEL_PREFIX + job]
        assert seen, "it was over before it was fenced"
        wait_until(lambda: not processes(run, job), "the old execution to stop", FENCED_WITHIN_SECONDS + 5)
        stopped = datetime.now(UTC)
        assert time.monotonic() - fenced < FENCED_WITHIN_SECONDS + 5
        assert taken(api, slot) == 0
        again = state_named(api, run, "AwaitingRetry")
        due = datetime.fromisoformat(again["state_details"]["scheduled_time"])
        assert due - datetime.fromisoformat(crashed["timestamp"]) >= timedelta(seconds=FENCED_WITHIN_SECONDS)
        running = wait_until(
            lambda: [each for each in states(api, run) if each["type"] == "RUNNING"][1:], "another execution", 180
        )
        assert datetime.fromisoformat(running[0]["timestamp"]) > stopped
        assert not run_of(api, run)["labels"].get("reconciler.crashes")
    finally:
        node.start_kubelet(second)
    assert not processes(run, job)
    assert run_of(api, run)["run_count"] == 2
