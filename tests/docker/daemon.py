"""Run a separate Docker daemon for tests. It leaves the machine's Docker alone."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries, kind
from tests.parts import end_process, wait_until

PACKAGES = {"dockerd": "docker.io", "docker-compose": "docker-compose"}
"""Debian's package, by the program that is needed from it."""

ADDRESSES = "base=10.253.0.0/16,size=24"
"""Addresses of the daemon's networks. The local Kubernetes node uses none of them."""


def docker(host: str, *arguments: str) -> str:
    """Run a Docker command on the daemon at `host` and return its standard output."""
    return binaries.run(["docker", *arguments], os.environ | {"DOCKER_HOST": host}).strip()


@dataclass
class Daemon:
    """Starts and stops a Docker daemon that keeps everything in a folder.

    Args:
        folder: holds its data, its socket and its log.
    """

    folder: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def host(self) -> str:
        """The address of the daemon, for DOCKER_HOST."""
        return f"unix://{self.folder}/docker.sock"

    @property
    def control_group(self) -> str:
        """The cgroup of the daemon's containers."""
        return f"docker-test-{os.getpid()}"

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        folder = self.folder
        command = [
            "dockerd", "--host", self.host, "--pidfile", f"{folder}/pid", "--exec-root", f"{folder}/exec",
            "--data-root", f"{folder}/data", "--cgroup-parent", f"/{self.control_group}", "--bridge=none",
            "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false",
            "--default-address-pool", ADDRESSES,
        ]  # fmt: skip
        with (folder / "log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        wait_until(self._answers, f"a Docker daemon; see {folder}/log")

    def stop(self) -> None:
        """Stop the daemon with its containers."""
        if self._process:
            end_process(self._process, 60)

    def _answers(self) -> bool:
        with contextlib.suppress(ClusterError):
            return bool(docker(self.host, "version"))
        return False


@contextlib.contextmanager
def docker_daemon(folder: Path) -> Iterator[Daemon | None]:
    """Run a Docker daemon in `folder`. Yield None if tests have to use the machine's Docker.

    The machine's packet filter, its forwarding and Docker's usual socket stay untouched. A CI machine without root has
    a Docker to use.
    """
    if os.geteuid() != 0:
        if not os.environ.get("CI"):
            pytest.skip("a Docker daemon of the tests' own needs root")
        assert kind.is_docker_running(), "neither root nor Docker"
        yield None
        return
    binaries.install_packages(PACKAGES, "15 s")
    daemon = Daemon(folder)
    try:
        daemon.start()
        yield daemon
    finally:
        with contextlib.suppress(ClusterError):  # the daemon did not start
            _remove(daemon.host, ("ps", "--all", "--quiet"), ("rm", "--force", "--volumes"))
            _remove(daemon.host, ("network", "ls", "--quiet", "--filter", "type=custom"), ("network", "rm"))
        daemon.stop()
        for mount in reversed(_mounts(folder)):
            binaries.run(["umount", mount])
        groups = Path("/sys/fs/cgroup")
        for hierarchy in (groups, *groups.iterdir()):  # cgroup version 2 has one hierarchy, version 1 several
            if (hierarchy / daemon.control_group).is_dir():
                (hierarchy / daemon.control_group).rmdir()
        shutil.rmtree(folder)


def _remove(host: str, listing: tuple[str, ...], removal: tuple[str, ...]) -> None:
    if found := docker(host, *listing).split():
        docker(host, *removal, *found)


def _mounts(folder: Path) -> list[str]:
    """Return the mount points below `folder`, in the order of the mounts."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{folder}/")]
