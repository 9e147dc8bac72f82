"""The component pgbouncer of the server's chart: its objects, its clients, and the limits of connections."""

import json
import re
from typing import Any

import pytest

from orchestration.errors import ClusterError
from tests.helm.rendering import (
    EVERY_POD,
    Object,
    added,
    assert_restricted,
    environment,
    one,
    one_in_four,
    peer_components,
    pod_specs,
    render,
)
from tests.helm.test_prefect_server import TAG, TLS, _with

NAME = "test-prefect-server-pgbouncer"
EXTERNAL: Object = {"bundled": {"enabled": False}, "external": {"existingSecret": "database"}}


def _render(**values: Any) -> list[Object]:
    return render("prefect-server", _with(pgbouncer={"enabled": True} | values.pop("pgbouncer", {}), **values))


def _settings(objects: list[Object]) -> dict[str, str]:
    """Return the settings of pgbouncer.ini."""
    text = one(objects, "ConfigMap", NAME)["data"]["pgbouncer.ini"]
    return dict(re.findall(r"^(\w+) = ?(.*)$", text, flags=re.MULTILINE))


def test_pgbouncer_adds_these_objects() -> None:
    assert added(_render(), render("prefect-server", TAG)) == [
        f"ConfigMap/{NAME}",
        f"Deployment/{NAME}",
        f"NetworkPolicy/{NAME}",
        f"PodDisruptionBudget/{NAME}",
        f"Service/{NAME}",
        f"ServiceAccount/{NAME}",
    ]
    assert_restricted(_render())
    assert_restricted(_render(pod=EVERY_POD, database=EXTERNAL, pgbouncer={"serverTLS": {"caSecret": "ca"}}))


def test_configuration_has_the_values_and_no_secret() -> None:
    pgbouncer = {"defaultPoolSize": 11, "reservePoolSize": 4, "maxClientConn": 1_000_000}
    objects = _render(pgbouncer=pgbouncer)
    assert {
        "pool_mode": "transaction",
        "default_pool_size": "11",
        "reserve_pool_size": "4",
        "max_db_connections": "15",
        "max_client_conn": "1000000",
        "max_prepared_statements": "200",
        "auth_type": "scram-sha-256",
    }.items() <= _settings(objects).items()
    text = one(objects, "ConfigMap", NAME)["data"]["pgbouncer.ini"]
    headings = [line for line in text.splitlines() if line.startswith("[")]
    assert headings == ["[databases]", "[pgbouncer]"], "PgBouncer drops what a section had that is opened again"
    pod = pod_specs(objects)[f"Deployment/{NAME}"]
    [writer] = pod["initContainers"]
    assert environment(writer)["PREFECT_SERVER_DATABASE_PASSWORD"] == {
        "secretKeyRef": {"name": "test-prefect-server-database", "key": "password"}
    }
    [container] = pod["containers"]
    assert "env" not in container
    [files] = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "connection"]
    assert files["medium"] == "Memory", "the password is not written to a disk"


def test_changed_configuration_restarts_pgbouncer_alone() -> None:
    def checksums(name: str, **pgbouncer: Any) -> Object:
        template = one(_render(pgbouncer=pgbouncer), "Deployment", f"test-prefect-server-{name}")["spec"]["template"]
        annotations: Object = template["metadata"]["annotations"]
        return annotations

    assert checksums("pgbouncer") == checksums("pgbouncer")
    assert checksums("pgbouncer") != checksums("pgbouncer", defaultPoolSize=19)
    assert checksums("api") == checksums("api", defaultPoolSize=19)


@pytest.mark.parametrize("separate", [True, False])
def test_server_uses_pgbouncer_and_migrations_and_backups_do_not(separate: bool) -> None:
    for database in ({}, EXTERNAL):
        image = {"repository": "postgres", "tag": "17.6"}
        objects = _render(database=database, services={"separate": separate}, backup={"enabled": True, "image": image})
        using = set()
        for name, spec in pod_specs(objects).items():
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                if environment({"env": []} | container).get("PGBOUNCER_ADDRESS") == f"{NAME}:6432":
                    using.add(f"{name.rpartition('-')[2]}/{container['name']}")
        services = {"services/services", "services/wait-for-migrations"} if separate else set()
        assert using == {"api/api", "api/wait-for-migrations", *services}
    assert "PGBOUNCER_ADDRESS" not in json.dumps(render("prefect-server", TAG))


