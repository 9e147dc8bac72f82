"""Install and build the programs of a cluster: Debian's packages and Go modules.

The user's cache keeps each program by version, so that it is built once.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.progress import step

KUBERNETES = "v1.35.4"
"""The last kubelet that supports containerd 1.x, which Debian has, is 1.35."""

MODULES = {
    "helm": ("helm.sh/helm/v4/cmd/helm", "v4.3.1", "3 min, once"),
    "coredns": ("github.com/coredns/coredns", "v1.15.0", "4 min, once"),
    "kwok": ("sigs.k8s.io/kwok/cmd/kwok", "v0.8.0", "3 min, once"),
    "kind": ("sigs.k8s.io/kind", "v0.31.0", "1 min, once"),
    "versitygw": ("github.com/versity/versitygw/cmd/versitygw", "v1.8.0", "3 min, once"),
    "metrics-server": ("sigs.k8s.io/metrics-server/cmd/metrics-server", "v0.9.0", "4 min, once"),
    "oauth2-proxy": ("github.com/oauth2-proxy/oauth2-proxy/v7", "v7.15.6", "1 min, once"),
}
"""Main package, version and build time on 2 cores, by program."""

GATEWAY_API = "v1.4.0"
CERT_MANAGER = "v1.18.2"

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
"""Debian's package, by the program that is needed from it."""

SOURCE = Path(__file__).with_name("kubernetes")


class MissingProgramError(Exception):
    """A program is missing and cannot be built: there is no Go, or `CLUSTER=none` forbids it."""


def cache() -> Path:
    """Return the folder that keeps what takes long to build."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prefect-orchestration"


def install_packages(packages: dict[str, str] = PACKAGES, usual: str = "1 min") -> None:
    """Install the Debian packages whose programs are missing.

    Args:
        packages: Debian's packages by program.
        usual: how long the installation takes, for the output.

    Raises:
        ClusterError: a package is missing and cannot be installed.
        MissingProgramError: a package is missing and `CLUSTER=none` forbids to install it.
    """

    def absent() -> list[str]:
        return sorted(package for program, package in packages.items() if not shutil.which(program))

    if not absent():
        return
    with hold_lock(cache() / "packages.lock"):
        if missing := absent():
            _install(missing, usual)


def _install(missing: list[str], usual: str) -> None:
    listed = " ".join(missing)
    _refuse(listed)
    if not shutil.which("apt-get"):
        raise ClusterError(f"Programs are missing, and there is no apt-get. Install the Debian packages {listed}")
    with step(f"Installing {listed}", usual):
        # RUNLEVEL=1 keeps apt from starting services. Tests start the services that they need.
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        run(["apt-get", "update", "-qq"], environment)
        run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing], environment)


def kube() -> Path:
    """Return the binary with control plane, kubelet, kube-proxy and kubectl. Build it if it is missing."""
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
    """Return the folders of the kubectl and helm that were built here, for the end of PATH."""
    return [cache() / f"kubernetes-{KUBERNETES}", cache() / f"helm-{MODULES['helm'][1]}"]


SHORT_LIVED = {"GOGC": "off", "GOMEMLIMIT": "1GiB"}
"""Variables of programs that end at once. Go's garbage collector would take a third of their time. From the limit on it
works."""

LONG_LIVED = {"GOGC": "300"}
"""Variables of Kubernetes' own servers. With fewer collections they take an eighth less processor time and a sixth more
memory than by default."""


def helm(*arguments: str) -> str:
    """Run helm and return its standard output. The helm on PATH wins over the one that was built here.

    Raises:
        ClusterError: helm failed, with its error output.
    """
    command = [shutil.which("helm") or str(program("helm")), *arguments]
    done = subprocess.run(command, env=SHORT_LIVED | os.environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ClusterError(done.stderr.strip())
    return done.stdout


def kubectl_program() -> str:
    """Return the path of kubectl. The kubectl on PATH wins over the one that was built here."""
    return shutil.which("kubectl") or str(kube().with_name("kubectl"))


def kubectl(*arguments: str, text: str | None = None) -> str:
    """Run kubectl and return its standard output.

    Args:
        arguments: the command.
        text: its standard input.

    Raises:
        ClusterError: kubectl failed, with its error output.
    """
    command = [kubectl_program(), *arguments]
    done = subprocess.run(
        command, env=SHORT_LIVED | os.environ, input=text, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def program(name: str) -> Path:
    """Return the path of a program of `MODULES`. Build it if it is missing."""
    package, version, usual = MODULES[name]
    with _built(name, version, name, usual) as binary:
        if binary is not None:
            environment = os.environ | {"CGO_ENABLED": "0", "GOBIN": str(binary.parent)}
            run(["go", "install", "-trimpath", "-ldflags", "-s -w", f"{package}@{version}"], environment)
    return cache() / f"{name}-{version}" / name


def program_of(source: Path, name: str, usual: str) -> Path:
    """Return the path of the program whose Go module is a folder. Build it if the cache has none of these sources.

    Args:
        source: the folder, with go.mod, go.sum and the Go files.
        name: the program.
        usual: how long the build takes, for the output.
    """
    content = b"".join(file.read_bytes() for file in sorted(source.iterdir()))
    version = hashlib.sha256(content).hexdigest()[:12]
    with _built(name, version, name, usual) as binary:
        if binary is not None:
            command = ["go", "build", "-mod=readonly", "-trimpath", "-ldflags", "-s -w", "-o", str(binary), "."]
            run(command, os.environ | {"CGO_ENABLED": "0"}, source)
    return cache() / f"{name}-{version}" / name


def http_routes() -> Path:
    """Return the definition of the Gateway API's HTTPRoute, from its Go module."""
    source = "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml"
    return _definition("sigs.k8s.io/gateway-api", GATEWAY_API, source, "httproutes.yaml")


