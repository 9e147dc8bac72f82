"""TLS inside the cluster: who serves the certificate, who verifies it, and which pods have the key."""

import re
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

from orchestration.api_tls import CERTIFICATE_VARIABLE, KEY_VARIABLE
from orchestration.operations.local_cluster import binaries
from tests.helm import test_prefect_server, test_prefect_work_pool
from tests.helm.rendering import Object, assert_restricted, check_custom, environment, inventory, one, pod_specs, render
from tests.helm.test_prefect_server import TLS
from tests.helm.test_prefect_work_pool import pool_of

CA = "/etc/prefect-tls/ca.crt"
ISSUER: Object = {"enabled": True, "certManager": {"issuerRef": {"name": "ca", "kind": "ClusterIssuer"}}}
KEYS = ["ca.crt", "tls.crt", "tls.key"]


def _server(**values: Any) -> list[Object]:
    everything = {"tls": TLS, "pgbouncer": {"enabled": True}, "backup": {"enabled": True}}
    return render("prefect-server", test_prefect_server._with(**everything | values))


def _pool(**api: Any) -> list[Object]:
    url = {"url": "https://prefect-server-api:4200/api", "tls": {"caSecret": "ca"}}
    return render("prefect-work-pool", test_prefect_work_pool._with(api=url | api))


def _mounted(spec: Object, volume: str) -> list[str]:
    """Return the keys of a Secret that a pod mounts as a volume; none if the pod has no such volume."""
    found = [source["secret"]["items"] for source in spec["volumes"] if source["name"] == volume]
    return [item["key"] for items in found for item in items]


def test_only_servers_of_tls_have_the_key() -> None:
    """All other pods have the certificate of the CA alone."""
    objects = _server()
    assert_restricted(objects)
    assert {name: _mounted(spec, "tls") for name, spec in pod_specs(objects).items()} == {
        "CronJob/test-prefect-server-backup": ["ca.crt"],
        "Deployment/test-prefect-server-api": KEYS,
        "Deployment/test-prefect-server-pgbouncer": KEYS,
        "Deployment/test-prefect-server-redis": KEYS,
        "Deployment/test-prefect-server-services": ["ca.crt"],
        "Job/test-prefect-server-backup-volume-1": [],
        "Job/test-prefect-server-migrations-1": ["ca.crt"],
        "Pod/test-prefect-server-test": ["ca.crt"],
        "StatefulSet/test-prefect-server-database": ["tls.crt", "tls.key"],
    }
    for name, spec in pod_specs(objects).items():
        for volume in spec["volumes"]:
            if volume["name"] == "tls":
                assert volume["secret"]["defaultMode"] == 0o440, f"Postgres refuses a key that others may read: {name}"


