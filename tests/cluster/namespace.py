"""A namespace of a real cluster, and the operations of tests in it."""

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
from tests.parts import end_process, wait_until

RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
"""Security context of a container at the Pod Security Standard `restricted`."""


USED: set[str] = set()
"""Names of the namespaces of this process' tests, which are charged for the pods in them (tests/reporting.py)."""


@dataclass(frozen=True)
class Namespace:
    """Creates and inspects objects of one namespace.

    Args:
        context: the kubeconfig context of the cluster.
        name: the namespace.
    """

    context: str
    name: str

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        """Run kubectl in the namespace and return its standard output."""
        return binaries.kubectl("--context", self.context, "-n", self.name, *arguments, text=text)

    def apply(self, *objects: dict[str, Any]) -> None:
        """Create or change objects of the namespace."""
        listed = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self.kubectl("apply", "-f", "-", text=json.dumps(listed))

    @contextlib.contextmanager
    def without(self, kind: str, name: str) -> Iterator[None]:
        """Delete an object while the block lasts, and create it again afterwards."""
        found = json.loads(self.kubectl("get", kind, name, "-o", "json"))
        self.kubectl("delete", kind, name)
        try:
            yield
        finally:
            self.apply({key: value for key, value in found.items() if key != "status"})

    def pod(self, name: str, *command: str, ready: bool = True, **spec: Any) -> None:
        """Start a pod that runs a command as a user other than root.

        Args:
            name: the name of the pod, and the value of its label `app`.
            command: the command; by default `sleep 600`.
            ready: wait until the pod is ready.
            spec: fields of the pod, as `pod_object` takes them.
        """
        self.apply(pod_object(name, *command, **spec))
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

    @contextlib.contextmanager
    def forwarded(self, target: str, port: int) -> Iterator[int]:
        """Forward a port of this machine to a pod or a Service while the block lasts, and yield the port.

        Args:
            target: `pod/NAME` or `service/NAME`.
            port: the port of the target.
        """
        command = [binaries.kubectl_program(), "--context", self.context, "-n", self.name, "port-forward", target]
        with subprocess.Popen([*command, f":{port}"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            try:
                line = process.stdout.readline()
                found = re.search(r"127\.0\.0\.1:(\d+)", line)
                assert found, f"no port leads to {target}: {line}"
                yield int(found[1])
            finally:
                end_process(process)

    def python(self, pod: str, code: str) -> str:
        """Run Python code in a pod and return its standard output."""
        return self.kubectl("exec", pod, "--", "python3", "-c", code)

    def connects(self, pod: str, host: str, port: int) -> bool:
        """Return whether a port accepts a connection from the pod."""
        code = f"import socket; socket.create_connection(({host!r}, {port}), 2)"
        try:
            self.python(pod, code)
        except ClusterError as error:
            if not re.search("TimeoutError|ConnectionRefused|timed out|gaierror|unreachable", str(error)):
                raise
            return False
        return True


def pod_object(name: str, *command: str, **spec: Any) -> dict[str, Any]:
    """Return a pod that runs a command as a user other than root.

    Args:
        name: the name of the pod, and the value of its label `app`.
        command: the command; by default `sleep 600`.
        spec: fields of the pod. `labels` adds labels, and `container` overrides fields of its container.
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
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": defaults | spec}


def make(namespace: Namespace) -> None:
    """Create a namespace, and wait until pods can be created in it."""
    binaries.kubectl("--context", namespace.context, "create", "namespace", namespace.name)
    account = ("get", "serviceaccount", "default", "--ignore-not-found", "-o", "name")
    wait_until(lambda: namespace.kubectl(*account), "the default service account, which pods need")


def make_restricted(namespace: Namespace) -> None:
    """Create a namespace that enforces the restricted standard."""
    make(namespace)
    namespace.kubectl("label", "namespace", namespace.name, "pod-security.kubernetes.io/enforce=restricted")


@contextlib.contextmanager
def new(context: str, prefix: str, create: Callable[[Namespace], None] = make) -> Iterator[Namespace]:
    """Yield a new namespace; delete it afterwards with everything in it."""
    made = Namespace(context, f"{prefix}-{uuid4().hex[:8]}")
    USED.add(made.name)
    try:
        create(made)
        yield made
    finally:
        remove(made)


def remove(namespace: Namespace) -> None:
    """Delete a namespace, and the cluster-wide objects of releases in it."""
    kinds = "clusterrole,clusterrolebinding,validatingadmissionpolicy,validatingadmissionpolicybinding"
    of_cluster = (kinds, "-l", f"prefect.io/release-namespace={namespace.name}")
    binaries.kubectl("--context", namespace.context, "delete", *of_cluster)
    delete = ("delete", "namespace", namespace.name, "--wait=false", "--ignore-not-found")
    binaries.kubectl("--context", namespace.context, *delete)


@contextlib.contextmanager
def restricted(context: str, prefix: str) -> Iterator[Namespace]:
    """Yield a new namespace that enforces the restricted standard; delete it afterwards with everything in it."""
    with new(context, prefix, make_restricted) as made:
        yield made


@contextlib.contextmanager
def proxied(context: str) -> Iterator[str]:
    """Yield the URL of a proxy on loopback, which reaches the cluster's API without credentials."""
    command = [binaries.kubectl_program(), "--context", context, "proxy", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as proxy:
        assert proxy.stdout
        try:
            yield f"http://{proxy.stdout.readline().split()[-1]}"
        finally:
            end_process(proxy)


def network_policy(name: str, pod: str | None = None, **rules: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a NetworkPolicy for the pods labelled `app: POD`: `network_policy("name", "server", ingress=[...])`."""
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
