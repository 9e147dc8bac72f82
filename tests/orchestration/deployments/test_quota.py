"""The check of a run's pod against the ResourceQuota and LimitRange objects of its namespace."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestration.deployments import pod_resources, quota, quota_file
from orchestration.errors import DeploymentsError
from orchestration.quantity import parse_quantity
from orchestration.settings import ROOT

RESOURCES = {
    "requests": {"cpu": "{{ cpu_request }}", "memory": "{{ memory_request }}"},
    "limits": {"cpu": "{{ cpu_limit }}", "memory": "{{ memory_limit }}"},
}


def template(init: list[Any] | str = (), sidecar: dict[str, Any] | None = None, **defaults: str) -> dict[str, Any]:  # type: ignore[assignment]
    """Return the template of a pool, in the shape of the chart's."""
    names = ("cpu_request", "cpu_limit", "memory_request", "memory_limit")
    text = [{"type": "string"}, {"type": "null"}]
    spec = {
        "parallelism": 1,
        "completions": 1,
        "restartPolicy": "Never",
        "priorityClassName": "prefect-runs",
        "containers": [{"name": "prefect-job", "image": "{{ image }}", "env": "{{ env }}", "resources": RESOURCES}],
    }
    if init:
        spec["initContainers"] = init
    if sidecar:
        spec["containers"].append(sidecar)  # type: ignore[attr-defined]
    return {
        "variables": {
            "type": "object",
            "properties": {
                **{name: {"anyOf": text, "default": defaults.get(name)} for name in names},
                "env": {"type": "object"},
                "image": {"type": "string", "default": "flows:1"},
            },
        },
        "job_configuration": {
            "env": "{{ env }}",
            "namespace": "prefect",
            "job_manifest": {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {},
                "spec": {"template": {"spec": spec}},
            },
        },
    }


def hard(name: str = "runs", spec: dict[str, Any] | None = None, /, **amounts: str) -> dict[str, Any]:
    """Return a ResourceQuota; `limits_memory` is limits.memory."""
    amounts = {key.replace("_", "."): value for key, value in amounts.items()}
    return {"kind": "ResourceQuota", "metadata": {"name": name}, "spec": {"hard": amounts, **(spec or {})}}


def limits(kind: str = "Container", **bounds: dict[str, str]) -> dict[str, Any]:
    """Return a LimitRange of one item."""
    return {"kind": "LimitRange", "metadata": {"name": "all"}, "spec": {"limits": [{"type": kind, **bounds}]}}


def memory(amount: str, name: str, **more: Any) -> dict[str, Any]:
    """Return a container that requests this much memory in the template itself."""
    resources = {"requests": {"memory": amount}, "limits": {"memory": amount}}
    return {"name": name, "resources": resources, **more}


def test_run_above_the_quota_is_refused() -> None:
    found = quota.find_problems(template(memory_request="1Gi"), {"memory_limit": "8Gi"}, [hard(limits_memory="4Gi")])
    assert found == [
        "the pod of a run requests memory 8Gi (limits.memory), but quota runs of the namespace allows 4Gi in total. "
        "Lower job_variables.memory_limit"
    ]
    assert (
        quota.find_problems(template(memory_request="1Gi"), {"memory_limit": "4096Mi"}, [hard(limits_memory="4Gi")])
        == []
    )


def test_limit_is_the_request_of_a_container_without_one() -> None:
    [found] = quota.find_problems(template(), {"cpu_limit": "5"}, [hard(cpu="4500m")])
    assert "cpu 5 (requests.cpu)" in found
    assert found.endswith("allows 4500m in total. Lower job_variables.cpu_limit")


@pytest.mark.parametrize(
    ("pool", "total"),
    [
        (template(sidecar=memory("1Gi", "proxy"), memory_limit="1536Mi"), "2560Mi"),
        (template(init=[memory("3Gi", "prepare"), memory("1Gi", "small")], memory_limit="1Gi"), "3Gi"),
        (template(init=[memory("512Mi", "proxy", restartPolicy="Always")], memory_limit="2Gi"), "2560Mi"),
        (
            template(
                init=[memory("1Gi", "proxy", restartPolicy="Always"), memory("3Gi", "prepare")], memory_limit="1Gi"
            ),
            "4Gi",
        ),
        (
            template(
                init=[memory("3Gi", "prepare"), memory("1Gi", "proxy", restartPolicy="Always")], memory_limit="1Gi"
            ),
            "3Gi",
        ),
    ],
    ids=["containers", "init", "sidecar", "init after sidecar", "init before sidecar"],
)
def test_containers_add_up_as_in_kubernetes(pool: dict[str, Any], total: str) -> None:
    [found] = quota.find_problems(pool, {}, [hard(limits_memory="2Gi")])
    assert f"the pod of a run requests memory {total} (limits.memory)" in found
    assert quota.find_problems(pool, {}, [hard(limits_memory=total)]) == []


def test_cure_names_the_greatest_container_first() -> None:
    pool = template(sidecar=memory("2Gi", "proxy"), memory_limit="1Gi")
    [found] = quota.find_problems(pool, {}, [hard(limits_memory="2Gi")])
    assert found.endswith(
        "Lower limits.memory of container proxy in the work pool's base_job_template or job_variables.memory_limit"
    )


