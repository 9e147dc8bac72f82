"""The rendered work pool chart: default objects, effects of values, refused values."""

import asyncio
import base64
import copy
import inspect
import json
import re
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import prefect_kubernetes.observer
import prefect_kubernetes.worker
import pytest
import yaml
from prefect_kubernetes.worker import KubernetesWorker, KubernetesWorkerJobConfiguration

from orchestration.deployments.resources import FILE_SYSTEM, KINDS, POOL
from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries
from orchestration.protocol import WARM_LABEL
from orchestration.reconciler import kubernetes_client
from orchestration.reconciler.budget import RetryBudget
from orchestration.reconciler.leader_election import LeaderElection
from orchestration.reconciler.model import Pod
from orchestration.settings import ROOT
from orchestration.worker import kubernetes_worker, warm_pods
from tests.helm.rendering import (
    EVERY_POD,
    POD_RULES,
    RESOURCE_RULES,
    Object,
    environment,
    inventory,
    one,
    one_in_four,
    pod_specs,
    render,
)

TAG: Object = {"image": {"tag": "src-0123456789ab"}}

# All features together. Kubernetes must accept the rendered objects.
MAXIMAL: Object = {
    "image": {"tag": "1", "pullSecrets": ["registry"], "pullPolicy": "Always"},
    "fullnameOverride": "pool",
    "commonLabels": {"team": "data"},
    "commonAnnotations": {"owner": "{{ .Release.Name }}"},
    "api": {
        "url": "https://{{ .Release.Name }}.example.com/api",
        "auth": {"existingSecret": "auth", "key": "user"},
        "tls": {"caSecret": "api-ca", "caKey": "tls-ca-bundle.pem"},
    },
    "pool": {
        "name": "etl",
        "description": "All of it",
        "concurrencyLimit": 7,
        "queues": [{"name": "urgent", "priority": 1, "concurrencyLimit": 2, "description": "now"}, {"name": "later"}],
    },
    "settings": {"PREFECT_LOGGING_LEVEL": "INFO", "PREFECT_CLIENT_MAX_RETRIES": 9},
    "env": [{"name": "FROM_SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
    "envFrom": [{"secretRef": {"name": "all-settings"}}],
    "pod": EVERY_POD | {"sidecars": [{"name": "proxy", "image": "proxy:1"}]},
    "worker": {
        "replicas": 3,
        "queues": ["urgent", "later"],
        "limit": 20,
        "http2": False,
        "querySeconds": 3,
        "prefetchSeconds": 15,
        "heartbeatSeconds": 20,
        "extraArgs": ["--name", "first"],
        "settings": {"PREFECT_LOGGING_LEVEL": "DEBUG"},
        "lifecycle": {"preStop": {"sleep": {"seconds": 1}}},
        "autoscaling": {"enabled": True, "behavior": {"scaleDown": {"stabilizationWindowSeconds": 60}}},
        "podDisruptionBudget": {"minAvailable": "50%"},
        "serviceAccount": {"name": "launcher", "annotations": {"e": "f"}},
        "rbac": {"extraRules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["create"]}]},
        "pod": {"sidecars": [{"name": "proxy", "image": "proxy:1"}]},
    },
    "runs": {
        "image": {"repository": "flows", "tag": "2", "pullPolicy": "Never"},
        "labels": {"cost": "flows"},
        "annotations": {"g": "h"},
        "resources": {
            "requests": {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "1Gi"},
            "limits": {"cpu": "2", "memory": "4Gi", "ephemeral-storage": "20Gi"},
        },
        "settings": {"PREFECT_LOGGING_LEVEL": "WARNING"},
        "env": [{"name": "WAREHOUSE_URL", "valueFrom": {"secretKeyRef": {"name": "warehouse", "key": "url"}}}],
        "envFrom": [{"configMapRef": {"name": "flows"}}],
        "ttlSecondsAfterFinished": 60,
        "activeDeadlineSeconds": 3600,
        "backoffLimit": 1,
        "terminationGracePeriodSeconds": 90,
        "serviceAccount": {"name": "runner", "automountToken": True},
        "results": {"storage": "volume"},
        "pod": {"nodeSelector": {"workload": "flows"}, "priorityClassName": "runs"},
        "variables": {"gpu": {"type": "integer", "default": 0}},
        "baseJobTemplate": {"job_configuration": {"job_manifest": {"spec": {"suspend": False}}}},
    },
    "sync": {
        "files": ["prefect.yaml", "/more/teams.yaml"],
        "owner": "the data team",
        "settings": {"PREFECT_LOGGING_LEVEL": "ERROR"},
        "pod": {
            "volumes": [{"name": "more", "configMap": {"name": "more"}}],
            "volumeMounts": [{"name": "more", "mountPath": "/more"}],
        },
    },
    "drift": {
        "everySeconds": 60,
        "settings": {"PREFECT_LOGGING_LEVEL": "WARNING"},
        "resources": {"requests": {"memory": "256Mi"}},
        "pod": {"sidecars": [{"name": "proxy", "image": "proxy:1"}]},
    },
    "reconciler": {
        "everySeconds": 3,
        "settings": {"PREFECT_LOGGING_LEVEL": "ERROR"},
        "serviceAccount": {"name": "judge"},
        "rbac": {"extraRules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["list"]}]},
    },
    "networkPolicy": {
        "api": {"namespaceLabels": {"kubernetes.io/metadata.name": "prefect"}, "cidrs": ["192.0.2.1/32"]},
        "kubernetesCIDRs": ["10.0.0.1/32"],
        "egressCIDRs": ["10.0.0.0/8"],
        "extraEgress": [{"to": [{"ipBlock": {"cidr": "198.51.100.0/24"}}]}],
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
    },
    "extraObjects": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}, "data": {"of": "{{ .Release.Name }}"}},
    ],
}


def _with(**values: Any) -> Object:
    """Return minimal values with these top-level keys: `_with(worker={"replicas": 2})`."""
    return copy.deepcopy(TAG) | values


def _synced(objects: list[Object]) -> Object:
    """Return the content of pool.yaml, which the release's sync Job applies to the server."""
    [found] = [
        manifest
        for manifest in objects
        if manifest["kind"] == "ConfigMap" and manifest["metadata"]["name"].endswith("-sync")
    ]
    return dict(yaml.safe_load(found["data"]["pool.yaml"]))


def pool_of(objects: list[Object]) -> Object:
    """Return the pool that a release's sync Job applies to the server."""
    [pool] = _synced(objects)["work_pools"]
    return dict(pool)


def _pool(values: Object) -> Object:
    return pool_of(render("prefect-work-pool", values))


def _job(pool: Object, **variables: Any) -> Object:
    """Return the Job of a run with these job variables, by Prefect's templating."""
    from prefect.utilities.templating import apply_values

    template = pool["base_job_template"]
    properties = template["variables"]["properties"].items()
    defaults = {name: rule["default"] for name, rule in properties if rule.get("default") is not None}
    values = defaults | variables
    configuration = apply_values(template["job_configuration"], values)
    manifest: Object = KubernetesWorkerJobConfiguration(**configuration).job_manifest
    return manifest


def test_default_values_render_the_expected_objects() -> None:
    assert inventory(render("prefect-work-pool", TAG)) == [
        "ClusterRole/prefect:test-prefect-work-pool",
        "ClusterRoleBinding/prefect:test-prefect-work-pool",
        "ConfigMap/test-prefect-work-pool-sync",
        "ConfigMap/test-prefect-work-pool-worker",
        "Deployment/test-prefect-work-pool-drift",
        "Deployment/test-prefect-work-pool-reconciler",
        "Deployment/test-prefect-work-pool-worker",
        "Job/test-prefect-work-pool-sync",
        "NetworkPolicy/test-prefect-work-pool-drift",
        "NetworkPolicy/test-prefect-work-pool-reconciler",
        "NetworkPolicy/test-prefect-work-pool-runs",
        "NetworkPolicy/test-prefect-work-pool-sync",
        "NetworkPolicy/test-prefect-work-pool-test",
        "NetworkPolicy/test-prefect-work-pool-worker",
        "Pod/test-prefect-work-pool-test",
        "PodDisruptionBudget/test-prefect-work-pool-reconciler",
        "Role/test-prefect-work-pool-reconciler",
        "Role/test-prefect-work-pool-reconciler-lease",
        "Role/test-prefect-work-pool-worker",
        "RoleBinding/test-prefect-work-pool-reconciler",
        "RoleBinding/test-prefect-work-pool-reconciler-lease",
        "RoleBinding/test-prefect-work-pool-worker",
        "ServiceAccount/test-prefect-work-pool-drift",
        "ServiceAccount/test-prefect-work-pool-reconciler",
        "ServiceAccount/test-prefect-work-pool-runs",
        "ServiceAccount/test-prefect-work-pool-sync",
        "ServiceAccount/test-prefect-work-pool-test",
        "ServiceAccount/test-prefect-work-pool-worker",
        "ValidatingAdmissionPolicy/prefect-test-prefect-work-pool-worker",
        "ValidatingAdmissionPolicyBinding/prefect-test-prefect-work-pool-worker",
    ]


def test_all_features_render_together() -> None:
    objects = render("prefect-work-pool", MAXIMAL)
    assert {"HorizontalPodAutoscaler/pool-worker", "PodDisruptionBudget/pool-worker", "ConfigMap/more",
            "ServiceAccount/launcher", "ServiceAccount/runner"} <= set(inventory(objects))  # fmt: skip
    for manifest in objects:
        if manifest["metadata"]["name"] != "more":
            assert manifest["metadata"]["labels"]["team"] == "data"
            assert manifest["metadata"]["annotations"]["owner"] == "test"
    worker = pod_specs(objects)["Deployment/pool-worker"]
    assert [container["name"] for container in worker["containers"]] == ["worker", "proxy"]
    assert worker["serviceAccountName"] == "launcher"
    assert worker["containers"][0]["args"] == [
        "python", "-m", "orchestration.worker", "--pool", "etl",
        "--name", "$(POD_NAME)", "--namespace", "$(NAMESPACE)",
        "--queue", "urgent", "--queue", "later", "--limit", "20",
        "--template", "/etc/prefect-pool/base-job-template.json",
        "--signing-key", "/etc/prefect-results/signing-key", "--name", "first",
    ]  # fmt: skip
    variables = environment(worker["containers"][0])
    assert variables["PREFECT_API_URL"] == "https://test.example.com/api"
    assert variables["PREFECT_LOGGING_LEVEL"] == "DEBUG"
    assert variables["PREFECT_WORKER_PREFETCH_SECONDS"] == "15"
    assert variables["PREFECT_API_ENABLE_HTTP2"] == "false"


def test_worker_role_has_only_the_needed_verbs() -> None:
    objects = render("prefect-work-pool", TAG)
    [cluster_role] = [manifest for manifest in objects if manifest["kind"] == "ClusterRole"]
    assert cluster_role["rules"] == [
        {"apiGroups": [""], "resources": ["namespaces"], "resourceNames": ["kube-system"], "verbs": ["get"]}
    ], "the only cluster-wide permission: to identify the cluster"
    [binding] = [manifest for manifest in objects if manifest["kind"] == "ClusterRoleBinding"]
    accounts = [f"test-prefect-work-pool-{component}" for component in ("worker", "reconciler")]
    assert [(account["name"], account["namespace"]) for account in binding["subjects"]] == [
        (n, "prefect") for n in accounts
    ]
    without = inventory(render("prefect-work-pool", _with(clusterRole={"create": False})))
    assert not [name for name in without if name.startswith("Cluster")]
    assert one(objects, "Role", "test-prefect-work-pool-worker")["rules"] == [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "delete"]},
    ]
    observer = {"PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED": True}
    for values in (_with(reconciler={"enabled": False}), _with(worker={"settings": observer})):
        assert one(render("prefect-work-pool", values), "Role", "test-prefect-work-pool-worker")["rules"] == [
            {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "watch", "delete"]},
            {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]},
            {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        ]
    [subject] = one(objects, "RoleBinding", "test-prefect-work-pool-worker")["subjects"]
    assert subject["name"] == "test-prefect-work-pool-worker"


