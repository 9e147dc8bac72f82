"""The rendered server chart: default objects, effects of values, refused values."""

import base64
import copy
import json
import re
from typing import Any

import pytest
from cryptography.fernet import Fernet
from jsonschema import ValidationError

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries
from orchestration.settings import ROOT
from tests.helm.rendering import (
    EVERY_POD,
    POD_RULES,
    RESOURCE_RULES,
    Object,
    check_custom,
    environment,
    inventory,
    one,
    one_in_four,
    pod_specs,
    render,
)

CHART = ROOT / "helm" / "prefect-server"
TAG: Object = {"image": {"tag": "src-0123456789ab"}}
TLS: Object = {"enabled": True, "existingSecret": "tls"}

# All features together. Kubernetes must accept the rendered objects.
MAXIMAL: Object = {
    "image": {"tag": "1", "pullSecrets": ["registry"], "pullPolicy": "Always"},
    "fullnameOverride": "prefect",
    "commonLabels": {"team": "data"},
    "commonAnnotations": {"owner": "{{ .Release.Name }}"},
    "tls": {"enabled": True, "certManager": {"issuerRef": {"name": "ca", "kind": "ClusterIssuer"}}},
    "settings": {"PREFECT_SERVER_LOGGING_LEVEL": "INFO", "PREFECT_SERVER_API_DEFAULT_LIMIT": 100},
    "env": [{"name": "FROM_SECRET", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
    "envFrom": [{"secretRef": {"name": "all-settings"}}],
    "pod": EVERY_POD | {"sidecars": [{"name": "proxy", "image": "proxy:1"}]},
    "api": {
        "replicas": 3,
        "basePath": "/prefect/api",
        "uiApiUrl": "https://prefect.example.com/prefect/api",
        "extraArgs": ["--keep-alive-timeout", "30"],
        "settings": {"PREFECT_SERVER_LOGGING_LEVEL": "DEBUG"},
        "autoscaling": {"enabled": True, "behavior": {"scaleDown": {"stabilizationWindowSeconds": 60}}},
        "podDisruptionBudget": {"minAvailable": "50%"},
    },
    "services": {"replicas": 2, "lifecycle": {"preStop": {"sleep": {"seconds": 1}}}},
    "database": {"bundled": {"configuration": {"max_connections": 200}, "storage": {"className": "fast"}}},
    "service": {
        "type": "LoadBalancer",
        "loadBalancerClass": "internal",
        "loadBalancerSourceRanges": ["10.0.0.0/8"],
        "externalTrafficPolicy": "Local",
        "ipFamilyPolicy": "PreferDualStack",
        "ipFamilies": ["IPv4", "IPv6"],
        "annotations": {"e": "f"},
        "extraPorts": [{"name": "metrics", "port": 9000, "targetPort": 9000}],
    },
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "hosts": [{"host": "prefect.example.com", "paths": [{"path": "/prefect", "pathType": "Prefix"}]}],
        "tls": [{"hosts": ["prefect.example.com"], "secretName": "tls"}],
    },
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["prefect.example.com"]},
    "networkPolicy": {
        "apiFrom": [{"namespaceSelector": {"matchLabels": {"flows": "yes"}}}],
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"metrics": "yes"}}}],
        "extraEgress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}]}],
        "egressCIDRs": ["10.0.0.0/8"],
    },
    "extraObjects": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}, "data": {"of": "{{ .Release.Name }}"}},
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: text}",
    ],
}


def _with(**values: Any) -> Object:
    """Return minimal values with these merged in: `_with(api={"replicas": 2})`."""

    def put(target: Object, changes: Object) -> Object:
        for key, value in changes.items():
            target[key] = put(target.get(key, {}), value) if isinstance(value, dict) else value
        return target

    return put(copy.deepcopy(TAG), values)


