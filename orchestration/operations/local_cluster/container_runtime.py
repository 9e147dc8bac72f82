"""The image registry and containerd of the local node, and the containers and mounts to clean up."""

import json
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import yaml

from orchestration.operations.local_cluster import images, node_processes
from orchestration.operations.local_cluster.node_layout import STATE, Node

CLEANUP_TIMEOUT_SECONDS = 60.0


def start_registry() -> None:
    """Start the registry that pods pull from, and wait until it answers."""
    config = STATE / "registry.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "version": "0.1",
                "log": {"level": "warn"},
                "storage": {"filesystem": {"rootdirectory": str(STATE / "registry")}, "delete": {"enabled": True}},
                "http": {"addr": "127.0.0.1:5000"},
            }
        )
    )
    node_processes.start("registry", "docker-registry", "serve", str(config))
    node_processes.wait_for(_registry_answers, "the registry does not answer", "registry")


def start_containerd(node: Node) -> None:
    """Start a node's containerd with its pod network, and wait for its socket."""
    for name in ("cni", "containerd", "kubelet"):
        (node.folder / name).mkdir(parents=True, exist_ok=True)
    (node.folder / "containerd" / "config.toml").write_text(
        f"""version = 2
root = "{node.folder}/containerd/root"
state = "{node.folder}/containerd/state"
[grpc]
  address = "{node.socket}"
[plugins."io.containerd.grpc.v1.cri"]
  # Without CAP_SYS_RESOURCE, runc may not lower an OOM score.
  restrict_oom_score_adj = true
  sandbox_image = "{images.PAUSE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{node.folder}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
"""
    )
    bridge = {
        "type": "bridge",
        "bridge": node.bridge,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(node.folder / "cni-addresses"),
            "ranges": [[{"subnet": node.pods}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        },
    }
    ports = {"type": "portmap", "capabilities": {"portMappings": True}}
    (node.folder / "cni" / "10-bridge.conflist").write_text(
        json.dumps({"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, ports]})
    )
    name = f"containerd{node.suffix}"
    node_processes.start(name, "containerd", "-c", str(node.folder / "containerd" / "config.toml"))
    node_processes.wait_for(node.socket.exists, "containerd does not answer", name)


def _registry_answers() -> bool:
    try:
        with urlopen(f"http://{images.REGISTRY}/v2/", timeout=2) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


def kill_containers(node: Node) -> None:
    """Kill and delete all containers of a node whose containerd runs."""
    ctr = ["ctr", "-a", str(node.socket), "-n", "k8s.io", "tasks"]
    if node_processes.process_id(f"containerd{node.suffix}") is None:
        return

    def tasks() -> list[str]:
        return subprocess.run([*ctr, "ls", "-q"], capture_output=True, text=True, check=False).stdout.split()

    for task in tasks():
        subprocess.run([*ctr, "kill", "-s", "9", task], capture_output=True, check=False)
    deadline = time.monotonic() + CLEANUP_TIMEOUT_SECONDS
    while (left := tasks()) and time.monotonic() < deadline:
        for task in left:
            subprocess.run([*ctr, "delete", "-f", task], capture_output=True, check=False)


def unmount_below(folder: Path) -> None:
    """Unmount everything below a folder, innermost first."""
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in sorted((mount for mount in mounts if mount.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", mount], check=False)
