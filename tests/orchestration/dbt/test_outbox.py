"""Events and logs of dbt while the Prefect API is unreachable, hangs or refuses them."""

import contextlib
import http.server
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from orchestration.dbt import DbtProject, outbox
from tests.orchestration.dbt.task_runs import Server
from tests.parts import free_port, wait_until
from tests.relay import relayed, silent


def test_unsent_items_are_counted_when_the_api_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The items of the hanging request count too. Lines above the maximum are dropped at once."""
    monkeypatch.setattr(outbox, "STALL_TIMEOUT_SECONDS", 2 * outbox.SEND_INTERVAL_SECONDS)
    port = free_port()
    with silent(port), temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
        sender = outbox.Outbox()
        sender.add_event("one", {})
        sender.add_event("one", {})
        sender.add_event("two", {})
        sender.add_request("/artifacts/", {})
        assert sender.close() == outbox.Unsent(3, 0, "it has not answered")
        for number in range(outbox.MAXIMUM_LOG_LINES + 7):
            sender.add_log_line({"message": str(number)})
        assert sender.close() == outbox.Unsent(3, outbox.MAXIMUM_LOG_LINES + 7, "more than 20,000 waited at once")


def test_unreachable_api_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "STALL_TIMEOUT_SECONDS", outbox.SEND_INTERVAL_SECONDS)
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        sender = outbox.Outbox()
        sender.add_event("one", {})
        wait_until(lambda: sender.close().reason.startswith("ConnectError: "), "the refusal", 240)
        assert sender.close().events == 1


def test_refused_items_are_counted_and_not_retried(prefect_server: str) -> None:
    """The request after the refused event is sent."""
    sender = outbox.Outbox()
    sender.add_event("one", {"no": "event"})
    sender.add_request("/artifacts/", {"type": "markdown", "data": "of no run"})
    sender.add_log_line({"no": "line"})
    unsent = sender.close()
    assert (unsent.events, unsent.lines) == (1, 1)
    assert "422" in unsent.reason


def test_dbt_continues_while_the_api_is_unreachable(
    small_project: DbtProject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, prefect_server: str
) -> None:
    monkeypatch.setattr(outbox, "STALL_TIMEOUT_SECONDS", 1.0)
    port = free_port()
    statuses: list[str] = []
    with contextlib.ExitStack() as api, temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):

        @flow
        def daily() -> None:
            api.close()
            statuses.extend(node.status for node in small_project.build().nodes)
            api.enter_context(relayed(port, prefect_server))

        api.enter_context(relayed(port, prefect_server))
        state = daily(return_state=True)
        assert state.is_completed(), state.message
    assert statuses == ["success"] * 3
    counted = re.search(r"The Prefect API did not take (\d+) events and (\d+) lines.* \((.*)\)\.", caplog.text)
    assert counted
    # For each node a state and an asset, and two artifacts.
    assert int(counted[1]) >= 3 + 3 + 2
    assert int(counted[2]) > 3
    assert counted[3]
    assert "dbt was not disturbed" in caplog.text


def _event(run: str, name: str, related: int = 1, **payload: Any) -> dict[str, Any]:
    """Return an event of a flow run with that number of related resources."""
    flow_run = {"prefect.resource.id": f"prefect.flow-run.{run}", "prefect.resource.role": "flow-run"}
    others = [
        {"prefect.resource.id": f"postgres://shop/raw/tenant_{number}", "prefect.resource.role": "asset"}
        for number in range(1, related)
    ]
    return {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": f"outbox.{name}",
        "resource": {"prefect.resource.id": f"outbox.{name}", "prefect.resource.name": name},
        "related": [flow_run, *others],
        "payload": payload,
    }


@contextlib.contextmanager
def _size_limiting_proxy(url: str, maximum_bytes: int) -> Iterator[str]:
    """Yield the URL of a proxy that answers 413 to larger requests, as an ingress controller does."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(client.get(self.path.removeprefix("/api")))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kind = {"Content-Type": self.headers["Content-Type"]}
            path = self.path.removeprefix("/api")
            self._answer(client.post(path, content=body, headers=kind) if len(body) <= maximum_bytes else None)

        def _answer(self, answer: httpx.Response | None) -> None:
            content = answer.content if answer else b""
            self.send_response(answer.status_code if answer else 413)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with (
        httpx.Client(base_url=url, timeout=60) as client,
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy,
    ):
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}/api"
        proxy.shutdown()


def test_refused_items_do_not_stop_the_others(server: Server, prefect_server: str) -> None:
    """The reason names the refused items in one line. Too many related resources, and NUL characters, are cut."""
    run = str(uuid4())
    sender = outbox.Outbox()
    sent = {f"outbox.number-{number}" for number in range(250)} | {"outbox.wide", "outbox.strange"}
    for name in sorted(sent):
        odd = {"text": "NUL \0 and half \ud83d"} if name == "outbox.strange" else {}
        sender.add_event(name, _event(run, name.removeprefix("outbox."), 150 if name == "outbox.wide" else 1, **odd))
        if name == "outbox.number-7":
            sender.add_event("refused", _event(run, "refused") | {"occurred": "yesterday"})
            sender.add_log_line({"message": "refused\nin two lines", "level": "high"})
    line = {"name": "dbt", "level": 20, "timestamp": datetime.now(UTC).isoformat(), "flow_run_id": run}
    for number in range(250):
        sender.add_log_line(line | {"message": f"line {number}\0"})
    unsent = sender.close()
    assert (unsent.events, unsent.lines) == (1, 1)
    assert unsent.reason.startswith("it refused the event outbox.refused of refused, the line of log 'refused\\nin two")
    assert "422 Unprocessable" in unsent.reason
    assert "\n" not in unsent.reason
    assert len(unsent.reason) < 500

    def arrived() -> bool:
        return {event["event"] for event in server.events(run, "outbox.")} == sent

    wait_until(arrived, "all events but the refused one", 240)
    assert len(server.logs(run)) == 250


def test_batch_above_the_limit_of_a_proxy_is_sent_in_parts(server: Server, prefect_server: str) -> None:
    """A single line above the limit is cut."""
    run = str(uuid4())
    line = {"name": "dbt", "level": 20, "timestamp": datetime.now(UTC).isoformat(), "flow_run_id": run}
    with _size_limiting_proxy(prefect_server, 20_000) as url, temporary_settings({PREFECT_API_URL: url}):
        sender = outbox.Outbox()
        for number in range(40):
            sender.add_log_line(line | {"message": f"{number} {'x' * (90_000 if number == 20 else 900)}"})
            sender.add_event(str(number), _event(run, f"number-{number}", text="x" * (90_000 if number == 20 else 900)))
        assert not sender.close()
    lengths = {line["message"].split()[0]: len(line["message"]) for line in server.logs(run)}
    assert len(lengths) == 40
    assert 9_000 < lengths["20"] < 20_000
    wait_until(lambda: len(server.events(run, "outbox.")) == 40, "all events", 240)