def test_api_serves_https_and_its_clients_verify_it() -> None:
    objects = _server(ingress={"enabled": True, "hosts": [{"host": "prefect.example.com"}]})
    pods = pod_specs(objects)
    [api] = pods["Deployment/test-prefect-server-api"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert api[probe]["httpGet"]["scheme"] == "HTTPS"
    assert {CERTIFICATE_VARIABLE, KEY_VARIABLE} <= set(environment(api))
    for component in ("api", "services"):
        variables = environment(pods[f"Deployment/test-prefect-server-{component}"]["containers"][0])
        assert variables["PREFECT_API_URL"] == "https://test-prefect-server-api:4200/api"
        assert variables["PREFECT_API_SSL_CERT_FILE"] == CA
    test = environment(pods["Pod/test-prefect-server-test"]["containers"][0])
    assert (test["PREFECT_API_URL"], test["SSL_CERT_FILE"]) == ("https://test-prefect-server-api:4200/api", CA)
    assert one(objects, "Service", "test-prefect-server-api")["spec"]["ports"][0]["appProtocol"] == "https"
    annotations = one(objects, "Ingress", "test-prefect-server-api")["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/backend-protocol"] == "HTTPS"


def test_every_client_of_the_bundled_database_verifies_certificate_and_name() -> None:
    pods = pod_specs(_server())
    clients = {
        (name, container["name"]): environment(container)
        for name, spec in pods.items()
        for container in [*spec["containers"], *spec.get("initContainers", [])]
        if "env" in container and container["name"] not in ("connection", "postgres", "test", "valkey")
    }
    assert {name for _, name in clients} == {"api", "services", "migrations", "wait-for-migrations", "dump", "store"}
    for name, variables in clients.items():
        assert (variables["PGSSLMODE"], variables["PGSSLROOTCERT"]) == ("verify-full", CA), name
    [database] = pods["StatefulSet/test-prefect-server-database"]["containers"]
    assert "ssl=on" in database["args"]
    rules = one(_server(), "ConfigMap", "test-prefect-server-database")["data"]["pg_hba.conf"].splitlines()
    assert [rule.split()[0] for rule in rules if not re.search("127.0.0.1|::1", rule)] == ["local", "hostssl"]


def test_pgbouncer_verifies_postgres_and_serves_tls_itself() -> None:
    objects = _server()
    pod = pod_specs(objects)["Deployment/test-prefect-server-pgbouncer"]
    assert pod["initContainers"][0]["args"][-2:] == ["--tls-mode=verify-full", f"--ca-file={CA}"]
    configuration = one(objects, "ConfigMap", "test-prefect-server-pgbouncer")["data"]["pgbouncer.ini"]
    assert "client_tls_sslmode = require\n" in configuration
    [api] = pod_specs(objects)["Deployment/test-prefect-server-api"]["containers"]
    assert environment(api)["PGBOUNCER_CA_FILE"] == CA


def test_external_database_and_redis_keep_their_own_tls() -> None:
    objects = _server(
        database={
            "bundled": {"enabled": False, "configuration": {"ssl": "off"}}, "external": {"existingSecret": "database"},
        },
        redis={"bundled": {"enabled": False}, "external": {"existingSecret": "redis"}},
        pgbouncer={"enabled": True, "serverTLS": {"mode": "verify-full", "caSecret": "other"}},
        backup={"enabled": True, "image": {"repository": "postgres", "tag": "18.1"}},
    )  # fmt: skip
    assert "PGSSLMODE" not in repr(objects)
    pod = pod_specs(objects)["Deployment/test-prefect-server-pgbouncer"]
    assert pod["initContainers"][0]["args"][-2:] == ["--tls-mode=verify-full", "--ca-file=/etc/pgbouncer-ca/ca.crt"]
    assert "client_tls_sslmode = require\n" in repr(objects).replace("\\n", "\n")


def test_cert_manager_issues_the_certificate_for_all_services() -> None:
    objects = _server(tls=ISSUER)
    certificate = one(objects, "Certificate", "test-prefect-server-tls")
    check_custom(certificate, binaries.certificates())
    with pytest.raises(ValidationError):
        check_custom(certificate | {"spec": certificate["spec"] | {"dnsName": ["a"]}}, binaries.certificates())
    assert certificate["spec"]["issuerRef"] == {"name": "ca", "kind": "ClusterIssuer", "group": "cert-manager.io"}
    secrets = {
        volume["secret"]["secretName"]
        for spec in pod_specs(objects).values()
        for volume in spec["volumes"]
        if volume["name"] == "tls"
    }
    assert secrets == {certificate["spec"]["secretName"]}
    services = [manifest["metadata"]["name"] for manifest in objects if manifest["kind"] == "Service"]
    names = certificate["spec"]["dnsNames"]
    assert {f"{name}{suffix}" for name in services for suffix in ("", ".prefect", ".prefect.svc")} <= set(names)
    assert "localhost" in names, "commands such as `make ui` reach the API by a forwarded port"
    used = {
        host
        for spec in pod_specs(objects).values()
        for host in re.findall(r"test-prefect-server-(?:api|database|redis|pgbouncer)(?=:|'|\")", repr(spec))
    }
    assert used <= set(names)


def test_existing_secret_needs_no_cert_manager() -> None:
    assert not [name for name in inventory(_server()) if name.startswith("Certificate/")]


def test_network_policies_are_the_same_with_tls() -> None:
    with_tls, without = (
        [manifest for manifest in _server(tls=tls) if manifest["kind"] == "NetworkPolicy"]
        for tls in (TLS, {"enabled": False})
    )
    assert with_tls == without


def test_all_pods_of_the_work_pool_verify_the_api() -> None:
    objects = _pool()
    job = pool_of(objects)["base_job_template"]["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    pods = pod_specs(objects) | {"a run": job}
    assert len(pods) == 6, "worker, sync, drift, reconciler, test, and a run"
    for name, spec in pods.items():
        assert _mounted(spec, "api-ca") == ["ca.crt"], name
        container = spec["containers"][0]
        assert environment(container)["PREFECT_API_SSL_CERT_FILE"] == "/etc/prefect-api/ca/ca.crt", name
        assert {"name": "api-ca", "mountPath": "/etc/prefect-api/ca", "readOnly": True} in container["volumeMounts"]
    assert "SSL_CERT_FILE" not in environment(job["containers"][0]), "runs need the public CAs for other servers"
    assert "INSECURE_SKIP_VERIFY" not in yaml.safe_dump(objects)


def test_public_certificate_needs_no_secret() -> None:
    for name, spec in pod_specs(_pool(tls={"caSecret": ""})).items():
        assert _mounted(spec, "api-ca") == []
        assert "PREFECT_API_SSL_CERT_FILE" not in environment(spec["containers"][0]), name
