"""Objects that put each kind of value in the charts' schemas before a Kubernetes API server."""

from collections.abc import Callable, Sequence
from typing import Any

from tests.helm.rendering import Object

LONG = "a" * 64
"""Too long for a label, but short enough as a part of a name."""

TEXTS = (
    "", "a", "A", "1", "a-b", "-a", "a-", "a_b", "_a", ".", "..", ".a", "..a", "a.b", "a..b", "*.a.b", "*", "a b",
    " a", "a ",
    "a/b", "/a", "a/b/c", "A.b/c", "../a", "a/../b", "a\\b", "é", "a:b", "a=b", "a--b", "1a", "a1", "http", "x" * 15,
    "x" * 16,
    "x" * 63, LONG, f"{LONG}.b", "a." * 126 + "a", "a." * 126 + "ab", "a." * 127, f"{'a.' * 126}a/b",
    f"{'a.' * 126}ab/b",
    "example.com/a", f"example.com/{'x' * 63}", f"example.com/{LONG}", "service.k8s.aws/nlb", "10.0.0.1", "10.0.0.0/8",
    "10.0.0.1/8", "10.0.0.0/33", "010.0.0.0/8", "10.0.0/8", "256.0.0.1", "::1", "fd00::/8", "fd00::/129",
    "fd00:::/8", "0.0.0.0/0",
    "metadata.name", "metadata.uid", "metadata.labels['a/b']", "metadata.labels['a b']", "metadata.annotations['a']",
    "spec.nodeName",
    "spec.hostname", "status.podIP", "status.phase", "limits.cpu", "limits.memory", "requests.hugepages-2Mi", "cpu",
    "limits.gpu",
    "repository/image", "localhost:5000/a/b", "-5", "5", "100%",
)  # fmt: skip
"""Edge cases of names, keys, addresses and fields in Kubernetes."""

Maker = Callable[[Any], Object]


def _pod(**more: Any) -> Object:
    container = {"name": "main", "image": "a"}
    spec = {
        "containers": [container],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "terminationGracePeriodSeconds": 60,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec | more}


def _container(**more: Any) -> Object:
    return _pod(containers=[{"name": "main", "image": "a"} | more])


def _from(**source: Any) -> Object:
    return _container(env=[{"name": "A", "valueFrom": source}])


def _map(**metadata: Any) -> Object:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"} | metadata}


def _service(port: Object | None = None, **more: Any) -> Object:
    spec = {"ports": [{"name": "a", "port": 1} | (port or {})], **more}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": spec}


def _ingress(host: str) -> Object:
    backend = {"service": {"name": "a", "port": {"number": 1}}}
    rule = {"host": host, "http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": backend}]}}
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "a"}, "spec": {"rules": [rule]},
    }  # fmt: skip


def _egress(rule: Object) -> Object:
    spec = {"podSelector": {}, "policyTypes": ["Egress"], "egress": [rule]}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "a"}, "spec": spec}


