"""The node from packages: `up` is idempotent and repairs it, `down` deletes everything, its agent enforces policies."""

import contextlib
import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import __main__ as command
from orchestration.operations.local_cluster import (
    binaries,
    node,
    node_components,
    node_faults,
    node_layout,
    node_processes,
)
from tests.cluster.namespace import Namespace, network_policy
from tests.parts import wait_until

pytestmark = pytest.mark.alone
"""The node is away for a while, or enforces no policy."""


@pytest.fixture(autouse=True)
def _from_packages(cluster: str) -> None:
    if cluster != node_layout.CONTEXT:
        pytest.skip(f"{cluster} is not the node from packages")


def test_second_up_keeps_the_running_node(cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = {name: node_processes.process_id(name) for name in node_processes.COMPONENTS}
    assert command.main(["up"]) == 0
    assert capsys.readouterr().err == f"The node runs: kubectl --context {node_layout.CONTEXT}\n"
    assert {name: node_processes.process_id(name) for name in node_processes.COMPONENTS} == before


@pytest.mark.further
def test_agent_enforces_policies(namespace: Namespace) -> None:
    namespace.serve()
    namespace.pod("client")
    namespace.apply(network_policy("deny-all", pod="server", ingress=[]))
    wait_until(lambda: not namespace.connects("client", "server", 80), "the policy to be enforced")
    with node_faults.without_policies():
        assert namespace.connects("client", "server", 80)
    wait_until(lambda: not namespace.connects("client", "server", 80), "the policy to be enforced again")


@pytest.mark.further
def test_second_node_runs_pods_and_leaves_nothing_behind(namespace: Namespace) -> None:
    namespace.pod("first")
    with node_faults.second_node() as other:
        namespace.pod("second", nodeName=other.name)
        node_faults.stop_kubelet(other)
        node_faults.start_kubelet(other)

        def runs_on() -> bool:
            with contextlib.suppress(ClusterError):  # the kubelet has not heard of the pod yet
                namespace.kubectl("exec", "second", "--", "true")
                return True
            return False

        wait_until(runs_on, "the pod to be reached again")
        restarts = "jsonpath={.status.containerStatuses[0].restartCount}"
        assert namespace.kubectl("get", "pod", "second", "-o", restarts) == "0"
    assert other.name not in node_components.kubectl("get", "nodes", "-o", "name")
    assert not other.folder.exists()
    assert not any(folder.exists() for folder in node_components.cgroup_folders(other))
    assert not Path(f"/sys/class/net/{other.bridge}").exists()
    namespace.kubectl("exec", "first", "--", "true")


def test_up_restarts_a_node_whose_processes_were_killed(namespace: Namespace) -> None:
    namespace.serve()
    namespace.pod("client")
    killed = {name: node_processes.process_id(name) for name in node_processes.COMPONENTS}
    for pid in killed.values():
        assert pid
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(node_processes.process_id, node_processes.COMPONENTS)), "the processes to be gone")
    assert not node.is_running()
    assert command.main(["up"]) == 0
    for name in ("server", "client"):
        namespace.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=300s")
    wait_until(lambda: namespace.connects("client", "server", 80), "the server to be reached")


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.skipif(not os.environ.get("CI"), reason="deletes everything in the cluster; CI=1 runs it")
def test_down_deletes_everything_and_up_makes_a_new_node(cluster: str) -> None:
    pids = [node_processes.process_id(name) for name in node_processes.COMPONENTS]
    assert command.main(["down"]) == 0
    assert not node_layout.STATE.exists()
    assert str(node_layout.STATE) not in Path("/proc/self/mounts").read_text()
    assert not any(Path(f"/sys/class/net/{link}").exists() for link in (node_layout.BRIDGE, node_layout.FIRST.bridge))
    assert not re.search("KUBE-|CNI-|NETPOL-", binaries.run(["iptables-save"]))
    assert node_layout.SERVICE_RANGE not in binaries.run(["ip", "route"])
    assert not [pid for pid in pids if pid and _is_alive(pid)]
    assert node_layout.CONTEXT not in binaries.kubectl("config", "get-contexts", "-o", "name").split()
    assert command.main(["down"]) == 0, "a second down has nothing to do"
    assert command.main(["up"]) == 0
    assert node.is_running()
