"""The local environment on a real cluster: its policies, its defaults, its quotas, and access to the warehouse."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import yaml

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, images
from orchestration.settings import ROOT
from tests.cluster.namespace import Namespace, pod_object
from tests.parts import wait_until

LOCAL = ROOT / "k8s" / "overlays" / "local"
FLOW_RUN = {"prefect.io/role": "flow-run"}
UNSCHEDULABLE = {"nodeSelector": {"prefect.io/no-such": "node"}}
"""Fields of a pod that is admitted and counted, and never starts."""


@pytest.fixture(scope="module")
def overlay(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an overlay of the local environment with a new namespace and the cluster's Postgres."""
    folder = tmp_path_factory.mktemp("overlay").resolve()
    name, _, tag = images.POSTGRES.rpartition(":")
    kustomization = {
        "namespace": f"surroundings-{uuid4().hex[:8]}",
        # kustomize accepts no absolute path.
        "resources": [os.path.relpath(LOCAL, folder)],
        "images": [{"name": "postgres", "newName": name, "newTag": tag}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return folder


def _create_secret(namespace: Namespace) -> str:
    """Call the script as a person does, and return the Secret's uid and version."""
    command = [str(LOCAL / "warehouse" / "secret"), "--context", namespace.context, "--namespace", namespace.name]
    path = f"{os.environ['PATH']}:{binaries.cache() / f'kubernetes-{binaries.KUBERNETES}'}"
    subprocess.run(command, env=os.environ | {"PATH": path}, check=True)
    return namespace.kubectl("get", "secret", "warehouse", "-o", "jsonpath={.metadata.uid} {.metadata.resourceVersion}")


@pytest.fixture(scope="module")
def local(cluster: str, overlay: Path) -> Iterator[Namespace]:
    """Yield the environment with a ready warehouse. Its cluster-wide priority classes are not deleted."""
    environment = Namespace(cluster, yaml.safe_load((overlay / "kustomization.yaml").read_text())["namespace"])
    try:
        binaries.kubectl("--context", cluster, "apply", "-k", str(overlay))
        _create_secret(environment)
        environment.kubectl("rollout", "status", "statefulset/warehouse", "--timeout=300s")
        yield environment
    finally:
        binaries.kubectl(
            "--context", cluster, "delete", "namespace", environment.name, "--wait=false", "--ignore-not-found"
        )


def test_flow_runs_alone_reach_the_warehouse(local: Namespace, namespace: Namespace) -> None:
    url = {"name": "WAREHOUSE_URL", "valueFrom": {"secretKeyRef": {"name": "warehouse", "key": "url"}}}
    local.pod("run", labels=FLOW_RUN, container={"image": images.POSTGRES, "env": [url]})
    local.pod("neighbour", "python3", "-m", "http.server", "8000")
    namespace.pod("elsewhere", labels=FLOW_RUN)
    # Network policies apply to a new pod's address only after a while.
    reached = 'until pg_isready -q -t 2 -d "$WAREHOUSE_URL"; do sleep 0.2; done'
    local.kubectl("exec", "run", "--", "timeout", "180", "sh", "-c", reached)
    sql = "create table landed (day date); insert into landed values ('2013-01-01'); select count(*) from landed"
    built = local.kubectl("exec", "run", "--", "sh", "-c", f'psql "$WAREHOUSE_URL" -Atqc "{sql}"')
    assert built.strip() == "1"
    program = "copy (select 1) to program 'true'"
    with pytest.raises(ClusterError, match="permission denied to COPY to or from an external program"):
        local.kubectl("exec", "run", "--", "sh", "-c", f'psql "$WAREHOUSE_URL" -Atqc "{program}"')

    def address(pod: str) -> str:
        return local.kubectl("get", "pod", pod, "-o", "jsonpath={.status.podIP}")

    warehouse = address("warehouse-0")
    wait_until(lambda: local.connects("neighbour", "kube-dns.kube-system", 53), "DNS in the namespace")
    assert not local.connects("neighbour", warehouse, 5432), "not a flow run"
    assert not local.connects("neighbour", "kubernetes.default", 443), "DNS alone is allowed"
    assert namespace.connects("elsewhere", "kube-dns.kube-system", 53)
    assert not namespace.connects("elsewhere", warehouse, 5432), "a flow run of another namespace"
    wait_until(lambda: local.connects("neighbour", "127.0.0.1", 8000), "the neighbour's server")
    assert not namespace.connects("elsewhere", address("neighbour"), 8000), "a pod accepts no connection by default"


def test_privileged_pod_is_refused(local: Namespace) -> None:
    with pytest.raises(ClusterError, match=r'violates PodSecurity "restricted:v1\.33": privileged'):
        local.pod("root", container={"securityContext": {"privileged": True}})


def test_containers_get_default_resources_and_too_much_memory_is_refused(local: Namespace) -> None:
    local.pod("plain", container={"resources": {}}, ready=False, **UNSCHEDULABLE)
    resources = json.loads(local.kubectl("get", "pod", "plain", "-o", "jsonpath={.spec.containers[0].resources}"))
    assert resources == {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "512Mi"}}
    with pytest.raises(ClusterError, match="maximum memory usage per Container is 2Gi"):
        local.pod("greedy", container={"resources": {"limits": {"memory": "3Gi"}}}, ready=False, **UNSCHEDULABLE)


def test_quota_limits_runs_and_not_the_server(local: Namespace) -> None:
    most = int(local.kubectl("get", "quota", "runs", "-o", "jsonpath={.spec.hard.pods}"))
    local.kubectl("wait", "--for=jsonpath={.status.hard.pods}=" + str(most), "quota/runs", "--timeout=180s")
    fields = {"labels": FLOW_RUN, "priorityClassName": "prefect-runs"} | UNSCHEDULABLE
    local.apply(*(pod_object(f"burst-{number}", **fields) for number in range(most)))
    with pytest.raises(ClusterError, match=f"exceeded quota: runs, requested: pods=1, used: pods={most}"):
        local.pod("one-too-many", ready=False, **fields)
    local.pod("server", priorityClassName="prefect-control", ready=False, **UNSCHEDULABLE)
    local.kubectl("delete", "pod", "burst-0")
    local.kubectl("wait", "--for=jsonpath={.status.used.pods}=" + str(most - 1), "quota/runs", "--timeout=180s")
    local.pod("one-too-many", ready=False, **fields)


def test_services_open_no_port_outside_the_cluster(local: Namespace) -> None:
    for kind in ("NodePort", "LoadBalancer"):
        with pytest.raises(ClusterError, match="exceeded quota: objects"):
            local.apply({
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "open"},
                "spec": {"type": kind, "ports": [{"port": 80}]},
            })  # fmt: skip


def test_second_apply_changes_nothing_and_keeps_the_password(local: Namespace, overlay: Path) -> None:
    secret, warehouse = (
        _create_secret(local),
        local.kubectl("get", "pod", "warehouse-0", "-o", "jsonpath={.metadata.uid}"),
    )
    changes = binaries.kubectl("--context", local.context, "diff", "-k", str(overlay))
    assert not changes, changes
    binaries.kubectl("--context", local.context, "apply", "-k", str(overlay))
    assert _create_secret(local) == secret
    assert local.kubectl("get", "pod", "warehouse-0", "-o", "jsonpath={.metadata.uid}") == warehouse
