"""Checks of the cluster: versions, rights, storage, DNS, capacity, policies."""

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import yaml

from orchestration.deployments import quota
from orchestration.deployments.pod_resources import pod_of, total
from orchestration.errors import ClusterError
from orchestration.operations import namespace_of_runs
from orchestration.operations.doctor.findings import Finding, check, failed, ok, warning
from orchestration.operations.doctor.installation import (
    Installation,
    containers_of,
    is_cluster,
    parse_documents,
    version_of,
)
from orchestration.operations.environment import POOL, RELEASES, SERVER, Object
from orchestration.operations.port_forward import AUTH_SECRET
from orchestration.operations.release_inputs import CHARTS
from orchestration.quantity import format_quantity, parse_quantity

GROUP = "cluster"

MAX_KUBELET_LAG = 3
"""How many minor versions a kubelet may be older than the API server. Source: Kubernetes, "Version Skew Policy"."""

SINGLE_NODE_PROVISIONERS = frozenset(
    {
        "ebs.csi.aws.com", "kubernetes.io/aws-ebs", "pd.csi.storage.gke.io", "kubernetes.io/gce-pd",
        "disk.csi.azure.com", "kubernetes.io/azure-disk", "cinder.csi.openstack.org", "csi.hetzner.cloud",
        "dobs.csi.digitalocean.com", "linodebs.csi.linode.com", "csi.vsphere.vmware.com", "rancher.io/local-path",
        "kubernetes.io/no-provisioner",
    }
)  # fmt: skip
"""Provisioners of volumes that only the pods of one node can mount."""

INSTALL_VERBS = ("get", "create", "patch", "delete")

EXCESSIVE = (("", "secrets", "get"), ("", "pods", "create"), ("rbac.authorization.k8s.io", "rolebindings", "create"))
"""Rights, each as group, resource and verb, that worker and reconciler must not have."""

FULL = Decimal("0.9")
"""The share of a quota from which on a warning is due."""


def _kube_version() -> tuple[int, int]:
    """Return the oldest Kubernetes version that the charts accept."""
    return version_of(yaml.safe_load((CHARTS / SERVER / "Chart.yaml").read_text())["kubeVersion"])


@check(GROUP, "kubernetes version")
async def check_kubernetes_version(installation: Installation) -> Finding:
    """Kubernetes is new enough for the charts, and kubectl within one minor version of Kubernetes."""
    versions = await installation.read_versions()
    server, client = (version_of(versions[name]["gitVersion"]) for name in ("serverVersion", "clientVersion"))
    shown = versions["serverVersion"]["gitVersion"]
    oldest = _kube_version()
    if server < oldest:
        return failed(f"Kubernetes {shown}; the charts need {oldest[0]}.{oldest[1]}", "Upgrade the cluster")
    if abs(server[1] - client[1]) > 1:
        return warning(
            f"kubectl is {versions['clientVersion']['gitVersion']}, Kubernetes is {shown}",
            f"Install kubectl {server[0]}.{server[1]}",
        )
    return ok(f"Kubernetes {shown}, kubectl {versions['clientVersion']['gitVersion']}")


@check(GROUP, "helm version")
async def check_helm_version(installation: Installation) -> Finding:
    """Helm is of the major version that the charts are tested with."""
    text = await asyncio.to_thread(installation.cluster.helm, "version", "--template", "{{.Version}}")
    if version_of(text)[0] < 4:
        return warning(f"Helm {text}; the charts are tested with Helm 4", "Install Helm 4")
    return ok(f"Helm {text}")


@check(GROUP, "nodes")
async def check_nodes(installation: Installation) -> Finding:
    """Nodes are ready, and their kubelets are not newer than the API server nor too old."""
    server = version_of((await installation.read_versions())["serverVersion"]["gitVersion"])
    nodes = await installation.read_objects("nodes")
    skewed = [
        f"{node['metadata']['name']} {node['status']['nodeInfo']['kubeletVersion']}"
        for node in nodes
        if not 0 <= server[1] - version_of(node["status"]["nodeInfo"]["kubeletVersion"])[1] <= MAX_KUBELET_LAG
    ]
    if skewed:
        return failed(
            f"kubelets that Kubernetes {server[0]}.{server[1]} does not support: {shorten(skewed)}",
            "Upgrade these nodes",
        )
    unready = [node["metadata"]["name"] for node in nodes if not _is_ready(node)]
    if len(unready) == len(nodes):
        return failed(f"no node of {len(nodes)} is ready", "Look at: kubectl describe nodes")
    if unready:
        return warning(f"nodes are not ready: {shorten(unready)}", f"Look at: kubectl describe node {unready[0]}")
    return ok(f"{count(nodes, 'node')}, ready")


