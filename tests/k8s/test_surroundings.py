"""The rendered overlays: their objects, the differences of environments, and no overlap with the charts."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import yaml

from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.policies import selects
from orchestration.settings import ROOT
from tests.helm.rendering import Object, inventory, objects_of, one, pod_specs, render
from tests.helm.test_charts import CHARTS

K8S = ROOT / "k8s"
ENVIRONMENTS = {"local": "prefect", "staging": "prefect-staging", "production": "prefect-production"}
"""The namespace of each overlay."""

VALUES: dict[str, list[Object]] = {name: [chart.TAG, chart.MAXIMAL] for name, chart in CHARTS.items()}
"""The smallest and the largest values of each chart, which is also rendered with its examples."""

IN_BOTH = {
    "ConfigMap": "the script that creates the user of a database",
    "NetworkPolicy": "a chart allows what its components need, k8s/ denies the rest and opens the way to the warehouse",
    "ServiceAccount": "the warehouse's",
    "Service": "the warehouse's, which is no part of Prefect",
    "StatefulSet": "the warehouse",
}
"""The kinds that both a chart and an overlay may have, and why."""


@functools.cache
def overlay(environment: str) -> list[Object]:
    """Return the objects of an environment."""
    return objects_of(binaries.kubectl("kustomize", str(K8S / "overlays" / environment)))


@functools.cache
def overlay_of_runs(environment: str) -> list[Object]:
    """Return the objects around the runs of an environment, where they have a namespace of their own."""
    return objects_of(binaries.kubectl("kustomize", str(K8S / "runs" / environment)))


@functools.cache
def charts() -> list[Object]:
    """Return all objects of all charts, with each of their values."""
    found = {path.parent.name for path in (ROOT / "helm").glob("*/Chart.yaml")}
    assert found == set(VALUES), "a chart is rendered with its least and its most values: add them to VALUES"
    objects = []
    for chart, values in VALUES.items():
        given: list[Object | Path] = [*values, *(ROOT / "helm" / chart / "examples").glob("*.yaml")]
        for chart_values in given:
            objects += render(chart, chart_values, chart)
    return objects


every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS)


def test_every_overlay_is_tested() -> None:
    # worker/ is the worker without Helm; test_worker.py compares it with the chart.
    assert {path.name for path in K8S.iterdir()} - {"worker"} == {"base", "overlays", "runs"}
    for folder in ("overlays", "runs"):
        assert {path.name for path in (K8S / folder).iterdir()} == set(ENVIRONMENTS)


@every_environment
def test_overlay_has_exactly_these_objects(environment: str) -> None:
    warehouse = [
        "ConfigMap/warehouse",
        "NetworkPolicy/runs-to-warehouse",
        "NetworkPolicy/warehouse",
        "Service/warehouse",
        "ServiceAccount/warehouse",
        "StatefulSet/warehouse",
    ]
    assert inventory(overlay(environment)) == sorted([
        "LimitRange/containers",
        f"Namespace/{ENVIRONMENTS[environment]}",
        "NetworkPolicy/default-deny",
        "NetworkPolicy/dns",
        "PriorityClass/prefect-control",
        "PriorityClass/prefect-runs",
        "ResourceQuota/objects",
        "ResourceQuota/runs",
        *(warehouse if environment == "local" else []),
    ])  # fmt: skip


@every_environment
def test_runs_elsewhere_have_the_surroundings_of_their_environment(environment: str) -> None:
    """The same limits and policies, and the local environment's way to the warehouse instead of the warehouse."""
    ours, theirs = (
        {
            (manifest["kind"], manifest["metadata"]["name"]): manifest
            for manifest in objects
            if manifest["kind"] not in ("Namespace", "PriorityClass")
        }
        for objects in (overlay_of_runs(environment), overlay(environment))
    )
    namespace = f"{ENVIRONMENTS[environment]}-runs"
    others = {key for key in theirs if "warehouse" in key[1]} - {("NetworkPolicy", "runs-to-warehouse")}
    assert set(ours) == set(theirs) - others
    for key in set(ours) - {("NetworkPolicy", "runs-to-warehouse")}:
        assert ours[key].get("spec") == theirs[key].get("spec")
        assert ours[key]["metadata"]["namespace"] == namespace
    # Argo CD and Flux apply both folders, and an object belongs to one of them.
    assert "PriorityClass" not in {manifest["kind"] for manifest in overlay_of_runs(environment)}
    labels = one(overlay_of_runs(environment), "Namespace", namespace)["metadata"]["labels"]
    assert labels == one(overlay(environment), "Namespace", ENVIRONMENTS[environment])["metadata"]["labels"]


