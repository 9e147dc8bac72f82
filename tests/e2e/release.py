"""A release of a chart on the cluster, as a person has it: by helm, in a namespace of its own."""

import contextlib
import copy
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from orchestration.errors import ClusterError
from orchestration.operations.environment import Environment
from orchestration.operations.local_cluster import binaries, images
from orchestration.operations.local_cluster.turns import turn
from orchestration.operations.port_forward import connected
from orchestration.settings import ROOT
from tests.cluster.namespace import Namespace, make_restricted, remove
from tests.e2e.pace import HEARTBEAT_SECONDS, PREFETCH_SECONDS
from tests.parts import wait_until

Object = dict[str, Any]

RUN = os.environ.get("TESTS_RUN", "")
"""This run of pytest; tests/conftest.py sets it for all of its processes."""

SHARED = binaries.cache() / f"shared-{RUN}"
"""The context where this run's processes share namespaces, and whose turn it is to make one."""

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

    def deploy(self, values: Object, *, wait: bool = True) -> None:
        """Install the release or upgrade it, and wait until its pods are ready."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(values, file)
            file.flush()
            options = ["--wait", "--wait-for-jobs", "--timeout", "10m"] if wait else []
            self.helm("upgrade", "--install", self.name, str(ROOT / "helm" / self.chart), "-f", file.name, *options)

    def revision(self) -> str:
        """Return the release's newest revision."""
        history: list[Object] = json.loads(self.helm("history", self.name, "-o", "json"))
        return str(history[-1]["revision"])

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


@dataclass(frozen=True)
class Pool(Release):
    """A release of the work pool's chart, and the name of its pool on the server."""

    work_pool: str = "default"


def shared(context: str, name: str, install: Callable[[Namespace], object]) -> Namespace:
    """Return a namespace that all processes of this run of pytest share; the first that asks makes it.

    Args:
        context: of the cluster.
        name: the end of the namespace's name.
        install: fills the new namespace.
    """
    namespace = Namespace(context, f"shared-{RUN}-{name}")
    with turn(SHARED):
        SHARED.write_text(context)
        if not binaries.kubectl("--context", context, "get", "namespace", namespace.name, "--ignore-not-found"):
            make_restricted(namespace)
            namespace.kubectl("label", "namespace", namespace.name, f"tests/run={RUN}")
            try:
                install(namespace)
            except ClusterError:
                remove(namespace)
                raise
    return namespace


def remove_shared() -> None:
    """Remove the namespaces that this run's processes have shared."""
    if SHARED.exists():
        context = SHARED.read_text()
        names = ("get", "namespace", "--selector", f"tests/run={RUN}", "-o", "jsonpath={.items[*].metadata.name}")
        for name in binaries.kubectl("--context", context, *names).split():
            remove(Namespace(context, name))
        SHARED.unlink()


def shared_server(context: str, image: str) -> Release:
    """Return the server of all files whose tests leave it alone."""

    def release(namespace: Namespace) -> Release:
        return Release("prefect-server", "prefect-server", namespace)

    return release(shared(context, "server", lambda made: release(made).deploy(server_values(image))))


def installed_pool(server: Release, namespace: Namespace, values: Object, probe: Object) -> Pool:
    """Install a work pool in a namespace, whose runs have the probe's flow."""
    namespace.apply(probe)
    if namespace != server.namespace:
        give_access(server, namespace)
    name = values.get("pool", {}).get("name", "default")
    pool = Pool("prefect-work-pool", "prefect-work-pool", namespace, work_pool=name)
    pool.deploy(values)
    return pool


def merged(values: Object, change: Object) -> Object:
    """Return a copy of values with a change, as helm merges a second file of values."""
    made = dict(values)
    for key, each in change.items():
        both = isinstance(each, dict) and isinstance(made.get(key), dict)
        made[key] = merged(made[key], each) if both else copy.deepcopy(each)
    return made


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


def give_access(server: Release, namespace: Namespace) -> None:
    """Copy the Secret with the server's USER:PASSWORD into another namespace."""
    value = {"auth-string": server.secret("prefect-server-auth", "auth-string")}
    metadata = {"name": "prefect-server-auth"}
    namespace.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": value})


def joining(server: Release, work_pool: str) -> Object:
    """Return the values of a pool of that name, for a server in another namespace."""
    labels = {"kubernetes.io/metadata.name": server.namespace.name}
    return {
        "api": {"url": f"http://prefect-server-api.{server.namespace.name}:4200/api"},
        "networkPolicy": {"api": {"namespaceLabels": labels}},
        "pool": {"name": work_pool},
    }


def pool_values(image: str) -> Object:
    """The least values of the work pool's chart on the cluster, for runs that find the probe's flow in /probe."""
    return {
        "image": _image(image),
        "worker": {
            "heartbeatSeconds": HEARTBEAT_SECONDS,
            "prefetchSeconds": PREFETCH_SECONDS,
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
