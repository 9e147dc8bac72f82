"""A real Prefect server with access control, on a temporary database."""

import base64
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx

from orchestration.access.credentials import sign_run
from tests import parts

SERVER_CREDENTIAL = "admin:of-the-server"
RUN_KEY = "k" * 40
OIDC_KEY = "o" * 48
OIDC_GROUPS = {"operator": ["data-platform", "data admins"], "viewer": ["data"]}
CREDENTIALS = {role: f"{role}:password-of-{role}" for role in ("operator", "viewer", "worker", "reconciler", "sync")}


@dataclass
class GuardedServer:
    """A server with access control: the URL of its API, and the file with its output."""

    url: str
    log: Path

    def client(self, credential: str) -> httpx.Client:
        """Return a client with a credential `USER:PASSWORD`."""
        client = parts.client_of(self.url)
        client.headers["Authorization"] = "Basic " + base64.b64encode(credential.encode()).decode()
        return client

    def run_client(self, run_id: str) -> httpx.Client:
        """Return a client with the credential of a flow run."""
        return self.client(sign_run(RUN_KEY, UUID(run_id)))

    def audit(self) -> list[dict[str, Any]]:
        """Return the lines of the audit log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith('{"audit"')]


@contextlib.contextmanager
def guarded_server(home: Path, command: str = "orchestration.access", **variables: str) -> Iterator[GuardedServer]:
    """Run a server with its state in `home`.

    Args:
        home: a folder.
        command: the module with the command `server start`. `prefect` starts the server without access control.
        variables: further environment variables of the server.
    """
    folder = home / "credentials"
    folder.mkdir()
    for role, credential in CREDENTIALS.items():
        (folder / role).write_text(credential)
    (folder / "run-key").write_text(RUN_KEY)
    (folder / "oidc-key").write_text(OIDC_KEY)
    shutil.copyfile(parts.migrated_database(), home / "prefect.db")
    port = parts.free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = os.environ | {
        "PREFECT_SERVER_API_AUTH_STRING": SERVER_CREDENTIAL,
        "PREFECT_API_AUTH_STRING": SERVER_CREDENTIAL,
        "API_CREDENTIALS": str(folder),
        "OIDC_GROUPS": json.dumps(OIDC_GROUPS),
        "PREFECT_API_URL": url,
        "PREFECT_UI_API_URL": "/api",
        **variables,
    }
    with parts.served(home, port, sys.executable, environment, command):
        yield GuardedServer(url, home / "server.log")
