"""Every route of the installed Prefect is in exactly one class, and a request finds its routes."""

from typing import Any

import pytest

from orchestration.access.routes import CLASSES, PERMISSIONS, WEBSOCKET, Role, RouteTable, read_routes


def _prefect_routes() -> set[tuple[str, str]]:
    """Return method and path of each route of the server, with websockets and undocumented routes."""
    # Importing Prefect's server takes 2 s. Only the process that runs this test imports it.
    from prefect.server.api.server import API_ROUTERS, create_api_app

    found = {("GET", "/metrics")}  # only with PREFECT_SERVER_METRICS_ENABLED
    found |= {
        (method.upper(), path) for path, methods in create_api_app().openapi()["paths"].items() for method in methods
    }
    for router in API_ROUTERS:
        for route in router.routes:
            path = _without_convertors(route)
            for method in getattr(route, "methods", None) or {WEBSOCKET}:
                found.add((method, path))
    return found


def _without_convertors(route: Any) -> str:
    path: str = getattr(route, "path_format", None) or route.path
    return path


def test_each_route_of_prefect_is_in_one_class() -> None:
    listed = [(route.method, route.path) for route in read_routes()]

    assert sorted(listed) == sorted(_prefect_routes())


def test_each_role_has_permissions_of_known_classes() -> None:
    assert set(PERMISSIONS) == set(Role)
    assert all(classes <= set(CLASSES) for classes in PERMISSIONS.values())


@pytest.mark.parametrize(
    ("request_line", "access"),
    [
        ("GET /flow_runs/8c1f", {"read"}),
        ("POST /flow_runs/filter", {"read"}),
        ("POST /flow_runs", {"create-runs"}),
        ("POST /flow_runs/", {"create-runs"}),
        ("PATCH /work_pools/default", {"write-desired-state"}),
        ("PATCH /work_pools/a%2Fb", {"write-desired-state"}),
        ("PATCH /work_pools/a/b", set()),
        ("PATCH //work_pools/default", set()),
        ("PATCH /work_pools/default\n", {"write-desired-state"}),
        ("TRACE /flow_runs/8c1f", set()),
        ("WEBSOCKET /events/in", {"emit-events"}),
        ("GET /unknown", set()),
    ],
)
def test_request_finds_the_classes_of_its_routes(request_line: str, access: set[str]) -> None:
    method, _, path = request_line.partition(" ")

    assert {route.access for route, _ in RouteTable().find(method, path)} == access


def test_run_may_not_write_pools_or_deployments() -> None:
    permitted = {(route.method, route.path) for route in read_routes() if route.access in PERMISSIONS[Role.RUN]}
    writes = {(method, path) for method, path in permitted if method in ("PUT", "PATCH", "DELETE")}

    assert writes == {
        ("PATCH", "/flow_runs/{id}"),
        ("PATCH", "/flow_runs/{id}/labels"),
        ("DELETE", "/flow_runs/{id}/input/{key}"),
        ("PATCH", "/task_runs/{id}"),
        ("PATCH", "/artifacts/{id}"),
    }
