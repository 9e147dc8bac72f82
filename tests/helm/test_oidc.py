"""The component oidc of the server's chart: oauth2-proxy, what leads to it, and what it may reach."""

import json
from typing import Any

import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries
from tests.helm.rendering import (
    EVERY_POD,
    Object,
    added,
    assert_restricted,
    check_custom,
    environment,
    one,
    one_in_four,
    peer_components,
    pod_specs,
    render,
)
from tests.helm.test_prefect_server import TAG, TLS, _with

NAME = "test-prefect-server-oidc"
ROLES_SECRET = "test-prefect-server-api-roles"  # noqa: S105 - a name
OIDC: Object = {
    "enabled": True,
    "issuerUrl": "https://id.example.com/realms/a",
    "clientId": "prefect",
    "existingSecret": "prefect-oidc",
    "groups": {"operator": ["data-platform", "data admins"], "viewer": ["data"]},
}
PATH: Object = {"path": "/prefect", "pathType": "Prefix"}
API = "test-prefect-server-api"
ROUTE: Object = {"enabled": True, "parentRefs": [{"name": "gateway"}]}
INGRESS: Object = {"enabled": True, "hosts": [{"host": "prefect.example.com"}, {"host": "machines.example.com"}]}


def _render(**values: Any) -> list[Object]:
    return render("prefect-server", _with(oidc=OIDC | values.pop("oidc", {}), **values))


def _arguments(objects: list[Object]) -> list[str]:
    arguments: list[str] = pod_specs(objects)[f"Deployment/{NAME}"]["containers"][0]["args"]
    return arguments


def test_oidc_is_off_by_default_and_adds_these_objects() -> None:
    assert added(_render(), render("prefect-server", TAG)) == [
        f"Deployment/{NAME}",
        f"NetworkPolicy/{NAME}",
        f"PodDisruptionBudget/{NAME}",
        f"Service/{NAME}",
        f"ServiceAccount/{NAME}",
    ]
    assert_restricted(_render())
    assert_restricted(_render(pod=EVERY_POD, tls=TLS))
    default = json.dumps(render("prefect-server", TAG))
    assert "OIDC_GROUPS" not in default
    assert "oidc-key" not in default


def test_only_oauth2_proxy_and_the_api_have_its_key() -> None:
    objects = _render(backup={"enabled": True}, pgbouncer={"enabled": True})
    assert one(objects, "Secret", ROLES_SECRET)["data"]["oidc-key"]
    having = set()
    for name, spec in pod_specs(objects).items():
        if any(volume.get("secret", {}).get("secretName") == ROLES_SECRET for volume in spec["volumes"]):
            having.add(name)
        if any(ROLES_SECRET in json.dumps(container.get("env", [])) for container in spec["containers"]):
            having.add(name)
    assert having == {"Deployment/test-prefect-server-api", f"Deployment/{NAME}"}
    [container] = pod_specs(objects)[f"Deployment/{NAME}"]["containers"]
    assert environment(container) == {
        "OAUTH2_PROXY_CLIENT_SECRET": {"secretKeyRef": {"name": "prefect-oidc", "key": "client-secret"}},
        "OAUTH2_PROXY_COOKIE_SECRET": {"secretKeyRef": {"name": "prefect-oidc", "key": "cookie-secret"}},
        "OAUTH2_PROXY_BASIC_AUTH_PASSWORD": {"secretKeyRef": {"name": ROLES_SECRET, "key": "oidc-key"}},
    }
    own = _render(auth={"roles": {"existingSecret": "roles"}})
    [container] = pod_specs(own)[f"Deployment/{NAME}"]["containers"]
    assert environment(container)["OAUTH2_PROXY_BASIC_AUTH_PASSWORD"]["secretKeyRef"]["name"] == "roles"


def test_api_and_oauth2_proxy_know_the_same_groups() -> None:
    objects = _render()
    [api] = pod_specs(objects)["Deployment/test-prefect-server-api"]["containers"]
    assert json.loads(environment(api)["OIDC_GROUPS"]) == OIDC["groups"]
    allowed = [argument for argument in _arguments(objects) if argument.startswith("--allowed-group=")]
    assert allowed == ["--allowed-group=data-platform", "--allowed-group=data admins", "--allowed-group=data"]


