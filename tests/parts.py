"""Start the real parts that tests and benchmarks use: Postgres, Prefect server, Redis, S3, settings."""

import contextlib
import itertools
import os
import secrets
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.request import urlopen

import httpx
import hypothesis
import psutil
import psycopg

from orchestration import warehouse
from orchestration.local.embedded_postgres import stop as stop_postgres
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.settings import ROOT, settings
from tests import server_forks
from tests.checkout_files import list_files
from tests.server_forks import Fork

Query = Callable[..., list[tuple[Any, ...]]]


def examples(share: float) -> int:
    """Return how many examples of a property to try: a share of the Hypothesis profile's (tests/conftest.py)."""
    return max(1, round(share * hypothesis.settings().max_examples))


def random_seed() -> int:
    """Return the seed of a random test: the same each time, or a new one with the long Hypothesis profile.

    `RANDOM_SEED` sets the seed.
    """
    given = os.environ.get("RANDOM_SEED")
    is_long = os.environ.get("HYPOTHESIS_PROFILE") == "long"
    return int(given) if given else secrets.randbelow(10**6) if is_long else 2013


def free_port() -> int:
    """Return a free port of the loopback interface.

    The port is outside the kernel's range for outgoing connections, which could take it before the caller does.
    """
    while True:
        port = 10_000 + secrets.randbelow(20_000)  # Hypothesis resets the seed of `random`
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


PAUSE_SECONDS = 0.1
"""The shortest pause between two checks of `wait_until`. Tests on the cluster set a longer one."""


PATIENCE = 3
"""By how much waits may exceed their timeouts, which are those of a machine that nothing else uses."""


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 180, *, pause: float | None = None) -> Any:
    """Poll `condition` until it is true, and return its value.

    Args:
        condition: what to check.
        what: describes the condition.
        seconds: the timeout, which is multiplied by `PATIENCE`.
        pause: the shortest pause between two checks; None for `PAUSE_SECONDS`.

    Raises:
        AssertionError: the condition is still false after the timeout.
    """
    start = time.monotonic()
    seconds *= PATIENCE
    shortest = PAUSE_SECONDS if pause is None else pause
    while True:
        # After a pause of the whole machine, check once more before the timeout counts.
        looked = time.monotonic()
        if value := condition():
            return value
        if looked - start > seconds:
            raise AssertionError(f"not within {seconds} s: {what}")
        # A check takes processor time from other tests: spend at most a third of the time on checks. A wait may last a
        # tenth longer, and never more than 2 s.
        time.sleep(min(max(shortest, (looked - start) / 10, 2 * (time.monotonic() - looked)), 2))


def answers(url: str, ca: Path | None = None) -> bool:
    """Return whether a GET of `url` succeeds. Over HTTPS, `ca` is the file with the certificate of the server's CA."""
    context = ssl.create_default_context(cafile=ca) if ca else None
    try:
        with urlopen(url, timeout=2, context=context) as response:  # noqa: S310 - a server of this machine
            return bool(response.status == 200)
    except OSError:
        return False


class _RetryTransport(httpx.HTTPTransport):
    """Repeats requests that are answered by 503."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        def answered() -> httpx.Response | None:
            answer = super(_RetryTransport, self).handle_request(request)
            if answer.status_code != 503:
                return answer
            answer.close()
            return None

        answer: httpx.Response = wait_until(answered, f"an answer to {request.method} {request.url}", 240)
        return answer


def client_of(url: str, auth: httpx.Auth | None = None) -> httpx.Client:
    """Return a client of the Prefect API at `url` that repeats requests after 503.

    On a busy machine SQLite may be locked for longer than the server waits. The server then changes nothing and answers
    503, after 60 s.
    """
    # The server closes a connection after 5 s idle. The client closes it earlier, so that no request meets that.
    return httpx.Client(
        base_url=url, auth=auth, timeout=75, transport=_RetryTransport(limits=httpx.Limits(keepalive_expiry=2))
    )


def asked(api: httpx.Client, method: str, path: str, body: Any = None, **headers: str) -> Any:
    """Send a request and return the JSON of the answer."""
    answer = api.request(method, path, json=body, headers=headers).raise_for_status()
    return answer.json() if answer.content else None


def rows_of(url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Run a statement in the database at `url` and return its rows."""
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


def end_process(process: "subprocess.Popen[Any] | Fork", seconds: float = 30) -> None:
    """Send SIGTERM to a process and wait for its end; kill it if it has not ended after `seconds`."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def find_run_processes(run: str, job: str = "") -> list[int]:
    """Return the ids of this machine's processes that execute a flow run: supervisor, engine and their children.

    Args:
        run: the run's id.
        job: the name of the Job; empty for any.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get("PREFECT__FLOW_RUN_ID") == run and job in ("", environment.get("KUBERNETES_JOB")):
                found.append(process.pid)
    return found


