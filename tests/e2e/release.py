"""A release of a chart on the cluster, as a person has it: by helm, in a namespace of its own."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from orchestration.environment.api import connected
from orchestration.environment.target import Environment
from orchestration.settings import ROOT
from tests.cluster import binaries, images
from tests.cluster.namespace import Namespace
from tests.cluster.turns import turn
from tests.parts import wait_until

Object = dict[str, Any]

SMALL: Object = {"cpu": "10m", "memory": "200Mi"}
"""What a pod of these tests asks for: on a full node it would go for an environment beside it, which has priority."""


@dataclass(frozen=True)
class Release:
    """A chart, installed under a name in a namespace."""

    chart: str
    name: str
    namespace: Namespace

    def helm(self, *arguments: str) -> str:
        """Run helm in the release's namespace; what it printed."""
        return binaries.helm("--kube-context", self.namespace.context, "-n", self.namespace.name, *arguments)

    def deploy(self, values: Object, *, wait: bool = True) -> str:
        """Install the release or upgrade it, and wait until its pods are ready."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(values, file)
            file.flush()
            options = ["--wait", "--wait-for-jobs", "--timeout", "10m"] if wait else []
            return self.helm(
                "upgrade", "--install", self.name, str(ROOT / "helm" / self.chart), "-f", file.name, *options
            )

    def secret(self, name: str, key: str) -> str:
        """The value of a Secret's key."""
        template = f'{{{{index .data "{key}" | base64decode}}}}'
        return self.namespace.kubectl("get", "secret", name, "-o", f"go-template={template}")

    def pods(self, component: str = "", *, ending: bool = False) -> list[Object]:
        """The release's pods, of one component or all; with those that are told to go or without."""
        selector = f"app.kubernetes.io/instance={self.name}"
        if component:
            selector += f",app.kubernetes.io/component={component}"
        found: list[Object] = json.loads(self.namespace.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        return [pod for pod in found if ending or not pod["metadata"].get("deletionTimestamp")]

    def one_worker(self) -> None:
        """Wait until there is one: one of before that has not yet heard that it is to go claims runs as before."""
        wait_until(lambda: len(self.pods("worker", ending=True)) == 1, "the worker of before to go", 90)

    def restarts(self) -> dict[str, int]:
        """How often each pod's containers were started again."""
        return {
            pod["metadata"]["name"]: sum(
                status["restartCount"]
                for status in [
                    *pod["status"].get("containerStatuses", []),
                    *pod["status"].get("initContainerStatuses", []),
                ]
            )
            for pod in self.pods()
        }

    @contextlib.contextmanager
    def api(self) -> Iterator[httpx.Client]:
        """A client of the API of the namespace's server, with its password."""
        with connected(Environment("test", self.namespace.context, self.namespace.name)) as client:
            yield client


def built_image() -> str:
    """The image of this checkout, built and pushed to where the cluster pulls from; its name."""
    with turn(binaries.cache() / "image.lock"):
        pushed = subprocess.run([ROOT / "docker" / "build", "--push"], stdout=subprocess.PIPE, text=True, check=True)
    return pushed.stdout.strip()


def server_values(image: str) -> Object:
    """The least values of the server's chart on the cluster."""
    small = {
        component: {"resources": {"requests": dict(SMALL), "limits": {"memory": "1Gi"}}}
        for component in ("api", "services", "migrations")
    }
    return {"image": _image(image)} | small | _databases()


def pool_values(image: str) -> Object:
    """The least values of the work pool's chart on the cluster, for runs that find the probe's flow in /probe."""
    return {
        "image": _image(image),
        "worker": {
            "querySeconds": 2,
            "prefetchSeconds": 5,
            "resources": {"requests": dict(SMALL), "limits": {"memory": "768Mi"}},
        },
        "reconciler": {"replicas": 1, "resources": {"requests": dict(SMALL), "limits": {"memory": "256Mi"}}},
        "drift": {"everySeconds": 10, "resources": {"requests": dict(SMALL), "limits": {"memory": "512Mi"}}},
        "runs": {
            "resources": {"requests": dict(SMALL), "limits": {"memory": "700Mi"}},
            "pod": {
                "volumes": [{"name": "probe", "configMap": {"name": "probe"}}],
                "volumeMounts": [{"name": "probe", "mountPath": "/probe"}],
            },
        },
    }


def probe_of(file: Path) -> Object:
    """The ConfigMap with a probe's flow."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "probe"},
        "data": {"flow.py": file.read_text()},
    }


def _databases() -> Object:
    return {
        "database": {"bundled": {"image": _image(images.POSTGRES)}},
        "redis": {"bundled": {"image": _image(images.VALKEY)}},
    }


def _image(name: str) -> Object:
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}
