"""Hypothesis strategies for chart values, derived from the schemas, with common mistakes."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from orchestration.settings import ROOT
from tests.cluster.apiserver import NAMESPACES
from tests.helm.rendering import Object

Path = tuple[str, ...]

NUMBERS = (0, 1, 8080, 1_000_000, 2_000_000, 2**31 - 1)
"""Typical integers, and large ones, which Go prints with an exponent."""

HOSTILE = (
    "", "true", "1", "08", "1e3", "null", "a: b", "a #b", "- a", "'", '"', "\\", "%", "@/#", "$(POD_NAME)", "é", "a\nb",
    "{{ .Release.Name }}", "{{ end }}", "{{ name }}", '{{- with secret "db" -}}{{ .Data.password }}{{- end }}',
)  # fmt: skip
"""Texts that break a template without quotes."""

MISTAKES: tuple[Any, ...] = (None, True, False, 2_000_000, 1.5, "2", "x y", [], {}, [None], {"a": None})
"""Values of another type than the key's."""

NAME = st.from_regex(r"[a-z]([a-z0-9-]{0,14}[a-z0-9])?", fullmatch=True)
QUANTITY = st.sampled_from([1, 0.5, 2_000_000, 3_000_000_000, "1", "500m", "1.5", "2Gi", "1e3", "128M", ".5"])
LABEL = st.sampled_from(["a", "1", "true", "A_b.c-d", "", "x" * 63, "{{ .Release.Name }}", "{{ x }}"])
LABEL_KEY = st.sampled_from(["team", "example.com/team", "a.b-c_D", "x" * 63])
PRINTABLE = st.characters(codec="ascii", min_codepoint=32, max_codepoint=126)
TEXT = st.sampled_from(HOSTILE) | st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co")), max_size=12
)

_RELEASE = r"[a-z]([a-z0-9-]{0,51}[a-z0-9])?"
RELEASE = st.sampled_from(["test", "a" * 53, "prefect-server" + "-a" * 19, "other.one", "1st", "a" * 40 + ".b"]) | (
    st.from_regex(_RELEASE, fullmatch=True)
)
"""Release names that Helm accepts: up to 53 characters."""


def _lists(items: SearchStrategy[Any]) -> SearchStrategy[list[Any]]:
    return st.lists(items, max_size=2)


SECURITY = st.sampled_from(
    [{"runAsUser": None}, {"runAsUser": 2_000_000}, {"runAsNonRoot": False, "fsGroup": 0}, {"supplementalGroups": [5]}]
)

REFERENCES = st.sampled_from(["s", "a" * 64, "{{ .Release.Name }}-s", "{{ .Release.Name }}_s", "{{ name }}", "{{ x }}"])
"""Names of Secrets and ConfigMaps, some with templates that render to invalid names."""

