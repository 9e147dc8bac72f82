"""Which cluster is used: the one that is named, one by kind, a node from packages, or none."""

import os

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import kind, node

WAYS = {"kind": kind.CONTEXT, "node": node.CONTEXT, "none": None}
"""The values of `CLUSTER`, with the context that each makes."""


def way() -> str:
    """Return the way to a cluster that `CLUSTER` names; empty if it names none.

    Raises:
        ClusterError: it is no way, or `KUBE_CONTEXT` names another cluster.
    """
    named = os.environ.get("CLUSTER", "")
    if named and named not in WAYS:
        raise ClusterError(f"CLUSTER={named} is unknown. Use {', '.join(WAYS)}, or leave it empty")
    context = os.environ.get("KUBE_CONTEXT")
    if named and context and WAYS[named] not in (None, context):
        raise ClusterError(f"KUBE_CONTEXT={context} and CLUSTER={named} are two clusters. Leave one of them empty")
    return named


def chosen() -> str:
    """Return the context to use: the one that is named, kind's, or the node's.

    Raises:
        ClusterError: there is none and none can be made, with what is missing.
    """
    named = way()
    if named == "none":
        raise ClusterError("CLUSTER=none: no cluster is used. Leave CLUSTER empty to use or make one")
    if context := os.environ.get("KUBE_CONTEXT"):
        return context
    if named != "node" and kind.docker_runs():
        return kind.CONTEXT
    if named == "kind":
        raise ClusterError("CLUSTER=kind cannot be made: Docker does not run. Start Docker")
    if reason := node.unavailable():
        if named == "node":
            raise ClusterError(f"CLUSTER=node cannot be made: {reason}")
        raise ClusterError(
            f"No cluster can be made here: Docker does not run, and for a node from packages {reason}. "
            "Start Docker, or name a cluster's context in KUBE_CONTEXT"
        )
    return node.CONTEXT