def test_warm_pods_let_the_worker_label_pods_and_change_nothing_else() -> None:
    """The test of `warm_pods` covers what the worker asks. Without warm pods nothing of this is rendered."""
    values = _with(runs={"warm": {"replicas": 2, "maxAgeSeconds": 300}})
    objects = render("prefect-work-pool", values)
    assert one(objects, "Role", "test-prefect-work-pool-worker")["rules"] == [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "list", "patch", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "patch"]},
    ]
    name = "prefect-test-prefect-work-pool-worker"
    validation, _ = one(objects, "ValidatingAdmissionPolicy", f"{name}-pods")["spec"]["validations"]
    assert (
        f"object.spec == oldObject.spec && has(oldObject.metadata.labels) && '{WARM_LABEL}' in"
        in (validation["expression"])
    )
    [container] = one(objects, "Deployment", "test-prefect-work-pool-worker")["spec"]["template"]["spec"]["containers"]
    assert container["args"][-4:] == ["--warm", "2", "--warm-max-age", "300"]
    jobs = one(objects, "ValidatingAdmissionPolicy", name)["spec"]["validations"]
    assert any(f'"{warm_pods.VOLUME}"' in rule["expression"] for rule in jobs)
    usual = render("prefect-work-pool", TAG)
    assert f"ValidatingAdmissionPolicy/{name}-pods" not in inventory(usual)
    assert "warm" not in str(usual)
    assert warm_pods.VOLUME not in str(usual)


def _permissions(role: Object) -> set[tuple[str, str]]:
    """Return what a Role permits as pairs of a resource and a verb."""
    return {(resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]}


def _calls(source: str) -> set[tuple[str, str]]:
    """Return the calls of Kubernetes' client in a source text as pairs of a resource and a verb."""
    found = set(re.findall(r"\.(create|read|list|delete|patch|replace)_namespaced_(\w+)\(", source))
    verbs = {"read": "get", "replace": "update"}
    return {(f"{resource}s".replace("pod_logs", "pods/log"), verbs.get(verb, verb)) for verb, resource in found}


def test_worker_role_is_what_the_worker_calls() -> None:
    """With a newer prefect-kubernetes that calls more, this test fails before the worker does."""
    upstream = _calls(inspect.getsource(prefect_kubernetes.worker))
    # Only with the setting `create_secret_for_api_key`, which the chart does not set.
    upstream = {(resource, verb) for resource, verb in upstream if resource != "secrets"}
    calls = upstream | _calls(inspect.getsource(kubernetes_worker))
    name = "test-prefect-work-pool-worker"
    assert _permissions(one(render("prefect-work-pool", TAG), "Role", name)) == calls
    watches = {(kind, verb) for kind in kubernetes_worker.WATCHED_KINDS for verb in ("list", "watch")}
    observer = _calls(inspect.getsource(prefect_kubernetes.observer)) | watches
    observes = render("prefect-work-pool", _with(reconciler={"enabled": False}))
    assert _permissions(one(observes, "Role", name)) == calls | observer


