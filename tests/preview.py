"""Print before `make test` which cluster it uses and why, how long it takes and what it changes on the machine."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, kind, node_layout
from orchestration.operations.local_cluster.choice import choose_context, requested_cluster

PROGRAMS = {"kubernetes": (binaries.KUBERNETES, "9 min, once")} | {
    name: (version, usual) for name, (_, version, usual) in binaries.MODULES.items()
}
"""Version and build time of the programs that are built from Go modules, by name."""

BUILT = {
    node_layout.CONTEXT: ("kubernetes", "helm", "coredns", "metrics-server", "versitygw", "oauth2-proxy"),
    kind.CONTEXT: ("kind", "kubernetes", "helm", "versitygw", "oauth2-proxy"),
}
"""The programs that tests need, by the cluster's context. With kind the machine may have some of them."""

TEST_PACKAGES = {
    "redis-server": "redis-server",
    "chromium": "chromium",
    "dockerd": "docker.io",
    "docker-compose": "docker-compose",
    "pg_lsclusters": "postgresql",
}
"""Debian's packages that some tests install, by program."""


WHOLE_MINUTES, WITHOUT_CLUSTER_MINUTES = 40, 30
"""How long `make test` takes on 2 cores when every program is in the cache: with a cluster, and without one."""


def text() -> str:
    """Return the preview.

    Raises:
        ClusterError: `CLUSTER` is invalid, or names a cluster that cannot be made here.
    """
    lines = list(_lines())
    width = max(len(title) for title, _ in lines)
    return "\n".join(f"{title:{width}}  {line}".rstrip() for title, line in lines)


def _lines() -> Iterator[tuple[str, str]]:
    named = requested_cluster()
    try:
        context = choose_context()
    except ClusterError as error:
        if named not in ("", "none"):
            raise
        yield "Cluster", f"none. {error}"
        if named:
            yield "Changes", f"{binaries.cache()} alone: no package is installed and no program is built"
        else:
            yield "", "The tests that need a cluster are skipped. With CI set that is an error"
        yield "Time", f"about {WITHOUT_CLUSTER_MINUTES} min on 2 cores"
        return
    if context == os.environ.get("KUBE_CONTEXT"):
        yield "Cluster", f"{context}, which KUBE_CONTEXT names"
        yield "Changes", "separate namespaces for tests in that cluster, deleted afterwards"
    elif context == kind.CONTEXT:
        yield "Cluster", f"{context}, by kind: {'CLUSTER=kind' if named else 'Docker runs'}"
        yield "Changes", "Docker: the kind cluster and a registry on localhost:5000. make cluster-down removes them"
    else:
        reason = "CLUSTER=node" if named else "Docker does not run, and this is Linux with Go and you are root"
        yield "Cluster", f"{context}, a node from packages: {reason}"
        yield "Changes", f"{node_layout.STATE}, {'exists already' if node_layout.STATE.exists() else 'new'}"
        bridges = f"bridges {node_layout.BRIDGE} and {node_layout.FIRST.bridge}"
        yield "", f"{bridges}, routes, iptables chains KUBE-*, CNI-*, NETPOL-*"
        yield "", "make cluster-down removes them"
    packages = binaries.PACKAGES | TEST_PACKAGES if context == node_layout.CONTEXT else TEST_PACKAGES
    absent = sorted(package for program, package in packages.items() if not shutil.which(program))
    yield "Debian", f"installs {' '.join(absent)}" if absent else "every package is installed"
    yield "Cache", f"{binaries.cache()}: {', '.join(_cached()) or 'empty'}"
    once = [
        f"{name} {usual.partition(',')[0]}"
        for name, (version, usual) in PROGRAMS.items()
        if name in BUILT.get(context, ()) and not (binaries.cache() / f"{name}-{version}").exists()
    ]
    yield "Time", f"about {WHOLE_MINUTES} min on 2 cores" + (f", and once to build {', '.join(once)}" if once else "")
    yield "Faster", "CLUSTER=none make test: what needs no cluster. make test CHANGED=1: what a change affects"


def _cached() -> list[str]:
    """Return the folders of the cache with their sizes, largest first."""
    sizes = {folder.name: _bytes(folder) for folder in binaries.cache().glob("*") if folder.is_dir()}
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    return [f"{name} {size / 1e6:.0f} MB" for name, size in ordered if size > 1e6]


def _bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main() -> int:
    """Print the preview; return the exit status."""
    try:
        print(text())
    except ClusterError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
