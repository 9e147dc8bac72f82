"""What a flow run does between the start of its container and its first line: imports, certificates and requests."""

import json
import os
import pickle
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from prefect.blocks.notifications import SlackWebhook
from prefect.filesystems import RemoteFileSystem

from orchestration.protocol import CHECK_INTERVAL_SECONDS, CHECK_TIMEOUT_SECONDS
from orchestration.runs.engine_process import GATE_VARIABLE
from orchestration.settings import ROOT
from tests.parts import asked, client_of, kill_run_processes
from tests.relay import stalled

FLOW = """
import gc, json, os, sys
from pathlib import Path
from types import ModuleType
from urllib.request import urlopen
from prefect import flow

@flow
def first_line():
    if "FIRST_LINE_URL" in os.environ:
        urlopen(os.environ["FIRST_LINE_URL"]).read()
    loaded = sorted(name for name, module in sys.modules.items() if type(module) is ModuleType)
    found = {"modules": loaded, "gc": gc.isenabled(), "frozen": gc.get_freeze_count() > 0}
    Path(os.environ["NOTES"]).write_text(json.dumps(found))
"""


@contextmanager
def claimed_run(api_url: str, folder: Path, name: str) -> Iterator[dict[str, str]]:
    """Yield the variables of a run that a worker has claimed, and end its processes afterwards."""
    (folder / "flow.py").write_text(FLOW)
    with client_of(api_url) as api:
        flow = asked(api, "POST", "/flows/", {"name": "first-line"})["id"]
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}
        body = {"name": name, "flow_id": flow, "entrypoint": "flow.py:first_line", "pull_steps": [step]}
        deployment = asked(api, "POST", "/deployments/", body)["id"]
        run = asked(api, "POST", f"/deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]
        claim = asked(api, "POST", f"/flow_runs/{run}/set_state", {"state": {"type": "PENDING"}})["state"]["id"]
        try:
            yield {
                "PREFECT_API_URL": api_url, "PREFECT__FLOW_RUN_ID": run, "KUBERNETES_JOB": f"job-{claim[-12:]}",
                "TERMINATION_MESSAGE_PATH": str(folder / "message"), "NOTES": str(folder / "notes"),
                "TMPDIR": str(folder), "PREFECT_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            assert asked(api, "GET", f"/flow_runs/{run}")["state"]["name"] == "Completed"
        finally:
            kill_run_processes(run)


def execute(variables: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Execute a run by the container's command; return what its first line found."""
    execution = str(ROOT / "orchestration/execution.py")
    subprocess.run(
        [sys.executable, "-I", "-S", execution, "prefect", "flow-run", "execute"],
        env=os.environ | variables, cwd=folder, start_new_session=True, check=True, timeout=300,
    )  # fmt: skip
    return dict(json.loads((folder / "notes").read_text()))


UNUSED = {
    "prefect.blocks.notifications", "prefect.blocks.webhook", "prefect.server", "fastapi", "sqlalchemy",
    "prefect_kubernetes", "kubernetes_asyncio", "prefect_docker", "docker", "prefect_redis", "redis", "psycopg",
    "numpy", "matplotlib", "dbt", "orchestration.settings", "orchestration.prefect_compat.results",
    "orchestration.prefect_compat.workers",
}  # fmt: skip
"""Modules of the image that an empty flow does not need."""


def test_run_with_durable_results_imports_no_module_that_it_does_not_use(prefect_server: str, tmp_path: Path) -> None:
    """The run loads the block of its results' storage, for which Prefect would import all integrations."""
    RemoteFileSystem(basepath="memory://results").save("starts", overwrite=True)
    with claimed_run(prefect_server, tmp_path, "imports") as variables:
        storage = {"PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK": "remote-file-system/starts"}
        found = execute(variables | storage, tmp_path)
    assert "prefect.filesystems" in found["modules"]
    assert sorted(UNUSED.intersection(found["modules"])) == []
    assert (found["gc"], found["frozen"]) == (True, True)


AGENTS = {"Python-urllib": "supervisor", "prefect": "engine", "python-httpx": "engine"}

BACKGROUND = ("/api/logs/", "/api/events/in", "/api/flows/ID")
"""Requests of threads that the first line does not wait for."""


POLLED = "supervisor GET /api/flow_runs/ID"
"""The supervisor's request that it repeats in each interval, whatever the engine does."""


class Requests:
    """Notes the requests that a relay passes until the first line, as "supervisor GET /api/path"."""

    def __init__(self, holds: str = "") -> None:
        self.noted: list[str] = []
        self._first_polled = 0.0
        self._holds = holds
        self._at_first_line = threading.Event()

    def note(self, data: bytes, way: str) -> None:
        """Note a request. Hold the one that was named until its client gives up."""
        found = re.match(rb"(GET|POST|PATCH|PUT) (\S+) HTTP/1.1\r\n", data)
        if way != "asked" or not found or self._at_first_line.is_set():
            return
        path = re.sub(r"[0-9a-f-]{36}", "ID", found[2].decode().partition("?")[0])
        if path == "/api/hello":
            self._at_first_line.set()
            return
        agent = re.search(r"(?i)\r\nuser-agent: ([\w-]+)", data.decode())
        request = f"{AGENTS[agent[1]] if agent else 'websocket'} {found[1].decode()} {path}"
        if request == POLLED and request in self.noted:
            # On a busy machine the first line comes after the first look for a fence.
            if time.monotonic() - self._first_polled >= CHECK_INTERVAL_SECONDS:
                return
        elif request == POLLED:
            self._first_polled = time.monotonic()
        self.noted.append(request)
        if request == self._holds:
            time.sleep(CHECK_TIMEOUT_SECONDS + 1)

    def awaited(self) -> list[str]:
        """Return the requests that the first line waited for, in the order of the alphabet."""
        running = self.noted.index("engine POST /api/flow_runs/ID/set_state")
        # Once the run is Running, the thread of its heartbeats reads the deployment.
        later = [request for request in self.noted[running:] if request != "engine GET /api/deployments/ID"]
        return sorted(request for request in self.noted[:running] + later if not request.endswith(BACKGROUND))


OF_THE_SUPERVISOR = [
    "supervisor GET /api/deployments/ID",
    "supervisor GET /api/flow_run_states/",
    "supervisor GET /api/flow_runs/ID",
]

OF_THE_ENGINE = [
    "engine GET /api/admin/storage",
    "engine GET /api/admin/version",
    "engine GET /api/csrf-token",
    "engine GET /api/events/out",
    # Prefect reads the run once before and once after it is Running.
    "engine GET /api/flow_runs/ID",
    "engine GET /api/flow_runs/ID",
    "engine PATCH /api/flow_runs/ID",
    "engine POST /api/flow_runs/ID/set_state",
]


@pytest.mark.parametrize(
    ("held", "again"),
    [
        pytest.param("", [], id="with the supervisor's answers"),
        pytest.param(
            OF_THE_SUPERVISOR[0],
            ["engine GET /api/deployments/ID", *["engine GET /api/flow_runs/ID"] * 2],
            id="without them",
            marks=pytest.mark.further,
        ),
    ],
)
def test_first_line_waits_for_few_requests(prefect_server: str, tmp_path: Path, held: str, again: list[str]) -> None:
    requests = Requests(held)
    with claimed_run(prefect_server, tmp_path, "requests") as variables, stalled(prefect_server, requests.note) as url:
        relay = {
            "PREFECT_API_URL": f"{url}/api", "FIRST_LINE_URL": f"{url}/api/hello",
            "PREFECT_LOGGING_TO_API_ENABLED": "false",
        }  # fmt: skip
        execute(variables | relay, tmp_path)
    assert requests.awaited() == sorted([*OF_THE_SUPERVISOR, *OF_THE_ENGINE, *again])


@pytest.mark.parametrize(
    "sent",
    [pytest.param(b"", id="nothing", marks=pytest.mark.further), pytest.param(b'{"flow_run": {', id="a part")],
)
def test_engine_whose_supervisor_has_died_executes_nothing(tmp_path: Path, sent: bytes) -> None:
    read, write = os.pipe()
    os.write(write, sent)
    os.close(write)
    variables = {GATE_VARIABLE: str(read), "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-P", "-m", "orchestration.runs.engine_start"]
    done = subprocess.run(command, env=os.environ | variables, pass_fds=[read], capture_output=True, text=True)
    os.close(read)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


DEFERRED = """
import inspect, os, pickle, sys
from types import ModuleType
from orchestration.prefect_compat import blocks

blocks.defer_notifications()
import prefect
from prefect.blocks.core import Block
blocks.look_up_before_import()

NAME = "prefect.blocks.notifications"
assert prefect.flow and Block.get_block_class_from_key("local-file-system").__name__ == "LocalFileSystem"
assert inspect.getmodule(Block)  # reads a name of each module
deferred = sys.modules[NAME]
assert type(deferred) is not ModuleType

for use in sys.argv[1:]:
    if os.fork():  # each in a process without the imports of the others
        assert os.wait()[1] == 0, use
        continue
    exec(use)
    assert type(sys.modules[NAME]) is ModuleType
    from prefect.blocks.notifications import SlackWebhook as found
    assert found is Block.get_block_class_from_key("slack-webhook") is deferred.SlackWebhook
    assert prefect.blocks.notifications is sys.modules[NAME]
    break
"""

USES = (
    "assert Block.get_block_class_from_key('slack-webhook').__name__ == 'SlackWebhook'",
    "from prefect.blocks.notifications import SlackWebhook",
    "import prefect.blocks; assert prefect.blocks.notifications.SlackWebhook",
    "from prefect.blocks.notifications import *; assert SlackWebhook",
    f"assert pickle.loads({pickle.dumps(SlackWebhook)!r})",
    "assert deferred.SlackWebhook",
    # As before, a class that no imported module has is searched in all integrations.
    "assert Block.get_block_class_from_key('redis-database').__module__ == 'prefect_redis.blocks'",
)


def test_deferred_blocks_are_imported_by_each_way_to_use_one() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", DEFERRED, *USES], env=environment, check=True)


CLIENTS = """
import asyncio, sys
from orchestration.runs import engine
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_SSL_CERT_FILE, PREFECT_API_TLS_INSECURE_SKIP_VERIFY, temporary_settings

def context_of(client):
    return client._client._transport._pool._ssl_context

async def ask():
    async with get_client() as client:
        return await client.api_version(), context_of(client)

def ask_both():
    with get_client(sync_client=True) as client:
        found = client.api_version(), context_of(client)
    assert asyncio.run(ask()) == found == (found[0], context_of(get_client()))
    return found[0]

unread = context_of(get_client())
assert unread.get_ca_certs() == []
assert unread.verify_flags and unread.check_hostname
with temporary_settings({PREFECT_API_SSL_CERT_FILE: sys.argv[1]}):
    assert ask_both() == "3.9.1"
    assert len(context_of(get_client()).get_ca_certs()) == 1
with temporary_settings({PREFECT_API_TLS_INSECURE_SKIP_VERIFY: True}):
    assert ask_both() == "3.9.1"
try:
    ask_both()
except Exception as error:
    assert "certificate verify failed" in str(error), error
else:
    raise AssertionError("an unknown certificate was accepted")
"""


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a certificate of localhost, which is its own authority; return the files of certificate and key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = ("digital_signature", "key_cert_sign", "content_commitment", "key_encipherment", "data_encipherment",
             "key_agreement", "crl_sign", "encipher_only", "decipher_only")  # fmt: skip
    usage = x509.KeyUsage(**{name: name in names[:2] for name in names})
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    unencrypted = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *unencrypted))
    return folder / "certificate.pem", folder / "key.pem"


class Version(BaseHTTPRequestHandler):
    """Answers each request with the version of a Prefect server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b'"3.9.1"')

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def test_clients_share_certificates_and_still_verify_the_server(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Version) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {
            "PREFECT_API_URL": f"https://localhost:{server.server_address[1]}/api", "PREFECT_CLIENT_MAX_RETRIES": "0",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        try:
            subprocess.run([sys.executable, "-c", CLIENTS, certificate], env=os.environ | variables, check=True)
        finally:
            server.shutdown()
