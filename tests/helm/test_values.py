"""Property tests: a chart refuses values and names their key, or real servers accept the rendered objects."""

import asyncio
import base64
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prefect.settings import PREFECT_API_URL, Settings, temporary_settings
from sqlalchemy.engine import make_url

from orchestration.deployments import desired_state
from orchestration.deployments.resources import POOL
from orchestration.deployments.sync import sync
from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.certificates import Authority
from orchestration.prefect_api import connected
from orchestration.settings import ROOT
from tests.cluster.apiserver import NAMESPACE, ApiServer
from tests.helm import acceptance, cloudnative_pg, values, verdicts
from tests.helm.rendering import Object, environment, objects_of, one, one_in_four, pod_specs, render, rendered
from tests.helm.test_charts import CHARTS, EXAMPLES
from tests.parts import client_of, examples, free_port, prefect_server, wait_until

WAYS: dict[str, list[Object]] = {
    "prefect-server": [
        {},
        {
            "api": {"autoscaling": {"enabled": True}},
            "database": {"bundled": {"configuration": {"max_connections": 200}}},
            "services": {"replicas": 2},
            "ingress": {"enabled": True, "hosts": [{"host": "prefect.example.com"}]},
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]},
        },
        {
            "auth": {"existingSecret": "auth", "roles": {"existingSecret": "roles"}},
            "database": {"bundled": {"enabled": False}, "external": {"existingSecret": "database"}},
            "redis": {"bundled": {"enabled": False}, "external": {"existingSecret": "redis"}},
        },
        {
            "database": {"bundled": {"enabled": False}, "external": {"existingSecret": "database"}},
            "pgbouncer": {"enabled": True, "serverTLS": {"mode": "verify-full", "caSecret": "ca"}},
        },
        {
            "tls": {"enabled": True, "certManager": {"issuerRef": {"name": "ca"}}},
            "pgbouncer": {"enabled": True},
            "backup": {"enabled": True},
        },
        {
            "oidc": {
                "enabled": True,
                "issuerUrl": "https://id.example.com",
                "clientId": "prefect",
                "existingSecret": "oidc",
                "groups": {"operator": ["data-platform"]},
            },
            "ingress": {"enabled": True, "hosts": [{"host": "prefect.example.com"}]},
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}]},
        },
        {"service": {"type": "NodePort"}, "api": {"replicas": 2}, "networkPolicy": {"apiFrom": [{"podSelector": {}}]}},
        {
            "service": {"type": "LoadBalancer"},
            "backup": {"enabled": True, "alert": {"enabled": True}},
            "services": {"alert": {"enabled": True}},
            "networkPolicy": {"metricsFrom": [{"namespaceSelector": {}}]},
        },
        {
            "database": {
                "mode": "cnpg",
                "cnpg": {
                    "name": "recovered",
                    "archive": {"destination": "s3://archive/prefect"},
                    "recovery": {"source": "lost"},
                },
            },
            "tls": {"enabled": True, "certManager": {"issuerRef": {"name": "ca"}}},
            "pgbouncer": {"enabled": True},
        },
        {
            "backup": {
                "enabled": True,
                "storage": "s3",
                "s3": {"bucket": "backups"},
                "image": {"repository": "postgres", "tag": "18.1"},
            }
        },
    ],
    "prefect-work-pool": [
        {},
        {"worker": {"autoscaling": {"enabled": True}}, "runs": {"results": {"storage": "volume"}}},
        {
            "worker": {"replicas": 2, "serviceAccount": {"name": "mine"}},
            "reconciler": {"serviceAccount": {"name": "mine"}},
            "runs": {"results": {"storage": "s3", "s3": {"bucket": "data"}}, "image": {"tag": "2"}},
            "pool": {"queues": [{"name": "urgent"}]},
        },
        {
            "api": {"url": "https://prefect-server-api:4200/api", "tls": {"caSecret": "ca"}},
            "runs": {"results": {"storage": "redis", "redis": {"existingSecret": "redis"}}},
        },
    ],
}
"""By chart: the defaults, and values that enable features that are off by default."""


@pytest.fixture(scope="module")
def kubernetes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the API server's state and its kubeconfig."""
    return tmp_path_factory.mktemp("kubernetes")