@pytest.mark.parametrize(("separate", "listener"), [(True, "services"), (False, "api")])
def test_only_services_migrations_and_backups_reach_postgres(separate: bool, listener: str) -> None:
    """The services listen for notifications, which PgBouncer does not pass on in transaction mode."""
    objects = _render(services={"separate": separate}, backup={"enabled": True})
    database = one(objects, "NetworkPolicy", "test-prefect-server-database")["spec"]["ingress"]
    assert peer_components(database, "from") == {listener, "pgbouncer", "migrations", "backup"}
    policy = one(objects, "NetworkPolicy", NAME)["spec"]
    assert peer_components(policy["ingress"], "from") == ({"api", "services"} if separate else {"api"})
    assert peer_components(policy["egress"], "to") == {"database"}
    egress = {
        component: peer_components(
            one(objects, "NetworkPolicy", f"test-prefect-server-{component}")["spec"]["egress"], "to"
        )
        for component in ("api", "migrations", listener)
    }
    assert ("database" in egress["api"]) is (listener == "api")
    assert "pgbouncer" in egress["api"]
    assert {"database", "pgbouncer"} <= egress[listener]
    assert egress["migrations"] == {"database"}


def test_pgbouncer_reaches_an_external_database() -> None:
    policy = _with(networkPolicy={"egressCIDRs": ["10.0.0.0/8"], "extraEgress": [{"ports": [{"port": 5433}]}]})
    objects = _render(database=EXTERNAL, networkPolicy=policy["networkPolicy"])
    [_, addresses, extra] = one(objects, "NetworkPolicy", NAME)["spec"]["egress"]
    assert addresses["to"][0]["ipBlock"]["cidr"] == "10.0.0.0/8"
    assert extra == {"ports": [{"port": 5433}]}


def test_certificate_of_an_external_database_is_mounted() -> None:
    tls = {"mode": "verify-full", "caSecret": "ca", "caKey": "root.pem"}
    pod = pod_specs(_render(database=EXTERNAL, pgbouncer={"serverTLS": tls}))[f"Deployment/{NAME}"]
    args = pod["initContainers"][0]["args"]
    assert args[2:] == [
        "orchestration.pgbouncer",
        "/run/pgbouncer",
        "--tls-mode=verify-full",
        "--ca-file=/etc/pgbouncer-ca/root.pem",
    ]
    assert {"name": "server-ca", "mountPath": "/etc/pgbouncer-ca", "readOnly": True} in pod["containers"][0][
        "volumeMounts"
    ]
    source = {"secretName": "ca", "items": [{"key": "root.pem", "path": "root.pem"}]}
    assert {"name": "server-ca", "secret": source} in pod["volumes"], "the Secret may have the CA's key, too"


PODS = {"api": {"replicas": 2}, "services": {"replicas": 2}}
"""In a rollout three pods of each, with 15 connections a pod: 90, and 7 of others."""

BOUNDS: dict[str, tuple[Object, str, int, int, list[str]]] = {
    "all processes": (
        PODS, "database.bundled.configuration.max_connections", 97, 96,
        ["3 API and 3 services pods", "database.poolSize 5", "database.maxOverflow 10", "pgbouncer.enabled=true"],
    ),
    "an autoscaler": (
        {"api": {"autoscaling": {"enabled": True, "maxReplicas": 4}}},
        "database.bundled.configuration.max_connections", 7 * 15 + 7, 7 * 15 + 6, ["api.autoscaling.maxReplicas"],
    ),
    "pods that are stopped before others start": (
        {"api": {"replicas": 2, "strategy": {"type": "Recreate"}}, "services": {"replicas": 3}},
        "database.bundled.configuration.max_connections", (2 + 3 + 1) * 15 + 7, (2 + 3 + 1) * 15 + 6, [],
    ),
    "a surge in percent": (
        {"api": {"replicas": 5, "strategy": {"rollingUpdate": {"maxSurge": "50%"}}}},
        "database.bundled.configuration.max_connections", (5 + 3 + 2) * 15 + 7, (5 + 3 + 2) * 15 + 6, [],
    ),
    "one process": (
        {"services": {"separate": False}}, "database.bundled.configuration.max_connections", 37, 36, [],
    ),
    "backups": (
        {"backup": {"enabled": True}}, "database.bundled.configuration.max_connections", 70, 69, [],
    ),
    "reserved connections": (
        {"database": {"bundled": {"configuration": {"superuser_reserved_connections": 0, "reserved_connections": 5}}}},
        "database.bundled.configuration.max_connections", 69, 68, [],
    ),
    "pgbouncer": (
        PODS | {"pgbouncer": {"enabled": True}}, "database.bundled.configuration.max_connections",
        3 * 25 + 3 + 7, 3 * 25 + 3 + 6,
        ["pgbouncer.defaultPoolSize 20", "pgbouncer.reservePoolSize 5", "3 PgBouncer pods"],
    ),
    "clients of pgbouncer": (
        PODS | {"pgbouncer": {"enabled": True}}, "pgbouncer.maxClientConn", 90, 89, ["90 connections", "poolSize 5"],
    ),
    "clients of pgbouncer with an external database": (
        {"pgbouncer": {"enabled": True}, "database": EXTERNAL}, "pgbouncer.maxClientConn", 60, 59, [],
    ),
}  # fmt: skip
"""Values, the key of a limit, the least limit that suffices, the most that does not, and parts of the refusal."""


