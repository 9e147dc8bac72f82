"""An installation for the doctor's checks: both charts on a Kubernetes API server without nodes, and one change."""

import asyncio
import copy
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from orchestration.operations.doctor import examination  # noqa: F401 - registers the checks
from orchestration.operations.doctor.findings import CHECKS, Finding, run_checks
from orchestration.operations.doctor.installation import CLUSTERS, Installation
from orchestration.operations.environment import POOL, RELEASES, SERVER, Environment, Object
from orchestration.operations.local_cluster import binaries
from orchestration.operations.release_inputs import CHARTS
from orchestration.prefect_api import Server
from tests.cluster.apiserver import NAMESPACE, NAMESPACES, ApiServer

ABSENT_SERVER = "no Prefect server"

REPORT: Object = {
    "database": {
        "dialect": "postgresql", "version": 170006, "latency_ms": 0.4, "ahead_seconds": 0.001, "max_connections": 97,
        "connections": 12, "size": 30 * 2**20, "extension": True, "read_only": False,
    },
    "redis": {"used": 2**20, "limit": 128 * 2**20, "eviction": "volatile-lru", "hosts": ["prefect-server-api-1"]},
}  # fmt: skip
"""What the pod of a healthy server reports. tests/orchestration/inspection/test_backing_services.py reads real ones."""

RUNS = NAMESPACES[1]
"""The namespace of the runs in the values of the local environment."""

CLAIMS = f"/api/v1/namespaces/{NAMESPACE}/persistentvolumeclaims"

READY: Object = {"conditions": [{"type": "Ready", "status": "True"}]}


class Patient:
    """Runs a check on an installation in which one thing has changed.

    Args:
        api: the Kubernetes API server that holds the installation.
        environment: the installation's environment.
    """

    def __init__(self, api: ApiServer, environment: Environment) -> None:
        self.api = api
        self.environment = environment
        self._reads: dict[Any, asyncio.Future[Any]] = {}

    def installation(self, server: Server | str = ABSENT_SERVER) -> Installation:
        """Return the installation without anything that was read before."""
        return Installation(self.environment, server)

    async def examine(self, checks: list[str]) -> dict[str, Finding]:
        """Return the findings of checks, by name, on the unchanged installation."""
        installation = self.installation()
        installation._reads["report"] = _known(REPORT)
        # On a busy machine all calls of kubectl at the same time take long.
        chosen = [replace(check, limit_seconds=600) for check in CHECKS if check.name in checks]
        findings = await run_checks(installation, chosen)
        self._reads = installation._reads
        return {check.name: finding for check, finding in zip(chosen, findings, strict=True)}

    async def find(self, name: str, changed: str = "", **known: Any) -> Finding:
        """Return the finding of one check.

        Args:
            name: the name of the check.
            changed: the kinds of objects that have changed in the cluster, and are read again.
            known: what is not read from the cluster: `server_values`, `pool_values`, `server_objects`, `pool_objects`,
                `server_revisions`, `pool_revisions`, `report`, `versions`, `clusters` of CloudNativePG.
        """
        installation = self.installation()
        for key, read in self._reads.items():
            if not changed or (key[0] if isinstance(key, tuple) else key) not in changed.split():
                installation._reads[key] = read
        for keyword, value in known.items():
            release, _, thing = keyword.partition("_")
            parts = {"values": "values", "objects": "release", "revisions": "revisions"}
            known_key: Any = (CLUSTERS,) if keyword == "clusters" else keyword
            if thing:
                known_key = (parts[thing], {"server": SERVER, "pool": POOL}[release])
            installation._reads[known_key] = _known(value)
        [check] = [known_check for known_check in CHECKS if known_check.name == name]
        [finding] = await run_checks(installation, [replace(check, limit_seconds=600)])
        return finding

    def values(self, release: str, **change: Any) -> Object:
        """Return the release's values with top-level keys merged in."""
        found: Object = copy.deepcopy(self._reads["values", release].result())
        for key, value in change.items():
            found[key] = found[key] | value if isinstance(value, dict) else value
        return found

    def objects(self, release: str) -> list[Object]:
        """Return a copy of the release's objects."""
        found: list[Object] = copy.deepcopy(self._reads["release", release].result())
        return found


def _known(value: Any) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