def _scaled(behavior: Object) -> Object:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "a"}
    spec = {"scaleTargetRef": target, "maxReplicas": 2, "behavior": behavior}
    return {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": "a"}, "spec": spec}


def _role(rule: Object) -> Object:
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": "a"}, "rules": [rule]}


_PORTS = ("service", "properties", "extraPorts", "items", "properties")
_ENV = ("$defs", "env", "properties")
_SOURCE = (*_ENV, "valueFrom", "properties")

OF_TEXT: dict[tuple[str, ...], tuple[Maker, Sequence[str]]] = {
    ("$defs", "name"): (lambda text: _map(name=text or "a"), ["a." * 126 + "a", LONG, f"{LONG}.b"]),
    ("$defs", "reference"): (lambda text: _from(secretKeyRef={"name": text, "key": "a"}), [LONG]),
    ("$defs", "secretKey"): (lambda text: _from(secretKeyRef={"name": "a", "key": text}), [".a", "_a", "a..b"]),
    (*_SOURCE, "secretKeyRef", "properties", "key"): (
        lambda text: _from(secretKeyRef={"name": "a", "key": text}), [".a", "a-"],
    ),
    (*_SOURCE, "configMapKeyRef", "properties", "key"): (
        lambda text: _from(configMapKeyRef={"name": "a", "key": text}), [".a"],
    ),
    (*_SOURCE, "fieldRef", "properties", "fieldPath"): (
        lambda text: _from(fieldRef={"fieldPath": text}), ["metadata.labels['a/b']", "status.podIP"],
    ),
    (*_SOURCE, "resourceFieldRef", "properties", "resource"): (
        lambda text: _from(resourceFieldRef={"resource": text}), ["limits.cpu", "requests.hugepages-2Mi"],
    ),
    (*_ENV, "name"): (lambda text: _container(env=[{"name": text}]), ["a.b", "_a", ".a"]),
    ("$defs", "envFrom", "properties", "prefix"): (
        lambda text: _container(envFrom=[{"prefix": text, "secretRef": {"name": "a"}}]), ["_a", ""],
    ),
    ("$defs", "labelKey"): (
        lambda text: _map(labels={text: "a"}), ["example.com/a", f"{LONG}.b/c", f"{'a.' * 126}a/b"],
    ),
    ("$defs", "strictLabels", "additionalProperties"): (lambda text: _map(labels={"a": text}), ["A", "x" * 63, ""]),
    ("$defs", "ip"): (lambda text: _pod(hostAliases=[{"ip": text, "hostnames": ["a"]}]), ["10.0.0.1", "::1"]),
    ("$defs", "cidr"): (lambda text: _egress({"to": [{"ipBlock": {"cidr": text}}]}), ["10.0.0.1/8", "fd00::/8"]),
    ("$defs", "port"): (lambda text: _egress({"ports": [{"port": text}]}), ["http", "a1", "x" * 15]),
    ("$defs", "volumeMount", "properties", "subPath"): (
        lambda text: _container(volumeMounts=[{"name": "tmp", "mountPath": "/a", "subPath": text}]), ["a/b", "..a"],
    ),
    ("$defs", "container", "properties", "image"): (lambda text: _container(image=text), ["localhost:5000/a/b"]),
    ("$defs", "dnsConfig", "properties", "searches", "items"): (
        lambda text: _pod(dnsConfig={"searches": [text]}), ["a.b", LONG],
    ),
    ("$defs", "hostAlias", "properties", "hostnames", "items"): (
        lambda text: _pod(hostAliases=[{"ip": "::1", "hostnames": [text]}]), ["a.b", LONG],
    ),
    ("$defs", "toleration", "properties", "key"): (
        lambda text: _pod(tolerations=[{"key": text, "operator": "Exists"}]), ["example.com/a", ""],
    ),
    ("ingress", "properties", "hosts", "items", "properties", "host"): (_ingress, ["*.a.b", f"{LONG}.b"]),
    ("service", "properties", "loadBalancerClass"): (
        lambda text: _service(type="LoadBalancer", **({"loadBalancerClass": text} if text else {})),
        ["service.k8s.aws/nlb", "a"],
    ),
    (*_PORTS, "appProtocol"): (lambda text: _service({"appProtocol": text}), ["http", "example.com/a"]),
    (*_PORTS, "name"): (lambda text: _service({"name": text}), ["1a", "x" * 63]),
    ("image", "properties", "repository"): (lambda text: _container(image=f"{text}:1"), ["localhost:5000/a/b", "a"]),
}  # fmt: skip
"""By schema path: a function from a text to an object, and texts that schema and Kubernetes both accept."""

_SIDE: Object = {"name": "b", "image": "b"}


def _with(container: Object) -> Object:
    return _pod(containers=[{"name": "main", "image": "a"}, container])


def _before(container: Object) -> Object:
    return _pod(initContainers=[container])


_EXPRESSIONS: tuple[Object, ...] = (
    {"operator": "In"},
    {"operator": "In", "values": []},
    {"operator": "Exists", "values": ["a"]},
)
_PROBE = {"exec": {"command": ["a"]}}

_CONTAINERS: tuple[Object, ...] = (
    {"foo": 1}, {"workingDir": 5}, {"ports": [{"containerPort": 0}]}, {"ports": [{"containerPort": 80,
    "name": "A"}]},
    {"ports": [{"containerPort": 80, "name": "a"}]}, {"livenessProbe": _PROBE},
    {"livenessProbe": {"httpGet": {"port": 0}}},
    {"readinessProbe": _PROBE | {"successThreshold": 2}}, {"livenessProbe": _PROBE | {"successThreshold": 2}},
    {"volumeMounts": [{"name": "tmp", "mountPath": "/a", "mountPropagation": "Bidirectional"}]},
    {
        "volumeMounts": [{"name": "tmp", "mountPath": "/a", "mountPropagation": "Bidirectional"}],
        "securityContext": {"privileged": True},
    },
    {"volumeMounts": [{"name": "tmp", "mountPath": "/a", "subPath": "a", "subPathExpr": "b"}]},
    {"volumeMounts": [{"name": "tmp", "mountPath": "/a", "recursiveReadOnly": "Enabled"}]},
)  # fmt: skip

_INIT_CONTAINERS: tuple[Object, ...] = (
    {"livenessProbe": _PROBE}, {"restartPolicy": "Always", "livenessProbe": _PROBE},
    {"lifecycle": {"preStop": {"exec": {"command": ["a"]}}}},
)  # fmt: skip

_VOLUMES: tuple[Object, ...] = (
    {"secret": {"secretName": "a"}}, {"secret": {"name": "a"}}, {"secret": {}}, {"configMap": {}},
    {"configMap": {"name": "a"}},
    {"configMap": {"name": "a", "defaultMode": 1000}}, {"persistentVolumeClaim": {}}, {"hostPath": {}},
    {"csi": {}}, {"foo": {}},
    {"secret": {"secretName": "a", "items": [{"key": "a", "path": "../b"}]}}, {"nfs": {"server": "a", "path": "b"}},
    {"secret": {"secretName": "a", "items": [{"key": "a", "path": "b/c", "mode": 256}]}},
    {"hostPath": {"path": "/a"}},
    {"csi": {"driver": "a.b", "volumeAttributes": {"a": "b"}}}, {"emptyDir": {"medium": "Memory",
    "sizeLimit": "1Gi"}},
)  # fmt: skip

OF_OBJECTS: dict[str, tuple[Maker, Sequence[Object]]] = {
    "podSecurityContext": (lambda value: _pod(securityContext=value), [
        {"runAsUser": 2_000_000, "fsGroup": 0}, {"runAsUser": -1}, {"runAsUser": "root"}, {"capabilities": {}},
        {"runAsUser": 2**31},
        {"seccompProfile": {"type": "Localhost"}}, {"seccompProfile": {"type": "Localhost", "localhostProfile": "a"}},
        {"seccompProfile": {"type": "RuntimeDefault", "localhostProfile": "a"}}, {"fsGroupChangePolicy": "x"},
        {"supplementalGroups": [5]}, {"supplementalGroups": [-1]}, {"sysctls": [{"name": "a b", "value": "1"}]},
    ]),
    "containerSecurityContext": (lambda value: _container(securityContext=value), [
        {"readOnlyRootFilesystem": False}, {"foo": True}, {"runAsUser": -1}, {"fsGroup": 1},
        {"capabilities": {"add": ["SYS_ADMIN"]}},
        {"capabilities": ["ALL"]}, {"privileged": "yes"}, {"seccompProfile": {"type": "Localhost"}},
        {"runAsUser": None},
    ]),
    "affinity": (lambda value: _pod(affinity=value), [
        {}, {"foo": {}}, {"nodeAffinity": None},
        *({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}
        for terms in (
            [], [{"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}],
            *([{"matchExpressions": [{"key": "a"} | expression]}] for expression in (*_EXPRESSIONS, {"operator": "Gt",
            "values": ["1", "2"]})),
        )),
        *({"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": weight,
        "podAffinityTerm": term}]}}
          for weight, term in ((1, {"topologyKey": "a", "labelSelector": {}}), (0, {"topologyKey": "a"}), (1, {}))),
        {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [{"topologyKey": "a",
        "labelSelector": {}}]}},
    ]),
    "volume": (lambda value: _pod(volumes=[value]), [{"name": "a"} | volume for volume in _VOLUMES]),
    "container": (_with, [_SIDE | container for container in _CONTAINERS]),
    "initContainer": (_before, [_SIDE | container for container in _INIT_CONTAINERS]),
    "lifecycle": (lambda value: _container(lifecycle=value), [
        {"preStop": {"httpGet": {}}}, {"preStop": {"httpGet": {"port": "http", "path": "/a"}}},
        {"postStart": {"sleep": {"seconds": 1}}},
        {"postStart": {"httpGet": {"port": 80, "scheme": "x"}}}, {"preStop": {"exec": {"command": []}}},
    ]),
    "behavior": (_scaled, [
        {}, {"foo": 1}, {"scaleDown": {"stabilizationWindowSeconds": 3601}}, {"scaleDown": {"policies": []}},
        *({"scaleUp": {"policies": [{"type": kind, "value": value, "periodSeconds": period}]}}
          for kind, value, period in (("Pods", 0, 1), ("Pods", 1, 1), ("Percent", 200, 1801), ("Pod", 1, 1))),
    ]),
    "selector": (lambda value: _egress({"to": [{"podSelector": value}]}), [
        {"matchExpressions": [{"key": "a"} | expression]} for expression in (
            *_EXPRESSIONS, {"operator": "In", "values": ["a b"]}, {"operator": "NotIn", "values": ["a"]},
            {"operator": "Exists"},
        )
    ]),
    "egressRule": (_egress, [
        {"ports": [{"port": "a", "endPort": 10}]}, {"ports": [{"endPort": 10}]}, {"ports": [{"port": 5,
        "endPort": 10}]},
        {"ports": [{"protocol": "UDP"}]},
    ]),
    "policyRule": (_role, [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}, {"apiGroups": [""], "resources": [],
        "verbs": ["get"]},
        {"apiGroups": [], "resources": ["pods"], "verbs": ["get"]}, {"apiGroups": [""], "resources": ["pods"],
        "verbs": []},
    ]),
}  # fmt: skip
"""By schema definition: a function from a value to an object, and values on which schema and Kubernetes agree."""