def test_default_values_render_the_expected_objects() -> None:
    assert inventory(render("prefect-server", TAG)) == [
        "ConfigMap/test-prefect-server-database",
        "Deployment/test-prefect-server-api",
        "Deployment/test-prefect-server-redis",
        "Deployment/test-prefect-server-services",
        "Job/test-prefect-server-migrations-1",
        "NetworkPolicy/test-prefect-server-api",
        "NetworkPolicy/test-prefect-server-database",
        "NetworkPolicy/test-prefect-server-migrations",
        "NetworkPolicy/test-prefect-server-redis",
        "NetworkPolicy/test-prefect-server-services",
        "NetworkPolicy/test-prefect-server-test",
        "Pod/test-prefect-server-test",
        "Secret/test-prefect-server-api-roles",
        "Secret/test-prefect-server-auth",
        "Secret/test-prefect-server-database",
        "Secret/test-prefect-server-encryption-key",
        "Secret/test-prefect-server-redis",
        "Service/test-prefect-server-api",
        "Service/test-prefect-server-database",
        "Service/test-prefect-server-redis",
        "ServiceAccount/test-prefect-server",
        "ServiceAccount/test-prefect-server-database",
        "ServiceAccount/test-prefect-server-redis",
        "ServiceAccount/test-prefect-server-test",
        "StatefulSet/test-prefect-server-database",
    ]


def test_all_features_render_together() -> None:
    objects = render("prefect-server", MAXIMAL)
    assert {"HorizontalPodAutoscaler/prefect-api", "PodDisruptionBudget/prefect-api", "Ingress/prefect-api",
            "PodDisruptionBudget/prefect-services", "HTTPRoute/prefect-api", "ConfigMap/more",
            "ConfigMap/text"} <= set(inventory(objects))  # fmt: skip
    for manifest in objects:
        if manifest["kind"] != "ConfigMap":
            assert manifest["metadata"]["labels"]["team"] == "data"
            assert manifest["metadata"]["annotations"]["owner"] == "test"
    assert "replicas" not in one(objects, "Deployment", "prefect-api")["spec"]
    for component in ("api", "services"):
        budget = one(objects, "PodDisruptionBudget", f"prefect-{component}")["spec"]
        assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow", "an outage of Postgres must not block a drain"
    assert one(objects, "ConfigMap", "more")["data"] == {"of": "test"}
    api = pod_specs(objects)["Deployment/prefect-api"]
    assert [container["name"] for container in api["containers"]] == ["api", "proxy"]
    assert [container["name"] for container in api["initContainers"]] == ["wait-for-migrations", "native"]
    assert api["priorityClassName"] == "important"
    assert {"name": "ca", "mountPath": "/ca"} in api["containers"][0]["volumeMounts"]
    assert api["containers"][0]["args"][-2:] == ["--keep-alive-timeout", "30"]
    assert api["containers"][0]["livenessProbe"]["httpGet"]["path"] == "/prefect/api/health"


def test_http_route_meets_the_schema_of_the_gateway_api() -> None:
    route = one(render("prefect-server", MAXIMAL), "HTTPRoute", "prefect-api")
    definition = binaries.http_routes()
    check_custom(route, definition)
    for rule in ({"timeout": {"request": "10s"}}, {"timeouts": {"request": "ten seconds"}}):
        with pytest.raises(ValidationError):
            check_custom(route | {"spec": route["spec"] | {"rules": [route["spec"]["rules"][0] | rule]}}, definition)
    with pytest.raises(ValidationError):
        check_custom(route | {"spec": route["spec"] | {"hostname": ["prefect.example.com"]}}, definition)


@pytest.mark.parametrize("values", [TAG, MAXIMAL], ids=["default", "maximal"])
def test_no_pod_mounts_a_token(values: Object) -> None:
    for name, spec in pod_specs(render("prefect-server", values)).items():
        assert spec["automountServiceAccountToken"] is False, name


