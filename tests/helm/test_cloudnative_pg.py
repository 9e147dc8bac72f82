"""The database in mode cnpg: CloudNativePG's objects, who reaches them, the recovery, and refused values."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestration.errors import ClusterError
from tests.helm import cloudnative_pg
from tests.helm.rendering import (
    EVERY_POD,
    Object,
    assert_restricted,
    environment,
    inventory,
    one,
    one_in_four,
    pod_specs,
    render,
)
from tests.helm.test_prefect_server import TAG, TLS, _with

CLUSTER = "test-prefect-server-db"
ARCHIVE: Object = {"destination": "s3://archive/prefect", "existingSecret": "keys"}
RECOVERY: Object = {"source": CLUSTER, "targetTime": "2026-11-29T12:00:00Z"}
CA = [{"key": "ca.crt", "path": "ca.crt"}]
KINDS = ("Cluster", "ObjectStore", "ScheduledBackup")


def _database(**cnpg: Any) -> Object:
    return {"mode": "cnpg", "cnpg": {"archive": ARCHIVE} | cnpg}


def _render(cnpg: Object | None = None, **given: Any) -> list[Object]:
    """Return the objects of a release with a Cluster, which meet the schemas of CloudNativePG."""
    objects = render("prefect-server", _with(database=_database(**(cnpg or {})), **given))
    found = [manifest for manifest in objects if manifest["kind"] in KINDS]
    assert len(found) == len(KINDS)
    for manifest in found:
        cloudnative_pg.check(manifest)
    return objects


def _recovered(**given: Any) -> list[Object]:
    return _render({"name": "recovered", "recovery": RECOVERY}, **given)


def test_cluster_takes_the_place_of_the_bundled_database() -> None:
    bundled, objects = inventory(render("prefect-server", TAG)), inventory(_render())
    assert [name for name in objects if name not in bundled] == [
        f"Cluster/{CLUSTER}",
        f"NetworkPolicy/{CLUSTER}",
        "ObjectStore/test-prefect-server-archive",
        f"ScheduledBackup/{CLUSTER}",
    ]
    assert [name for name in bundled if name not in objects] == [
        "ConfigMap/test-prefect-server-database",
        "NetworkPolicy/test-prefect-server-database",
        "Secret/test-prefect-server-database",
        "Service/test-prefect-server-database",
        "ServiceAccount/test-prefect-server-database",
        "StatefulSet/test-prefect-server-database",
    ]
    assert_restricted(_render())
    assert_restricted(_recovered(pod=EVERY_POD))


def test_database_is_created_for_the_server() -> None:
    spec = one(_render(), "Cluster", CLUSTER)["spec"]
    assert (spec["instances"], spec["enableSuperuserAccess"], spec["enablePDB"]) == (3, False, True)
    assert spec["bootstrap"] == {
        "initdb": {
            "database": "prefect",
            "owner": "prefect",
            "dataChecksums": True,
            "postInitSQL": ["alter role prefect createdb"],
            "postInitApplicationSQL": ["create extension if not exists pg_trgm"],
        }
    }
    assert spec["postgresql"]["synchronous"] == {"method": "any", "number": 1, "dataDurability": "preferred"}
    single = one(_render({"instances": 1}), "Cluster", CLUSTER)["spec"]
    assert "synchronous" not in single["postgresql"], "the operator refuses as many synchronous standbys as pods"
    digest = "sha256:" + "0" * 64
    image = {"repository": "registry.example.com/postgresql", "tag": "17.6", "digest": digest}
    placed = _render(
        {"image": image, "storage": {"size": "20Gi", "className": "fast"}, "configuration": {"max_connections": 200}},
        pod=EVERY_POD,
        image={"tag": "1", "pullSecrets": ["registry"]},
    )
    spec = one(placed, "Cluster", CLUSTER)["spec"]
    assert spec["imageName"] == f"registry.example.com/postgresql:17.6@{digest}"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["storage"] == {"size": "20Gi", "storageClass": "fast"}
    assert spec["postgresql"]["parameters"] == {"archive_timeout": "4min", "max_connections": "200"}
    assert spec["affinity"]["nodeSelector"] == EVERY_POD["nodeSelector"]
    assert spec["affinity"]["tolerations"] == EVERY_POD["tolerations"]
    assert spec["priorityClassName"] == "important"


def test_server_logs_in_with_the_secret_of_the_operator() -> None:
    backup = {"enabled": True}
    objects = _render(pgbouncer={"enabled": True}, backup=backup)
    login = {key: {"secretKeyRef": {"name": f"{CLUSTER}-app", "key": key}} for key in ("username", "password")}
    for name, spec in pod_specs(objects).items():
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            found = environment(container) if container.get("env") else {}
            assert not any("PGBOUNCER_NEXT" in variable for variable in found), name
            for prefix, driver in (("PREFECT_SERVER_DATABASE_", "DRIVER"), ("PG", "DATABASE")):
                if f"{prefix}{driver}" in found:
                    assert found[f"{prefix}HOST"] == f"{CLUSTER}-rw", name
                    assert found[f"{prefix}USER"] == login["username"], name
                    assert found[f"{prefix}PASSWORD"] == login["password"], name
    reached = {name.rpartition("-")[0] or name for name in pod_specs(objects)}
    assert len(reached) >= 4


def test_archive_meets_the_rpo_and_keeps_backups() -> None:
    objects = _render()
    spec = one(objects, "Cluster", CLUSTER)["spec"]
    archiver = {"name": "barman-cloud.cloudnative-pg.io", "isWALArchiver": True}
    assert spec["plugins"] == [archiver | {"parameters": {"barmanObjectName": "test-prefect-server-archive"}}]
    assert spec["postgresql"]["parameters"] == {"archive_timeout": "4min"}
    schedule = one(objects, "ScheduledBackup", CLUSTER)["spec"]
    assert schedule["schedule"] == "0 41 1 * * *", "with seconds"
    assert (schedule["method"], schedule["immediate"]) == ("plugin", True)
    assert schedule["cluster"] == {"name": CLUSTER}
    store = one(objects, "ObjectStore", "test-prefect-server-archive")["spec"]
    assert store["retentionPolicy"] == "30d"
    assert store["configuration"]["destinationPath"] == "s3://archive/prefect"
    keys = store["configuration"]["s3Credentials"]
    assert keys["accessKeyId"] == {"name": "keys", "key": "AWS_ACCESS_KEY_ID"}
    for kind, name in (
        ("Cluster", CLUSTER),
        ("ObjectStore", "test-prefect-server-archive"),
        ("NetworkPolicy", CLUSTER),
    ):
        assert one(objects, kind, name)["metadata"]["annotations"] == {
            "helm.sh/resource-policy": "keep",
            "argocd.argoproj.io/sync-options": "Prune=false,Delete=false",
        }, kind


def test_archive_of_each_cloud() -> None:
    identity = {
        "destination": "s3://archive",
        "region": "eu-central-1",
        "annotations": {"role": "{{ .Release.Name }}-writer"},
    }
    objects = _render({"archive": identity | {"schedule": "@daily", "endpoint": "http://s3:9000"}})
    store = one(objects, "ObjectStore", "test-prefect-server-archive")["spec"]
    assert store["configuration"]["s3Credentials"] == {"inheritFromIAMRole": True}
    assert store["configuration"]["endpointURL"] == "http://s3:9000"
    region = {"name": "AWS_DEFAULT_REGION", "value": "eu-central-1"}
    assert store["instanceSidecarConfiguration"]["env"] == [region]
    account = one(objects, "Cluster", CLUSTER)["spec"]["serviceAccountTemplate"]
    assert account == {"metadata": {"annotations": {"role": "test-writer"}}}
    assert one(objects, "ScheduledBackup", CLUSTER)["spec"]["schedule"] == "@daily"
    google = {"googleCredentials": {"gkeEnvironment": True}, "wal": {"compression": "zstd"}}
    objects = _render({"archive": {"destination": "gs://a/b", "objectStore": google}})
    assert one(objects, "ObjectStore", "test-prefect-server-archive")["spec"]["configuration"] == {
        "destinationPath": "gs://a/b",
        "googleCredentials": {"gkeEnvironment": True},
        "wal": {"compression": "zstd"},
        "data": {"compression": "gzip"},
    }


REFUSED: list[tuple[Object, str]] = [
    ({"archive": {"destination": ""}}, "database.mode=cnpg needs database.cnpg.archive.destination"),
    ({"image": {"tag": ""}}, "database.cnpg.image.tag is empty"),
    ({"image": {"tag": "latest"}}, "database.cnpg.image.tag is `latest`"),
    *(
        ({"configuration": {"archive_timeout": wrong}}, "database.cnpg.configuration.archive_timeout is ")
        for wrong in ("301s", "6min", 0, "1h", None)
    ),
    ({"recovery": {"source": CLUSTER}}, f"database.cnpg.recovery.source is {CLUSTER}, the name of the Cluster itself"),
    (
        {"recovery": {"source": "a", "settled": "b"}},
        f"database.cnpg.recovery.settled is b, and the Cluster is {CLUSTER}",
    ),
    ({"recovery": {"targetTime": "2026-11-29T12:00:00Z"}}, "without database.cnpg.recovery.source"),
    ({"recovery": {"source": "a", "targetTime": "2026-11-29 12:00"}}, "at '/database/cnpg/recovery/targetTime'"),
    ({"name": "1st"}, "at '/database/cnpg/name'"),
    ({"name": "a" * 51}, "at '/database/cnpg/name'"),
    ({"resources": {"limits": {"memory": "1Mi"}}}, "database.cnpg.resources.requests.memory (512Mi) is above"),
    ({"archive": ARCHIVE | {"resources": {"limits": {"memory": "1Mi"}}}}, "database.cnpg.archive.resources.requests"),
    ({"configuration": {"max_connections": 20}}, "database.cnpg.configuration.max_connections is 20: the release may"),
]
"""Values of `database.cnpg` that the chart refuses, with a part of the message."""


@pytest.mark.parametrize(("cnpg", "message"), one_in_four(REFUSED))
def test_wrong_values_are_refused_with_their_key(cnpg: Object, message: str) -> None:
    with pytest.raises(ClusterError) as error:
        _render(cnpg)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"database": {"cnpg": {"configuration": {"ssl": "off"}}}}, "database.cnpg.configuration.ssl is set with tls."),
        ({"pgbouncer": {"enabled": True, "serverTLS": {"caSecret": "ca"}}}, ", or with CloudNativePG and tls.enabled"),
        ({"pod": {"volumes": [{"name": "database-ca", "emptyDir": {}}]}}, ": the chart uses this name for its own"),
    ],
)
def test_values_against_tls_are_refused(given: Object, message: str) -> None:
    with pytest.raises(ClusterError) as error:
        _render(given.pop("database", {}).get("cnpg"), tls=TLS, **given)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "timeout", ["5min", *(pytest.param(other, marks=pytest.mark.further) for other in (300, "1 min"))]
)
def test_archive_timeout_within_the_rpo_is_accepted(timeout: object) -> None:
    parameters = one(_render({"configuration": {"archive_timeout": timeout}}), "Cluster", CLUSTER)["spec"]["postgresql"]
    assert parameters["parameters"] == {"archive_timeout": str(timeout)}


def _sources(rule: Object) -> set[str]:
    """Return the components, clusters and programs that a rule of ingress or egress names."""
    names = ("app.kubernetes.io/component", "cnpg.io/cluster", "app.kubernetes.io/name")
    peers: list[Object] = rule.get("from") or rule.get("to") or []
    found = [peer.get("podSelector", {}).get("matchLabels", {}) for peer in peers]
    return {next(labels[name] for name in names if name in labels) for labels in found if labels.keys() & {*names}}


def test_network_policies_admit_server_operator_and_standbys() -> None:
    metrics = [{"namespaceSelector": {"matchLabels": {"metrics": "yes"}}}]
    objects = _render(backup={"enabled": True}, networkPolicy={"metricsFrom": metrics})
    policy = one(objects, "NetworkPolicy", CLUSTER)["spec"]
    assert policy["podSelector"] == {"matchLabels": {"cnpg.io/cluster": CLUSTER}}
    clients, cluster, exporter = policy["ingress"]
    assert (_sources(clients), clients["ports"]) == ({"api", "services", "migrations", "backup"}, [{"port": 5432}])
    assert (_sources(cluster), cluster["ports"]) == ({"cloudnative-pg", CLUSTER}, [{"port": 5432}, {"port": 8000}])
    assert cluster["from"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "cnpg-system"}
    assert (exporter["from"], exporter["ports"]) == (metrics, [{"port": 9187}])
    _, standbys, addresses = policy["egress"]
    assert _sources(standbys) == {CLUSTER}
    assert addresses["to"][0]["ipBlock"]["cidr"] == "0.0.0.0/0", "the bucket and the Kubernetes API"
    for component in ("api", "services", "migrations", "backup"):
        rules = one(objects, "NetworkPolicy", f"test-prefect-server-{component}")["spec"]["egress"]
        assert [rule["ports"] for rule in rules if CLUSTER in _sources(rule)] == [[{"port": 5432}]], component
    assert len(one(objects, "NetworkPolicy", "test-prefect-server-migrations")["spec"]["egress"]) == 2
    pooled = _render(pgbouncer={"enabled": True})
    assert _sources(one(pooled, "NetworkPolicy", CLUSTER)["spec"]["ingress"][0]) == {
        "services",
        "migrations",
        "pgbouncer",
    }
    assert CLUSTER in set().union(
        *map(_sources, one(pooled, "NetworkPolicy", "test-prefect-server-pgbouncer")["spec"]["egress"])
    )


def test_recovery_reads_the_archive_of_the_old_cluster() -> None:
    objects = _recovered()
    spec = one(objects, "Cluster", "recovered")["spec"]
    assert spec["bootstrap"] == {
        "recovery": {
            "source": CLUSTER,
            "database": "prefect",
            "owner": "prefect",
            "recoveryTarget": {"targetTime": "2026-11-29T12:00:00Z"},
        }
    }
    [source] = spec["externalClusters"]
    store = {"barmanObjectName": "test-prefect-server-archive"}
    assert source["plugin"]["parameters"] == store | {"serverName": CLUSTER}
    assert spec["plugins"][0]["parameters"] == store, "the new Cluster archives into a folder of its name"
    newest = _render({"name": "recovered", "recovery": {"source": CLUSTER}})
    assert "recoveryTarget" not in one(newest, "Cluster", "recovered")["spec"]["bootstrap"]["recovery"]


def test_server_is_held_until_the_runs_are_settled() -> None:
    objects = _recovered(api={"autoscaling": {"enabled": True}}, pgbouncer={"enabled": True})
    for component in ("api", "services"):
        assert one(objects, "Deployment", f"test-prefect-server-{component}")["spec"]["replicas"] == 0
    job = one(objects, "Job", "test-prefect-server-settle-1")["spec"]
    assert job["activeDeadlineSeconds"] == 86400, "a recovery may take hours"
    [settle], [wait] = (job["template"]["spec"][key] for key in ("containers", "initContainers"))
    assert settle["args"][-1] == "--backup=2026-11-29T12:00:00Z"
    variables = environment(settle)
    assert variables["PREFECT_SERVER_DATABASE_HOST"] == "recovered-rw"
    old = {"name": f"{CLUSTER}-app", "key": "uri", "optional": True}
    assert variables["REPLACED_DATABASE_URL"] == {"secretKeyRef": old}
    assert wait["args"][-2:] == ["orchestration.migrations", "wait"]
    egress = one(objects, "NetworkPolicy", "test-prefect-server-migrations")["spec"]["egress"]
    assert set().union(*map(_sources, egress)) == {"recovered", CLUSTER}
    assert "PGBOUNCER_ADDRESS" not in environment(wait) | variables, "the policy of the migrations admits only Postgres"
    assert one(objects, "Job", "test-prefect-server-migrations-1")["spec"]["activeDeadlineSeconds"] == 86400
    started = _render({"name": "recovered", "recovery": RECOVERY | {"settled": "recovered"}}, api={"replicas": 2})
    assert one(started, "Deployment", "test-prefect-server-api")["spec"]["replicas"] == 2
    assert not [name for name in inventory(started) if "settle" in name]
    assert one(started, "Job", "test-prefect-server-migrations-1")["spec"]["activeDeadlineSeconds"] == 1800


def test_tls_verifies_the_certificate_of_the_operator() -> None:
    """The Secret of the operator's CA has its key, too, which no pod mounts."""
    objects = _recovered(tls=TLS, pgbouncer={"enabled": True}, backup={"enabled": True})
    assert_restricted(objects)
    clients = set()
    for name, spec in pod_specs(objects).items():
        volumes = {volume["name"]: volume.get("secret") for volume in spec["volumes"]}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            variables = environment({"env": []} | container)
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            is_client = {"PGHOST", "PREFECT_SERVER_DATABASE_HOST"} & {*variables} and container["name"] != "connection"
            if is_client:
                assert variables["PGSSLMODE"] == "verify-full", name
                assert variables["PGSSLROOTCERT"] == "/etc/prefect-database-ca/ca.crt", name
            if is_client or container["name"] == "pgbouncer":
                clients.add(container["name"])
                assert volumes[mounts["/etc/prefect-database-ca"]] == {"secretName": "recovered-ca", "items": CA}, name
    assert clients == {"api", "services", "wait-for-migrations", "migrations", "dump", "store", "pgbouncer"}
    writer = pod_specs(objects)["Deployment/test-prefect-server-pgbouncer"]["initContainers"][0]
    assert writer["args"][-2:] == ["--tls-mode=verify-full", "--ca-file=/etc/prefect-database-ca/ca.crt"]
    cluster = one(objects, "Cluster", "recovered")["spec"]["postgresql"]
    assert cluster["pg_hba"] == ["hostnossl all all all reject"], "the operator's last rule accepts plain connections"
    plain = _recovered(pgbouncer={"enabled": True})
    assert not [word for word in ("PGSSLMODE", "database-ca", "replaced-ca", "pg_hba") if word in repr(plain)]