def test_arguments_of_the_user_are_last() -> None:
    extra = ["--cookie-expire=1h", "--scope=openid email profile"]
    arguments = _arguments(_render(oidc={"extraArgs": extra}))
    assert arguments[-2:] == extra
    assert arguments.index("--cookie-expire=8h") < arguments.index("--cookie-expire=1h")
    # Domains add up, and "*" would permit all.
    own = _arguments(_render(oidc={"extraArgs": ["--email-domain=example.com"]}))
    assert [argument for argument in own if "email-domain" in argument] == ["--email-domain=example.com"]


def test_paths_of_the_api_follow_its_base_path() -> None:
    arguments = _arguments(_render(api={"basePath": "/prefect.v1/api"}))
    assert r"--api-route=^/prefect\.v1/api/" in arguments
    assert r"--skip-auth-route=GET=^/prefect\.v1/api/(health|ready)$" in arguments


def test_image_is_the_version_that_the_tests_run() -> None:
    [container] = pod_specs(_render())[f"Deployment/{NAME}"]["containers"]
    assert container["image"].rpartition(":")[2] == binaries.MODULES["oauth2-proxy"][1]


def test_ingress_and_route_lead_to_oauth2_proxy_but_for_direct_hosts() -> None:
    objects = _render(oidc={"directHosts": ["machines.example.com"]}, ingress=INGRESS, httpRoute=ROUTE)
    backends = {
        rule["host"]: rule["http"]["paths"][0]["backend"]["service"]["name"]
        for rule in one(objects, "Ingress", "test-prefect-server-api")["spec"]["rules"]
    }
    assert backends == {"prefect.example.com": NAME, "machines.example.com": "test-prefect-server-api"}
    [rule] = one(objects, "HTTPRoute", "test-prefect-server-api")["spec"]["rules"]
    port = one(objects, "Service", NAME)["spec"]["ports"][0]["port"]
    assert rule["backendRefs"] == [{"name": NAME, "port": port}]


@pytest.mark.parametrize(
    ("hostnames", "direct", "expected"),
    [
        (["a.example.com", "b.example.com"], ["b.example.com"], {NAME: ["a.example.com"], API: ["b.example.com"]}),
        # A request goes to the route with the most specific host name.
        ([], ["b.example.com"], {NAME: None, API: ["b.example.com"]}),
        (["b.example.com"], ["b.example.com"], {API: ["b.example.com"]}),
        (["a.example.com"], [], {NAME: ["a.example.com"]}),
    ],
)
def test_direct_hosts_have_an_http_route_to_the_api(
    hostnames: list[str], direct: list[str], expected: dict[str, list[str] | None]
) -> None:
    given = {"httpRoute": ROUTE | {"hostnames": hostnames, "labels": {"team": "a"}}}
    routes = _find_routes(_render(oidc={"directHosts": direct}, **given))
    found = {route["spec"]["rules"][0]["backendRefs"][0]["name"]: route["spec"].get("hostnames") for route in routes}
    assert found == expected
    for route in routes:
        check_custom(route, binaries.http_routes())
        assert route["spec"]["parentRefs"] == ROUTE["parentRefs"]
        assert route["spec"]["rules"][0]["timeouts"] == {"request": "0s", "backendRequest": "0s"}
        assert route["metadata"]["labels"]["team"] == "a"
    [without] = _find_routes(_render(oidc={"directHosts": direct, "enabled": False}, **given))
    assert without["spec"].get("hostnames", []) == hostnames
    assert without["spec"]["rules"][0]["backendRefs"][0]["name"] == API


def _find_routes(objects: list[Object]) -> list[Object]:
    return [manifest for manifest in objects if manifest["kind"] == "HTTPRoute"]