def _is_ready(item: Object) -> bool:
    conditions = item.get("status", {}).get("conditions") or []
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


@check(GROUP, "rights of the installer")
async def check_installer_rights(installation: Installation) -> Finding:
    """You may create, change and delete each kind of object that the charts and `k8s/` have."""
    wanted = []
    objects = [*await installation.read_surroundings()]
    for release in RELEASES:
        objects += await installation.read_release(release)
    kinds = {(_group(found), _resource(found["kind"]), installation.namespace_of(found)) for found in objects}
    for group, resource, namespace in sorted(kinds):
        place = {} if resource in _CLUSTER_WIDE else {"namespace": namespace}
        wanted += [{"group": group, "resource": resource, "verb": verb} | place for verb in INSTALL_VERBS]
    denied = await _review(installation, "SelfSubjectAccessReview", wanted, {})
    if denied:
        return failed(
            f"you may not {shorten(denied)}",
            "Ask for a Role with these rights; for installs without cluster-wide rights see docs/reference/rbac.md",
        )
    return ok(f"{len(wanted)} rights")


_CLUSTER_WIDE = frozenset(
    {
        "namespaces", "priorityclasses", "clusterroles", "clusterrolebindings", "validatingadmissionpolicies",
        "validatingadmissionpolicybindings",
    }
)  # fmt: skip


def _group(found: Object) -> str:
    return str(found["apiVersion"]).rpartition("/")[0]


def _resource(kind: str) -> str:
    """Return the name of a kind in the API's paths."""
    name = kind.lower()
    if name.endswith("y"):
        return f"{name[:-1]}ies"
    return f"{name}es" if name.endswith("s") else f"{name}s"


