"""Answers of the API while migrations run. tests/orchestration/test_upgrade.py has the same on a real server."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from orchestration import maintenance
from orchestration.access.asgi import Receive, Scope, Send
from orchestration.access.control import AccessControl
from orchestration.access.credentials import Credentials, sign_run
from orchestration.maintenance import MaintenanceAnswers

Look = Callable[[], Awaitable[tuple[bool, str | None]]]


async def _yes() -> tuple[bool, str | None]:
    return True, "a"


async def _no() -> tuple[bool, str | None]:
    return False, "a"


async def _fails() -> tuple[bool, str | None]:
    raise OSError("the database is away")


def _answer(status: int, look: Look, error: Exception | None = None) -> httpx.Response:
    """Return the answer to a request that the API answers by a status, and by an error after that."""

    async def api(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": b"api"})
        if error:
            raise error

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(MaintenanceAnswers(api, look))
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            return await client.get("/")

    return asyncio.run(ask())


@pytest.mark.parametrize("status", [500, 503])
def test_failure_while_migrations_run_has_clients_wait(status: int) -> None:
    answer = _answer(status, _yes, RuntimeError("raised again after the answer"))
    assert answer.status_code == 503
    assert (answer.headers["Prefect-Maintenance"], answer.headers["Retry-After"]) == ("true", "5")
    assert "schema" in answer.json()["exception_message"]


@pytest.mark.parametrize(
    ("status", "look"), [(500, _no), (503, _no), (200, _yes), (404, _yes), (422, _yes), (500, _fails)]
)
def test_other_answers_stay(status: int, look: Look) -> None:
    answer = _answer(status, look)
    assert (answer.status_code, answer.text) == (status, "api")
    assert "Prefect-Maintenance" not in answer.headers


async def _fail(_scope: Scope, _receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 500, "headers": []})
    await send({"type": "http.response.body", "body": b"api"})


def test_requests_that_fail_together_look_once_into_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "CACHE_SECONDS", 600.0)
    looks = []

    async def look() -> tuple[bool, str | None]:
        looks.append("look")
        await asyncio.sleep(0.01)
        return True, "a"

    async def ask() -> set[int]:
        transport = httpx.ASGITransport(MaintenanceAnswers(_fail, look))
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            return {answer.status_code for answer in await asyncio.gather(*(client.get("/") for _ in range(5)))}

    assert asyncio.run(ask()) == {503}
    assert looks == ["look"]


@pytest.mark.parametrize(
    ("during", "statuses"),
    [([(False, "b")], [503, 500]), ([(True, "b"), (False, "b")], [503, 500]), ([(False, "a")], [500, 500])],
    ids=["the schema has changed since the begin", "migrations were seen", "no migration"],
)
def test_request_that_fails_after_the_migrations_has_its_client_wait(
    monkeypatch: pytest.MonkeyPatch, during: list[tuple[bool, str]], statuses: list[int]
) -> None:
    """The first request fails after all of `during` was seen, the second one begins then."""
    monkeypatch.setattr(maintenance, "CACHE_SECONDS", 0.0)
    seen: list[tuple[bool, str]] = [(False, "a")]

    async def look() -> tuple[bool, str | None]:
        return seen.pop(0) if len(seen) > 1 else seen[0]

    async def ask() -> list[int]:
        begun, released = asyncio.Event(), asyncio.Event()

        async def api(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"] == "/slow":
                begun.set()
                await released.wait()
            await _fail(scope, receive, send)

        transport = httpx.ASGITransport(MaintenanceAnswers(api, look))
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            slow = asyncio.create_task(client.get("/slow"))
            await begun.wait()
            seen[:] = during
            for _ in during[1:]:
                await client.get("/")
            released.set()
            return [(await slow).status_code, (await client.get("/")).status_code]

    assert asyncio.run(ask()) == statuses


@pytest.mark.parametrize(("kept_seconds", "status"), [(600.0, 503), (0.0, 500)])
def test_busy_database_leaves_the_last_answer_for_a_while(
    monkeypatch: pytest.MonkeyPatch, kept_seconds: float, status: int
) -> None:
    monkeypatch.setattr(maintenance, "CACHE_SECONDS", 0.0)
    monkeypatch.setattr(maintenance, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(maintenance, "KEPT_SECONDS", kept_seconds)
    looks: list[str] = []

    async def look() -> tuple[bool, str | None]:
        looks.append("look")
        if len(looks) > 1:
            await asyncio.sleep(600)
        return True, "a"

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(MaintenanceAnswers(_fail, look))
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            return [(await client.get("/")).status_code for _ in range(2)]

    assert asyncio.run(ask()) == [503, status]


def test_run_waits_whose_rights_cannot_be_checked_meanwhile(tmp_path: Path) -> None:
    """Access control reads whose task run it is, and answers 503 when it cannot read."""
    (tmp_path / "run-key").write_text("k" * 40)
    for role in ("operator", "viewer", "worker", "reconciler", "sync"):
        (tmp_path / role).write_text(f"{role}:password-of-{role}")
    guarded = AccessControl(_fail, Credentials(tmp_path, "admin:of-the-server"), "admin:of-the-server")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(MaintenanceAnswers(guarded, _yes))
        user, _, password = sign_run("k" * 40, uuid4()).partition(":")
        async with httpx.AsyncClient(transport=transport, base_url="http://api", auth=(user, password)) as client:
            return await client.post(f"/task_runs/{uuid4()}/set_state", json={"state": {"type": "RUNNING"}})

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.headers["Prefect-Maintenance"]) == (503, "true")


def test_error_stays_an_error_without_migrations() -> None:
    with pytest.raises(RuntimeError, match="shown"):
        _answer(500, _no, RuntimeError("shown"))