async def _reconciler_calls() -> set[tuple[str, str]]:
    """Call all methods of the reconciler's client, and return the calls as pairs of a resource and a verb."""
    calls = set()

    def answer(request: httpx.Request) -> httpx.Response:
        resource, *rest = request.url.path.partition("/namespaces/ns/")[2].split("/")
        verb = {"POST": "create", "PUT": "update", "PATCH": "patch"}.get(request.method, "")
        if request.method == "GET":
            verb = "watch" if "watch" in request.url.params else "get" if rest else "list"
        if request.method == "DELETE":
            verb = "delete" if rest else "deletecollection"
        calls.add(("/".join([resource, *rest[1:]]), verb))
        if resource == "leases" and lease is None:
            return httpx.Response(201 if request.method == "POST" else 404, json={})
        return httpx.Response(200, json=lease if resource == "leases" else {"metadata": {}, "items": []})

    lease: Object | None = None
    pod = Pod("pod", "run", "job", datetime.now(UTC))
    async with httpx.AsyncClient(base_url="http://nowhere", transport=httpx.MockTransport(answer)) as client:
        cluster = kubernetes_client.Cluster(client, "ns")
        await cluster.list_jobs("pool", timedelta())
        await cluster.has_unfinished_job("run")
        await cluster.list_pods("pool", timedelta())
        await cluster.read_refusal("job")
        await cluster.read_stuck_pods()
        await cluster.read_log_tail(pod, 20)
        await cluster.annotate("job", {})
        await cluster.delete_job("job", 0)
        for watch in (cluster.watch_pods, cluster.watch_jobs):
            watching = asyncio.create_task(watch(watched := asyncio.Event()))
            await watched.wait()
            watching.cancel()
        election = LeaderElection(cluster, "lease", "this one")
        await election.acquire_or_renew()
        lease = {"metadata": {"resourceVersion": "1"}, "spec": {"holderIdentity": "this one"}}
        await election.acquire_or_renew()
        await election.release()
    return calls


def test_reconciler_roles_are_what_the_reconciler_calls() -> None:
    public = {name for name in vars(kubernetes_client.Cluster) if not name.startswith("_")}
    others = {"ask", "identity", "identities", "in_namespace"}
    called = set(re.findall(r"cluster\.(\w+)[(),]", inspect.getsource(_reconciler_calls)))
    assert public - others == called, "call each method in _reconciler_calls"
    objects = render("prefect-work-pool", TAG)
    roles = [one(objects, "Role", f"test-prefect-work-pool-reconciler{suffix}") for suffix in ("", "-lease")]
    assert set().union(*map(_permissions, roles)) == asyncio.run(_reconciler_calls())


def _in_namespaces(objects: list[Object], *kinds: str) -> list[str]:
    """Return objects of these kinds as sorted "NAMESPACE Kind/name" texts, without the release's name."""
    found = [(manifest["kind"], manifest["metadata"]) for manifest in objects if manifest["kind"] in kinds]
    prefix = "test-prefect-work-pool-"
    return sorted(f"{meta['namespace']} {kind}/{meta['name'].removeprefix(prefix)}" for kind, meta in found)


def test_objects_of_runs_are_in_their_namespace() -> None:
    runs = {"namespace": "{{ .Release.Namespace }}-runs", "results": {"storage": "volume"}}
    objects = render("prefect-work-pool", _with(runs=runs))
    workloads = ("ServiceAccount", "Secret", "StatefulSet", "Deployment", "Job", "NetworkPolicy")
    assert [name for name in _in_namespaces(objects, *workloads) if name.startswith("prefect-runs ")] == [
        "prefect-runs NetworkPolicy/results",
        "prefect-runs NetworkPolicy/runs",
        "prefect-runs ServiceAccount/results",
        "prefect-runs ServiceAccount/runs",
        "prefect-runs StatefulSet/results",
    ], "no Secret: the master key of signed results stays with the worker"
    assert _in_namespaces(objects, "Role", "RoleBinding") == [
        "prefect Role/reconciler-lease",
        "prefect RoleBinding/reconciler-lease",
        "prefect-runs Role/reconciler",
        "prefect-runs Role/worker",
        "prefect-runs RoleBinding/reconciler",
        "prefect-runs RoleBinding/worker",
    ]
    for manifest in objects:
        if manifest["kind"] == "RoleBinding":
            assert [subject["namespace"] for subject in manifest["subjects"]] == ["prefect"]
    template = pool_of(objects)["base_job_template"]
    assert template["job_configuration"]["namespace"] == "prefect-runs"
    assert _job(pool_of(objects))["metadata"]["namespace"] == "prefect-runs"
    worker = _args(objects, "Deployment/test-prefect-work-pool-worker")
    assert worker[worker.index("--namespace") + 1] == "prefect-runs"
    reconciler = _args(objects, "Deployment/test-prefect-work-pool-reconciler")
    assert [reconciler[index + 1] for index, word in enumerate(reconciler) if word == "--namespace"] == ["prefect-runs"]
    assert reconciler[reconciler.index("--lease-namespace") + 1] == "$(NAMESPACE)"


def test_runs_elsewhere_reach_the_api_in_the_namespace_of_the_release() -> None:
    objects = render("prefect-work-pool", _with(runs={"namespace": "flows"}))
    worker = pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]["containers"][0]
    # Runs inherit the URL from the worker.
    assert environment(worker)["PREFECT_API_URL"] == "http://prefect-server-api.prefect:4200/api"
    [peer] = one(objects, "NetworkPolicy", "test-prefect-work-pool-runs")["spec"]["egress"][1]["to"]
    assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": "prefect"}}
    [peer] = one(objects, "NetworkPolicy", "test-prefect-work-pool-worker")["spec"]["egress"][1]["to"]
    assert "namespaceSelector" not in peer
    for url in ("https://prefect.example.com/api", "http://api.other:4200/api", "http://localhost:4200/api"):
        objects = render("prefect-work-pool", _with(runs={"namespace": "flows"}, api={"url": url}))
        worker = pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]["containers"][0]
        assert environment(worker)["PREFECT_API_URL"] == url


def test_runs_in_a_former_namespace_keep_network_identity_and_reconciler() -> None:
    """But the worker creates no Job there."""
    runs = {"namespace": "flows", "formerNamespaces": ["{{ .Release.Namespace }}", "flows"]}
    objects = render("prefect-work-pool", _with(runs=runs))
    kinds = ("Role", "RoleBinding", "ServiceAccount", "NetworkPolicy")
    found = [name for name in _in_namespaces(objects, *kinds) if name.endswith(("/runs", "/reconciler", "/worker"))]
    assert found == sorted(
        [
            *(f"{namespace} {kind}/reconciler" for namespace in ("prefect", "flows") for kind in kinds[:2]),
            *(f"{namespace} {kind}/runs" for namespace in ("prefect", "flows") for kind in kinds[2:]),
            *(f"flows {kind}/worker" for kind in kinds[:2]),
            *(f"prefect {kind}/{component}" for component in ("worker", "reconciler") for kind in kinds[2:]),
        ]
    )
    reconciler = _args(objects, "Deployment/test-prefect-work-pool-reconciler")
    watched = [reconciler[index + 1] for index, word in enumerate(reconciler) if word == "--namespace"]
    assert watched == ["flows", "prefect"]


VERBS = {
    "create": "create",
    "get": "read",
    "list": "read",
    "watch": "watch",
    "patch": "patch",
    "update": "update",
    "delete": "delete",
    "deletecollection": "delete",
}
"""The word in comments for each verb of a Role."""