@every_environment
def test_objects_are_in_the_namespace_or_the_same_in_every_environment(environment: str) -> None:
    for manifest in overlay(environment):
        if manifest["kind"] == "PriorityClass":
            assert manifest == one(overlay("local"), manifest["kind"], manifest["metadata"]["name"])
        if manifest["kind"] not in ("Namespace", "PriorityClass"):
            assert manifest["metadata"]["namespace"] == ENVIRONMENTS[environment]


@every_environment
def test_restricted_standard_is_enforced_at_a_pinned_version(environment: str) -> None:
    labels = one(overlay(environment), "Namespace", ENVIRONMENTS[environment])["metadata"]["labels"]
    for mode in ("enforce", "warn", "audit"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert labels[f"pod-security.kubernetes.io/{mode}-version"] == "v1.33"


@every_environment
def test_only_dns_traffic_passes(environment: str) -> None:
    deny = one(overlay(environment), "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for manifest in overlay(environment):
        if manifest["kind"] == "NetworkPolicy" and manifest["spec"]["podSelector"] == {}:
            assert "ingress" not in manifest["spec"]
            for rule in manifest["spec"].get("egress", []):
                assert {port["port"] for port in rule["ports"]} == {53, "dns", "dns-tcp"}


@every_environment
def test_quota_limits_only_runs_and_the_limit_range_sets_what_it_requires(environment: str) -> None:
    quota = one(overlay(environment), "ResourceQuota", "runs")["spec"]
    runs = {"scopeName": "PriorityClass", "operator": "In", "values": ["prefect-runs"]}
    assert quota["scopeSelector"] == {"matchExpressions": [runs]}
    (limits,) = one(overlay(environment), "LimitRange", "containers")["spec"]["limits"]
    given = {f"requests.{name}" for name in limits["defaultRequest"]} | {f"limits.{name}" for name in limits["default"]}
    assert set(quota["hard"]) - {"pods"} == given
    assert "cpu" not in limits["default"], "a pod that is alone on a node may use all of its CPU"
    objects = one(overlay(environment), "ResourceQuota", "objects")["spec"]
    assert "scopeSelector" not in objects
    assert objects["hard"]["services.loadbalancers"] == objects["hard"]["services.nodeports"] == "0"
    assert int(objects["hard"]["count/jobs.batch"]) >= 10 * int(quota["hard"]["pods"]), "ended Jobs stay a while"


def test_environments_grow_as_the_page_shows() -> None:
    page = (ROOT / "docs" / "how-to" / "environments.md").read_text()
    sizes = []
    for environment, namespace in ENVIRONMENTS.items():
        quota = one(overlay(environment), "ResourceQuota", "runs")["spec"]["hard"]
        (limits,) = one(overlay(environment), "LimitRange", "containers")["spec"]["limits"]
        names = ("pods", "requests.cpu", "requests.memory", "limits.memory")
        figures = [*(quota[name] for name in names), limits["max"]["memory"]]
        assert f"| `{environment}` | `{namespace}` | {' | '.join(figures)} |" in page
        sizes.append([int(figure.removesuffix("Gi")) for figure in figures])
    for smaller, larger in itertools.pairwise(sizes):
        assert all(a < b for a, b in zip(smaller, larger, strict=True))


def test_control_plane_preempts_runs_and_runs_preempt_no_pod() -> None:
    runs, control = (one(overlay("local"), "PriorityClass", f"prefect-{name}") for name in ("runs", "control"))
    assert runs["preemptionPolicy"] == "Never"
    assert 0 <= runs["value"] < control["value"]
    assert not runs.get("globalDefault")
    assert not control.get("globalDefault")


def test_warehouse_meets_the_restricted_standard_and_has_no_password() -> None:
    (spec,) = pod_specs(overlay("local")).values()
    account = one(overlay("local"), "ServiceAccount", spec["serviceAccountName"])
    assert account["automountServiceAccountToken"] is spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert spec["priorityClassName"] == "prefect-control"
    security = spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] == security["fsGroup"] == 999
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]) == {"requests", "limits"}
    (password,) = (variable for variable in container["env"] if variable["name"] == "POSTGRES_PASSWORD")
    assert password["valueFrom"] == {"secretKeyRef": {"name": "warehouse", "key": "password"}}


