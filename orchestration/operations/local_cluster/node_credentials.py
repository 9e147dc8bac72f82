"""Certificates and kubeconfigs of the local node, and its context in the person's kubeconfig."""

import base64
import contextlib
import os
from pathlib import Path
from typing import Any

import yaml

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, certificates
from orchestration.operations.local_cluster.node_layout import API_IP, CONTEXT, FIRST, KUBECONFIG, NODES, STATE


def make_credentials() -> None:
    """Make the certificate of each component, and a kubeconfig for each client of the API."""
    authority = certificates.Authority(STATE / "pki")
    names = [f"kubernetes{suffix}" for suffix in ("", ".default", ".default.svc", ".default.svc.cluster.local")]
    authority.issue("apiserver", "kube-apiserver", hosts=[*names, "localhost", API_IP, FIRST.ip, "127.0.0.1"])
    for node in NODES:
        authority.issue(f"kubelet{node.suffix}", f"system:node:{node.name}", "system:nodes", hosts=[node.name, node.ip])
    authority.issue("controllers", "system:kube-controller-manager")
    authority.issue("scheduler", "system:kube-scheduler")
    authority.issue("proxy", "system:kube-proxy")
    authority.issue("admin", "admin", "system:masters")
    certificates.write_signing_key(STATE / "pki" / "service-accounts.key")
    for name in ("kubelet", "kubelet-2", "controllers", "scheduler", "proxy", "admin"):
        _write_kubeconfig(name)


def _write_kubeconfig(name: str) -> None:
    def encoded(file: str) -> str:
        return base64.b64encode((STATE / "pki" / file).read_bytes()).decode()

    cluster = {"server": f"https://{FIRST.ip}:6443", "certificate-authority-data": encoded("ca.crt")}
    user = {"client-certificate-data": encoded(f"{name}.crt"), "client-key-data": encoded(f"{name}.key")}
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": CONTEXT, "cluster": cluster}],
        "users": [{"name": CONTEXT, "user": user}],
        "contexts": [{"name": CONTEXT, "context": {"cluster": CONTEXT, "user": CONTEXT}}],
        "current-context": CONTEXT,
    }
    path = STATE / "pki" / f"{name}.kubeconfig"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(content))


def publish_context() -> None:
    """Add the node's context to the person's kubeconfig. The current context stays."""
    target = Path(os.environ.get("KUBECONFIG", "").split(os.pathsep)[0] or Path.home() / ".kube" / "config")
    known: dict[str, Any] = (yaml.safe_load(target.read_text()) if target.exists() else None) or {}
    added = yaml.safe_load(KUBECONFIG.read_text())
    known = {"apiVersion": "v1", "kind": "Config", "preferences": {}, "current-context": CONTEXT} | known
    for part in ("clusters", "users", "contexts"):
        others = [entry for entry in known.get(part) or [] if entry["name"] != CONTEXT]
        known[part] = others + added[part]
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = target.with_name(f".{target.name}.new")
    fresh.touch(mode=0o600)
    fresh.write_text(yaml.safe_dump(known))
    fresh.replace(target)


def remove_context() -> None:
    """Remove the node's context from the person's kubeconfig."""
    for part in ("context", "cluster", "user"):
        with contextlib.suppress(ClusterError):  # it does not exist
            binaries.kubectl("config", f"delete-{part}", CONTEXT)
