"""Values of each environment: how they render, and whether they fit the quotas and limits of its overlay in k8s/."""

from typing import Any

import pytest
import yaml

from orchestration.operations.local_cluster.policies import selects
from orchestration.settings import ROOT
from tests.helm.rendering import Object, assert_restricted, one, pod_specs, render
from tests.helm.test_prefect_work_pool import TAG, pool_of
from tests.k8s.test_surroundings import ENVIRONMENTS, overlay, overlay_of_runs

CHARTS = ("prefect-server", "prefect-work-pool")

every_environment = pytest.mark.parametrize("environment", ENVIRONMENTS)


def rendered(environment: str, chart: str) -> list[Object]:
    """Return the objects of an environment's release, which has its chart's name."""
    values = yaml.safe_load((ROOT / "helm" / "environments" / environment / f"{chart}.yaml").read_text())
    return render(chart, TAG | values, chart)


def test_every_environment_has_values_for_every_chart() -> None:
    found = {
        str(path.relative_to(ROOT / "helm" / "environments")) for path in (ROOT / "helm").glob("environments/*/*.yaml")
    }
    assert found == {f"{environment}/{chart}.yaml" for environment in ENVIRONMENTS for chart in CHARTS}


@every_environment
def test_runs_are_in_the_namespace_of_their_surroundings_and_reach_the_api(environment: str) -> None:
    accounts = {
        manifest["metadata"]["name"]: manifest["metadata"]["namespace"]
        for manifest in rendered(environment, "prefect-work-pool")
        if manifest["kind"] == "ServiceAccount"
    }
    release = accounts["prefect-work-pool-worker"]
    runs = accounts["prefect-work-pool-runs"]
    assert runs != release
    [surroundings] = [
        manifest["metadata"] for manifest in overlay_of_runs(environment) if manifest["kind"] == "Namespace"
    ]
    assert surroundings["name"] == f"{ENVIRONMENTS[environment]}{runs.removeprefix(release)}"
    policy = one(rendered(environment, "prefect-server"), "NetworkPolicy", "prefect-server-api")["spec"]
    [peers] = [rule.get("from", [{}]) for rule in policy["ingress"] if rule["ports"] == [{"port": "http"}]]
    of_runs = {"kubernetes.io/metadata.name": runs}
    assert any("podSelector" not in peer and selects(peer.get("namespaceSelector", {}), of_runs) for peer in peers), (
        "the policy denies runs the API"
    )


@every_environment
@pytest.mark.parametrize("chart", CHARTS)
def test_pods_are_restricted_and_their_priority_class_exists(environment: str, chart: str) -> None:
    objects = rendered(environment, chart)
    assert pod_specs(objects)
    assert_restricted(objects)
    classes = {manifest["metadata"]["name"] for manifest in overlay(environment) if manifest["kind"] == "PriorityClass"}
    assert {spec["priorityClassName"] for spec in pod_specs(objects).values()} <= classes


@every_environment
def test_containers_fit_the_limit_range(environment: str) -> None:
    (limits,) = one(overlay(environment), "LimitRange", "containers")["spec"]["limits"]
    largest = _bytes(limits["max"]["memory"])
    for chart in CHARTS:
        for name, spec in pod_specs(rendered(environment, chart)).items():
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                assert _bytes(container["resources"]["limits"]["memory"]) <= largest, name


@every_environment
def test_runs_fit_the_quota_of_their_priority_class(environment: str) -> None:
    """The pool's concurrency limit, times the default requests, fits the quota."""
    pool = pool_of(rendered(environment, "prefect-work-pool"))
    quota = one(overlay_of_runs(environment), "ResourceQuota", "runs")["spec"]
    template = pool["base_job_template"]
    run = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    assert [run["priorityClassName"]] == quota["scopeSelector"]["matchExpressions"][0]["values"]
    assert pool["concurrency_limit"] <= int(quota["hard"]["pods"])
    variables: dict[str, Any] = template["variables"]["properties"]
    requested = pool["concurrency_limit"] * _bytes(variables["memory_request"]["default"])
    assert requested <= _bytes(quota["hard"]["requests.memory"])


def _bytes(quantity: str) -> int:
    units = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
    return int(quantity[:-2]) * units[quantity[-2:]]
