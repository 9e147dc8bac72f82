"""What becomes of events and logs when the Prefect API is away, hangs or refuses them."""

import contextlib
import re

import pytest
from prefect import flow
from prefect.settings import PREFECT_API_URL, temporary_settings

from orchestration.dbt import DbtProject, outbox
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
