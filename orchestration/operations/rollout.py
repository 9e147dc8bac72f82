"""Wait for the rollout of a release, and explain a rollout that fails."""

import time

from orchestration.errors import ClusterError
from orchestration.operations import release_diagnosis
from orchestration.operations.environment import Environment, Object

TIMEOUT_SECONDS = 600.0
"""How long the pods of a release may take to become ready."""

POLL_SECONDS = 0.5

MAX_EVIDENCE_LINES = 12
"""Lines of diagnosis in the message of a failed rollout."""


def wait_until_ready(environment: Environment, release: str) -> None:
    """Wait until all pods of a release are updated and ready.

    Raises:
        ClusterError: a pod cannot start until a person repairs it, a Job failed, or `TIMEOUT_SECONDS` have passed.
    """
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        waiting = [name for name in map(_unready, _workloads(environment, release)) if name]
        if not waiting:
            return
        for pod in environment.objects("pods", "--selector", _selector(release)):
            reason = release_diagnosis.hopeless_reason(pod)
            if reason and not pod["metadata"].get("deletionTimestamp"):
                raise ClusterError(f"pod/{pod['metadata']['name']} will not start")
        if failed := [name for name in waiting if name.endswith("failed")]:
            raise ClusterError(", ".join(failed))
        if time.monotonic() > deadline:
            raise ClusterError(f"after {TIMEOUT_SECONDS:.0f} s not ready: {', '.join(waiting)}")
        time.sleep(POLL_SECONDS)


def _selector(release: str) -> str:
    """Return the selector of the objects that a rollout waits for. A failed backup does not fail a rollout."""
    return f"{release_diagnosis.release_selector(release)},app.kubernetes.io/component!=backup"


def _workloads(environment: Environment, release: str) -> list[Object]:
    found = environment.objects("deployments,statefulsets,jobs", "--selector", _selector(release))
    return [workload for workload in found if "helm.sh/hook" not in workload["metadata"].get("annotations", {})]


def _unready(workload: Object) -> str:
    """Return the name of a workload that differs from its specification, with "failed" if it stays so; else empty."""
    name = f"{workload['kind'].lower()}/{workload['metadata']['name']}"
    spec, status = workload["spec"], workload["status"]
    if workload["kind"] == "Job":
        conditions = {condition["type"] for condition in status.get("conditions", []) if condition["status"] == "True"}
        if "Failed" in conditions:
            return f"{name} failed"
        return "" if "Complete" in conditions else name
    is_observed = status.get("observedGeneration") == workload["metadata"]["generation"]
    replicas = spec.get("replicas", 1)
    counts = [status.get(key, 0) for key in ("replicas", "updatedReplicas", "readyReplicas")]
    return "" if is_observed and counts == [replicas] * 3 else name


def explain_failure(environment: Environment, release: str, error: str, history: list[Object]) -> str:
    """Return the message of a failed deploy or rollback: the error, its evidence in the cluster, and the cure.

    Args:
        environment: the environment of the release.
        release: the name of the release.
        error: what Helm or the wait reported.
        history: the revisions before the deploy, oldest first; empty if there is nothing to roll back to.
    """
    if "values don't meet the specifications" in error or "execution error at" in error:
        return f"{release} is refused, and nothing was changed: {error.split('): ', 1)[-1]}"
    lines = [f"{release} does not become ready: {error}"]
    lines += [f"  {line}" for line in release_diagnosis.explain_release(environment, release)[:MAX_EVIDENCE_LINES]]
    if any(revision["status"] == "deployed" for revision in history):
        lines.append(f"The pods of the revision before keep running. Roll back: make rollback ENV={environment.name}")
    else:
        lines.append(f"Repair it and deploy again, or uninstall it: make undeploy ENV={environment.name}")
    return "\n".join(lines)