def test_variables_of_the_user_are_next_to_those_of_the_chart() -> None:
    reference = {"secretKeyRef": {"name": "test-proxy", "key": "url"}}
    templated = {"secretKeyRef": {"name": "{{ .Release.Name }}-proxy", "key": "url"}}
    env = [{"name": "HTTPS_PROXY", "valueFrom": templated}, {"name": "PORT", "value": 1}, {"name": "PORT", "value": 2}]
    from_secret = {"secretRef": {"name": "more"}}
    [plain] = pod_specs(_render(env=[{"name": "A", "value": "1"}]))[f"Deployment/{NAME}"]["containers"]
    [container] = pod_specs(_render(oidc={"env": env, "envFrom": [from_secret]}))[f"Deployment/{NAME}"]["containers"]
    assert environment(container) == environment(plain) | {"HTTPS_PROXY": reference, "PORT": "2"}
    assert len(container["env"]) == len(environment(container))
    assert container["envFrom"] == [from_secret]
    assert not {"A", "PORT"} & set(environment(plain)), "variables of the server's pods"
    assert "envFrom" not in plain


def test_only_peers_of_the_api_reach_oauth2_proxy_and_it_reaches_the_api() -> None:
    client: Object = {"podSelector": {"matchLabels": {"app": "ingress"}}}
    objects = _render(networkPolicy={"apiFrom": [client], "egressCIDRs": ["10.0.0.0/8"]})
    policy = one(objects, "NetworkPolicy", NAME)["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["ingress"] == [{"ports": [{"port": "http"}], "from": [client]}]
    assert peer_components(policy["egress"], "to") == {"api"}
    assert {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]} in policy["egress"]
    api = one(objects, "NetworkPolicy", "test-prefect-server-api")["spec"]["ingress"]
    assert peer_components(api, "from") == {"services", "test", "oidc"}
    without = render("prefect-server", _with(networkPolicy={"apiFrom": [client]}))
    api = one(without, "NetworkPolicy", "test-prefect-server-api")["spec"]["ingress"]
    assert peer_components(api, "from") == {"services", "test"}


def test_with_tls_oauth2_proxy_serves_https_and_verifies_the_api() -> None:
    objects = _render(tls=TLS, ingress=INGRESS)
    spec = pod_specs(objects)[f"Deployment/{NAME}"]
    [container] = spec["containers"]
    assert "--https-address=0.0.0.0:4180" in container["args"]
    assert "--upstream=https://test-prefect-server-api:4200" in container["args"]
    assert not [argument for argument in container["args"] if "http-address" in argument or "insecure-skip" in argument]
    assert "--use-system-trust-store=true" in container["args"]
    # Go reads each file in these folders.
    assert environment(container)["SSL_CERT_DIR"].split(":") == ["/etc/ssl/certs", "/etc/prefect-tls"]
    assert container["readinessProbe"]["httpGet"]["scheme"] == "HTTPS"
    assert one(objects, "Service", NAME)["spec"]["ports"][0]["appProtocol"] == "https"
    certificate = {"enabled": True, "certManager": {"issuerRef": {"name": "ca"}}}
    names = [
        one(found, "Certificate", "test-prefect-server-tls")["spec"]["dnsNames"]
        for found in (_render(tls=certificate), render("prefect-server", _with(tls=certificate)))
    ]
    assert set(names[0]) - set(names[1]) == {
        NAME,
        f"{NAME}.prefect",
        f"{NAME}.prefect.svc",
        f"{NAME}.prefect.svc.cluster.local",
    }


