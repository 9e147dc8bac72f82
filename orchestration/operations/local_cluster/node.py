"""Create and delete a single-node Kubernetes from packages, on a machine without Docker.

It needs Linux, root, Debian's packages and Go. All files of the node are below `STATE`, and each of its processes has a
pid file there. A machine has one such node, and all checkouts share it.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import (
    binaries,
    container_runtime,
    images,
    node_components,
    node_credentials,
    node_network,
    node_processes,
)
from orchestration.operations.local_cluster.node_layout import CONTEXT, FIRST, KUBECONFIG, NODES, STATE
from orchestration.progress import step

MANIFESTS = Path(__file__).with_name("manifests")
COMPLETE = STATE / "complete"
"""The hash of the code that made the node, once the node is complete."""

STOPPED_BEFORE_CONTAINERS = (
    "agent", "kubelet", "kubelet-2", "kube-proxy", "kube-scheduler", "kube-controller-manager",
)  # fmt: skip
STOPPED_AFTER_CONTAINERS = ("containerd", "containerd-2", "kube-apiserver", "etcd", "registry")


def unavailable_reason() -> str | None:
    """Return why this machine cannot run a node; None if it can."""
    if sys.platform != "linux":
        return "it is not Linux"
    if os.geteuid() != 0:
        return "you are not root"
    if not shutil.which("go"):
        return "there is no Go to build Kubernetes with"
    return None


def is_running() -> bool:
    """Return whether the node's API answers and the node is Ready."""
    return KUBECONFIG.exists() and node_components.is_node_ready()


def up() -> None:
    """Create and start the node. Idempotent: what runs is left as it is.

    Raises:
        ClusterError: a package or a component cannot be installed or started.
    """
    binaries.install_packages()
    binaries.kube()
    for name in ("helm", "coredns", "metrics-server"):
        binaries.program(name)
    if KUBECONFIG.exists() and not (STATE / "pki" / "kubelet-2.kubeconfig").exists():
        down()  # an older checkout made the node, and the key of its certificate authority is not kept
    for name in ("pki", "log", "run", "cni", "containerd", "kubelet"):
        (STATE / name).mkdir(parents=True, exist_ok=True)
    code = _code_hash()
    if is_running() and not node_processes.stopped_components() and COMPLETE.exists() and COMPLETE.read_text() == code:
        node_credentials.publish_context()
        print(f"The node runs: kubectl --context {CONTEXT}", file=sys.stderr)
        return
    COMPLETE.unlink(missing_ok=True)
    if not KUBECONFIG.exists():
        node_credentials.make_credentials()
    with step("Starting the registry and containerd", "2 s"):
        node_network.make_network()
        container_runtime.start_registry()
        container_runtime.start_containerd(FIRST)
    with step("Making the images of the sandbox, DNS and metrics", "8 s"):
        images.make_system_images()
    images.make_base_image()
    images.make_databases()
    node_processes.stop("agent")  # it may run another checkout's code
    with step("Starting the control plane and the node's agents", "10 s"):
        node_components.start_control_plane()
        node_components.start_kubelet(FIRST)
        node_components.start_node_agents()
        node_processes.wait_for(node_components.is_node_ready, "the node is not Ready", "kubelet")
    with step("Starting DNS, storage and metrics", "15 s"):
        _apply_manifests()
    node_credentials.publish_context()
    COMPLETE.write_text(code)
    print(f"The node is up: kubectl --context {CONTEXT}", file=sys.stderr)


def _apply_manifests() -> None:
    """Apply the node's manifests, and wait for their pods."""
    for manifest in sorted(MANIFESTS.iterdir()):
        node_components.kubectl("apply", "--server-side", "-f", str(manifest))
    try:
        node_components.kubectl("-n", "kube-system", "rollout", "status", "deployment", "--timeout=300s")
    except ClusterError as error:
        pods = node_components.kubectl("-n", "kube-system", "get", "pods", "--no-headers")
        raise ClusterError(f"The node's own pods do not start: {pods.strip().replace(chr(10), '; ')}") from error


def down() -> None:
    """Stop the node and delete all that it made: containers, mounts, links, packet filter rules and files."""
    # The agent's Kubernetes client takes a second to import, which `make` does not need.
    from orchestration.operations.local_cluster import agent

    if not STATE.exists():
        print("There is no node.", file=sys.stderr)
        return
    with step("Stopping the node", "10 s"):
        for name in STOPPED_BEFORE_CONTAINERS:
            node_processes.stop(name)
        agent.remove_rules()
        for node in NODES:
            container_runtime.kill_containers(node)
        for name in STOPPED_AFTER_CONTAINERS:
            node_processes.stop(name)
        node_network.remove_network()
        container_runtime.unmount_below(STATE)
        shutil.rmtree(STATE)
    node_credentials.remove_context()


def _code_hash() -> str:
    """Return a hash of the code and manifests that make the node. Another checkout's code updates the node."""
    files = [*Path(__file__).parent.glob("*.py"), *MANIFESTS.iterdir()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
