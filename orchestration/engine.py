"""What executes a flow run in its container: `prefect flow-run execute` in one process instead of three.

    PREFECT__FLOW_RUN_ID=... python -m orchestration.engine

Prefect's command fetches the flow's code in a second process, which becomes a third to execute it, and each imports
Prefect anew: on a small machine half of the time to a run's first line. Here the same parts of Prefect 3.8 do both in
this one; `orchestration.execution`, its parent, is to it what the command is to Prefect's.

Its clients ask again from their first request on. Prefect's repeat a request that finds nobody to talk to only once
they have had an answer, so that a wrong address fails at once. But a run makes clients as it goes, for the slot of each
task that has tags, and begins with one: where the API is away for a moment, such a task or run would fail. The address
was its worker's too, and `PREFECT_CLIENT_MAX_RETRIES` says when to give up.

They ask at least every `PAUSE` seconds or so. Prefect's wait twice as long each time, at last for minutes in which the
API may be back: a run that has ended had its pod taken away while the end of its log was still to be sent.
"""

import asyncio
import os
import runpy
import sys
import tempfile
import warnings

from prefect.client import base
from prefect.runner._workspace_resolver import PreparedWorkspace, prepare_workspace_for_flow_run
from prefect.runner._workspace_starter import workspace_environment
from prefect.utilities.math import clamped_poisson_interval

for client in (base.PrefectHttpxAsyncClient, base.PrefectHttpxSyncClient):
    # Set by each client for itself, to False at first.
    client._has_connected = property(lambda _: True, lambda *_: None)  # type: ignore[assignment]

PAUSE = 15.0
"""Seconds, give or take Prefect's jitter, from one request that nobody answered to the next, at the most."""


def _pause(average_interval: float, clamping_factor: float = 0.3) -> float:
    return clamped_poisson_interval(min(average_interval, PAUSE), clamping_factor)


base.clamped_poisson_interval = _pause  # type: ignore[attr-defined]


def _enter(workspace: PreparedWorkspace) -> None:
    """Be in the workspace as a process that is started in it."""
    os.environ.update(workspace_environment(workspace), PREFECT__FLOW_ENTRYPOINT=workspace.runtime_entrypoint)
    os.chdir(workspace.working_directory)
    paths = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = [*paths, *(each for each in sys.path if each not in paths)]


def main() -> None:
    """Execute the run that the environment names."""
    # It goes with the container: at its exit this process still sends logs from there.
    folder = tempfile.mkdtemp(prefix="prefect-flow-run-")
    _enter(asyncio.run(prepare_workspace_for_flow_run(os.environ["PREFECT__FLOW_RUN_ID"], folder)))
    # Prefect imports it too; to execute it anew is what its own command does.
    warnings.filterwarnings("ignore", "'prefect.engine' found in sys.modules", RuntimeWarning)
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
