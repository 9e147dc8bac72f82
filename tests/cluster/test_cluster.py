"""The local cluster has what charts and flow runs rely on."""

import json
from typing import Any

import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import __main__ as command
from orchestration.operations.local_cluster import binaries, images, node_layout
from tests.cluster.namespace import Namespace, network_policy
from tests.parts import wait_until


@pytest.mark.further
def test_service_is_reached_by_name_and_logs_its_requests(namespace: Namespace) -> None:
    namespace.serve()
    namespace.pod("client")
    wait_until(lambda: namespace.connects("client", "server", 80), "the service to be reached")
    code = "from urllib.request import urlopen; print(urlopen('http://server', timeout=60).status)"
    assert namespace.python("client", code).strip() == "200"
    full = f"server.{namespace.name}.svc.cluster.local"
    assert namespace.connects("client", full, 80)
    assert not namespace.connects("client", "nobody", 80)
    wait_until(lambda: '"GET / HTTP/1.1" 200' in namespace.kubectl("logs", "server"), "the request in the log")


@pytest.mark.further
def test_ingress_policy_allows_only_the_named_pods(namespace: Namespace) -> None:
    namespace.serve()
    namespace.pod("friend")
    namespace.pod("stranger")
    wait_until(lambda: namespace.connects("stranger", "server", 80), "the service to be reached")

    allow = [{"from": [{"podSelector": {"matchLabels": {"app": "friend"}}}], "ports": [{"port": 8000}]}]
    namespace.apply(network_policy("friends-only", pod="server", ingress=allow))
    wait_until(lambda: not namespace.connects("stranger", "server", 80), "the policy to be enforced")
    assert namespace.connects("friend", "server", 80)
    assert namespace.connects("stranger", "kube-dns.kube-system", 53), "the policy selects no other pod"

    namespace.kubectl("delete", "networkpolicy", "friends-only")
    wait_until(lambda: namespace.connects("stranger", "server", 80), "the policy to be gone")


def test_egress_policy_allows_only_the_named_peers(namespace: Namespace) -> None:
    namespace.serve()
    namespace.pod("client")
    address = namespace.kubectl("get", "pod", "server", "-o", "jsonpath={.status.podIP}")
    namespace.apply(network_policy("deny", pod="client", egress=[]))
    wait_until(lambda: not namespace.connects("client", address, 8000), "the policy to be enforced")
    assert not namespace.connects("client", "kubernetes.default", 443), "neither names nor the API"
    assert not namespace.connects(
        "client", node_layout.API_IP if namespace.context == node_layout.CONTEXT else address, 443
    )

    dns = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    ports = [{"protocol": "UDP", "port": 53}, {"protocol": "UDP", "port": "dns"}]
    to_server = {"to": [{"podSelector": {"matchLabels": {"app": "server"}}}]}
    namespace.apply(network_policy("deny", pod="client", egress=[{"to": [dns], "ports": ports}, to_server]))
    wait_until(lambda: namespace.connects("client", "server", 80), "names and the server to be reached")
    assert not namespace.connects("client", "kubernetes.default", 443)


def test_volume_honours_fsgroup_outlives_its_pod_and_is_deleted_with_its_claim(namespace: Namespace) -> None:
    claim: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    namespace.apply(claim)
    mounted: dict[str, Any] = {
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
        "securityContext": {"fsGroup": 2000},
        "container": {"volumeMounts": [{"name": "data", "mountPath": "/data"}]},
    }
    namespace.pod("writer", **mounted)
    namespace.python("writer", "open('/data/kept', 'w').write('here')")
    assert namespace.python("writer", "import os; print(os.stat('/data').st_gid)").strip() == "2000"
    namespace.kubectl("delete", "pod", "writer")
    namespace.pod("reader", **mounted)
    assert namespace.python("reader", "print(open('/data/kept').read())").strip() == "here"
    volume = namespace.kubectl("get", "pvc", "data", "-o", "jsonpath={.spec.volumeName}")
    namespace.kubectl("delete", "pod/reader", "pvc/data")

    def gone() -> bool:
        return volume not in namespace.kubectl("get", "pv", "-o", "name")

    wait_until(gone, "the volume to be deleted")
    if namespace.context == node_layout.CONTEXT:
        assert not (node_layout.STATE / "volumes" / volume).exists()


@pytest.mark.further
def test_pushed_image_is_pulled_by_digest_and_a_missing_one_fails(namespace: Namespace) -> None:
    image = f"{images.REGISTRY}/test:{namespace.name}"
    container = binaries.run(["buildah", "from", images.BASE]).strip()
    try:
        binaries.run(["buildah", "config", "--label", f"test={namespace.name}", container])
        binaries.run(["buildah", "commit", "-q", container, image])
        digest = images.push_image(image)
        namespace.pod("pulled", container={"image": f"{images.REGISTRY}/test@{digest}"})
    finally:
        binaries.run(["buildah", "rm", container])
        binaries.run(["buildah", "rmi", image])
    namespace.pod("absent", container={"image": f"{images.REGISTRY}/test:absent"}, ready=False)
    waiting = "jsonpath={.status.containerStatuses[0].state.waiting.reason}"
    reasons = ("ErrImagePull", "ImagePullBackOff")
    wait_until(lambda: namespace.kubectl("get", "pod", "absent", "-o", waiting) in reasons, "the pull to fail")


@pytest.mark.further
def test_restricted_standard_is_enforced(namespace: Namespace) -> None:
    namespace.kubectl("label", "namespace", namespace.name, "pod-security.kubernetes.io/enforce=restricted")
    with pytest.raises(ClusterError, match="violates PodSecurity"):
        namespace.pod("root", container={"securityContext": {"runAsUser": 0}})
    namespace.pod("plain")


@pytest.mark.further
def test_memory_over_the_limit_is_oom_killed(namespace: Namespace) -> None:
    namespace.pod("greedy", "python3", "-c", "len(b'x' * 2**30)", ready=False, restartPolicy="Never")

    def ended() -> dict[str, Any]:
        pod: dict[str, Any] = json.loads(namespace.kubectl("get", "pod", "greedy", "-o", "json"))
        states = pod["status"].get("containerStatuses") or [{}]
        found: dict[str, Any] = states[0].get("state", {}).get("terminated", {})
        return found

    assert wait_until(ended, "the container to end")["reason"] == "OOMKilled"


def test_kubectl_top_shows_usage(namespace: Namespace) -> None:
    if namespace.context != node_layout.CONTEXT:
        pytest.skip("kind comes without metrics-server")

    def usage() -> str:
        try:
            return namespace.kubectl("top", "pod", "-n", "kube-system", "--no-headers")
        except ClusterError:
            return ""

    wait_until(lambda: "coredns" in usage(), "metrics of CoreDNS")


@pytest.mark.parametrize("action", ["up", "down"])
def test_named_context_is_not_changed(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    binaries.kubectl_program()  # where it is not here, CLUSTER=none builds none
    monkeypatch.delenv("CLUSTER", raising=False)
    elsewhere = tmp_path / "config"
    elsewhere.write_text("apiVersion: v1\nkind: Config\n")
    monkeypatch.setenv("KUBECONFIG", str(elsewhere))
    monkeypatch.setenv("KUBE_CONTEXT", "production")
    assert command.main([action]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "production" in message
    assert ("kubectl config get-contexts" if action == "up" else "was not made here") in message


def test_error_says_why_no_cluster_can_be_made(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KUBE_CONTEXT", raising=False)
    monkeypatch.delenv("CLUSTER", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    assert command.main(["up"]) == 1
    assert "there is no Go to build Kubernetes with" in capsys.readouterr().err
