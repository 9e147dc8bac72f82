"""Faults of the local node for tests: a second node to lose, a stopped kubelet, a Kubernetes API that is away."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import container_runtime, node_components, node_processes
from orchestration.operations.local_cluster.node_layout import SECOND, Node


@contextlib.contextmanager
def second_node() -> Iterator[Node]:
    """Add a second node while the block lasts, for pods that tolerate its taint."""
    _remove(SECOND)
    try:
        container_runtime.start_containerd(SECOND)
        start_kubelet(SECOND)
        yield SECOND
    finally:
        _remove(SECOND)


def stop_kubelet(node: Node) -> None:
    """Stop a kubelet, as if its node were cut off: the pods keep running, and the API does not hear of them."""
    node_processes.stop(f"kubelet{node.suffix}")


def start_kubelet(node: Node) -> None:
    """Start a kubelet, and wait until its node is Ready."""
    node_components.start_kubelet(node)
    node_processes.wait_for(
        lambda: node_components.is_node_ready(node), f"{node.name} is not Ready", f"kubelet{node.suffix}"
    )


def _remove(node: Node) -> None:
    """Remove a node with its pods, processes, files, cgroups and network link."""
    stop_kubelet(node)
    with contextlib.suppress(ClusterError):
        node_components.kubectl("delete", "node", node.name, "--ignore-not-found")
    container_runtime.kill_containers(node)
    node_processes.stop(f"containerd{node.suffix}")
    container_runtime.unmount_below(node.folder)
    shutil.rmtree(node.folder, ignore_errors=True)
    for folder in node_components.cgroup_folders(node):
        for path in sorted([folder, *folder.rglob("*/")], reverse=True):
            with contextlib.suppress(OSError):  # it does not exist, or the kernel removes it
                path.rmdir()
    subprocess.run(["ip", "link", "delete", node.bridge], capture_output=True, check=False)


@contextlib.contextmanager
def without_policies() -> Iterator[None]:
    """Enforce no NetworkPolicy while the block lasts."""
    from orchestration.operations.local_cluster import agent

    node_processes.stop("agent")
    agent.remove_rules()
    try:
        yield
    finally:
        node_components.start_node_agents()


@contextlib.contextmanager
def without_api() -> Iterator[None]:
    """Stop the Kubernetes API while the block lasts: connections are refused."""
    node_processes.stop("kube-apiserver")
    try:
        yield
    finally:
        node_components.start_control_plane()


@contextlib.contextmanager
def with_silent_api() -> Iterator[None]:
    """Freeze the Kubernetes API while the block lasts: it accepts connections and answers nothing.

    Raises:
        ClusterError: the API server does not run.
    """
    process = node_processes.process_id("kube-apiserver")
    if process is None:
        raise ClusterError("kube-apiserver does not run")
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)