@pytest.fixture(scope="module")
def kubernetes(kubernetes_folder: Path) -> Iterator[ApiServer]:
    with acceptance.kubernetes(kubernetes_folder) as api:
        yield api


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of a Prefect server without pools of other tests."""
    with (
        prefect_server(tmp_path_factory.mktemp("prefect")) as url,
        temporary_settings({PREFECT_API_URL: url}),
        client_of(url) as client,
    ):
        yield client


@pytest.fixture(params=CHARTS)
def chart(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _tagged(given: Object) -> Object:
    return given | {"image": {"tag": "1"} | given.get("image", {})}


class Judge:
    """Renders values of a chart and tries the objects on real servers.

    Args:
        kubernetes: an API server.
        server: a client of a Prefect server.
        folder: for the file that `sync` reads.
    """

    def __init__(self, kubernetes: ApiServer, server: httpx.Client, folder: Path) -> None:
        self.kubernetes = kubernetes
        self.server = server
        self.folder = folder

    def refusal(self, chart: str, given: Object, release: str = "test") -> str | None:
        """Return the chart's refusal of values; None if the chart accepts them.

        Raises:
            AssertionError: a server refuses what the chart renders.
        """
        try:
            text = rendered(chart, _tagged(given), release)
        except ClusterError as error:
            return str(error)
        found = acceptance.refusals(self.kubernetes, text)
        if chart == "prefect-work-pool":
            found += acceptance.pool_refusals(self.kubernetes, self.server, text, self.folder)
        assert not found, f"{found} of release {release} with {given}"
        return None


@pytest.fixture
def judge(kubernetes: ApiServer, server: httpx.Client, tmp_path: Path) -> Judge:
    return Judge(kubernetes, server, tmp_path)


def _names(message: str, paths: list[values.Path]) -> bool:
    """Return whether the chart itself refused the values, and named one of the keys."""
    own = any(part in message for part in ("specifications of the schema", "execution error at", "{{/*"))
    return own and any(key in message for path in paths for key in (path[-1], ".".join(path)))


@st.composite
def _drawn(draw: st.DrawFn, chart: str, mistaken: bool = False) -> tuple[Object, list[values.Path]]:
    """Draw keys with values that the schema accepts. If `mistaken`, one value has a wrong type."""
    of_chart = values.keys(chart)
    paths = draw(st.lists(st.sampled_from(sorted(of_chart)), min_size=1, max_size=2 if mistaken else 6, unique=True))
    given: Object = draw(st.sampled_from(WAYS[chart]))
    for path in paths:
        given = values.put(given, path, draw(of_chart[path]))
    if mistaken:
        given = values.put(given, paths[0], draw(st.sampled_from(values.MISTAKES)))
    return given, paths


def _examples(share: float) -> int:
    """Return how many examples to try: few in `make test`, where each starts Helm. `chart-values` is the long test."""
    return examples(share if os.environ.get("HYPOTHESIS_PROFILE") == "long" else share / 4)


def _tried(chart: str, judge: Judge, share: float, mistaken: bool) -> None:
    @settings(max_examples=_examples(share), deadline=None, suppress_health_check=list(HealthCheck))
    @given(_drawn(chart, mistaken), values.RELEASE)
    def tried(drawn: tuple[Object, list[values.Path]], release: str) -> None:
        given_values, paths = drawn
        refusal = judge.refusal(chart, given_values, release)
        if refusal:
            assert _names(refusal, [*paths, ("fullnameOverride",)]), f"{refusal} of {release} with {given_values}"

    tried()


def test_valid_values_are_accepted_by_servers_or_refused_with_their_key(chart: str, judge: Judge) -> None:
    _tried(chart, judge, share=0.15, mistaken=False)


def test_values_of_another_type_are_accepted_by_servers_or_refused_with_their_key(chart: str, judge: Judge) -> None:
    _tried(chart, judge, share=0.1, mistaken=True)


NOWHERE = {
    "global": "for parent charts",
    "sync.pod.sidecars": "refused",
    "migrations.pod.sidecars": "refused",
    "backup.pod.sidecars": "refused",
    "tests.pod.sidecars": "refused",
}
"""Keys whose value appears in no object, and the reason."""


@functools.cache
def _text_of_way(chart: str, number: int) -> str:
    """Return the rendered objects of one of the chart's `WAYS`, which each drawn value is compared with."""
    return _text(chart, WAYS[chart][number])