def test_component_settings_override_top_level_settings() -> None:
    specs = pod_specs(render("prefect-server", MAXIMAL))
    for name, level in (("api", "DEBUG"), ("services", "INFO")):
        container = specs[f"Deployment/prefect-{name}"]["containers"][0]
        names = [variable["name"] for variable in container["env"]]
        assert len(names) == len(set(names))
        assert environment(container)["PREFECT_SERVER_LOGGING_LEVEL"] == level
        assert environment(container)["PREFECT_SERVER_API_DEFAULT_LIMIT"] == "100"
        assert environment(container)["FROM_SECRET"] == {"secretKeyRef": {"name": "s", "key": "k"}}
        assert container["envFrom"] == [{"secretRef": {"name": "all-settings"}}]


@pytest.mark.parametrize(
    ("settings", "seconds"), [({}, "30"), ({"PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": 7}, "7")]
)
def test_busy_database_may_take_long_for_a_connection(settings: Object, seconds: str) -> None:
    """After Prefect's 5 s the API answers 500, which Prefect's client does not retry."""
    specs = pod_specs(render("prefect-server", _with(settings=settings)))
    for name in ("api", "services"):
        container = specs[f"Deployment/test-prefect-server-{name}"]["containers"][0]
        assert environment(container)["PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT"] == seconds


def test_processes_share_all_state_in_redis_or_run_as_one() -> None:
    shared = {
        "PREFECT_REDIS_MESSAGING_URL", "PREFECT_REDIS_WORKER_CLEANUP_QUEUE_URL", "PREFECT_SERVER_DOCKET_URL",
        "PREFECT_SERVER_EVENTS_MESSAGING_BROKER", "PREFECT_SERVER_EVENTS_MESSAGING_CACHE",
        "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING", "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE",
        "PREFECT_SERVER_WORKER_CHANNEL_CLEANUP_QUEUE_STORAGE", "PREFECT_REDIS_MESSAGING_PUBLISHER_BATCH_SIZE",
        "PREFECT_REDIS_MESSAGING_CONSUMER_BLOCK",
    }  # fmt: skip
    specs = pod_specs(render("prefect-server", TAG))
    for name in ("api", "services"):
        variables = environment(specs[f"Deployment/test-prefect-server-{name}"]["containers"][0])
        assert shared <= set(variables)
        assert variables["PREFECT_REDIS_MESSAGING_PUBLISHER_BATCH_SIZE"] == "1", "a killed API would lose events"
        assert 2 * int(variables["PREFECT_REDIS_MESSAGING_CONSUMER_BLOCK"]) <= 10, "the least services.stallSeconds"
    alone = render("prefect-server", _with(redis={"bundled": {"enabled": False}}, services={"separate": False}))
    assert "Deployment/test-prefect-server-services" not in inventory(alone)
    container = pod_specs(alone)["Deployment/test-prefect-server-api"]["containers"][0]
    assert not shared & set(environment(container))
    assert "--no-services" not in container["args"]


def test_api_runs_services_that_are_not_separate() -> None:
    objects = render("prefect-server", _with(services={"separate": False}))
    removed = {
        "Deployment/test-prefect-server-services",
        "NetworkPolicy/test-prefect-server-services",
    }
    assert set(inventory(render("prefect-server", TAG))) - set(inventory(objects)) == removed
    container = pod_specs(objects)["Deployment/test-prefect-server-api"]["containers"][0]
    assert "--no-services" not in container["args"]
    assert "PREFECT_REDIS_MESSAGING_URL" in environment(container), "the bundled Redis is used all the same"


PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


def _paths(container: Object) -> dict[str, tuple[str, str]]:
    """Return port and path of each probe of a container."""
    gets = {name: container[name]["httpGet"] for name in PROBES if name in container}
    return {name: (get["port"], get["path"]) for name, get in gets.items()}