def install(api: ApiServer, folder: Path) -> Environment:
    """Install both charts with the values of the local environment, in the cluster of `folder/kubeconfig`.

    No controller runs, so hooks do not, and nothing else binds the volume of backups.
    """
    values = folder / "image.yaml"
    values.write_text(yaml.safe_dump({"image": {"tag": "1"}}))
    environment = Environment("local", "alone", NAMESPACE)
    for release in RELEASES:
        options = ["--values", str(environment.values / f"{release}.yaml"), "--values", str(values), "--no-hooks"]
        binaries.helm("--kube-context", "alone", "-n", NAMESPACE, "install", release, str(CHARTS / release), *options)
    patch(api, f"{CLAIMS}/{SERVER}-backups/status", {"status": {"phase": "Bound"}})
    return environment


def furnish(api: ApiServer) -> None:
    """Create what a cluster has, and what controllers and kubelets would create of the releases."""
    surroundings = subprocess.run(
        ["kubectl", "kustomize", str(CHARTS.parent / "k8s" / "overlays" / "local")],
        capture_output=True, text=True, check=True, env=os.environ,
    ).stdout  # fmt: skip
    for manifest in yaml.safe_load_all(surroundings):
        if manifest["kind"] == "PriorityClass":
            api.create(manifest)
        elif manifest["kind"] == "Namespace":
            for name in NAMESPACES:
                patch(api, f"/api/v1/namespaces/{name}", {"metadata": {"labels": manifest["metadata"]["labels"]}})
    create(api, "/api/v1/nodes", node("node-1"))
    create(api, "/apis/storage.k8s.io/v1/storageclasses", storage_class("local"))
    labels = {"k8s-app": "kube-dns"}
    create(api, "/api/v1/namespaces/kube-system/pods", pod("coredns", labels) | {"status": READY})
    labels = {"app.kubernetes.io/instance": SERVER, "prefect.io/role": "server"}
    create(api, f"/api/v1/namespaces/{NAMESPACE}/pods", pod("prefect-server-api-1", labels) | {"status": READY})
    create(api, CLAIMS, claim("data-prefect-server-database-0"))
    create(api, CLAIMS.replace(NAMESPACE, RUNS), claim("results-prefect-work-pool-results-0"))
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "warehouse"}}
    create(api, f"/api/v1/namespaces/{NAMESPACE}/secrets", secret | {"stringData": {"url": "u", "password": "p"}})
    create(api, f"/api/v1/namespaces/{RUNS}/secrets", secret | {"stringData": {"url": "u"}})


def create(api: ApiServer, path: str, manifest: Object) -> None:
    """Create an object with its status."""
    api.client.post(path, json=manifest).raise_for_status()
    if "status" in manifest:
        patch(api, f"{path}/{manifest['metadata']['name']}/status", {"status": manifest["status"]})


def patch(api: ApiServer, path: str, change: Object) -> None:
    """Merge a change into an object."""
    headers = {"Content-Type": "application/merge-patch+json"}
    api.client.patch(path, content=json.dumps(change), headers=headers).raise_for_status()


def delete(api: ApiServer, path: str) -> None:
    """Delete an object."""
    api.client.delete(path, params={"gracePeriodSeconds": 0, "propagationPolicy": "Background"}).raise_for_status()


def node(name: str, version: str = binaries.KUBERNETES, cpu: str = "4") -> Object:
    information = dict.fromkeys(
        ("architecture", "bootID", "containerRuntimeVersion", "kernelVersion", "kubeProxyVersion", "machineID",
         "operatingSystem", "osImage", "systemUUID"), "",
    ) | {"kubeletVersion": version}  # fmt: skip
    resources = {"cpu": cpu, "memory": "16Gi", "pods": "110"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "status": READY | {"nodeInfo": information, "allocatable": resources, "capacity": resources},
    }


def storage_class(name: str, provisioner: str = "rancher.io/local-path") -> Object:
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    metadata = {"name": name, "annotations": annotations}
    return {
        "apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": metadata, "provisioner": provisioner,
    }  # fmt: skip


def pod(name: str, labels: dict[str, str], **metadata: Any) -> Object:
    security = {
        "allowPrivilegeEscalation": False, "runAsNonRoot": True, "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }  # fmt: skip
    container = {"name": "main", "image": "image:1", "securityContext": security}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels} | metadata,
        "spec": {"containers": [container]},
    }


def claim(name: str) -> Object:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    return {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec,
        "status": {"phase": "Bound"},
    }  # fmt: skip