@pytest.mark.parametrize("component", ["worker", "reconciler"])
def test_comments_name_all_verbs_of_a_role(component: str) -> None:
    objects = render("prefect-work-pool", TAG)
    rules = [rule for manifest in objects if manifest["kind"] == "Role" and component in manifest["metadata"]["name"]
             for rule in manifest["rules"]]  # fmt: skip
    chart = ROOT / "helm" / "prefect-work-pool"
    of_values = re.search(
        rf"^{component}:.*?^  rbac:\n(.*?)create: true", (chart / "values.yaml").read_text(), re.DOTALL | re.MULTILINE
    )
    template = (chart / "templates" / component / "rbac.yaml").read_text()
    assert of_values
    for comment in (of_values[1], template.partition("*/")[0]):
        for rule in rules:
            for verb in rule["verbs"]:
                assert VERBS[verb] in comment, f"{verb} {rule['resources']} is not in: {comment}"


def test_comments_list_all_components() -> None:
    text = (ROOT / "helm" / "prefect-work-pool" / "values.yaml").read_text()
    for comment in re.findall(r"(?:^ *#.*\n)+", text, flags=re.MULTILINE):
        if "drift" in comment and "sync" in comment and "worker" in comment:
            assert "reconciler" in comment, comment


def _args(objects: list[Object], workload: str) -> list[str]:
    """Return the arguments of a pod's main container."""
    found: list[str] = pod_specs(objects)[workload]["containers"][0]["args"]
    return found


@pytest.mark.parametrize(
    ("sync", "between"),
    [
        ({}, ["--adopt", "--prune", "prefect.yaml"]),
        ({"adopt": False, "prune": False}, ["prefect.yaml"]),
        pytest.param({"files": []}, ["--adopt", "--prune"], marks=pytest.mark.further),
        ({"files": ["prefect.yaml", "/more/teams.yaml"]}, ["--adopt", "--prune", "prefect.yaml", "/more/teams.yaml"]),
    ],
)
def test_sync_is_one_command_with_files_and_pool(sync: Object, between: list[str]) -> None:
    """One command, so that its last log lines are the reason of a failed release."""
    objects = render("prefect-work-pool", _with(sync=sync))
    spec = pod_specs(objects)["Job/test-prefect-work-pool-sync"]
    assert "initContainers" not in spec
    [container] = spec["containers"]
    assert container["name"] == "sync"
    assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"
    owner = ["--owner", "default of test in prefect", "--wait", "300"]
    assert container["args"] == ["orchestrate", "sync", *owner, *between, "/etc/prefect-pool/pool.yaml"]


def test_sync_job_has_init_containers_and_volumes_but_no_sidecars() -> None:
    spec = pod_specs(render("prefect-work-pool", MAXIMAL))["Job/pool-sync"]
    [container] = spec["containers"]
    assert [init_container["name"] for init_container in spec["initContainers"]] == ["native"]
    paths = {"/tmp", "/more", "/etc/prefect-pool", "/etc/prefect-api/ca"}  # noqa: S108
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == paths
    assert {volume["name"] for volume in spec["volumes"]} == {"tmp", "more", "pool", "api-ca"}


def test_drift_and_sync_have_the_same_owner() -> None:
    """With another owner, drift would find no record of a sync."""
    for values, name in ((TAG, "test-prefect-work-pool"), (MAXIMAL, "pool")):
        objects = render("prefect-work-pool", values)
        sync, drift = (
            _args(objects, f"{workload}-{part}")
            for workload, part in ((f"Job/{name}", "sync"), (f"Deployment/{name}", "drift"))
        )
        assert drift[:2] == ["orchestrate", "watch"]
        assert drift[drift.index("--owner") + 1] == sync[sync.index("--owner") + 1]
    assert drift[-4:] == ["--every", "60", "--port", "8080"]
    container = pod_specs(objects)["Deployment/pool-drift"]["containers"][0]
    assert {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness", "readiness")} == {
        "/health"
    }
    assert environment(container)["PREFECT_LOGGING_LEVEL"] == "WARNING"
    assert environment(container)["PREFECT_API_URL"] == "https://test.example.com/api"
    without = inventory(render("prefect-work-pool", _with(drift={"enabled": False})))
    assert not [object_name for object_name in without if object_name.endswith("-drift")]


