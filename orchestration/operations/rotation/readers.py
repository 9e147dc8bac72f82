"""The pods that read a Secret as environment variables. They have its values of their start until they end."""

import json
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from time import sleep

from orchestration.operations import namespace_of_runs
from orchestration.operations.environment import RELEASES, Environment, Object
from orchestration.operations.release_diagnosis import release_selector
from orchestration.operations.rotation.rotated_secret import RotatedSecret
from orchestration.progress import step
from orchestration.protocol import RUN_LABEL

COMPONENT_LABEL, NAME_LABEL = "app.kubernetes.io/component", "app.kubernetes.io/name"

ROLLOUT_LIMIT = "10m"
"""How long a Deployment may take to replace its pods, as kubectl takes it."""

POLL_SECONDS = 2.0

MAX_NAMES = 3
"""How many pods a line of progress names."""


def reads(spec: Object, secret: str) -> bool:
    """Return whether a container of a pod has a variable of the Secret."""
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        references = [variable.get("valueFrom", {}).get("secretKeyRef", {}) for variable in container.get("env", [])]
        references += [source.get("secretRef", {}) for source in container.get("envFrom", [])]
        if any(reference.get("name") == secret for reference in references):
            return True
    return False


def restart(
    environment: Environment, secret: RotatedSecret, also: tuple[str, ...] = (), only: tuple[str, ...] = ()
) -> None:
    """Restart the Deployments of the releases that read the Secret, and wait for each. Those that have are skipped.

    The API comes first: the others call it.

    Args:
        environment: the environment.
        secret: the Secret, with its new values.
        also: components that read the Secret as a file, once at their start.
        only: restart these components alone; empty for all.
    """
    deployments = [
        found
        for release in RELEASES
        for found in environment.objects("deployments", "--selector", release_selector(release))
        if reads(found["spec"]["template"]["spec"], secret.name) or component(found) in also
        if not _is_database(found) and (not only or component(found) in only)
    ]
    for deployment in sorted(deployments, key=lambda found: component(found) != "api"):
        name = deployment["metadata"]["name"]
        with step(f"Restarting {name}", "30 s"):
            template = {"metadata": {"annotations": {secret.pod_annotation: secret.rotation}}}
            patch = json.dumps({"spec": {"template": template}})
            environment.kubectl("patch", "deployment", name, "--type=merge", f"--patch={patch}")
            environment.kubectl("rollout", "status", f"deployment/{name}", f"--timeout={ROLLOUT_LIMIT}")


def component(found: Object) -> str:
    """Return the component of a release's object; empty for other objects."""
    return str(found["metadata"].get("labels", {}).get(COMPONENT_LABEL, ""))


def _is_database(found: Object) -> bool:
    """Return whether an object is a bundled database, which reads the password but does not log in with it."""
    return (
        component(found) in ("database", "redis") or found["metadata"].get("labels", {}).get(NAME_LABEL) == "warehouse"
    )


def holders(environment: Environment, secret: RotatedSecret) -> list[str]:
    """Return the pods that may have the Secret's old values, runs in progress among them."""
    return [
        pod["metadata"]["name"]
        for pod in environment.objects("pods")
        if pod["status"].get("phase") not in ("Succeeded", "Failed")
        if reads(pod["spec"], secret.name) and not _is_database(pod)
        if pod["metadata"].get("annotations", {}).get(secret.pod_annotation) != secret.rotation
        if datetime.fromisoformat(pod["metadata"]["creationTimestamp"]) <= secret.changed
    ]


def unfinished_jobs_of_runs(environment: Environment) -> Iterator[Object]:
    """Yield the Jobs of runs that have not ended."""
    for job in environment.objects("jobs", "--selector", RUN_LABEL):
        if not namespace_of_runs.is_finished(job):
            yield job


def wait_until_none(find: Callable[[], list[str]]) -> None:
    """Wait until a search for pods or Jobs with the old values finds none. Print what it finds when that changes."""
    shown: list[str] = []
    while found := sorted(find()):
        if found != shown:
            more = f" and {len(found) - MAX_NAMES} more" if len(found) > MAX_NAMES else ""
            print(
                f"Waiting for the end of what started with the old value, which stays valid: "
                f"{', '.join(found[:MAX_NAMES])}{more}",
                file=sys.stderr,
                flush=True,
            )
            shown = found
        sleep(POLL_SECONDS)
