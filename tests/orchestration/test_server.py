"""Which server a flow that is started by hand talks to."""

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_DEFAULT_WORK_POOL_NAME,
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
    temporary_settings,
)

from orchestration.server import reachable_server
from tests.parts import free_port


def test_a_server_that_is_up_is_used_and_gets_the_default_pool(prefect_server: str) -> None:
    with temporary_settings({PREFECT_DEFAULT_WORK_POOL_NAME: "made-by-hand"}):
        for _ in range(2):
            with reachable_server():
                assert PREFECT_API_URL.value() == prefect_server
    with get_client(sync_client=True) as client:
        pool = client.read_work_pool("made-by-hand")
    assert pool.type == "process"
    assert "job_configuration" in pool.base_job_template


def test_without_one_a_temporary_server_serves_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}),
        reachable_server(),
    ):
        assert PREFECT_API_URL.value() is None
        assert PREFECT_SERVER_ALLOW_EPHEMERAL_MODE.value() is True


def test_an_address_that_the_environment_gives_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    with temporary_settings({PREFECT_API_URL: url}), reachable_server():
        assert PREFECT_API_URL.value() == url
