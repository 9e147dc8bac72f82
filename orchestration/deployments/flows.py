"""Import the flow of an entrypoint as Prefect does."""

import contextlib
import contextvars
import difflib
import functools
import inspect
import os
import sys
import sysconfig
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from orchestration.errors import DeploymentsError

_INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))

Result = TypeVar("Result")

_import_lock = threading.RLock()
"""An import changes the working directory, sys.path and sys.modules of the process: one import at a time."""


@dataclass(frozen=True)
class Flow:
    """What a deployment takes from its flow.

    Args:
        name: the flow's name on the server.
        description: the flow's description, or None.
        version: the version that `@flow` sets, or None: Prefect's default, a hash of the file, changes with each edit.
        schema: the parameter_openapi_schema that `prefect deploy` sends.
        validate: converts parameters to the flow's types, as Prefect's engine does before it calls the flow. Raises
            `ParameterTypeError`.
    """

    name: str
    description: str | None
    version: str | None
    schema: dict[str, Any]
    validate: Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class _Source:
    """A script or module after its import.

    Args:
        module: the module; None if the import failed.
        local_modules: the modules of its own folder that it imported, by their name in sys.modules.
        error: why the import failed.
    """

    module: ModuleType | None
    local_modules: dict[str, ModuleType]
    error: str = ""


@functools.cache
def load(entrypoint: str, directory: Path) -> Flow:
    """Import an entrypoint as Prefect does, and return its flow.

    A script is imported once for all of its flows, and what it prints goes to stderr. Each folder has its own modules:
    two folders may have a module of the same name.

    Args:
        entrypoint: `path/to/file.py:function`, `module.path:function` or `module.path.function`.
        directory: the base of relative paths and modules, and the working directory during the import.

    Raises:
        DeploymentsError: there is no such file or flow, or the import fails.
    """
    source_name, function = _split(entrypoint)
    directory = directory.resolve()
    source = _import(source_name, directory)
    if source.module is None:
        raise DeploymentsError(f"entrypoint {entrypoint}: {source.error}")
    from prefect import flows
    from prefect.utilities.callables import parameter_schema
    from pydantic_core import to_jsonable_python

    flow: Any = source.module
    with _isolated_imports(source_name, directory, source.local_modules):
        try:
            for part in function.split("."):
                flow = getattr(flow, part)
        except AttributeError:
            cure = _suggest_flow(source.module, function)
            raise DeploymentsError(f"entrypoint {entrypoint}: {source_name} has no {function}. {cure}") from None
        if not isinstance(flow, flows.Flow):
            cure = f"Decorate it with @flow. {_suggest_flow(source.module, function)}"
            raise DeploymentsError(f"entrypoint {entrypoint}: {function} of {source_name} is not a flow. {cure}")
        # As deploy does, after the import: `flow.parameters` lacks types that are defined below the flow.
        # Not model_dump_for_openapi: for a flow without parameters it adds "definitions", which deploy does not send.
        schema = to_jsonable_python(parameter_schema(flow).model_dump(exclude_unset=True))

        def validate(parameters: dict[str, Any]) -> object:
            with _isolated_imports(source_name, directory, source.local_modules):
                return flow.validate_parameters(parameters) if flow.should_validate_parameters else parameters

        def validate_without_event_loop(parameters: dict[str, Any]) -> object:
            return _call_without_event_loop(functools.partial(validate, parameters))

        return Flow(flow.name, flow.description or None, _declared_version(flow), schema, validate_without_event_loop)


def _call_without_event_loop(function: Callable[[], Result]) -> Result:
    """Call a function of user code where no event loop runs. Where one runs, Prefect's functions return coroutines."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(contextvars.copy_context().run, function).result()


def _declared_version(flow: Any) -> str | None:
    """Return the version that `@flow` sets, or None."""
    from prefect.utilities.hashing import file_hash

    try:
        default = file_hash(inspect.getsourcefile(flow.fn) or "")
    except (OSError, TypeError):
        default = None
    return flow.version if flow.version != default else None


def _split(entrypoint: str) -> tuple[str, str]:
    """Return the script or module, and the function, of an entrypoint."""
    source, colon, function = entrypoint.rpartition(":")
    if not colon and not entrypoint.endswith(".py"):
        source, _, function = entrypoint.rpartition(".")
    if not source or not all(part.isidentifier() for part in function.split(".")):
        raise DeploymentsError(
            f"entrypoint {entrypoint!r} names no flow. Write path/to/file.py:function or module.path:function"
        )
    return source, function


@functools.cache
def _import(name: str, directory: Path) -> _Source:
    """Import the script or module `name`. A failure is cached as well: many deployments may name the same file.

    As under `prefect deploy`, an event loop runs during the import. A script that fails because Prefect returned a
    coroutine is imported again without a loop, as in a run: `Secret.load("api").get()` needs a server then.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        source = _import_once(name, directory)
    if "coroutine" in source.error:
        source = _call_without_event_loop(functools.partial(_import_once, name, directory))
    return source


