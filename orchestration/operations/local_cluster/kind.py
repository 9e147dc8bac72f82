"""Create and delete a kind cluster with a local registry, on a machine with Docker.

The registry is set up as https://kind.sigs.k8s.io/docs/user/local-registry describes, on the same `localhost:5000` as
that of the node from packages. kindnet enforces NetworkPolicies.
"""

import json
import shutil
import subprocess
import sys

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, images
from orchestration.progress import step

NAME = "prefect"
CONTEXT = f"kind-{NAME}"
REGISTRY = "prefect-registry"
CONFIG = """
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
containerdConfigPatches:
  - |-
    [plugins."io.containerd.grpc.v1.cri".registry]
      config_path = "/etc/containerd/certs.d"
"""


def is_docker_running() -> bool:
    """Return whether a Docker daemon answers."""
    if not shutil.which("docker"):
        return False
    return subprocess.run(["docker", "info"], capture_output=True, check=False, timeout=30).returncode == 0


def up() -> None:
    """Create the cluster and its registry. Idempotent: what runs is left as it is."""
    kind = str(binaries.program("kind"))
    if NAME not in binaries.run([kind, "get", "clusters"]).split():
        with step("Making a kind cluster", "1 min"):
            command = [kind, "create", "cluster", "--name", NAME, "--config", "-", "--wait", "120s"]
            done = subprocess.run(command, input=CONFIG, capture_output=True, text=True, check=False)
            if done.returncode:
                raise ClusterError(f"kind create cluster failed: {done.stderr.strip().splitlines()[-1]}")
    with step("Starting the registry", "2 s"):
        _start_registry(kind)
    print(f"The cluster is up: kubectl --context {CONTEXT}", file=sys.stderr)


def _start_registry(kind: str) -> None:
    """Start the registry, and let each node pull from it."""
    known = json.loads(
        binaries.run(["docker", "ps", "-a", "--format", "json", "--filter", f"name=^{REGISTRY}$"]) or "{}"
    )
    if not known:
        command = ["docker", "run", "-d", "--restart=always", "-p", "127.0.0.1:5000:5000", "--network", "bridge"]
        binaries.run([*command, "--name", REGISTRY, "registry:2.8.3"])
    elif known["State"] != "running":
        binaries.run(["docker", "start", REGISTRY])
    for node in binaries.run([kind, "get", "nodes", "--name", NAME]).split():
        folder = f"/etc/containerd/certs.d/{images.REGISTRY}"
        hosts = f'[host."http://{REGISTRY}:5000"]'
        binaries.run(["docker", "exec", node, "sh", "-c", f"mkdir -p {folder} && echo '{hosts}' > {folder}/hosts.toml"])
    networks = binaries.run(["docker", "inspect", "-f", "{{json .NetworkSettings.Networks}}", REGISTRY])
    if "kind" not in json.loads(networks):
        binaries.run(["docker", "network", "connect", "kind", REGISTRY])


def down() -> None:
    """Delete the cluster and its registry."""
    with step("Deleting the kind cluster", "10 s"):
        binaries.run([str(binaries.program("kind")), "delete", "cluster", "--name", NAME])
        subprocess.run(["docker", "rm", "-f", REGISTRY], capture_output=True, check=False)
