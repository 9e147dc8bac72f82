"""Names, messages and logs of any text: the server answers on, and no command lets them control the terminal."""

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any
from unittest.mock import patch

import httpx
import pytest
import yaml
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from orchestration.__main__ import main as orchestrate
from orchestration.operations import __main__ as operations
from orchestration.operations import port_forward, status
from orchestration.operations.environment import Environment
from orchestration.terminal import MAX_LINE_CHARACTERS
from tests.orchestration.inspection.work_pool import WorkPool
from tests.orchestration.test_terminal import Terminal
from tests.parts import client_of, examples

CONTROLS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
COLOURS = r"\x1b\[[0-79;]*m"

TRICKS = (
    "\x1b[2J", "\x1b]0;title\x07", "\x1b[8m", "\x9b31m", "\r", "\x7f", "\n", "\n-- run is Completed", "\u202e",
    "\u2028",
    "[red]", "[/]", "[link=file:///]", "{{ x }}", "\\x1b", "'", '"', ": ", "#", "- ", "\t", "é", "飞", "🙂",
)  # fmt: skip
"""Texts that control a terminal, are markup of rich, YAML or Jinja, or look like a line of the command."""


def _name(text: str) -> str:
    """Return a text without what the server refuses in names, and without placeholders, which no file can express."""
    return re.sub(r"[/%&<>{}]", "", text).strip() or "x"