def _text(chart: str, given: Object) -> str:
    text = rendered(chart, _tagged(given))
    return re.sub(r"^data:\n  .*: [A-Za-z0-9+/=]+$", "", text, flags=re.MULTILINE)  # generated passwords differ


def test_every_value_changes_the_rendered_objects(chart: str) -> None:
    """No value is silently ignored."""
    of_chart = values.keys(chart)
    names = sorted(path for path in of_chart if ".".join(path) not in NOWHERE)

    @settings(max_examples=_examples(0.1), deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(names), st.data())
    def tried(path: values.Path, data: st.DataObject) -> None:
        default = yaml.safe_load((ROOT / "helm" / chart / "values.yaml").read_text())
        for key in path:
            default = default.get(key) if isinstance(default, dict) else None
        others = of_chart[path].filter(lambda drawn: drawn != default and bool(drawn) | (default is True))
        given_value = data.draw(others)
        refusals = []
        for number, way in enumerate(WAYS[chart]):
            try:
                changed = _text(chart, values.put(way, path, given_value))
            except ClusterError as error:
                refusals.append(str(error))
                continue
            if changed != _text_of_way(chart, number):
                return
        assert refusals, f"{'.'.join(path)}: {given_value!r} changes nothing"

    tried()


def _takes(rule: Object, value: Any) -> bool:
    defs = values.schema("prefect-server")["$defs"]
    return bool(jsonschema.Draft7Validator({"$defs": defs, "allOf": [rule]}).is_valid(value))


def test_definitions_of_both_schemas_are_the_same() -> None:
    ours, theirs = (values.schema(chart)["$defs"] for chart in CHARTS)
    assert ours == theirs


@pytest.mark.parametrize("path", one_in_four((path,) for path in verdicts.OF_TEXT), ids=".".join)
def test_kubernetes_accepts_texts_that_the_schema_accepts(kubernetes: ApiServer, path: tuple[str, ...]) -> None:
    rule = values.schema("prefect-server")
    for key in path if path[0] == "$defs" else ("properties", *path):
        rule = rule[key]
    make, both = verdicts.OF_TEXT[path]
    refused = {text: kubernetes.refusal(make(text)) for text in {*verdicts.TEXTS, *both} if _takes(rule, text)}
    assert {text: why for text, why in refused.items() if why} == {}
    assert set(both) <= set(refused), "the schema refuses what Kubernetes accepts"


@pytest.mark.parametrize("definition", one_in_four((definition,) for definition in verdicts.OF_OBJECTS))
def test_schema_and_kubernetes_agree_on_an_object(kubernetes: ApiServer, definition: str) -> None:
    make, given_values = verdicts.OF_OBJECTS[definition]
    for value in given_values:
        refusal = kubernetes.refusal(make(value))
        assert _takes({"$ref": f"#/$defs/{definition}"}, value) == (refusal is None), f"{value}: {refusal}"


def test_schema_requires_keys_that_templates_need(chart: str) -> None:
    """Helm removes a key whose value is null: the schema requires keys with a default, but for pods and retention."""
    root = values.schema(chart)

    def check(default: Any, rule: Object, path: str) -> None:
        while "$ref" in rule or ("allOf" in rule and "properties" not in rule):
            definition = rule.get("$ref") or rule["allOf"][0]["$ref"]
            rule = root["$defs"][definition.rpartition("/")[2]] | {
                key: value for key, value in rule.items() if key == "required"
            }
        if (
            path.endswith((".pod", "Probe", ".resources", ".lifecycle", ".strategy", ".timeouts", ".retention.days"))
            or not isinstance(default, dict)
            or "properties" not in rule
        ):
            return
        needed = {key for key, value in default.items() if value is not None} - {"minAvailable", "maxUnavailable"}
        assert needed <= set(rule.get("required", ())), f"{path}: {sorted(needed - set(rule.get('required', ())))}"
        for key, value in default.items():
            check(value, rule["properties"][key], f"{path}.{key}")

    check(yaml.safe_load((ROOT / "helm" / chart / "values.yaml").read_text()), root, "")


