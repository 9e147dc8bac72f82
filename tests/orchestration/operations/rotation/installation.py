"""An installation on a Kubernetes API server without nodes. This module plays the kubelet and the Deployments."""

import base64
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orchestration.operations.environment import Environment, Object
from orchestration.operations.local_cluster import binaries
from orchestration.settings import ROOT
from tests.cluster import apiserver

KUBECTL = Environment.kubectl

WRITES = ("create", "patch", "annotate", "exec", "rollout")
"""Commands of kubectl that change something. The tests interrupt a rotation before each."""


class Interrupted(BaseException):
    """The person has ended the command."""


class Pod:
    """A pod with the values of its Secrets at its start.

    Args:
        name: its name.
        namespace: its namespace.
        component: the component of the release; empty for a run.
        variables: its environment variables.
    """

    def __init__(self, name: str, namespace: str, component: str, variables: dict[str, str]) -> None:
        self.name = name
        self.namespace = namespace
        self.component = component
        self.variables = variables


class Installation:
    """Installs the releases, starts pods, and executes commands in pods.

    Args:
        kubernetes: the API server. What the kubelet would do is asked of it without kubectl, whose start costs more.
    """

    def __init__(self, kubernetes: apiserver.ApiServer) -> None:
        self._kubernetes = kubernetes
        self.environment = Environment("local", "alone", apiserver.NAMESPACE)
        self.pods: list[Pod] = []
        self.execute: Callable[[str, list[str], str], str] = lambda *_: ""
        """Executes a command in a pod and returns its output."""
        self.after_start: Callable[[Pod], None] = lambda _: None
        self.after_end: Callable[[Pod], None] = lambda _: None
        self.interrupted_write = -1
        """Before which write the command ends; -1 for none."""
        self._number = 0

    def kubectl(self, environment: Environment, *arguments: str, text: str | None = None) -> str:
        """Run kubectl, except for what needs a node."""
        if arguments[0] in WRITES:
            if self.interrupted_write == 0:
                raise Interrupted
            self.interrupted_write -= 1
        if arguments[0] == "exec":
            at = arguments.index("--")
            pod = next(word for word in arguments[1:at] if not word.startswith("-"))
            return self.execute(pod, list(arguments[at + 1 :]), text or "")
        if arguments[:2] == ("rollout", "status"):
            self.roll(arguments[2].removeprefix("deployment/"))
            return ""
        return KUBECTL(environment, *arguments, text=text)

    def install(self, release: str, *options: str) -> None:
        """Install or upgrade a release, without hooks, as no controller runs them."""
        chart = str(ROOT / "helm" / release)
        self.environment.helm(
            "upgrade", "--install", release, chart, "--set-string=image.tag=1", "--no-hooks", *options
        )

    def secret(self, name: str, namespace: str = apiserver.NAMESPACE) -> dict[str, str]:
        """Return the values of a Secret."""
        found = self._get(f"/api/v1/namespaces/{namespace}/secrets/{name}")
        return {key: base64.b64decode(value).decode() for key, value in found["data"].items()}

    def _get(self, path: str) -> Object:
        found: Object = self._kubernetes.client.get(path).raise_for_status().json()
        return found

    def is_rotated(self, name: str) -> bool:
        """Return whether a rotation of the Secret is in progress."""
        return "prefect.io/rotation" in self.environment.kubectl("get", "secret", name, "--output", "json")

    def roll(self, deployment: str) -> None:
        """Replace the pod of a Deployment, unless it has its template: the new pod starts before the old one ends."""
        found = self._get(f"/apis/apps/v1/namespaces/{apiserver.NAMESPACE}/deployments/{deployment}")
        template = found["spec"]["template"]
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        former = [pod for pod in self.pods if pod.component == component]
        key = json.dumps(template, sort_keys=True)
        if former and former[-1].variables["TEMPLATE"] == key:
            return
        pod = self.start(template, component)
        pod.variables["TEMPLATE"] = key
        for pod in former:
            self.end(pod)

    def start(self, template: Object, component: str = "", namespace: str = apiserver.NAMESPACE) -> Pod:
        """Start a pod with the present values of its Secrets."""
        self._number += 1
        name = f"{component or 'run'}-{self._number}"
        variables = {}
        secrets: dict[str, dict[str, str]] = {}
        for entry in template["spec"]["containers"][0].get("env", []):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                if reference["name"] not in secrets:
                    secrets[reference["name"]] = self.secret(reference["name"], namespace)
                variables[entry["name"]] = secrets[reference["name"]][reference["key"]]
            else:
                variables[entry["name"]] = entry.get("value", "")
        metadata = {"name": name, **{key: template["metadata"].get(key, {}) for key in ("labels", "annotations")}}
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        pods, client = f"/api/v1/namespaces/{namespace}/pods", self._kubernetes.client
        client.post(pods, json=manifest).raise_for_status()
        running = json.dumps({"status": {"phase": "Running"}})
        content = {"Content-Type": "application/merge-patch+json"}
        client.patch(f"{pods}/{name}/status", content=running, headers=content).raise_for_status()
        pod = Pod(name, namespace, component, variables)
        self.after_start(pod)
        self.pods.append(pod)
        return pod

    def end(self, pod: Pod) -> None:
        self.pods.remove(pod)
        path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}"
        self._kubernetes.client.delete(path, params={"gracePeriodSeconds": 0}).raise_for_status()
        self.after_end(pod)

    def run_pod(self, *secrets: tuple[str, str, str], namespace: str = apiserver.NAMESPACE) -> Pod:
        """Start the pod of a flow run with variables of Secrets: (variable, Secret, key)."""
        env = [
            {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key}}}
            for variable, name, key in secrets
        ]
        container = {"name": "prefect-job", "image": "none", "env": env}
        template = {"metadata": {"labels": {"prefect.io/flow-run-id": "id"}}, "spec": {"containers": [container]}}
        return self.start(template, namespace=namespace)


def installed(kubernetes: apiserver.ApiServer, *releases: str) -> Iterator[Installation]:
    """Yield an installation of releases, with a pod of each Deployment, and clear the API server at the end."""
    with contextlib.ExitStack() as stack:
        stack.callback(kubernetes.clear)
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("KUBECONFIG", str(kubernetes.folder / "kubeconfig"))
        binaries.program("helm")  # builds it if it is missing
        patch.setenv("PATH", ":".join([os.environ["PATH"], *map(str, binaries.folders())]))
        for variable, value in binaries.SHORT_LIVED.items():
            patch.setenv(variable, value)
        installation = Installation(kubernetes)
        kubectl: Any = lambda environment, *arguments, text=None: installation.kubectl(  # noqa: E731 - a method
            environment, *arguments, text=text
        )
        patch.setattr(Environment, "kubectl", kubectl)
        for release in releases:
            installation.install(release)
        yield installation