TEXT = st.lists(st.sampled_from(TRICKS) | st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
"""Any text. Postgres stores no NUL."""

NAME = TEXT.map(lambda parts: _name("".join(parts)))
"""Any name that the server takes for a deployment or a pool."""


@pytest.fixture(scope="module")
def api(prefect_server: str) -> Iterator[httpx.Client]:
    with client_of(prefect_server) as client:
        yield client


def _run(api: httpx.Client, name: str, message: str) -> dict[str, Any]:
    """Create a deployment and a finished run that have the name, a state with the message, and log lines with it."""
    pool = WorkPool(api)
    flow = pool.post("/flows/", name=f"{pool.name}{name}")["id"]
    deployment = pool.post(
        "/deployments/", name=name, flow_id=flow, work_pool_name=pool.name, tags=[name],
        entrypoint="flow.py:flow",
    )  # fmt: skip
    run = pool.post(
        f"/deployments/{deployment['id']}/create_flow_run", state={"type": "SCHEDULED"}, name=name, tags=[name]
    )
    pool.post(f"/flow_runs/{run['id']}/set_state", state={"type": "RUNNING", "message": message}, force=True)
    line = {"name": name, "level": 20, "timestamp": "2026-01-01T00:00:00Z", "flow_run_id": run["id"]}
    api.post("/logs/", json=[line | {"message": text} for text in (message, name)]).raise_for_status()
    labels = {"reconciler.peak": 2**20}
    api.patch(f"/flow_runs/{run['id']}/labels", json=labels).raise_for_status()
    return run | {"pool": pool, "deployment": f"{pool.name}{name}/{name}"}


def _end(api: httpx.Client, run: dict[str, Any], message: str) -> None:
    """Complete a run, with the last line of its log."""
    state = {"type": "COMPLETED", "message": message}
    api.post(f"/flow_runs/{run['id']}/set_state", json={"state": state, "force": True}).raise_for_status()
    line = {"name": "l", "level": 20, "message": "Finished in state Completed()", "flow_run_id": run["id"]}
    api.post("/logs/", json=[line | {"timestamp": "2026-01-01T00:00:01Z"}]).raise_for_status()


def _remove(api: httpx.Client, run: dict[str, Any]) -> None:
    api.delete(f"/flow_runs/{run['id']}").raise_for_status()
    api.delete(f"/deployments/{run['deployment_id']}").raise_for_status()
    api.delete(f"/work_pools/{run['pool'].name}").raise_for_status()


@contextmanager
def _operations(api: httpx.Client) -> Iterator[None]:
    """Let `make` targets reach the server of the test. The cluster has nothing to say about its runs."""

    @contextmanager
    def api_client(_: Environment) -> Iterator[httpx.Client]:
        yield api

    def read_status(_: Environment) -> dict[str, Any]:
        return {"components": [], "problems": []} | status._read_api(api)

    with (
        patch.object(port_forward, "api_client", api_client),
        patch.object(status, "read_status", read_status),
        patch.object(operations, "resolve", lambda *_: Environment("local", "none", "none")),
        patch("orchestration.operations.follow_run.POLL_SECONDS", 0.0),
    ):
        yield


def _printed(command: Callable[[list[str]], int], arguments: list[str], stream: type[io.StringIO]) -> str:
    output = stream()
    with redirect_stdout(output), redirect_stderr(output):
        command(arguments)
    return output.getvalue()


def _assert_harmless(shown: str, *, is_terminal: bool) -> None:
    left = re.sub(COLOURS, "", shown) if is_terminal else shown
    assert re.findall(CONTROLS, left) == []


# Without shrinking: an example costs a second of the server.
@settings(
    max_examples=examples(0.02), suppress_health_check=[HealthCheck.too_slow], phases=[Phase.explicit, Phase.generate]
)
@example(name=_name("".join(TRICKS)), message="".join(TRICKS))
@given(name=NAME, message=TEXT.map("".join))
def test_commands_print_any_text_harmlessly(api: httpx.Client, name: str, message: str) -> None:
    run = _run(api, name, message)
    try:
        commands = [
            (orchestrate, ["runs"]),
            (orchestrate, ["why", run["id"]]),
            (orchestrate, ["memory", run["deployment"]]),
            (orchestrate, ["export", "--owner", "none"]),
            (operations.main, ["status"]),
        ]
        with _operations(api):
            for command, arguments in commands:
                _assert_harmless(_printed(command, arguments, io.StringIO), is_terminal=False)
            for command, arguments in (commands[1], commands[-1]):  # these have colours
                _assert_harmless(_printed(command, arguments, Terminal), is_terminal=True)
            of_runs = _printed(orchestrate, ["runs"], io.StringIO)
            assert len(of_runs.splitlines()) == len(json.loads(_printed(orchestrate, ["runs", "--json"], io.StringIO)))
            for command, arguments in (
                (orchestrate, ["runs", "--json"]),
                (orchestrate, ["why", run["id"], "--json"]),
                (orchestrate, ["memory", run["deployment"], "--json"]),
                (operations.main, ["status", "--json"]),
            ):
                shown = _printed(command, arguments, io.StringIO)
                _assert_harmless(shown, is_terminal=False)
                assert name in _texts(json.loads(shown)), arguments
            with redirect_stdout(io.StringIO()) as output:
                orchestrate(["export", "--owner", "none"])
            exported = yaml.safe_load(output.getvalue())
            assert name in {deployment["name"] for deployment in exported["deployments"]}
            _end(api, run, message)
            for stream in (io.StringIO, Terminal):
                shown = _printed(operations.main, ["logs", run["id"]], stream)
                _assert_harmless(shown, is_terminal=stream is Terminal)
                assert len(re.findall(r"^-- ", shown, flags=re.M)) == 1 + (message + name).count("\n-- ")
    finally:
        _remove(api, run)


def _texts(value: Any) -> str:
    """Return all texts of a JSON document."""
    if isinstance(value, dict | list):
        return "\0".join(_texts(item) for item in (value.values() if isinstance(value, dict) else value))
    return str(value)


def test_line_of_a_megabyte_is_cut(api: httpx.Client) -> None:
    message = "\x1b[2Jx" * 200_000
    run = _run(api, "long", message)
    with _operations(api):
        explained = _printed(orchestrate, ["why", run["id"]], io.StringIO)
        _end(api, run, message)
        followed = _printed(operations.main, ["logs", run["id"]], io.StringIO)
    _remove(api, run)
    for shown in (explained, followed):
        _assert_harmless(shown, is_terminal=False)
        more = len(message) - MAX_LINE_CHARACTERS
        assert f"... ({more:,} more characters)" in shown
        assert max(map(len, shown.splitlines())) < 5 * MAX_LINE_CHARACTERS


def test_output_of_another_encoding_shows_escapes() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(stream), contextlib.suppress(SystemExit):
        orchestrate(["runs", "--stuck", "飞\ud800"])
    with redirect_stderr(stream), contextlib.suppress(SystemExit):
        orchestrate(["runs", "飞\ud800"])
    stream.flush()
    written = stream.buffer.getvalue()
    assert rb"\u98de\ud800" in written


PARAMETERS = {"a": "x" * 600_000}

BAD_REQUESTS = {
    "no JSON": (b"{day: 1}", 422, "JSON decode error"),
    "no text": (b"\xff\xfe\x00", 400, "error parsing the body"),
    "nothing": (b"", 422, "Field required"),
    "another type": (b"[]", 422, "valid dictionary"),
    "deep nesting": (b"[" * 100_000, 400, "error parsing the body"),
    "parameters over the limit": (
        json.dumps({"state": {"type": "SCHEDULED"}, "parameters": PARAMETERS}).encode(), 422,
        "parameters must be less than 524,288 bytes when serialized (got 600,008 bytes)",
    ),
}  # fmt: skip
"""Bodies of a request for a run, the status of the answer, and a part of its text."""


@pytest.fixture(scope="module")
def good(api: httpx.Client) -> Iterator[dict[str, Any]]:
    """Yield a run of a deployment."""
    run = _run(api, "good", "good")
    yield run
    _remove(api, run)


@pytest.mark.parametrize("request_", BAD_REQUESTS)
def test_bad_request_is_refused_and_the_server_answers_on(
    api: httpx.Client, good: dict[str, Any], request_: str
) -> None:
    content, status_code, text = BAD_REQUESTS[request_]
    path = f"{api.base_url}deployments/{good['deployment_id']}/create_flow_run"
    answer = httpx.post(path, content=content, headers={"Content-Type": "application/json"}, timeout=75)
    assert (answer.status_code, text in answer.text) == (status_code, True), answer.text[:500]
    listed = api.post("/flow_runs/filter", json={"deployments": {"id": {"any_": [good["deployment_id"]]}}})
    assert [run["id"] for run in listed.raise_for_status().json()] == [good["id"]]


def test_limits_of_a_run_are_accepted(api: httpx.Client, good: dict[str, Any]) -> None:
    body = {"state": {"type": "SCHEDULED"}, "tags": [f"t{number}" for number in range(90)]}
    body["parameters"] = {"a": "x" * 520_000}
    path = f"/deployments/{good['deployment_id']}/create_flow_run"
    run = api.post(path, json=body).raise_for_status().json()
    assert run["id"] in _printed(orchestrate, ["runs", "--json"], io.StringIO)
    api.delete(f"/flow_runs/{run['id']}").raise_for_status()