VALID: dict[str, Object] = {
    "prefect-server": {
        # Templates of Vault.
        "pod": {"annotations": {"a": '{{- with secret "db" -}}{{ .Data.data.password }}{{- end }}'}},
        # Another strategy than the default's.
        "api": {"strategy": {"type": "Recreate"}},
    },
    "prefect-work-pool": {
        # One label in two places.
        "commonLabels": {"team": "a"},
        "pod": {"labels": {"team": "b"}},
        "pool": {"concurrencyLimit": 2_000_000, "queues": [{"name": "a", "priority": 1_000_000}]},
        "worker": {"terminationGracePeriodSeconds": 3_000_000, "prefetchSeconds": 1_000_000},
        "runs": {
            "labels": {"team": "c"},
            # Quantities and variables as numbers.
            "resources": {"requests": {"cpu": 2, "memory": "1Gi"}, "limits": {"memory": 2_000_000_000}},
            "env": [{"name": "PORT", "value": 8080}, {"name": "DEBUG", "value": True}],
            "terminationGracePeriodSeconds": 3_000_000,
            "ttlSecondsAfterFinished": 2_000_000,
            "results": {"storage": "volume"},
            # A volume in place of the chart's.
            "pod": {"volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}}]},
        },
    },
}
"""By chart, values that charts often render wrong. Go prints numbers from 10^6 on with an exponent."""


@pytest.mark.parametrize(
    "release", [pytest.param("test", marks=pytest.mark.further, id="short"), pytest.param("a" * 53, id="longest")]
)
def test_values_that_kubernetes_takes_are_accepted(judge: Judge, chart: str, release: str) -> None:
    assert judge.refusal(chart, VALID[chart], release) is None


def test_cloudnative_pg_is_refused_where_the_cluster_is_not_ready(
    kubernetes: ApiServer, kubernetes_folder: Path, tmp_path: Path
) -> None:
    """Helm sees the cluster here: the operator is absent, then data would be left behind, and then nothing is wrong.

    The operator makes the Secret with the Cluster's CA after the first deploy.
    """
    file = tmp_path / "values.yaml"
    database = {"mode": "cnpg", "cnpg": {"archive": {"destination": "s3://archive/prefect"}}}
    pgbouncer = {"enabled": True, "serverTLS": {"mode": "verify-full", "caSecret": "test-prefect-server-db-ca"}}
    file.write_text(yaml.safe_dump({"image": {"tag": "1"}, "database": database, "pgbouncer": pgbouncer}))

    def answer() -> str:
        try:
            return binaries.helm(
                "install", "test", str(ROOT / "helm" / "prefect-server"), "-f", str(file), "-n", NAMESPACE,
                "--kubeconfig", str(kubernetes_folder / "kubeconfig"), "--kube-context", "alone", "--dry-run=server",
            )  # fmt: skip
        except ClusterError as error:
            return str(error)

    try:
        for definition in cloudnative_pg.definitions():
            kubernetes.delete(definition)
        wait_until(lambda: not _knows_clusters(kubernetes), "the end of CloudNativePG's kinds")
        assert "database.mode=cnpg needs the " in answer()
    finally:
        acceptance.install_cloudnative_pg(kubernetes)
    bundled = one(render("prefect-server", {"image": {"tag": "1"}}), "StatefulSet", "test-prefect-server-database")
    kubernetes.create(bundled)
    refusal = answer()
    assert "database.mode=cnpg would leave the data of the bundled database behind" in refusal
    [command] = re.findall(r"kubectl (--namespace prefect scale .*)", refusal)
    assert command == "--namespace prefect scale statefulset test-prefect-server-database --replicas=0"
    kubernetes.delete(bundled)
    kubernetes.create(bundled | {"spec": bundled["spec"] | {"replicas": 0}})
    try:
        assert "kind: Cluster" in answer()
    finally:
        kubernetes.delete(bundled)


@pytest.mark.further
def test_certificate_is_refused_where_the_cluster_has_no_cert_manager(
    kubernetes: ApiServer, kubernetes_folder: Path, tmp_path: Path
) -> None:
    tls = {"enabled": True, "certManager": {"issuerRef": {"name": "ca"}}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"image": {"tag": "1"}, "tls": tls}))

    def render_on_cluster() -> str:
        return binaries.helm(
            "template", "test", str(ROOT / "helm" / "prefect-server"), "-f", str(tmp_path / "values.yaml"),
            "-n", NAMESPACE, "--kubeconfig", str(kubernetes_folder / "kubeconfig"), "--kube-context", "alone",
            "--dry-run=server",
        )  # fmt: skip

    def has_cert_manager() -> bool:
        return kubernetes.client.get("/apis/cert-manager.io/v1").is_success

    assert "kind: Certificate" in render_on_cluster()
    definition = yaml.load(binaries.certificates().read_text(), yaml.CSafeLoader)
    definition["metadata"].pop("labels", None)  # templates of Helm
    kubernetes.delete(definition)
    try:
        wait_until(lambda: not has_cert_manager(), "the end of cert-manager's kinds")
        with pytest.raises(
            ClusterError, match=r"does not know cert-manager.io/v1/Certificate: no certificate would be"
        ):
            render_on_cluster()
    finally:
        kubernetes.create(definition)
        wait_until(has_cert_manager, "cert-manager's kinds")