def kill_run_processes(run: str) -> None:
    """Kill all processes of this machine that execute a flow run.

    A supervisor that is killed leaves its engine alive, which has a session and a process group of its own.
    """

    def are_gone() -> bool:
        processes = find_run_processes(run)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return not processes

    wait_until(are_gone, f"the processes of flow run {run} to be gone")


def copy_of_checkout(folder: Path) -> None:
    """Copy the tracked and new files of this checkout, with their changes, and no ignored ones."""
    for name in list_files(ROOT):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def commit_copy_of_checkout(folder: Path) -> None:
    """Copy this checkout into a new git repository, and commit everything."""
    copy_of_checkout(folder)
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)


@contextlib.contextmanager
def settings_of(**variables: str) -> Iterator[None]:
    """Set variables of the project's settings while the block lasts: `settings_of(DBT_THREADS="2")`."""
    with patch.dict(os.environ, variables):
        settings.cache_clear()
        yield
    settings.cache_clear()


@contextlib.contextmanager
def embedded_postgres(directory: Path) -> Iterator[str]:
    """Run an embedded PostgreSQL with its data in `directory`, and yield its URL."""
    with settings_of(WAREHOUSE_DIR=str(directory)):
        host = warehouse.environment()["PGHOST"]
    try:
        yield f"postgresql://postgres@/postgres?host={host}"
    finally:
        stop_postgres(directory)


@contextlib.contextmanager
def debian_postgres(superuser: str = "postgres", *, fsync: bool = False) -> Iterator[str]:
    """Run Debian's PostgreSQL, which has the extensions that a Prefect server needs, and yield its URL.

    Args:
        superuser: the name of the superuser.
        fsync: write to disk at each commit, as a database does whose content matters.
    """
    binaries.install_packages({"pg_lsclusters": "postgresql"})
    programs = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    user = "postgres" if os.geteuid() == 0 else None  # Postgres refuses to run as root
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user)
        data = Path(folder) / "data"

        def run(program: str, *arguments: str) -> None:
            subprocess.run(
                [programs / program, "-D", data, *arguments],
                cwd=folder,
                user=user,
                check=True,
                stdout=subprocess.DEVNULL,
            )

        run("initdb", "--auth=trust", f"--username={superuser}", "--no-sync")
        options = f"-h '' -k {folder}{'' if fsync else ' -F'}"
        run("pg_ctl", "-w", "-t", "300", "-l", f"{folder}/log", "-o", options, "start")
        try:
            yield f"postgresql://{superuser}@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")


