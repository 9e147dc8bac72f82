"""A Docker daemon of the tests' own, beside whatever else runs on the machine."""

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
from tests.parts import wait_until

PACKAGES = {"dockerd": "docker.io", "docker-compose": "docker-compose"}
"""Debian's package by the program that is needed of it."""

ADDRESSES = "base=10.253.0.0/16,size=24"
"""Of the daemon's networks: none that the Kubernetes node of tests/cluster uses."""


def docker(host: str, *arguments: str) -> str:
    """Run a Docker command on the daemon at `host`; what it printed."""
    return binaries.run(["docker", *arguments], os.environ | {"DOCKER_HOST": host}).strip()


@dataclass
class Daemon:
    """A Docker daemon that keeps everything in a folder.

    Args:
        folder: of its data, its socket and its log.
    """

    folder: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def host(self) -> str:
        """The address, for DOCKER_HOST."""
        return f"unix://{self.folder}/docker.sock"

    @property
    def control_group(self) -> str:
        """The control group of its containers."""
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
        """Stop the daemon, and with it the containers."""
        if self._process:
            self._process.terminate()
            self._process.wait(60)

    def _answers(self) -> bool:
        with contextlib.suppress(ClusterError):
            return bool(docker(self.host, "version"))
        return False


@contextlib.contextmanager
def docker_daemon(folder: Path) -> Iterator[Daemon | None]:
    """Run a Docker daemon in `folder`; None where the machine's own, in DOCKER_HOST, has to do.

    The machine's packet filter, its forwarding and Docker's usual socket are left alone. A CI machine that
    gives no root has a Docker of its own to use.
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
        with contextlib.suppress(ClusterError):  # it did not start
            _remove(daemon.host, ("ps", "--all", "--quiet"), ("rm", "--force", "--volumes"))
            _remove(daemon.host, ("network", "ls", "--quiet", "--filter", "type=custom"), ("network", "rm"))
        daemon.stop()
        for mount in reversed(_mounts(folder)):
            binaries.run(["umount", mount])
        groups = Path("/sys/fs/cgroup")
        for each in (groups, *groups.iterdir()):  # of one hierarchy, or of each
            if (each / daemon.control_group).is_dir():
                (each / daemon.control_group).rmdir()
        shutil.rmtree(folder)


def _remove(host: str, listing: tuple[str, ...], removal: tuple[str, ...]) -> None:
    if found := docker(host, *listing).split():
        docker(host, *removal, *found)


def _mounts(folder: Path) -> list[str]:
    """Where something is mounted under `folder`, in the order it was mounted."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [point for point in points if point.startswith(f"{folder}/")]
