"""The worker's plain manifests: current, and equal to the chart except for the fields listed here."""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from k8s.worker import generate
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.policies import selects
from orchestration.settings import ROOT
from tests.helm import test_prefect_work_pool
from tests.helm.rendering import Object, assert_restricted, environment, inventory, objects_of, one, pod_specs, render
from tests.k8s.test_surroundings import K8S, charts

EXAMPLE = "worker/overlays/example"
NAMESPACE = "prefect-runs-example"
NAME = "prefect-work-pool-worker"


@functools.cache
def built(folder: str) -> list[Object]:
    """Return the objects of a kustomization of k8s/."""
    return objects_of(binaries.kubectl("kustomize", str(K8S / folder)))


def base() -> list[Object]:
    """Return all generated objects."""
    return built("worker/base") + built("worker/base/namespace")


def names(objects: list[Object]) -> set[tuple[str, str, str]]:
    return {(manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"]) for manifest in objects}


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values in an object by path. A path names an element of a list by its name, if it has one."""
    if isinstance(value, dict) and value:
        return {name: leaf for key in value for name, leaf in leaves(value[key], f"{path}/{key}").items()}
    if isinstance(value, list) and value:
        keys = [entry.get("name", i) if isinstance(entry, dict) else i for i, entry in enumerate(value)]
        return {
            name: leaf
            for key, entry in zip(keys, value, strict=True)
            for name, leaf in leaves(entry, f"{path}/{key}").items()
        }
    return {path: value}


def test_manifests_are_current() -> None:
    for file, text in generate.manifests().items():
        assert (K8S / "worker" / file).read_text() == text, f"k8s/worker/{file} is old: make worker-manifests"


def test_objects_equal_the_chart_except_for_listed_fields() -> None:
    everywhere = {
        "/metadata/namespace",
        "/metadata/labels/helm.sh/chart",
        "/metadata/labels/app.kubernetes.io/managed-by",
    }
    api = "/spec/egress/1/to/0/namespaceSelector/matchLabels/kubernetes.io/metadata.name"
    worker = "/spec/template/spec/containers/worker"
    differing = {
        f"Deployment/{NAME}": {
            "/spec/replicas",
            "/spec/template/metadata/annotations/checksum/pool",
            f"{worker}/image",
            f"{worker}/args/4",
            # Where the Secret is not copied, runs do not sign their results.
            "/spec/template/spec/volumes/signing-key/secret/optional",
            f"{worker}/env/PREFECT_API_URL/value",
            f"{worker}/env/WORK_POOL/name",
            f"{worker}/env/WORK_POOL/value",
        },
        f"RoleBinding/{NAME}": {f"/subjects/{NAME}/namespace"},
        f"NetworkPolicy/{NAME}": {api},
        "NetworkPolicy/prefect-work-pool-runs": {api},
    }
    # The pool's release has the template, and this worker reads it from the server.
    signed = {"results": {"storage": "volume"}}
    values = test_prefect_work_pool.TAG | {"worker": {"templateFrom": "server"}, "runs": signed}
    # Without a reconciler the worker watches its pods.
    values |= {"reconciler": {"enabled": False}}
    defaults = render("prefect-work-pool", values, generate.RELEASE)
    for manifest in base():
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        here, there = leaves(manifest), leaves(one(defaults, kind, name))
        differ = {path for path in here | there if here.get(path) != there.get(path)}
        assert differ == everywhere | differing.get(f"{kind}/{name}", set())


def test_only_the_worker_is_in_both_a_chart_and_k8s() -> None:
    here = [
        manifest for path in K8S.rglob("kustomization.yaml") for manifest in built(str(path.parent.relative_to(K8S)))
    ]
    assert names(here) & names(charts()) == names(base())
    assert {path.name for path in (K8S / "worker").rglob("*.yaml")} == {
        "values.yaml", "kustomization.yaml", "worker.yaml", "access.yaml",
    }  # fmt: skip


def test_example_has_the_worker_and_an_environment_for_it() -> None:
    assert inventory(built(EXAMPLE)) == [f"Deployment/{NAME}"]
    assert inventory(built("worker/base/namespace")) == [
        "NetworkPolicy/prefect-work-pool-runs",
        f"NetworkPolicy/{NAME}",
        f"Role/{NAME}",
        f"RoleBinding/{NAME}",
        "ServiceAccount/prefect-work-pool-runs",
        f"ServiceAccount/{NAME}",
    ]
    surroundings = [name.replace("Namespace/prefect", f"Namespace/{NAMESPACE}") for name in inventory(built("base"))]
    around = built(f"{EXAMPLE}/namespace")
    assert inventory(around) == sorted([*surroundings, *inventory(built("worker/base/namespace"))])
    for manifest in built(EXAMPLE) + around:
        if manifest["kind"] not in ("Namespace", "PriorityClass"):
            assert manifest["metadata"]["namespace"] == NAMESPACE
    [subject] = one(around, "RoleBinding", NAME)["subjects"]
    assert subject == {"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}


def test_runs_of_a_chart_pool_find_account_policy_and_secret() -> None:
    """The service account by name, the policy by the pods' labels, the Secret by name and key."""
    pool = test_prefect_work_pool.pool_of(render("prefect-work-pool", test_prefect_work_pool.TAG, generate.RELEASE))
    template = pool["base_job_template"]
    account = template["variables"]["properties"]["service_account_name"]["default"]
    assert one(base(), "ServiceAccount", account)
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]
    policy = one(base(), "NetworkPolicy", "prefect-work-pool-runs")["spec"]
    assert selects(policy["podSelector"], pod["metadata"]["labels"])


def test_example_meets_the_restricted_standard() -> None:
    assert_restricted(built(EXAMPLE))


def test_patch_of_the_example_for_a_private_ca_is_that_of_the_chart(tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s" / EXAMPLE / "kustomization.yaml"
    text, heading, patch = file.read_text().partition("  # - patch: |\n")
    file.write_text(text + (heading + patch).replace("  # ", "  "))
    made = objects_of(binaries.kubectl("kustomize", str(file.parent)))
    api = {"url": "https://prefect-server-api:4200/api", "tls": {"caSecret": "prefect-server-tls"}}
    chart = render("prefect-work-pool", test_prefect_work_pool.TAG | {"api": api}, generate.RELEASE)
    mine, others = (pod_specs(objects)[f"Deployment/{NAME}"] for objects in (made, chart))
    for part in ("env", "volumeMounts"):
        added = [entry for entry in mine["containers"][0][part] if "/etc/prefect-api/ca" in repr(entry)]
        assert added == [entry for entry in others["containers"][0][part] if "/etc/prefect-api/ca" in repr(entry)]
        assert len(added) == 1
    assert [volume for volume in mine["volumes"] if volume["name"] == "api-ca"] == [
        volume for volume in others["volumes"] if volume["name"] == "api-ca"
    ]
    assert_restricted(made)


@pytest.mark.parametrize("folder", ["worker/base", EXAMPLE])
def test_variables_are_defined_before_they_are_used(folder: str) -> None:
    """Kubernetes does not expand $(NAME) before NAME is defined, and a patch moves its variables to the front."""
    [container] = pod_specs(built(folder))[f"Deployment/{NAME}"]["containers"]
    known: set[str] = set()
    for variable in container["env"]:
        assert set(re.findall(r"\$\((\w+)\)", variable.get("value", ""))) <= known
        known.add(variable["name"])
    assert (
        set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) == {"NAMESPACE", "POD_NAME", "WORK_POOL"} <= known
    )
    assert environment(container)["WORK_POOL"] == "default"


def test_page_names_existing_folders_and_deployments() -> None:
    page = (ROOT / "docs" / "how-to" / "workers-without-helm.md").read_text()
    for folder in re.findall(r"-k (k8s/\S+)", page):
        assert (ROOT / folder / "kustomization.yaml").exists(), folder
    [container] = pod_specs(built(EXAMPLE))[f"Deployment/{NAME}"]["containers"]
    credential = environment(container)["PREFECT_API_AUTH_STRING"]["secretKeyRef"]
    assert f"get secret {credential['name']} " in page
    assert f'"{credential["key"]}": ' in page
    assert set(re.findall(r"deployment/([a-z-]+)", page)) == {NAME}
