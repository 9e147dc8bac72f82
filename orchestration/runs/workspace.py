"""Enter a run's workspace in this process, as a process that is started in the workspace would.

Prefect starts such a process. The engine saves that start, so it must find the user's modules in the same places.
"""

import functools
import importlib
import os
import site
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from orchestration.prefect_compat.flow_runs import Workspace


class Snapshot(NamedTuple):
    """Holds this process's modules and the .pth files from before the pull steps."""

    modules: frozenset[str]
    path_files: frozenset[tuple[str, str]]


def snapshot() -> Snapshot:
    """Return a snapshot of this process."""
    return Snapshot(frozenset(sys.modules), _path_files())


def enter(workspace: Workspace, before: Snapshot) -> None:
    """Change this process to the workspace's directory, environment and modules.

    Args:
        workspace: the folder and environment that the pull steps made.
        before: the snapshot from before the pull steps.
    """
    os.environ.update(workspace.environment)
    os.chdir(workspace.directory)
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = [*paths, *(path for path in sys.path if path not in paths)]
    importlib.invalidate_caches()
    for folder, name in sorted(_path_files() - before.path_files):  # a pull step such as `pip install -e .` made them
        site.addpackage(folder, name, None)
    _forget_modules(before)


def _path_files() -> frozenset[tuple[str, str]]:
    """Return the .pth files that a process reads when it starts: folder and name."""
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return frozenset((folder, file.name) for folder in folders for file in Path(folder).glob("*.pth"))


def _forget_modules(before: Snapshot) -> None:
    """Remove modules that a new process would import again, or from another place.

    These are modules that pull steps imported without installing them, and packages that the user's code has under the
    same name.
    """
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}

    @functools.cache
    def has_moved(package: str) -> bool:
        spec = PathFinder.find_spec(package)
        return bool(spec and spec.origin and files.get(package) and spec.origin != files[package])

    for name, file in files.items():
        is_user_module = file and not file.startswith(installed) and name != "__main__"
        if is_user_module and (name not in before.modules or has_moved(name.partition(".")[0])):
            del sys.modules[name]
