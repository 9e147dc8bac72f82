"""Make Python environments with other versions of packages. The user's cache keeps them."""

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.settings import ROOT


class UvError(Exception):
    """uv failed: the index does not answer, lacks a version, or has no wheel of it."""


def uv_program() -> str:
    """Return the path of uv: the one on PATH, else that of the checkout."""
    return shutil.which("uv") or str(ROOT / ".uv/bin/uv")


def uv(*arguments: str | Path, text: str = "") -> str:
    """Run uv, and return its standard output.

    Args:
        arguments: the command, without the program.
        text: its standard input.

    Raises:
        UvError: uv failed, with its error output.
    """
    command = [uv_program(), *map(str, arguments), "--quiet"]
    done = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UvError(f"uv {' '.join(command[1:3])} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def interpreter(name: str, requirements: Sequence[str], *options: str) -> Path:
    """Return the interpreter of an environment with these packages. Make the environment unless the cache has it.

    Args:
        name: the first part of the name of its folder.
        requirements: requirements of pip. Their hash identifies the environment, so pin what matters.
        options: options of `uv pip install`.

    Raises:
        UvError: the packages cannot be installed.
    """
    content = hashlib.sha256("\n".join([*requirements, *options]).encode()).hexdigest()[:8]
    folder = binaries.cache() / f"{name}-{content}-python-{platform.python_version()}"
    python, ready = folder / "bin" / "python", folder / "ready"
    # with_suffix would replace the part after the last dot of the version.
    with hold_lock(folder.with_name(f"{folder.name}.lock")):
        if not ready.exists():
            uv("venv", "--clear", "--python", sys.executable, folder)
            install: tuple[str | Path, ...] = ("pip", "install", "--compile-bytecode", "--python", python, *options)
            uv(*install, "--requirements", "-", text="\n".join(requirements))
            ready.touch()
    return python
