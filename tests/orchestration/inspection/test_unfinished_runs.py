"""Tests of `orchestrate runs`, on a real server."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from orchestration.__main__ import main
from tests.orchestration.inspection.work_pool import WorkPool


def test_runs_lists_stuck_runs_with_obstacle(pool: WorkPool, capsys: pytest.CaptureFixture[str]) -> None:
    due = {"state_details": {"scheduled_time": (datetime.now(UTC) - timedelta(minutes=5)).isoformat()}}
    late = pool.run(state={"type": "SCHEDULED"} | due)
    pool.ask("PATCH", f"/work_pools/{pool.name}", {"is_paused": True})
    assert main(["runs", "--stuck", "--json"]) == 2
    [found] = [run for run in json.loads(capsys.readouterr().out) if run["id"] == late["id"]]
    assert "is paused" in found["why"]
    pool.post(f"/flow_runs/{late['id']}/set_state", state={"type": "RUNNING"}, force=True)
    main(["runs", "--stuck", "--json"])
    assert late["id"] not in capsys.readouterr().out, "a Running run is listed as stuck"
    tomorrow = {"scheduled_time": (datetime.now(UTC) + timedelta(days=1)).isoformat()}
    retry = {"type": "SCHEDULED", "name": "AwaitingRetry", "state_details": tomorrow}
    pool.post(f"/flow_runs/{late['id']}/set_state", state=retry, force=True)
    main(["runs", "--stuck", "--json"])
    assert late["id"] not in capsys.readouterr().out, "a run whose retry is due tomorrow is listed as stuck"
    pool.post(f"/flow_runs/{late['id']}/set_state", state={"type": "RUNNING"}, force=True)
    main(["runs"])
    assert f"{late['name']}  " in capsys.readouterr().out


def test_control_characters_of_runs_are_escaped(pool: WorkPool, capsys: pytest.CaptureFixture[str]) -> None:
    name = f"{pool.name}\x1b[2J\nheron"
    run = pool.run({"type": "CRASHED", "message": "\x1b]0;title\x07"}, name=name)
    pool.run({"type": "RUNNING"}, name=name)
    capsys.readouterr()
    main(["runs"])
    main(["why", run["id"]])
    shown = "".join(capsys.readouterr())
    assert f"{pool.name}\\x1b[2J\\nheron  Running" in shown
    assert "\\x1b]0;title\\x07" in shown
    assert not set(shown) & {"\x1b", "\x07"}
