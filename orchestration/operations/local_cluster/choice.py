"""Choose the cluster: the context that is named, kind, a node from packages, or none."""

import os

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import kind, node, node_layout

CONTEXTS = {"kind": kind.CONTEXT, "node": node_layout.CONTEXT, "none": None}
"""The context that each value of `CLUSTER` creates."""


def requested_cluster() -> str:
    """Return the value of `CLUSTER`; empty if it is not set.

    Raises:
        ClusterError: the value is unknown, or `KUBE_CONTEXT` names another cluster.
    """
    requested = os.environ.get("CLUSTER", "")
    if requested and requested not in CONTEXTS:
        raise ClusterError(f"CLUSTER={requested} is unknown. Use {', '.join(CONTEXTS)}, or leave it empty")
    context = os.environ.get("KUBE_CONTEXT")
    if requested and context and CONTEXTS[requested] not in (None, context):
        raise ClusterError(f"KUBE_CONTEXT={context} and CLUSTER={requested} are two clusters. Leave one of them empty")
    return requested


def choose_context() -> str:
    """Return the context to use: that of `KUBE_CONTEXT`, kind's, or the node's.

    Raises:
        ClusterError: no cluster is named and none can be created, with what is missing.
    """
    requested = requested_cluster()
    if requested == "none":
        raise ClusterError("CLUSTER=none: no cluster is used. Leave CLUSTER empty to use or make one")
    if context := os.environ.get("KUBE_CONTEXT"):
        return context
    if requested != "node" and kind.is_docker_running():
        return kind.CONTEXT
    if requested == "kind":
        raise ClusterError("CLUSTER=kind cannot be made: Docker does not run. Start Docker")
    if reason := node.unavailable_reason():
        if requested == "node":
            raise ClusterError(f"CLUSTER=node cannot be made: {reason}")
        raise ClusterError(
            f"No cluster can be made here: Docker does not run, and for a node from packages {reason}. "
            "Start Docker, or name a cluster's context in KUBE_CONTEXT"
        )
    return node_layout.CONTEXT