KINDS: dict[str, SearchStrategy[Any]] = {
    "quantity": QUANTITY,
    "size": st.sampled_from(["1", "1Gi", "1.5Ti", "2000000", "1e9"]),
    "labels": st.dictionaries(LABEL_KEY, LABEL, max_size=2),
    "ownLabels": st.dictionaries(LABEL_KEY, LABEL, max_size=2),
    "strictLabels": st.dictionaries(LABEL_KEY, LABEL.filter(lambda text: "{{" not in text), max_size=2),
    "annotations": st.dictionaries(LABEL_KEY, TEXT, max_size=2),
    "settings": st.dictionaries(
        st.sampled_from(["PREFECT_A", "PREFECT_LOGGING_LEVEL"]),
        TEXT | st.booleans() | st.sampled_from([*NUMBERS, 0.1, 1e-7, 1e15]),
        max_size=2,
    ),
    "env": st.fixed_dictionaries(
        {"name": st.sampled_from(["PORT", "DEBUG", "a.b-c", "PREFECT_API_URL"])},
        optional={"value": TEXT | st.booleans() | st.sampled_from(NUMBERS)},
    )
    | st.builds(
        lambda name: {"name": "A", "valueFrom": {"secretKeyRef": {"name": name, "key": "k", "optional": True}}},
        REFERENCES,
    )
    | st.sampled_from(
        [
            {"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "A", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": 1}}},
        ]
    ),
    "envFrom": st.builds(lambda name: {"prefix": "A_", "secretRef": {"name": name}}, REFERENCES),
    "toleration": st.sampled_from(
        [
            {"operator": "Exists"},
            {"key": "a", "value": "true", "effect": "NoExecute", "tolerationSeconds": 3_000_000},
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        ]
    ),
    "topologySpreadConstraint": st.builds(
        lambda key, when: {"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": when, "labelSelector": {}},
        LABEL_KEY,
        st.sampled_from(["DoNotSchedule", "ScheduleAnyway"]),
    ),
    "hostAlias": st.just({"ip": "10.0.0.1", "hostnames": ["db", "db.example.com"]}),
    "dnsConfig": st.sampled_from([{}, {"nameservers": ["10.0.0.1"], "options": [{"name": "ndots", "value": "2"}]}]),
    "volume": st.builds(
        lambda name, source: {"name": name} | source,
        st.sampled_from(["tmp", "data", "results", "pool"]),
        st.sampled_from(
            [
                {"emptyDir": {"sizeLimit": "20Gi"}},
                {"emptyDir": {"medium": "Memory", "sizeLimit": 2_000_000}},
                {"configMap": {"name": "c", "defaultMode": 0o444}},
                {"persistentVolumeClaim": {"claimName": "mine"}},
                {"projected": {"sources": [{"secret": {"name": "s"}}]}},
            ]
        ),
    ),
    "volumeMount": st.builds(
        lambda name, path: {"name": name, "mountPath": path},
        st.sampled_from(["tmp", "data", "results"]),
        st.sampled_from(["/tmp", "/data", "/results", "/tmp/x"]),  # noqa: S108 - of a container
    ),
    "container": st.builds(
        lambda name, more: {"name": name, "image": "proxy:1"} | more,
        st.sampled_from(["proxy", "worker", "api", "log", "prefect-job"]),
        st.sampled_from(
            [
                {"env": [{"name": "A", "value": "{{ .Release.Name }}"}, {"name": "B", "value": 8080}]},
                {"envFrom": [{"secretRef": {"name": "{{ x }}"}}]},
                {"resources": {"requests": {"cpu": 2, "memory": 2_000_000_000}, "limits": {"cpu": None}}},
                {"resources": {"requests": {"cpu": 2}, "limits": {"cpu": 1}}},
                {"resources": {"requests": {"nvidia.com/gpu": 1}}},
                {"ports": [{"containerPort": 15090, "name": "metrics"}], "securityContext": {"runAsUser": 2_000_000}},
                {"ports": [{"containerPort": 1, "name": "a"}, {"containerPort": 2, "name": "a"}]},
                {"volumeMounts": [{"name": "tmp", "mountPath": "/a"}, {"name": "tmp", "mountPath": "/a"}]},
                {"securityContext": {"privileged": True}},
                {"securityContext": {"privileged": True, "allowPrivilegeEscalation": False}},
            ]
        ),
    ),
    "initContainer": st.builds(
        lambda name: {"name": name, "image": "proxy:1", "restartPolicy": "Always"},
        st.sampled_from(["native", "wait-for-migrations", "prefect-job"]),
    ),
    "resources": st.sampled_from(
        [
            {"requests": {"cpu": 2, "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
            {"requests": {"cpu": 0.5, "memory": 2_000_000_000}, "limits": {"cpu": None, "memory": 3_000_000_000}},
            {"limits": {"nvidia.com/gpu": 1}},
            {"requests": {"nvidia.com/gpu": 1}},
            {"requests": {"example.com/foo": 1}, "limits": {"example.com/foo": 2}},
            {"limits": {"example.com/foo": 0.5}},
            {"requests": {"ephemeral-storage": "1Gi"}, "limits": {"ephemeral-storage": "10Gi"}},
            {"requests": {"memory": "8Gi"}},
            {"requests": {"cpu": 3}, "limits": {"cpu": "2500m"}},
            {"limits": {"hugepages-2Mi": "4Mi"}},
            {"limits": {"hugepages-2Mi": "3Mi"}},
            {"requests": None},
            {"limits": None},
        ]
    ),
    "lifecycle": st.sampled_from(
        [{}, {"preStop": {"exec": {"command": ["true"]}}}, {"preStop": {"sleep": {"seconds": 2}}}, {"preStop": None}]
    ),
    "strategy": st.sampled_from(
        [
            {"type": "Recreate"},
            {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": 0}},
            {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}},
        ]
    ),
    "peer": st.sampled_from(
        [
            {"namespaceSelector": {}},
            {"ipBlock": {"cidr": "10.0.0.0/8"}},
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
            {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.1.0.0/16"]}},
            {"podSelector": {"matchLabels": {"a": "b"}}},
            {"podSelector": {"matchLabels": {"a": "{{ x }}"}}},
        ]
    ),
    "egressRule": st.sampled_from(
        [
            {"to": [{"ipBlock": {"cidr": "fd00::/8"}}]},
            {"ports": [{"port": 6379, "protocol": "TCP"}, {"port": "https"}]},
            {"ports": [{"port": 20, "endPort": 10}]},
        ]
    ),
    "namespace": st.sampled_from(
        ["", *NAMESPACES, "{{ .Release.Namespace }}-runs", "{{ .Release.Namespace }}_", "{{ x }}"]
    ),
    "policyRule": st.just({"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}),
}
"""Strategies by the name of the schema's definition."""

FREE: dict[str, SearchStrategy[Any]] = {
    "securityContext": SECURITY,
    "containerSecurityContext": st.sampled_from(
        [{"readOnlyRootFilesystem": False}, {"runAsUser": 1}, {"privileged": False}, {"privileged": True}]
    ),
    "affinity": st.sampled_from(
        [{}, {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}}, {"nodeAffinity": None}]
    ),
    "objectStore": st.sampled_from(
        [{}, {"wal": {"compression": "zstd"}}, {"googleCredentials": {"gkeEnvironment": True}}]
    ),
    "behavior": st.just({"scaleDown": {"stabilizationWindowSeconds": 60}}),
    "extraObjects": st.just([{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "m"}, "data": {"a": "b"}}]),
    "variables": st.just({"gpu": {"type": "integer", "default": 0}}),
    "baseJobTemplate": st.just({"job_configuration": {"job_manifest": {"spec": {"suspend": True}}}}),
    "global": st.just({"a": 1}),
    "schedule": st.sampled_from(["@daily", "17 * * * *", "*/15 2-4 1,15 * mon-fri"]),
}
"""Strategies for keys whose content the chart passes on."""


@cache
def schema(chart: str) -> Object:
    """Return a chart's schema."""
    found: Object = json.loads((ROOT / "helm" / chart / "values.schema.json").read_text())
    return found


def keys(chart: str) -> dict[Path, SearchStrategy[Any]]:
    """Return a strategy for each key of a chart that holds a value."""
    return dict(_keys(schema(chart), schema(chart), ()))


def _keys(node: Object, root: Object, path: Path) -> Iterator[tuple[Path, SearchStrategy[Any]]]:
    for name, rule in node["properties"].items():
        here = (*path, name)
        definition = rule.get("$ref", rule.get("allOf", [{}])[0].get("$ref", "")).rpartition("/")[2]
        found = root["$defs"].get(definition, rule)
        if "properties" in found and name not in FREE and definition not in KINDS:
            yield from _keys(found, root, here)
        else:
            yield here, strategy(rule, root, name)


def strategy(rule: Object, root: Object, name: str = "") -> SearchStrategy[Any]:
    """Return a strategy for the values that a schema rule accepts."""
    definition = rule.get("$ref", "").rpartition("/")[2]
    if definition in KINDS:
        return KINDS[definition]
    if name in FREE:
        return FREE[name]
    if definition:
        return strategy(root["$defs"][definition], root)
    if "anyOf" in rule:
        return st.one_of([strategy(alternative, root) for alternative in rule["anyOf"]])
    if "const" in rule or "enum" in rule:
        return st.sampled_from(rule.get("enum") or [rule["const"]])
    types = rule.get("type", "object")
    return st.one_of([TYPES[type_name](rule, root) for type_name in ([types] if isinstance(types, str) else types)])


def _integers(rule: Object, root: Object) -> SearchStrategy[int]:
    least, most = rule.get("minimum", 0), rule.get("maximum", 2**31 - 1)
    return st.sampled_from([value for value in NUMBERS if least <= value <= most] + [least]) | st.integers(least, most)


def _numbers(rule: Object, root: Object) -> SearchStrategy[float]:
    return _integers(rule, root) | st.sampled_from([value for value in (0.25, 1.5) if rule.get("minimum", 0) <= value])


def _strings(rule: Object, root: Object) -> SearchStrategy[str]:
    if "pattern" not in rule:
        return TEXT.filter(lambda text: len(text) >= rule.get("minLength", 0))
    drawn = st.from_regex(rule["pattern"], fullmatch=True, alphabet=PRINTABLE)
    return drawn.filter(lambda text: len(text) <= rule.get("maxLength", 1000))


def _objects(rule: Object, root: Object) -> SearchStrategy[Object]:
    if "properties" in rule:
        required = set(rule.get("required", ()))
        drawn = {name: strategy(property_rule, root, name) for name, property_rule in rule["properties"].items()}
        return st.fixed_dictionaries(
            {name: value for name, value in drawn.items() if name in required},
            optional={name: value for name, value in drawn.items() if name not in required},
        )
    if "propertyNames" in rule and "additionalProperties" in rule:
        drawn_keys = st.from_regex(rule["propertyNames"]["pattern"], fullmatch=True)
        return st.dictionaries(drawn_keys.map(str.strip), strategy(rule["additionalProperties"], root), max_size=2)
    return st.just({})


TYPES: dict[str, Callable[[Object, Object], SearchStrategy[Any]]] = {
    "string": _strings,
    "integer": _integers,
    "number": _numbers,
    "boolean": lambda *_: st.booleans(),
    "null": lambda *_: st.none(),
    "array": lambda rule, root: st.lists(
        strategy(rule["items"], root), min_size=rule.get("minItems", 0), max_size=min(2, rule.get("maxItems", 2))
    ),
    "object": _objects,
}


def put(values: Object, path: Sequence[str], value: Any) -> Object:
    """Return values with one key set."""
    if not path:
        return value  # type: ignore[no-any-return]
    inner = values.get(path[0])
    return values | {path[0]: put(inner if isinstance(inner, dict) else {}, path[1:], value)}
