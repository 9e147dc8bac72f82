"""What executes a flow run in its container: `prefect flow-run execute` in one process instead of three.

    PREFECT__FLOW_RUN_ID=... python -m orchestration.runs.engine

Prefect's command fetches the flow's code in a second process, which becomes a third to execute it, and each imports
Prefect anew: on a small machine half of the time to a run's first line. Here the same parts of Prefect 3.9 do both in
this one; `orchestration.runs.supervisor`, its parent, is to it what the command is to Prefect's.

Its clients ask again from their first request on. Prefect's repeat a request that finds nobody to talk to only once
they have had an answer, so that a wrong address fails at once. But a run makes clients as it goes, for the slot of each
task that has tags, and begins with one: where the API is away for a moment, such a task or run would fail. The address
was its worker's too, and `PREFECT_CLIENT_MAX_RETRIES` says when to give up.

They ask at least every `PAUSE` seconds or so. Prefect's wait twice as long each time, at last for minutes in which the
API may be back: a run that has ended had its pod taken away while the end of its log was still to be sent.

And they write down which leases of concurrency slots are held, in the container's termination message: Kubernetes has
it however the container ends, and who finds the execution dead gives them back. The server tells nobody who holds a
slot, and takes it back itself only when its lease ends, for `concurrency("name")` after five minutes.
"""

import asyncio
import contextlib
import functools
import importlib
import json
import os
import site
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Collection
from importlib.machinery import PathFinder
from pathlib import Path

import httpx

from orchestration.prefect_compat import flow_runs
from orchestration.prefect_protocol import FLOW_RUN_ID_VARIABLE
from orchestration.runs.supervisor import GATE, write

PAUSE = 15.0
"""Seconds, give or take Prefect's jitter, from one request that nobody answered to the next, at the most."""

flow_runs.retry_first_requests()
flow_runs.bound_retry_pauses(lambda: PAUSE)

HELD = 64
"""Leases at the most that are written down: of a longer message Kubernetes keeps the first 4096 bytes."""

_held: list[str] = []
_turn = threading.Lock()


def _note(request: httpx.Request, response: httpx.Response) -> None:
    """Write down what is held now, if the request was for a lease or gave one back and was heard."""
    path = request.url.path
    if not response.is_success or not path.endswith(("/increment-with-lease", "/decrement-with-lease")):
        return
    with _turn, contextlib.suppress(ValueError, LookupError):  # what cannot be read is no reason to fail the run
        if path.endswith("/decrement-with-lease"):
            given = json.loads(request.content)["lease_id"]
            _held[:] = [each for each in _held if each != given]
        elif (made := response.json())["limits"]:  # else nobody has set one by that name
            _held.append(made["lease_id"])
        write({"leases": _held[-HELD:]})


def _enter(workspace: flow_runs.Workspace) -> None:
    """Be in the workspace as a process that is started in it."""
    os.environ.update(workspace.environment)
    os.chdir(workspace.directory)
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = [*paths, *(each for each in sys.path if each not in paths)]
    importlib.invalidate_caches()


def _path_files() -> set[tuple[str, str]]:
    """The .pth files that a process reads when it starts: folder and name."""
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return {(folder, file.name) for folder in folders for file in Path(folder).glob("*.pth")}


def _forget(imported: Collection[str]) -> None:
    """Forget modules that a process which is started here would import anew, or from elsewhere.

    These are what pull steps imported and did not install, and packages of which the user's code has one of that name.

    Args:
        imported: the modules that were imported before the pull steps.
    """
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}

    @functools.cache
    def moved(package: str) -> bool:
        spec = PathFinder.find_spec(package)
        return bool(spec and spec.origin and files.get(package) and spec.origin != files[package])

    for name, file in files.items():
        own = file and not file.startswith(installed) and name != "__main__"
        if own and (name not in imported or moved(name.partition(".")[0])):
            del sys.modules[name]


def _wait_to_begin() -> None:
    """Wait for the supervisor to know that the run is still this Job's; without a supervisor there is no wait."""
    if gate := os.environ.pop(GATE, ""):
        with os.fdopen(int(gate), "rb") as opened:
            if not opened.read(1):
                sys.exit(1)  # the supervisor has died


def main() -> None:
    """Execute the run that the environment names."""
    _wait_to_begin()
    flow_runs.observe_responses(_note)
    # It goes with the container: at its exit this process still sends logs from there.
    folder = tempfile.mkdtemp(prefix="prefect-flow-run-")
    imported, path_files = set(sys.modules), _path_files()
    _enter(asyncio.run(flow_runs.prepare_workspace(os.environ[FLOW_RUN_ID_VARIABLE], folder)))
    for each in sorted(_path_files() - path_files):  # of what pull steps installed, as `pip install -e .` does
        site.addpackage(*each, None)
    _forget(imported)
    flow_runs.run_engine()


if __name__ == "__main__":
    main()
