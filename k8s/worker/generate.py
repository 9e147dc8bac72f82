"""Generate the worker's plain manifests from the work pool's chart: `make worker-manifests`."""

from pathlib import Path

import yaml

from tests.helm.rendering import Object, one, render

HERE = Path(__file__).parent
RELEASE = "prefect-work-pool"
"""The release of the work pool. The service account of its runs is named after it."""

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
"""The objects of the chart in each file, as "Kind/component"."""

HELM_LABELS = ("app.kubernetes.io/managed-by", "helm.sh/chart")
"""Labels that only an object of a Helm release has."""

HEADER = "# From helm/prefect-work-pool with k8s/worker/values.yaml, by `make worker-manifests`: change it there.\n"


class _IndentedDumper(yaml.SafeDumper):
    """Indents lists below their key, as all YAML files of this repository do."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def make_plain(rendered: Object) -> Object:
    """Return an object of the chart for kubectl, without Helm's labels and the namespace, which kustomize sets."""
    made = dict(rendered)
    metadata = rendered["metadata"]
    labels = {name: value for name, value in metadata["labels"].items() if name not in HELM_LABELS}
    made["metadata"] = {"name": metadata["name"], "labels": labels}
    if made["kind"] == "RoleBinding":
        made["subjects"] = [{"kind": subject["kind"], "name": subject["name"]} for subject in made["subjects"]]
    if made["kind"] == "Deployment":
        # The checksum of the pool's template, which these manifests lack: the worker reads it at each heartbeat.
        del made["spec"]["template"]["metadata"]["annotations"]
        # Without replicas, another apply keeps the number that `kubectl scale` has set.
        del made["spec"]["replicas"]
        # Without the Secret, the worker's runs store results without signatures.
        for volume in made["spec"]["template"]["spec"]["volumes"]:
            if volume["name"] == "signing-key":
                volume["secret"]["optional"] = True
    return made


def manifests() -> dict[str, str]:
    """Return the text of each file, by its path in this folder.

    Raises:
        ClusterError: the chart refuses the values, with the reason.
    """
    objects = render("prefect-work-pool", HERE / "values.yaml", RELEASE)
    texts = {}
    for file, names in FILES.items():
        found = [one(objects, kind, f"{RELEASE}-{component}") for kind, component in (n.split("/") for n in names)]
        texts[file] = HEADER + yaml.dump_all(map(make_plain, found), Dumper=_IndentedDumper, sort_keys=False)
    return texts


if __name__ == "__main__":
    for file, text in manifests().items():
        (HERE / file).write_text(text)
