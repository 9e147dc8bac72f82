"""Move the runs of an environment to another namespace, without losing those in progress.

The pool's chart takes the namespace from its value `runs.namespace`. Runs in progress stay where they are. So the
release keeps their former namespaces, in which the reconciler handles them, until no run is in progress there.
"""

import json
from base64 import b64decode

import yaml

from orchestration.errors import ClusterError
from orchestration.operations.environment import POOL, Environment, Object
from orchestration.operations.port_forward import AUTH_SECRET

OWN_NAMESPACE = "$(NAMESPACE)"
"""An argument of a component that stands for its namespace."""

COPY_LABEL = "prefect.io/copy-from"
"""The label of a copied Secret, with the namespace of the original. A Secret without it is a person's."""


def former_namespaces(environment: Environment) -> list[str]:
    """Return namespaces that may have runs in progress, and that the next deploy will start no runs in.

    They are that of the installed worker, and those in which the installed reconciler handles unfinished Jobs.
    """
    found: list[str] = []
    for component in ("worker", "reconciler"):
        selector = f"app.kubernetes.io/instance={POOL},app.kubernetes.io/component={component}"
        listed = environment.kubectl("get", "deployments", "--output", "json", "--selector", selector)
        for deployment in json.loads(listed)["items"]:
            for namespace in _namespaces(environment, deployment):
                is_former = namespace not in (environment.runs_namespace, *found)
                if is_former and (component == "worker" or _has_unfinished_job(environment, namespace)):
                    found.append(namespace)
    return found


def _namespaces(environment: Environment, deployment: Object) -> list[str]:
    """Return the namespaces that the arguments of a worker or reconciler name."""
    args = deployment["spec"]["template"]["spec"]["containers"][0].get("args", [])
    named = [args[index + 1] for index, word in enumerate(args[:-1]) if word == "--namespace"]
    return [environment.namespace if name == OWN_NAMESPACE else name for name in named]


def _has_unfinished_job(environment: Environment, namespace: str) -> bool:
    listed = environment.kubectl(
        "get", "jobs", "--output", "json", "--selector", "prefect.io/flow-run-id", "--namespace", namespace
    )
    jobs: list[Object] = json.loads(listed)["items"]
    return any(not is_finished(job) for job in jobs)


def is_finished(job: Object) -> bool:
    """Return whether a Job has completed or failed."""
    conditions = job["status"].get("conditions", [])
    return any(
        condition["type"] in ("Complete", "Failed") and condition["status"] == "True" for condition in conditions
    )


def _has_copied_credential(environment: Environment) -> bool:
    """Return whether runs in another namespace refer to the Secret that the server's chart generates.

    With API roles, the default, the Job of each run has the run's own credential instead. A Secret of another name
    is a person's, as is one of this name without the label of a copy.
    """
    auth = environment.pool_values.get("api", {}).get("auth", {})
    is_generated = auth.get("existingSecret", AUTH_SECRET) == AUTH_SECRET and auth.get("rolesSecret") == ""
    return is_generated and environment.runs_namespace != environment.namespace


def copy_api_credential(environment: Environment) -> None:
    """Copy the generated credential of the Prefect API to the namespace of the runs, whose Jobs refer to it."""
    if _has_copied_credential(environment):
        _copy(environment, AUTH_SECRET, "auth-string")


def copy_ca(environment: Environment) -> None:
    """Copy the certificate of the API's CA to the namespace of the runs, which mount it.

    Raises:
        ClusterError: the key in the values is that of a private key.
    """
    name, key = copied_ca(environment)
    if name:
        _copy(environment, name, key)


def missing_ca(environment: Environment) -> str:
    """Return the Secret with the API's CA if the namespace of the runs does not have it yet; else empty."""
    name, _ = copied_ca(environment)
    return name if name and not _read_secret(environment, name, environment.runs_namespace) else ""


def copied_ca(environment: Environment) -> tuple[str, str]:
    """Return the Secret with the API's CA, and its key. The name is empty if runs need no copy."""
    tls = environment.pool_values.get("api", {}).get("tls", {})
    is_elsewhere = environment.runs_namespace != environment.namespace
    return tls.get("caSecret", "") if is_elsewhere else "", tls.get("caKey", "ca.crt")


def _read_secret(environment: Environment, name: str, namespace: str) -> Object:
    """Return a Secret; empty if it does not exist."""
    where = ("--ignore-not-found", "--output", "json", "--namespace", namespace)
    found: Object = json.loads(environment.kubectl("get", "secret", name, *where) or "{}")
    return found


def _copy(environment: Environment, name: str, key: str) -> None:
    """Copy one key of a Secret to the namespace of the runs. A person's Secret of this name there stays.

    Without Secret or key nothing is copied: the chart names what is missing.
    """
    existing = _read_secret(environment, name, environment.runs_namespace)
    if existing and COPY_LABEL not in existing["metadata"].get("labels", {}):
        return
    value = _read_secret(environment, name, environment.namespace).get("data", {}).get(key, "")
    if not value:
        return
    if b"PRIVATE KEY" in b64decode(value):
        raise ClusterError(
            f"Secret {name} is not copied to namespace {environment.runs_namespace}: {key} is a private key, by "
            f"which runs could pose as the API. Set api.tls.caKey in the values of {POOL} to the certificate of the CA"
        )
    metadata = {"name": name, "labels": {COPY_LABEL: environment.namespace}}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {key: value}}
    where = ("--namespace", environment.runs_namespace)
    environment.kubectl("apply", "--filename", "-", *where, text=json.dumps(secret))


def delete_copies(environment: Environment) -> None:
    """Delete the copied Secrets from the namespace of the runs."""
    if environment.runs_namespace != environment.namespace:
        copy = ("--selector", f"{COPY_LABEL}={environment.namespace}")
        environment.kubectl("delete", "secrets", *copy, "--namespace", environment.runs_namespace)


def check_rollback(environment: Environment, revision: int) -> None:
    """Check that a rollback of the pool's release leaves no run behind.

    Args:
        environment: the environment of the release.
        revision: the revision to which the release would go back.

    Raises:
        ClusterError: the revision has another namespace for runs, and runs are in progress in the present one.
    """
    now, then = (
        {
            name
            for manifest in yaml.safe_load_all(environment.helm("get", "manifest", POOL, *options))
            if manifest and manifest["kind"] == "Deployment"
            for name in _namespaces(environment, manifest)
        }
        for options in ([], ["--revision", str(revision)])
    )
    for namespace in sorted(now - then):
        if _has_unfinished_job(environment, namespace):
            raise ClusterError(
                f"Runs are in progress in namespace {namespace}, where revision {revision} of {POOL} handles none. "
                "Wait until they have ended, or change runs.namespace back in the values and deploy: make deploy "
                f"ENV={environment.name}"
            )
