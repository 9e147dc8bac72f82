"""The worker as plain manifests, made from the work pool's chart. `make worker-manifests` writes them."""

from pathlib import Path

import yaml

from tests.helm.rendering import Object, one, render

HERE = Path(__file__).parent
RELEASE = "prefect-work-pool"
"""The pool's release: its runs ask for a service account that is named after it."""

FILES = {
    "base/worker.yaml": ["Deployment/worker"],
    "base/namespace/access.yaml": [
        "ServiceAccount/worker",
        "Role/worker",
        "RoleBinding/worker",
        "NetworkPolicy/worker",
        "ServiceAccount/runs",
        "NetworkPolicy/runs",
    ],
}
"""What is taken of the chart, by file and as "Kind/component"."""

HELMS_OWN = ("app.kubernetes.io/managed-by", "helm.sh/chart")
"""The labels that are true of a release alone."""

HEADER = "# From helm/prefect-work-pool with k8s/worker/values.yaml, by `make worker-manifests`: change it there.\n"


class _Indented(yaml.SafeDumper):
    """Lists are indented below their key, as in all files here."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def plain(rendered: Object) -> Object:
    """An object of the chart for kubectl: without what is Helm's, and where kustomize says."""
    made = dict(rendered)
    metadata = rendered["metadata"]
    labels = {name: value for name, value in metadata["labels"].items() if name not in HELMS_OWN}
    made["metadata"] = {"name": metadata["name"], "labels": labels}
    if made["kind"] == "RoleBinding":
        made["subjects"] = [{"kind": each["kind"], "name": each["name"]} for each in made["subjects"]]
    if made["kind"] == "Deployment":
        # The checksum of the pool's template, which is no part of this: each heartbeat brings it to the worker.
        del made["spec"]["template"]["metadata"]["annotations"]
        # So that what `kubectl scale` set stays when the manifest is applied again.
        del made["spec"]["replicas"]
    return made


def manifests() -> dict[str, str]:
    """The text of each file, by its path in this folder.

    Raises:
        ClusterError: helm refuses the values, with its reason.
    """
    objects = render("prefect-work-pool", HERE / "values.yaml", RELEASE)
    texts = {}
    for file, names in FILES.items():
        found = [one(objects, kind, f"{RELEASE}-{component}") for kind, component in (n.split("/") for n in names)]
        texts[file] = HEADER + yaml.dump_all(map(plain, found), Dumper=_Indented, sort_keys=False)
    return texts


if __name__ == "__main__":
    for file, text in manifests().items():
        (HERE / file).write_text(text)
