"""Interpreters of environments with other versions than this one has, made once and kept in the user's cache."""

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
    """uv failed: a version is not on the index, has no wheel, or the index is away."""


def uv(*arguments: str | Path, text: str = "") -> str:
    """Run uv, the one of the machine or of the checkout.

    Args:
        arguments: the command, without the program.
        text: its standard input.

    Returns:
        What it printed.

    Raises:
        UvError: with what uv printed.
    """
    program = shutil.which("uv") or str(ROOT / ".uv/bin/uv")
    command = [program, *map(str, arguments), "--quiet"]
    done = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UvError(f"uv {' '.join(command[1:3])} failed: {' '.join(done.stderr.split())}")
    return done.stdout


def interpreter(name: str, requirements: Sequence[str], *options: str) -> Path:
    """Return the interpreter of an environment with these packages, which is made if it is not in the cache.

    Args:
        name: begins the name of the environment's folder.
        requirements: as pip takes them; the cached environment is found by them, so they pin what matters.
        options: of `uv pip install`.

    Raises:
        UvError: the packages cannot be installed.
    """
    content = hashlib.sha256("\n".join([*requirements, *options]).encode()).hexdigest()[:8]
    folder = binaries.cache() / f"{name}-{content}-python-{platform.python_version()}"
    python, ready = folder / "bin" / "python", folder / "ready"
    # By name, as a suffix would replace what follows the version's last dot.
    with hold_lock(folder.with_name(f"{folder.name}.lock")):
        if not ready.exists():
            uv("venv", "--clear", "--python", sys.executable, folder)
            install: tuple[str | Path, ...] = ("pip", "install", "--compile-bytecode", "--python", python, *options)
            uv(*install, "--requirements", "-", text="\n".join(requirements))
            ready.touch()
    return python
