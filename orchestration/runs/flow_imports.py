"""Imports what the image's flows import, before a warm pod has its run: installed packages, and those of this project.

No code of a user's module is executed: such modules are parsed. A run then imports the user's modules as it would
without a warm pod, from the place that its pull steps choose, and finds the packages imported.
"""

import ast
import contextlib
import importlib
import itertools
import sysconfig
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import yaml

DEPLOYMENTS_FILE = "prefect.yaml"
"""The file in the image's working directory that names the flows."""

USED_BY_EACH_RUN = ("anyio._backends._asyncio", "encodings.idna", "pydantic.v1")
"""Modules that Prefect imports late, with the first request and the first flow: a tenth of a second."""

_OWN_PACKAGE = __name__.partition(".")[0]


def import_packages_of_flows(folder: Path | None = None) -> None:
    """Import what the flows of the deployments in a folder import. What fails here fails in the run, which reports it.

    Args:
        folder: the folder with `prefect.yaml`; None for the working directory.
    """
    for name in USED_BY_EACH_RUN:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    folder = folder or Path.cwd()
    seen: set[Path] = set()
    for file in _flow_files(folder):
        for module, names in _find_imports(file, folder, seen):
            with contextlib.suppress(Exception):
                __import__(module, fromlist=names)


def _flow_files(folder: Path) -> set[Path]:
    try:
        deployments = yaml.safe_load((folder / DEPLOYMENTS_FILE).read_text())["deployments"]
        entrypoints = [str(deployment["entrypoint"]) for deployment in deployments]
    except (OSError, ValueError, TypeError, LookupError, yaml.YAMLError):
        return set()
    return {folder / entrypoint.partition(":")[0] for entrypoint in entrypoints}


def _find_imports(file: Path, folder: Path, seen: set[Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield the installed modules that a file and the user's modules below it import first, with the imported names.

    A file is read up to its first statement that may have effects, such as a change of the environment.
    """
    if file in seen:
        return
    seen.add(file)
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return
    for statement in itertools.takewhile(_has_no_effect, body):
        if isinstance(statement, ast.Import):
            found = [(alias.name, [""]) for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            found = [(statement.module or "", [alias.name for alias in statement.names if alias.name != "*"])]
        else:
            continue
        for module, names in found:
            level = statement.level if isinstance(statement, ast.ImportFrom) else 0
            if not level and module.partition(".")[0] == _OWN_PACKAGE:
                yield module, names
                continue
            roots = [file.parents[level - 1]] if level else [folder, file.parent]
            users = [path for root in roots for path in _module_files(root, module, names)]
            for path in users:
                yield from _find_imports(path, folder, seen)
            if module and not users and not level and _is_installed(module):
                yield module, names


def _has_no_effect(statement: ast.stmt) -> bool:
    """Return whether a statement is an import, a definition or a docstring."""
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_text or isinstance(
        statement, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    )


def _module_files(root: Path, module: str, names: list[str]) -> list[Path]:
    """Return the files of a user's module, and of the modules that are imported from it by name."""
    place = root.joinpath(*module.split(".")) if module else root
    places = [place, *(place / name for name in names if name)]
    files = [path for place in places for path in (place.with_suffix(".py"), place / "__init__.py")]
    return [path for path in files if path.is_file()]


def _is_installed(module: str) -> bool:
    """Return whether a module's package is one of Python's or of an installed distribution."""
    spec = PathFinder.find_spec(module.partition(".")[0])
    folders = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    return bool(spec and spec.origin and spec.origin.startswith(folders))
