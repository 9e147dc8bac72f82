"""All clients of the Prefect API, with a server that has CSRF protection."""

import asyncio
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from orchestration import prefect_api as prefect
from orchestration.__main__ import main
from orchestration.dbt import outbox
from orchestration.deployments import watch
from orchestration.deployments.record import slug
from orchestration.prefect_api import Access, Server
from orchestration.reconciler.actions import _set_state
from orchestration.reconciler.model import Run
from orchestration.runs import run_client
from tests import parts
from tests.parts import asked, client_of


@pytest.fixture
def api_in_settings(protected: str) -> Iterator[str]:
    """Yield the URL of the server with CSRF protection, which Prefect's settings name."""
    with temporary_settings({PREFECT_API_URL: protected}):
        yield protected


@pytest.fixture(autouse=True)
def _any_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the supervisor's client wait for a busy server. In a pod it asks again."""
    monkeypatch.setattr(run_client, "CHECK_TIMEOUT_SECONDS", 60)


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the API's URL of a server with CSRF protection."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED", "true")
        with parts.prefect_server(tmp_path_factory.mktemp("protected")) as url:
            environment.delenv("PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED")
            yield url


def test_every_client_works_with_csrf_protection(
    api_in_settings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = httpx.post(f"{api_in_settings}/work_pools/filter", json={}, timeout=75)
    assert (refused.status_code, refused.json()) == (403, {"detail": "Missing CSRF token."})

    # sync, drift
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.py").write_text("from prefect import flow\n\n@flow\ndef etl() -> None: ...\n")
    made = {"name": "nightly", "entrypoint": "flow.py:etl", "work_pool": {"name": "pool"}, "tags": ["a"]}
    document = {"name": "team", "work_pools": [{"name": "pool", "type": "process"}], "deployments": [made]}
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(document))
    assert [main([command]) for command in ("sync", "plan", "diff")] == [0, 0, 0], capsys.readouterr()

    with client_of(api_in_settings, Access(api_in_settings)) as client:
        asked(client, "PATCH", "/work_pools/pool", {"description": "by hand"})

        async def look() -> None:
            async with prefect.connected() as server:
                await watch.report(server, "team", (), "All is as it was.")

        asyncio.run(look())
        assert asked(client, "GET", f"/artifacts/drift-{slug('team')}/latest")["data"] == "All is as it was."

        flow = asked(client, "POST", "/flows/", {"name": "etl"})["id"]
        run = asked(client, "POST", "/flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})

        # supervisor
        supervisor = run_client.RunClient(api_in_settings, run["id"], "job")
        supervisor.set_state({"type": "SCHEDULED", "name": "AwaitingRetry"}, run["state_id"])
        assert asked(client, "GET", f"/flow_runs/{run['id']}")["state"]["name"] == "AwaitingRetry"
        assert supervisor.release_leases([str(uuid4())]) == []

        # reconciler
        run = asked(client, "GET", f"/flow_runs/{run['id']}")

        async def act() -> str:
            async with prefect.connected() as server:
                await server.ask("PATCH", f"/flow_runs/{run['id']}/labels", {"reconciler.cause": "crash"})
                return await _set_state(server, Run.read(run), "CRASHED", "Crashed", "Its pod is gone")

        assert asyncio.run(act()).endswith("is Crashed: Its pod is gone")

        # dbt
        sender = outbox.Outbox()
        event = {"id": str(uuid4()), "occurred": datetime.now(UTC).isoformat(), "event": "a", "payload": {}}
        sender.add_event("one", event | {"resource": {"prefect.resource.id": "dbt"}})
        assert not sender.close()


def test_expired_csrf_token_is_renewed(protected: str) -> None:
    access = Access(protected)

    async def ask() -> list[object]:
        async with httpx.AsyncClient(base_url=protected, auth=access, timeout=60) as client:
            server = Server(client, protected)
            first = await server.ask("POST", "/work_pools/filter", {})
            assert access._token
            access._token = "forgotten"  # noqa: S105 - a server forgets tokens after an hour
            return [first, await server.ask("POST", "/work_pools/filter", {})]

    first, second = asyncio.run(ask())
    assert first == second
    supervisor = run_client.RunClient(protected, str(uuid4()), "job")
    supervisor.csrf_headers = {"Prefect-Csrf-Token": "forgotten", "Prefect-Csrf-Client": "any"}
    assert supervisor.release_leases([str(uuid4())]) == []


def test_server_without_csrf_protection_gets_no_token_request(prefect_server: str) -> None:
    paths = []
    with httpx.Client(
        base_url=prefect_server,
        auth=Access(prefect_server, "user:password"),
        timeout=60,
        event_hooks={"request": [lambda request: paths.append(request.url.path)]},
    ) as client:
        assert client.post("/work_pools/filter", json={}).is_success
    assert [re.sub("^/api", "", path) for path in paths] == ["/work_pools/filter"]