REFUSED: list[tuple[Object, str, Object]] = [
    ({"auth": {"roles": {"enabled": False}}}, "needs auth.enabled and auth.roles.enabled", {"auth": {}}),
    ({"auth": {"enabled": False}}, "needs auth.enabled and auth.roles.enabled", {"oidc": {"enabled": False}}),
    ({"oidc": {"issuerUrl": ""}}, "needs oidc.issuerUrl", {"oidc": {}}),
    ({"oidc": {"clientId": ""}}, "needs oidc.clientId", {"oidc": {}}),
    ({"oidc": {"existingSecret": ""}}, "needs oidc.existingSecret", {"oidc": {}}),
    (
        {"oidc": {"groups": {"operator": [], "viewer": []}}},
        "oidc.groups names no group",
        {"oidc": {"groups": {"operator": ["a"], "viewer": []}}},
    ),
    ({"oidc": {"image": {"tag": ""}}}, "oidc.image.tag is empty", {"oidc": {"image": {"tag": "v7.15.6"}}}),
    (
        {"oidc": {"directHosts": ["other.example.com"]}, "ingress": INGRESS},
        "oidc.directHosts names other.example.com",
        {"oidc": {"directHosts": ["machines.example.com"]}},
    ),
    (
        {"oidc": {"directHosts": ["other.example.com"]}, "httpRoute": ROUTE | {"hostnames": ["a.example.com"]}},
        "oidc.directHosts names other.example.com",
        {"httpRoute": ROUTE | {"hostnames": ["a.example.com", "other.example.com"]}},
    ),
    (
        {"oidc": {"directHosts": ["machines.example.com"]}},
        "oidc.directHosts is set without ingress.enabled and httpRoute.enabled",
        {"ingress": INGRESS},
    ),
    (
        {"oidc": {"directHosts": ["machines.example.com"]}},
        "Enable one of the two",
        {"httpRoute": ROUTE},
    ),
    (
        {"oidc": {"directHosts": ['{{ "A.b" }}']}, "httpRoute": ROUTE},
        'oidc.directHosts names "A.b"',
        {"oidc": {"directHosts": ['{{ "a.b" }}']}},
    ),
    (
        {"oidc": {"env": [{"name": "OAUTH2_PROXY_BASIC_AUTH_PASSWORD", "value": "key"}]}},
        "oidc.env has OAUTH2_PROXY_BASIC_AUTH_PASSWORD: the chart sets this variable",
        {"oidc": {"env": []}},
    ),
    (
        {"oidc": {"env": [{"name": "SSL_CERT_DIR", "value": "/certificates"}]}, "tls": TLS},
        "oidc.env has SSL_CERT_DIR: the chart sets this variable",
        {"tls": {"enabled": False}},
    ),
    (
        {"oidc": {"env": [{"name": "OAUTH2_PROXY_COOKIE_EXPIRE", "value": "1h"}]}},
        "the argument --cookie-expire of oauth2-proxy wins over this variable",
        {"oidc": {"extraArgs": ["--cookie-expire=1h"]}},
    ),
    (
        {"oidc": {"env": [{"name": "OAUTH2_PROXY_ALLOWED_GROUPS", "value": "a"}]}},
        "the argument --allowed-group of oauth2-proxy wins over this variable",
        {"oidc": {"env": [{"name": "OAUTH2_PROXY_BANNER", "value": "a"}]}},
    ),
    (
        {"oidc": {"envFrom": [{"secretRef": {"name": '{{ "A" }}'}}]}},
        'oidc.envFrom names "A"',
        {"oidc": {"envFrom": [{"secretRef": {"name": "a"}}]}},
    ),
    (
        {"ingress": {"enabled": True, "hosts": [{"host": "a.example.com", "paths": [PATH]}]}},
        "ingress.hosts has no path /oauth2 for a.example.com",
        {
            "ingress": {
                "enabled": True,
                "hosts": [{"host": "a.example.com", "paths": [PATH, PATH | {"path": "/oauth2"}]}],
            }
        },
    ),
    (
        {"oidc": {"podDisruptionBudget": {"maxUnavailable": ""}}},
        "oidc.podDisruptionBudget has neither minAvailable nor maxUnavailable",
        {"oidc": {"podDisruptionBudget": {"enabled": False}}},
    ),
    # oauth2-proxy separates groups by commas.
    ({"oidc": {"groups": {"operator": ["a,b"], "viewer": []}}}, "/oidc/groups/operator/0", {"oidc": {}}),
    ({"oidc": {"issuerUrl": "http://id.example.com"}}, "/oidc/issuerUrl", {"oidc": {}}),
]
"""Values that the chart refuses, a part of the message, and what the message advises in their place."""


@pytest.mark.parametrize(
    ("given", "message", "advised"),
    one_in_four(REFUSED),
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_impossible_values_are_refused_with_a_cure_that_is_accepted(
    given: Object, message: str, advised: Object
) -> None:
    with pytest.raises(ClusterError) as caught:
        _render(**given)
    assert message in str(caught.value)
    _render(**given | advised)