def _import_once(name: str, directory: Path) -> _Source:
    from prefect.exceptions import ScriptError
    from prefect.utilities.importtools import load_module, load_script_as_module

    script = directory / name
    if name.endswith(".py") and not script.is_file():
        siblings = {path.name: path for path in sorted(script.parent.glob("*.py"))}
        near = difflib.get_close_matches(script.name, siblings, n=1)
        cure = f"Did you mean {Path(name).with_name(near[0])}?" if near else "Correct the path"
        return _Source(None, {}, f"there is no file {name} in {directory}. {cure}")
    local_modules: dict[str, ModuleType] = {}
    try:
        with _isolated_imports(name, directory, local_modules):
            module = load_script_as_module(name) if name.endswith(".py") else load_module(name)
    except ScriptError as error:
        return _Source(None, {}, _explain_failure(error.user_exc, name, directory))
    except (Exception, SystemExit) as error:
        return _Source(None, {}, _explain_failure(error, name, directory))
    return _Source(module, local_modules)


@contextlib.contextmanager
def _isolated_imports(name: str, directory: Path, local_modules: dict[str, ModuleType]) -> Iterator[None]:
    """Import with the working directory and modules of one script, and restore those of the process afterwards.

    A module of a package of these folders that the process had imported before stays: removed, it would exist twice.

    Args:
        name: the script or module that is imported.
        directory: the working directory during the import.
        local_modules: the modules that it imported earlier; takes those that it imports.
    """
    folder = (directory / name).resolve().parent if name.endswith(".py") else directory
    with _import_lock:
        path, before, cwd = list(sys.path), set(sys.modules), Path.cwd()
        sys.modules.update(local_modules)
        os.chdir(directory)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            os.chdir(cwd)
            sys.path[:] = path
            for imported in set(sys.modules) - before:
                top = imported.partition(".")[0]
                is_kept = top in before and _is_module_of(sys.modules[top], folder, directory)
                if not is_kept and _is_module_of(sys.modules[imported], folder, directory):
                    local_modules[imported] = sys.modules.pop(imported)


def _is_module_of(module: ModuleType, *folders: Path) -> bool:
    """Return whether the file of a module, or its folder, is in one of the folders and not installed."""
    files = [module.__file__] if getattr(module, "__file__", None) else list(getattr(module, "__path__", []))
    return any(_is_user_file(Path(file), *folders) for file in files if file)


def _is_user_file(file: Path, *folders: Path) -> bool:
    file = file.resolve()
    return any(file.is_relative_to(f) for f in folders) and not any(file.is_relative_to(i) for i in _INSTALLED)


def _suggest_flow(module: ModuleType, function: str) -> str:
    """Return the cure for a function that is not a flow: the flow with a similar name, else all flows."""
    from prefect import flows

    names = sorted(name for name, value in vars(module).items() if isinstance(value, flows.Flow))
    near = difflib.get_close_matches(function, names, n=1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"Its flows are {', '.join(names)}" if names else "It has no flow"


def _explain_failure(error: BaseException, name: str, directory: Path) -> str:
    """Return why an import failed, with the last line of the user's code on the way, and the cure."""
    folder = (directory / name).resolve().parent
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{_relative(Path(error.filename), directory)}:{error.lineno}"
        return f"{type(error).__name__}: {error.msg} ({where}). Correct that line"
    if isinstance(error, ImportError) and (other := _shadowing_package(error.name or "", folder, directory)):
        return (
            f"importing {name} needs the folder {other.__name__} next to it, but this command has imported another "
            f"package of that name ({', '.join(other.__path__)}). Rename the folder"
        )
    # The entrypoint's own module or a package of it is missing, and not a module that it imports.
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"there is no module {error.name} in {directory} or installed. Correct the entrypoint or install it"
    frames = [
        f"{_relative(directory / frame.filename, directory)}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<") and _is_user_file(directory / frame.filename, folder, directory)
    ]
    location = f" at {frames[-1]}" if frames else ""
    text = " ".join(str(error).split())
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, SystemExit):
        return f'it ends the process when imported ({what}{location}). Put that under if __name__ == "__main__"'
    cure = "Install what is missing" if isinstance(error, ImportError) else "Correct that line"
    return f"importing {name} raises {what}{location}. {cure}, or move it into the flow"


def _shadowing_package(name: str, *folders: Path) -> ModuleType | None:
    """Return the imported package that hides the folder which has a module in one of these folders."""
    top = name.partition(".")[0]
    package = sys.modules.get(top)
    if package is None or not hasattr(package, "__path__") or _is_module_of(package, *folders):
        return None
    return package if any((folder / top).is_dir() for folder in folders) else None


def _relative(file: Path, directory: Path) -> str:
    """Return a path relative to `directory` if it is in there, else the absolute path."""
    file = (directory / file).resolve()
    return str(file.relative_to(directory)) if file.is_relative_to(directory) else str(file)
