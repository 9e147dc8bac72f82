"""Answers of the API while migrations run. tests/orchestration/test_upgrade.py has the same on a real server."""

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

from orchestration.access.control import Receive, Scope, Send
from orchestration.maintenance import MaintenanceAnswers


async def _yes() -> bool:
    return True


async def _no() -> bool:
    return False


async def _fails() -> bool:
    raise OSError("the database is away")


def _answer(
    status: int, migrations_run: Callable[[], Awaitable[bool]], error: Exception | None = None
) -> httpx.Response:
    """Return the answer to a request that the API answers by a status, and by an error after that."""

    async def api(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"3")]})
        await send({"type": "http.response.body", "body": b"api"})
        if error:
            raise error

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(MaintenanceAnswers(api, migrations_run))
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
    ("status", "migrations_run"), [(500, _no), (503, _no), (200, _yes), (404, _yes), (422, _yes), (500, _fails)]
)
def test_other_answers_stay(status: int, migrations_run: Callable[[], Awaitable[bool]]) -> None:
    answer = _answer(status, migrations_run)
    assert (answer.status_code, answer.text) == (status, "api")
    assert "Prefect-Maintenance" not in answer.headers


def test_error_stays_an_error_without_migrations() -> None:
    with pytest.raises(RuntimeError, match="shown"):
        _answer(500, _no, RuntimeError("shown"))
