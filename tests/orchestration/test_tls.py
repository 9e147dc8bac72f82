"""HTTPS of the Prefect API: the server with a certificate, and the clients that verify the certificate."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.events.clients import PrefectEventSubscriber
from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_URL, temporary_settings

from orchestration.api_tls import CERTIFICATE_VARIABLE, KEY_VARIABLE, use_certificate
from orchestration.errors import ApiError, SettingsError
from orchestration.operations import sync_dry_run
from orchestration.operations.environment import SERVER, Environment
from orchestration.operations.local_cluster.certificates import Authority
from orchestration.operations.port_forward import ca_file
from orchestration.operations.rotation.api_credentials import PROBE
from orchestration.prefect_api import connected
from orchestration.runs.run_client import RunClient
from orchestration.settings import ROOT
from tests.helm.rendering import Object, one, render
from tests.orchestration.access.single_sign_on import single_sign_on
from tests.parts import free_port, migrated_database, served


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a CA, and a certificate for the name `localhost` with its key."""
    folder = tmp_path_factory.mktemp("certificates")
    Authority(folder).issue("tls", "api", hosts=["localhost"])
    return folder


@pytest.fixture(scope="module")
def variables(certificates: Path) -> dict[str, str]:
    """Return the variables that the chart sets in the API's pod."""
    return {
        CERTIFICATE_VARIABLE: str(certificates / "tls.crt"),
        KEY_VARIABLE: str(certificates / "tls.key"),
        "PREFECT_API_SSL_CERT_FILE": str(certificates / "ca.crt"),
    }


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, certificates: Path, variables: dict[str, str]) -> Iterator[str]:
    """Yield the URL of a Prefect API that serves HTTPS."""
    home = tmp_path_factory.mktemp("prefect")
    shutil.copyfile(migrated_database(), home / "prefect.db")
    environment = os.environ | variables
    ca = certificates / "ca.crt"
    with served(home, free_port(), sys.executable, environment, "orchestration.server_process", ca) as found:
        yield found


def _asked(url: str, ca: Path, wait: float = 0) -> object:
    """Return what the API answers to the client of this project, which trusts this CA and does not have to wait."""

    def fail(reason: str) -> None:
        pytest.fail(reason)

    async def ask() -> object:
        async with connected(wait, fail) as server:
            return await server.ask("GET", "/hello")

    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_SSL_CERT_FILE: str(ca)}):
        return asyncio.run(ask())


def test_clients_with_the_ca_use_the_api_over_https(
    url: str, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca = certificates / "ca.crt"
    assert _asked(url, ca) == "👋"

    async def use_prefect() -> tuple[str, str]:
        async with get_client() as client, PrefectEventSubscriber(reconnection_attempts=0):
            return await client.api_version(), (await client.create_flow_from_name(f"flow-{uuid4().hex}")).hex

    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_SSL_CERT_FILE: str(ca)}):
        assert all(asyncio.run(use_prefect()))
    monkeypatch.setenv("PREFECT_API_SSL_CERT_FILE", str(ca))
    with pytest.raises(OSError, match="HTTP Error 404"):
        RunClient(url, str(uuid4()), "job").read_run()


def test_plain_http_gets_no_answer(url: str) -> None:
    port = int(url.split(":")[2].split("/")[0])
    with socket.create_connection(("localhost", port), 60) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /api/hello HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP/1.1" not in connection.recv(100)


def test_certificate_of_another_ca_is_refused_at_once(url: str, tmp_path: Path) -> None:
    """A client that waits for the API does not wait for a better certificate."""
    Authority(tmp_path)
    with pytest.raises(ApiError) as refused:
        _asked(url, tmp_path / "ca.crt", wait=300)
    text = str(refused.value)
    assert re.match(rf"The Prefect API at {url} cannot be used: its certificate is refused \([\w -]+\)\. Set ", text)
    assert "Set PREFECT_API_SSL_CERT_FILE to the certificate of its CA" in text


