"""Names, addresses and folders of the local node. The modules that start, change and stop the node share them."""

from dataclasses import dataclass
from pathlib import Path

CONTEXT = "prefect-node"
"""The node's context in the person's kubeconfig."""

STATE = Path("/var/lib/prefect-orchestration-node")
KUBECONFIG = STATE / "pki" / "admin.kubeconfig"

BRIDGE = "kube0"
POD_RANGE, SERVICE_RANGE, DNS_IP, API_IP = "10.244.0.0/16", "10.96.0.0/16", "10.96.0.10", "10.96.0.1"
ETCD = "http://127.0.0.1:23790"


@dataclass(frozen=True)
class Node:
    """A kubelet with a separate containerd.

    Args:
        name: the name of the Kubernetes node.
        ip: the address of the node.
        pods: the address range of its pods.
        bridge: the network link of its pods.
        suffix: the end of the names of its processes; empty for the first node.
        port: the port of its kubelet.
        cgroup: the parent of its pods' cgroups. A kubelet kills what it does not know below that.
        taint: a taint that repels pods without a toleration; empty for none.
    """

    name: str
    ip: str
    pods: str
    bridge: str
    suffix: str = ""
    port: int = 10250
    cgroup: str = "/"
    taint: str = ""

    @property
    def folder(self) -> Path:
        """The folder of its containerd and kubelet."""
        return STATE / self.name if self.suffix else STATE

    @property
    def socket(self) -> Path:
        """The socket of its containerd."""
        return self.folder / "containerd.sock"


FIRST = Node("node-1", "10.250.0.1", "10.244.0.0/24", "cni0")
SECOND = Node("node-2", "10.250.0.2", "10.244.1.0/24", "cni1", "-2", 10260, "/node-2", "tests/second-node")
NODES = (FIRST, SECOND)
