"""Parts for tests of signed images: a registry, and a checkout whose image is one file."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orchestration.operations.local_cluster import binaries
from tests.parts import commit_copy_of_checkout, free_port, serving

BASE = f"registry.example.com/base:1@sha256:{'b' * 64}"
"""The base that the checkout's builds name. The image of one file has none."""

CHECKOUT_IMAGE = """
import sys
from orchestration.errors import ClusterError
from orchestration.operations.environment import Environment
from orchestration.operations.release_inputs import checkout_image
try:
    print(checkout_image(Environment("staging", "context", "namespace")))
except ClusterError as error:
    sys.exit(str(error))
"""
"""Prints the image that a deploy of `staging` uses."""

KEY = "helm/environments/staging/cosign.pub"


@contextlib.contextmanager
def image_registry(folder: Path, **storage: Any) -> Iterator[str]:
    """Run an image registry that keeps its images in `folder`, and yield its address.

    Args:
        folder: an empty folder.
        storage: further settings of the registry's storage.
    """
    binaries.install_packages({name: binaries.PACKAGES[name] for name in ("buildah", "docker-registry")})
    port = free_port()
    settings = {
        "version": "0.1",
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "images")}, **storage},
        "http": {"addr": f"127.0.0.1:{port}"},
    }
    (folder / "registry.yaml").write_text(yaml.safe_dump(settings))
    command = ["docker-registry", "serve", str(folder / "registry.yaml")]
    with serving(command, port, {}, folder / "registry.log"):
        yield f"localhost:{port}"


@dataclass(frozen=True)
class SmallCheckout:
    """A committed copy of this checkout whose image is one file, and its own store of images.

    Args:
        folder: the copy.
    """

    folder: Path

    def make(self) -> "SmallCheckout":
        """Copy this checkout and commit the copy."""
        commit_copy_of_checkout(self.folder)
        (self.folder / "docker" / "Dockerfile").write_text("FROM scratch\nCOPY LICENSE /LICENSE\n")
        with (self.folder / "docker" / "Dockerfile.dockerignore").open("a") as ignore:
            ignore.write("!LICENSE\n")
        self.commit()
        store = self.folder.parent / "store"
        (self.folder.parent / "storage.conf").write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = "{store}/graph"\nrunroot = "{store}/run"\n'
        )
        return self

    def commit(self) -> None:
        """Commit all changes."""
        identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        for command in (["add", "-A"], [*identity, "commit", "-qm", "A change"]):
            subprocess.run(["git", *command], cwd=self.folder, check=True)

    def run(self, *command: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a program with the copy's code, and return its exit status and output."""
        environment = os.environ | {
            "BUILDER": "buildah",
            "BASE_IMAGE": BASE,
            "CONTAINERS_STORAGE_CONF": str(self.folder.parent / "storage.conf"),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(self.folder),
        }
        return subprocess.run(
            command, cwd=self.folder, env=environment | variables, capture_output=True, text=True, check=False
        )

    def output(self, *command: str, **variables: str) -> str:
        """Run a program with the copy's code, and return its standard output. It has to succeed."""
        done = self.run(*command, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def deployed(self, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Print the image that a deploy of `staging` would use, or why it would be refused."""
        return self.run(sys.executable, "-c", CHECKOUT_IMAGE, **variables)
