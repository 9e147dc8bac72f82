"""The bridge, routes and packet filter rules of the local node."""

import subprocess
from pathlib import Path

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.node_layout import BRIDGE, NODES, POD_RANGE, SERVICE_RANGE

CHAIN_PREFIXES = ("KUBE-", "CNI-", "NETPOL-")
"""Chains of kube-proxy, of the network plugins and of the node's agent."""


def make_network() -> None:
    """Make a bridge that carries the nodes' addresses, and routes that keep the node's traffic on this machine.

    Raises:
        ClusterError: the kernel cannot filter bridged packets.
    """
    # A bridge, as not every kernel has dummy links. The kubelet refuses a node address on loopback.
    if not Path(f"/sys/class/net/{BRIDGE}").exists():
        binaries.run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        for node in NODES:
            binaries.run(["ip", "addr", "add", f"{node.ip}/32", "dev", BRIDGE])
        binaries.run(["ip", "link", "set", BRIDGE, "up"])
    # Packets to a service that kube-proxy does not know must not leave this machine by the default route.
    binaries.run(["ip", "route", "replace", SERVICE_RANGE, "dev", BRIDGE])
    binaries.run(["ip", "route", "replace", "unreachable", POD_RANGE])
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    bridge_filter = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
    if not bridge_filter.exists():
        subprocess.run(["modprobe", "br_netfilter"], capture_output=True, check=False)
    if not bridge_filter.exists():
        raise ClusterError(
            "The kernel has no br_netfilter, so that no policy between pods can be enforced. Load that module"
        )
    bridge_filter.write_text("1")


def remove_network() -> None:
    """Remove bridges, routes, the pods' network namespaces and all packet filter rules of the node."""
    for netns in Path("/run/netns").glob("cni-*"):
        subprocess.run(["ip", "netns", "delete", netns.name], capture_output=True, check=False)
    subprocess.run(["ip", "route", "del", "unreachable", POD_RANGE], capture_output=True, check=False)
    for link in (*(node.bridge for node in NODES), BRIDGE):
        subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)
    # Without the node these rules only cost time for every packet.
    for table in ("nat", "filter", "mangle"):
        saved = binaries.run(["iptables-save", "-t", table]).splitlines()
        kept = [
            line for line in saved if not any(f" {prefix}" in line or f":{prefix}" in line for prefix in CHAIN_PREFIXES)
        ]
        if kept != saved:
            subprocess.run(["iptables-restore", "-T", table], input="\n".join(kept) + "\n", text=True, check=True)
