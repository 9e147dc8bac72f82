"""A run sends a bounded number of log lines to the Prefect API."""

from logging import ERROR, INFO
from pathlib import Path

import pytest

from orchestration.errors import SettingsError
from orchestration.protocol import LOG_LIMIT_VARIABLE
from orchestration.runs.log_limit import LogLimit
from tests.orchestration.runs.deployed_runs import create_run, execute, log_lines
from tests.parts import client_of


@pytest.mark.parametrize(
    ("limit", "sent", "notices"),
    [("100k", range(70, 101), 1), pytest.param("", range(180, 181), 0, marks=pytest.mark.further)],
    ids=["limit", "none"],
)
def test_run_that_logs_too_much_completes_and_says_where_its_lines_are(
    prefect_server: str, limit: str, sent: range, notices: int
) -> None:
    with client_of(prefect_server) as api:
        run = create_run(api, "chatty_flow.py:chatty", Path(__file__).parent, lines=90)
        assert execute(run, prefect_server, {LOG_LIMIT_VARIABLE: limit}) == 0
        assert api.get(f"/flow_runs/{run}").json()["state_type"] == "COMPLETED"
        logged = log_lines(api, run)
    assert len([line for line in logged if " line " in line]) in sent
    assert len([line for line in logged if "used up 100k an hour. Read" in line]) == notices
    assert "the end" in logged, "it is an error"


def test_errors_have_a_reserve() -> None:
    limit = LogLimit("100k")
    assert limit.decide(99_999, INFO).is_sent
    assert not limit.decide(5000, INFO).is_sent
    assert [limit.decide(5000, ERROR).is_sent for _ in range(4)] == [True, True, False, False]


def test_lines_are_sent_again_when_the_limit_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("orchestration.runs.log_limit.time.monotonic", lambda: now)
    limit = LogLimit("60k")
    assert [limit.decide(20_000, INFO).is_sent for _ in range(4)] == [True, True, True, False]
    assert limit.decide(1, INFO) == (False, "")
    now = 50.0
    assert limit.decide(100, INFO) == (False, ""), "lines come back in pieces of a minute"
    now = 70.0
    assert limit.decide(100, INFO) == (True, "3 log lines before this one were not sent.")
    assert limit.decide(100, INFO) == (True, "")
    now = 10**6
    assert [limit.decide(20_000, INFO).is_sent for _ in range(4)] == [True, True, True, False], (
        "an hour's lines at most"
    )


@pytest.mark.parametrize("limit", ["lots", "-1Mi", "64MB"])
def test_wrong_limit_is_refused(limit: str) -> None:
    with pytest.raises(SettingsError, match=rf"LOG_LIMIT='{limit}' is no quantity\. Set it to"):
        LogLimit(limit)
