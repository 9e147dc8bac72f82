"""Fixtures for all tests of a file: a server and its work pool, or a checkout that deploys them."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from orchestration.operations.environment import Environment
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.settings import ROOT
from tests import parts
from tests.cluster.namespace import USED, Namespace, remove, restricted
from tests.e2e.checkout import CRON, SHIPPED_CRON, Checkout
from tests.e2e.pace import IDLE_ROUND_SECONDS, PAUSE_SECONDS
from tests.e2e.release import (
    Object,
    Pool,
    Release,
    connection_values,
    install_pool,
    merge_values,
    pool_values,
    probe_config_map,
    shared_server,
)
from tests.parts import copy_of_checkout


@pytest.fixture(scope="module", autouse=True)
def _patient() -> Iterator[None]:
    """Look at the cluster once a second at most: each look takes the processor from other tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PAUSE_SECONDS", PAUSE_SECONDS)
        yield


@pytest.fixture(scope="module")
def probe() -> Object:
    """Return the ConfigMap with the probe's flow, for each namespace with runs. Runs find the flow in /probe."""
    return probe_config_map(Path(__file__).with_name("probe_flow.py"))


@pytest.fixture(scope="module")
def server(cluster: str, image: str) -> Release:
    """Return the server that test files share. A file whose tests disturb the server installs another one."""
    return shared_server(cluster, image)


@pytest.fixture(scope="module")
def pool_namespace(cluster: str) -> Iterator[Namespace]:
    """Yield a namespace that enforces the restricted Pod Security Standard."""
    with restricted(cluster, "pool") as namespace:
        yield namespace


@pytest.fixture(scope="module")
def values(image: str, server: Release, pool_namespace: Namespace) -> Object:
    """Return the values of a work pool. Its name on the server is the name of its namespace."""
    paced = {"reconciler": {"everySeconds": IDLE_ROUND_SECONDS}}
    return merge_values(merge_values(pool_values(image), paced), connection_values(server, pool_namespace.name))


@pytest.fixture(scope="module")
def pool(server: Release, pool_namespace: Namespace, values: Object, probe: Object) -> Pool:
    """Install a work pool."""
    return install_pool(server, pool_namespace, values, probe)


@pytest.fixture(scope="module")
def api(server: Release) -> Iterator[httpx.Client]:
    """Yield a client of the Prefect API."""
    with server.api() as client:
        yield client


@pytest.fixture(scope="module")
def checkout(cluster: str, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """Yield a checkout whose local environment has namespaces that do not exist yet.

    One test file at a time has an environment, because its resource requests fill most of a small node.
    """
    folder = tmp_path_factory.mktemp("checkout")
    copy_of_checkout(folder)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    copy = Checkout(folder, Environment("local", cluster, f"environment-{uuid4().hex[:8]}"))
    namespaces = copy.target.namespaces
    USED.update(namespaces)
    copy.edit("prefect.yaml", SHIPPED_CRON, CRON)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    copy.commit()
    with hold_lock(binaries.cache() / "environments.lock"):
        try:
            yield copy
        finally:
            for name in namespaces:
                remove(Namespace(cluster, name))
