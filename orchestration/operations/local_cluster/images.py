"""Build the base images of a node on a machine that reaches no image registry.

The images are pushed to the node's registry. Pods pull them from there like every other image.
"""

import os
import shutil
import tempfile
from pathlib import Path

from orchestration.operations import registry
from orchestration.operations.local_cluster import binaries
from orchestration.progress import step
from orchestration.settings import ROOT

REGISTRY = "localhost:5000"
"""The registry that `make push` pushes to and the node pulls from."""

PAUSE = f"{REGISTRY}/pause:1"
BASE = f"{REGISTRY}/python:3.13-slim-trixie"
"""Debian trixie with its Python 3.13, under the names of the official image."""

POSTGRES = f"{REGISTRY}/postgres:17"
VALKEY = f"{REGISTRY}/valkey:8.1"
PGBOUNCER = f"{REGISTRY}/pgbouncer:1.24"
"""Debian's packages with the interface of the public images."""


def push_image(image: str, name: str | None = None) -> str:
    """Push an image from buildah's store to the node's registry, and return its digest.

    Args:
        image: the image in buildah's store.
        name: its name in the registry; by default the same.
    """
    with tempfile.NamedTemporaryFile("r") as digest:
        target = f"docker://{name or image}"
        binaries.run(["buildah", "push", "-q", "--tls-verify=false", "--digestfile", digest.name, image, target])
        return digest.read().strip()


def make_system_images() -> None:
    """Push the images of the node's own pods: the sandbox, DNS and metrics."""
    push_binary(PAUSE, Path(shutil.which("catatonit") or ""), '["/catatonit", "-P"]')
    for name in ("coredns", "metrics-server"):
        push_program_image(name)


def push_program_image(name: str) -> str:
    """Push the image of a Go program unless the registry has it, and return the image's name.

    Args:
        name: a program of `binaries.MODULES`.
    """
    image = f"{REGISTRY}/{name}:{binaries.MODULES[name][1]}"
    push_binary(image, binaries.program(name), f'["/{name}"]')
    return image


def push_binary(image: str, binary: Path, entrypoint: str) -> None:
    """Push an image of one static program unless the registry has it.

    Args:
        image: the image's name.
        binary: the program, which is in the root folder of the image.
        entrypoint: the image's entrypoint, as a list in JSON.
    """
    if not registry.has_image(image):
        _make(image, binary, f"/{binary.name}", "--entrypoint", entrypoint)
        push_image(image)
        binaries.run(["buildah", "rmi", image])


def _make(image: str, source: Path, target: str, *settings: str) -> None:
    """Make an image of one file or folder in buildah's store."""
    container = binaries.run(["buildah", "from", "scratch"]).strip()
    try:
        binaries.run(["buildah", "add", "-q", container, str(source), target])
        binaries.run(["buildah", "config", *settings, container])
        binaries.run(["buildah", "commit", "-q", container, image])
    finally:
        binaries.run(["buildah", "rm", container])


def make_base_image() -> None:
    """Push the base image, made from Debian's packages. The user's cache keeps it as an archive."""
    if registry.has_image(BASE):
        return
    archive = binaries.cache() / "python-3.13-slim-trixie" / "image.tar"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        with (
            step("Making the base image from Debian's packages", "80 s, once"),
            tempfile.TemporaryDirectory(prefix=".base-", dir=archive.parent) as folder,
        ):
            _bootstrap(Path(folder) / "root")
            fresh = Path(folder) / "image.tar"
            _make(BASE, Path(folder) / "root", "/", "--cmd", "python3", "--env", "LANG=C.UTF-8")
            binaries.run(["buildah", "push", "-q", BASE, f"oci-archive:{fresh}:{BASE}"])
            fresh.replace(archive)
    push_image(binaries.run(["buildah", "pull", "-q", f"oci-archive:{archive}"]).strip(), BASE)


def make_databases() -> None:
    """Push Postgres, Valkey and PgBouncer with the interface of their public images."""
    folder = ROOT / "docker" / "databases"
    for target, image in (("postgres", POSTGRES), ("valkey", VALKEY), ("pgbouncer", PGBOUNCER)):
        if not registry.has_image(image):
            with step(f"Making the image of {target} from Debian's packages", "20 s"):
                options = ["--build-arg", f"BASE_IMAGE={BASE}", "--target", target, "--tag", image]
                isolation = ["--isolation", "chroot", "--network", "host", "--tls-verify=false", "--layers"]
                binaries.run(["buildah", "build", "-q", *isolation, *options, str(folder)])
                push_image(image)


def _bootstrap(root: Path) -> None:
    """Install Debian with Python into a folder, without what the official slim images leave out."""
    # This machine's keyring may be older than trixie. apt already trusts the mirror.
    keys = "/usr/share/keyrings/debian-archive-trixie-automatic.gpg"
    check = [f"--keyring={keys}"] if Path(keys).exists() else ["--no-check-gpg"]
    packages = "ca-certificates,python3.13,python3.13-venv"
    binaries.run(
        ["debootstrap", *check, "--variant=minbase", f"--include={packages}", "trixie", str(root), *_mirror()],
        os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
    )
    for name in ("python", "python3"):
        link = root / "usr" / "local" / "bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to("/usr/bin/python3.13")
    # The official slim images leave out documentation. apt's lists, caches and logs are only needed here.
    documents = [f"usr/share/{name}" for name in ("doc", "info", "locale", "man")]
    for folder in ("var/lib/apt/lists", "var/cache/apt", "var/log", *documents):
        for entry in (root / folder).iterdir() if (root / folder).exists() else ():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _mirror() -> list[str]:
    """Return the Debian mirror of this machine's apt, which may differ from debootstrap's default."""
    sites = binaries.run(["apt-get", "indextargets", "--format", "$(SITE)"]).split()
    return [site for site in sites if site.rstrip("/").endswith("/debian")][:1]
