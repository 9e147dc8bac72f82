"""A server and its pool, or a checkout that makes them, for all tests of a file."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from orchestration.operations.environment import Environment
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.turns import turn
from orchestration.settings import ROOT
from tests.cluster.namespace import USED, Namespace, remove, restricted
from tests.e2e.checkout import CRON, Checkout
from tests.e2e.release import (
    Object,
    Pool,
    Release,
    installed_pool,
    joining,
    merged,
    pool_values,
    probe_of,
    shared_server,
)
from tests.parts import copy_of_checkout


@pytest.fixture(scope="module")
def probe() -> Object:
    """The ConfigMap with the probe's flow, which the pool's runs find in /probe: for each namespace that has runs."""
    return probe_of(Path(__file__).with_name("probe_flow.py"))


@pytest.fixture(scope="module")
def server(cluster: str, image: str) -> Release:
    """The server that files share. One whose tests disturb it installs its own."""
    return shared_server(cluster, image)


@pytest.fixture(scope="module")
def pool_namespace(cluster: str) -> Iterator[Namespace]:
    """A namespace that enforces the restricted standard."""
    with restricted(cluster, "pool") as made:
        yield made


@pytest.fixture(scope="module")
def values(image: str, server: Release, pool_namespace: Namespace) -> Object:
    """The values of a pool that has its namespace's name on the server."""
    return merged(pool_values(image), joining(server, pool_namespace.name))


@pytest.fixture(scope="module")
def pool(server: Release, pool_namespace: Namespace, values: Object, probe: Object) -> Pool:
    """A work pool that is installed from nothing."""
    return installed_pool(server, pool_namespace, values, probe)


@pytest.fixture(scope="module")
def api(server: Release) -> Iterator[httpx.Client]:
    with server.api() as client:
        yield client


@pytest.fixture(scope="module")
def checkout(cluster: str, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout whose local environment has a namespace that is not there yet.

    One file at a time has it: what an environment requests is most of a small node.
    """
    folder = tmp_path_factory.mktemp("checkout")
    copy_of_checkout(folder)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    made = Checkout(folder, Environment("local", cluster, f"environment-{uuid4().hex[:8]}"))
    USED.add(made.target.namespace)
    made.edit("prefect.yaml", "0 6 * * *", CRON)
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "A copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    with turn(binaries.cache() / "environments.lock"):
        yield made
        remove(Namespace(cluster, made.target.namespace))
