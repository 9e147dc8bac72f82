"""Start a Kubernetes API server without a cluster, to test what Kubernetes accepts. It needs seconds and no root."""

import contextlib
import json
import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from orchestration.operations.local_cluster import binaries, certificates
from tests.parts import end_process, free_port, wait_until

NAMESPACE = "prefect"

NAMESPACES = (NAMESPACE, f"{NAMESPACE}-runs")
"""The namespaces of the server."""

ABSENT_OBJECTS = ("ServiceAccount", "Priority", "RuntimeClass", "StorageObjectInUseProtection")
"""Admission plugins that require objects of an installation, such as a PriorityClass. They are disabled."""


class ApiServer:
    """Asks a Kubernetes API server whether it takes an object.

    Args:
        client: a client of the server, as its administrator.
        folder: the state of the server, with a `kubeconfig`.
    """

    def __init__(self, client: httpx.Client, folder: Path) -> None:
        self.client = client
        self.folder = folder
        self._paths: dict[tuple[str, str], str] = {}

    def refusal(self, manifest: str | dict[str, Any]) -> str | None:
        """Return why the server refuses to create an object; None if it accepts the object.

        Args:
            manifest: the object, or its YAML as Helm sends it. It is created in `NAMESPACE` if it names no namespace.
        """
        found = yaml.load(manifest, yaml.CSafeLoader) if isinstance(manifest, str) else manifest
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        answer = self.client.post(
            self._path(found),
            params={"dryRun": "All", "fieldValidation": "Strict"},
            content=text.encode(),
            headers={"Content-Type": "application/yaml" if isinstance(manifest, str) else "application/json"},
        )
        if answer.is_success:
            return None
        return f"{found['kind']}/{found['metadata'].get('name')}: {answer.json()['message']}"

    def create(self, manifest: dict[str, Any]) -> None:
        """Create an object."""
        self.client.post(self._path(manifest), json=manifest).raise_for_status()

    def delete(self, manifest: dict[str, Any]) -> None:
        """Delete an object."""
        self.client.delete(f"{self._path(manifest)}/{manifest['metadata']['name']}").raise_for_status()

    def clear(self) -> None:
        """Delete all objects of `NAMESPACES`, and those that Helm made outside of namespaces, for the next test.

        No controller runs, so that the server deletes them at once.
        """
        groups = self.client.get("/apis").raise_for_status().json()["groups"]
        for path in ("/api/v1", *(f"/apis/{group['preferredVersion']['groupVersion']}" for group in groups)):
            for resource in self.client.get(path).raise_for_status().json()["resources"]:
                if "deletecollection" in resource["verbs"]:
                    self._delete_all(path, resource)
        for name in NAMESPACES:
            labels = {"metadata": {"$patch": "replace", "name": name, "labels": {"kubernetes.io/metadata.name": name}}}
            content = {"Content-Type": "application/strategic-merge-patch+json"}
            self.client.patch(f"/api/v1/namespaces/{name}", json=labels, headers=content).raise_for_status()

    def _delete_all(self, path: str, resource: dict[str, Any]) -> None:
        options: dict[str, Any] = {"gracePeriodSeconds": 0, "propagationPolicy": "Background"}
        if resource["namespaced"]:
            for name in NAMESPACES:
                found = self.client.delete(f"{path}/namespaces/{name}/{resource['name']}", params=options)
                found.raise_for_status()
        else:
            options["labelSelector"] = "app.kubernetes.io/managed-by=Helm"
            self.client.delete(f"{path}/{resource['name']}", params=options).raise_for_status()

    def kubeconfig(self, folder: Path) -> Path:
        """Write a kubeconfig of the administrator, and return its path.

        Args:
            folder: the state of the server.
        """
        pki = folder / "pki"
        user = {"client-certificate": f"{pki}/admin.crt", "client-key": f"{pki}/admin.key"}
        cluster = {"server": str(self.client.base_url), "certificate-authority": f"{pki}/ca.crt"}
        file = folder / "kubeconfig"
        file.write_text(
            yaml.safe_dump({
                "users": [{"name": "admin", "user": user}],
                "clusters": [{"name": "alone", "cluster": cluster}],
                "contexts": [{"name": "alone", "context": {"cluster": "alone", "user": "admin"}}],
                "current-context": "alone",
            })
        )  # fmt: skip
        return file

    def _path(self, manifest: dict[str, Any]) -> str:
        version, kind = manifest["apiVersion"], manifest["kind"]
        if (version, kind) not in self._paths:
            group = f"/apis/{version}" if "/" in version else f"/api/{version}"
            for resource in self.client.get(group).raise_for_status().json()["resources"]:
                if "/" not in resource["name"]:
                    place = "/namespaces/{}" if resource["namespaced"] else ""
                    self._paths[version, resource["kind"]] = f"{group}{place}/{resource['name']}"
        return self._paths[version, kind].format(manifest["metadata"].get("namespace", NAMESPACE))


