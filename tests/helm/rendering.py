"""Render charts to objects that are checked against the Kubernetes schemas. All tests that render use this module."""

import copy
import functools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from orchestration.operations.local_cluster import binaries
from orchestration.settings import ROOT

KUBERNETES = (binaries.KUBERNETES.removeprefix("v").rpartition(".")[0], "1.29")
"""Kubernetes versions whose schemas all objects must meet: that of the local node, and the oldest supported one."""

# Without a cache it reads all definitions (1 MB) and lists its folder for each object.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)
kubernetes_validate.utils.all_versions = functools.cache(kubernetes_validate.utils.all_versions)

Object = dict[str, Any]

EXTENSIONS = (
    "gateway.networking.k8s.io", "monitoring.coreos.com", "cert-manager.io", "postgresql.cnpg.io",
    "barmancloud.cnpg.io",
)  # fmt: skip
"""API groups that Kubernetes itself does not have."""

EVERY_POD: Object = {
    "labels": {"a": "b"},
    "annotations": {"c": "d"},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "important",
    "runtimeClassName": "gvisor",
    "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["db"]}],
    "dnsPolicy": "ClusterFirst",
    "dnsConfig": {"options": [{"name": "ndots", "value": "2"}]},
    "initContainers": [{"name": "native", "image": "proxy:1", "restartPolicy": "Always"}],
    "volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
    "volumeMounts": [{"name": "ca", "mountPath": "/ca"}],
}
"""A value for each key of a chart's `pod` that all of its pods accept."""

POD_RULES: list[tuple[Object, str]] = [
    ({"volumes": [{"name": "a", "emptyDir": {}}] * 2}, "(or pod's) has the "),
    ({"volumeMounts": [{"name": "absent", "mountPath": "/a"}]}, "(or a container's volumeMounts) names the volume "),
    ({"initContainers": [{"name": "a", "image": "a"}] * 2}, ": another container of the pod has this name"),
    ({"initContainers": [{"name": "a"}]}, " without an image"),
    ({"dnsPolicy": "None"}, ".dnsConfig.nameservers: the pod could resolve no name"),
    ({"dnsConfig": {"searches": ["a." * 100 + "a"] * 11}}, ".dnsConfig.searches are longer than 2048"),
    (
        {"nodeSelector": {"a": "{{ x }}"}},
        ": a label's value has up to 63 letters, digits",
    ),
    ({"tolerations": [{"key": "a", "value": "{{ .Release.Name }}_"}]}, " selects "),
    (
        {"sidecars": [{"name": "a", "image": "a", "envFrom": [{"secretRef": {"name": "{{ x }}"}}]}]},
        ": a name has up to 253 lower-case letters",
    ),
    ({"containerSecurityContext": {"privileged": True}}, " has privileged=true and allowPrivilegeEscalation=false"),
    (
        {"sidecars": [{"name": "a", "image": "a", "resources": {"requests": {"cpu": 2}, "limits": {"cpu": 1}}}]},
        " is above ",
    ),
    (
        {"sidecars": [{"name": "a", "image": "a", "lifecycle": {"preStop": {"sleep": {"seconds": 1000}}}}]},
        ".lifecycle sleeps longer than the pod's grace period (",
    ),
    (
        {"initContainers": [{"name": "a", "image": "a", "volumeMounts": [{"name": "tmp", "mountPath": "/a"}] * 2}]},
        "(or pod's) has the ",
    ),
]
"""Values of a component's `pod` that both charts refuse, with a part of the message."""

RESOURCE_RULES: list[tuple[Object, str]] = [
    ({"requests": {"cpu": 3}, "limits": {"cpu": "2500m"}}, ") is above "),
    ({"requests": {"nvidia.com/gpu": 1}}, ": Kubernetes cannot overcommit this resource"),
    ({"limits": {"nvidia.com/gpu": 0.5}}, ": Kubernetes takes only whole units of this resource"),
    (
        {"requests": {"cpu": None, "memory": None}, "limits": {"memory": None, "hugepages-2Mi": "4Mi"}},
        " needs a request of cpu or memory",
    ),
]
"""Values of a component's `resources` that both charts refuse, with a part of the message."""


