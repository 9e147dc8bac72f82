"""The API refuses JSON that it could not read again. The server is a real one."""

import json
from collections.abc import Iterator

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.access.limits import MAX_DEPTH, depth
from tests.orchestration.access.guarded_server import SERVER_CREDENTIAL, guarded_server

HEADERS = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with (
        guarded_server(tmp_path_factory.mktemp("server"), "orchestration.server_process") as server,
        server.client(SERVER_CREDENTIAL) as client,
    ):
        yield client


def _nested(levels: int) -> bytes:
    return b"[" * levels + b'"[[\\"[["' + b"]" * levels


def test_deep_parameters_are_refused_and_lists_stay_readable(api: httpx.Client) -> None:
    flow = api.post("/flows/", json={"name": "f"}).json()["id"]
    deployment = api.post("/deployments/", json={"name": "d", "flow_id": flow}).json()["id"]
    path = f"/deployments/{deployment}/create_flow_run"

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
