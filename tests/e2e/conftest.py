"""A server and its pool, or a checkout that makes them, for all tests of a file."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from orchestration.environment.target import Environment
from orchestration.settings import ROOT
from tests.cluster import binaries
from tests.cluster.namespace import Namespace, restricted
from tests.cluster.turns import turn
from tests.e2e.checkout import CRON, Checkout
from tests.e2e.release import Object, Release, pool_values, probe_of, server_values
from tests.parts import copy_of_checkout


@pytest.fixture(scope="module")
def probe() -> Object:
    """The ConfigMap with the probe's flow, which the pool's runs find in /probe: for each namespace that has runs."""
    return probe_of(Path(__file__).with_name("probe_flow.py"))


@pytest.fixture(scope="module")
def servers_namespace(cluster: str) -> Iterator[Namespace]:
    """A namespace that enforces the restricted standard."""
    with restricted(cluster, "pool") as made:
        yield made


@pytest.fixture(scope="module")
def server(servers_namespace: Namespace, image: str) -> Release:
    release = Release("prefect-server", "prefect-server", servers_namespace)
    release.deploy(server_values(image))
    return release


@pytest.fixture(scope="module")
def values(image: str) -> Object:
    return pool_values(image)


@pytest.fixture(scope="module")
def pool(server: Release, values: Object, probe: Object) -> Release:
    """A work pool that is installed from nothing."""
    server.namespace.apply(probe)
    release = Release("prefect-work-pool", "prefect-work-pool", server.namespace)
    release.deploy(values)
    return release


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
    made.edit("prefect.yaml", "0 6 * * *", CRON)
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "A copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    with turn(binaries.cache() / "environments.lock"):
        yield made
        made.target.kubectl("delete", "namespace", made.target.namespace, "--wait=false", "--ignore-not-found")
