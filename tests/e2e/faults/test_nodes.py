"""Faults of a node: drained, with a stopped kubelet, or lost while the run's processes live on.

The runs are on a second node, so that the faults hit nothing else.
"""

import contextlib
import copy
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from orchestration.operations.local_cluster import node_components, node_faults, node_layout
from orchestration.operations.local_cluster.node_layout import Node
from orchestration.protocol import FENCED_LABEL_PREFIX, FENCED_WITHIN_SECONDS
from tests.e2e.faults.victims import (
    assert_state_within,
    count_taken_slots,
    create_limit,
    deploy_victim,
    find_state,
    list_pods,
    list_states,
    start_running,
    wait_for_state,
    wait_until_completed,
)
from tests.e2e.pace import IS_SHIPPED, KUBELET_OUTAGE_SECONDS
from tests.e2e.release import Object, Pool
from tests.e2e.runs import create_deployment, get_run, wait_for_log
from tests.parts import find_run_processes, wait_until

STOPPED_WITHIN_SECONDS = FENCED_WITHIN_SECONDS + (5 if IS_SHIPPED else 30)
"""Upper bound from the fencing of a Job to the look that finds no process of it. A look reads all processes."""


@pytest.fixture(scope="module")
def second_node(cluster: str) -> Iterator[Node]:
    if cluster != node_layout.CONTEXT:
        pytest.skip(f"{cluster} is not the node from packages, which has a second one")
    with node_faults.second_node() as joined:
        yield joined


@pytest.fixture(scope="module")
def values(values: Object, second_node: Node) -> Object:
    changed = copy.deepcopy(values)
    there = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [second_node.name]}]}
    preferred = [{"weight": 100, "preference": there}]
    changed["runs"]["pod"] |= {
        "tolerations": [{"key": second_node.taint, "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}},
    }
    changed["reconciler"]["pendingTimeoutSeconds"] = 600  # no run here is given up, also if the second node is slow
    return changed


@contextlib.contextmanager
def stopped_kubelet(node: Node) -> Iterator[None]:
    """Stop the kubelet of a node while the block lasts; afterwards wait until the node is Ready."""
    node_faults.stop_kubelet(node)
    try:
        yield
    finally:
        node_faults.start_kubelet(node)


def start_on_second_node(api: httpx.Client, pool: Pool, deployment_id: str, **parameters: object) -> tuple[str, str]:
    """Start a run on the second node, wait until its flow logs, and return the run's id and its pod's name."""
    run, name = start_running(api, pool, deployment_id, **parameters)
    [pod] = list_pods(pool, run)
    assert pod["spec"]["nodeName"] == node_layout.SECOND.name
    return run, name


@pytest.mark.further
def test_drained_run_keeps_its_crash_budget(pool: Pool, api: httpx.Client, second_node: Node) -> None:
    run, _ = start_on_second_node(api, pool, deploy_victim(api, pool, job_variables={"crash_retries": 0}), seconds=300)
    began = datetime.now(UTC)
    node_components.kubectl(
        "drain", second_node.name, "--force", "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=180s"
    )
    try:
        assert_state_within(api, run, "AwaitingRetry", began)
        wait_until_completed(api, run)
    finally:
        node_components.kubectl("uncordon", second_node.name)
    found = get_run(api, run)
    assert found["run_count"] == 2
    assert not found["labels"].get("reconciler.crashes")


@pytest.mark.further
def test_run_survives_a_stopped_kubelet(pool: Pool, api: httpx.Client, second_node: Node) -> None:
    times = 15 + KUBELET_OUTAGE_SECONDS // 2
    ticking = create_deployment(api, pool, entrypoint="/probe/flow.py:ticking")
    run, pod = start_on_second_node(api, pool, ticking, times=times)
    with stopped_kubelet(second_node):
        time.sleep(KUBELET_OUTAGE_SECONDS)
    wait_until_completed(api, run)
    assert get_run(api, run)["run_count"] == 1
    assert [listed_pod["metadata"]["name"] for listed_pod in list_pods(pool, run)] == [pod]
    # A client whose request met no answer sends its lines again, so lines may be doubled.
    ticks = {int(line.split()[1]) for line in wait_for_log(api, run, "the end") if line.startswith("tick")}
    assert ticks == {*range(times)}


def test_attempt_on_a_lost_node_stops_before_the_retry_begins(pool: Pool, api: httpx.Client, second_node: Node) -> None:
    ticking = create_deployment(api, pool, entrypoint="/probe/flow.py:ticking", job_variables={"crash_retries": 0})
    slot = create_limit(api, "lost")
    run, _ = start_on_second_node(api, pool, ticking, times=150, slot=slot)
    wait_until(lambda: count_taken_slots(api, slot) == 1, "the slot to be taken")
    job = get_run(api, run)["infrastructure_pid"].rpartition(":")[2]
    old = find_run_processes(run, job)
    assert old
    seen: list[int] = []
    with stopped_kubelet(second_node):
        node_components.kubectl("delete", "node", second_node.name)

        # The control plane takes a while to give the node up.
        def find_crash() -> Object | None:
            if found := find_state(api, run, "Crashed"):
                return found
            alive = find_run_processes(run, job)
            if not get_run(api, run)["labels"].get(FENCED_LABEL_PREFIX + job):
                seen[:] = alive
            return None

        crashed = wait_until(find_crash, f"Crashed of {run}", 300)
        assert "its node is " in crashed["message"]  # lost, or gone
        assert get_run(api, run)["labels"][FENCED_LABEL_PREFIX + job]
        assert seen, "the old attempt ended before it was fenced"
        wait_until(lambda: not find_run_processes(run, job), "the old attempt to stop", STOPPED_WITHIN_SECONDS)
        stopped = datetime.now(UTC)
        wait_until(lambda: count_taken_slots(api, slot) == 0, "the slot to be released", 30)
        again = wait_for_state(api, run, "AwaitingRetry", 120)
        due = datetime.fromisoformat(again["state_details"]["scheduled_time"])
        assert due - datetime.fromisoformat(crashed["timestamp"]) >= timedelta(seconds=FENCED_WITHIN_SECONDS)
        running = wait_until(
            lambda: [state for state in list_states(api, run) if state["type"] == "RUNNING"][1:],
            "another run attempt",
            180,
        )
        assert datetime.fromisoformat(running[0]["timestamp"]) > stopped
        assert not get_run(api, run)["labels"].get("reconciler.crashes")
    assert not find_run_processes(run, job)
    assert get_run(api, run)["run_count"] == 2
