"""Try rendered charts on a Kubernetes API server and a Prefect server."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.templating import apply_values
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from orchestration.deployments import desired_state
from orchestration.deployments.resources import POOL, QUEUE
from orchestration.operations.local_cluster import binaries
from tests.cluster import apiserver
from tests.helm import cloudnative_pg
from tests.helm.rendering import EXTENSIONS, Object
from tests.parts import wait_until

REVISION = "5d4f8c7b9d"
"""A hash such as the StatefulSet controller appends to names."""


def _definition_without_schema(kind: str) -> Object:
    """Return the definition of a kind of the Prometheus operator. Its schema is part of no package."""
    plural = f"{kind.lower()}s"
    anything = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com",
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": anything}],
        },
    }


@contextlib.contextmanager
def kubernetes(folder: Path) -> Iterator[apiserver.ApiServer]:
    """Start an API server with the kinds of all charts. It takes every PrometheusRule and PodMonitor."""
    with apiserver.alone(folder) as api:
        for file in (binaries.http_routes(), binaries.certificates()):
            definition = yaml.load(file.read_text(), yaml.CSafeLoader)
            definition["metadata"].pop("labels", None)  # those of cert-manager are templates of Helm
            api.create(definition)
        for kind in ("PrometheusRule", "PodMonitor"):
            api.create(_definition_without_schema(kind))
        install_cloudnative_pg(api)
        groups = [f"/apis/{group}/v1" for group in EXTENSIONS]
        wait_until(lambda: all(api.client.get(group).is_success for group in groups), "the added kinds")
        yield api


def install_cloudnative_pg(api: apiserver.ApiServer) -> None:
    """Create the definitions of CloudNativePG's kinds, and wait until the API server has them all."""
    for definition in cloudnative_pg.definitions():
        api.create(definition)
    wanted = {
        (definition["spec"]["group"], definition["spec"]["names"]["plural"])
        for definition in cloudnative_pg.definitions()
    }
    wait_until(lambda: all(name in _resources(api, group) for group, name in wanted), "CloudNativePG's kinds")


def _resources(api: apiserver.ApiServer, group: str) -> set[str]:
    answer = api.client.get(f"/apis/{group}/v1")
    return {resource["name"] for resource in answer.json()["resources"]} if answer.is_success else set()


def refusals(api: apiserver.ApiServer, rendered: str) -> list[str]:
    """Return the API server's refusals of a rendered chart, its StatefulSets' pods and claims included."""
    found = []
    for manifest in re.split(r"^---\n", rendered, flags=re.MULTILINE):
        parsed = yaml.load(manifest, yaml.CSafeLoader)
        if parsed:
            found += [api.refusal(manifest), *(api.refusal(pod) for pod in _pods(parsed))]
    return [refusal for refusal in found if refusal]


def _pods(workload: Object) -> list[Object]:
    """Return the pod and claims that the StatefulSet controller creates for a StatefulSet."""
    if workload["kind"] != "StatefulSet":
        return []
    set_name, spec = workload["metadata"]["name"], workload["spec"]
    name = f"{set_name}-0"
    labels = spec["template"]["metadata"]["labels"] | {
        "controller-revision-hash": f"{set_name}-{REVISION}",
        "statefulset.kubernetes.io/pod-name": name,
        "apps.kubernetes.io/pod-index": "0",
    }
    claims = [
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim"}
        | claim
        | {"metadata": {"name": f"{claim['metadata']['name']}-{name}", "labels": spec["selector"]["matchLabels"]}}
        for claim in spec.get("volumeClaimTemplates", [])
    ]
    mounted = [
        {
            "name": claim["metadata"]["name"].removesuffix(f"-{name}"),
            "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]},
        }
        for claim in claims
    ]
    template = spec["template"]["spec"]
    pod = template | {
        "hostname": name,
        "subdomain": spec["serviceName"],
        "volumes": [*template.get("volumes", []), *mounted],
    }
    metadata = {"name": name, "labels": labels, "annotations": spec["template"]["metadata"].get("annotations")}
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}, *claims]


def synced_file(rendered: str) -> str:
    """Return the text of pool.yaml, which the release's sync Job reads.

    Raises:
        AssertionError: the release has no such file.
    """
    for manifest in yaml.load_all(rendered, yaml.CSafeLoader):
        if manifest and manifest["kind"] == "ConfigMap" and "pool.yaml" in (manifest.get("data") or {}):
            return str(manifest["data"]["pool.yaml"])
    raise AssertionError("The release has no file with its pool")


def job(template: Object, **variables: Any) -> Object:
    """Return the Job that Prefect's worker creates for a run with a base job template and these job variables."""
    properties = template["variables"]["properties"].items()
    defaults = {name: rule["default"] for name, rule in properties if rule.get("default") is not None}
    configuration = KubernetesWorkerJobConfiguration(
        **apply_values(template["job_configuration"], defaults | variables)
    )
    configuration.prepare_for_flow_run(FlowRun(flow_id="00000000-0000-0000-0000-000000000000", name="a-run"))
    manifest: Object = configuration.job_manifest
    for misplaced in ("parallelism", "completions"):  # Prefect insists on them, where Kubernetes has no such fields
        del manifest["spec"]["template"]["spec"][misplaced]
    return manifest


def pool_refusals(api: apiserver.ApiServer, server: httpx.Client, rendered: str, folder: Path) -> list[str]:
    """Return the refusals of a release's pool and queues by the Prefect server, and of a run's Job by Kubernetes.

    Args:
        api: a Kubernetes API server.
        server: a client of a Prefect server.
        rendered: the rendered work pool chart.
        folder: for the file that sync reads.
    """
    file = folder / "pool.yaml"
    file.write_text(synced_file(rendered))
    wanted = desired_state.read([file], owner="the tests")
    [pool] = wanted.of_kind(POOL)
    answers = [server.post("/work_pools/", json={"name": pool.key, **_sent(pool.fields)})]
    path = "/work_pools/"
    if answers[0].is_success:
        answers += [
            server.post(
                f"/work_pools/{pool.key}/queues", json={"name": queue.key.partition("/")[2], **_sent(queue.fields)}
            )
            for queue in wanted.of_kind(QUEUE)
            if not queue.key.endswith("/default")
        ]
        server.delete(f"/work_pools/{pool.key}").raise_for_status()
    refused = [f"{path}: {answer.text}" for answer in answers if not answer.is_success]
    if not refused and (refusal := api.refusal(job(pool.fields["base_job_template"]))):
        refused.append(f"The Job of a run: {refusal}")
    return refused


def _sent(fields: Object) -> Object:
    return {name: value for name, value in fields.items() if value is not None}
