"""Releases of the charts on a cluster: install them by helm, in namespaces that tests own or share."""

import contextlib
import copy
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from orchestration.operations.environment import Environment
from orchestration.operations.local_cluster import binaries, images
from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.operations.port_forward import api_client
from orchestration.settings import ROOT
from tests.cluster.namespace import Namespace, make_restricted, remove
from tests.e2e.pace import DRIFT_SECONDS, LATE_LOOP_SECONDS, PREFETCH_SECONDS
from tests.parts import wait_until

Object = dict[str, Any]

TEST_RUN = os.environ.get("TESTS_RUN", "")
"""The id of this run of pytest. tests/conftest.py sets it for all processes of the run."""

SHARED_CONTEXT_FILE = binaries.cache() / f"shared-{TEST_RUN}"
"""Holds the context in which this run's processes share namespaces, and is the lock for creating one."""

SMALL_REQUESTS: Object = {"cpu": "10m", "memory": "200Mi"}
"""Resource requests of a test's pod. With more, the pods of a `make up` environment on the same small node, which have
priority, would preempt it."""


CALM_SERVICES: Object = {
    f"PREFECT_SERVER_SERVICES_{name}_LOOP_SECONDS": LATE_LOOP_SECONDS
    for name in ("LATE_RUNS", "PAUSE_EXPIRATIONS", "CLEANUP_RECONCILER")
}
"""Settings of background services that no test on the cluster waits for."""


@dataclass(frozen=True)
class Release:
    """A release of a chart: its name and namespace, the checkout with the chart, and what tests do with it."""

    chart: str
    name: str
    namespace: Namespace
    checkout: Path = field(default=ROOT, kw_only=True)

    def helm(self, *arguments: str) -> str:
        """Run helm in the release's namespace and return its output."""
        return binaries.helm("--kube-context", self.namespace.context, "-n", self.namespace.name, *arguments)

    def deploy(self, values: Object, *, wait: bool = True) -> None:
        """Install or upgrade the release; with `wait`, until its pods are ready and its Jobs have completed."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            yaml.safe_dump(values, file)
            file.flush()
            options = ["--wait", "--wait-for-jobs", "--timeout", "10m"] if wait else []
            self.helm(
                "upgrade", "--install", self.name, str(self.checkout / "helm" / self.chart), "-f", file.name, *options
            )

    def revision(self) -> str:
        """Return the release's newest revision."""
        history: list[Object] = json.loads(self.helm("history", self.name, "-o", "json"))
        return str(history[-1]["revision"])

    def secret(self, name: str, key: str) -> str:
        """Return the value of a Secret's key."""
        template = f'{{{{index .data "{key}" | base64decode}}}}'
        return self.namespace.kubectl("get", "secret", name, "-o", f"go-template={template}")

    def pods(self, component: str = "", *, terminating: bool = False) -> list[Object]:
        """Return the release's pods.

        Args:
            component: the component's name; empty for all components.
            terminating: whether pods that are being deleted are included.
        """
        selector = f"app.kubernetes.io/instance={self.name}"
        if component:
            selector += f",app.kubernetes.io/component={component}"
        found: list[Object] = json.loads(self.namespace.kubectl("get", "pods", "-l", selector, "-o", "json"))["items"]
        return [pod for pod in found if terminating or not pod["metadata"].get("deletionTimestamp")]

    def wait_for_one_worker(self) -> None:
        """Wait until only one worker is left: a terminating worker claims runs until it receives its signal."""
        wait_until(lambda: len(self.pods("worker", terminating=True)) == 1, "the previous worker to be gone")

    def restarts(self) -> dict[str, int]:
        """Return the number of container restarts by pod name."""
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
        """Yield a client of the Prefect API in the release's namespace, authenticated with its password."""
        with api_client(Environment("test", self.namespace.context, self.namespace.name)) as client:
            yield client


@dataclass(frozen=True)
class Pool(Release):
    """A release of the work pool's chart, the name of its work pool on the server, and the value `runs.namespace`."""

    work_pool: str = "default"
    namespace_of_runs: str = ""

    @property
    def runs_namespace(self) -> Namespace:
        """The namespace of the runs."""
        return Namespace(self.namespace.context, self.namespace_of_runs or self.namespace.name)


def shared_namespace(context: str, name: str, install: Callable[[Namespace], object]) -> Namespace:
    """Return a namespace that all processes of this run of pytest share; the first caller creates it.

    Args:
        context: the cluster's context.
        name: the last part of the namespace's name.
        install: installs the releases in the new namespace.

    Raises:
        ClusterError: `install` failed. The namespace is removed again, as after any other error.
    """
    namespace = Namespace(context, f"shared-{TEST_RUN}-{name}")
    with hold_lock(SHARED_CONTEXT_FILE):
        SHARED_CONTEXT_FILE.write_text(context)
        if not binaries.kubectl("--context", context, "get", "namespace", namespace.name, "--ignore-not-found"):
            make_shared(namespace)
            try:
                install(namespace)
            except BaseException:
                remove(namespace)
                raise
    return namespace


