"""A namespace of a real cluster, and what a test does in it."""

import contextlib
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, images
from tests.parts import wait_until

RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""A container's security context at the `restricted` Pod Security Standard."""


USED: set[str] = set()
"""Names of the namespaces that this process' tests use: what their pods cost is theirs (tests/reporting.py)."""


@dataclass(frozen=True)
class Namespace:
    """A namespace of the cluster and what a test does in it."""

    context: str
    name: str

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        """Run kubectl in the namespace; what it printed."""
        return binaries.kubectl("--context", self.context, "-n", self.name, *arguments, text=text)

    def apply(self, *objects: dict[str, Any]) -> None:
        """Create or change objects of the namespace."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", text=json.dumps(listed))

    def pod(self, name: str, *command: str, ready: bool = True, **spec: Any) -> None:
        """Start a pod that runs `command`, not as root; wait until it is ready.

        Among `spec`, `labels` are the pod's beside `app: NAME`, and `container` wins over its container's fields.
        """
        container = {
            "name": "main",
            "image": images.BASE,
            "command": list(command) or ["sleep", "600"],
            "securityContext": RESTRICTED,
            "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "128Mi"}},
        } | spec.pop("container", {})
        defaults = {"containers": [container], "terminationGracePeriodSeconds": 0, "enableServiceLinks": False}
        metadata = {"name": name, "labels": {"app": name} | spec.pop("labels", {})}
        self.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": defaults | spec})
        if ready:
            self.kubectl("wait", "--for=condition=Ready", f"pod/{name}", "--timeout=300s")

    def serve(self) -> None:
        """Start a web server, the pod `server` behind a service of that name."""
        ports = [{"name": "http", "port": 80, "targetPort": 8000}]
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "server"},
                "spec": {"selector": {"app": "server"}, "ports": ports},
            }
        )
        command = ["python3", "-m", "http.server", "8000", "--directory", "/usr/share/doc"]
        probe = {"readinessProbe": {"tcpSocket": {"port": 8000}, "periodSeconds": 1}}
        container = {"image": images.BASE, "name": "main", "command": command, "securityContext": RESTRICTED}
        self.pod("server", containers=[container | probe])

    def python(self, pod: str, code: str) -> str:
        """Run Python code in a pod; what it printed."""
        return self.kubectl("exec", pod, "--", "python3", "-c", code)

    def connects(self, pod: str, host: str, port: int) -> bool:
        """Whether a connection from the pod is accepted."""
        code = f"import socket; socket.create_connection(({host!r}, {port}), 2)"
        try:
            self.python(pod, code)
        except ClusterError as error:
            if not re.search("TimeoutError|ConnectionRefused|timed out|gaierror|unreachable", str(error)):
                raise
            return False
        return True


def make(namespace: Namespace) -> None:
    """Create a namespace, and wait until pods may be made in it."""
    binaries.kubectl("--context", namespace.context, "create", "namespace", namespace.name)
    account = ("get", "serviceaccount", "default", "--ignore-not-found", "-o", "name")
    wait_until(lambda: namespace.kubectl(*account), "the service account without which no pod may be made")


def make_restricted(namespace: Namespace) -> None:
    """Create a namespace that enforces the restricted standard."""
    make(namespace)
    namespace.kubectl("label", "namespace", namespace.name, "pod-security.kubernetes.io/enforce=restricted")


@contextlib.contextmanager
def new(context: str, prefix: str, create: Callable[[Namespace], None] = make) -> Iterator[Namespace]:
    """A new namespace; deleted afterwards, with all that is in it."""
    made = Namespace(context, f"{prefix}-{uuid4().hex[:8]}")
    USED.add(made.name)
    try:
        create(made)
        yield made
    finally:
        remove(made)


def remove(namespace: Namespace) -> None:
    """Delete a namespace, and what releases in it have in the whole cluster."""
    kinds = "clusterrole,clusterrolebinding,validatingadmissionpolicy,validatingadmissionpolicybinding"
    of_cluster = (kinds, "-l", f"prefect.io/release-namespace={namespace.name}")
    binaries.kubectl("--context", namespace.context, "delete", *of_cluster)
    delete = ("delete", "namespace", namespace.name, "--wait=false", "--ignore-not-found")
    binaries.kubectl("--context", namespace.context, *delete)


@contextlib.contextmanager
def restricted(context: str, prefix: str) -> Iterator[Namespace]:
    """A new namespace that enforces the restricted standard; deleted afterwards, with all that is in it."""
    with new(context, prefix, make_restricted) as made:
        yield made


@contextlib.contextmanager
def proxied(context: str) -> Iterator[str]:
    """The URL of the cluster's API on loopback, which asks for no credentials there, while the block lasts."""
    command = [binaries.kubectl_program(), "--context", context, "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as proxy:
        assert proxy.stdout
        try:
            yield f"http://{proxy.stdout.readline().split()[-1]}"
        finally:
            proxy.terminate()


def network_policy(name: str, pod: str | None = None, **rules: list[dict[str, Any]]) -> dict[str, Any]:
    """A NetworkPolicy for the pods labelled `app: POD`: `network_policy("name", "server", ingress=[...])`."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {
            "podSelector": {"matchLabels": {"app": pod}} if pod else {},
            "policyTypes": [direction.capitalize() for direction in rules],
            **rules,
        },
    }