def test_reconciler_role_creates_only_its_lease() -> None:
    objects = render("prefect-work-pool", TAG)
    name = "test-prefect-work-pool-reconciler"
    assert one(objects, "Role", name)["rules"] == [
        {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["list", "watch", "patch", "delete"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch", "deletecollection"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
    ]
    assert one(objects, "Role", f"{name}-lease")["rules"] == [
        {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create"]},
        {
            "apiGroups": ["coordination.k8s.io"],
            "resources": ["leases"],
            "resourceNames": [name],
            "verbs": ["get", "update"],
        },
    ]
    args = _args(objects, f"Deployment/{name}")
    assert args[args.index("--lease") + 1] == name
    assert one(objects, "Deployment", name)["spec"]["replicas"] == 2
    variables = environment(pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]["containers"][0])
    assert variables["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED"] == "false", "only the reconciler reports it"
    assert "--no-pod-events" not in args
    silent = render("prefect-work-pool", _with(reconciler={"podEvents": False}))
    assert "--no-pod-events" in _args(silent, f"Deployment/{name}")
    without = render("prefect-work-pool", _with(reconciler={"enabled": False}))
    assert not [object_name for object_name in inventory(without) if "-reconciler" in object_name]
    variables = environment(pod_specs(without)["Deployment/test-prefect-work-pool-worker"]["containers"][0])
    assert "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_ENABLED" not in variables


def test_retry_budget_values_become_job_variables() -> None:
    retries = {"crashes": 1, "disruptions": 3, "backoffSeconds": 5, "memoryGrowth": 2, "memoryMax": "8Gi"}
    properties = _pool(_with(runs={"retries": retries}))["base_job_template"]["variables"]["properties"]
    names = [field.name for field in fields(RetryBudget)]
    assert [properties[name]["default"] for name in names] == list(retries.values())
    [container] = _job(_pool(TAG))["spec"]["template"]["spec"]["containers"]
    assert container["command"][-1] == "/app/orchestration/execution.py", (
        "images of the previous release have this file"
    )


def test_results_on_a_volume_outlive_the_pod() -> None:
    def rendered(**results: Any) -> tuple[list[Object], Object]:
        values = _with(runs={"results": {"storage": "volume"} | results})
        return render("prefect-work-pool", values), _job(_pool(values))["spec"]["template"]["spec"]

    name = "test-prefect-work-pool-results"
    objects, run = rendered(keepDays=3, volume={"storageClass": "shared", "size": "1Gi"})
    [claim] = one(objects, "StatefulSet", name)["spec"]["volumeClaimTemplates"]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "shared",
        "resources": {"requests": {"storage": "1Gi"}},
    }
    assert run["volumes"][1] == {
        "name": "results",
        "persistentVolumeClaim": {"claimName": f"{claim['metadata']['name']}-{name}-0"},
    }
    [container] = run["containers"]
    assert {"name": "results", "mountPath": "/results"} in container["volumeMounts"]
    variables = environment(container)
    assert variables["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] == "/results"
    assert variables["PREFECT_RESULTS_PERSIST_BY_DEFAULT"] == "true"
    [clean] = pod_specs(objects)[f"StatefulSet/{name}"]["containers"]
    assert "-mtime +2 " in clean["args"][0], "find counts whole days beyond"
    assert one(objects, "NetworkPolicy", name)["spec"]["policyTypes"] == ["Ingress", "Egress"]

    objects, run = rendered(persistByDefault=False, volume={"existingClaim": "mine"})
    assert "volumeClaimTemplates" not in one(objects, "StatefulSet", name)["spec"]
    mine = {"name": "results", "persistentVolumeClaim": {"claimName": "mine"}}
    assert mine in run["volumes"]
    assert mine in pod_specs(objects)[f"StatefulSet/{name}"]["volumes"]
    assert environment(run["containers"][0])["PREFECT_RESULTS_PERSIST_BY_DEFAULT"] == "false"


S3 = {"bucket": "data", "endpoint": "https://s3.example.com", "region": "eu-1"}
SETTINGS = {"client_kwargs": {"endpoint_url": S3["endpoint"], "region_name": S3["region"]}}


@pytest.mark.parametrize(
    ("results", "basepath", "settings"),
    [
        ({"storage": "s3", "s3": S3}, "s3://data/prefect/test", SETTINGS),
        pytest.param(
            {"storage": "s3", "s3": {"bucket": "data", "prefix": "a/b"}},
            "s3://data/a/b",
            {"client_kwargs": {}},
            marks=pytest.mark.further,
        ),
        (
            {"storage": "redis", "redis": {"existingSecret": "cache", "key": "address"}, "keepDays": 3},
            "redis://prefect/test/results",
            {"ttl": 3 * 24 * 3600},
        ),
    ],
    ids=["s3", "s3 of Amazon", "redis"],
)
def test_results_in_a_storage_block_outlive_the_pod(results: Object, basepath: str, settings: Object) -> None:
    objects = render("prefect-work-pool", _with(runs={"results": results}))
    synced = _synced(objects)
    name = "prefect-test-prefect-work-pool-results"
    assert synced["remote_file_systems"] == [{"name": name, "basepath": basepath, "settings": settings}]
    assert list(KINDS).index(FILE_SYSTEM) < list(KINDS).index(POOL), "the block exists before a template refers to it"
    run = _job(pool_of(objects))["spec"]["template"]["spec"]
    [container] = run["containers"]
    variables = environment(container)
    assert variables["PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK"] == f"remote-file-system/{name}"
    assert variables["PREFECT_RESULTS_PERSIST_BY_DEFAULT"] == "true"
    assert "PREFECT_TASKS_DEFAULT_PERSIST_RESULT" not in variables
    url = {"secretKeyRef": {"name": "cache", "key": "address"}} if results["storage"] == "redis" else None
    assert variables.get("RESULTS_REDIS_URL") == url
    assert not [object_name for object_name in inventory(objects) if object_name.startswith("StatefulSet/")]
    assert "results" not in {volume["name"] for volume in run["volumes"]}
    not_persisted = render(
        "prefect-work-pool", _with(runs={"results": results | {"persistByDefault": False}}), "other.one"
    )
    assert _synced(not_persisted)["remote_file_systems"][0]["name"] == "prefect-other-one-prefect-work-pool-results"
    [container] = _job(pool_of(not_persisted))["spec"]["template"]["spec"]["containers"]
    assert environment(container)["PREFECT_TASKS_DEFAULT_PERSIST_RESULT"] == "false"


@pytest.mark.parametrize(
    "storage", ["volume", "none", *(pytest.param(name, marks=pytest.mark.further) for name in ("s3", "redis"))]
)
def test_runs_know_the_limit_of_stored_results(storage: str) -> None:
    for limit in ("25%", "10Gi", ""):
        results = {"storage": storage, "s3": S3, "redis": {"existingSecret": "cache"}, "limit": limit}
        [container] = _job(_pool(_with(runs={"results": results})))["spec"]["template"]["spec"]["containers"]
        assert environment(container).get("RESULTS_LIMIT") == (None if storage == "none" else limit)


SIGNING = "test-prefect-work-pool-results-signing"


def _mounted(objects: list[Object], secret: str) -> list[str]:
    """The pods that mount a Secret."""
    return [
        name
        for name, spec in pod_specs(objects).items()
        for volume in spec.get("volumes", [])
        if volume.get("secret", {}).get("secretName") == secret
    ]


@pytest.mark.parametrize(
    "storage", ["volume", *(pytest.param(name, marks=pytest.mark.further) for name in ("s3", "redis"))]
)
def test_only_the_worker_has_the_master_key_of_results(storage: str) -> None:
    results = {"storage": storage, "s3": S3, "redis": {"existingSecret": "cache"}}
    objects = render("prefect-work-pool", _with(runs={"results": results}))
    [key] = one(objects, "Secret", SIGNING)["data"].values()
    assert len(base64.b64decode(key)) == 64
    assert _mounted(objects, SIGNING) == ["Deployment/test-prefect-work-pool-worker"]
    [container] = pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]["containers"]
    file = container["args"][container["args"].index("--signing-key") + 1]
    [folder] = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "signing-key"]
    assert file == f"{folder}/signing-key"
    [volume] = [
        pod_volume["secret"]["items"]
        for pod_volume in pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]["volumes"]
        if pod_volume["name"] == "signing-key"
    ]
    assert volume == [{"key": "signing-key", "path": "signing-key"}]
    texts = [yaml.safe_dump(manifest) for manifest in objects if manifest["kind"] not in ("Secret", "Deployment")]
    assert not [text for text in texts if SIGNING in text], "neither Roles, nor the admission policy, nor the template"


@pytest.mark.parametrize(
    ("results", "secret"),
    [
        ({}, None),
        ({"storage": "volume", "signing": {"enabled": False}}, None),
        pytest.param(
            {"storage": "none", "signing": {"enabled": False, "existingSecret": "mine"}},
            None,
            marks=pytest.mark.further,
        ),
        ({"storage": "volume", "signing": {"existingSecret": "mine", "key": "master"}}, "mine"),
        pytest.param(
            {"storage": "none", "signing": {"existingSecret": "mine", "key": "master"}},
            "mine",
            marks=pytest.mark.further,
        ),
    ],
)
def test_results_are_signed_with_the_key_that_the_values_name(results: Object, secret: str | None) -> None:
    objects = render("prefect-work-pool", _with(runs={"results": results}))
    assert not [name for name in inventory(objects) if name.startswith("Secret/")]
    spec = pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]
    assert ("--signing-key" in spec["containers"][0]["args"]) is bool(secret)
    volumes = [volume["secret"] for volume in spec["volumes"] if volume["name"] == "signing-key"]
    items = [{"key": "master", "path": "signing-key"}]
    assert volumes == ([{"secretName": secret, "items": items}] if secret else [])


def test_result_storages_in_the_docs_are_valid_values() -> None:
    examples = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/explanation/durable-results.md").read_text(), re.DOTALL)
    shown = [yaml.safe_load(example) for example in examples]
    assert [shown_values["runs"]["results"]["storage"] for shown_values in shown] == ["volume", "s3", "redis"]
    for shown_values in shown:
        render("prefect-work-pool", TAG | shown_values)


def test_only_the_pool_is_synced_without_a_storage_block() -> None:
    for results in ({}, {"storage": "volume"}):
        assert set(_synced(render("prefect-work-pool", _with(runs={"results": results})))) == {"work_pools"}


def test_only_worker_and_reconciler_mount_an_api_token() -> None:
    with_token = {f"Deployment/test-prefect-work-pool-{component}" for component in ("worker", "reconciler")}
    for name, spec in pod_specs(render("prefect-work-pool", TAG)).items():
        assert spec["automountServiceAccountToken"] is (name in with_token), name
    for values, mounts in ((TAG, False), (MAXIMAL, True)):
        assert _job(_pool(values))["spec"]["template"]["spec"]["automountServiceAccountToken"] is mounts


