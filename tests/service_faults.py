"""Run the server's background services on a real Postgres and Redis, and break one part at a time.

`python -m tests.service_faults` starts the services as their image does, and takes faults as lines of its input.
"""

import asyncio
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import urlopen
from uuid import uuid4

import psutil
import psycopg
import redis
from redis.exceptions import RedisError as RedisError

from orchestration.prefect_compat.events import task_run_state_event
from orchestration.settings import ROOT
from tests.parts import end_process, free_port, new_database, redis_server, rows_of, wait_until
from tests.relay import relayed
from tests.server_schema import create_schema

ROLE = "prefect"
"""The database's role that the services use. The faults limit this role."""

PROBE_TIMEOUT_SECONDS = 5
"""The `timeoutSeconds` of the chart's probes."""


def probe(port: int, path: str) -> tuple[int, Any]:
    """Return status and body of the answer to a probe; status 0 if there is none in time."""
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=PROBE_TIMEOUT_SECONDS) as answer:
            return answer.status, json.load(answer)
    except HTTPError as error:
        with error:
            return error.code, json.load(error)
    except OSError:
        return 0, {}


@dataclass
class Services:
    """Breaks and probes a process of background services.

    Args:
        port: the port of its health.
        redis_port: the port of its Redis, which is a relay.
        redis_url: the URL of the Redis without the relay.
        postgres: the URL of Postgres' own database.
        database: the URL of the services' database.
        folder: a folder for what a fault needs.
        environment: the variables of the process.
        log: the file for its log.
        stack: closes what a fault has started, when the process has ended.
        relay: the relay to Redis while it is open.
        published: the id of each published event, and of its task run.
    """

    port: int
    redis_port: int
    redis_url: str
    postgres: str
    database: str
    folder: Path
    environment: dict[str, str]
    log: IO[str]
    stack: contextlib.ExitStack
    relay: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    published: dict[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[str]" = field(init=False)

    def probe(self, path: str) -> tuple[int, dict[str, Any]]:
        """Return status and body of the answer to a probe of the services; status 0 if there is none in time."""
        return probe(self.port, path)

    def report(self, path: str) -> dict[str, Any]:
        """Return the body of the answer to a probe of the services, which a busy machine may give to a later probe."""
        found: dict[str, Any] = wait_until(lambda: self.probe(path)[1], f"an answer to {path}")
        return found

    def launch(self) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "tests.service_faults", "server", "services", "start"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, text=True
        )

    def have_started(self) -> bool:
        """Return whether the services are ready; start the process again if one of them has ended.

        On a busy machine the first connection to Postgres may take longer than a service waits.
        """
        if self.probe("/ready")[0] == 200:
            return True
        if any("ended" in reason for reason in self.probe("/live")[1].get("reasons", [])):
            self.end()
            self.launch()
        return False

    def end(self) -> None:
        """End the process."""
        with self.process:
            end_process(self.process)

    def have_passed(self) -> bool:
        """Return whether each service has made progress a short time ago, so that no earlier fault shows."""
        body = self.report("/ready")
        return bool(body["healthy"]) and all(
            service["last_progress_seconds_ago"] < service.get("every_seconds", 0) + 10
            for service in body["services"].values()
        )

    def dependencies(self) -> set[str]:
        """Return how database and Redis answer the process."""
        body = self.report("/ready")
        return {body["database"], body["redis"]}

    def wait_for(self, path: str, healthy: bool, seconds: float) -> dict[str, Any]:
        """Wait until a probe is answered so that it succeeds or fails; return the body of the answer."""

        def answered() -> tuple[dict[str, Any]] | None:
            status, body = self.probe(path)
            return (body,) if status and (status == 200) == healthy else None

        try:
            found: tuple[dict[str, Any]] = wait_until(
                answered, f"{path} to be {'green' if healthy else 'red'}", seconds
            )
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.probe('/ready')}") from None
        return found[0]

    def connect_redis(self, url: str | None = None) -> None:
        """Let the services reach Redis, at another URL if one is passed."""
        self.redis_url = url or self.redis_url
        self.relay.enter_context(relayed(self.redis_port, self.redis_url))

    def tell(self, *fault: str) -> None:
        """Inject a fault inside the process."""
        assert self.process.stdin
        print(*fault, file=self.process.stdin, flush=True)

    def publish(self, send: Callable[[dict[str, Any]], Any] | None = None) -> None:
        """Publish the event of a task run to Redis, as the API does, or send the event by a function."""
        task_run, now = uuid4(), datetime.now(UTC)
        about = {"name": "a", "task_key": "a", "dynamic_key": str(task_run), "run_count": 1}
        state = {"type": "RUNNING", "name": "Running", "message": ""}
        event = task_run_state_event(task_run, state, now, about, [])
        (send or self._add_to_stream)(event | {"received": now.isoformat()})
        self.published[event["id"]] = str(task_run)

    def _add_to_stream(self, event: dict[str, Any]) -> None:
        with redis.Redis.from_url(self.redis_url, socket_timeout=5) as client:
            client.xadd("events", {"data": json.dumps(event), "attributes": "{}"})

    def have_read_all(self) -> bool:
        """Return whether the services have acknowledged all published events, which they may not have written yet."""
        with redis.Redis.from_url(self.redis_url, socket_timeout=5) as client:
            groups = {group["name"].decode(): group for group in client.xinfo_groups("events")}
        writers = (groups["event-persister"], groups["task-run-recorder"])
        return all(group["pending"] == group["lag"] == 0 for group in writers)

    def count_lost_events(self) -> int:
        """Return how many published events, or states of the task runs in them, are not in the database."""
        events = "select count(*) from events where id = any(%s::uuid[])"
        states = "select count(*) from task_run_state where task_run_id = any(%s::uuid[])"
        [(kept,)] = rows_of(self.database, events, list(self.published))
        [(recorded,)] = rows_of(self.database, states, list(self.published.values()))
        return 2 * len(self.published) - int(kept) - int(recorded)

    def redis_process(self) -> psutil.Process:
        """Return the process of Redis."""
        port = str(urlsplit(self.redis_url).port)
        return next(
            process
            for process in psutil.process_iter(["name", "cmdline"])
            if process.info["name"] == "redis-server" and port in " ".join(process.info["cmdline"] or [])
        )


