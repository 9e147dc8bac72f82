"""Tests of the cluster's identity, by which a reconciler knows its runs, on a real cluster."""

import asyncio
from pathlib import Path

import httpx
import pytest

from orchestration.protocol import CLUSTER_LABEL
from orchestration.reconciler import kubernetes_client as kubernetes
from orchestration.reconciler.kubernetes_client import Cluster, certificate_hash
from orchestration.reconciler.model import Run
from tests.cluster.namespace import Namespace, proxied
from tests.orchestration.reconciler.test_decide import NOW


def run(mark: str) -> Run:
    return Run("r", "RUNNING", "Running", "s", NOW, namespace="ns", job="job-1", labels={CLUSTER_LABEL: mark})


def test_rotated_certificate_authority_orphans_no_run(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that an older version labelled are known until the CA is rotated. `kubectl proxy` has no certificate."""
    uid = namespace.kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}")
    monkeypatch.setattr(kubernetes, "ACCOUNT", tmp_path)

    async def identities(url: str) -> list[frozenset[str]]:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            there, found = Cluster(client, namespace.name), []
            for certificate in ("", "old", "new"):
                if certificate:
                    (tmp_path / "ca.crt").write_text(certificate)
                found.append(await there.identities())
            assert await there.identity() == uid
            return found

    with proxied(namespace.context) as url:
        outside, before, after = asyncio.run(identities(url))
    (tmp_path / "ca.crt").write_text("old")
    labelled_before, elsewhere = run(certificate_hash()), run("another-uid")
    for identity in (outside, before, after):
        assert run(uid).belongs_to(identity, "ns")
        assert not elsewhere.belongs_to(identity, "ns")
    assert labelled_before.belongs_to(before, "ns")
    assert not labelled_before.belongs_to(after, "ns")


def test_cluster_with_unreadable_uid_has_certificate_hash_as_identity(
    namespace: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kubernetes, "ACCOUNT", tmp_path)
    (tmp_path / "ca.crt").write_text("ca")

    async def identity(url: str) -> str:
        # An account without any permission.
        headers = {"Impersonate-User": f"system:serviceaccount:{namespace.name}:default"}
        async with httpx.AsyncClient(base_url=url, timeout=30, headers=headers) as client:
            return await Cluster(client, namespace.name).identity()

    with proxied(namespace.context) as url:
        assert asyncio.run(identity(url)) == certificate_hash()
    assert "kube-system is not allowed" in caplog.text