def test_values_of_runs_reach_the_base_job_template() -> None:
    pool = _pool(MAXIMAL)
    assert pool["concurrency_limit"] == 7
    assert pool["queues"] == [
        {"name": "urgent", "priority": 1, "concurrency_limit": 2, "description": "now"},
        {"name": "later", "concurrency_limit": None, "description": ""},
    ]
    assert pool["base_job_template"]["variables"]["properties"]["gpu"] == {"type": "integer", "default": 0}
    job = _job(pool)
    assert job["metadata"]["namespace"] == "prefect"
    assert job["spec"]["suspend"] is False
    assert job["spec"]["backoffLimit"] == 1
    assert job["spec"]["ttlSecondsAfterFinished"] == 60
    assert job["spec"]["activeDeadlineSeconds"] == 3600
    metadata, spec = job["spec"]["template"]["metadata"], job["spec"]["template"]["spec"]
    assert metadata["labels"]["prefect.io/role"] == "flow-run"
    assert metadata["labels"] | {"cost": "flows", "team": "data", "a": "b"} == metadata["labels"]
    assert metadata["annotations"] == {"g": "h", "c": "d", "owner": "test"}
    assert spec["serviceAccountName"] == "runner"
    assert spec["enableServiceLinks"] is False
    assert spec["terminationGracePeriodSeconds"] == 90
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux", "workload": "flows"}
    assert spec["priorityClassName"] == "runs"
    for key in ("tolerations", "affinity", "topologySpreadConstraints", "hostAliases", "dnsConfig"):
        assert spec[key] == MAXIMAL["pod"][key]
    assert [init_container["name"] for init_container in spec["initContainers"]] == ["native"]
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    [container] = spec["containers"]
    assert container["image"] == "flows:2"
    assert container["imagePullPolicy"] == "Never"
    assert container["resources"] == MAXIMAL["runs"]["resources"]
    assert container["envFrom"] == [{"configMapRef": {"name": "flows"}}]
    assert environment(container) == {
        "PREFECT_CLIENT_MAX_RETRIES": "19",
        "GRACE_SECONDS": "90",
        "LOG_LIMIT": "64Mi",
        "PREFECT_API_SSL_CERT_FILE": "/etc/prefect-api/ca/ca.crt",
        "PREFECT_CLIENT_RETRY_EXTRA_CODES": "500,504",
        "KUBERNETES_JOB": {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}},
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": "/results",
        "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "true",
        "RESULTS_LIMIT": "50%",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "WAREHOUSE_URL": {"secretKeyRef": {"name": "warehouse", "key": "url"}},
    }
    assert {"name": "ca", "mountPath": "/ca"} in container["volumeMounts"]


def test_job_variables_override_the_releases_defaults() -> None:
    job = _job(_pool(TAG), memory_limit="3Gi", cpu_request="2", image="mine:1", finished_job_ttl=5)
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "384Mi", "ephemeral-storage": "64Mi"},
        "limits": {"memory": "3Gi", "ephemeral-storage": "12Gi"},
    }
    assert container["image"] == "mine:1"
    assert job["spec"]["ttlSecondsAfterFinished"] == 5


def test_disabled_network_policies_remove_no_other_object() -> None:
    objects = render("prefect-work-pool", _with(networkPolicy={"enabled": False}))
    kept = [name for name in inventory(render("prefect-work-pool", TAG)) if not name.startswith("NetworkPolicy/")]
    assert inventory(objects) == kept


def test_empty_entrypoint_keeps_that_of_the_image() -> None:
    def container(values: Object) -> Object:
        [found] = _job(_pool(values))["spec"]["template"]["spec"]["containers"]
        return dict(found)

    own, none = container(TAG), container(_with(runs={"entrypoint": []}))
    assert own.pop("command")[0] == "tini"
    assert none == own


@pytest.mark.parametrize(("seconds", "retries"), [(None, 0), (11, 3)])
def test_deadline_and_backoff_limit_reach_the_job(seconds: int | None, retries: int) -> None:
    """11 s is the lowest value above worker.prefetchSeconds. Job variables override both."""
    pool = _pool(_with(runs={"activeDeadlineSeconds": seconds, "backoffLimit": retries}))
    job = _job(pool)["spec"]
    assert job["backoffLimit"] == retries
    assert job.get("activeDeadlineSeconds") == seconds
    other = _job(pool, active_deadline_seconds=60, backoff_limit=1)["spec"]
    assert (other["activeDeadlineSeconds"], other["backoffLimit"]) == (60, 1)


@pytest.mark.parametrize("values", [TAG, MAXIMAL], ids=["default", "maximal"])
def test_runs_meet_the_restricted_standard(values: Object) -> None:
    spec = _job(_pool(values))["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == 65532
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    [container] = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


PROXY: Object = {"name": "aaa-proxy", "image": "proxy:1", "env": [{"name": "OF", "value": "{{ .Release.Name }}"}]}


def test_sidecars_of_runs_follow_the_main_container() -> None:
    log = {"name": "log", "image": "log:1", "securityContext": {"runAsUser": 5}}
    values = _with(pod={"sidecars": [{"name": "of-all", "image": "a"}]}, runs={"pod": {"sidecars": [PROXY, log]}})
    objects = render("prefect-work-pool", values)
    main, proxy, own = _job(pool_of(objects))["spec"]["template"]["spec"]["containers"]
    assert main["name"] == "prefect-job", "the worker gives command and variables to the first container"
    [without] = _job(_pool(TAG))["spec"]["template"]["spec"]["containers"]
    assert main == without
    filled = [{"name": "OF", "value": "test"}]
    assert proxy == PROXY | {"env": filled, "securityContext": main["securityContext"]}
    assert own == log, "its own securityContext stays"
    with_proxy = pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]["containers"]
    assert [container["name"] for container in with_proxy] == ["worker", "of-all"]


def test_base_job_template_has_all_upstream_variables() -> None:
    """A variable that a newer worker adds has to be added here, or left out on purpose."""
    upstream = set(KubernetesWorker.get_default_base_job_template()["variables"]["properties"])
    nothing = {"job_watch_timeout_seconds", "pod_watch_timeout_seconds", "stream_output"}
    elsewhere = {"namespace", "cluster_config"}
    ours = set(_pool(TAG)["base_job_template"]["variables"]["properties"])
    assert ours - upstream == {"active_deadline_seconds", *(field.name for field in fields(RetryBudget))}
    assert upstream - ours == nothing | elsewhere


def test_jobs_and_pods_have_no_password_in_plain_text() -> None:
    objects = render("prefect-work-pool", TAG)
    assert not [name for name in inventory(objects) if name.startswith("Secret/")]
    variables = environment(pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]["containers"][0])
    reference = {"name": "prefect-server-api-roles", "key": "worker"}
    assert variables["PREFECT_API_AUTH_STRING"] == {"secretKeyRef": reference}


def test_without_roles_all_components_share_one_credential() -> None:
    objects = render("prefect-work-pool", _with(api={"auth": {"rolesSecret": ""}}))
    variables = environment(pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]["containers"][0])
    reference = {"name": "prefect-server-auth", "key": "auth-string"}
    assert variables["PREFECT_API_AUTH_STRING"] == {"secretKeyRef": reference}
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET"
    assert (variables[f"{prefix}_NAME"], variables[f"{prefix}_KEY"]) == tuple(reference.values())
    assert "prefect-server-api-roles" not in json.dumps(objects)


def test_server_without_authentication_needs_no_secret() -> None:
    objects = render("prefect-work-pool", _with(api={"auth": {"existingSecret": ""}}))
    for spec in pod_specs(objects).values():
        assert "PREFECT_API_AUTH_STRING" not in environment(spec["containers"][0])
    assert "prefect-server-api-roles" not in json.dumps(objects)


