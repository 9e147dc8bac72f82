"""Restore the server's database from a backup: `make restore`.

The order keeps the server running for as long as it can, and leaves everything as it was if a step fails:

1. The backup is fetched, and restored next to the server's database. The server runs on.
2. Server, workers and reconcilers stop. Pods of runs go on.
3. kubectl reads the Jobs and pods of runs. It has read them once before step 1, so that no missing permission stops 3.
4. The restored database is migrated, its runs are settled, and it takes the place of the server's database.
5. Everything starts again with as many replicas as before.
"""

import base64
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path

from orchestration.errors import ClusterError
from orchestration.operations import backups, rollout
from orchestration.operations.environment import RELEASES, Environment, Object
from orchestration.operations.release_diagnosis import release_selector
from orchestration.progress import step
from orchestration.protocol import RUN_LABEL
from orchestration.reconciler.kubernetes_client import hash_certificate
from orchestration.recovery import executions

PAGE = "docs/how-to/back-up.md#start-what-a-restore-has-stopped"

STOPPED = ("pgbouncer", "api", "services", "worker", "reconciler", "drift")
"""The components that use the database or act on runs."""

REPLICAS_ANNOTATION = "prefect.io/replicas-before-restore"
"""Annotation of a Deployment that a restore has stopped: how many replicas it had."""

STOP_TIMEOUT_SECONDS = 300.0
"""How long the pods may take to end."""

MAX_CONFIG_MAP_BYTES = 2**20
"""How many bytes of data Kubernetes accepts in a ConfigMap."""


def restore(environment: Environment, name: str, *, identity: Path | None, start_unknown: bool) -> None:
    """Restore a backup, settle the runs, and print what was done about each.

    Args:
        environment: the environment.
        name: the name of the backup, or "newest".
        identity: a file with age's secret keys, for an encrypted backup.
        start_unknown: start due runs that may have been executed since the backup.

    Raises:
        ClusterError: a step failed. The server runs on its database as before, or stays stopped if the Job that
            replaces the database may still run.
    """
    template = backups.read_template(environment)
    backups.refuse_unended(environment, ("restore", "settle"))
    _pack_executions(environment)  # what would fail fails while the server runs
    with step(f"Restoring backup {name} next to the server's database", "20 s"):
        chosen = _load(environment, template, name, identity)
    try:
        stopped = _stop(environment)
        with step("Settling the runs", "20 s"):
            _settle(environment, template, chosen, stopped, start_unknown=start_unknown)
    except backups.UnendedJobError as error:
        raise ClusterError(
            f"{error}. Server, workers and reconcilers stay stopped: this Job would replace the database under them. "
            f"Start them when it is gone: {PAGE}"
        ) from None
    except BaseException:
        _start(environment)
        raise
    _start(environment)


def _load(environment: Environment, template: Object, name: str, identity: Path | None) -> str:
    """Fetch a backup, and restore it next to the server's database; return its name."""

    def change(pod: Object) -> None:
        dump = next(init_container for init_container in pod["initContainers"] if init_container["name"] == "dump")
        [store] = pod["containers"]
        options = [f"--name={name}"]
        if identity:
            options.append("--identity=/identity/key")
            store["volumeMounts"].append({"name": "identity", "mountPath": "/identity", "readOnly": True})
            pod["volumes"].append({"name": "identity", "secret": {"secretName": secret}})
        fetch = store | {"name": "fetch", "args": backups.as_command(store["args"], "fetch", *options)}
        pod["initContainers"] = [
            init_container for init_container in pod["initContainers"] if init_container is not dump
        ] + [fetch]
        pod["containers"] = [dump | {"name": "restore", "command": [*dump["command"][:2], "restore", "/work"]}]

    secret = backups.job_name("identity")
    if identity:
        key = base64.b64encode(_read_identity(identity)).decode()
        manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret}, "data": {"key": key}}
        environment.kubectl("create", "--filename", "-", text=json.dumps(manifest))
    try:
        log = backups.run_job(environment, template, "restore", change)
    finally:
        if identity:
            environment.kubectl("delete", "secret", secret)
    found = re.search(r"^(\d{8}T\d{6}Z) ", log, flags=re.M)
    if not found:
        raise ClusterError(f"The Job that restores the backup does not name it. It printed: {log.strip()[:500]}")
    return found[1]


def _read_identity(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        cause = error.strerror
        raise ClusterError(f"IDENTITY={file} cannot be read: {cause}. Name the file with age's secret key") from None


def _deployments(environment: Environment) -> list[Object]:
    return [
        deployment
        for release in RELEASES
        for deployment in environment.objects("deployments", "--selector", release_selector(release))
        if deployment["metadata"]["labels"]["app.kubernetes.io/component"] in STOPPED
    ]


def _stop(environment: Environment) -> datetime:
    """Stop all components that use the database or act on runs; return since when no worker claims runs."""
    with step("Stopping server, workers and reconcilers", "30 s"):
        for deployment in _deployments(environment):
            name, replicas = deployment["metadata"]["name"], deployment["spec"]["replicas"]
            if REPLICAS_ANNOTATION not in deployment["metadata"].get("annotations", {}):
                environment.kubectl("annotate", "deployment", name, f"{REPLICAS_ANNOTATION}={replicas}")
            environment.kubectl("scale", "deployment", name, "--replicas=0")
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        while _has_pods(environment):
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Some pods of server and workers have not ended within {STOP_TIMEOUT_SECONDS:.0f} s. "
                    "Everything is started again. Look at them: make status"
                )
            time.sleep(backups.POLL_SECONDS)
    return datetime.now(UTC)


