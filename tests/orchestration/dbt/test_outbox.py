"""What becomes of events and logs when the Prefect API is away or slow."""

import re
from typing import Any

import httpx
import pytest
from prefect import flow

from orchestration.dbt import DbtProject, outbox
from tests.orchestration.dbt.projects import NODES


def test_an_api_that_is_away_is_counted(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "IMPATIENCE", 2.0)

    def away(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setattr(outbox.Outbox, "_request", away)
    sender = outbox.Outbox()
    for number in range(outbox.LINES + 7):
        sender.line({"message": str(number)})
    sender.event("one", {})
    sender.event("one", {})
    unsent = sender.close()
    assert (unsent.events, unsent.lines) == (1, outbox.LINES + 7)
    assert "wait" in unsent.reason or "connection" in unsent.reason


def test_dbt_goes_on_when_the_api_takes_nothing(
    project: DbtProject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, prefect_server: str
) -> None:
    monkeypatch.setattr(outbox, "IMPATIENCE", 1.0)

    def refuse(*_: Any, **__: Any) -> bool:
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr(outbox.Outbox, "_request", refuse)

    @flow
    def daily() -> None:
        assert len(project.build().nodes) == NODES

    state = daily(return_state=True)
    assert state.is_completed(), state.message
    counted = re.search(r"The Prefect API did not take (\d+) events and (\d+) lines", caplog.text)
    assert counted
    assert int(counted[1]) > NODES  # the assets and the summary too
    assert int(counted[2]) > NODES / 2
    assert "ReadTimeout: timed out" in caplog.text
    assert "dbt was not disturbed" in caplog.text
