"""Create or delete a cluster for development and tests.

    python -m orchestration.operations.local_cluster up       # or: make cluster
    python -m orchestration.operations.local_cluster down     # or: make cluster-down
    python -m orchestration.operations.local_cluster context  # the name of the context that `up` would use
    python -m orchestration.operations.local_cluster path     # the folders of the kubectl and helm built here

The cluster is that of `KUBE_CONTEXT`, which is never changed or deleted; else kind if Docker runs; else a single node
from packages (root on Linux, with Go). `CLUSTER=kind` and `CLUSTER=node` override the choice. With `CLUSTER=none` there
is no cluster, and nothing is built or installed.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, kind, node, node_layout
from orchestration.operations.local_cluster.choice import choose_context
from orchestration.operations.local_cluster.file_lock import hold_lock


def up() -> str:
    """Create the cluster unless it runs, and return its context."""
    context = choose_context()
    # A second process waits, and finds the cluster that the first one created.
    with hold_lock(binaries.cache() / "cluster.lock"):
        if context == kind.CONTEXT:
            kind.up()
        elif context == node_layout.CONTEXT:
            node.up()
        else:
            _check(context)
    return context


@contextlib.contextmanager
def shared(*, alone: bool = False) -> Iterator[str]:
    """Yield the cluster's context while no other process uses the cluster alone. PATH has kubectl and helm meanwhile.

    Args:
        alone: use the cluster alone: wait until no other process uses it.
    """
    with hold_lock(binaries.cache() / "tests.lock", shared=not alone):
        context = up()
        path = os.pathsep.join([os.environ["PATH"], *map(str, binaries.folders())])
        with patch.dict(os.environ, PATH=path):
            yield context


def down() -> None:
    """Delete the cluster that was created here.

    Raises:
        ClusterError: `KUBE_CONTEXT` names another cluster.
    """
    context = os.environ.get("KUBE_CONTEXT")
    if context and context not in (kind.CONTEXT, node_layout.CONTEXT):
        raise ClusterError(f"{context} was not made here, so it is not deleted. Leave KUBE_CONTEXT empty")
    if node_layout.STATE.exists():
        node.down()
    elif kind.is_docker_running():
        kind.down()
    else:
        print("There is no cluster.", file=sys.stderr)


def _check(context: str) -> None:
    """Raise ClusterError unless the cluster of a context answers."""
    try:
        binaries.kubectl("--context", context, "version", "--request-timeout=10s")
    except ClusterError as error:
        raise ClusterError(
            f"KUBE_CONTEXT={context} cannot be used: {error}. See what there is with: kubectl config get-contexts"
        ) from None


def main(arguments: Sequence[str]) -> int:
    """Run a command line; return the exit status."""
    commands: dict[str, Callable[[], object]] = {
        "up": up,
        "down": down,
        "context": lambda: print(choose_context()),
        "path": lambda: print(":".join(map(str, binaries.folders()))),
    }
    if len(arguments) != 1 or arguments[0] not in commands:
        print(f"usage: python -m orchestration.operations.local_cluster {' | '.join(commands)}", file=sys.stderr)
        return 2
    try:
        commands[arguments[0]]()
    except (ClusterError, binaries.MissingProgramError) as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. Run the command again: it keeps what is done.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