def test_services_pod_is_ready_while_all_services_make_progress() -> None:
    container = pod_specs(render("prefect-server", TAG))["Deployment/test-prefect-server-services"]["containers"][0]
    assert container["args"] == ["python", "-m", "orchestration.server_process", "server", "services", "start"]
    assert _paths(container) == dict(
        zip(PROBES, [("health", path) for path in ("/live", "/live", "/ready")], strict=True)
    )
    assert container["ports"] == [
        {"name": "health", "containerPort": int(environment(container)["SERVICES_HEALTH_PORT"])}
    ]
    assert environment(container)["SERVICES_STALL_SECONDS"] == "60"
    given = render("prefect-server", _with(services={"args": ["sh", "-c", "mine"]}))
    assert _paths(pod_specs(given)["Deployment/test-prefect-server-services"]["containers"][0]) == {}


@pytest.mark.parametrize("roles", [False, True])
def test_api_that_runs_the_services_restarts_when_they_need_it(roles: bool) -> None:
    alone = render("prefect-server", _with(services={"separate": False}, auth={"roles": {"enabled": roles}}))
    container = pod_specs(alone)["Deployment/test-prefect-server-api"]["containers"][0]
    module = "orchestration.access" if roles else "orchestration.server_process"
    assert container["args"] == ["python", "-m", module, "server", "start"]
    assert _paths(container) == {
        "startupProbe": ("http", "/api/health"),
        "livenessProbe": ("health", "/live"),
        "readinessProbe": ("http", "/api/ready"),
    }
    assert [port["name"] for port in container["ports"]] == ["http", "health"]
    assert environment(container)["SERVICES_HEALTH_PORT"] == "4201"
    mine = {"api": {"args": ["sh", "-c", "mine"]}, "auth": {"roles": {"enabled": False}}}
    given = render("prefect-server", _with(services={"separate": False}, **mine))
    assert _paths(pod_specs(given)["Deployment/test-prefect-server-api"]["containers"][0])["livenessProbe"] == (
        "http", "/api/health",
    )  # fmt: skip


def test_api_without_services_has_no_port_for_their_health() -> None:
    container = pod_specs(render("prefect-server", TAG))["Deployment/test-prefect-server-api"]["containers"][0]
    assert [port["name"] for port in container["ports"]] == ["http"]
    assert "SERVICES_HEALTH_PORT" not in environment(container)


def test_metrics_of_the_services_are_closed_by_default() -> None:
    closed = one(render("prefect-server", TAG), "NetworkPolicy", "test-prefect-server-services")
    assert "ingress" not in closed["spec"], "a rule without `from` would let everybody in"
    rule = {"ports": [{"port": "health"}], "from": MAXIMAL["networkPolicy"]["metricsFrom"]}
    assert one(render("prefect-server", MAXIMAL), "NetworkPolicy", "prefect-services")["spec"]["ingress"] == [rule]
    alone = _with(services={"separate": False}, networkPolicy={"metricsFrom": rule["from"]})
    api = one(render("prefect-server", alone), "NetworkPolicy", "test-prefect-server-api")
    assert api["spec"]["ingress"] == [rule, {"ports": [{"port": "http"}]}]


@pytest.mark.parametrize("separate", [True, False])
def test_alerts_watch_each_service_by_metrics_that_prometheus_reads(separate: bool) -> None:
    alert = {"enabled": True, "labels": {"release": "prometheus"}, "severity": "critical"}
    services = {"alert": alert, "separate": separate}
    values = _with(services=services, networkPolicy={"metricsFrom": [{"namespaceSelector": {}}]})
    objects = render("prefect-server", values)
    deployment = f"test-prefect-server-{'services' if separate else 'api'}"
    monitor = one(objects, "PodMonitor", "test-prefect-server-services")
    template = one(objects, "Deployment", deployment)["spec"]["template"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in template["spec"]["containers"][0]["ports"]]
    rule = one(objects, "PrometheusRule", "test-prefect-server-services")
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    documented = (ROOT / "docs/reference/metrics.md").read_text()
    page = (ROOT / "docs/how-to/server-health.md").read_text()
    alerts = {alert["alert"]: alert for alert in rule["spec"]["groups"][0]["rules"]}
    for name, made in alerts.items():
        [metric] = re.findall(r"prefect_service_\w+", made["expr"])
        assert f"| `{metric}` |" in documented
        assert f'{metric}{{namespace="prefect",pod=~"{deployment}-.+"}}' in made["expr"]
        assert made["labels"] == {"severity": "critical"}
        assert f"`{name}`" in page
        assert made["annotations"]["runbook_url"] == "docs/how-to/server-health.md#alerts"
    assert "## Alerts" in page
    stalled = alerts["PrefectServerServiceStalled"]
    assert stalled["expr"].startswith("min by (service)"), "one alert for each service"
    assert "{{ $labels.service }}" in stalled["annotations"]["summary"]