@pytest.mark.further
def test_worker_ends_with_one_message_if_the_ca_is_another(url: str, tmp_path: Path) -> None:
    Authority(tmp_path)
    settings = {"PREFECT_API_URL": url, "PREFECT_API_SSL_CERT_FILE": str(tmp_path / "ca.crt")}
    done = subprocess.run(
        [sys.executable, "-m", "orchestration.worker", "--pool", "default"], env=os.environ | settings, cwd=ROOT,
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert f" ERROR The Prefect API at {url} cannot be used: its certificate is refused (" in message


def test_oauth2_proxy_serves_https_and_verifies_the_api(url: str, certificates: Path, tmp_path: Path) -> None:
    Authority(tmp_path / "other").issue("tls", "api", hosts=["localhost"])
    for folder, status in ((certificates, 200), (tmp_path / "other", 502)):
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        home = tmp_path / str(status)
        home.mkdir()
        with single_sign_on(home, url, certificates=folder) as sign_on:
            answer = httpx.get(f"https://localhost:{sign_on.proxy.number}/api/health", verify=context, timeout=75)
        assert answer.status_code == status, "oauth2-proxy answers 502 if it refuses the certificate"
        assert ("certificate signed by unknown authority" in sign_on.log.read_text()) is (status == 502)


@pytest.mark.further
def test_certificate_of_the_identity_provider_does_not_replace_that_of_the_api(
    url: str, certificates: Path, tmp_path: Path
) -> None:
    """oauth2-proxy has one list of certificates for both."""
    Authority(tmp_path / "other")
    extra = [f"--provider-ca-file={tmp_path / 'other' / 'ca.crt'}"]
    with single_sign_on(tmp_path, url, extra, certificates) as sign_on:
        context = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
        answer = httpx.get(f"https://localhost:{sign_on.proxy.number}/api/health", verify=context, timeout=75)
    assert answer.status_code == 200, sign_on.log.read_text()


def test_certificate_for_another_name_is_refused(url: str, certificates: Path) -> None:
    with pytest.raises(ApiError, match=r"IP address mismatch.*and PREFECT_API_URL to a name in its certificate"):
        _asked(url.replace("localhost", "127.0.0.1"), certificates / "ca.crt")


@pytest.mark.parametrize(("text", "cause"), [(None, "No such file or directory"), ("no certificate", "")])
def test_unusable_ca_file_is_named(tmp_path: Path, text: str | None, cause: str) -> None:
    ca = tmp_path / "ca.crt"
    if text:
        ca.write_text(text)
    with pytest.raises(ApiError, match=f"PREFECT_API_SSL_CERT_FILE={ca} cannot be used: .*{cause}"):
        _asked("https://localhost:1/api", ca)


def test_rotation_asks_the_api_in_its_pod_over_https(url: str, variables: dict[str, str]) -> None:
    found = url.split(":")[2].partition("/")
    inside = {"PREFECT_SERVER_API_PORT": found[0], "PREFECT_SERVER_API_BASE_PATH": "/api"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input='["Basic YTpi"]', env=os.environ | variables | inside, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[200]\n"


@pytest.fixture
def install(
    url: str, certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Object], Environment]:
    """Return a function that returns an environment with the chart's Deployment for these values.

    A program takes kubectl's part: it forwards to the API of the tests.
    """
    program = tmp_path / "kubectl"
    program.write_text(f"""#!/bin/sh
case "$*" in
  *port-forward*) echo "Forwarding from 127.0.0.1:{url.split(":")[2].split("/")[0]} -> 4200"; exec sleep 600 ;;
  *"get deployment {SERVER}-api "*) cat {tmp_path}/deployment.json ;;
  *"get secret {SERVER}-auth "*) printf a:b | base64 ;;
  *"get secret tls "*) base64 {certificates}/ca.crt ;;
  *) exit 1 ;;
esac
""")
    program.chmod(0o755)

    def make(values: Object) -> Environment:
        api = one(render(SERVER, {"image": {"tag": "1"}} | values), "Deployment", f"test-{SERVER}-api")
        (tmp_path / "deployment.json").write_text(json.dumps(api))
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return Environment("local", "none", "none")

    return make


def test_plan_compares_with_a_server_over_https(
    install: Callable[[Object], Environment], capsys: pytest.CaptureFixture[str]
) -> None:
    environment = install({"tls": {"enabled": True, "existingSecret": "tls"}})
    pool = "work_pools: [{name: over-https, type: process}]"
    assert sync_dry_run.plan(environment, sync_dry_run.Sync("me", (), (), pool), "On the server:")
    assert "over-https" in capsys.readouterr().out


def test_volume_named_tls_of_a_server_without_tls_is_no_ca(install: Callable[[Object], Environment]) -> None:
    volume = {"name": "tls", "secret": {"secretName": "tls"}}
    with ca_file(install({"pod": {"volumes": [volume]}})) as ca:
        assert ca == ""


def test_unusable_certificate_is_refused_before_the_server_starts(
    certificates: Path, variables: dict[str, str], tmp_path: Path
) -> None:
    Authority(tmp_path).issue("other", "api")
    for key in (str(tmp_path / "other.key"), str(tmp_path / "absent"), ""):
        with pytest.raises(SettingsError, match=f"The API cannot serve HTTPS with {CERTIFICATE_VARIABLE}=.*: .+"):
            use_certificate(variables | {KEY_VARIABLE: key})