async def _review(
    installation: Installation, kind: str, wanted: list[dict[str, str]], subject: Mapping[str, Any]
) -> list[str]:
    """Return what is denied, of the verbs on resources that are `wanted`, as `VERB RESOURCE`.

    Args:
        installation: the installation.
        kind: SelfSubjectAccessReview or SubjectAccessReview.
        wanted: the resource attributes of each review.
        subject: user and groups.
    """
    if not wanted:
        return []
    reviews = [
        {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": {"resourceAttributes": attributes, **subject}}
        for attributes in wanted
    ]
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": reviews})
    answers = parse_documents(await installation.kubectl("create", "--filename", "-", "--output", "json", text=text))
    denied = [answer["spec"]["resourceAttributes"] for answer in answers if not answer["status"]["allowed"]]
    texts = (
        f"{attributes['verb']} {'/'.join(filter(None, (attributes['resource'], attributes.get('subresource'))))}"
        for attributes in denied
    )
    return [*dict.fromkeys(texts)]


@check(GROUP, "rights of the worker")
async def check_worker_rights(installation: Installation) -> Finding:
    """The worker's service account has the rights of its Role, and no excessive ones."""
    return await _check_account(installation, "worker")


@check(GROUP, "rights of the reconciler")
async def check_reconciler_rights(installation: Installation) -> Finding:
    """The reconciler's service account has the rights of its Role, and no excessive ones."""
    return await _check_account(installation, "reconciler")


async def _check_account(installation: Installation, component: str) -> Finding:
    await installation.ensure_installed(POOL)
    await installation.ensure_runs_moved()
    namespace = installation.cluster.namespace
    account = (await installation.read_component(POOL, component)).get("serviceAccountName", "default")
    wanted = []
    for role in await installation.read_roles(component):
        for rule in role["rules"]:
            for resource in rule["resources"]:
                name, _, subresource = resource.partition("/")
                attributes = {
                    "group": rule["apiGroups"][0], "resource": name, "subresource": subresource,
                    "namespace": installation.namespace_of(role),
                }  # fmt: skip
                names = [{"name": object_name} for object_name in rule.get("resourceNames", [])] or [{}]
                wanted += [
                    attributes | named_object | {"verb": verb} for verb in rule["verbs"] for named_object in names
                ]
    subject = {
        "user": f"system:serviceaccount:{namespace}:{account}",
        "groups": ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"],
    }
    denied = await _review(installation, "SubjectAccessReview", wanted, subject)
    if denied:
        return failed(
            f"account {account} may not {shorten(denied)}",
            f"Set {component}.rbac.create, or bind a Role with the rules of docs/reference/rbac.md",
        )
    for place in installation.cluster.namespaces:
        excessive = [
            {"group": group, "resource": resource, "verb": verb, "namespace": place}
            for group, resource, verb in EXCESSIVE
        ]
        withheld = await _review(installation, "SubjectAccessReview", excessive, subject)
        if granted := [f"{right['verb']} {right['resource']}" for right in excessive
                       if f"{right['verb']} {right['resource']}" not in withheld]:  # fmt: skip
            return warning(
                f"account {account} may {shorten(granted)} in namespace {place}, which the {component} does not need",
                f"Remove the binding: kubectl get rolebindings,clusterrolebindings -A -o wide | grep {account}",
            )
    return ok(f"account {account} has the rights of its Role, and no more")


@check(GROUP, "storage class")
async def check_storage_class(installation: Installation) -> Finding:
    """The StorageClasses of the volumes exist: the named ones, and a default class for the others."""
    classes = await installation.read_objects("storageclasses")
    names = {found["metadata"]["name"] for found in classes}
    defaults = [found["metadata"]["name"] for found in classes if _is_default(found)]
    claims = list(await _read_claims(installation))
    wanted = {claim["spec"].get("storageClassName", "") for claim in claims}
    if missing := sorted(filter(None, wanted - names)):
        return failed(
            f"there is no StorageClass {shorten(missing)}",
            f"Name one of these in the values: {shorten(sorted(names)) or 'none'}",
        )
    if "" in wanted and not defaults:
        return failed(
            "no StorageClass is the default one, and volumes name none",
            "Name a class in the values: database.bundled.storage.className, runs.results.volume.storageClass",
        )
    if "" in wanted and len(defaults) > 1:
        return warning(
            f"several StorageClasses are the default one: {shorten(defaults)}",
            "Keep the annotation storageclass.kubernetes.io/is-default-class on one of them",
        )
    return ok(f"{count(claims, 'volume')}: {shorten(sorted({name or defaults[0] for name in wanted})) or 'no class'}")


def _is_default(storage_class: Object) -> bool:
    annotations = storage_class["metadata"].get("annotations") or {}
    return annotations.get("storageclass.kubernetes.io/is-default-class") == "true"


async def _read_claims(installation: Installation) -> Iterable[Object]:
    """Return the volume claims that the releases create."""
    claims: list[Object] = []
    for release in RELEASES:
        for found in await installation.read_release(release):
            if found["kind"] == "StatefulSet":
                claims += found["spec"].get("volumeClaimTemplates") or []
            elif found["kind"] == "PersistentVolumeClaim":
                claims.append(found)
    return claims


@check(GROUP, "results volume")
async def check_results_volume(installation: Installation) -> Finding:
    """Pods of all nodes can mount the volume of `runs.results`."""
    claims = [
        volume_claim
        for volume_claim in await _read_claims(installation)
        if volume_claim["metadata"]["name"] == "results"
    ]
    if not claims:
        return ok("results are on no volume that the chart creates")
    [claim] = claims
    modes = claim["spec"]["accessModes"]
    if "ReadWriteMany" not in modes:
        nodes = [node for node in await installation.read_objects("nodes") if not node["spec"].get("unschedulable")]
        if len(nodes) > 1:
            return warning(
                f"{shorten(modes)}: runs on {len(nodes) - 1} of {len(nodes)} nodes cannot mount the volume",
                "Set runs.results.volume.accessModes to [ReadWriteMany] with a StorageClass for it, or storage: s3",
            )
        return ok(f"{shorten(modes)}, on one node")
    name = claim["spec"].get("storageClassName")
    for found in await installation.read_objects("storageclasses"):
        is_used = found["metadata"]["name"] == name if name else _is_default(found)
        if is_used and found["provisioner"] in SINGLE_NODE_PROVISIONERS:
            return failed(
                f"ReadWriteMany, which StorageClass {found['metadata']['name']} ({found['provisioner']}) does not have",
                "Name a class of a shared file system in runs.results.volume.storageClass, or set storage: s3",
            )
    return ok("ReadWriteMany")


@check(GROUP, "volume claims")
async def check_volume_claims(installation: Installation) -> Finding:
    """All volume claims of the namespace are bound."""
    await installation.ensure_installed()
    claims = await installation.read_objects("persistentvolumeclaims")
    unbound = [f"{claim['metadata']['name']} ({claim['status'].get('phase')})" for claim in claims
               if claim["status"].get("phase") != "Bound"]  # fmt: skip
    if unbound:
        name = unbound[0].partition(" ")[0]
        return failed(
            f"not bound: {shorten(unbound)}", f"See its events: kubectl describe persistentvolumeclaim {name}"
        )
    return ok(f"{count(claims, 'claim')}, bound")


@check(GROUP, "dns")
async def check_dns(installation: Installation) -> Finding:
    """The DNS pods have the labels that the NetworkPolicies open."""
    policy = (await installation.read_values(SERVER))["networkPolicy"]
    if not policy["enabled"]:
        return ok("no NetworkPolicy restricts DNS")
    of_namespace, of_pod = (_selector(policy["dns"][key]) for key in ("namespaceLabels", "podLabels"))
    namespaces = await installation.read_objects("namespaces", "--selector", of_namespace)
    pods = await installation.read_objects("pods", "--all-namespaces", "--selector", of_pod)
    names = {namespace["metadata"]["name"] for namespace in namespaces}
    found = [pod for pod in pods if pod["metadata"]["namespace"] in names]
    if not found:
        return failed(
            f"no pod has the labels {of_pod} in {of_namespace}: the NetworkPolicies deny DNS",
            "Set networkPolicy.dns of both charts to the labels of the cluster's DNS pods",
        )
    ready = [pod for pod in found if _is_ready(pod)]
    if not ready:
        return failed(f"no DNS pod of {len(found)} is ready", "Look at the pods: kubectl -n kube-system get pods")
    return ok(f"{len(ready)} of {count(found, 'DNS pod')} ready")


def _selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in labels.items())