def _has_pods(environment: Environment) -> bool:
    """Return whether a process of the stopped components may still run."""
    components = f"app.kubernetes.io/component in ({','.join(STOPPED)})"
    return any(
        pod["status"].get("phase") not in ("Succeeded", "Failed")
        for release in RELEASES
        for pod in environment.objects("pods", "--selector", f"{release_selector(release)},{components}")
    )


def _start(environment: Environment) -> None:
    """Start what `_stop` has stopped in the order of `STOPPED`, and wait until it is ready."""
    with step("Starting server, workers and reconcilers", "40 s"):
        found = _deployments(environment)
        found.sort(key=lambda workload: STOPPED.index(workload["metadata"]["labels"]["app.kubernetes.io/component"]))
        for deployment in found:
            name = deployment["metadata"]["name"]
            replicas = deployment["metadata"].get("annotations", {}).get(REPLICAS_ANNOTATION)
            if replicas is not None:
                environment.kubectl("scale", "deployment", name, f"--replicas={replicas}")
                environment.kubectl("annotate", "deployment", name, f"{REPLICAS_ANNOTATION}-")
        for release in RELEASES:
            rollout.wait_until_ready(environment, release)


def _settle(environment: Environment, template: Object, chosen: str, stopped: datetime, *, start_unknown: bool) -> None:
    """Settle the runs of the restored database, put it in the place of the server's, and print the log."""
    name = backups.job_name("executions")
    data = {"executions.json.gz": base64.b64encode(_pack_executions(environment)).decode()}
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "binaryData": data}
    environment.kubectl("create", "--filename", "-", text=json.dumps(manifest))

    def change(pod: Object) -> None:
        pod["initContainers"] = [
            init_container for init_container in pod["initContainers"] if init_container["name"] != "dump"
        ]
        [store] = pod["containers"]
        options = [f"--name={chosen}", f"--stopped={stopped.isoformat()}"]
        options += ["--executions=/executions/executions.json.gz"]
        options += ["--start-unknown"] if start_unknown else []
        store["args"] = backups.as_command(store["args"], "finish", *options)
        store["volumeMounts"].append({"name": "executions", "mountPath": "/executions", "readOnly": True})
        pod["volumes"].append({"name": "executions", "configMap": {"name": name}})

    try:
        print(backups.run_job(environment, template, "settle", change), end="", flush=True)
    except backups.UnendedJobError:
        raise  # its pod reads the ConfigMap
    except BaseException:
        environment.kubectl("delete", "configmap", name)
        raise
    environment.kubectl("delete", "configmap", name)


def _pack_executions(environment: Environment) -> bytes:
    """Return the Jobs and pods of runs in all namespaces, or in the environment's if others cannot be read.

    Raises:
        ClusterError: they cannot be read, or are too many for one ConfigMap.
    """
    selection = ("jobs,pods", "--selector", RUN_LABEL)
    listed = _read_unless_forbidden(environment, *selection, "--all-namespaces")
    if listed is None:
        names = " and ".join(environment.namespaces)
        print(f"Jobs and pods of namespaces other than {names} cannot be read, and are no evidence.")
        objects = environment.objects(*selection)
    else:
        objects = listed["items"]
    packed = executions.pack(_identities(environment), objects)
    if len(packed) > MAX_CONFIG_MAP_BYTES:
        raise ClusterError(
            f"{len(objects)} Jobs and pods of runs do not fit into a ConfigMap: {len(packed)} bytes, packed. "
            "Wait until Kubernetes has deleted more Jobs of finished runs (runs.ttlSecondsAfterFinished)"
        )
    return packed


def _identities(environment: Environment) -> list[str]:
    """Return the identities with which workers of the cluster may have labelled runs, as far as they can be read."""
    system = _read_unless_forbidden(environment, "namespace", "kube-system")
    authority = _read_unless_forbidden(environment, "configmap", "kube-root-ca.crt")
    found = [system["metadata"]["uid"]] if system else []
    return found + ([hash_certificate(authority["data"]["ca.crt"].encode())] if authority else [])


def _read_unless_forbidden(environment: Environment, *selection: str) -> Object | None:
    try:
        found: Object = json.loads(environment.kubectl("get", *selection, "--output", "json"))
    except ClusterError as error:
        if "Forbidden" not in str(error):
            raise
        return None
    return found