def test_recovery_keeps_the_old_cluster_and_can_be_rolled_back(
    kubernetes: ApiServer, kubernetes_folder: Path, tmp_path: Path
) -> None:
    """The server is held until its runs are settled, and a rollback leads to the old Cluster."""
    file = tmp_path / "values.yaml"
    place = ["-n", NAMESPACE, "--kubeconfig", str(kubernetes_folder / "kubeconfig"), "--kube-context", "alone"]

    def upgrade(**cnpg: Any) -> None:
        database = {"mode": "cnpg", "cnpg": {"archive": {"destination": "s3://archive/prefect"}} | cnpg}
        file.write_text(yaml.safe_dump({"image": {"tag": "1"}, "api": {"replicas": 2}, "database": database}))
        chart = str(ROOT / "helm" / "prefect-server")
        binaries.helm("upgrade", "--install", "prefect-server", chart, "-f", str(file), "--no-hooks", *place)

    def found() -> tuple[int, set[str]]:
        """Return how many API pods are wanted, and the Clusters."""
        deployments = kubernetes.client.get(f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/prefect-server-api")
        clusters = kubernetes.client.get(f"/apis/postgresql.cnpg.io/v1/namespaces/{NAMESPACE}/clusters")
        names = {cluster["metadata"]["name"] for cluster in clusters.raise_for_status().json()["items"]}
        return deployments.raise_for_status().json()["spec"]["replicas"], names

    both = {"prefect-server-db", "prefect-server-db-2"}
    try:
        upgrade()
        assert found() == (2, {"prefect-server-db"})
        upgrade(name="prefect-server-db-2", recovery={"source": "prefect-server-db"})
        assert found() == (0, both)
        binaries.helm("rollback", "prefect-server", "1", "--no-hooks", *place)
        assert found() == (2, both)
        upgrade(name="prefect-server-db-2", recovery={"source": "prefect-server-db", "settled": "prefect-server-db-2"})
        assert found() == (2, both)
    finally:
        binaries.helm("uninstall", "prefect-server", "--no-hooks", *place)
    kept = kubernetes.client.get(f"/apis/postgresql.cnpg.io/v1/namespaces/{NAMESPACE}/clusters").json()["items"]
    assert {cluster["metadata"]["name"] for cluster in kept} == both


def _knows_clusters(kubernetes: ApiServer) -> bool:
    """Return whether the API server has any of CloudNativePG's definitions, or lists their kinds."""
    folder = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    names = [f"{folder}/{definition['metadata']['name']}" for definition in cloudnative_pg.definitions()]
    return any(kubernetes.client.get(path).is_success for path in ["/apis/postgresql.cnpg.io/v1", *names])


def test_other_resources_are_the_same_for_all_runs(judge: Judge) -> None:
    resources = {"requests": {"ephemeral-storage": "1Gi"}, "limits": {"nvidia.com/gpu": 1, "ephemeral-storage": "2Gi"}}
    text = rendered("prefect-work-pool", {"image": {"tag": "1"}, "runs": {"resources": resources}})
    template = yaml.safe_load(acceptance.synced_file(text))["work_pools"][0]["base_job_template"]
    made = acceptance.job(template)
    assert judge.kubernetes.refusal(made) is None
    [container] = made["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "200m", "memory": "384Mi", "ephemeral-storage": "1Gi"},
        "limits": {"memory": "1Gi", "nvidia.com/gpu": "1", "ephemeral-storage": "2Gi"},
    }


def test_setting_keeps_its_written_text(chart: str) -> None:
    given = {
        "PREFECT_A": 2_000_000,
        "PREFECT_B": -5_000_000,
        "PREFECT_C": 0.25,
        "PREFECT_D": True,
        "PREFECT_E": "{{ x }}",
    }
    written = {name: str(value).lower() for name, value in given.items()}
    objects = render(chart, {"image": {"tag": "1"}, "settings": given})
    for name, spec in pod_specs(objects).items():
        [container] = [
            candidate for candidate in spec["containers"] if candidate["name"] in ("api", "services", "worker", "sync")
        ] or [None]
        if container:
            assert environment(container).items() >= written.items(), name


def test_component_value_wins_even_if_false() -> None:
    written = {"containerSecurityContext": {"readOnlyRootFilesystem": False}}
    objects = render("prefect-work-pool", {"image": {"tag": "1"}, "worker": {"pod": written}})
    [container] = pod_specs(objects)["Deployment/test-prefect-work-pool-worker"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is False
    budget = {"podDisruptionBudget": {"minAvailable": 0}}
    objects = render("prefect-work-pool", {"image": {"tag": "1"}, "reconciler": budget})
    assert one(objects, "PodDisruptionBudget", "test-prefect-work-pool-reconciler")["spec"]["minAvailable"] == 0


def _with_production(examples_of_charts: list[Path], *others: str) -> list[Any]:
    """Return the examples as parameters of a test, of which all but `production` and the others are further ones.

    tests/helm/test_charts.py renders each example.
    """
    return [
        pytest.param(path, marks=() if path.stem in ("production", *others) else pytest.mark.further)
        for path in examples_of_charts
    ]


@pytest.mark.parametrize(
    "example",
    _with_production(EXAMPLES, "cloudnative-pg"),
    ids=lambda path: f"{path.parent.parent.name}-{path.stem}",
)
def test_example_is_accepted_by_servers(judge: Judge, example: Path) -> None:
    assert judge.refusal(example.parent.parent.name, yaml.safe_load(example.read_text())) is None


POOL_EXAMPLES = [example for example in EXAMPLES if example.parent.parent.name == "prefect-work-pool"]


@pytest.mark.parametrize("example", _with_production(POOL_EXAMPLES), ids=lambda path: path.stem)
def test_work_pool_example_syncs_to_a_new_server(server: httpx.Client, tmp_path: Path, example: Path) -> None:
    """The release's sync Job applies the deployments of prefect.yaml with the pool."""
    given_values = yaml.safe_load(example.read_text())
    file = tmp_path / "pool.yaml"
    file.write_text(acceptance.synced_file(rendered("prefect-work-pool", given_values)))
    # One owner for all tests: SQLite may run a repeated create after the previous test has deleted the object.
    wanted = desired_state.read([ROOT / "prefect.yaml", file], owner="the tests of examples", directory=ROOT)

    async def synced() -> None:
        async with connected() as api:
            await sync(api, wanted, prune=True, adopt=True)

    asyncio.run(synced())
    for deployment in server.post("/deployments/filter", json={}).json():
        server.delete(f"/deployments/{deployment['id']}").raise_for_status()
    [pool] = wanted.of_kind(POOL)
    server.delete(f"/work_pools/{pool.key}").raise_for_status()


PASSWORD = "p@s:s/w#r%d?&=+ \\\"'$(REDIS_URL)`é" + "x" * 20


@pytest.mark.parametrize(
    "tls",
    [
        pytest.param({}, marks=pytest.mark.further, id="plain"),
        pytest.param({"enabled": True, "existingSecret": "tls"}, id="tls"),
    ],
)
def test_password_with_every_character_opens_the_bundled_redis(tmp_path: Path, tls: Object) -> None:
    """Run the commands of the chart's containers, with the variables that Kubernetes would set."""
    specs = pod_specs(render("prefect-server", {"image": {"tag": "1"}, "tls": tls}))
    Authority(tmp_path).issue("tls", "redis", hosts=["127.0.0.1"])
    binaries.install_packages({"redis-server": "redis-server"})
    port = free_port()
    script = specs["Deployment/test-prefect-server-redis"]["containers"][0]["args"][0]
    script = script.replace("/tmp", str(tmp_path)).replace("valkey-server", "redis-server")  # noqa: S108
    script = script.replace("/etc/prefect-tls", str(tmp_path)).replace("port 6379", f"port {port}")
    [api] = specs["Deployment/test-prefect-server-api"]["containers"]
    assert environment(api)["PREFECT_SERVER_DOCKET_URL"] == "$(REDIS_URL)"
    url = environment(api)["REDIS_URL"].replace("$(REDIS_PASSWORD)", PASSWORD)
    url = url.replace("test-prefect-server-redis:6379", f"127.0.0.1:{port}").replace("/etc/prefect-tls", str(tmp_path))
    assert url.partition(":")[0] == ("rediss" if tls else "redis")
    named = {"PREFECT_REDIS_MESSAGING_URL": url, "PREFECT_SERVER_DOCKET_URL": url, "REDIS_URL": url}
    variables = os.environ | named | {"REDIS_PASSWORD": PASSWORD}
    code = (
        "import os, redis; [redis.Redis.from_url(os.environ[name]).ping() for name in "
        "('PREFECT_REDIS_MESSAGING_URL', 'PREFECT_SERVER_DOCKET_URL')]"
    )
    tini, arguments = api["command"][:3], api["command"][3:]
    assert tini == ["tini", "-g", "--"]
    script = script.rstrip() + ("" if tls else f" --port {port}")
    with subprocess.Popen(["sh", "-c", script], env=variables) as redis:
        try:
            wait_until(lambda: _listens(port), "a Redis")
            subprocess.run([*arguments, sys.executable, "-c", code], env=variables, check=True)
        finally:
            redis.terminate()


def test_password_with_every_character_opens_the_bundled_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect builds the URL from the chart's variables."""
    objects = render("prefect-server", {"image": {"tag": "1"}})
    specs = pod_specs(objects)
    variables = environment(specs["Deployment/test-prefect-server-api"]["containers"][0])
    reference = variables["PREFECT_SERVER_DATABASE_USER"]["secretKeyRef"]
    user = one(objects, "Secret", reference["name"])["data"][reference["key"]]
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_USER", base64.b64decode(user).decode())
    for name in ("DRIVER", "HOST", "PORT", "NAME"):
        monkeypatch.setenv(f"PREFECT_SERVER_DATABASE_{name}", variables[f"PREFECT_SERVER_DATABASE_{name}"])
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_PASSWORD", PASSWORD)
    secret = Settings().server.database.connection_url
    assert secret
    url = make_url(secret.get_secret_value())
    assert (url.username, url.password, url.host) == ("prefect", PASSWORD, "test-prefect-server-database")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_every_pod_has_the_pull_secrets(chart: str) -> None:
    objects = render(chart, {"image": {"tag": "1", "pullSecrets": ["registry"]}})
    without = [
        name for name, spec in pod_specs(objects).items() if spec.get("imagePullSecrets") != [{"name": "registry"}]
    ]
    assert without == []


def test_chart_version_with_a_plus_is_a_valid_label(chart: str, tmp_path: Path) -> None:
    """Flux appends `+` and a digest to a chart's version."""
    copied = tmp_path / chart
    shutil.copytree(ROOT / "helm" / chart, copied)
    metadata = copied / "Chart.yaml"
    metadata.write_text(re.sub(r"(?m)^version: (.*)$", r"version: \1+1a2b3c4d5e6f", metadata.read_text()))
    objects = objects_of(binaries.helm("template", "test", str(copied), "--set-string", "image.tag=1"))
    assert {"_1a2b3c4d5e6f" in manifest["metadata"]["labels"]["helm.sh/chart"] for manifest in objects} == {True}
