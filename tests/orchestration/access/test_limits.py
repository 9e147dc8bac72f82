"""The API refuses JSON that it could not read again, and more tags than an event can have. The server is a real one."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.access.limits import MAX_DEPTH, MAX_TAGS, count_tags, depth
from tests.orchestration.access.guarded_server import SERVER_CREDENTIAL, guarded_server
from tests.parts import asked, debian_postgres, new_database
from tests.server_schema import create_schema

HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module", params=["SQLite", pytest.param("Postgres", marks=pytest.mark.further)])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield a client of a server on each database."""
    with contextlib.ExitStack() as stack:
        variables = {}
        if request.param == "Postgres":
            database = stack.enter_context(new_database(stack.enter_context(debian_postgres())))
            create_schema(database)
            variables["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database.replace("://", "+asyncpg://")
        server = guarded_server(tmp_path_factory.mktemp("server"), "orchestration.server_process", **variables)
        yield stack.enter_context(stack.enter_context(server).client(SERVER_CREDENTIAL))


def _deployment(api: httpx.Client, **fields: Any) -> str:
    flow = asked(api, "POST", "/flows/", {"name": "f"})["id"]
    return str(asked(api, "POST", "/deployments/", {"name": uuid4().hex, "flow_id": flow} | fields)["id"])


def _nested(levels: int) -> bytes:
    return b"[" * levels + b'"[[\\"[["' + b"]" * levels


def test_deep_parameters_are_refused_and_lists_stay_readable(api: httpx.Client) -> None:
    path = f"/deployments/{_deployment(api)}/create_flow_run"

    def create(levels: int) -> httpx.Response:
        content = b'{"state": {"type": "SCHEDULED"}, "parameters": {"a": %s}}' % _nested(levels)
        return api.post(path, content=content, headers=HEADERS)

    assert create(MAX_DEPTH - 2).status_code == 201
    for levels in (MAX_DEPTH - 1, 300, 100_000):
        refused = create(levels)
        assert refused.status_code == 422
        assert f"more than {MAX_DEPTH} levels" in refused.json()["exception_detail"]
    assert len(api.post("/flow_runs/filter", json={}).raise_for_status().json()) == 1


def test_password_is_checked_before_the_body(api: httpx.Client) -> None:
    answer = httpx.post(f"{api.base_url}flows/", content=_nested(500), headers=HEADERS, timeout=75)
    assert answer.status_code == 401


def test_many_objects_side_by_side_are_accepted(api: httpx.Client) -> None:
    line = {"name": "l", "level": 20, "message": '{"[', "timestamp": "2026-01-01T00:00:00Z"}
    assert api.post("/logs/", json=[line] * 300).status_code == 201


def _tags(count: int) -> list[str]:
    return [f"t{number}" for number in range(count)]


@pytest.mark.parametrize("count", [MAX_TAGS + 1, 10_000])
def test_too_many_tags_are_refused_wherever_a_run_would_get_them(api: httpx.Client, count: int) -> None:
    deployment = _deployment(api)
    flow = asked(api, "GET", f"/deployments/{deployment}")["flow_id"]
    run = asked(api, "POST", f"/deployments/{deployment}/create_flow_run", {})["id"]
    task = {"task_key": "k", "dynamic_key": "0", "flow_run_id": run}
    for method, path, body in (
        ("POST", "/flows/", {"name": "g"}),
        ("PATCH", f"/flows/{flow}", {}),
        ("POST", "/deployments/", {"name": "e", "flow_id": flow}),
        ("PATCH", f"/deployments/{deployment}", {}),
        ("POST", f"/deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}}),
        ("POST", "/flow_runs/", {"flow_id": flow}),
        ("PATCH", f"/flow_runs/{run}", {}),
        ("POST", "/task_runs/", task),
    ):
        refused = api.request(method, path, json=body | {"tags": _tags(count)})
        assert refused.status_code == 422, path
        assert f"has {count:,} tags, " in refused.json()["exception_detail"]
    assert asked(api, "POST", f"/flow_runs/{run}/set_state", {"state": {"type": "RUNNING"}})["status"] == "ACCEPT"


def test_run_with_as_many_tags_as_permitted_completes(api: httpx.Client) -> None:
    tags = _tags(MAX_TAGS)
    deployment = _deployment(api, tags=tags * 20)
    run = asked(api, "POST", f"/deployments/{deployment}/create_flow_run", {"tags": tags})
    assert set(run["tags"]) == set(tags)
    for state in ("RUNNING", "COMPLETED"):
        answer = asked(api, "POST", f"/flow_runs/{run['id']}/set_state", {"state": {"type": state}})
        assert answer["status"] == "ACCEPT"


def test_too_many_tags_of_one_of_many_runs_are_refused(api: httpx.Client) -> None:
    deployment, runs = _deployment(api), [{}, {"tags": _tags(MAX_TAGS + 1)}]
    assert api.post(f"/deployments/{deployment}/create_flow_run/bulk", json=runs).status_code == 422
    assert asked(api, "POST", "/flow_runs/count", {"flow_runs": {"deployment_id": {"any_": [deployment]}}}) == 0


def test_tags_that_no_run_has_are_not_limited(api: httpx.Client) -> None:
    asked(api, "POST", "/variables/", {"name": "many_tags", "value": 1, "tags": _tags(MAX_TAGS + 1)})
    asked(api, "POST", "/flow_runs/filter", {"flow_runs": {"tags": {"any_": _tags(MAX_TAGS + 1)}}})


@pytest.mark.parametrize("body", [{"tags": "t"}, {"tags": [[]]}, {"tags": {"t": 1}}, {"tags": None}, []])
def test_tags_that_are_no_list_of_texts_are_left_to_the_api(body: Any) -> None:
    assert count_tags(json.dumps([body, _tags(MAX_TAGS)]).encode()) == 0
    assert count_tags(json.dumps(body | {"more": _tags(MAX_TAGS)} if body else body).encode()) == 0


JSON = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('[]{}"\\a')),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.sampled_from('[]{}"\\a')), inner, max_size=3)
    ),
    max_leaves=8,
)


def _levels(value: object) -> int:
    if isinstance(value, dict | list):
        return 1 + max(map(_levels, value.values() if isinstance(value, dict) else value), default=0)
    return 0


@given(JSON)
def test_depth_counts_levels_and_no_brackets_in_texts(value: object) -> None:
    padding: list[list[int]] = [[]] * MAX_DEPTH
    assert depth(json.dumps([value, padding]).encode()) == max(1 + _levels(value), 3)
    assert depth(json.dumps(value).encode()[:-1]) <= MAX_DEPTH