@contextlib.contextmanager
def migrated_template(postgres: str) -> Iterator[str]:
    """Create a database with the server's schema, and yield its name."""
    rows_of(postgres, f"create role {ROLE} login")
    with new_database(postgres, "template_of_services") as url:
        rows_of(postgres, f"alter database template_of_services owner to {ROLE}")
        create_schema(_of_role(url))
        yield "template_of_services"


def _of_role(url: str) -> str:
    return url.replace("//postgres@", f"//{ROLE}@")


@contextlib.contextmanager
def running_services(
    postgres: str, template: str, folder: Path, stall_seconds: float, log: IO[str], **variables: str
) -> Iterator[Services]:
    """Run the background services, and yield them when they are ready.

    Args:
        postgres: the URL of Postgres' own database.
        template: the database with the schema to copy.
        folder: an empty folder.
        stall_seconds: how long a service may make no progress.
        log: the file for the log of the services.
        variables: more environment variables.
    """
    with contextlib.ExitStack() as stack:
        name = f"services_{uuid4().hex[:8]}"
        database = stack.enter_context(new_database(postgres, name, template))
        redis_url = stack.enter_context(redis_server(folder))
        port, redis_port = free_port(), free_port()
        url = f"redis://:secret@127.0.0.1:{redis_port}/0"
        environment = os.environ | {
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": _of_role(database).replace("postgresql:", "postgresql+asyncpg:"),
            "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
            "PREFECT_REDIS_MESSAGING_URL": url,
            "PREFECT_REDIS_WORKER_CLEANUP_QUEUE_URL": url,
            "PREFECT_SERVER_DOCKET_URL": url,
            "PREFECT_SERVER_EVENTS_MESSAGING_BROKER": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_MESSAGING_CACHE": "prefect_redis.messaging",
            "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "prefect_redis.ordering",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect_redis.lease_storage",
            "PREFECT_SERVER_WORKER_CHANNEL_CLEANUP_QUEUE_STORAGE": "prefect_redis.cleanup_queue",
            "PREFECT_REDIS_MESSAGING_PUBLISHER_BATCH_SIZE": "1",
            "PREFECT_REDIS_MESSAGING_CONSUMER_BLOCK": "3",
            "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_MAX_FLUSH_RETRIES": "10000",
            "PREFECT_UI_ENABLED": "false",
            "SERVICES_HEALTH_PORT": str(port),
            "SERVICES_STALL_SECONDS": str(stall_seconds),
            **variables,
        }
        resources = stack.enter_context(contextlib.ExitStack())
        relay = stack.enter_context(contextlib.ExitStack())
        relay.enter_context(relayed(redis_port, redis_url))
        services = Services(port, redis_port, redis_url, postgres, database, folder, environment, log, resources, relay)
        services.launch()
        stack.callback(services.end)
        wait_until(services.have_started, "the services to be ready", 600)
        yield services


@contextlib.contextmanager
def running_api(services: Services) -> Iterator[int]:
    """Run the API of the same server, and yield its port."""
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-services", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, env=services.environment, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: probe(port, "/api/ready")[0] == 200, "the API to be ready", 240)
            yield port
        finally:
            end_process(process)


# Faults: each breaks a part while the block lasts.


