"""The Prefect server of a flow on the command line: the checkout's, or a temporary one."""

import subprocess
import sys
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_DEFAULT_WORK_POOL_NAME,
    PREFECT_HOME,
    temporary_settings,
)

from orchestration.errors import PipelineError
from orchestration.local.temporary_server import reachable_server, temporary_server
from tests.parts import answers, free_port, wait_until


def test_running_server_is_used_and_gets_the_default_pool(prefect_server: str) -> None:
    with temporary_settings({PREFECT_DEFAULT_WORK_POOL_NAME: "made-by-hand"}):
        for _ in range(2):
            with reachable_server():
                assert PREFECT_API_URL.value() == prefect_server
    with get_client(sync_client=True) as client:
        pool = client.read_work_pool("made-by-hand")
    assert pool.type == "process"
    assert "job_configuration" in pool.base_job_template


def test_temporary_server_serves_the_block_without_another_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    unused = f"http://127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: unused}), reachable_server():
        url = PREFECT_API_URL.value()
        assert url != unused
        with get_client(sync_client=True) as client:
            assert client.read_flows() == []
    assert not answers(f"{url}/health")
    assert capsys.readouterr().err == f"No Prefect server is up at {unused}: this run has a temporary one.\n"


@pytest.mark.further
def test_temporary_server_ends_with_a_killed_flow() -> None:
    code = (
        "import time; from orchestration.local.temporary_server import temporary_server\n"
        "with temporary_server() as url: print(url, flush=True); time.sleep(600)"
    )
    flow = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert flow.stdout
    url = flow.stdout.readline().strip()
    wait_until(lambda: answers(f"{url}/health"), "the server")
    flow.kill()
    flow.communicate()
    wait_until(lambda: not answers(f"{url}/health"), "the end of the server")


@pytest.mark.further
def test_error_names_the_folder_when_the_temporary_server_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = tmp_path / "file" / "home"
    with (
        temporary_settings({PREFECT_HOME: home}),
        pytest.raises(PipelineError, match=rf"temporary Prefect server did not start: .*Check that {home} is writable"),
        temporary_server(),
    ):
        pass


def test_prefect_api_url_of_the_environment_rules_out_a_temporary_server(monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    with temporary_settings({PREFECT_API_URL: url}), reachable_server():
        assert PREFECT_API_URL.value() == url