def test_container_without_a_counted_amount_is_refused() -> None:
    wanted = [hard(limits_memory="4Gi", requests_cpu="2", **{"requests.nvidia.com/gpu": "1"})]
    found = quota.find_problems(template(), {}, wanted)
    assert found == [
        "quota runs of the namespace demands limits.memory, but container prefect-job states none. "
        "Set job_variables.memory_limit, or a default in a LimitRange",
        "quota runs of the namespace demands requests.cpu, but container prefect-job states none. "
        "Set job_variables.cpu_request, or a default in a LimitRange",
    ]
    assert (
        quota.find_problems(template(), {}, [*wanted, limits(default={"memory": "1Gi"}, defaultRequest={"cpu": "1"})])
        == []
    )
    # The max of a LimitRange is the default where it has none.
    assert quota.find_problems(template(), {}, [*wanted, limits(max={"memory": "1Gi", "cpu": "1"})]) == []


def test_quota_of_no_pods_is_refused() -> None:
    found = quota.find_problems(template(), {}, [hard(pods="0"), hard("jobs", **{"count/jobs.batch": "0"})])
    assert found == [
        "quota runs of the namespace allows no run (pods: 0). Raise it to 1 or more",
        "quota jobs of the namespace allows no run (count/jobs.batch: 0). Raise it to 1 or more",
    ]
    assert quota.find_problems(template(), {}, [hard(pods="1")]) == []


@pytest.mark.parametrize(
    ("spec", "counts"),
    [
        ({"scopes": ["Terminating"]}, False),
        ({"scopes": ["NotTerminating", "NotBestEffort"]}, True),
        ({"scopes": ["BestEffort"]}, False),
        ({"scopes": ["PriorityClass"]}, True),
        *(
            (
                {
                    "scopeSelector": {
                        "matchExpressions": [{"scopeName": "PriorityClass", "operator": op, "values": classes}]
                    }
                },
                counts,
            )
            for op, classes, counts in [
                ("In", ["prefect-runs"], True),
                ("In", ["other"], False),
                ("NotIn", ["other"], True),
                ("NotIn", ["prefect-runs"], False),
                ("Exists", [], True),
                ("DoesNotExist", [], False),
            ]
        ),
    ],
)
def test_quota_counts_a_pod_by_its_scopes(spec: dict[str, Any], counts: bool) -> None:
    found = quota.find_problems(template(), {"memory_limit": "8Gi"}, [hard("runs", spec, limits_memory="4Gi")])
    assert bool(found) is counts


def test_limit_range_bounds_each_container() -> None:
    between = limits(max={"memory": "4Gi"}, min={"memory": "256Mi"})
    assert quota.find_problems(template(), {"memory_limit": "8Gi"}, [between]) == [
        "container prefect-job requests memory 8Gi (limits.memory), but limit range all of the namespace allows at "
        "most 4Gi per container. Lower job_variables.memory_limit"
    ]
    assert quota.find_problems(template(memory_limit="1Gi"), {"memory_request": "64Mi"}, [between]) == [
        "container prefect-job requests memory 64Mi (requests.memory), but limit range all of the namespace demands at "
        "least 256Mi per container. Raise job_variables.memory_request"
    ]
    # Two containers that fit one by one exceed nothing, unless the pod has a bound too.
    pool = template(sidecar=memory("3Gi", "proxy"), memory_limit="3Gi")
    assert quota.find_problems(pool, {}, [between]) == []
    [found] = quota.find_problems(pool, {}, [limits("Pod", max={"memory": "4Gi"})])
    assert "the pod of a run requests memory 6Gi (limits.memory)" in found
    assert "at most 4Gi per pod" in found


def test_limit_range_of_pods_gives_no_default() -> None:
    [found] = quota.find_problems(template(), {}, [limits("Pod", max={"cpu": "2"})])
    assert found == (
        "the pod of a run has no limits.cpu, but limit range all of the namespace demands one (max 2 per pod). "
        "Set job_variables.cpu_limit"
    )


def test_request_above_the_limit_is_refused() -> None:
    found = quota.find_problems(template(memory_request="2Gi"), {}, [limits(default={"memory": "512Mi"})])
    assert found == [
        "container prefect-job requests memory 2Gi (requests.memory), more than the limits.memory 512Mi that a "
        "LimitRange gives the container. Lower job_variables.memory_request or raise job_variables.memory_limit"
    ]


def test_invalid_quantity_is_refused() -> None:
    [found] = quota.find_problems(template(), {"memory_limit": "8GB"}, [hard(limits_memory="4Gi")])
    assert found == (
        "container prefect-job has limits.memory '8GB', which is not a quantity. Write one such as 2Gi for "
        "job_variables.memory_limit"
    )
    for wrong in (hard(limits_memory="lots"), limits(max={"memory": "-1"})):
        with pytest.raises(DeploymentsError, match=r"of the namespace has '.*', which is not a quantity\. Correct it"):
            quota.find_problems(template(memory_limit="1Gi"), {}, [wrong])


