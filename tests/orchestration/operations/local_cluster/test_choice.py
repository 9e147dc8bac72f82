"""Choice of the cluster, by the variables that are set and by what the machine has."""

import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import choice, kind, node

NO_GO = "there is no Go to build Kubernetes with"

CHOICES = pytest.mark.parametrize(
    ("variables", "docker", "context"),
    [
        ({}, True, "kind-prefect"),
        ({}, False, "prefect-node"),
        ({"CLUSTER": "node"}, True, "prefect-node"),
        ({"CLUSTER": "kind"}, True, "kind-prefect"),
        ({"KUBE_CONTEXT": "mine"}, True, "mine"),
        ({"KUBE_CONTEXT": "prefect-node", "CLUSTER": "node"}, True, "prefect-node"),
    ],
)
"""Variables, whether Docker runs, and the context that is chosen. Also used by tests/test_preview.py."""

REFUSALS = pytest.mark.parametrize(
    ("variables", "message", "stops"),
    [
        ({"CLUSTER": "kid"}, "CLUSTER=kid is unknown. Use kind, node, none, or leave it empty", True),
        ({"CLUSTER": "node", "KUBE_CONTEXT": "mine"}, "KUBE_CONTEXT=mine and CLUSTER=node are two clusters", True),
        ({"CLUSTER": "kind"}, "CLUSTER=kind cannot be made: Docker does not run", True),
        ({"CLUSTER": "node"}, f"CLUSTER=node cannot be made: {NO_GO}", True),
        ({"CLUSTER": "none"}, "CLUSTER=none: no cluster is used", False),
        ({"CLUSTER": "none", "KUBE_CONTEXT": "mine"}, "CLUSTER=none: no cluster is used", False),
        ({}, f"No cluster can be made here: Docker does not run, and for a node from packages {NO_GO}", False),
    ],
)
"""Variables, the error where neither Docker nor Go is there, and whether `make test` stops at it."""


@CHOICES
def test_context_follows_variables_and_machine(
    machine: pytest.MonkeyPatch, variables: dict[str, str], docker: bool, context: str
) -> None:
    machine.setattr(kind, "is_docker_running", lambda: docker)
    for name, value in variables.items():
        machine.setenv(name, value)
    assert choice.choose_context() == context


@REFUSALS
def test_missing_cluster_is_an_error_with_its_reason(
    machine: pytest.MonkeyPatch, variables: dict[str, str], message: str, stops: bool
) -> None:
    machine.setattr(kind, "is_docker_running", lambda: False)
    machine.setattr(node, "unavailable_reason", lambda: NO_GO)
    for name, value in variables.items():
        machine.setenv(name, value)
    with pytest.raises(ClusterError, match=message):
        choice.choose_context()
