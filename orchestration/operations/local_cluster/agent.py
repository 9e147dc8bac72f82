"""Enforce NetworkPolicies and provide volumes on the node, as a CNI plugin and a cloud's storage driver do.

    python -m orchestration.operations.local_cluster.agent KUBECONFIG VOLUMES PROCESSOR

The reconcile loop is level-triggered. On every change, and every few seconds, it reads all objects and updates the
node. Volumes are `local` PersistentVolumes. Those of type hostPath ignore fsGroup, so that a pod that is not root could
not write to them.

The agent gives all pods the same CPU weight, whatever they request. Otherwise the small pods of one test would stand
still for most of a minute while the pods of another, with the requests of production, start.

The agent writes the processor seconds of each namespace's pods to the file PROCESSOR.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from orchestration.operations.local_cluster import policies

PROVISIONER = "prefect-orchestration.test/local"
RESYNC_SECONDS = 10.0
"""Time between rounds without a change."""
DEBOUNCE_SECONDS = 1.0
"""Time from a change to the next round: changes come in bursts, and a round reads everything."""
FROM_CACHE = {"resource_version": "0"}
"""Reads and watches the API server's cache as it is.

Any other version waits until the cache is as new as etcd. The node's etcd reports no progress of kinds that do not
change, so that such a watch would end after 3 s: https://kubernetes.io/docs/reference/using-api/api-concepts
"""
SIMULATED = "tests/simulated"
"""Label of simulated pods. They need nothing from the node, and thousands of them would keep the agent busy."""
NOT_ENDED = "status.phase!=Succeeded,status.phase!=Failed"
"""Field selector of pods that have not ended. No policy applies to ended pods."""
CPU_WEIGHT = 256
WEIGHT_FILES = ("cpu/kubepods/burstable/pod*/cpu.shares", "kubepods/burstable/pod*/cpu.weight")
"""Files with a pod's CPU weight below /sys/fs/cgroup, in version 1 and version 2."""
USAGE_FILES = (
    "cpuacct/kubepods/*/pod*/cpuacct.usage",
    "cpuacct/node-2/kubepods/*/pod*/cpuacct.usage",
    "kubepods/*/pod*/cpu.stat",
    "node-2/kubepods/*/pod*/cpu.stat",
)
"""Files with a pod's CPU usage below /sys/fs/cgroup, on both nodes."""
HOOKS = (("FORWARD", policies.EGRESS), ("FORWARD", policies.INGRESS), ("INPUT", policies.EGRESS))


def enforce_rules(rules: str) -> None:
    """Replace the policies' chains in one transaction, and hook them into the packet filter."""
    subprocess.run(["iptables-restore", "-w", "--noflush"], input=rules, text=True, check=True)
    for hook, chain in HOOKS:
        rule = [hook, "-j", chain]
        if subprocess.run(["iptables", "-w", "-t", "mangle", "-C", *rule], capture_output=True, check=False).returncode:
            subprocess.run(["iptables", "-w", "-t", "mangle", "-A", *rule], check=True)


def remove_rules() -> None:
    """Stop enforcing: unhook the policies' chains."""
    for hook, chain in HOOKS:
        subprocess.run(["iptables", "-w", "-t", "mangle", "-D", hook, "-j", chain], capture_output=True, check=False)


class ProcessorUsage:
    """Sums the processor seconds of each namespace's pods, deleted pods included.

    Args:
        file: receives the sums as JSON, by namespace.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.namespaces: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def read(self, pods: Iterable[Mapping[str, Any]]) -> None:
        """Read the usage of each pod from its cgroup, and write the sums."""
        self.namespaces |= {pod["metadata"]["uid"]: pod["metadata"]["namespace"] for pod in pods}
        for pattern in USAGE_FILES:
            for path in Path("/sys/fs/cgroup").glob(pattern):
                with contextlib.suppress(OSError):  # the pod was deleted
                    self.seconds[path.parent.name.removeprefix("pod")] = _seconds(path.read_text())
        sums: dict[str, float] = defaultdict(float)
        for uid, seconds in self.seconds.items():
            sums[self.namespaces.get(uid, "")] += seconds
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(sums))
        fresh.replace(self.file)


def _seconds(text: str) -> float:
    """Return the processor seconds in a usage file: nanoseconds in version 1, `usage_usec N` first in version 2."""
    words = text.split()
    return int(words[1]) / 1e6 if words[0] == "usage_usec" else int(words[0]) / 1e9


def equalize_cpu_weights() -> None:
    """Give each pod the same CPU weight. The kubelet sets the weight once, when it makes the pod's cgroup."""
    for pattern in WEIGHT_FILES:
        for file in Path("/sys/fs/cgroup").glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # the pod was deleted
                if file.read_text().strip() != str(CPU_WEIGHT):
                    file.write_text(str(CPU_WEIGHT))


