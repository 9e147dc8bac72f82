"""Fixtures of the fault tests: work pools whose runs are the victims, watched by a reconciler."""

from collections.abc import Iterator

import pytest

from tests.cluster.namespace import Namespace
from tests.e2e.faults.victims import DURATIONS, FLOW_FILE, NATIVE_SIDECAR_VARIABLE, SIDECAR_VARIABLES, fault_values
from tests.e2e.pace import CAPACITY_TIMEOUT_SECONDS, PENDING_TIMEOUT_SECONDS, ROUND_SECONDS
from tests.e2e.release import (
    TEST_RUN,
    Object,
    Pool,
    Release,
    calm_server_values,
    connection_values,
    copy_credentials,
    install_pool,
    make_shared,
    merge_values,
    pool_values,
    probe_config_map,
    shared_namespace,
)


@pytest.fixture(autouse=True)
def _report_durations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Add the durations that the test measured to its report."""
    DURATIONS.clear()
    yield
    request.node.user_properties.extend(("took", duration) for duration in DURATIONS)


@pytest.fixture(scope="module")
def probe() -> Object:
    return probe_config_map(FLOW_FILE)


@pytest.fixture(scope="module")
def own_server(pool_namespace: Namespace, image: str) -> Release:
    """Install a server in the pool's namespace, for tests that disturb it."""
    release = Release("prefect-server", "prefect-server", pool_namespace)
    release.deploy(calm_server_values(image))
    return release


@pytest.fixture(scope="module")
def values(values: Object) -> Object:
    return victim_values(values)


@pytest.fixture(scope="module")
def shared_pool(cluster: str, image: str, server: Release, probe: Object) -> Pool:
    """Return the pool that test files share if they do not disturb its worker and reconciler.

    Its runs are in a namespace of their own.
    """
    name = "faults"
    runs = Namespace(cluster, f"shared-{TEST_RUN}-{name}-runs")
    values = victim_values(merge_values(pool_values(image), connection_values(server, name)))
    values["runs"]["namespace"] = runs.name
    values["reconciler"]["capacityTimeoutSeconds"] = CAPACITY_TIMEOUT_SECONDS
    # `add_sidecar_variables` changes the template on the server, and then starts the worker, which caches it.
    values = merge_values(values, {"worker": {"templateFrom": "server", "replicas": 0}})

    def install(namespace: Namespace) -> None:
        make_shared(runs)
        copy_credentials(server, runs)
        add_sidecar_variables(install_pool(server, namespace, values, probe), server)

    namespace = shared_namespace(cluster, name, install)
    return Pool("prefect-work-pool", "prefect-work-pool", namespace, name, runs.name)


def add_sidecar_variables(pool: Pool, server: Release) -> None:
    """Add variables for sidecars to the pool's template, where an injector would add containers. Start its worker.

    A run without such a job variable has no sidecar.
    """
    with server.api() as api:
        path = f"/work_pools/{pool.work_pool}"
        template = api.get(path).raise_for_status().json()["base_job_template"]
        spec = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
        spec["containers"] += [f"{{{{ {variable} }}}}" for variable in SIDECAR_VARIABLES]
        spec["initContainers"] = [*spec.get("initContainers", []), f"{{{{ {NATIVE_SIDECAR_VARIABLE} }}}}"]
        api.patch(path, json={"base_job_template": template}).raise_for_status()
    pool.namespace.kubectl("scale", f"deployment/{pool.name}-worker", "--replicas=1")
    pool.namespace.kubectl("rollout", "status", f"deployment/{pool.name}-worker", "--timeout=300s")


def victim_values(values: Object) -> Object:
    """Return the values of a pool whose runs can name a Secret, also one that does not exist, and sidecars."""
    changed = fault_values(values)
    changed["runs"]["variables"] = {"secret": {"type": "string", "default": "prefect-server-api-roles"}}
    changed["runs"]["variables"] |= {
        variable: {"type": "object"} for variable in (*SIDECAR_VARIABLES, NATIVE_SIDECAR_VARIABLE)
    }
    secret = {"name": '{{ "{{ secret }}" }}', "key": "sync"}
    changed["runs"]["env"] = [{"name": "SECRET", "valueFrom": {"secretKeyRef": secret}}]
    changed["reconciler"] |= {"pendingTimeoutSeconds": PENDING_TIMEOUT_SECONDS, "everySeconds": ROUND_SECONDS}
    return changed
