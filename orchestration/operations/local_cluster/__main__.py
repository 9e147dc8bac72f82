"""Make a cluster for development and tests, or take it away.

    python -m orchestration.operations.local_cluster up       # or: make cluster
    python -m orchestration.operations.local_cluster down     # or: make cluster-down
    python -m orchestration.operations.local_cluster context  # the name of the context that `up` would use
    python -m orchestration.operations.local_cluster path     # the folders of the kubectl and helm built here

The context that `KUBE_CONTEXT` names, which is used as it is and never taken away; else kind, where
Docker runs; else a single node from packages, as root on Linux with Go. `CLUSTER=kind` and `CLUSTER=node` name the
way to make one; with `CLUSTER=none` there is no cluster, and nothing is built or installed.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from unittest.mock import patch

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, kind, node
from orchestration.operations.local_cluster.choice import chosen
from orchestration.operations.local_cluster.turns import turn


def up() -> str:
    """Make the cluster unless it is there; its context."""
    context = chosen()
    # Who comes meanwhile finds what the first one makes.
    with turn(binaries.cache() / "cluster.lock"):
        if context == kind.CONTEXT:
            kind.up()
        elif context == node.CONTEXT:
            node.up()
        else:
            _check(context)
    return context


@contextlib.contextmanager
def shared(*, alone: bool = False) -> Iterator[str]:
    """The cluster's context, while nobody has the cluster alone; what runs kubectl and helm finds them meanwhile.

    Args:
        alone: while nobody else has it at all.
    """
    with turn(binaries.cache() / "tests.lock", shared=not alone):
        context = up()
        path = os.pathsep.join([os.environ["PATH"], *map(str, binaries.folders())])
        with patch.dict(os.environ, PATH=path):
            yield context


def down() -> None:
    """Take away the cluster that was made; one that was named is left alone."""
    named = os.environ.get("KUBE_CONTEXT")
    if named and named not in (kind.CONTEXT, node.CONTEXT):
        raise ClusterError(f"{named} was not made here, so it is not taken away. Leave KUBE_CONTEXT empty")
    if node.STATE.exists():
        node.down()
    elif kind.docker_runs():
        kind.down()
    else:
        print("There is no cluster.", file=sys.stderr)


def _check(context: str) -> None:
    """That a named context can be reached."""
    try:
        binaries.kubectl("--context", context, "version", "--request-timeout=10s")
    except ClusterError as error:
        raise ClusterError(
            f"KUBE_CONTEXT={context} cannot be used: {error}. See what there is with: kubectl config get-contexts"
        ) from None


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    commands: dict[str, Callable[[], object]] = {
        "up": up,
        "down": down,
        "context": lambda: print(chosen()),
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
        print("\nInterrupted. Run it again: what is done is kept.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
