"""What becomes of events and logs when the Prefect API is away, hangs or refuses them."""

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


def test_what_waits_for_an_api_that_hangs_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what is being sent; and what comes after more lines than may wait is lost at once."""
    monkeypatch.setattr(outbox, "IMPATIENCE", 2 * outbox.INTERVAL)
    port = free_port()
    with silent(port), temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
        sender = outbox.Outbox()
        sender.event("one", {})
        sender.event("one", {})
        sender.event("two", {})
        sender.request("/artifacts/", {})
        assert sender.close() == outbox.Unsent(3, 0, "it has not answered")
        for number in range(outbox.LINES + 7):
            sender.line({"message": str(number)})
        assert sender.close() == outbox.Unsent(3, outbox.LINES + 7, "more than 20,000 waited at once")


def test_the_reason_is_why_the_api_was_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "IMPATIENCE", outbox.INTERVAL)
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        sender = outbox.Outbox()
        sender.event("one", {})
        wait_until(lambda: sender.close().reason.startswith("ConnectError: "), "the refusal", 240)
        assert sender.close().events == 1


def test_what_the_api_refuses_is_counted_and_not_sent_again(prefect_server: str) -> None:
    """And what comes after that is sent."""
    sender = outbox.Outbox()
    sender.event("one", {"no": "event"})
    sender.request("/artifacts/", {"type": "markdown", "data": "of no run"})
    sender.line({"no": "line"})
    unsent = sender.close()
    assert (unsent.events, unsent.lines) == (1, 1)
    assert "422" in unsent.reason


def test_dbt_goes_on_while_the_api_is_away(
    small_project: DbtProject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, prefect_server: str
) -> None:
    monkeypatch.setattr(outbox, "IMPATIENCE", 1.0)
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
    # A state and what was built, of each node, and both artifacts.
    assert int(counted[1]) >= 3 + 3 + 2
    assert int(counted[2]) > 3
    assert counted[3]
    assert "dbt was not disturbed" in caplog.text


def _event(run: str, name: str, related: int = 1, **payload: Any) -> dict[str, Any]:
    """An event of a flow run that is related to so many resources."""
    about = {"prefect.resource.id": f"prefect.flow-run.{run}", "prefect.resource.role": "flow-run"}
    others = [
        {"prefect.resource.id": f"postgres://shop/raw/tenant_{number}", "prefect.resource.role": "asset"}
        for number in range(1, related)
    ]
    return {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": f"outbox.{name}",
        "resource": {"prefect.resource.id": f"outbox.{name}", "prefect.resource.name": name},
        "related": [about, *others],
        "payload": payload,
    }


@contextlib.contextmanager
def _limited(url: str, most: int) -> Iterator[str]:
    """A proxy that answers 413 to more bytes than it passes on, as an ingress controller does; its URL."""

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(client.get(self.path.removeprefix("/api")))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kind = {"Content-Type": self.headers["Content-Type"]}
            path = self.path.removeprefix("/api")
            self._answer(client.post(path, content=body, headers=kind) if len(body) <= most else None)

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


def test_refused_event_costs_only_itself(server: Server, prefect_server: str) -> None:
    """The warning names it in one line; what has too many related resources, or characters, is cut down and sent."""
    run = str(uuid4())
    sender = outbox.Outbox()
    sent = {f"outbox.number-{number}" for number in range(250)} | {"outbox.wide", "outbox.strange"}
    for name in sorted(sent):
        odd = {"text": "NUL \0 and half \ud83d"} if name == "outbox.strange" else {}
        sender.event(name, _event(run, name.removeprefix("outbox."), 150 if name == "outbox.wide" else 1, **odd))
        if name == "outbox.number-7":
            sender.event("refused", _event(run, "refused") | {"occurred": "yesterday"})
            sender.line({"message": "refused\nin two lines", "level": "high"})
    line = {"name": "dbt", "level": 20, "timestamp": datetime.now(UTC).isoformat(), "flow_run_id": run}
    for number in range(250):
        sender.line(line | {"message": f"line {number}\0"})
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


def test_batch_that_a_proxy_refuses_is_sent_in_parts(server: Server, prefect_server: str) -> None:
    """And a line that is too long by itself is cut."""
    run = str(uuid4())
    line = {"name": "dbt", "level": 20, "timestamp": datetime.now(UTC).isoformat(), "flow_run_id": run}
    with _limited(prefect_server, 20_000) as url, temporary_settings({PREFECT_API_URL: url}):
        sender = outbox.Outbox()
        for number in range(40):
            sender.line(line | {"message": f"{number} {'x' * (90_000 if number == 20 else 900)}"})
            sender.event(str(number), _event(run, f"number-{number}", text="x" * (90_000 if number == 20 else 900)))
        assert not sender.close()
    lengths = {line["message"].split()[0]: len(line["message"]) for line in server.logs(run)}
    assert len(lengths) == 40
    assert 9_000 < lengths["20"] < 20_000
    wait_until(lambda: len(server.events(run, "outbox.")) == 40, "all events", 240)
