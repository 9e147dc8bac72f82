"""Each check of cluster, releases, database and Redis is ok on a sound installation, and finds its fault.

The installation is on a real Kubernetes API server. Values and manifests are those of the real charts. What a pod of
the server reports is changed in numbers; tests/orchestration/inspection/test_backing_services.py reads real reports.
"""

import asyncio
import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch as patched

import pytest
import yaml

from orchestration.errors import ClusterError
from orchestration.operations import environment as environments
from orchestration.operations import namespace_of_runs, port_forward, release_inputs
from orchestration.operations.doctor import cluster_checks
from orchestration.operations.doctor.findings import CHECKS, Finding
from orchestration.operations.environment import POOL, SERVER, Environment, Object
from orchestration.operations.release_inputs import CHARTS
from tests.cluster.apiserver import NAMESPACE
from tests.orchestration.operations.doctor.patient import (
    REPORT,
    RUNS,
    Patient,
    claim,
    create,
    delete,
    node,
    patch,
    pod,
    storage_class,
)

NEEDS_SERVER = {
    "prefect versions",
    "api latency",
    "authentication",
    "websocket",
    "work pools",
    "schedules",
    "late runs",
}
"""Checks of the Prefect server: tests/orchestration/operations/doctor/test_server_checks.py."""

NEEDS_PODS = {"network policies"}
"""Checks that look from inside of a pod: tests/e2e/test_environment.py."""

OF_SHARED_ENVIRONMENTS = {"retention", "backup", "replicas"}
"""Checks that are left out where the environment is `local`."""

API, API_OF_RUNS = (f"/api/v1/namespaces/{name}" for name in (NAMESPACE, RUNS))
RBAC, RBAC_OF_RUNS = (f"/apis/rbac.authorization.k8s.io/v1/namespaces/{name}" for name in (NAMESPACE, RUNS))

Fault = Callable[[Patient], AbstractContextManager[dict[str, Any]]]


@pytest.fixture(scope="module")
def sound(patient: Patient) -> dict[str, Finding]:
    """Return the findings on the unchanged installation."""
    names = [check.name for check in CHECKS if check.name not in NEEDS_SERVER | NEEDS_PODS]
    return asyncio.run(patient.examine(names))


def test_sound_installation_passes_all_checks(sound: dict[str, Finding]) -> None:
    assert {name: finding for name, finding in sound.items() if finding.status != "ok"} == {
        name: Finding("not checked", sound[name].text) for name in OF_SHARED_ENVIRONMENTS
    }
    assert len(sound) > 25


def _cluster(create_path: str, manifest: Object, changed: str, name: str = "") -> Fault:
    """Return a fault: an object that is created for the time of the test."""

    @contextmanager
    def fault(patient: Patient) -> Iterator[dict[str, Any]]:
        create(patient.api, create_path, manifest)
        yield {"changed": changed}
        delete(patient.api, f"{create_path}/{name or manifest['metadata']['name']}")

    return fault


def _patched(path: str, change: Object, restore: Object, changed: str) -> Fault:
    """Return a fault: an object that is changed for the time of the test."""

    @contextmanager
    def fault(patient: Patient) -> Iterator[dict[str, Any]]:
        patch(patient.api, path, change)
        yield {"changed": changed}
        patch(patient.api, path, restore)

    return fault


def _without(path: str, changed: str) -> Fault:
    """Return a fault: an object that is gone for the time of the test."""

    @contextmanager
    def fault(patient: Patient) -> Iterator[dict[str, Any]]:
        found = patient.api.client.get(path).raise_for_status().json()
        delete(patient.api, path)
        yield {"changed": changed}
        for key in ("uid", "resourceVersion", "creationTimestamp"):
            del found["metadata"][key]
        create(patient.api, path.rpartition("/")[0], found)

    return fault


def _values(release: str, **change: Any) -> Fault:
    """Return a fault: values of a release."""

    @contextmanager
    def fault(patient: Patient) -> Iterator[dict[str, Any]]:
        yield {f"{'server' if release == SERVER else 'pool'}_values": patient.values(release, **change)}

    return fault


