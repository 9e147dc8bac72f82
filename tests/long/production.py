"""Test ENV=production on a real cluster: two replicas of each component on external databases.

`make test` does not collect this file; `make test-long FOR=production` runs it.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from uuid import uuid4

import pytest

from orchestration.operations.local_cluster import images
from tests.cluster.namespace import RESTRICTED, Namespace, new, remove
from tests.e2e.checkout import DAILY, Checkout
from tests.parts import wait_until

USER = RESTRICTED | {"runAsUser": 999, "runAsGroup": 999}
PASSWORD = uuid4().hex


@dataclass(frozen=True)
class Databases:
    """A Postgres and a Valkey outside the environment's namespace, like managed databases."""

    namespace: Namespace

    def urls(self) -> dict[str, str]:
        """Return the content of the environment's Secrets: URLs by `NAME KEY`."""
        hosts = {
            pod: self.namespace.kubectl("get", "pod", pod, "-o", "jsonpath={.status.podIP}")
            for pod in ("postgres", "valkey")
        }
        return {
            "prefect-database connection-url": f"postgresql+asyncpg://owner:{PASSWORD}@{hosts['postgres']}:5432/prefect",
            "prefect-redis url": f"redis://:{PASSWORD}@{hosts['valkey']}:6379/0",
            "warehouse url": f"postgresql://owner:{PASSWORD}@{hosts['postgres']}:5432/warehouse",
        }

    def sql(self, database: str, statement: str) -> str:
        """Run a statement, and return its rows."""
        return self.namespace.kubectl(
            "exec", "postgres", "--", "psql", "-U", "owner", "-d", database, "-Atc", statement
        ).strip()

    def valkey(self, *command: str) -> str:
        """Run a command of Valkey, and return its answer."""
        return self.namespace.kubectl(
            "exec", "valkey", "--", "env", f"REDISCLI_AUTH={PASSWORD}", "valkey-cli", *command
        ).strip()


pytest_plugins = ("tests.e2e.conftest",)  # for the fixture `checkout`


@pytest.fixture(scope="module")
def databases(cluster: str) -> Iterator[Databases]:
    with new(cluster, "databases") as namespace:
        requests = {"resources": {"requests": {"cpu": "10m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}}}
        variables = {"POSTGRES_USER": "owner", "POSTGRES_PASSWORD": PASSWORD, "POSTGRES_DB": "prefect"}
        namespace.pod(
            "valkey",
            ready=False,
            container={
                "image": images.VALKEY,
                "command": ["valkey-server", "--requirepass", PASSWORD, "--dir", "/tmp"],  # noqa: S108 - in the pod
                "securityContext": USER,
            }
            | requests,
        )
        namespace.pod(
            "postgres",
            container={
                "image": images.POSTGRES,
                "command": None,
                "env": [{"name": name, "value": value} for name, value in variables.items()],
                "readinessProbe": {"exec": {"command": ["pg_isready", "-h", "127.0.0.1"]}, "periodSeconds": 1},
                "securityContext": USER,
                "volumeMounts": [{"name": "run", "mountPath": "/var/run/postgresql"}],
            }
            | requests,
            volumes=[{"name": "run", "emptyDir": {}}],
        )
        made = Databases(namespace)
        made.sql("prefect", "create database warehouse")
        yield made


@pytest.fixture(scope="module")
def production(checkout: Checkout) -> Iterator[Checkout]:
    """Yield the environment before its first deploy. Its image is pushed."""
    target = replace(checkout.target, name="production", namespace=f"{checkout.target.namespace}-production")
    checkout.make("push")
    try:
        yield replace(checkout, target=target)
    finally:
        for name in target.namespaces:
            remove(Namespace(target.context, name))


def test_deploy_asks_for_each_missing_secret_and_then_installs(production: Checkout, databases: Databases) -> None:
    """The message has the command that creates the Secret, and the deploy changes nothing before."""
    target = production.target
    settings = ("database.external.existingSecret", "redis.external.existingSecret", "runs.env: WAREHOUSE_URL")
    places = (target.namespace, target.namespace, target.runs_namespace)
    for setting, place, (secret, url) in zip(settings, places, databases.urls().items(), strict=True):
        name, key = secret.split()
        refused = production.make("deploy", ENV="production", status=2)
        assert f"{setting} names the Secret {name}: namespace" in refused
        create = f"kubectl --namespace {place} create secret generic {name} --from-literal={key}="
        assert create in refused
        Namespace(target.context, place).kubectl("create", "secret", "generic", name, f"--from-literal={key}={url}")
    output = production.make("deploy", ENV="production")
    assert "prefect-server is up to date" in output
    assert "Nothing would change." in production.make("plan", ENV="production")


def test_components_have_two_replicas_by_digest_and_no_bundled_database(production: Checkout) -> None:
    target = production.target
    found = production.wait_until_ready("production")
    assert {component["name"]: (component["ready"], component["wanted"]) for component in found["components"]} == {
        "api": (2, 2),
        "services": (2, 2),
        "worker": (2, 2),
        "results": (1, 1),
        "drift": (1, 1),
        "reconciler": (2, 2),
    }
    assert found["pools"] == [{"name": "default", "status": "READY", "limit": 100, "workers": 2}]
    assert found["problems"] == []
    digest = r"localhost:5000/prefect-orchestration@sha256:[0-9a-f]{64}"
    assert all(re.fullmatch(digest, component["image"]) for component in found["components"])
    stateful = {found["metadata"]["name"] for found in target.objects("statefulsets,persistentvolumeclaims")}
    assert stateful == {"prefect-work-pool-results", "results-prefect-work-pool-results-0"}

    def disruptions_allowed() -> list[int]:
        return [budget["status"].get("disruptionsAllowed", 0) for budget in target.objects("poddisruptionbudgets")]

    wait_until(lambda: disruptions_allowed() == [1, 1, 1, 1], "each budget to allow a disruption")


def test_daily_job_runs_as_a_pod_and_writes_to_the_external_databases(
    production: Checkout, databases: Databases
) -> None:
    assert "is Completed" in production.make("run-on-cluster", ENV="production", DEPLOYMENT=DAILY)
    assert databases.sql("warehouse", "select count(*) from raw.flights") == "842"
    runs = "select count(*) from flow_run where state_type = 'COMPLETED' and deployment_id is not null"
    assert databases.sql("prefect", runs) == "1"
    assert int(databases.valkey("dbsize")) > 0
    [pod] = production.target.objects("pods", "--selector", "prefect.io/role=flow-run")
    assert pod["metadata"]["namespace"] == production.target.runs_namespace
    assert pod["spec"]["priorityClassName"] == "prefect-runs"
    assert pod["spec"]["terminationGracePeriodSeconds"] == 120
    assert PASSWORD not in json.dumps(production.target.objects("jobs,pods,deployments,configmaps"))


def test_undeploy_keeps_secrets_and_databases(production: Checkout, databases: Databases) -> None:
    output = production.make("undeploy", ENV="production", CONFIRM="production")
    assert "Uninstalling prefect-server" in output
    left = {found["metadata"]["name"] for found in production.target.objects("secrets,deployments")}
    # The database stays, so the key of its blocks does, too.
    assert left == {"prefect-database", "prefect-redis", "prefect-server-encryption-key", "warehouse"}
    assert databases.sql("prefect", "select count(*) from deployment") == "2"
