"""Run the Prefect server of the chart as processes of this machine: API replicas, background services, Postgres, Redis.

On request the server connects to Postgres through PgBouncer.

Commands and variables are those of the chart's pods with its default values: access control by roles, the services
separate. Only addresses, folders and secrets are of this machine.
"""

import base64
import contextlib
import functools
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import psutil

from orchestration.access.credentials import sign_run
from orchestration.settings import ROOT
from tests.benchmarks.pgbouncer_processes import PgBouncer, pgbouncer_processes
from tests.benchmarks.simulated_runs import Credentials, Service
from tests.helm.rendering import environment, pod_specs, render
from tests.parts import (
    answers,
    debian_postgres,
    end_process,
    free_port,
    new_database,
    redis_server,
    rows_of,
    wait_until,
)

OPERATOR, WORKER = "admin:of-the-server", "worker:of-the-worker"
"""Credentials of the server and of the worker."""

START_SECONDS = 300
"""The limit of the chart's startup probe."""

VALUES = {
    "image": {"tag": "bench"},
    "api": {"replicas": 2},
    "database": {"bundled": {"enabled": False}, "external": {"existingSecret": "database"}},
    "redis": {"bundled": {"enabled": False}, "external": {"existingSecret": "redis"}},
}


class Replica:
    """A process of the API.

    Args:
        command: program and arguments.
        variables: the environment.
        port: the port of the API.
        log: the file for its output.
    """

    def __init__(self, command: list[str], variables: dict[str, str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}/api"
        self.log = log
        self._command, self._variables = command, variables
        self.launch()

    def launch(self) -> None:
        """Start the process, whose API answers some seconds later."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self._command,
                env=self._variables,
                cwd=self.log.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C ends the benchmark, which then ends this process
            )

    def is_ready(self) -> bool:
        """Return whether the API answers.

        Raises:
            RuntimeError: the process has ended.
        """
        if (status := self.process.poll()) is not None:
            raise RuntimeError(f"The API ended with {status}:\n{self.log.read_text()[-3000:]}")
        return answers(f"{self.url}/ready")

    def kill(self) -> None:
        """End the process by SIGKILL."""
        self.process.kill()
        self.process.wait()


@dataclass
class ServerProcesses:
    """Starts API replicas, and meters the server's processes.

    Args:
        database: the URL of the database.
        folder: a folder for logs and what the processes write.
        run_key: signs the credentials of runs.
        replicas: the API's replicas.
        service: the replicas that answer.
        pgbouncers: API and services connect to Postgres through these, if there are any.
    """

    database: str
    folder: Path
    run_key: str
    _redis_port: int
    _specs: dict[str, Any]
    _secrets: dict[str, str]
    replicas: list[Replica] = field(default_factory=list)
    service: Service = field(default_factory=Service)
    services: "subprocess.Popen[bytes] | None" = None
    pgbouncers: Sequence[PgBouncer] = ()

    @property
    def credentials(self) -> Credentials:
        """The credentials of the clients."""
        return Credentials(OPERATOR, WORKER, lambda run: sign_run(self.run_key, UUID(run)))

    def start_api(self, number: int) -> None:
        """Start API replicas until `number` of them answer."""
        started = []
        for index in range(len(self.replicas), number):
            port = free_port()
            name = f"api-{index}"
            command, variables = self._process("api", name, index, PREFECT_SERVER_API_PORT=str(port))
            started.append(Replica(command, variables, port, self.folder / name / "log"))
            self.replicas.append(started[-1])
        for replica in started:
            wait_until(replica.is_ready, f"the API; see {replica.log}", START_SECONDS)
        self.service.ready = [replica.url for replica in self.replicas]

    @contextlib.contextmanager
    def running_services(self) -> Iterator[None]:
        """Run the background services while the block lasts."""
        port = free_port()
        command, variables = self._process("services", "services", 0, SERVICES_HEALTH_PORT=str(port))
        with (self.folder / "services" / "log").open("w") as log:
            self.services = subprocess.Popen(
                command, env=variables, cwd=self.folder / "services", stdout=log, stderr=log, start_new_session=True
            )
        try:
            ready = f"http://127.0.0.1:{port}/ready"
            wait_until(lambda: answers(ready), f"the services; see {self.folder}/services/log", START_SECONDS)
            yield
        finally:
            end_process(self.services)

    def end_api(self) -> None:
        """End the API's replicas."""
        for replica in self.replicas:
            end_process(replica.process)

    def processor_seconds(self) -> dict[str, float]:
        """Return the processor seconds so far of API, services, PgBouncer, Postgres and Redis."""
        assert self.services
        pgbouncers = sum(_seconds(pgbouncer.process.pid) for pgbouncer in self.pgbouncers)
        return {
            "API": sum(_seconds(replica.process.pid) for replica in self.replicas),
            "services": _seconds(self.services.pid),
            **({"PgBouncer": pgbouncers} if self.pgbouncers else {}),
            "Postgres": _seconds(self._postmaster),
            "Redis": _seconds(self._redis),
        }

    @functools.cached_property
    def _postmaster(self) -> int:
        [(process,)] = rows_of(self.database, "select split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int")
        return int(process)

    @functools.cached_property
    def _redis(self) -> int:
        return next(
            process.pid
            for process in psutil.process_iter(["name", "cmdline"])
            if process.info["name"] == "redis-server" and str(self._redis_port) in " ".join(process.info["cmdline"])
        )

    def count_in_logs(self, text: str) -> int:
        """Return how often the logs of API, services and PgBouncer have a text."""
        return sum(log.read_text(errors="replace").count(text) for log in self.folder.glob("*/log"))

    def _process(self, component: str, name: str, number: int, **addresses: str) -> tuple[list[str], dict[str, str]]:
        """Return command and variables of a component's process, and create its folder.

        As the Service of the chart does, all connections of a process lead to the same PgBouncer.
        """
        home = self.folder / name
        home.mkdir()
        container = self._specs[f"Deployment/test-prefect-server-{component}"]["containers"][0]
        assert container["args"][0] == "python"
        variables = {
            variable: self._secrets[variable]
            if isinstance(value, dict)
            else value.replace("$(REDIS_URL)", self._secrets["REDIS_URL"])
            for variable, value in environment(container).items()
        }
        of_this_machine = {
            "PYTHONPATH": str(ROOT),
            "PREFECT_HOME": str(home),
            "PREFECT_UI_STATIC_DIRECTORY": str(home / "ui"),
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            "PREFECT_API_URL": self.service.ready[0] if self.service.ready else "http://127.0.0.1:9/api",
            "API_CREDENTIALS": str(self.folder / "credentials"),
            "PGBOUNCER_ADDRESS": self.pgbouncers[number % len(self.pgbouncers)].address if self.pgbouncers else "",
            # As the image has them.
            "PYTHONTZPATH": "",
            "PYTHONUNBUFFERED": "1",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }
        command = [sys.executable, *container["args"][1:]]
        return command, os.environ | variables | of_this_machine | addresses


def _seconds(process: int) -> float:
    """Return the processor seconds of a process, of its children, and of children that have ended."""
    total = 0.0
    for member in [psutil.Process(process), *psutil.Process(process).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = member.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


@contextlib.contextmanager
def server_processes(folder: Path, replicas: int, pgbouncer: Sequence[str] = ()) -> Iterator[ServerProcesses]:
    """Run Postgres, Redis, background services and API replicas, and yield them when they are ready.

    Args:
        folder: an empty folder.
        replicas: how many API replicas to begin with.
        pgbouncer: the command of a PgBouncer, through which the server connects to Postgres; by default none.
    """
    run_key, password = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    credentials = folder / "credentials"
    credentials.mkdir()
    (credentials / "worker").write_text(WORKER)
    (credentials / "run-key").write_text(run_key)
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(new_database(stack.enter_context(debian_postgres(fsync=True)), "prefect"))
        (folder / "redis").mkdir()
        redis_url = stack.enter_context(redis_server(folder / "redis"))
        known = {
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.replace(
                "postgresql://postgres@", f"postgresql+asyncpg://postgres:{password}@"
            ),
            "PREFECT_SERVER_API_AUTH_STRING": OPERATOR,
            "PREFECT_API_AUTH_STRING": OPERATOR,
            "PREFECT_SERVER_ENCRYPTION_KEY": base64.b64encode(secrets.token_bytes(32)).decode(),
            "REDIS_URL": redis_url,
        }
        migrations = [sys.executable, "-m", "orchestration.migrations", "upgrade"]
        subprocess.run(migrations, cwd=ROOT, env=os.environ | known, check=True, stdout=subprocess.DEVNULL)
        port = urlsplit(redis_url).port
        assert port
        objects = render("prefect-server", VALUES | {"pgbouncer": {"enabled": bool(pgbouncer)}})
        server = ServerProcesses(database, folder, run_key, port, pod_specs(objects), known)
        if pgbouncer:
            server.pgbouncers = stack.enter_context(pgbouncer_processes(pgbouncer, objects, database, password, folder))
        stack.callback(server.end_api)
        server.start_api(replicas)
        with server.running_services():
            if pgbouncer:
                assert any(process.has_clients() for process in server.pgbouncers), "the server does not use PgBouncer"
            yield server