def provide_volumes(core: client.CoreV1Api, folder: Path) -> None:
    """Create a volume for each claim that a pod waits for, and delete the volumes of deleted claims."""
    volumes = {volume.metadata.name: volume for volume in core.list_persistent_volume(**FROM_CACHE).items}
    for claim in core.list_persistent_volume_claim_for_all_namespaces(**FROM_CACHE).items:
        annotations = claim.metadata.annotations or {}
        node = annotations.get("volume.kubernetes.io/selected-node")
        name = f"pvc-{claim.metadata.uid}"
        is_ours = annotations.get("volume.kubernetes.io/storage-provisioner") == PROVISIONER
        if not (is_ours and node and claim.status.phase == "Pending") or name in volumes:
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        core.create_persistent_volume(_volume(name, folder / name, claim))
    for name, volume in volumes.items():
        provided = (volume.metadata.annotations or {}).get("pv.kubernetes.io/provisioned-by") == PROVISIONER
        if provided and volume.status.phase == "Released" and volume.spec.persistent_volume_reclaim_policy == "Delete":
            shutil.rmtree(folder / name, ignore_errors=True)
            core.delete_persistent_volume(name)


def _volume(name: str, path: Path, claim: Any) -> dict[str, Any]:
    # All nodes are this machine, so any node can mount the volume.
    term = {"key": "kubernetes.io/hostname", "operator": "Exists"}
    return {
        "metadata": {"name": name, "annotations": {"pv.kubernetes.io/provisioned-by": PROVISIONER}},
        "spec": {
            "capacity": {"storage": claim.spec.resources.requests["storage"]},
            "accessModes": claim.spec.access_modes,
            "persistentVolumeReclaimPolicy": "Delete",
            "storageClassName": claim.spec.storage_class_name,
            "claimRef": {
                "namespace": claim.metadata.namespace,
                "name": claim.metadata.name,
                "uid": claim.metadata.uid,
            },
            "local": {"path": str(path)},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [term]}]}},
        },
    }


def _watch(read: Any, *changed: threading.Event) -> None:
    """Watch objects of a kind, and set `changed` on each event. The first events are of the objects that exist."""
    while True:
        try:
            for _ in read(watch=True, timeout_seconds=300, _preload_content=False, **FROM_CACHE).stream(amt=None):
                for one in changed:
                    one.set()
        except Exception:
            time.sleep(1)


def _items(read: Any) -> list[dict[str, Any]]:
    """Return all objects of a kind as JSON. The client's models cost ten times the processor time."""
    found: list[dict[str, Any]] = json.loads(read(_preload_content=False, **FROM_CACHE).data)["items"]
    return found


def main(kubeconfig: str, volumes: Path, processor: Path) -> None:
    """Run the reconcile loop until the process ends.

    Args:
        kubeconfig: of the node's administrator.
        volumes: the folder of the volumes.
        processor: the file for the processor seconds.
    """
    config.load_kube_config(kubeconfig)
    core, network = client.CoreV1Api(), client.NetworkingV1Api()
    of_rules = (
        network.list_network_policy_for_all_namespaces,
        partial(core.list_pod_for_all_namespaces, label_selector=f"!{SIMULATED}", field_selector=NOT_ENDED),
        core.list_namespace,
    )
    of_volumes = (core.list_persistent_volume_claim_for_all_namespaces, core.list_persistent_volume)
    # Pods change all the time, volumes and their claims hardly ever.
    changed, are_volumes_due = threading.Event(), threading.Event()
    for read in of_rules:
        threading.Thread(target=_watch, args=[read, changed], daemon=True).start()
    for read in of_volumes:
        threading.Thread(target=_watch, args=[read, are_volumes_due, changed], daemon=True).start()
    enforced, usage = "", ProcessorUsage(processor)
    while True:
        changed.clear()
        try:
            found, pods, namespaces = map(_items, of_rules)
            rules = policies.render_rules(found, pods, namespaces)
            if rules != enforced:
                enforce_rules(rules)
                enforced = rules
            if are_volumes_due.is_set():
                are_volumes_due.clear()
                provide_volumes(core, volumes)
            equalize_cpu_weights()
            usage.read(pods)
        except (ApiException, HTTPError, OSError, subprocess.SubprocessError) as error:
            print(error, file=sys.stderr, flush=True)
            enforced = ""
            are_volumes_due.set()
            time.sleep(1)
        if not changed.wait(RESYNC_SECONDS):
            are_volumes_due.set()
        time.sleep(DEBOUNCE_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