@contextlib.contextmanager
def alone(folder: Path, authorization: str = "AlwaysAllow") -> Iterator[ApiServer]:
    """Run an API server and its etcd while the block lasts, with their state in `folder`.

    Args:
        folder: an empty folder. It gets a `kubeconfig` with the context `alone`.
        authorization: the authorization mode: AlwaysAllow or RBAC.
    """
    needed = {"etcd": binaries.PACKAGES["etcd"]}
    binaries.install_packages(needed)
    kube = str(binaries.kube())
    pki = folder / "pki"
    authority = certificates.Authority(pki)
    authority.issue("server", "kube-apiserver", hosts=["127.0.0.1"])
    authority.issue("admin", "admin", "system:masters")
    certificates.write_signing_key(pki / "accounts.key")
    store, peers, port = (free_port() for _ in range(3))
    etcd = [
        "etcd", "--data-dir", str(folder / "etcd"), "--listen-client-urls", f"http://127.0.0.1:{store}",
        "--advertise-client-urls", f"http://127.0.0.1:{store}", "--listen-peer-urls", f"http://127.0.0.1:{peers}",
        "--initial-advertise-peer-urls", f"http://127.0.0.1:{peers}",
        "--initial-cluster", f"default=http://127.0.0.1:{peers}", "--unsafe-no-fsync",
    ]  # fmt: skip
    server = [
        kube, "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{store}", "--bind-address=127.0.0.1",
        f"--secure-port={port}", f"--tls-cert-file={pki}/server.crt", f"--tls-private-key-file={pki}/server.key",
        f"--client-ca-file={pki}/ca.crt", "--service-cluster-ip-range=10.96.0.0/16,fd00::/112",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki}/accounts.key", f"--service-account-signing-key-file={pki}/accounts.key",
        f"--authorization-mode={authorization}", "--allow-privileged", "--endpoint-reconciler-type=none",
        f"--disable-admission-plugins={','.join(ABSENT_OBJECTS)}",
    ]  # fmt: skip
    (folder / "kubeconfig").write_text(yaml.safe_dump(_kubeconfig(pki, port)))
    context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
    context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
    with (
        _running(etcd, folder / "etcd.log"),
        _running(server, folder / "kube-apiserver.log"),
        httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, timeout=30) as client,
    ):
        wait_until(lambda: _ready(client), f"a Kubernetes API server; see {folder}/kube-apiserver.log")
        found = ApiServer(client, folder)
        for name in NAMESPACES:
            found.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        yield found


def _kubeconfig(pki: Path, port: int) -> dict[str, Any]:
    cluster = {"server": f"https://127.0.0.1:{port}", "certificate-authority": f"{pki}/ca.crt"}
    user = {"client-certificate": f"{pki}/admin.crt", "client-key": f"{pki}/admin.key"}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "alone", "cluster": cluster}],
        "users": [{"name": "admin", "user": user}],
        "contexts": [{"name": "alone", "context": {"cluster": "alone", "user": "admin"}}],
    }


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[None]:
    environment = binaries.LONG_LIVED | os.environ
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
        try:
            yield
        finally:
            end_process(process)


def _ready(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/readyz").text == "ok"
    return False