def test_only_flow_runs_reach_the_warehouse() -> None:
    spec = one(overlay("local"), "NetworkPolicy", "warehouse")["spec"]
    runs = {"podSelector": {"matchLabels": {"prefect.io/role": "flow-run"}}}
    elsewhere = {"namespaceSelector": {"matchLabels": {"app.kubernetes.io/part-of": "prefect"}}}
    assert spec["ingress"] == [{"from": [runs, elsewhere | runs], "ports": [{"port": 5432}]}]
    way = one(overlay_of_runs("local"), "NetworkPolicy", "runs-to-warehouse")["spec"]
    warehouse = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "warehouse"}}}
    assert selects(way["podSelector"], {"prefect.io/role": "flow-run"})
    assert way["egress"] == [{"to": [elsewhere | warehouse], "ports": [{"port": 5432}]}]
    for objects in (overlay("local"), overlay_of_runs("local")):
        [labels] = [manifest["metadata"]["labels"] for manifest in objects if manifest["kind"] == "Namespace"]
        assert selects(elsewhere["namespaceSelector"], labels)
    labels = one(overlay("local"), "StatefulSet", "warehouse")["spec"]["template"]["metadata"]["labels"]
    assert selects(spec["podSelector"], labels)
    assert selects({"matchLabels": one(overlay("local"), "Service", "warehouse")["spec"]["selector"]}, labels)


def test_warehouse_and_server_use_the_same_postgres() -> None:
    bundled = yaml.safe_load((ROOT / "helm/prefect-server/values.yaml").read_text())["database"]["bundled"]["image"]
    (spec,) = pod_specs(overlay("local")).values()
    assert spec["containers"][0]["image"] == f"{bundled['repository']}:{bundled['tag']}"


@every_environment
def test_no_object_is_in_both_a_chart_and_an_overlay(environment: str) -> None:
    def names(objects: list[Object]) -> set[tuple[str, str, str]]:
        return {(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]) for manifest in objects}

    assert not names(charts()) & names(overlay(environment))


def test_each_kind_in_both_has_a_reason() -> None:
    here = {manifest["kind"] for environment in ENVIRONMENTS for manifest in overlay(environment)}
    assert here & {manifest["kind"] for manifest in charts()} == set(IN_BOTH)


def test_no_policy_repeats_a_rule_of_another() -> None:
    def rules(objects: list[Object]) -> set[str]:
        return {
            json.dumps([manifest["spec"]["podSelector"], direction, rule], sort_keys=True)
            for manifest in objects
            if manifest["kind"] == "NetworkPolicy"
            for direction in ("ingress", "egress")
            for rule in manifest["spec"].get(direction, [])
        }

    assert rules(charts())
    assert not rules(charts()) & rules(overlay("local"))


def test_charts_and_overlays_select_only_their_own_pods() -> None:
    """Services and policies of a chart select no pod of an overlay, and vice versa, except for policies of all pods."""

    def selectors(objects: list[Object]) -> list[Object]:
        policies = [manifest["spec"]["podSelector"] for manifest in objects if manifest["kind"] == "NetworkPolicy"]
        return policies + [
            {"matchLabels": manifest["spec"]["selector"]} for manifest in objects if manifest["kind"] == "Service"
        ]

    def labels(objects: list[Object]) -> list[Object]:
        return [
            manifest["spec"]["template"]["metadata"]["labels"]
            for manifest in objects
            if "template" in manifest.get("spec", {})
        ]

    of_charts, here = selectors(charts()), [selector for selector in selectors(overlay("local")) if selector]
    assert of_charts
    assert here
    assert labels(charts())
    assert labels(overlay("local"))
    assert not [selector for selector in of_charts for pod in labels(overlay("local")) if selects(selector, pod)]
    assert not [selector for selector in here for pod in labels(charts()) if selects(selector, pod)]