@pytest.mark.parametrize("case", one_in_four((case,) for case in BOUNDS.values()), ids=BOUNDS)
def test_connections_fit_their_limit_or_are_refused(case: tuple[Object, str, int, int, list[str]]) -> None:
    given, key, enough, too_few, parts = case

    def tried(limit: int) -> None:
        values: Any = limit
        for name in reversed(key.split(".")):
            values = {name: values}
        render("prefect-server", _merged(_with(**given), values))

    tried(enough)
    with pytest.raises(ClusterError) as caught:
        tried(too_few)
    message = str(caught.value)
    for part in (f"{key} is {too_few}: ", "Raise ", *parts):
        assert part in message


def _merged(one: Object, other: Object) -> Object:
    both = {key: _merged(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], dict)}
    return one | other | both


def test_external_database_has_a_limit_that_the_chart_does_not_know() -> None:
    render("prefect-server", _with(database=EXTERNAL, api={"replicas": 30}))


TLS_SETTING: Object = {"PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_TLS_ENABLED": True}
VERIFIED: Object = {"serverTLS": {"mode": "verify-full", "caSecret": "ca"}}
CNPG: Object = {"mode": "cnpg", "cnpg": {"archive": {"destination": "s3://archive/prefect", "existingSecret": "keys"}}}

REFUSED: list[tuple[Object, str, Object]] = [
    ({"services": {"args": ["a"]}}, "pgbouncer.enabled=true and services.args are both set: ", {"services": {}}),
    (
        {"api": {"args": ["a"]}, "auth": {"roles": {"enabled": False}}},
        "pgbouncer.enabled=true and api.args are both set: ",
        {"api": {"extraArgs": ["--a"]}},
    ),
    ({"pgbouncer": {"serverTLS": {"mode": "require"}}}, ": they are for an external database", {"pgbouncer": {}}),
    (
        {"pgbouncer": {"serverTLS": {"mode": "verify-ca"}}, "database": EXTERNAL},
        "needs pgbouncer.serverTLS.caSecret",
        {"pgbouncer": VERIFIED},
    ),
    ({"pgbouncer": {"image": {"tag": ""}}}, "pgbouncer.image.tag is empty", {"pgbouncer": {"image": {"tag": "1"}}}),
    ({"pgbouncer": {"replicas": 0}}, "/pgbouncer/replicas", {"pgbouncer": {"replicas": 1}}),
    ({"pgbouncer": {"serverTLS": {"mode": "on"}}}, "/pgbouncer/serverTLS/mode", {"pgbouncer": {}}),
    (
        {"api": {"settings": {"PREFECT_SERVER_DATABASE_SQLALCHEMY_CONNECT_ARGS_SEARCH_PATH": "a"}}},
        "api.settings has a search path and pgbouncer.enabled is true",
        {"api": {}},
    ),
    (
        {"settings": TLS_SETTING, "database": EXTERNAL},
        "settings has TLS for the database and pgbouncer.serverTLS.mode is empty: ",
        {"pgbouncer": VERIFIED},
    ),
    (
        {"settings": TLS_SETTING, "database": CNPG},
        "settings has TLS for the database and pgbouncer.serverTLS.mode is empty: ",
        {"pgbouncer": VERIFIED},
    ),
    (
        {"settings": TLS_SETTING, "database": CNPG, "tls": TLS},
        "does not read Prefect's settings of TLS. Remove the setting: tls.enabled=true covers ",
        {"settings": {}},
    ),
    (
        {"api": {"settings": TLS_SETTING}},
        "does not read Prefect's settings of TLS. Remove the setting: tls.enabled=true covers ",
        {"api": {}, "tls": TLS},
    ),
    (
        {"pgbouncer": {"podDisruptionBudget": {"maxUnavailable": ""}}},
        "pgbouncer.podDisruptionBudget has neither minAvailable nor maxUnavailable",
        {"pgbouncer": {"podDisruptionBudget": {"enabled": False}}},
    ),
    (
        {"pgbouncer": {"pod": {"volumes": [{"name": "connection", "emptyDir": {}}]}}},
        'has a volume "connection": the chart uses this name',
        {"pgbouncer": {"pod": {"volumes": [{"name": "other", "emptyDir": {}}]}}},
    ),
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