@contextlib.contextmanager
def new_database(postgres: str, name: str | None = None, template: str = "template1") -> Iterator[str]:
    """Create a database, set `WAREHOUSE_URL` to it while the block lasts, and yield its URL.

    Args:
        postgres: the URL of the server's database `postgres`.
        name: the name of the database. By default the first free name, so that consecutive databases have one name:
            dbt's parsed project is valid for one name only, and parsing costs two processor seconds.
        template: the database to copy; by default an empty one.
    """
    with psycopg.connect(postgres, autocommit=True) as connection:
        taken = {row[0] for row in connection.execute("select datname from pg_database")}
        name = name or next(
            candidate for candidate in map("test_{}".format, itertools.count(1)) if candidate not in taken
        )
        url = postgres.replace("/postgres?", f"/{name}?")
        connection.execute(f"create database {name} template {template}")
        with settings_of(WAREHOUSE_URL=url):
            yield url
        connection.execute(f"drop database {name} with (force)")


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """Run a Redis with a password and without persistence, and yield its URL."""
    binaries.install_packages({"redis-server": "redis-server"})
    port = free_port()
    file = folder / "redis.conf"
    file.write_text("requirepass secret\n")
    command = [
        "redis-server",
        str(file),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    with serving(command, port, {}):
        yield f"redis://:secret@127.0.0.1:{port}/0"


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Run an S3 server with a bucket `results`, and yield the variables of its user and its `endpoint`."""
    for name in ("metadata", "buckets/results"):
        (folder / name).mkdir(parents=True)
    port = free_port()
    command = [str(binaries.program("versitygw")), "--quiet", "--port", f"127.0.0.1:{port}", "posix"]
    root = {"ROOT_ACCESS_KEY": "someone", "ROOT_SECRET_KEY": "secret"}
    with serving([*command, "--sidecar", str(folder / "metadata"), str(folder / "buckets")], port, root):
        key = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret"}
        yield key | {"endpoint": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def serving(command: list[str], port: int, variables: dict[str, str], log: Path | None = None) -> Iterator[None]:
    """Run a program that listens on a port of the loopback interface while the block lasts.

    Args:
        command: the program and its arguments.
        port: the port.
        variables: environment variables in addition to those of this process.
        log: receives the output; by default only errors are shown.
    """

    def listens() -> bool:
        assert server.poll() is None, f"{command[0]} ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    with (
        (log or Path(os.devnull)).open("ab") as output,
        subprocess.Popen(
            command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT if log else None
        ) as server,
    ):
        try:
            wait_until(listens, f"{command[0]} on port {port}")
            yield
        finally:
            end_process(server)


def schema_versions() -> str:
    """Return the versions that decide the schema of a Prefect server, for the name of a file."""
    return "-".join(f"{name}-{version(name)}" for name in ("prefect", "sqlalchemy", "alembic"))


def migrated_database() -> Path:
    """Return the file of an empty SQLite database with this Prefect's schema, made once on a machine.

    A server that starts on a copy runs no migrations, which take half of its start-up time. It does everything else
    of a first start.
    """
    file = binaries.cache() / f"{schema_versions()}-sqlite-{sqlite3.sqlite_version}.db"
    with hold_lock(file.with_suffix(".lock")):
        if not file.exists():
            with tempfile.TemporaryDirectory(prefix=".prefect-", dir=file.parent) as home:
                command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "--yes"]
                subprocess.run(command, env=os.environ | {"PREFECT_HOME": home}, cwd=home, check=True)
                # `vacuum into` writes one file, with the content of the write-ahead log.
                with contextlib.closing(sqlite3.connect(f"{home}/prefect.db")) as made:
                    made.execute("vacuum into ?", [f"{home}/whole.db"])
                Path(home, "whole.db").replace(file)
    return file


@contextlib.contextmanager
def prefect_server(home: Path, **variables: str) -> Iterator[str]:
    """Run a Prefect server, and yield the URL of its API.

    Args:
        home: a folder for the server's state.
        variables: further environment variables of the server.
    """
    if not (home / "prefect.db").exists():
        shutil.copyfile(migrated_database(), home / "prefect.db")
    with served(home, free_port(), sys.executable, os.environ | variables) as url:
        yield url


SERVERS: "list[subprocess.Popen[bytes] | Fork]" = []
"""The Prefect servers that run for this process."""


@contextlib.contextmanager
def stopped_servers() -> Iterator[None]:
    """Stop the servers that run now while the block lasts. An idle server takes 1.3 % of a processor."""
    servers = list(SERVERS)
    try:
        for server in servers:
            server.send_signal(signal.SIGSTOP)
        yield
    finally:
        for server in servers:
            server.send_signal(signal.SIGCONT)


SERVE = """
import gc, runpy, sys
gc.disable()
import prefect.cli, prefect.server.api.server
gc.freeze()
gc.enable()
sys.argv.pop(0)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
"""Runs a module's command as `python -m` does. Without garbage collection the imports take a third less time."""


@contextlib.contextmanager
def served(
    home: Path,
    port: int,
    python: str | Path,
    environment: Mapping[str, str],
    module: str = "prefect",
    ca: Path | None = None,
) -> Iterator[str]:
    """Run the server of an interpreter's Prefect with its state in `home`, and yield the URL of its API.

    Args:
        home: a folder.
        port: a free port.
        python: the interpreter.
        environment: of the server, but for PREFECT_HOME.
        module: the module with the command `server start`.
        ca: the certificate of the CA of a server that serves HTTPS for the name `localhost`.
    """
    url = f"https://localhost:{port}/api" if ca else f"http://127.0.0.1:{port}/api"
    with (home / "server.log").open("a") as log:
        command = [module, "server", "start", "--port", str(port)]
        variables = {"PREFECT_UI_API_URL": url, **environment}
        variables |= {"PREFECT_HOME": str(home), "PYTHONTZPATH": ""}  # as in `make server`
        server: subprocess.Popen[bytes] | Fork
        if server_forks.can_fork(python, environment):
            server = server_forks.start(command, variables, home, log.fileno())
        else:
            server = subprocess.Popen(
                [str(python), "-c", SERVE, *command], env=variables, cwd=home, stdout=log, stderr=subprocess.STDOUT
            )
        SERVERS.append(server)
        try:
            wait_until(lambda: answers(f"{url}/health", ca), f"a Prefect server; see {home}/server.log", 180)
            yield url
        finally:
            SERVERS.remove(server)
            end_process(server)  # which waits for open connections and for its work in progress
