"""Pools whose runs are victims of faults, watched by a reconciler."""

from collections.abc import Iterator

import pytest

from tests.cluster.namespace import Namespace
from tests.e2e.faults.victims import FLOWS, PLACES, TOOK, watched
from tests.e2e.pace import CAPACITY_TIMEOUT_SECONDS, PENDING_TIMEOUT_SECONDS
from tests.e2e.release import (
    Object,
    Pool,
    Release,
    installed_pool,
    joining,
    merged,
    pool_values,
    probe_of,
    server_values,
    shared,
)


@pytest.fixture(autouse=True)
def _took(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the test says of how soon it was goes into its report."""
    TOOK.clear()
    yield
    request.node.user_properties.extend(("took", each) for each in TOOK)


@pytest.fixture(scope="module")
def probe() -> Object:
    return probe_of(FLOWS)


@pytest.fixture(scope="module")
def own_server(pool_namespace: Namespace, image: str) -> Release:
    """A server in the pool's namespace, for tests that disturb it."""
    release = Release("prefect-server", "prefect-server", pool_namespace)
    release.deploy(server_values(image))
    return release


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    return of_victims(values)


@pytest.fixture(scope="module")
def shared_pool(cluster: str, image: str, server: Release, probe: Object) -> Pool:
    """The pool of all files whose tests leave worker and reconciler alone."""
    name = "faults"
    values = of_victims(merged(pool_values(image), joining(server, name)))
    values["reconciler"]["capacityTimeoutSeconds"] = CAPACITY_TIMEOUT_SECONDS
    # Whose template `with_places` changes.
    values = merged(values, {"worker": {"templateFrom": "server"}})
    namespace = shared(cluster, name, lambda made: with_places(installed_pool(server, made, values, probe), server))
    return Pool("prefect-work-pool", "prefect-work-pool", namespace, work_pool=name)


def with_places(pool: Pool, server: Release) -> Pool:
    """Give the pool's template places for the containers that an injector would add; empty where a run names none."""
    with server.api() as api:
        path = f"/work_pools/{pool.work_pool}"
        template = api.get(path).raise_for_status().json()["base_job_template"]
        spec = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        spec["containers"] += [f"{{{{ {place} }}}}" for place in PLACES]
        api.patch(path, json={"base_job_template": template}).raise_for_status()
    # A worker keeps the template that it has read for a while.
    pool.namespace.kubectl("rollout", "restart", f"deployment/{pool.name}-worker")
    pool.namespace.kubectl("rollout", "status", f"deployment/{pool.name}-worker", "--timeout=300s")
    pool.one_worker()
    return pool


def of_victims(values: Object) -> Object:
    """Return the values of a pool whose runs may want a Secret that is not there."""
    made = watched(values)
    made["runs"]["variables"] = {"secret": {"type": "string", "default": "prefect-server-auth"}}
    made["runs"]["variables"] |= {place: {"type": "object"} for place in PLACES}
    secret = {"name": '{{ "{{ secret }}" }}', "key": "auth-string"}
    made["runs"]["env"] = [{"name": "SECRET", "valueFrom": {"secretKeyRef": secret}}]
    made["reconciler"]["pendingTimeoutSeconds"] = PENDING_TIMEOUT_SECONDS
    return made