def test_quantity_that_is_unknown_until_the_run_is_accepted() -> None:
    variable = {"memory_limit": "{{ prefect.variables.memory }}", "memory_request": "1Gi"}
    assert quota.find_problems(template(), variable, [hard(limits_memory="4Gi"), limits(max={"memory": "512Mi"})]) == [
        "container prefect-job requests memory 1Gi (requests.memory), but limit range all of the namespace allows at "
        "most 512Mi per container. Lower job_variables.memory_request"
    ]


def test_template_without_a_manifest_or_with_whole_sections_from_variables() -> None:
    assert quota.find_problems({}, {}, [hard(pods="0")]) == []
    whole = template()
    container = whole["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0]
    container["resources"] = "{{ resources }}"
    [found] = quota.find_problems(whole, {"resources.limits": {"memory": "8Gi"}}, [hard(limits_memory="4Gi")])
    assert found.endswith("Lower job_variables.resources")
    listed = template(init="{{ before }}")
    [found] = quota.find_problems(
        listed, {"before": [memory("8Gi", "prepare")]}, [hard(limits_memory="4Gi"), limits(max={"memory": "9Gi"})]
    )
    assert "the pod of a run requests memory" in found


@pytest.mark.parametrize(
    "variables", [{}, {"memory_limit": "8Gi", "cpu_request": None}, {"env.A": "1", "env": {"B": "2"}}]
)
def test_template_is_filled_in_as_the_worker_does(variables: dict[str, Any]) -> None:
    """Compare with the requests and limits that prefect_kubernetes puts into the Job."""
    from prefect.client.orchestration import PrefectClient
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    pool = template(cpu_request="1", memory_limit="1Gi")
    nowhere = PrefectClient("http://127.0.0.1:9/api")  # the server fills in nothing of this template
    made: Any = asyncio.run(KubernetesWorkerJobConfiguration.from_template_and_values(pool, variables, client=nowhere))
    [container] = made.job_manifest["spec"]["template"]["spec"]["containers"]
    _, [container_of_check] = pod_resources.pod_of(pool, variables)
    assert container_of_check.amounts == {
        f"{kind}.{resource}": value
        for kind, stated in container["resources"].items()
        for resource, value in stated.items()
        if value is not None
    }


def test_run_without_requests_fits_the_namespace_of_this_project() -> None:
    """The LimitRange of k8s/base gives the run its requests and limits."""
    objects = [item for name in ("quota", "limitrange") for item in quota_file.read(ROOT / f"k8s/base/{name}.yaml")]
    assert [item["kind"] for item in objects] == ["ResourceQuota", "ResourceQuota", "LimitRange"]
    assert quota.find_problems(template(), {}, objects) == []
    assert quota.find_problems(template(), {"memory_limit": "3Gi"}, objects)
    assert quota.find_problems(template(), {"cpu_request": "5"}, objects)


def test_output_of_kubectl_is_read(tmp_path: Path) -> None:
    file = tmp_path / "quota"
    quotas, other = [hard(pods="1"), limits(max={"memory": "1Gi"})], {"kind": "Namespace"}
    for text in (
        yaml.safe_dump_all([other, *quotas]),
        yaml.safe_dump({"kind": "List", "items": quotas}),
        json.dumps({"kind": "List", "items": quotas}),
    ):
        file.write_text(text)
        assert quota_file.read(file) == quotas
    file.write_text(json.dumps({"kind": "ResourceQuotaList", "items": [{"spec": {"hard": {"pods": "1"}}}]}))
    assert quota_file.read(file) == [{"kind": "ResourceQuota", "spec": {"hard": {"pods": "1"}}}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff\xfe\x00", "cannot be read: it is not text"),
        (b"{a: [", "is neither YAML nor JSON"),
        (b"", "has no ResourceQuota or LimitRange. Write it with: kubectl get"),
        (b"kind: Namespace", "has no ResourceQuota or LimitRange"),
        (b"just text", "not a Kubernetes object: it has no kind"),
        (b"{kind: List, items: [3]}", "not a Kubernetes object: it has no kind"),
        (
            b"{kind: ResourceQuota, metadata: {name: a}, spec: {hard: [1]}}",
            "the spec of quota a of the namespace is not",
        ),
        (b"{kind: LimitRange, metadata: {name: a}, spec: [1]}", "the spec of limit range a of the namespace is not"),
        (
            b"{kind: LimitRange, metadata: {name: a}, spec: {limits: [x]}}",
            "the spec of limit range a of the namespace is",
        ),
    ],
)
def test_file_that_is_not_a_quota_is_refused(tmp_path: Path, text: bytes | None, says: str) -> None:
    file = tmp_path / "quota.yaml"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(DeploymentsError) as caught:
        quota_file.read(file)
    assert str(caught.value).startswith(f"quota file {file}")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_quota_check_works_without_the_package_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes.utils.quantity", None)
    parse_quantity.cache_clear()
    [problem] = quota.find_problems(template(memory_limit="8Gi"), {}, [hard(limits_memory="4Gi")])
    assert "requests memory 8Gi" in problem
