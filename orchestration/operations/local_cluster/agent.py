"""What a cloud or a CNI plugin would do on the node: enforce NetworkPolicies, provide volumes.

    python -m orchestration.operations.local_cluster.agent KUBECONFIG VOLUMES PROCESSOR

Level-triggered: on every change, and every few seconds, it reads all and makes the node so. Volumes are
`local` PersistentVolumes, as those of type hostPath ignore fsGroup, and a pod that is not root could
not write to them.

It also gives all pods the same weight on the processors, whatever they request: where several tests have the node, the
small pods of one would stand still for most of a minute while another's, with what production requests, start.

It writes the processor seconds that the pods of each namespace have used to the file PROCESSOR.
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
RESYNC = 5.0
"""Seconds between rounds when nothing is heard of a change."""
GATHER = 0.3
"""Seconds from a change to the round: changes come in bursts, and a round reads all."""
SIMULATED = "tests/simulated"
"""Label of pods that are not there: they need nothing of a node, and thousands of them would keep the agent busy."""
NOT_OVER = "status.phase!=Succeeded,status.phase!=Failed"
"""Of pods: no policy is for those of runs that are over."""
WEIGHT = 256
PODS = ("cpu/kubepods/burstable/pod*/cpu.shares", "kubepods/burstable/pod*/cpu.weight")
"""Files below /sys/fs/cgroup, of version 1 and of version 2."""
ACCOUNTS = (
    "cpuacct/kubepods/*/pod*/cpuacct.usage",
    "cpuacct/node-2/kubepods/*/pod*/cpuacct.usage",
    "kubepods/*/pod*/cpu.stat",
    "node-2/kubepods/*/pod*/cpu.stat",
)
"""As `PODS`, of both nodes: what a pod has used."""
HOOKS = (("FORWARD", policies.EGRESS), ("FORWARD", policies.INGRESS), ("INPUT", policies.EGRESS))


def enforce(wanted: str) -> None:
    """Make the policies' chains so in one transaction, and hook them in."""
    subprocess.run(["iptables-restore", "-w", "--noflush"], input=wanted, text=True, check=True)
    for hook, chain in HOOKS:
        rule = [hook, "-j", chain]
        if subprocess.run(["iptables", "-w", "-t", "mangle", "-C", *rule], capture_output=True, check=False).returncode:
            subprocess.run(["iptables", "-w", "-t", "mangle", "-A", *rule], check=True)


def release() -> None:
    """Enforce nothing any more."""
    for hook, chain in HOOKS:
        subprocess.run(["iptables", "-w", "-t", "mangle", "-D", hook, "-j", chain], capture_output=True, check=False)


class Processor:
    """Keeps the processor seconds of each namespace's pods, those that are gone included."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.namespaces: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    def read(self, pods: Iterable[Mapping[str, Any]]) -> None:
        """Read what each pod has used so far from its cgroup, and write the sums by namespace."""
        self.namespaces |= {pod["metadata"]["uid"]: pod["metadata"]["namespace"] for pod in pods}
        for pattern in ACCOUNTS:
            for path in Path("/sys/fs/cgroup").glob(pattern):
                with contextlib.suppress(OSError):  # its pod has gone
                    self.seconds[path.parent.name.removeprefix("pod")] = _seconds(path.read_text())
        sums: dict[str, float] = defaultdict(float)
        for uid, seconds in self.seconds.items():
            sums[self.namespaces.get(uid, "")] += seconds
        fresh = self.file.with_suffix(".new")
        fresh.write_text(json.dumps(sums))
        fresh.replace(self.file)


def _seconds(text: str) -> float:
    """Return the seconds of a cgroup's account: nanoseconds in version 1, `usage_usec N` first in version 2."""
    words = text.split()
    return int(words[1]) / 1e6 if words[0] == "usage_usec" else int(words[0]) / 1e9


def weigh() -> None:
    """Give each pod the same weight. The kubelet sets it once, when it makes the pod's cgroup."""
    for pattern in PODS:
        for each in Path("/sys/fs/cgroup").glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # its pod has gone
                if each.read_text().strip() != str(WEIGHT):
                    each.write_text(str(WEIGHT))


def provide_volumes(core: client.CoreV1Api, folder: Path) -> None:
    """Make a volume for each claim that a pod on the node waits for; remove those whose claim is gone."""
    volumes = {volume.metadata.name: volume for volume in core.list_persistent_volume().items}
    for claim in core.list_persistent_volume_claim_for_all_namespaces().items:
        annotations = claim.metadata.annotations or {}
        node = annotations.get("volume.kubernetes.io/selected-node")
        name = f"pvc-{claim.metadata.uid}"
        ours = annotations.get("volume.kubernetes.io/storage-provisioner") == PROVISIONER
        if not (ours and node and claim.status.phase == "Pending") or name in volumes:
            continue
        (folder / name).mkdir(parents=True, exist_ok=True)
        core.create_persistent_volume(_volume(name, folder / name, claim))
    for name, volume in volumes.items():
        provided = (volume.metadata.annotations or {}).get("pv.kubernetes.io/provisioned-by") == PROVISIONER
        if provided and volume.status.phase == "Released" and volume.spec.persistent_volume_reclaim_policy == "Delete":
            shutil.rmtree(folder / name, ignore_errors=True)
            core.delete_persistent_volume(name)


def _volume(name: str, path: Path, claim: Any) -> dict[str, Any]:
    # All nodes are this machine.
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


def _listen(read: Any, changed: threading.Event) -> None:
    """Set `changed` whenever the API tells of one of these objects."""
    while True:
        try:
            for _ in read(watch=True, timeout_seconds=300, _preload_content=False).stream(amt=None):
                changed.set()
        except Exception:
            time.sleep(1)


def _items(read: Any) -> list[dict[str, Any]]:
    """All objects of a kind as the API wrote them: the client's models of them cost ten times the processor's time."""
    found: list[dict[str, Any]] = json.loads(read(_preload_content=False).data)["items"]
    return found


def main(kubeconfig: str, volumes: Path, processor: Path) -> None:
    """Look after the node until the process is ended."""
    config.load_kube_config(kubeconfig)
    core, network = client.CoreV1Api(), client.NetworkingV1Api()
    reads = (
        network.list_network_policy_for_all_namespaces,
        partial(core.list_pod_for_all_namespaces, label_selector=f"!{SIMULATED}", field_selector=NOT_OVER),
        core.list_namespace,
        core.list_persistent_volume_claim_for_all_namespaces,
        core.list_persistent_volume,
    )
    changed = threading.Event()
    for read in reads:
        threading.Thread(target=_listen, args=[read, changed], daemon=True).start()
    enforced, used = "", Processor(processor)
    while True:
        changed.clear()
        try:
            found, pods, namespaces = map(_items, reads[:3])
            wanted = policies.rules(found, pods, namespaces)
            if wanted != enforced:
                enforce(wanted)
                enforced = wanted
            provide_volumes(core, volumes)
            weigh()
            used.read(pods)
        except (ApiException, HTTPError, OSError, subprocess.SubprocessError) as error:
            print(error, file=sys.stderr, flush=True)
            enforced = ""
            time.sleep(1)
        changed.wait(RESYNC)
        time.sleep(GATHER)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