def test_disabled_auth_removes_all_passwords() -> None:
    objects = render("prefect-server", _with(auth={"enabled": False}))
    removed = set(inventory(render("prefect-server", TAG))) - set(inventory(objects))
    assert removed == {f"Secret/test-prefect-server-{name}" for name in ("auth", "api-roles", "encryption-key")}
    api = pod_specs(objects)["Deployment/test-prefect-server-api"]["containers"][0]
    assert api["args"][:4] == ["python", "-m", "orchestration.server_process", "server"]

    def asking(objects: list[Object]) -> list[str]:
        pods = pod_specs(objects).items()
        return [
            name
            for name, spec in pods
            if any("AUTH_STRING" in variable for variable in environment(spec["containers"][0]))
        ]

    assert not asking(objects)
    assert len(asking(render("prefect-server", TAG))) == 3, "the API, the background services and the release's test"


def test_roles_start_the_server_with_access_control() -> None:
    objects = render("prefect-server", TAG)
    secret = one(objects, "Secret", "test-prefect-server-api-roles")
    values = {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
    key = values.pop("run-key")
    assert len(key) == 48
    assert {role: value.split(":")[0] for role, value in values.items()} == {role: role for role in values}
    assert set(values) == {"reconciler", "sync", "viewer", "worker"}
    assert len({value.split(":")[1] for value in values.values()}) == 4
    specs = pod_specs(objects)
    api = specs["Deployment/test-prefect-server-api"]["containers"][0]
    assert api["args"] == ["python", "-m", "orchestration.access", "server", "start", "--no-services"]
    [folder] = [mount["mountPath"] for mount in api["volumeMounts"] if mount["name"] == "credentials"]
    assert environment(api)["API_CREDENTIALS"] == folder
    # Only the API checks credentials.
    mounting = [name for name, spec in specs.items() if "test-prefect-server-api-roles" in json.dumps(spec)]
    assert mounting == ["Deployment/test-prefect-server-api"]
    given = render("prefect-server", _with(auth={"roles": {"existingSecret": "given"}}))
    assert "Secret/test-prefect-server-api-roles" not in inventory(given)
    [volume] = [
        pod_volume["secret"]["secretName"]
        for pod_volume in pod_specs(given)["Deployment/test-prefect-server-api"]["volumes"]
        if "secret" in pod_volume
    ]
    assert volume == "given"


def test_blocks_have_a_generated_or_existing_key_if_the_chart_has_a_lasting_one() -> None:
    variable = "PREFECT_SERVER_ENCRYPTION_KEY"
    objects = render("prefect-server", TAG)
    secret = one(objects, "Secret", "test-prefect-server-encryption-key")
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    Fernet(base64.b64decode(secret["data"]["encryption-key"]))
    auth = {"existingSecret": "own", "roles": {"existingSecret": "roles"}}
    given = _with(encryptionKey={"existingSecret": "given", "key": "k"}, auth=auth)
    # A rendering without a cluster, as by Argo CD, has an existing Secret for the password, and would change the key.
    for values, expected in (
        (TAG, {"name": "test-prefect-server-encryption-key", "key": "encryption-key"}),
        (given, {"name": "given", "key": "k"}),
        (_with(auth=auth), None),
    ):
        objects = render("prefect-server", values)
        assert ("Secret/test-prefect-server-encryption-key" in inventory(objects)) == (values is TAG)
        specs = pod_specs(objects)
        for component in ("api", "services"):
            container = specs[f"Deployment/test-prefect-server-{component}"]["containers"][0]
            assert environment(container).get(variable) == ({"secretKeyRef": expected} if expected else None)
            # This module also reads blocks of the key in the database of an older release.
            # Both start by `server_process`.
            module = "orchestration.access" if component == "api" else "orchestration.server_process"
            assert container["args"][:3] == ["python", "-m", module]


def test_disabled_network_policies_remove_no_other_object() -> None:
    objects = render("prefect-server", _with(networkPolicy={"enabled": False}))
    kept = [name for name in inventory(render("prefect-server", TAG)) if not name.startswith("NetworkPolicy/")]
    assert inventory(objects) == kept


def test_pods_have_no_secret_in_plain_text() -> None:
    objects = render("prefect-server", TAG)
    secrets = [value for manifest in objects if manifest["kind"] == "Secret" for value in manifest["data"].values()]
    text = json.dumps(pod_specs(objects))
    assert len(secrets) == 4 + len(("reconciler", "sync", "viewer", "worker", "run-key")) + len(["username"])
    assert not [secret for secret in secrets if secret in text]
    assert not re.search(r"password\W+value\W", text, flags=re.IGNORECASE)


def test_existing_secrets_are_used_and_none_is_generated() -> None:
    example = CHART / "examples" / "production.yaml"
    objects = render("prefect-server", example)
    assert not [name for name in inventory(objects) if name.startswith(("Secret/", "StatefulSet/"))]
    variables = environment(pod_specs(objects)["Deployment/test-prefect-server-api"]["containers"][0])
    assert variables["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == {
        "secretKeyRef": {"name": "prefect-database", "key": "connection-url"}
    }
    assert variables["PREFECT_SERVER_API_AUTH_STRING"] == {
        "secretKeyRef": {"name": "prefect-auth", "key": "auth-string"}
    }


def _retention(values: Object, component: str) -> Object:
    """Return the variables of retention of a component, by name without prefixes."""
    found = environment(
        pod_specs(render("prefect-server", values))[f"Deployment/test-prefect-server-{component}"]["containers"][0]
    )
    return {
        name: value
        for name, value in found.items()
        if "VACUUM" in name or name.startswith(("RETENTION_", "PREFECT_SERVER_EVENTS_RETENTION"))
    }


def test_retention_is_set_where_the_services_run() -> None:
    vacuum, events = "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED", "PREFECT_SERVER_EVENTS_RETENTION_PERIOD"
    default = {vacuum: "events,orphans", events: "P7D"}
    assert _retention(TAG, "services") == default
    assert _retention(TAG, "api") == {}
    assert _retention(_with(services={"separate": False}), "api") == default
    ages = {"runs": 90, "logs": 30, "events": 0, "artifacts": None}
    assert _retention(_with(retention={"days": ages}), "services") == {
        vacuum: "orphans",
        "RETENTION_RUNS_DAYS": "90",
        "RETENTION_LOGS_DAYS": "30",
    }


def test_changed_secret_names_restart_pods() -> None:
    def checksum(values: Object) -> str:
        template = one(render("prefect-server", values), "Deployment", "test-prefect-server-api")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/secrets"])

    assert checksum(TAG) == checksum(TAG)
    auth = {"existingSecret": "other", "roles": {"existingSecret": "roles"}}
    assert checksum(TAG) != checksum(_with(auth=auth))


REFUSED = [
    ({}, "image.tag is empty"),
    (_with(image={"tag": "latest"}), "image.tag is `latest`"),
    (_with(auth={"existingSecret": "own"}), "auth.roles.existingSecret is empty, and Helm finds no namespace in a "),
    (_with(api={"args": ["a"]}), "auth.roles.enabled=true and api.args are both"),
    (_with(database={"external": {"existingSecret": "db"}}), "database.bundled.enabled=false"),
    (_with(database={"bundled": {"enabled": False}}), "No database is configured: "),
    (
        _with(database={"mode": "bundled", "external": {"existingSecret": "db"}}),
        "and database.external.existingSecret are both set: a server has one database. Set mode=external",
    ),
    (_with(database={"mode": "external"}), "database.mode=external needs database.external.existingSecret"),
    (
        _with(database={"mode": "bundled", "bundled": {"enabled": False}}),
        "database.mode=bundled and database.bundled.enabled=false contradict each other",
    ),
    (_with(redis={"external": {"existingSecret": "r"}}), "redis.bundled.enabled=false"),
    (_with(redis={"bundled": {"enabled": False}}), "services.separate=true needs a Redis"),
    (
        _with(redis={"bundled": {"enabled": False}}, services={"separate": False}, api={"replicas": 2}),
        "over 1 needs a Redis",
    ),
    (_with(services={"separate": False}, api={"replicas": 2}), "over 1 needs services.separate=true"),
    (_with(services={"alert": {"enabled": True}}), "services.alert.enabled=true needs networkPolicy.metricsFrom"),
    (
        _with(services={"alert": {"enabled": True}, "args": ["sh"]}),
        "contradict each other: your command need not serve the metrics",
    ),
    (_with(ingress={"enabled": True}), "ingress.enabled=true needs ingress.hosts"),
    (_with(httpRoute={"enabled": True}), "httpRoute.enabled=true needs httpRoute.parentRefs"),
    (
        _with(httpRoute={"enabled": True, "parentRefs": [{"name": "a", "namespace": "a.b"}]}),
        "/httpRoute/parentRefs/0/namespace",
    ),
    (_with(httpRoute={"enabled": True, "parentRefs": [{"name": "a", "group": "A"}]}), "/httpRoute/parentRefs/0/group"),
    (_with(httpRoute={"enabled": True, "parentRefs": [{"name": "a", "kind": "a.b"}]}), "/httpRoute/parentRefs/0/kind"),
    (
        _with(httpRoute={"enabled": True, "parentRefs": [{"name": "a"}, {"name": "a", "sectionName": "https"}]}),
        "httpRoute.parentRefs names a gateway twice: ",
    ),
    (
        _with(api={"autoscaling": {"enabled": True}, "resources": {"requests": {"cpu": None}}}),
        "needs api.resources.requests.cpu",
    ),
    (_with(api={"replica": 2}), "at '/api': additional properties 'replica' not allowed"),
    (_with(api={"replicas": "two"}), "at '/api/replicas': got string, want integer"),
    (_with(settings={"prefect_home": "x"}), "'prefect_home' does not match pattern"),
    (_with(service={"type": "Load"}), "at '/service/type'"),
    (_with(image={"digest": "sha256:1"}), "at '/image/digest'"),
    *[(_with(services={"pod": pod}), message) for pod, message in POD_RULES],
    *[(_with(services={"resources": resources}), message) for resources, message in RESOURCE_RULES],
    (
        _with(migrations={"pod": {"sidecars": [{"name": "a", "image": "a"}]}}),
        ".pod.sidecars is set: a sidecar would keep the pod from ending",
    ),
    (
        _with(database={"bundled": {"pod": {"volumes": [{"name": "data", "emptyDir": {}}]}}}),
        ": the chart uses this name for its own volume",
    ),
    (
        _with(database={"bundled": {"pod": {"volumeMounts": [{"name": "tmp", "mountPath": "/var/run/postgresql"}]}}}),
        ": the chart mounts its own volume there",
    ),
    (
        _with(database={"bundled": {"pod": {"volumes": [{"name": "init", "emptyDir": {}}]}}}),
        'has a volume "init": the chart uses this name for its own volume',
    ),
    (
        _with(
            database={
                "bundled": {"pod": {"volumeMounts": [{"name": "tmp", "mountPath": "/docker-entrypoint-initdb.d"}]}}
            }
        ),
        "has the mountPath /docker-entrypoint-initdb.d: the chart mounts its own volume there",
    ),
    (
        _with(api={"autoscaling": {"enabled": True, "minReplicas": 9}}),
        "api.autoscaling.minReplicas is above api.autoscaling.maxReplicas",
    ),
    (
        _with(api={"strategy": {"rollingUpdate": {"maxSurge": "0%"}}}),
        ".strategy.rollingUpdate has 0 for maxSurge and for maxUnavailable",
    ),
    (
        _with(api={"podDisruptionBudget": {"maxUnavailable": ""}}),
        ".podDisruptionBudget has neither minAvailable nor maxUnavailable",
    ),
    (_with(api={"terminationGracePeriodSeconds": 3}), ".lifecycle.preStop.sleep.seconds ("),
    (_with(services={"lifecycle": {"postStart": {"sleep": {"seconds": 61}}}}), ".lifecycle.postStart.sleep.seconds ("),
    (_with(ingress={"tls": [{"hosts": ["{{ .Release.Name }}_"]}]}), "ingress.tls names "),
    (_with(networkPolicy={"apiFrom": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/9"]}}]}), ".except has "),
    (_with(networkPolicy={"extraEgress": [{"ports": [{"port": 20, "endPort": 10}]}]}), ".ports has endPort "),
    (_with(service={"clusterIP": "fd00::9", "ipFamilies": ["IPv4"]}), "service.clusterIP is an address of "),
    (
        _with(
            service={"type": "NodePort", "nodePort": 30001, "extraPorts": [{"name": "a", "port": 1, "nodePort": 30001}]}
        ),
        "(or pod's) has the ",
    ),
    (
        _with(httpRoute={"timeouts": {"request": "1m", "backendRequest": "61s"}}),
        "httpRoute.timeouts.backendRequest (",
    ),
    (_with(serviceAccount={"create": False}), "serviceAccount.create=false needs serviceAccount.name: "),
    (
        _with(
            retention={"days": {"runs": 90}},
            services={"settings": {"PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs"}},
        ),
        " and retention.days.runs both delete runs: ",
    ),
    (_with(retention={"days": {"runs": "90d"}}), "at '/retention/days/runs': got string, want"),
    (_with(tls={"enabled": True}), "tls.enabled=true needs a certificate: "),
    (
        _with(tls={"enabled": True, "existingSecret": "tls", "certManager": {"issuerRef": {"name": "ca"}}}),
        "tls.existingSecret and tls.certManager.issuerRef.name are both set: ",
    ),
    (_with(tls={"existingSecret": "tls"}), " is set with tls.enabled=false: no component would use the certificate"),
    (
        _with(tls={**TLS, "certManager": {"duration": "24h", "renewBefore": "24h"}}),
        ": the certificate would be renewed again and again",
    ),
    (_with(tls={**TLS, "certManager": {"duration": "90d"}}), "at '/tls/certManager/duration'"),
    (_with(tls=TLS, auth={"enabled": False}, api={"args": ["a"]}), "tls.enabled=true and api.args are both set: "),
    (
        _with(tls=TLS, database={"bundled": {"configuration": {"ssl": "off"}}}),
        " is set with tls.enabled=true: it would change the TLS of the database",
    ),
    (
        _with(tls=TLS, services={"settings": {"PREFECT_API_TLS_INSECURE_SKIP_VERIFY": True}}),
        " is set with tls.enabled=true: the services would accept any certificate",
    ),
    (
        _with(tls=TLS, pod={"volumes": [{"name": "tls", "emptyDir": {}}]}),
        ": the chart uses this name for its own volume",
    ),
    (_with(fullnameOverride="1st"), " begins with a digit: Kubernetes refuses a Service of such a name"),
]


@pytest.mark.parametrize(
    ("values", "message"), one_in_four(REFUSED), ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_impossible_values_are_refused_with_key_and_cure(values: Object, message: str) -> None:
    with pytest.raises(ClusterError) as caught:
        render("prefect-server", values)
    assert message in str(caught.value)