def test_roles_secret_gives_each_component_its_own_credential() -> None:
    objects = render("prefect-work-pool", _with(api={"auth": {"rolesSecret": "roles"}}))
    specs = pod_specs(objects)
    found = {
        name.removeprefix("Deployment/test-prefect-work-pool-"): environment(spec["containers"][0])
        for name, spec in specs.items()
        if name.startswith("Deployment/")
    }
    keys = {name: variables["PREFECT_API_AUTH_STRING"]["secretKeyRef"] for name, variables in found.items()}
    assert keys == {
        "worker": {"name": "roles", "key": "worker"},
        "reconciler": {"name": "roles", "key": "reconciler"},
        "drift": {"name": "roles", "key": "sync"},
    }
    worker = specs["Deployment/test-prefect-work-pool-worker"]
    [volume] = [pod_volume["secret"] for pod_volume in worker["volumes"] if "secret" in pod_volume]
    assert volume == {"secretName": "roles", "items": [{"key": "run-key", "path": "run-key"}]}
    assert found["worker"]["RUN_CREDENTIALS"] == "/etc/prefect-api/run-key"
    assert not [name for name in found["worker"] if name.endswith(("SECRET_NAME", "SECRET_KEY"))]
    assert "prefect-server-auth" not in json.dumps(objects)


def test_files_of_the_sync_read_no_credential() -> None:
    credential = {"name": "PREFECT_API_AUTH_STRING", "valueFrom": {"secretKeyRef": {"name": "a", "key": "b"}}}
    sync = {"env": [{"name": "TEAM", "value": "data"}, credential], "settings": {"PREFECT_LOGGING_LEVEL": "DEBUG"}}
    objects = render("prefect-work-pool", _with(sync=sync, env=[{"name": "SHARED", "value": "x"}]))
    variables = environment(pod_specs(objects)["Job/test-prefect-work-pool-sync"]["containers"][0])
    assert variables["SYNC_ENVIRONMENT"] == "SYNC_*,TEAM,PREFECT_LOGGING_LEVEL"


def test_changed_base_job_template_restarts_workers() -> None:
    def checksum(values: Object) -> str:
        worker = one(render("prefect-work-pool", values), "Deployment", "test-prefect-work-pool-worker")
        return str(worker["spec"]["template"]["metadata"]["annotations"]["checksum/pool"])

    assert checksum(TAG) == checksum(TAG)
    assert checksum(TAG) != checksum(_with(runs={"resources": {"limits": {"memory": "2Gi"}}}))


def test_network_policies_deny_everything_else() -> None:
    objects = render("prefect-work-pool", MAXIMAL)
    for manifest in objects:
        if manifest["kind"] == "NetworkPolicy":
            assert manifest["spec"]["policyTypes"] == ["Ingress", "Egress"]
            has_metrics = manifest["metadata"]["name"] in ("pool-drift", "pool-reconciler")
            assert ("ingress" in manifest["spec"]) == has_metrics
            if has_metrics:
                assert manifest["spec"]["ingress"] == [
                    {"ports": [{"port": "metrics"}], "from": MAXIMAL["networkPolicy"]["metricsFrom"]}
                ]
    by_default = one(render("prefect-work-pool", TAG), "NetworkPolicy", "test-prefect-work-pool-drift")
    assert "ingress" not in by_default["spec"], "a rule without `from` would let everybody in"
    reached = {
        name: set(re.findall(r"[0-9.]+/[0-9]+", json.dumps(one(objects, "NetworkPolicy", f"pool-{name}")["spec"])))
        for name in ("worker", "runs", "sync", "drift", "reconciler")
    }
    assert reached == {
        "worker": {"192.0.2.1/32", "10.0.0.1/32"},
        "runs": {"192.0.2.1/32", "10.0.0.0/8", "198.51.100.0/24"},
        "sync": {"192.0.2.1/32"},
        "drift": {"192.0.2.1/32"},
        "reconciler": {"192.0.2.1/32", "10.0.0.1/32"},
    }


