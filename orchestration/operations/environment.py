"""Which environment where, and the two programs that reach it: kubectl and helm."""

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
"""The releases of an environment, in the order in which they are deployed; each has its chart's name."""

OVERLAYS = ROOT / "k8s" / "overlays"
PAGE = "docs/how-to/environments.md"


def run(command: Sequence[str], text: str | None = None, *, folder: Path = ROOT) -> str:
    """Run a program; what it printed.

    Raises:
        ClusterError: it is not installed, or failed, with what it said.
    """
    if not shutil.which(command[0]):
        raise ClusterError(f"{command[0]} is not installed here. Install it, or `make cluster` for one of our own")
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise ClusterError(said.removeprefix("Error: ") or f"{command[0]} ended with {done.returncode}")
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A namespace of a cluster that holds server, worker and runs.

    Args:
        name: of its folder in k8s/overlays and helm/environments.
        context: the kubeconfig's name of its cluster.
        namespace: where its releases and runs are.
    """

    name: str
    context: str
    namespace: str

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        """Run kubectl in the namespace; what it printed."""
        return run(["kubectl", "--context", self.context, "--namespace", self.namespace, *arguments], text)

    def helm(self, *arguments: str) -> str:
        """Run helm in the namespace; what it printed."""
        return run(["helm", "--kube-context", self.context, "--namespace", self.namespace, *arguments])

    def objects(self, kinds: str, *arguments: str) -> list[Object]:
        """The namespace's objects of some kinds: `objects("pods,jobs", "--selector", "a=b")`."""
        found: list[Object] = json.loads(self.kubectl("get", kinds, "--output", "json", *arguments))["items"]
        return found

    @property
    def values(self) -> Path:
        """The folder with the values of its releases."""
        return ROOT / "helm" / "environments" / self.name


def resolve(name: str, context: str, namespace: str = "") -> Environment:
    """The environment of that name on the cluster of that context.

    Args:
        name: of a folder in k8s/overlays.
        context: the kubeconfig's name of the cluster.
        namespace: another one than its overlay's.

    Raises:
        ClusterError: there is no such environment or context, or the cluster does not answer.
    """
    known = sorted(path.name for path in OVERLAYS.iterdir() if not path.name.startswith("."))
    if name not in known:
        raise ClusterError(f"ENV={name} is unknown. There are {', '.join(known)}; {PAGE} says how to add one")
    contexts = run(["kubectl", "config", "get-contexts", "--output", "name"]).split()
    listed = f"There are: {', '.join(contexts)}" if contexts else "The kubeconfig has none"
    if not context:
        raise ClusterError(f"ENV={name} needs the name of its cluster: KUBE_CONTEXT=... {listed}")
    if context not in contexts:
        raise ClusterError(f"KUBE_CONTEXT={context} is not in the kubeconfig. {listed}")
    overlay = yaml.safe_load((OVERLAYS / name / "kustomization.yaml").read_text())
    found = Environment(name, context, namespace or overlay["namespace"])
    try:
        found.kubectl("get", "--raw", "/version", "--request-timeout=10s")
    except ClusterError as error:
        last = str(error).splitlines()[-1]
        raise ClusterError(f"The cluster of KUBE_CONTEXT={context} cannot be used: {last}") from None
    return found