def test_settling_verifies_both_clusters(tmp_path: Path) -> None:
    """Each Cluster has a CA. That of the replaced one may be gone."""
    spec = pod_specs(_recovered(tls=TLS))["Job/test-prefect-server-settle-1"]
    [replaced] = [volume["secret"] for volume in spec["volumes"] if volume["name"] == "replaced-ca"]
    assert replaced == {"secretName": f"{CLUSTER}-ca", "items": CA, "optional": True}
    [settle] = spec["containers"]
    mount = {"name": "replaced-ca", "mountPath": "/etc/prefect-replaced-ca", "readOnly": True}
    assert mount in settle["volumeMounts"]
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\ncat "$PGSSLROOTCERT"\nexit 2\n')
    (tmp_path / "python").chmod(0o755)
    script = settle["args"][2].replace("/etc", str(tmp_path)).replace("/tmp/ca", f"{tmp_path}/ca")  # noqa: S108
    command = [*settle["args"][:2], script, *settle["args"][3:]]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for cluster, own, text in (("database", "new\n", "new\n"), ("replaced", "old\n", "new\nold\n")):
        (tmp_path / f"prefect-{cluster}-ca").mkdir()
        (tmp_path / f"prefect-{cluster}-ca" / "ca.crt").write_text(own)
        done = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
        assert done.stdout == f"-m orchestration settle --backup=2026-11-29T12:00:00Z\n{text}"
