"""Run the PgBouncers of the chart as processes of this machine, with the settings of its ConfigMap."""

import contextlib
import functools
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.progress import step
from orchestration.settings import ROOT
from tests.helm.rendering import one, pod_specs
from tests.parts import end_process, free_port, wait_until

SUITE = "trixie"
"""The Debian with the PgBouncer of the local cluster's image."""

OLDEST = (1, 21)
"""The first PgBouncer that keeps prepared statements in transaction mode (`max_prepared_statements`)."""

NAME = "test-prefect-server-pgbouncer"
"""The name of the chart's objects."""


@dataclass(frozen=True)
class PgBouncer:
    """A process of PgBouncer, and its address (HOST:PORT)."""

    address: str
    process: "subprocess.Popen[bytes]"

    def has_clients(self) -> bool:
        """Return whether a process of the server is connected to this PgBouncer."""
        port = int(self.address.rpartition(":")[2])
        return any(
            connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
            for connection in psutil.Process(self.process.pid).net_connections("tcp")
        )


def find_pgbouncer() -> list[str]:
    """Return the command of a PgBouncer with the chart's settings: the installed one, else one from Debian's packages.

    Raises:
        ClusterError: this machine has none, or an older one, and its apt has no newer one.
    """
    if (installed := shutil.which("pgbouncer")) and _version([installed]) >= OLDEST:
        return [installed]
    folder = binaries.cache() / f"pgbouncer-{SUITE}"
    with hold_lock(folder.with_suffix(".lock")):
        if not folder.exists():
            with (
                step("Unpacking PgBouncer from Debian's packages", "20 s, once"),
                tempfile.TemporaryDirectory(prefix=".pgbouncer-", dir=folder.parent) as made,
            ):
                _unpack_packages(Path(made))
                (Path(made) / "root").rename(folder)
    # Its own loader and libraries: those of this machine may be older.
    loader = next(folder.glob("usr/lib/*/ld-linux*"))
    return [str(loader), "--library-path", str(loader.parent), str(folder / "usr/sbin/pgbouncer")]


def describe_pgbouncer(command: Sequence[str]) -> str:
    """Return name and version of a PgBouncer."""
    return f"PgBouncer {'.'.join(map(str, _version(command)))}"


def _version(command: Sequence[str]) -> tuple[int, ...]:
    shown = subprocess.check_output([*command, "--version"], text=True)
    return tuple(map(int, re.findall(r"\d+", shown.splitlines()[0])))


def _unpack_packages(folder: Path) -> None:
    """Unpack PgBouncer and all packages that it needs into `folder/root`, and install none of them.

    Raises:
        ClusterError: this machine has no apt with a mirror of Debian.
    """
    sites = shutil.which("apt-get") and binaries.run(["apt-get", "indextargets", "--format", "$(SITE)"])
    mirrors = [site for site in (sites or "").split() if site.rstrip("/").endswith("/debian")]
    if not mirrors:
        needed = ".".join(map(str, OLDEST))
        raise ClusterError(
            f"PgBouncer {needed} or later is missing, and apt has no mirror of Debian. Install PgBouncer"
        )
    keys = Path(f"/usr/share/keyrings/debian-archive-{SUITE}-automatic.gpg")
    # A keyring may be older than the suite. apt already trusts the mirror.
    trust = f"signed-by={keys}" if keys.exists() else "trusted=yes"
    (folder / "sources.list").write_text(f"deb [{trust}] {mirrors[0]} {SUITE} main\n")
    (folder / "status").touch()
    for name in ("lists/partial", "cache/archives/partial", "root"):
        (folder / name).mkdir(parents=True)
    settings = {
        "Dir::Etc::SourceList": folder / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
    }
    apt = ["apt-get", "-qq", *(f"--option={name}={value}" for name, value in settings.items())]
    binaries.run([*apt, "update"])
    binaries.run([*apt, "install", "--yes", "--no-install-recommends", "--download-only", "pgbouncer"])
    for package in (folder / "cache" / "archives").glob("*.deb"):
        binaries.run(["dpkg-deb", "--extract", str(package), str(folder / "root")])


@contextlib.contextmanager
def pgbouncer_processes(
    command: Sequence[str], objects: list[dict[str, Any]], database: str, password: str, logs: Path
) -> Iterator[list[PgBouncer]]:
    """Run as many PgBouncers as the chart has, and yield them when they accept connections.

    Args:
        command: that of a PgBouncer.
        objects: those of the chart.
        database: the URL of a Postgres that listens on a Unix socket and trusts its users.
        password: the clients' password of the URL's user.
        logs: a folder, which gets a folder with a log for each PgBouncer.
    """
    url = urlsplit(database)
    variables = {
        "PREFECT_SERVER_DATABASE_HOST": parse_qs(url.query)["host"][0],
        "PREFECT_SERVER_DATABASE_USER": str(url.username),
        "PREFECT_SERVER_DATABASE_PASSWORD": password,
        "PREFECT_SERVER_DATABASE_NAME": url.path.removeprefix("/"),
    }
    # Root may not run PgBouncer. The folder of the socket belongs to this user, as Postgres runs by it.
    user = ["--user=postgres"] if os.geteuid() == 0 else []
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(one(objects, "Deployment", NAME)["spec"]["replicas"]):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            port = free_port()
            _write_files(folder, objects, port, variables)
            if user:
                for path in (folder, *folder.iterdir()):
                    shutil.chown(path, "postgres")
            log = logs / f"pgbouncer-{number}" / "log"
            log.parent.mkdir()
            with log.open("w") as output:
                process = subprocess.Popen(
                    [*command, *user, str(folder / "pgbouncer.ini")],
                    stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
            stack.callback(end_process, process)
            started.append(PgBouncer(f"127.0.0.1:{port}", process))
            wait_until(functools.partial(_accepts, port, process), f"PgBouncer; see {log}", 60)
        yield started


def _write_files(folder: Path, objects: list[dict[str, Any]], port: int, variables: dict[str, str]) -> None:
    """Write the files that init container and ConfigMap of the chart have, for a port and folder of this machine."""
    of_the_pod = "/run/pgbouncer"
    text = one(objects, "ConfigMap", NAME)["data"]["pgbouncer.ini"]
    replaced = {of_the_pod: str(folder), "listen_addr = *": "listen_addr = 127.0.0.1"}
    replaced["listen_port = 6432"] = f"listen_port = {port}"
    for of_the_chart, of_this_machine in replaced.items():
        assert of_the_chart in text, of_the_chart
        text = text.replace(of_the_chart, of_this_machine)
    (folder / "pgbouncer.ini").write_text(text)
    (folder / "drain.ini").touch()
    [container] = pod_specs(objects)[f"Deployment/{NAME}"]["initContainers"]
    arguments = [str(folder) if argument == of_the_pod else argument for argument in container["args"][1:]]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | variables, check=True)


def _accepts(port: int, process: "subprocess.Popen[bytes]") -> bool:
    assert process.poll() is None, "PgBouncer has ended"
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
