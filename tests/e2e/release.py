"""A release of a chart on the cluster, as a person has it: by helm, in a namespace of its own."""

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import yaml

from orchestration.settings import ROOT
from tests.cluster import binaries, images
from tests.cluster.namespace import Namespace
from tests.parts import free_port, wait_until

Object = dict[str, Any]


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
            options = ["--wait", "--wait-for-jobs", "--timeout", "5m"] if wait else []
            return self.helm(
                "upgrade", "--install", self.name, str(ROOT / "helm" / self.chart), "-f", file.name, *options
            )

    def secret(self, name: str, key: str) -> str:
        """The value of a Secret's key."""
        template = f'{{{{index .data "{key}" | base64decode}}}}'
        return self.namespace.kubectl("get", "secret", name, "-o", f"go-template={template}")

    def pods(self, component: str = "") -> list[Object]:
        """The release's pods, of one component or all."""
        selector = f"app.kubernetes.io/instance={self.name}"
        if component:
            selector += f",app.kubernetes.io/component={component}"
        found: list[Object] = json.loads(self.namespace.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

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
    def api(self, service: str, user: str | None) -> Iterator[httpx.Client]:
        """A client of the API behind a service, as USER:PASSWORD, through a port-forward."""
        port = free_port()
        command = ["kubectl", "--context", self.namespace.context, "-n", self.namespace.name]
        forward = subprocess.Popen(
            [*command, "port-forward", f"service/{service}", f"{port}:4200"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        auth = tuple(user.split(":", 1)) if user else None
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}/api", auth=auth, timeout=30) as client:  # type: ignore[arg-type]

                def answers() -> bool:
                    with contextlib.suppress(httpx.HTTPError):
                        return client.get("/health").status_code == 200
                    return False

                wait_until(answers, "the port-forward")
                yield client
        finally:
            forward.terminate()
            forward.wait(10)


def server_values(image: str) -> Object:
    """The least values of the server's chart on the cluster."""
    repository, _, tag = image.rpartition(":")

    def of(name: str) -> Object:
        repository, _, tag = name.rpartition(":")
        return {"repository": repository, "tag": tag}

    return {
        "image": {"repository": repository, "tag": tag},
        "database": {"bundled": {"image": of(images.POSTGRES)}},
        "redis": {"bundled": {"image": of(images.VALKEY)}},
    }
