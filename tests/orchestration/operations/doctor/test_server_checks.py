"""Each check of the Prefect server is ok on a sound server, and finds its fault. The server is a real one."""

import asyncio
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch as patched

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from orchestration.__main__ import main
from orchestration.operations.doctor import server_checks
from orchestration.operations.doctor.findings import CHECKS, Finding, run_checks
from orchestration.operations.doctor.installation import Installation
from orchestration.prefect_api import connected
from tests.orchestration.inspection.work_pool import WorkPool
from tests.parts import client_of, prefect_server

CRON = {"cron": f"0 {(datetime.now(UTC).hour + 12) % 24} * * *", "timezone": "UTC"}
"""Half a day away, so that no run becomes due during a test."""

NAMES = ("prefect versions", "api latency", "clocks", "websocket", "work pools", "schedules", "late runs")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a server of its own, on which only these tests have work pools."""
    with prefect_server(tmp_path_factory.mktemp("prefect")) as url, temporary_settings({PREFECT_API_URL: url}):
        yield url


@pytest.fixture(scope="module")
def pool(url: str) -> Iterator[WorkPool]:
    """Yield a work pool with a worker, and a deployment with a schedule."""
    with client_of(url) as api:
        pool = WorkPool(api)
        pool.post(f"/work_pools/{pool.name}/workers/heartbeat", name="worker", heartbeat_interval_seconds=600)
        pool.ask("PATCH", f"/deployments/{pool.deployment}", {"schedules": [{"schedule": CRON, "active": True}]})
        yield pool


@pytest.fixture(autouse=True)
def _any_speed() -> Iterator[None]:
    """Call no answer slow: next to other tests each one may take a second."""
    with patched.multiple(server_checks, SLOW_SECONDS=60.0, TOO_SLOW_SECONDS=60.0):
        yield


async def _find(*names: str) -> dict[str, Finding]:
    async with connected() as server:
        chosen = [check for check in CHECKS if check.name in names]
        findings = await run_checks(Installation("no cluster is named", server), chosen)
        return {check.name: finding for check, finding in zip(chosen, findings, strict=True)}


def test_sound_server_passes_all_checks(pool: WorkPool) -> None:
    found = asyncio.run(_find(*NAMES))
    assert {name: finding.status for name, finding in found.items()} == dict.fromkeys(NAMES, "ok"), found


@contextmanager
def _deployment(pool: WorkPool, **change: Any) -> Iterator[None]:
    path = f"/deployments/{pool.deployment}"
    before = pool.ask("GET", path)
    pool.ask("PATCH", path, change)
    yield
    restored = {key: before[key] for key in change if key != "schedules"}
    pool.ask("PATCH", path, restored | {"schedules": [{"schedule": CRON, "active": True}]})


@contextmanager
def _closed_deployment(pool: WorkPool) -> Iterator[None]:
    """The API of deployments takes no limit of 0; that of limits does."""
    with _deployment(pool, concurrency_limit=1):
        limit = pool.ask("GET", f"/deployments/{pool.deployment}")["global_concurrency_limit"]
        pool.ask("PATCH", f"/v2/concurrency_limits/{limit['id']}", {"limit": 0})
        yield


@contextmanager
def _paused_queue(pool: WorkPool) -> Iterator[None]:
    path = f"/work_pools/{pool.name}/queues"
    pool.post(path, name="urgent", is_paused=True)
    yield
    pool.ask("DELETE", f"{path}/urgent")


@contextmanager
def _closed_queue(pool: WorkPool) -> Iterator[None]:
    path = f"/work_pools/{pool.name}/queues"
    pool.post(path, name="urgent", concurrency_limit=0)
    yield
    pool.ask("DELETE", f"{path}/urgent")


@contextmanager
def _pool(pool: WorkPool, **change: Any) -> Iterator[None]:
    path = f"/work_pools/{pool.name}"
    before = pool.ask("GET", path)
    pool.ask("PATCH", path, change)
    yield
    pool.ask("PATCH", path, {key: before[key] for key in change})


@contextmanager
def _no_worker(pool: WorkPool) -> Iterator[None]:
    other = WorkPool(pool.api)
    yield
    pool.ask("DELETE", f"/work_pools/{other.name}")
    pool.ask("DELETE", f"/deployments/{other.deployment}")


@contextmanager
def _no_pool(pool: WorkPool) -> Iterator[None]:
    other = WorkPool(pool.api)
    schedule = [{"schedule": CRON, "active": True}]
    pool.ask("PATCH", f"/deployments/{other.deployment}", {"schedules": schedule})
    pool.ask("DELETE", f"/work_pools/{other.name}")
    yield
    pool.ask("DELETE", f"/deployments/{other.deployment}")


@contextmanager
def _late_run(pool: WorkPool) -> Iterator[None]:
    due = (datetime.now(UTC) - timedelta(minutes=5)).isoformat()
    run = pool.run(state={"type": "SCHEDULED", "state_details": {"scheduled_time": due}}, name="evil\x1b[2J\nrun")
    yield
    pool.ask("DELETE", f"/flow_runs/{run['id']}")


@contextmanager
def _slow(_: WorkPool) -> Iterator[None]:
    with patched.object(server_checks, "SLOW_SECONDS", 0.0):
        yield


@contextmanager
def _very_slow(_: WorkPool) -> Iterator[None]:
    with patched.object(server_checks, "TOO_SLOW_SECONDS", 0.0):
        yield


@contextmanager
def _other_version(version: str) -> Iterator[None]:
    with patched("prefect.__version__", version):
        yield


@contextmanager
def _wrong_clock(_: WorkPool) -> Iterator[None]:
    with patched("orchestration.prefect_api.clock_offset", lambda _: timedelta(seconds=-90)):
        yield


def _schedule(**change: Any) -> dict[str, Any]:
    return {"schedules": [{"schedule": CRON | change, "active": True}]}


Fault = Callable[[WorkPool], AbstractContextManager[None]]

FAULTS: dict[str, tuple[str, Fault, str, str]] = {
    "slow api": ("api latency", _slow, "warning", "answers in"),
    "very slow api": ("api latency", _very_slow, "failed", "answers in"),
    "newer client": ("prefect versions", lambda _: _other_version("3.99.0"), "failed", "this checkout is 3.99.0"),
    "older client": ("prefect versions", lambda _: _other_version("3.8.8"), "warning", "this checkout 3.8.8"),
    "wrong clock": ("clocks", _wrong_clock, "failed", "prefect server is 90 s behind"),
    "paused pool": ("work pools", lambda pool: _pool(pool, is_paused=True), "failed", "is paused"),
    "limit 0 of the pool": ("work pools", lambda pool: _pool(pool, concurrency_limit=0), "failed", "limit 0"),
    "pool without a worker": ("work pools", _no_worker, "failed", "has no worker"),
    "paused queue": ("work pools", _paused_queue, "failed", "queue urgent of"),
    "limit 0 of a queue": ("work pools", _closed_queue, "failed", "queue urgent of"),
    "schedule without a pool": ("schedules", _no_pool, "failed", "has no work pool"),
    "cron without dates": (
        "schedules", lambda pool: _deployment(pool, **_schedule(cron="0 0 30 2 *")), "failed", "never fires",
    ),
    "limit 0 of a deployment": (
        "schedules", _closed_deployment, "failed", "has the concurrency limit 0",
    ),
    "paused deployment": ("schedules", lambda pool: _deployment(pool, paused=True), "warning", "is paused"),
    "inactive schedule": (
        "schedules", lambda pool: _deployment(pool, schedules=[{"schedule": CRON, "active": False}]), "warning",
        "is active",
    ),
    "late run": ("late runs", _late_run, "warning", "evil\x1b[2J\\nrun"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_the_server_is_found(pool: WorkPool, fault: str) -> None:
    name, cause, status, text = FAULTS[fault]
    with cause(pool):
        finding = asyncio.run(_find(name))[name]
    assert (finding.status, text in finding.text) == (status, True), finding
    assert finding.cure
    assert "\n" not in finding.text + finding.cure


def test_server_without_a_password_is_found(pool: WorkPool) -> None:
    assert asyncio.run(_find("authentication"))["authentication"].status == "warning"
    with patched.object(Installation, "has_cluster", True):
        finding = asyncio.run(_find("authentication"))["authentication"]
    assert (finding.status, finding.cure) == ("failed", "Set auth.enabled to true")
    with patched.object(httpx.AsyncClient, "post", _refuse):
        finding = asyncio.run(_find("authentication"))["authentication"]
    assert finding == Finding("ok", "without a password it answers 401")


async def _refuse(*_: Any, **__: Any) -> httpx.Response:
    return httpx.Response(401)


def test_server_alone_is_checked_without_a_cluster(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    main(["doctor", "--context", "absent", "--json"])
    found = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["dns"]["status"] == found["database"]["status"] == "not checked"
    assert "KUBE_CONTEXT=absent is not in the kubeconfig" in found["dns"]["text"]
    assert found["api latency"]["status"] == found["websocket"]["status"] == "ok"
    assert not [row for row in found.values() if "a mistake in the check" in row["text"]]


class _Proxy(socketserver.BaseRequestHandler):
    """Passes bytes on to the server, and closes the connection after a time, as a proxy with a short timeout does."""

    seconds = 1.0
    target = ("127.0.0.1", 0)

    def handle(self) -> None:
        with socket.create_connection(self.target) as server:
            stop = threading.Timer(self.seconds, self._close, [server])
            stop.start()
            thread = threading.Thread(target=self._pass, args=[server, self.request])
            thread.start()
            self._pass(self.request, server)
            thread.join()
            stop.cancel()

    def _close(self, server: Any) -> None:
        for connection in (server, self.request):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _pass(source: Any, target: Any) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)


def test_proxy_that_closes_websockets_is_found(url: str, pool: WorkPool) -> None:
    parts = httpx.URL(url)
    handler = type("Handler", (_Proxy,), {"target": (parts.host, parts.port)})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        through = str(parts.copy_with(port=proxy.server_address[1]))
        with temporary_settings({PREFECT_API_URL: through}):
            finding = asyncio.run(_find("websocket"))["websocket"]
        proxy.shutdown()
    assert finding.status == "failed", finding
    assert finding.cure.endswith("docs/how-to/ingress-and-tls.md")