def _objects(release: str, change: Callable[[list[Object]], None]) -> Fault:
    """Return a fault: objects of a release."""

    @contextmanager
    def fault(patient: Patient) -> Iterator[dict[str, Any]]:
        objects = patient.objects(release)
        change(objects)
        yield {f"{'server' if release == SERVER else 'pool'}_objects": objects}

    return fault


def _known(**known: Any) -> Fault:
    @contextmanager
    def fault(_: Patient) -> Iterator[dict[str, Any]]:
        yield known

    return fault


def _report(part: str, **change: Any) -> Fault:
    """Return a fault: what the server's pod reports."""
    return _known(report=REPORT | {part: REPORT[part] | change})


def _cnpg(conditions: dict[str, str] | None, **report: Any) -> Fault:
    """Return a fault: a server on a Cluster of CloudNativePG with these conditions; None if the Cluster is gone."""

    @contextmanager
    def fault(patient: Patient) -> Iterator[dict[str, Any]]:
        cluster: Object = {"apiVersion": "postgresql.cnpg.io/v1", "kind": "Cluster", "metadata": {"name": "db"}}
        cluster["spec"] = {"instances": 1}
        states = [{"type": name, "status": value, "message": "no bucket"} for name, value in (conditions or {}).items()]
        database = patient.values(SERVER)["database"]
        database["cnpg"]["storage"]["size"] = "1Gi"
        yield {
            "server_values": patient.values(SERVER, database=database | {"mode": "cnpg"}),
            "server_objects": [*patient.objects(SERVER), cluster],
            "clusters": [] if conditions is None else [cluster | {"status": {"conditions": states}}],
            "report": REPORT | {"database": REPORT["database"] | report},
        }

    return fault


def _shared(fault: Fault) -> Fault:
    """Return the same fault in an environment that is not `local`."""

    @contextmanager
    def shared(patient: Patient) -> Iterator[dict[str, Any]]:
        with (
            patched.object(patient, "environment", Environment("staging", "alone", NAMESPACE)),
            fault(patient) as known,
        ):
            yield known

    return shared


def _find(objects: list[Object], kind: str, name: str) -> Object:
    [found] = [manifest for manifest in objects if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)]
    return found


def _spec(objects: list[Object], kind: str, name: str) -> Object:
    spec: Object = _find(objects, kind, name)["spec"]["template"]["spec"]
    return spec


def _backup(objects: list[Object]) -> Object:
    spec: Object = _find(objects, "CronJob", f"{SERVER}-backup")["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return spec


def _password(text: str) -> Fault:
    @contextmanager
    def fault(_: Patient) -> Iterator[dict[str, Any]]:
        with patched.object(port_forward, "read_credentials", lambda _: text):
            yield {}

    return fault


@contextmanager
def _refused_values(patient: Patient) -> Iterator[dict[str, Any]]:
    """The chart refuses its values before the install."""
    image = release_inputs.Image("image", "latest")
    with patched("orchestration.operations.doctor.installation.UNKNOWN_IMAGE", image):
        yield {"changed": "release", "server_revisions": [], "pool_revisions": []}


@contextmanager
def _absent_image(patient: Patient) -> Iterator[dict[str, Any]]:
    error = ClusterError("registry/image:1 is not in the registry. Push it: make push")
    with (
        patched.object(patient, "environment", Environment("staging", "alone", NAMESPACE)),
        patched.object(release_inputs, "checkout_image", side_effect=error),
    ):
        yield {"server_revisions": [], "pool_revisions": []}


@contextmanager
def _missing_right(patient: Patient) -> Iterator[dict[str, Any]]:
    """The person who installs has no rights."""
    kubectl = Environment.kubectl

    def as_stranger(environment: Environment, *words: str, text: str | None = None) -> str:
        return kubectl(environment, "--as=stranger", *words, text=text)

    with patched.object(Environment, "kubectl", as_stranger):
        yield {}


def _excessive_right(account: str) -> Fault:
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "excessive"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": NAMESPACE}],
    }  # fmt: skip
    return _cluster(f"{RBAC}/rolebindings", binding, "nothing")


def _waiting(reason: str) -> Object:
    container = {"name": "main", "image": "absent:1", "imageID": "", "ready": False, "restartCount": 0}
    return {"containerStatuses": [container | {"state": {"waiting": {"reason": reason}}}]}