def certificates() -> Path:
    """Return the definition of cert-manager's Certificate, from its Go module."""
    source = "deploy/crds/crd-certificates.yaml"
    return _definition("github.com/cert-manager/cert-manager", CERT_MANAGER, source, "certificates.yaml")


def _definition(module: str, version: str, source: str, file: str) -> Path:
    """Return a CustomResourceDefinition of a Go module, as `file` in the cache."""
    name = module.rpartition("/")[2]
    with _built(name, version, file, "5 s, once") as target:
        if target is not None:
            found = json.loads(run(["go", "mod", "download", "-json", f"{module}@{version}"]))
            shutil.copyfile(Path(found["Dir"]) / source, target)
    return cache() / f"{name}-{version}" / file


@contextmanager
def _built(name: str, version: str, file: str, usual: str) -> Iterator[Path | None]:
    """Yield the path to build a program at; None if the cache has it. The cache gets it complete or not at all."""
    folder = cache() / f"{name}-{version}"
    if (folder / file).exists():
        yield None
        return
    _refuse(name)
    if not shutil.which("go"):
        raise MissingProgramError(f"{name} is not installed, and Go, which builds it, is missing. Install one of them")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as fresh:
        with step(f"Building {name} {version} from its Go modules", usual):
            yield Path(fresh) / file
        folder.mkdir(exist_ok=True)
        (Path(fresh) / file).replace(folder / file)


def _refuse(program: str) -> None:
    """Raise MissingProgramError if `CLUSTER=none` forbids to install and build."""
    if os.environ.get("CLUSTER") == "none":
        raise MissingProgramError(f"CLUSTER=none: {program} is not here, and nothing is installed or built")


def run(command: list[str], environment: dict[str, str] | None = None, folder: Path | None = None) -> str:
    """Run a program and return its standard output.

    Args:
        command: the program and its arguments.
        environment: all of its environment variables; by default those of this process.
        folder: its working directory.

    Raises:
        ClusterError: the program failed, with the last lines of its output.
    """
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " | ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise ClusterError(f"{' '.join(command[:3])} ended with {done.returncode}: {last}")
    return done.stdout
