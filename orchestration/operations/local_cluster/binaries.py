"""The programs of a node: from Debian's packages and from Go modules.

What is built is kept under the user's cache folder by version, so that it is built once.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster.turns import turn
from orchestration.progress import step

KUBERNETES = "v1.35.4"
"""Kubelet 1.35 is the last that takes containerd 1.x, which Debian has."""

MODULES = {
    "helm": ("helm.sh/helm/v4/cmd/helm", "v4.3.1", "3 min, once"),
    "coredns": ("github.com/coredns/coredns", "v1.15.0", "4 min, once"),
    "kwok": ("sigs.k8s.io/kwok/cmd/kwok", "v0.8.0", "3 min, once"),
    "kind": ("sigs.k8s.io/kind", "v0.31.0", "1 min, once"),
    "versitygw": ("github.com/versity/versitygw/cmd/versitygw", "v1.8.0", "3 min, once"),
    "metrics-server": ("sigs.k8s.io/metrics-server/cmd/metrics-server", "v0.9.0", "4 min, once"),
}
"""Main package, version and how long its build takes, by program."""

GATEWAY_API = "v1.4.0"

PACKAGES = {
    "buildah": "buildah",
    "catatonit": "catatonit",
    "conntrack": "conntrack",
    "containerd": "containerd",
    "debootstrap": "debootstrap",
    "docker-registry": "docker-registry",
    "etcd": "etcd-server",
    "faketime": "faketime",
    "iptables": "iptables",
    "runc": "runc",
    "socat": "socat",
    "/usr/lib/cni/bridge": "containernetworking-plugins",
}
"""Debian's package by the program that is needed of it."""

SOURCE = Path(__file__).with_name("kubernetes")


class MissingProgramError(Exception):
    """A program is not here and is not made: there is no Go, or `CLUSTER=none` is set."""


def cache() -> Path:
    """The folder that keeps what takes long to make."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefect-orchestration"


def install_packages(packages: dict[str, str] = PACKAGES, usual: str = "1 min") -> None:
    """Install the Debian packages whose programs are missing.

    Args:
        packages: as `PACKAGES`.
        usual: how long it takes.

    Raises:
        ClusterError: they are missing and cannot be installed.
    """

    def absent() -> list[str]:
        return sorted(package for program, package in packages.items() if not shutil.which(program))

    if not absent():
        return
    with turn(cache() / "packages.lock"):
        if missing := absent():
            _install(missing, usual)


def _install(missing: list[str], usual: str) -> None:
    listed = " ".join(missing)
    _refuse(listed)
    if not shutil.which("apt-get"):
        raise ClusterError(f"Programs are needed that are not here. Install what Debian calls {listed}")
    with step(f"Installing {listed}", usual):
        # Services are not started: what needs one runs its own.
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        run(["apt-get", "update", "-qq"], environment)
        run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing], environment)


def kube() -> Path:
    """The binary with the control plane, the node's agents and kubectl; built if need be."""
    version, minor = KUBERNETES, KUBERNETES.split(".")[1]
    with _built("kubernetes", version, "kube", "9 min, once") as binary:
        if binary is not None:
            set_version = "-X k8s.io/component-base/version.git"
            flags = f"-s -w {set_version}Version={version} {set_version}Major=1 {set_version}Minor={minor}"
            command = ["go", "build", "-mod=readonly", "-trimpath", "-ldflags", flags, "-o", str(binary), "."]
            run(command, os.environ | {"CGO_ENABLED": "0"}, SOURCE)
    path = cache() / f"kubernetes-{version}" / "kube"
    kubectl = path.with_name("kubectl")
    if not kubectl.exists():
        kubectl.symlink_to("kube")
    return path


def folders() -> list[Path]:
    """Where kubectl and helm are that were built here; for the end of a PATH."""
    return [cache() / f"kubernetes-{KUBERNETES}", cache() / f"helm-{MODULES['helm'][1]}"]


_BRIEF = {"GOGC": "400"}
"""Go's garbage collector is a quarter of what a program costs that ends at once."""


def helm(*arguments: str) -> str:
    """Run helm, the one that is here or else our own; what it printed.

    Raises:
        ClusterError: it failed, with what it said.
    """
    command = [shutil.which("helm") or str(program("helm")), *arguments]
    done = subprocess.run(command, env=_BRIEF | os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(done.stderr.strip())
    return done.stdout


def kubectl_program() -> str:
    """The path of kubectl, the one that is here or else our own."""
    return shutil.which("kubectl") or str(kube().with_name("kubectl"))


def kubectl(*arguments: str, text: str | None = None) -> str:
    """Run kubectl, the one that is here or else our own; what it printed.

    Raises:
        ClusterError: it failed, with what it said.
    """
    command = [kubectl_program(), *arguments]
    done = subprocess.run(command, env=_BRIEF | os.environ, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def program(name: str) -> Path:
    """One of `MODULES`; built if need be."""
    package, version, usual = MODULES[name]
    with _built(name, version, name, usual) as binary:
        if binary is not None:
            environment = os.environ | {"CGO_ENABLED": "0", "GOBIN": str(binary.parent)}
            run(["go", "install", "-trimpath", "-ldflags", "-s -w", f"{package}@{version}"], environment)
    return cache() / f"{name}-{version}" / name


def http_routes() -> Path:
    """Return the definition of the Gateway API's HTTPRoute, from its Go module."""
    with _built("gateway-api", GATEWAY_API, "httproutes.yaml", "5 s, once") as file:
        if file is not None:
            module = json.loads(run(["go", "mod", "download", "-json", f"sigs.k8s.io/gateway-api@{GATEWAY_API}"]))
            definitions = Path(module["Dir"]) / "config" / "crd" / "standard"
            shutil.copyfile(definitions / "gateway.networking.k8s.io_httproutes.yaml", file)
    return cache() / f"gateway-api-{GATEWAY_API}" / "httproutes.yaml"


@contextmanager
def _built(name: str, version: str, file: str, usual: str) -> Iterator[Path | None]:
    """Where to build a program, or None if it is there; it appears in the cache whole or not at all."""
    folder = cache() / f"{name}-{version}"
    if (folder / file).exists():
        yield None
        return
    _refuse(name)
    if not shutil.which("go"):
        raise MissingProgramError(f"{name} is not here, and there is no Go to build it with")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as fresh:
        with step(f"Building {name} {version} from its Go modules", usual):
            yield Path(fresh) / file
        folder.mkdir(exist_ok=True)
        (Path(fresh) / file).replace(folder / file)


def _refuse(program: str) -> None:
    """Raise MissingProgramError where nothing is to be made on the machine."""
    if os.environ.get("CLUSTER") == "none":
        raise MissingProgramError(f"CLUSTER=none: {program} is not here, and nothing is installed or built")


def run(command: list[str], environment: dict[str, str] | None = None, folder: Path | None = None) -> str:
    """Run a program of the set-up; what it printed.

    Raises:
        ClusterError: it failed, with its last lines.
    """
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise ClusterError(f"{' '.join(command[:3])} ended with {done.returncode}: {last}")
    return done.stdout
