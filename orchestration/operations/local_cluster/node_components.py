"""The Kubernetes components of the local node: control plane, kubelet, kube-proxy and the node's agent."""

import contextlib
import socket
import sys
from pathlib import Path
from typing import Any

import yaml

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, node_processes
from orchestration.operations.local_cluster.node_layout import (
    DNS_IP,
    ETCD,
    FIRST,
    KUBECONFIG,
    POD_RANGE,
    SERVICE_RANGE,
    STATE,
    Node,
)
from orchestration.settings import ROOT

CGROUPS = Path("/sys/fs/cgroup")


def kubectl(*arguments: str, text: str | None = None) -> str:
    """Run kubectl on the node as its administrator, and return its standard output."""
    return binaries.kubectl("--kubeconfig", str(KUBECONFIG), *arguments, text=text)


def start_control_plane() -> None:
    """Start etcd, the API server, the controller manager and the scheduler."""
    kube = str(binaries.kube())
    pki = STATE / "pki"
    node_processes.start(
        "etcd", "etcd", "--data-dir", str(STATE / "etcd"), "--listen-client-urls", ETCD,
        "--advertise-client-urls", ETCD, "--listen-peer-urls", "http://127.0.0.1:23800",
        "--unsafe-no-fsync",  # a node that loses power is made from scratch
    )  # fmt: skip
    node_processes.start(
        "kube-apiserver", kube, "kube-apiserver", f"--etcd-servers={ETCD}",
        f"--advertise-address={FIRST.ip}", f"--bind-address={FIRST.ip}", "--secure-port=6443",
        f"--tls-cert-file={pki}/apiserver.crt", f"--tls-private-key-file={pki}/apiserver.key",
        f"--client-ca-file={pki}/ca.crt", f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki}/service-accounts.key",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
        f"--kubelet-client-certificate={pki}/admin.crt", f"--kubelet-client-key={pki}/admin.key",
        "--kubelet-preferred-address-types=InternalIP", "--allow-privileged=true",
        f"--requestheader-client-ca-file={pki}/ca.crt", "--requestheader-allowed-names=admin",
        "--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={pki}/admin.crt", f"--proxy-client-key-file={pki}/admin.key",
        "--enable-aggregator-routing=true",
        # These read all objects again and again, for metrics and for an estimate that only large clusters need.
        "--feature-gates=SizeBasedListCostEstimate=false,DetectCacheInconsistency=false",
        "--etcd-count-metric-poll-period=0", "--etcd-db-metric-poll-interval=0",
    )  # fmt: skip
    node_processes.wait_for(_is_api_ready, "the API is not ready", "kube-apiserver")
    node_processes.start(
        "kube-controller-manager", kube, "kube-controller-manager", f"--kubeconfig={pki}/controllers.kubeconfig",
        "--use-service-account-credentials=true", "--leader-elect=false", "--allocate-node-cidrs=false",
        f"--service-account-private-key-file={pki}/service-accounts.key", f"--root-ca-file={pki}/ca.crt",
    )  # fmt: skip
    node_processes.start(
        "kube-scheduler", kube, "kube-scheduler", f"--kubeconfig={pki}/scheduler.kubeconfig", "--leader-elect=false"
    )


def start_kubelet(node: Node) -> None:
    """Start the kubelet of a node."""
    kubelet: dict[str, Any] = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{STATE}/pki/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "failSwapOn": False,
        # The node's registry needs no credentials.
        "imagePullCredentialsVerificationPolicy": "NeverVerify",
        "clusterDNS": [DNS_IP],
        "clusterDomain": "cluster.local",
        "containerRuntimeEndpoint": f"unix://{node.socket}",
        "tlsCertFile": f"{STATE}/pki/kubelet{node.suffix}.crt",
        "tlsPrivateKeyFile": f"{STATE}/pki/kubelet{node.suffix}.key",
        "podLogsDir": f"{node.folder}/pod-logs",
        "volumePluginDir": f"{node.folder}/volume-plugins",
        "port": node.port,
        "healthzPort": 0,
        "cgroupRoot": node.cgroup,
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "200Mi"},
        "nodeStatusUpdateFrequency": "4s",
        "serializeImagePulls": False,
        "resolvConf": "/etc/resolv.conf",
    }
    if node.taint:
        kubelet["registerWithTaints"] = [{"key": node.taint, "effect": "NoSchedule"}]
        _make_cgroup(node)
    _write_if_changed(node.folder / "kubelet" / "config.yaml", kubelet)
    node_processes.start(
        f"kubelet{node.suffix}", str(binaries.kube()), "kubelet", f"--config={node.folder}/kubelet/config.yaml",
        f"--kubeconfig={STATE}/pki/kubelet{node.suffix}.kubeconfig", f"--root-dir={node.folder}/kubelet/root",
        f"--hostname-override={node.name}", f"--node-ip={node.ip}",
    )  # fmt: skip


def start_node_agents() -> None:
    """Start kube-proxy and the node's agent, which enforces NetworkPolicies and provides volumes."""
    proxy = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": f"{STATE}/pki/proxy.kubeconfig"},
        "clusterCIDR": POD_RANGE,
        "hostnameOverride": FIRST.name,
        "mode": "iptables",
        "conntrack": {"maxPerCore": 0},
    }
    _write_if_changed(STATE / "kubelet" / "proxy.yaml", proxy)
    node_processes.start("kube-proxy", str(binaries.kube()), "kube-proxy", f"--config={STATE}/kubelet/proxy.yaml")
    node_processes.start(
        "agent", sys.executable, "-m", "orchestration.operations.local_cluster.agent",
        str(KUBECONFIG), str(STATE / "volumes"), str(STATE / "processor.json"),
        environment={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def _write_if_changed(path: Path, content: Any) -> None:
    # kube-proxy exits when its file is written again.
    text = yaml.safe_dump(content)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def cgroup_folders(node: Node) -> list[Path]:
    """Return the folders of a node's cgroup: one in cgroup version 2, one for each controller in version 1."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS / node.cgroup[1:]]
    controllers = [path for path in sorted(CGROUPS.iterdir()) if path.is_dir() and not path.is_symlink()]
    return [controller / node.cgroup[1:] for controller in controllers]


def _make_cgroup(node: Node) -> None:
    for folder in cgroup_folders(node):
        folder.mkdir(exist_ok=True)
        # Version 1 takes no process before these are set.
        for name in ("cpuset.cpus", "cpuset.mems"):
            if (folder / name).exists():
                (folder / name).write_text((folder.parent / name).read_text())


def _is_api_ready() -> bool:
    with contextlib.suppress(ClusterError):
        return kubectl("get", "--raw", "/readyz", "--request-timeout=2s") == "ok"
    return False


def is_node_ready(node: Node = FIRST) -> bool:
    """Return whether the kubelet accepts connections and the API reports the node as Ready."""
    # The API still reports Ready for a while after a kubelet was stopped.
    if not accepts_connections(node.ip, node.port):
        return False
    ready = "jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    with contextlib.suppress(ClusterError):
        return kubectl("get", "node", node.name, "-o", ready, "--request-timeout=10s") == "True"
    return False


def accepts_connections(address: str, port: int) -> bool:
    """Return whether a port accepts a TCP connection."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), 2):
        return True
    return False