@check(GROUP, "quota")
async def check_quota(installation: Installation) -> Finding:
    """The pod of a run fits the ResourceQuotas and LimitRanges of its namespace."""
    quotas = await _read_quotas(installation)
    if not quotas:
        return ok("the namespace has no quota")
    template = await installation.read_job_template()
    if problems := quota.find_problems(template, {}, quotas):
        return failed(problems[0].partition(". ")[0], problems[0].partition(". ")[2])
    used_up = []
    for resource_quota in quotas:
        status = resource_quota.get("status") or {}
        for key, used in (status.get("used") or {}).items():
            hard = (status.get("hard") or {}).get(key, "0")
            if parse_quantity(hard) and parse_quantity(used) >= parse_quantity(hard) * FULL:
                used_up.append(f"{key} of {resource_quota['metadata']['name']} ({used} of {hard})")
    if used_up:
        return warning(f"almost used up: {shorten(used_up)}; further runs wait", "Raise the quota, or end runs")
    return ok(f"a run fits {count(quotas, 'quota or limit range', 'quotas and limit ranges')}")


@check(GROUP, "quota for concurrent runs")
async def check_quota_of_all_runs(installation: Installation) -> Finding:
    """The quota has room for as many runs as the work pool lets run at the same time."""
    limit = (await installation.read_values(POOL))["pool"]["concurrencyLimit"]
    quotas = await _read_quotas(installation)
    room = quota.count_runs(await installation.read_job_template(), quotas)
    if room is None:
        return ok("no quota limits the number of runs")
    runs, name = room
    if limit is None or limit > runs:
        allowed = "the work pool has no concurrency limit" if limit is None else f"the work pool allows {limit}"
        return warning(
            f"{name} has room for {runs} runs at once, {allowed}: the others are claimed and wait",
            f"Set pool.concurrencyLimit to {runs}, or raise the quota",
        )
    return ok(f"{name} has room for {runs} runs at once, the work pool allows {limit}")