@contextlib.contextmanager
def stopped_process(services: Services) -> Iterator[None]:
    """Stop the process by SIGSTOP."""
    services.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        services.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def redis_refuses(services: Services) -> Iterator[None]:
    """Close the connections to Redis, and refuse new ones."""
    services.relay.close()
    yield
    services.connect_redis()


@contextlib.contextmanager
def redis_is_silent(services: Services) -> Iterator[None]:
    """Let Redis answer nothing, while its connections stay open."""
    process = services.redis_process()
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@contextlib.contextmanager
def database_refuses(services: Services) -> Iterator[None]:
    """Close the connections to Postgres, and refuse new ones."""
    with psycopg.connect(services.postgres, autocommit=True) as admin:
        [(folder,)] = admin.execute("show unix_socket_directories").fetchall()
        socket = next(Path(folder).glob(".s.PGSQL.*[0-9]"))
        hidden = socket.with_name("hidden")
        socket.rename(hidden)
        try:
            _end_connections(admin)
            yield
        finally:
            hidden.rename(socket)


@contextlib.contextmanager
def database_is_silent(services: Services) -> Iterator[None]:
    """Let Postgres answer nothing, while its connections stay open."""
    [(postmaster,)] = rows_of(services.postgres, "select split_part(pg_read_file('postmaster.pid'), E'\\n', 1)::int")
    process = psutil.Process(postmaster)
    stopped = [process]
    try:
        # First the process that would start others.
        process.suspend()
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "Postgres to stop")
        stopped += process.children(recursive=True)
        for member in stopped[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
        yield
    finally:
        for member in stopped:
            # A child that had ended is gone as soon as Postgres runs again.
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()


@contextlib.contextmanager
def database_is_read_only(services: Services) -> Iterator[None]:
    """Let Postgres refuse writes, as a standby does."""
    with psycopg.connect(services.postgres, autocommit=True) as admin:
        admin.execute(f"alter role {ROLE} set default_transaction_read_only = on")
        _end_connections(admin)
        yield
        admin.execute(f"alter role {ROLE} reset default_transaction_read_only")
        _end_connections(admin)


@contextlib.contextmanager
def database_has_no_connections(services: Services) -> Iterator[None]:
    """Let Postgres refuse connections, because all that the role may have are in use."""
    with psycopg.connect(services.postgres, autocommit=True) as admin:
        admin.execute(f"alter role {ROLE} connection limit 0")
        _end_connections(admin)
        yield
        admin.execute(f"alter role {ROLE} connection limit -1")


def _end_connections(admin: "psycopg.Connection[Any]") -> None:
    admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = %s", [ROLE])


def empty_redis(services: Services) -> None:
    """Delete all data of Redis."""
    with redis.Redis.from_url(services.redis_url) as client:
        client.flushall()


def fail_redis_over(services: Services) -> None:
    """Promote a replica of Redis, and lead the connections to the replica."""
    folder = services.folder / uuid4().hex
    folder.mkdir()
    replica = services.stack.enter_context(redis_server(folder))
    with redis.Redis.from_url(replica) as client:
        client.config_set("masterauth", "secret")
        client.replicaof("127.0.0.1", str(urlsplit(services.redis_url).port))
        wait_until(lambda: client.info("replication")["master_link_status"] == "up", "the replica to follow")
        services.relay.close()
        services.redis_process().kill()
        client.replicaof("NO", "ONE")
    services.connect_redis(replica)


# The process.


def _take_faults(loops: list[asyncio.AbstractEventLoop]) -> None:
    from orchestration.prefect_compat import background_services

    def end(loop: asyncio.AbstractEventLoop, service: str) -> None:
        for task in asyncio.all_tasks(loop):
            if getattr(task.get_coro(), "__qualname__", "").startswith(f"{service}."):
                task.cancel()

    def hang(service: str) -> None:
        async def wait_for_ever(*_: Any) -> None:
            await asyncio.Event().wait()

        background_services._consumers[service]._trim_stream_if_necessary = wait_for_ever

    for line in sys.stdin:
        fault, argument = line.split()
        loop = next(
            event_loop for event_loop in loops if event_loop.is_running() and len(asyncio.all_tasks(event_loop)) > 5
        )
        acts: dict[str, Callable[[str], None]] = {
            "block": lambda text: time.sleep(float(text)), "end": functools.partial(end, loop), "hang": hang,
        }  # fmt: skip
        loop.call_soon_threadsafe(acts[fault], argument)


def main() -> int:
    """Start the services, and take faults from standard input."""
    from orchestration.server_process import start_server

    loops: list[asyncio.AbstractEventLoop] = []
    new_event_loop = asyncio.events.new_event_loop

    def kept_event_loop() -> asyncio.AbstractEventLoop:
        loops.append(new_event_loop())
        return loops[-1]

    asyncio.events.new_event_loop = kept_event_loop
    threading.Thread(target=_take_faults, args=[loops], daemon=True).start()
    return start_server(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