def _ingress(objects: list[Object]) -> None:
    metadata = {"name": "api", "annotations": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "60"}}
    objects.append({"kind": "Ingress", "metadata": metadata, "spec": {"ingressClassName": "nginx"}})


def _http_route(objects: list[Object]) -> None:
    rules = [{"timeouts": {"request": "60s"}}]
    objects.append({"kind": "HTTPRoute", "metadata": {"name": "api"}, "spec": {"rules": rules}})


def _vacuum_of_runs(objects: list[Object]) -> None:
    [container] = _spec(objects, "Deployment", f"{SERVER}-services")["containers"]
    [variable] = [entry for entry in container["env"] if entry["name"] == "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED"]
    variable["value"] = "events,flow_runs"


def _pool_limit(objects: list[Object]) -> None:
    template = _find(objects, "ConfigMap", "prefect-work-pool-sync")
    template["data"]["pool.yaml"] = template["data"]["pool.yaml"].replace('"default": "1Gi"', '"default": "100Gi"')


OLD = (datetime.now(UTC) - timedelta(days=5)).strftime("%Y-%m-%dT%H:%M:%SZ")
BACKUP = f"/apis/batch/v1/namespaces/{NAMESPACE}/cronjobs/{SERVER}-backup"
POLICY = f"/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/{NAMESPACE}-{POOL}-worker"
LABEL = "pod-security.kubernetes.io/enforce"
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
STORAGE = "/apis/storage.k8s.io/v1/storageclasses"
QUOTAS = "resourcequotas,limitranges"
QUOTA_STATUS = {"hard": {"pods": "20"}, "used": {"pods": "19"}}