async def _read_quotas(installation: Installation) -> list[Object]:
    """Return the quotas of the namespace of runs; before the first deploy those that it would create."""
    namespace = installation.cluster.runs_namespace
    if await _read_namespace(installation, namespace):
        found = await installation.read_objects("resourcequotas,limitranges")
    else:
        surroundings = await installation.read_surroundings()
        found = [manifest for manifest in surroundings if manifest["kind"] in ("ResourceQuota", "LimitRange")]
    return [resource_quota for resource_quota in found if installation.namespace_of(resource_quota) == namespace]


async def _read_namespace(installation: Installation, name: str) -> list[Object]:
    """Return a namespace; nothing if it does not exist."""
    return await installation.read_objects("namespaces", "--field-selector", f"metadata.name={name}")


@check(GROUP, "node capacity")
async def check_node_capacity(installation: Installation) -> Finding:
    """A node can hold the pod of a run, and that of each component."""
    nodes = [node for node in await installation.read_objects("nodes") if not node["spec"].get("unschedulable")]
    _, containers = pod_of(await installation.read_job_template(), {})
    wanted = {"a run": {key: total(containers, f"requests.{key}") for key in ("cpu", "memory")}}
    for release in RELEASES:
        for found in await installation.read_release(release):
            if found["kind"] in ("Deployment", "StatefulSet"):
                wanted[found["metadata"]["name"]] = _requests(found["spec"]["template"]["spec"])
    for name, requests in wanted.items():
        amounts = {key: parse_quantity(value) for key, value in requests.items() if value}
        if not any(_holds(node, amounts) for node in nodes):
            shown = ", ".join(f"{key} {value}" for key, value in requests.items() if value)
            return failed(
                f"no node of {len(nodes)} can hold {name}, which requests {shown}",
                "Lower its resources.requests in the values, or add a larger node",
            )
    return ok(f"{count(nodes, 'node')}: a run and {len(wanted) - 1} components fit")


def _holds(node: Object, amounts: Mapping[str, Decimal]) -> bool:
    allocatable = node["status"].get("allocatable") or {}
    return all(amount <= parse_quantity(allocatable.get(key, "0")) for key, amount in amounts.items())


def _requests(spec: Object) -> dict[str, str]:
    """Return the requests of a pod's main containers in sum."""
    amounts = {}
    for key in ("cpu", "memory"):
        stated = [(container.get("resources") or {}).get("requests", {}).get(key) for container in spec["containers"]]
        if any(stated):
            amount = sum((parse_quantity(str(request)) for request in stated if request), Decimal(0))
            amounts[key] = format_quantity(amount, f"requests.{key}")
    return amounts