def one_in_four(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the cases as parameters of a test, three in four of them as further ones: each starts Helm."""
    return [pytest.param(*case, marks=pytest.mark.further if number % 4 else ()) for number, case in enumerate(cases)]


def render(chart: str, values: Object | Path | None = None, release: str = "test") -> list[Object]:
    """Return the objects that a chart renders in the namespace `prefect`.

    Args:
        chart: a folder of `helm/`.
        values: as a mapping, or a values file.
        release: the release's name.

    Raises:
        ClusterError: helm refuses the values. The message has the reason.
        ValidationError: an object violates a Kubernetes schema.
    """
    text = values.read_text() if isinstance(values, Path) else yaml.safe_dump(values or {})
    return copy.deepcopy(_rendered(chart, text, release))


def rendered(chart: str, values: Object, release: str = "test") -> str:
    """Return the text that a chart renders, as Helm sends it.

    Raises:
        ClusterError: helm refuses the values. The message has the reason.
    """
    # JSON, because PyYAML and Go read some plain YAML texts differently.
    return _text(chart, json.dumps(values, ensure_ascii=False), release)


@functools.cache
def _rendered(chart: str, values: str, release: str) -> list[Object]:
    return objects_of(_text(chart, values, release))


def _text(chart: str, values: str, release: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(values)
        file.flush()
        return binaries.helm(
            "template", release, str(ROOT / "helm" / chart), "-n", "prefect", "-f", file.name,
            # Without a cluster, Helm assumes few API versions.
            "--api-versions", "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy",
        )  # fmt: skip


def objects_of(text: str) -> list[Object]:
    """Return the objects of a YAML stream.

    Raises:
        ValidationError: an object violates a Kubernetes schema.
    """
    objects = [manifest for manifest in yaml.load_all(text, yaml.CSafeLoader) if manifest]
    for manifest in objects:
        known = manifest["apiVersion"].split("/")[0] not in EXTENSIONS
        if known and (text := repr(manifest)) not in _VALID:
            for version in KUBERNETES:
                # Kubernetes before 1.30 lacks this kind, and the chart does not render it there.
                if version != "1.29" or not manifest["kind"].startswith("ValidatingAdmissionPolicy"):
                    kubernetes_validate.validate(manifest, version, strict=True)
            _VALID.add(text)
    return objects


_VALID: set[str] = set()
"""Objects that met the schemas. A cache: most objects are equal for all values."""


def check_custom(manifest: Object, file: Path) -> None:
    """Check an object against the schema of its CustomResourceDefinition, without the CEL rules.

    Args:
        manifest: the object.
        file: the definition.

    Raises:
        ValidationError: the object has an unknown field or an invalid value.
    """
    definition = yaml.load(file.read_text(), yaml.CSafeLoader)
    [schema] = [
        version["schema"]["openAPIV3Schema"]
        for version in definition["spec"]["versions"]
        if manifest["apiVersion"] == f"{definition['spec']['group']}/{version['name']}"
    ]
    metadata = {"metadata": {"type": "object"}}
    jsonschema.validate(manifest, closed(schema | {"properties": schema["properties"] | metadata}))


def closed(schema: Any) -> Any:
    """Return a schema that refuses unknown fields, which an API server would drop."""
    if isinstance(schema, list):
        return [closed(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    return made | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else made


def inventory(objects: list[Object]) -> list[str]:
    """Return the objects as sorted "Kind/name" texts."""
    return sorted(f"{manifest['kind']}/{manifest['metadata']['name']}" for manifest in objects)


def added(objects: list[Object], without: list[Object]) -> list[str]:
    """Return the objects, as KIND/NAME, that are not among those of another rendering."""
    known = inventory(without)
    return [name for name in inventory(objects) if name not in known]


def peer_components(rules: list[Object], key: str) -> set[str]:
    """Return the components of the chart that rules of a NetworkPolicy name under `from` or `to`."""
    peers = [
        peer["podSelector"]["matchLabels"] for rule in rules for peer in rule.get(key, ()) if "podSelector" in peer
    ]
    return {labels["app.kubernetes.io/component"] for labels in peers if "app.kubernetes.io/component" in labels}


def one(objects: list[Object], kind: str, name: str) -> Object:
    """Return the only object of a kind and name."""
    found = [manifest for manifest in objects if manifest["kind"] == kind and manifest["metadata"]["name"] == name]
    assert len(found) == 1, f"{kind}/{name} is not among {inventory(objects)}"
    return found[0]


def pod_specs(objects: list[Object]) -> dict[str, Object]:
    """Return the pod specs of the objects by "Kind/name"."""
    specs = {}
    for manifest in objects:
        template = manifest.get("spec", {}).get("jobTemplate", manifest)  # a CronJob's template of Jobs
        spec = (
            manifest["spec"] if manifest["kind"] == "Pod" else template.get("spec", {}).get("template", {}).get("spec")
        )
        if spec and "containers" in spec:
            specs[f"{manifest['kind']}/{manifest['metadata']['name']}"] = spec
    return specs


def references(spec: Any) -> set[str]:
    """Return the ServiceAccounts, Secrets, ConfigMaps and claims that a pod spec names, as "Kind/name" texts."""
    if isinstance(spec, list):
        return set().union(*map(references, spec))
    if not isinstance(spec, dict):
        return set()
    found = set().union(*map(references, spec.values()))
    for field, kind, key in (
        ("secretKeyRef", "Secret", "name"),
        ("secretRef", "Secret", "name"),
        ("secret", "Secret", "secretName"),  # a volume
        ("secret", "Secret", "name"),  # a source of a projected volume
        ("configMapKeyRef", "ConfigMap", "name"),
        ("configMapRef", "ConfigMap", "name"),
        ("configMap", "ConfigMap", "name"),
        ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
    ):
        if isinstance(source := spec.get(field), dict) and key in source:
            found.add(f"{kind}/{source[key]}")
    if "serviceAccountName" in spec:
        found.add(f"ServiceAccount/{spec['serviceAccountName']}")
    return found


def assert_restricted(objects: list[Object]) -> None:
    """Assert that all pods meet the `restricted` Pod Security Standard.

    They also have a read-only root file system, no service links, resources, and an image with a fixed tag.
    """
    for name, spec in pod_specs(objects).items():
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False, name
            assert context["readOnlyRootFilesystem"] is True, name
            assert context["capabilities"] == {"drop": ["ALL"]}, name
            if container["image"] == "proxy:1":
                continue
            assert set(container["resources"]) == {"requests", "limits"}, name
            assert not container["image"].endswith((":latest", ":")), name


def environment(container: Object) -> dict[str, Any]:
    """Return a container's environment variables: the value, or its source (`valueFrom`), by name."""
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container["env"]}
