"""Find an environment, and run kubectl and helm in it."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestration.errors import ClusterError
from orchestration.settings import ROOT

Object = dict[str, Any]

SERVER = "prefect-server"
POOL = "prefect-work-pool"
RELEASES = (SERVER, POOL)
"""The releases of an environment, in the order of a deploy. Each is named after its chart."""

OVERLAYS = ROOT / "k8s" / "overlays"
PAGE = "docs/how-to/environments.md"


def run_program(
    command: Sequence[str], text: str | None = None, *, folder: Path = ROOT, limit_seconds: float | None = None
) -> str:
    """Run a program and return its standard output.

    Args:
        command: the program and its arguments.
        text: its standard input.
        folder: its working directory.
        limit_seconds: kill the program when it has not ended after these seconds.

    Raises:
        ClusterError: the program is not installed, failed, with its error output, or did not end in time.
    """
    if not shutil.which(command[0]):
        raise ClusterError(
            f"{command[0]} is not installed here. Install it, or build one for this project: make cluster"
        )
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, cwd=folder, timeout=limit_seconds
        )
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{command[0]} {command[-1]} has not ended after {limit_seconds:.0f} s") from None
    if done.returncode:
        output = (done.stderr or done.stdout).strip()
        raise ClusterError(output.removeprefix("Error: ") or f"{command[0]} ended with exit status {done.returncode}")
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A namespace of a cluster that holds server and workers, and the namespace of their runs.

    Args:
        name: the name of its folders in k8s/overlays and helm/environments.
        context: the kubeconfig context of its cluster.
        namespace: the namespace of its releases.
        limit_seconds: kill a program that has not ended after these seconds.
    """

    name: str
    context: str
    namespace: str
    limit_seconds: float | None = None

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        """Run kubectl in the namespace and return its standard output."""
        command = ["kubectl", "--context", self.context, "--namespace", self.namespace, *arguments]
        return run_program(command, text, limit_seconds=self.limit_seconds)

    def helm(self, *arguments: str) -> str:
        """Run helm in the namespace and return its standard output."""
        command = ["helm", "--kube-context", self.context, "--namespace", self.namespace, *arguments]
        return run_program(command, limit_seconds=self.limit_seconds)

    def objects(self, kinds: str, *arguments: str) -> list[Object]:
        """Return the objects of some kinds in its namespaces: `objects("pods,jobs", "--selector", "a=b")`.

        Objects of all namespaces (`--all-namespaces`), and of kinds without a namespace, are returned once.
        """
        found: Object = {}
        for namespace in self.namespaces:
            # kubectl takes the last --namespace.
            text = self.kubectl("get", kinds, "--output", "json", *arguments, "--namespace", namespace)
            found |= {item["metadata"]["uid"]: item for item in json.loads(text)["items"]}
        return [*found.values()]

    @property
    def absent_namespace(self) -> str:
        """The namespace of the runs if it does not exist yet while that of the releases does; else empty."""
        names = self.kubectl("get", "namespace", *self.namespaces, "--ignore-not-found", "--output", "name").split()
        is_absent = names == [f"namespace/{self.namespace}"] and len(self.namespaces) > 1
        return self.runs_namespace if is_absent else ""

    @property
    def values(self) -> Path:
        """The folder with the values of its releases."""
        return ROOT / "helm" / "environments" / self.name

    @property
    def signing_key(self) -> Path:
        """The file with the public key that images have to be signed by. Without this file, images are not verified."""
        return self.values / "cosign.pub"

    @property
    def pool_values(self) -> Object:
        """The values of the work pool's release."""
        file = self.values / f"{POOL}.yaml"
        return (yaml.safe_load(file.read_text()) or {}) if file.exists() else {}

    @property
    def runs_namespace(self) -> str:
        """The namespace of the runs: `runs.namespace` in the values, or that of the releases if the value is empty.

        Raises:
            ClusterError: the value has another template than the release's namespace.
        """
        given = str((self.pool_values.get("runs") or {}).get("namespace", ""))
        filled = self.fill_namespace(given)
        if "{{" in filled:
            raise ClusterError(
                f"{self.values / POOL}.yaml: runs.namespace is {given!r}. make reads only the template "
                "{{ .Release.Namespace }}. Write the name without other templates"
            )
        return filled

    def fill_namespace(self, name: str) -> str:
        """Return the namespace that a value of `runs.namespace` names, which may have a template or be empty."""
        return name.replace("{{ .Release.Namespace }}", self.namespace) or self.namespace

    @property
    def namespaces(self) -> list[str]:
        """The namespace of the releases and that of the runs, which may be one."""
        return [*dict.fromkeys((self.namespace, self.runs_namespace))]


def resolve(name: str, context: str, namespace: str = "") -> Environment:
    """Return the environment of a name on the cluster of a context.

    Args:
        name: a folder in k8s/overlays.
        context: the kubeconfig context of the cluster.
        namespace: a namespace other than the overlay's.

    Raises:
        ClusterError: the environment or the context does not exist, or the cluster does not answer.
    """
    known = sorted(path.name for path in OVERLAYS.iterdir() if not path.name.startswith("."))
    if name not in known:
        raise ClusterError(f"ENV={name} is unknown. There are {', '.join(known)}. Add one as {PAGE} describes")
    contexts = run_program(["kubectl", "config", "get-contexts", "--output", "name"]).split()
    choice = f"There are: {', '.join(contexts)}" if contexts else "The kubeconfig has none"
    if not context:
        raise ClusterError(f"ENV={name} needs the name of its cluster: KUBE_CONTEXT=... {choice}")
    if context not in contexts:
        raise ClusterError(f"KUBE_CONTEXT={context} is not in the kubeconfig. {choice}")
    overlay = yaml.safe_load((OVERLAYS / name / "kustomization.yaml").read_text())
    found = Environment(name, context, namespace or overlay["namespace"])
    try:
        found.kubectl("get", "--raw", "/version", "--request-timeout=10s")
    except ClusterError as error:
        last_line = str(error).splitlines()[-1]
        raise ClusterError(f"The cluster of KUBE_CONTEXT={context} cannot be used: {last_line}") from None
    return found