@check(GROUP, "secrets")
async def check_secrets(installation: Installation) -> Finding:
    """The Secrets and ConfigMaps that the values name exist and have the keys."""
    wanted = {
        (namespace, *reference)
        for namespace, spec in await installation.read_pod_specs()
        for reference in _references(spec)
    }
    known: dict[tuple[str, str, str], set[str]] = {}
    for release in RELEASES:
        for found in await installation.read_release(release):
            if is_cluster(found):  # CloudNativePG's operator creates the Secrets with the login and the CA.
                namespace, name = installation.namespace_of(found), found["metadata"]["name"]
                known[namespace, "Secret", f"{name}-app"] = {"username", "password", "uri"}
                known[namespace, "Secret", f"{name}-ca"] = {"ca.crt"}
            if found["kind"] == "Certificate":  # cert-manager creates the Secret.
                issued = (installation.namespace_of(found), "Secret", found["spec"]["secretName"])
                known[issued] = {"ca.crt", "tls.crt", "tls.key"}
            if found["kind"] in ("Secret", "ConfigMap"):
                identity = (installation.namespace_of(found), found["kind"], found["metadata"]["name"])
                known[identity] = set(found.get("data") or {})
    keys = '{{range .items}}{{.kind}} {{.metadata.name}}{{range $key, $value := .data}} {{$key}}{{end}}{{"\\n"}}{{end}}'
    is_installed = await installation.is_installed()
    for namespace in installation.cluster.namespaces:
        command = ("get", "secrets,configmaps", "--output", f"go-template={keys}", "--namespace", namespace)
        for line in (await installation.kubectl(*command)).splitlines():
            kind, name, *rest = line.split()
            known[namespace, kind, name] = {*known.get((namespace, kind, name), ()), *rest}
        is_deployed = is_installed and await _read_namespace(installation, namespace)
        if installation.is_local and not is_deployed:
            # `make deploy` creates it.
            known.setdefault((namespace, "Secret", "warehouse"), {"url", "password"})
    if not is_installed:
        for name, key in ((AUTH_SECRET, "auth-string"), namespace_of_runs.copied_ca(installation.cluster)):
            if (installation.cluster.namespace, "Secret", name) in known:
                # `make deploy` copies it.
                known.setdefault((installation.cluster.runs_namespace, "Secret", name), {key})
    missing = {}
    for namespace, kind, name, key in sorted(wanted):
        if (namespace, kind, name) not in known:
            missing[f"{kind} {name}"] = namespace
        elif key and key not in known[namespace, kind, name]:
            missing[f"key {key} of {kind} {name}"] = namespace
    if missing:
        namespace = next(iter(missing.values()))
        return failed(
            f"missing: {shorten(missing)}; pods that need it do not start",
            f"Create it: kubectl -n {namespace} create secret generic NAME --from-literal KEY=...",
        )
    names = {reference[:3] for reference in wanted}
    return ok(f"{count(names, 'Secret or ConfigMap', 'Secrets and ConfigMaps')} with their keys")


def _references(spec: Object) -> set[tuple[str, str, str]]:
    """Return the Secrets and ConfigMaps that a pod cannot start without: kind, name and key; all keys if empty."""
    return {
        found
        for found in _all_references(spec)
        if "{{" not in f"{found[1]}{found[2]}"  # a job variable names it
    }


def _all_references(spec: Object) -> Iterator[tuple[str, str, str]]:
    for container in containers_of(spec):
        for variable in container.get("env") or []:
            source = variable.get("valueFrom") or {} if isinstance(variable, dict) else {}
            for kind, field in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                if field in source and not source[field].get("optional"):
                    yield kind, source[field]["name"], source[field]["key"]
        for whole in container.get("envFrom") or []:
            for kind, field in (("Secret", "secretRef"), ("ConfigMap", "configMapRef")):
                if field in whole and not whole[field].get("optional"):
                    yield kind, whole[field]["name"], ""
    for volume in spec.get("volumes") or []:
        for kind, field, name in (("Secret", "secret", "secretName"), ("ConfigMap", "configMap", "name")):
            source = volume.get(field) if isinstance(volume, dict) else None
            if source and not source.get("optional"):
                yield kind, source[name], ""
                for item in source.get("items") or []:
                    yield kind, source[name], item["key"]
    for pull_secret in spec.get("imagePullSecrets") or []:
        yield "Secret", pull_secret["name"], ".dockerconfigjson"


@check(GROUP, "classes")
async def check_classes(installation: Installation) -> Finding:
    """The PriorityClasses, RuntimeClasses and IngressClasses that the values name exist."""
    wanted = {"PriorityClass": set[str](), "RuntimeClass": set[str](), "IngressClass": set[str]()}
    for _, spec in await installation.read_pod_specs():
        for kind, field in (("PriorityClass", "priorityClassName"), ("RuntimeClass", "runtimeClassName")):
            if (name := spec.get(field)) and "{{" not in name:
                wanted[kind].add(name)
    for found in await installation.read_release(SERVER):
        if found["kind"] == "Ingress" and (name := found["spec"].get("ingressClassName")):
            wanted["IngressClass"].add(name)
    created = set()
    if not await installation.is_installed():
        created = {found["metadata"]["name"] for found in await installation.read_surroundings()}
    missing = []
    for kind, names in wanted.items():
        if names - created:
            existing = await installation.read_names(_resource(kind))
            missing += [f"{kind} {name}" for name in sorted(names - created - set(existing))]
    if missing:
        return failed(
            f"missing: {shorten(missing)}; Kubernetes refuses pods that name it",
            "Create it, or name another in the values",
        )
    return ok(shorten([name for names in wanted.values() for name in sorted(names)]) or "the values name none")


