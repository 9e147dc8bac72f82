"""The reconciler renews the leases of deployments' slots, as a real server records them in files."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from orchestration.prefect_api import Server
from orchestration.reconciler.model import Run
from orchestration.reconciler.slot_leases import FIRST_RENEWAL, RENEWAL_INTERVAL, SlotLeases
from tests.parts import asked, client_of, prefect_server

STORAGE = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="module")
def api(home: Path) -> Iterator[httpx.Client]:
    with prefect_server(home, **STORAGE) as url, client_of(url) as client:
        yield client


def _pending_run(api: httpx.Client) -> Run:
    """Create a Pending run of a deployment with one slot."""
    flow = asked(api, "POST", "/flows/", {"name": "f"})["id"]
    body = {"name": uuid4().hex, "flow_id": flow, "concurrency_limit": 1}
    deployment = asked(api, "POST", "/deployments/", body)["id"]
    made = asked(api, "POST", f"/deployments/{deployment}/create_flow_run", {})["id"]
    asked(api, "POST", f"/flow_runs/{made}/set_state", {"state": {"type": "PENDING"}})
    return Run.read(asked(api, "GET", f"/flow_runs/{made}"))


def _expiration(home: Path, run: Run) -> datetime:
    [file] = home.rglob(f"{run.slot_lease}.json")
    return datetime.fromisoformat(json.loads(file.read_text())["expiration"])


def _renew(api: httpx.Client, *rounds: tuple[Run, timedelta]) -> None:
    """Run rounds, each with a run and how long after the run's state the round is."""

    async def renew() -> Any:
        async with httpx.AsyncClient(base_url=api.base_url, timeout=75) as client:
            leases = SlotLeases(Server(client, str(api.base_url)))
            for run, age in rounds:
                await leases.renew([run], run.since + age)

    asyncio.run(renew())


def test_lease_of_a_run_that_stays_pending_is_renewed(api: httpx.Client, home: Path) -> None:
    run = _pending_run(api)
    before = _expiration(home, run)
    _renew(api, (run, FIRST_RENEWAL))
    _renew(api, (replace(run, type="RUNNING"), RENEWAL_INTERVAL))
    assert _expiration(home, run) == before, "the engine renews the lease of a Running run"
    late = FIRST_RENEWAL + timedelta(seconds=1)
    _renew(api, (run, late))
    renewed = _expiration(home, run)
    assert renewed > before


def test_lease_is_renewed_once_in_an_interval(api: httpx.Client, home: Path) -> None:
    run, requests = _pending_run(api), []
    late = FIRST_RENEWAL + timedelta(seconds=1)
    original = Server.ask

    async def ask(self: Server, *arguments: Any, **options: Any) -> Any:
        requests.append(arguments)
        return await original(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "ask", ask)
        _renew(api, (run, late), (run, late + RENEWAL_INTERVAL), (run, late + RENEWAL_INTERVAL + timedelta(seconds=1)))
    assert len(requests) == 2


def test_lease_that_has_expired_is_left_to_the_server(api: httpx.Client, home: Path) -> None:
    run = _pending_run(api)
    asked(api, "POST", f"/flow_runs/{run.id}/set_state", {"state": {"type": "CANCELLED"}, "force": True})
    assert not list(home.rglob(f"{run.slot_lease}.json"))
    _renew(api, (run, FIRST_RENEWAL * 2))