def make_shared(namespace: Namespace) -> None:
    """Create a namespace that is removed at the end of this run of pytest."""
    make_restricted(namespace)
    namespace.kubectl("label", "namespace", namespace.name, f"tests/run={TEST_RUN}")


def remove_shared_namespaces() -> None:
    """Remove the namespaces that the processes of this run share."""
    if SHARED_CONTEXT_FILE.exists():
        context = SHARED_CONTEXT_FILE.read_text()
        names = ("get", "namespace", "--selector", f"tests/run={TEST_RUN}", "-o", "jsonpath={.items[*].metadata.name}")
        for name in binaries.kubectl("--context", context, *names).split():
            remove(Namespace(context, name))
        SHARED_CONTEXT_FILE.unlink()


def shared_server(context: str, image: str) -> Release:
    """Return the server that test files share if they do not disturb it; install it if need be."""

    def release(namespace: Namespace) -> Release:
        return Release("prefect-server", "prefect-server", namespace)

    return release(
        shared_namespace(context, "server", lambda namespace: release(namespace).deploy(calm_server_values(image)))
    )


def install_pool(server: Release, namespace: Namespace, values: Object, probe: Object, checkout: Path = ROOT) -> Pool:
    """Install a work pool whose runs find the probe's flow in /probe, and wait until it is ready."""
    if namespace != server.namespace:
        copy_credentials(server, namespace)
    name = values.get("pool", {}).get("name", "default")
    elsewhere = values["runs"].get("namespace", "")
    pool = Pool("prefect-work-pool", "prefect-work-pool", namespace, name, elsewhere, checkout=checkout)
    pool.runs_namespace.apply(probe)
    pool.deploy(values)
    return pool


def merge_values(values: Object, change: Object) -> Object:
    """Return a copy of `values` with `change` merged in, as helm merges a second values file."""
    result = dict(values)
    for key, value in change.items():
        both_are_mappings = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge_values(result[key], value) if both_are_mappings else copy.deepcopy(value)
    return result


def build_image(checkout: Path = ROOT) -> str:
    """Build a checkout's image, push it to the registry that the cluster pulls from, and return its name."""
    with hold_lock(binaries.cache() / "image.lock"):
        pushed = subprocess.run(
            [checkout / "docker" / "build", "--push"], stdout=subprocess.PIPE, text=True, check=True
        )
    return pushed.stdout.strip()


def server_values(image: str) -> Object:
    """Return the minimal values of the server's chart for tests."""
    small = {
        component: {"resources": {"requests": dict(SMALL_REQUESTS), "limits": {"memory": "1Gi"}}}
        for component in ("api", "services", "migrations")
    }
    return {"image": image_values(image)} | small | _databases()


def calm_server_values(image: str) -> Object:
    """Return the values of a server whose background services take less of the processor from other tests."""
    return merge_values(server_values(image), {"services": {"settings": CALM_SERVICES}})


def copy_credentials(server: Release, namespace: Namespace) -> None:
    """Copy the credentials that a pool needs into another namespace, without those of people."""
    name = "prefect-server-api-roles"
    data = json.loads(server.namespace.kubectl("get", "secret", name, "-o", "json"))["data"]
    del data["viewer"]
    namespace.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data})


def connection_values(server: Release, work_pool: str) -> Object:
    """Return the values that connect a pool with this name to a server in another namespace."""
    labels = {"kubernetes.io/metadata.name": server.namespace.name}
    return {
        "api": {"url": f"http://prefect-server-api.{server.namespace.name}:4200/api"},
        "networkPolicy": {"api": {"namespaceLabels": labels}},
        "pool": {"name": work_pool},
    }


def pool_values(image: str) -> Object:
    """Return the minimal values of the work pool's chart for tests; its runs find the probe's flow in /probe."""
    return {
        "image": image_values(image),
        "worker": {
            "prefetchSeconds": PREFETCH_SECONDS,
            "resources": {"requests": dict(SMALL_REQUESTS), "limits": {"memory": "768Mi"}},
        },
        "reconciler": {"replicas": 1, "resources": {"requests": dict(SMALL_REQUESTS), "limits": {"memory": "256Mi"}}},
        "drift": {
            "everySeconds": DRIFT_SECONDS,
            "resources": {"requests": dict(SMALL_REQUESTS), "limits": {"memory": "512Mi"}},
        },
        "runs": {
            "resources": {"requests": dict(SMALL_REQUESTS), "limits": {"memory": "700Mi"}},
            "pod": {
                "volumes": [{"name": "probe", "configMap": {"name": "probe"}}],
                "volumeMounts": [{"name": "probe", "mountPath": "/probe"}],
            },
        },
    }


def probe_config_map(file: Path) -> Object:
    """Return the ConfigMap that holds a probe's flow."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "probe"},
        "data": {"flow.py": file.read_text()},
    }


def _databases() -> Object:
    return {
        "database": {"bundled": {"image": image_values(images.POSTGRES)}},
        "pgbouncer": {"image": image_values(images.PGBOUNCER)},
        "redis": {"bundled": {"image": image_values(images.VALKEY)}},
    }


def image_values(name: str) -> Object:
    """Return the value `image` for the name of an image."""
    repository, _, tag = name.rpartition(":")
    return {"repository": repository, "tag": tag}