@check(GROUP, "pod security")
async def check_pod_security(installation: Installation) -> Finding:
    """The namespaces of releases and runs enforce the Pod Security Standard `restricted`."""
    label = "pod-security.kubernetes.io/enforce"
    for name in installation.cluster.namespaces:
        namespaces = await _read_namespace(installation, name)
        if not namespaces:
            namespaces = [manifest for manifest in await installation.read_surroundings()
                          if (manifest["kind"], manifest["metadata"]["name"]) == ("Namespace", name)]  # fmt: skip
        levels = [(namespace["metadata"].get("labels") or {}).get(label) for namespace in namespaces]
        if levels != ["restricted"]:
            return warning(
                f"namespace {name} enforces {next(filter(None, levels), 'no Pod Security Standard')}",
                f"kubectl label namespace {name} {label}=restricted",
            )
    return ok("the namespace enforces restricted")


@check(GROUP, "admission policy")
async def check_admission_policy(installation: Installation) -> Finding:
    """A ValidatingAdmissionPolicy checks the worker's Jobs."""
    if not (await installation.read_values(POOL))["admissionPolicy"]["enabled"]:
        return warning("admissionPolicy.enabled is false: only the worker checks its Jobs", "Set it to true")
    version = version_of((await installation.read_versions())["serverVersion"]["gitVersion"])
    if version < (1, 30):
        return warning("Kubernetes before 1.30 has no ValidatingAdmissionPolicy", "Upgrade the cluster")
    await installation.ensure_installed(POOL)
    kinds = ("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding")
    missing = []
    for kind in kinds:
        wanted = {
            manifest["metadata"]["name"]
            for manifest in await installation.read_release(POOL)
            if manifest["kind"] == kind
        }
        if not wanted or wanted - {*await installation.read_names(_resource(kind))}:
            missing.append(kind)
    if missing:
        return failed(
            f"the {shorten(missing)} of the release is gone", f"make deploy ENV={installation.cluster.name} FORCE=1"
        )
    return ok("the API server checks the worker's Jobs")


PROBE = """
import os, socket, sys
address = os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"])
try:
    socket.create_connection(address, 3).close()
except OSError as error:
    sys.exit(f"denied: {error}")
"""
"""Fails where the pod cannot reach the Kubernetes API."""


@check(GROUP, "network policies")
async def check_network_policies(installation: Installation) -> Finding:
    """NetworkPolicies exist, and the network plugin enforces them."""
    off = [release for release in RELEASES if not (await installation.read_values(release))["networkPolicy"]["enabled"]]
    if off:
        return warning(f"networkPolicy.enabled of {shorten(off)} is false", "Set it to true")
    await installation.ensure_installed(POOL)
    wanted = {
        found["metadata"]["name"]
        for release in RELEASES
        for found in await installation.read_release(release)
        if found["kind"] == "NetworkPolicy" and not _is_hook(found)
    }
    present = {found["metadata"]["name"] for found in await installation.read_objects("networkpolicies")}
    if gone := sorted(wanted - present):
        return failed(f"NetworkPolicy {shorten(gone)} is gone", f"make deploy ENV={installation.cluster.name} FORCE=1")
    # The pod of drift may reach DNS and the Prefect API alone.
    await installation.read_component(POOL, "drift")
    try:
        await installation.kubectl("exec", f"deployment/{POOL}-drift", "--", "python", "-c", PROBE)
    except ClusterError as error:
        if "denied: " in str(error):
            return ok(f"{count(present, 'policy', 'policies')}, enforced")
        raise
    return failed(
        "the network plugin does not enforce them: drift reaches the Kubernetes API",
        "Use a network plugin that enforces NetworkPolicies, such as Calico or Cilium",
    )


def _is_hook(found: Object) -> bool:
    return "helm.sh/hook" in (found["metadata"].get("annotations") or {})


def count(items: Any, one: str, many: str = "") -> str:
    """Return a number with its noun."""
    return f"{len(items)} {one if len(items) == 1 else many or f'{one}s'}"


def shorten(names: Iterable[str], most: int = 3) -> str:
    """Return the first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