def _quota(hard: Object, **fields: Any) -> Object:
    return {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"}, "spec": {"hard": hard}} | fields


def _versions(server: str, client: str) -> Fault:
    return _known(versions={"serverVersion": {"gitVersion": server}, "clientVersion": {"gitVersion": client}})


def _claims(objects: list[Object], **change: Any) -> None:
    _find(objects, "StatefulSet", "prefect-work-pool-results")["spec"]["volumeClaimTemplates"][0]["spec"].update(change)


FAULTS: dict[str, tuple[str, Fault, str, str]] = {
    "old kubernetes": ("kubernetes version", _versions("v1.28.3", "v1.28.1"), "failed", "the charts need 1.29"),
    "old kubectl": ("kubernetes version", _versions("v1.35.3", "v1.32.1"), "warning", "kubectl is v1.32.1"),
    "old kubelet": ("nodes", _cluster("/api/v1/nodes", node("node-2", "v1.30.1"), "nodes"), "failed", "node-2 v1.30.1"),
    "lost node": (
        "nodes",
        _cluster("/api/v1/nodes", node("node-2") | {"status": {"nodeInfo": node("n")["status"]["nodeInfo"]}}, "nodes"),
        "warning", "not ready: node-2",
    ),
    "stranger installs": ("rights of the installer", _missing_right, "failed", "may not get configmaps, create"),
    "no role of the worker": (
        "rights of the worker", _without(f"{RBAC_OF_RUNS}/rolebindings/{POOL}-worker", "nothing"), "failed",
        f"account {POOL}-worker may not create jobs",
    ),
    "no role of the reconciler": (
        "rights of the reconciler", _without(f"{RBAC_OF_RUNS}/rolebindings/{POOL}-reconciler", "nothing"), "failed",
        f"account {POOL}-reconciler may not list jobs",
    ),
    "no lease of the reconciler": (
        "rights of the reconciler", _without(f"{RBAC}/rolebindings/{POOL}-reconciler-lease", "nothing"), "failed",
        f"account {POOL}-reconciler may not create leases",
    ),
    "worker reads secrets": (
        "rights of the worker", _excessive_right(f"{POOL}-worker"), "warning", "may get secrets, create pods",
    ),
    "reconciler reads secrets": (
        "rights of the reconciler", _excessive_right(f"{POOL}-reconciler"), "warning", "may get secrets, create pods",
    ),
    "no default class": (
        "storage class",
        _patched(f"{STORAGE}/local", {"metadata": {"annotations": {DEFAULT_CLASS: "false"}}},
                 {"metadata": {"annotations": {DEFAULT_CLASS: "true"}}}, "storageclasses"),
        "failed", "no StorageClass is the default one",
    ),
    "two default classes": (
        "storage class", _cluster(STORAGE, storage_class("other"), "storageclasses"),
        "warning", "several StorageClasses",
    ),
    "absent class": (
        "storage class", _objects(POOL, lambda found: _claims(found, storageClassName="fast")), "failed",
        "no StorageClass fast",
    ),
    "absent class of backups": (
        "storage class",
        _objects(SERVER, lambda found: _find(found, "PersistentVolumeClaim", f"{SERVER}-backups")["spec"].update(
            storageClassName="fast")),
        "failed", "no StorageClass fast",
    ),
    "volume of one node": (
        "results volume", _cluster("/api/v1/nodes", node("node-2"), "nodes"), "warning", "1 of 2 nodes cannot mount",
    ),
    "class of one node": (
        "results volume", _objects(POOL, lambda found: _claims(found, accessModes=["ReadWriteMany"])), "failed",
        "StorageClass local (rancher.io/local-path) does not have",
    ),
    "pending claim": (
        "volume claims",
        _cluster(f"{API}/persistentvolumeclaims", claim("more") | {"status": {"phase": "Pending"}},
                 "persistentvolumeclaims"),
        "failed", "not bound: more (Pending)",
    ),
    "other labels of dns": (
        "dns", _values(SERVER, networkPolicy={"dns": {"namespaceLabels": {"a": "b"}, "podLabels": {"k8s-app": "dns"}}}),
        "failed", "no pod has the labels k8s-app=dns in a=b",
    ),
    "dns down": (
        "dns",
        _patched("/api/v1/namespaces/kube-system/pods/coredns/status", {"status": {"conditions": []}},
                 {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}, "pods"),
        "failed", "no DNS pod of 1 is ready",
    ),
    "small quota": (
        "quota", _cluster(f"{API_OF_RUNS}/resourcequotas", _quota({"limits.memory": "512Mi"}), QUOTAS),
        "failed", "limits.memory",
    ),
    "quota used up": (
        "quota",
        _cluster(f"{API_OF_RUNS}/resourcequotas", _quota({"pods": "20"}, status=QUOTA_STATUS), QUOTAS),
        "warning", "pods of small (19 of 20)",
    ),
    "quota below the limit of the pool": (
        "quota for concurrent runs",
        _cluster(f"{API_OF_RUNS}/resourcequotas", _quota({"requests.cpu": "1"}), QUOTAS),
        "warning", "has room for 5 runs at once, the work pool allows 10",
    ),
    "small nodes": (
        "node capacity",
        _objects(SERVER, lambda found: _spec(found, "Deployment", f"{SERVER}-api")["containers"][0].update(
            resources={"requests": {"cpu": "64"}})),
        "failed", "can hold prefect-server-api, which requests cpu 64",
    ),
    "absent secret": ("secrets", _without(f"{API_OF_RUNS}/secrets/warehouse", "nothing"), "failed", "Secret warehouse"),
    "absent secret of backups": (
        "secrets",
        _objects(SERVER, lambda found: _backup(found)["containers"][0].update(
            envFrom=[{"secretRef": {"name": "bucket"}}])),
        "failed", "Secret bucket",
    ),
    "absent priority class of backups": (
        "classes", _objects(SERVER, lambda found: _backup(found).update(priorityClassName="low")), "failed",
        "PriorityClass low",
    ),
    "absent key": (
        "secrets",
        _patched(f"{API_OF_RUNS}/secrets/warehouse", {"data": {"url": None}}, {"stringData": {"url": "u"}}, "nothing"),
        "failed", "key url of Secret warehouse",
    ),
    "absent priority class": (
        "classes", _without("/apis/scheduling.k8s.io/v1/priorityclasses/prefect-runs", "priorityclasses"), "failed",
        "PriorityClass prefect-runs",
    ),
    "lax namespace": (
        "pod security",
        _patched(f"/api/v1/namespaces/{NAMESPACE}", {"metadata": {"labels": {LABEL: "baseline"}}},
                 {"metadata": {"labels": {LABEL: "restricted"}}}, "namespaces"),
        "warning", "enforces baseline",
    ),
    "no admission policy": (
        "admission policy", _without(POLICY, "validatingadmissionpolicies"),
        "failed", "ValidatingAdmissionPolicy of the",
    ),
    "admission policy off": (
        "admission policy", _values(POOL, admissionPolicy={"enabled": False}),
        "warning", "admissionPolicy.enabled is false",
    ),
    "admission policy in old kubernetes": (
        "admission policy", _versions("v1.29.3", "v1.29.1"),
        "warning", "before 1.30",
    ),
    "network policies off": (
        "network policies", _values(POOL, networkPolicy={"enabled": False}), "warning", f"of {POOL} is false",
    ),
    "network policy gone": (
        "network policies",
        _without(f"/apis/networking.k8s.io/v1/namespaces/{NAMESPACE}/networkpolicies/{SERVER}-database",
                 "networkpolicies"),
        "failed", f"NetworkPolicy {SERVER}-database is gone",
    ),
    "refused values": ("chart values", _refused_values, "failed", "pattern '^(sha256:"),
    "pending release": (
        "helm releases", _known(pool_revisions=[{"revision": 3, "status": "pending-upgrade"}]), "failed",
        "revision 3 of prefect-work-pool is pending-upgrade",
    ),
    "half an install": ("helm releases", _known(pool_revisions=[]), "failed", "prefect-work-pool is not installed"),
    "pod not ready": (
        "pods",
        _cluster(f"{API}/pods", pod("broken", {"app.kubernetes.io/instance": SERVER})
                 | {"status": _waiting("CreateContainerConfigError")}, "pods"),
        "failed", "pod/broken main: CreateContainerConfigError",
    ),
    "image that is not pulled": (
        "image", _cluster(f"{API}/pods", pod("broken", {}) | {"status": _waiting("ImagePullBackOff")}, "pods"),
        "failed",
        "absent:1 of pod broken: ImagePullBackOff",
    ),
    "image that is not pushed": ("image", _absent_image, "failed", "registry/image:1 is not in the registry"),
    "no password": ("password", _values(SERVER, auth={"enabled": False}), "failed", "auth.enabled is false"),
    "password of examples": ("password", _password("admin:changeme"), "failed", "one of an example"),
    "short password": ("password", _password("admin:x7#kP"), "failed", "shorter than 12"),
    "nginx of one minute": ("ingress timeouts", _objects(SERVER, _ingress), "warning", "proxy-read-timeout 60"),
    "route of one minute": ("ingress timeouts", _objects(SERVER, _http_route), "warning", "ends requests after 60s"),
    "no retention": ("retention", _shared(_known()), "warning", "runs are kept for ever"),
    "vacuum of prefect": (
        "retention", _shared(_objects(SERVER, _vacuum_of_runs)), "warning", "also the last successful run",
    ),
    "no backup": ("backup", _shared(_without(BACKUP, "cronjobs")), "warning", "no CronJob backs the bundled database"),
    "old backup": (
        "backup",
        _shared(_patched(f"{BACKUP}/status", {"status": {"lastSuccessfulTime": OLD, "lastScheduleTime": OLD}},
                         {"status": None}, "cronjobs")),
        "failed", "the last backup is 12",
    ),
    "backup that never ran": ("backup", _shared(_known()), "warning", "no backup yet"),
    "wal that is not archived": (
        "backup", _shared(_cnpg({"ContinuousArchiving": "False"})), "failed", "the WAL is not archived: no bucket",
    ),
    "no base backup": (
        "backup", _shared(_cnpg({"ContinuousArchiving": "True"})), "warning", "no base backup has succeeded",
    ),
    "absent cluster": ("backup", _shared(_cnpg(None)), "failed", "Cluster db of CloudNativePG is gone"),
    "full volume of a cluster": ("database size", _cnpg({}, size=int(0.99 * 2**30)), "failed", "99% of its volume"),
    "one pod of a cluster": ("replicas", _shared(_cnpg({})), "warning", "worker, reconciler, database: its node"),
    "one pod of the api": ("replicas", _shared(_known()), "warning", "one pod of api, services, worker, reconciler"),
    "database away": (
        "database", _known(report=REPORT | {"database": {"error": "connection refused"}}),
        "failed", "connection refused",
    ),
    "old database": ("database", _report("database", version=130004), "failed", "Postgres 13.4; Prefect needs 14.9"),
    "read-only database": ("database", _report("database", read_only=True), "failed", "read-only"),
    "distant database": ("database latency", _report("database", latency_ms=30.0), "warning", "30.0 ms"),
    "far database": ("database latency", _report("database", latency_ms=300.0), "failed", "300.0 ms"),
    "few connections": (
        "database connections", _report("database", max_connections=20), "warning", "open up to 30",
    ),
    "few connections for pgbouncer": (
        "database connections",
        _values(SERVER, pgbouncer={"enabled": True, "replicas": 3, "defaultPoolSize": 30, "reservePoolSize": 5}),
        "warning", "PgBouncer and the services open up to 106",
    ),
    "no connection left": ("database connections", _report("database", connections=96), "failed", "96 of 97"),
    "full volume": ("database size", _report("database", size=int(1.98 * 2**30)), "failed", "99% of its volume"),
    "filling volume": ("database size", _report("database", size=int(1.7 * 2**30)), "warning", "85% of its volume"),
    "no extension": ("database extension", _report("database", extension=False), "failed", "pg_trgm is not installed"),
    "full redis": (
        "redis memory", _report("redis", used=127 * 2**20, eviction="noeviction"), "failed", "99% of maxmemory",
    ),
    "filling redis": ("redis memory", _report("redis", used=120 * 2**20), "warning", "94% of maxmemory"),
    "redis that evicts all keys": (
        "redis memory", _report("redis", eviction="allkeys-lru"),
        "failed", "may evict leases",
    ),
    "redis of two releases": (
        "redis shared", _report("redis", hosts=["other-release-services-2", "prefect-server-api-1"]), "failed",
        "other processes use this database: other-release-services-2",
    ),
    "slow clock of kubernetes": (
        "clocks", _report("database", ahead_seconds=-40.0),
        "failed", "database is 40 s behind",
    ),
    "clock that drifts": ("clocks", _report("database", ahead_seconds=5.0), "warning", "database is 5 s ahead"),
}  # fmt: skip


FURTHER_FAULTS = {
    "lost node", "no lease of the reconciler", "reconciler reads secrets", "two default classes", "absent class",
    "absent class of backups", "class of one node", "dns down", "quota used up", "absent secret of backups",
    "absent priority class of backups", "absent key", "admission policy off", "network policies off",
    "image that is not pushed", "half an install", "vacuum of prefect", "backup that never ran",
    "no base backup", "absent cluster", "one pod of a cluster",
}  # fmt: skip
"""Faults that ask the cluster, or read values and objects, of checks of which `make test` tries another fault."""


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=pytest.mark.further if name in FURTHER_FAULTS else ()) for name in FAULTS]
)
def test_fault_is_found(patient: Patient, sound: dict[str, Finding], fault: str) -> None:
    name, cause, status, text = FAULTS[fault]
    assert name not in sound or sound[name].status != status
    with cause(patient) as known:
        finding = asyncio.run(_found(patient, name, copy.deepcopy(known)))
    assert (finding.status, text in finding.text) == (status, True), finding
    assert finding.cure
    assert "\n" not in finding.text + finding.cure


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize(("completed", "status"), [("03:05", "ok"), ("01:05", "failed")])
def test_failed_backup_is_wrong_until_a_later_one_completes(patient: Patient, completed: str, status: str) -> None:
    def time_of(clock: str) -> str:
        return f"2026-01-01T{clock}:00Z"

    def job(name: str, **ended: Any) -> Object:
        conditions = [
            {"type": kind, "status": "True", "message": "backoff limit", "reason": "Ended"} for kind in ended["kinds"]
        ]
        times = {key: time_of(clock) for key, clock in ended["times"].items()}
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name, "labels": owner["metadata"]["labels"], "ownerReferences": [reference]},
            "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "store", "image": "i"}]}}},
            "status": {"conditions": conditions, **times},
        }

    owner = patient.api.client.get(BACKUP).raise_for_status().json()
    reference = {"apiVersion": "batch/v1", "kind": "CronJob", "name": owner["metadata"]["name"], "controller": True,
                 "uid": owner["metadata"]["uid"]}  # fmt: skip
    jobs = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
    started = f"{completed[:3]}00"
    times = {"startTime": started, "completionTime": completed}
    create(patient.api, jobs, job("failed", kinds=["FailureTarget", "Failed"], times={"startTime": "02:00"}))
    create(patient.api, jobs, job("completed", kinds=["SuccessCriteriaMet", "Complete"], times=times))
    finding = asyncio.run(_found(patient, "pods", {}))
    for name in ("failed", "completed"):
        delete(patient.api, f"{jobs}/{name}")
    assert (finding.status, "job/failed: backoff limit" in finding.text) == (status, status == "failed"), finding


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize(("name", "text"), [("backup", "the WAL is archived"), ("secrets", "with their keys")])
def test_server_on_a_cluster_of_cloudnative_pg_is_sound(patient: Patient, name: str, text: str) -> None:
    """The operator, not a release, creates the Secrets with the login and the CA. Here it has not yet done so."""
    with _shared(_cnpg({"ContinuousArchiving": "True", "LastBackupSucceeded": "True"}))(patient) as known:
        login = {"name": "PGPASSWORD", "valueFrom": {"secretKeyRef": {"name": "db-app", "key": "password"}}}
        spec = _spec(known["server_objects"], "Deployment", f"{SERVER}-api")
        spec["containers"][0]["env"].append(login)
        source = {"secretName": "db-ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
        spec["volumes"].append({"name": "database-ca", "secret": source})
        finding = asyncio.run(_found(patient, name, known))
    assert (finding.status, text in finding.text) == ("ok", True), finding


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize(("enabled", "status"), [(False, "warning"), (True, "ok")])
def test_pgbouncer_bounds_the_connections_of_many_api_pods(patient: Patient, enabled: bool, status: str) -> None:
    with _values(SERVER, api={"replicas": 9}, pgbouncer={"enabled": enabled})(patient) as known:
        finding = asyncio.run(_found(patient, "database connections", known))
    assert finding.status == status, finding


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize(
    ("is_issued", "status"), [pytest.param(False, "failed", marks=pytest.mark.further), (True, "ok")]
)
def test_secret_of_a_certificate_may_be_made_after_the_install(patient: Patient, is_issued: bool, status: str) -> None:
    def mount(objects: list[Object]) -> None:
        source = {"secretName": "tls", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
        _spec(objects, "Deployment", f"{SERVER}-api")["volumes"].append({"name": "tls", "secret": source})
        if is_issued:
            objects.append({"kind": "Certificate", "metadata": {"name": "tls"}, "spec": {"secretName": "tls"}})

    with _objects(SERVER, mount)(patient) as known:
        finding = asyncio.run(_found(patient, "secrets", known))
    assert finding.status == status, finding


@pytest.mark.usefixtures("sound")
@pytest.mark.parametrize(
    ("revisions", "status"), [([], "ok"), pytest.param([{"revision": 1}], "failed", marks=pytest.mark.further)]
)
def test_ca_of_the_api_is_copied_by_the_first_deploy(patient: Patient, revisions: list[Object], status: str) -> None:
    def mount(objects: list[Object]) -> None:
        source = {"secretName": "ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
        pod = {"containers": [], "volumes": [{"name": "api-ca", "secret": source}]}
        metadata = {"name": "run", "namespace": RUNS}
        objects.append({"kind": "Job", "metadata": metadata, "spec": {"template": {"spec": pod}}})
        objects.append({"kind": "Secret", "metadata": {"name": "ca"}, "data": {"ca.crt": ""}})

    copied = patched.object(namespace_of_runs, "copied_ca", lambda _: ("ca", "ca.crt"))
    with _objects(SERVER, mount)(patient) as known, copied:
        finding = asyncio.run(_found(patient, "secrets", {**known, "pool_revisions": revisions}))
    assert finding.status == status, finding


@pytest.fixture
def set_namespace(patient: Patient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that writes `runs.namespace` into a copy of the environment's values, and returns the file."""
    folder = tmp_path / "helm" / "environments" / "local"
    shutil.copytree(patient.environment.values, folder)
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    file = folder / f"{POOL}.yaml"

    def write(namespace: str) -> Path:
        values = yaml.safe_load(file.read_text())
        values["runs"]["namespace"] = namespace
        file.write_text(yaml.safe_dump(values))
        return file

    return write


@pytest.fixture
def together(patient: Patient, set_namespace: Callable[[str], Path]) -> Iterator[Patient]:
    """Yield the installation with its runs in the namespace of the releases."""
    environment = patient.environment
    files = ["--values", str(set_namespace("")), "--set-string", "image.tag=1", "--no-hooks"]
    # The other tests have changed objects of the release, and put them back.
    files += ["--force-conflicts", "--set", f"runs.formerNamespaces={{{RUNS}}}"]
    environment.helm("upgrade", POOL, str(CHARTS / POOL), *files)
    create(patient.api, f"{API}/persistentvolumeclaims", claim("results-prefect-work-pool-results-0"))
    yield Patient(patient.api, environment)
    environment.helm("rollback", POOL, "1", "--no-hooks", "--force-conflicts")
    patch(patient.api, API, {"metadata": {"labels": {LABEL: "restricted"}}})


@pytest.mark.further
def test_runs_in_the_namespace_of_the_releases_are_checked_there(together: Patient, sound: dict[str, Finding]) -> None:
    names = [check.name for check in CHECKS if check.name not in NEEDS_SERVER | NEEDS_PODS]
    findings = asyncio.run(together.examine(names))
    assert {name: finding for name, finding in findings.items() if finding.status not in ("ok", "not checked")} == {}
    assert findings["nodes"] == sound["nodes"]
    assert findings["dns"] == sound["dns"]
    assert {findings[name].status for name in names if name not in OF_SHARED_ENVIRONMENTS} == {"ok"}

    patch(together.api, API, {"metadata": {"labels": {LABEL: "baseline"}}})
    delete(together.api, f"{API}/secrets/warehouse")
    delete(together.api, f"{RBAC}/rolebindings/{POOL}-worker")
    delete(together.api, f"{RBAC}/rolebindings/{POOL}-reconciler")
    create(together.api, f"{API}/resourcequotas", _quota({"limits.memory": "512Mi"}))
    create(together.api, f"{API_OF_RUNS}/resourcequotas", _quota({"limits.cpu": "1m"}))
    findings = asyncio.run(together.examine(names))
    delete(together.api, f"{API}/resourcequotas/small")
    delete(together.api, f"{API_OF_RUNS}/resourcequotas/small")
    wrong = {name: finding.text for name, finding in findings.items() if finding.status not in ("ok", "not checked")}
    assert f"namespace {NAMESPACE} enforces baseline" in wrong.pop("pod security")
    assert "missing: Secret warehouse;" in wrong.pop("secrets")
    assert "may not create jobs" in wrong.pop("rights of the worker")
    assert "may not list jobs" in wrong.pop("rights of the reconciler")
    assert "limits.memory" in wrong.pop("quota")
    assert "has room for 0 runs at once" in wrong.pop("quota for concurrent runs")
    assert wrong == {}


@pytest.mark.further
@pytest.mark.usefixtures("sound")
def test_move_of_the_runs_is_no_fault_before_its_deploy(patient: Patient, set_namespace: Callable[[str], Path]) -> None:
    """The namespace of the runs does not exist, and the worker has no rights in it."""
    set_namespace("later")
    names = ["rights of the worker", "rights of the reconciler", "secrets", "quota", "pod security"]
    findings = asyncio.run(Patient(patient.api, patient.environment).examine(names))
    for name in names[:2]:
        assert findings[name].status == "not checked"
        assert "the values put runs into namespace later" in findings[name].text
    assert {findings[name].status for name in names[2:]} == {"ok"}, findings


async def _found(patient: Patient, name: str, known: dict[str, Any]) -> Finding:
    return await patient.find(name, **known)


def test_helm_before_4_is_a_warning(patient: Patient, sound: dict[str, Finding]) -> None:
    """No machine has two Helms."""
    with patched.object(Environment, "helm", lambda *_: "v3.19.0"):
        finding = asyncio.run(_found(patient, "helm version", {}))
    assert (finding.status, finding.text) == ("warning", "Helm v3.19.0; the charts are tested with Helm 4")


def test_every_check_has_a_test_of_its_fault() -> None:
    elsewhere = NEEDS_SERVER | {"helm version"}
    assert {check.name for check in CHECKS} == {name for name, *_ in FAULTS.values()} | elsewhere
    assert all(check.purpose for check in CHECKS)
    assert cluster_checks.GROUP in {check.group for check in CHECKS}