REFUSED = [
    ({}, "image.tag is empty"),
    (_with(image={"tag": "latest"}), "is `latest`"),
    (_with(runs={"image": {"tag": "latest"}}), "is `latest`"),
    (_with(pool={"name": "Prefect-pool"}), "starts with `prefect`: the server reserves such names"),
    (_with(pool={"name": '"'}), "at '/pool/name'"),
    (_with(pool={"queues": [{"name": "' "}]}), "at '/pool/queues/0/name'"),
    (_with(worker={"queues": ["absent"]}), ": pool.queues has only "),
    (_with(runs={"namespace": "Flows"}), "at '/runs/namespace'"),
    (_with(runs={"formerNamespaces": ["{{ .Release.Name }}_"]}), ": a namespace has up to 63 lower-case letters"),
    *[
        (_with(runs={"pod": {"sidecars": [{"name": "a", "image": "a"}]}}, reconciler=reconciler), message)
        for reconciler, message in (
            ({"enabled": False}, "runs.pod.sidecars needs the reconciler"),
            ({"replicas": 0}, "runs.pod.sidecars needs the reconciler"),
        )
    ],
    (
        _with(runs={"pod": {"sidecars": [{"name": "prefect-job", "image": "a"}]}}),
        '"prefect-job": another container',
    ),
    (
        _with(runs={"pod": {key: [{"name": "a", "image": "a"}] for key in ("initContainers", "sidecars")}}),
        ": another container of the pod has this name",
    ),
    (_with(runs={"pod": {"sidecars": [{"name": "a"}]}}), " without an image"),
    (_with(runs={"warm": {"replicas": -1}}), "at '/runs/warm/replicas'"),
    *[
        (_with(runs={"warm": {"replicas": 1}} | runs, **others), message)
        for runs, others, message in (
            ({}, {"reconciler": {"replicas": 0}}, "runs.warm.replicas needs the reconciler"),
            ({"entrypoint": []}, {}, "runs.warm.replicas needs runs.entrypoint"),
            ({"backoffLimit": 1}, {}, "runs.warm.replicas needs runs.backoffLimit=0"),
            ({"activeDeadlineSeconds": 60}, {}, "runs.warm.replicas needs runs.activeDeadlineSeconds=null"),
            ({"pod": {"sidecars": [{"name": "a", "image": "a"}]}}, {}, "runs.warm.replicas and runs.pod.sidecars"),
            ({}, {"admissionPolicy": {"enabled": False}}, "runs.warm.replicas needs admissionPolicy.enabled=true"),
            (
                {"pod": {"volumes": [{"name": warm_pods.VOLUME, "emptyDir": {}}]}},
                {},
                f'"{warm_pods.VOLUME}": the chart uses this name for its own volume',
            ),
            (
                {
                    "pod": {
                        "volumes": [{"name": "a", "emptyDir": {}}],
                        "volumeMounts": [{"name": "a", "mountPath": warm_pods.MOUNT_PATH}],
                    }
                },
                {},
                f"the mountPath {warm_pods.MOUNT_PATH}: the chart mounts its own volume there",
            ),
        )
    ],
    (
        _with(worker={"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}),
        "needs worker.resources.requests.cpu",
    ),
    (_with(worker={"serviceAccount": {"create": False}}), "needs worker.serviceAccount.name"),
    (_with(runs={"activeDeadlineSeconds": 5}), "runs.activeDeadlineSeconds is not above worker.prefetchSeconds"),
    (_with(worker={"replica": 2}), "at '/worker': additional properties 'replica' not allowed"),
    (_with(worker={"replicas": "two"}), "at '/worker/replicas': got string, want integer"),
    (_with(pool={"concurrencyLimit": -1}), "at '/pool/concurrencyLimit'"),
    (_with(sync={"deployments": True}), "at '/sync': additional properties 'deployments' not allowed"),
    (_with(sync={"files": ["--prune"]}), "at '/sync/files/0'"),
    (_with(drift={"everySeconds": 0}), "at '/drift/everySeconds'"),
    (_with(runs={"serviceAccount": {"create": False}}), "needs runs.serviceAccount.name"),
    (
        _with(runs={"serviceAccount": {"labels": {"team": "{{ x }}"}}}),
        'runs.serviceAccount.labels.team (or commonLabels) is "{{ x }}"',
    ),
    (_with(reconciler={"serviceAccount": {"create": False}}), "needs reconciler.serviceAccount.name"),
    (_with(runs={"retries": {"memoryMax": "lots"}}), "at '/runs/retries/memoryMax'"),
    (_with(runs={"results": {"storage": "gcs"}}), "at '/runs/results/storage'"),
    (_with(runs={"logLimit": "64MB"}), "at '/runs/logLimit'"),
    (_with(runs={"results": {"limit": "125%"}}), "at '/runs/results/limit'"),
    (_with(runs={"results": {"storage": "s3"}}), "runs.results.storage=s3 needs runs.results.s3.bucket"),
    (_with(runs={"results": {"storage": "s3", "s3": {"bucket": "s3://a/b"}}}), "at '/runs/results/s3/bucket'"),
    (_with(runs={"results": {"s3": {"endpoint": "https://key:secret@host"}}}), "at '/runs/results/s3/endpoint'"),
    (_with(runs={"results": {"s3": {"accessKey": "a"}}}), "additional properties 'accessKey' not allowed"),
    (_with(runs={"results": {"redis": {"url": "redis://a"}}}), "additional properties 'url' not allowed"),
    (_with(runs={"results": {"storage": "redis"}}), "needs runs.results.redis.existingSecret: results have no place"),
    (
        _with(runs={"results": {"storage": "volume"}, "settings": {"PREFECT_DEFAULT_RESULT_STORAGE_BLOCK": "a/b"}}),
        " is another storage than runs.results.storage=",
    ),
    (
        _with(runs={"settings": {"AWS_SECRET_ACCESS_KEY": "a"}}),
        " is a secret: it would be in plain text in the pool's template. Put it into a Secret",
    ),
    (
        _with(api={"tls": {"caSecret": "ca"}}),
        ": a certificate has no use without HTTPS. Begin api.url with https://",
    ),
    (
        _with(
            api={"url": "https://server/api", "tls": {"caSecret": "ca"}},
            sync={"settings": {"PREFECT_API_TLS_INSECURE_SKIP_VERIFY": True}},
        ),
        " and api.tls.caSecret are both set: clients would not check the API's certificate against this CA",
    ),
    (_with(networkPolicy={"egressCIDRs": ["everywhere"]}), "at '/networkPolicy/egressCIDRs/0'"),
    *[(_with(worker={"pod": pod}), message) for pod, message in POD_RULES],
    *[(_with(drift={"resources": resources}), message) for resources, message in RESOURCE_RULES],
    (
        _with(sync={"pod": {"sidecars": [{"name": "a", "image": "a"}]}}),
        ".pod.sidecars is set: a sidecar would keep the pod from ending",
    ),
    (
        _with(runs={"results": {"storage": "volume"}, "pod": {"volumes": [{"name": "results", "emptyDir": {}}]}}),
        ": the chart uses this name for its own volume",
    ),
    (
        _with(sync={"pod": {"volumeMounts": [{"name": "tmp", "mountPath": "/etc/prefect-pool"}]}}),
        ": the chart mounts its own volume there",
    ),
    (
        _with(worker={"autoscaling": {"enabled": True, "minReplicas": 4}}),
        "worker.autoscaling.minReplicas is above worker.autoscaling.maxReplicas",
    ),
    (
        _with(worker={"strategy": {"rollingUpdate": {"maxSurge": 0}}}),
        ".strategy.rollingUpdate has 0 for maxSurge and for maxUnavailable",
    ),
    (
        _with(worker={"terminationGracePeriodSeconds": 1, "lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}),
        ".lifecycle.preStop.sleep.seconds (",
    ),
    (_with(worker={"lifecycle": {"postStart": {"sleep": {"seconds": 61}}}}), ".lifecycle.postStart.sleep.seconds ("),
    (_with(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": "{{ x }}", "key": "a"}}}]), "env names "),
    *[
        (_with(networkPolicy={"metricsFrom": [{"ipBlock": {"cidr": cidr, "except": [part]}}]}), ".ipBlock.except has ")
        for cidr, part in (
            ("10.0.0.0/8", "11.0.0.0/9"),
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.0.0/15", "10.3.0.0/16"),
            ("0.0.0.0/0", "fd00::/8"),
            ("fd00::/16", "fd01::/32"),
        )
    ],
    (_with(networkPolicy={"extraEgress": [{"ports": [{"port": 20, "endPort": 10}]}]}), ".ports has endPort "),
    (
        _with(reconciler={"podDisruptionBudget": {"maxUnavailable": ""}}),
        ".podDisruptionBudget has neither minAvailable nor maxUnavailable",
    ),
    (
        _with(runs={"annotations": {"a": "{{ .Data.password }}"}}),
        ": Prefect reads it as a job variable, and the pool has none of that name",
    ),
]


@pytest.mark.parametrize(
    ("values", "message"), one_in_four(REFUSED), ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_impossible_values_are_refused_with_key_and_cure(values: Object, message: str) -> None:
    with pytest.raises(ClusterError) as caught:
        render("prefect-work-pool", values)
    assert message in str(caught.value)


def test_warm_pods_are_refused_where_the_cluster_has_no_admission_policies(tmp_path: Path) -> None:
    """Without a cluster, Helm knows none either."""
    (tmp_path / "values.yaml").write_text(json.dumps(_with(runs={"warm": {"replicas": 1}})))
    chart = str(ROOT / "helm/prefect-work-pool")
    with pytest.raises(ClusterError, match=r"runs\.warm\.replicas needs Kubernetes 1\.30: .* with --api-versions "):
        binaries.helm("template", "test", chart, "--values", str(tmp_path / "values.yaml"))


def test_admission_policy_lists_the_references_of_runs() -> None:
    policy = one(render("prefect-work-pool", MAXIMAL), "ValidatingAdmissionPolicy", "prefect-pool-worker")
    variables = {variable["name"]: variable["expression"] for variable in policy["spec"]["variables"]}
    assert "all-settings" not in variables["secrets"], "only the worker has this Secret"
    assert "warehouse" in json.loads(variables["secrets"])
    assert json.loads(variables["configMaps"]) == ["ca", "flows"]
    assert variables["chosen"] == "false"
    chosen = _with(runs={"variables": {"team": {"type": "string"}}, "envFrom": [{"secretRef": {"name": "{{ team }}"}}]})
    policy = one(
        render("prefect-work-pool", chosen), "ValidatingAdmissionPolicy", "prefect-test-prefect-work-pool-worker"
    )
    assert {variable["name"]: variable["expression"] for variable in policy["spec"]["variables"]}["chosen"] == "true"
    without = inventory(render("prefect-work-pool", _with(admissionPolicy={"enabled": False})))
    assert not [name for name in without if name.startswith("ValidatingAdmission")]


def test_runs_get_proxy_headers_by_secret_reference() -> None:
    headers = {
        "name": "PREFECT_CLIENT_CUSTOM_HEADERS",
        "valueFrom": {"secretKeyRef": {"name": "proxy", "key": "headers"}},
    }
    values = _with(env=[headers])
    objects = render("prefect-work-pool", values)
    manifest = _pool(values)["base_job_template"]["job_configuration"]["job_manifest"]
    assert headers in manifest["spec"]["template"]["spec"]["containers"][0]["env"]
    policy = one(objects, "ValidatingAdmissionPolicy", "prefect-test-prefect-work-pool-worker")
    assert "proxy" in {variable["name"]: variable["expression"] for variable in policy["spec"]["variables"]}["secrets"]
