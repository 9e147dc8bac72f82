"""Execute a flow run in its container, in one process where `prefect flow-run execute` takes three.

Prefect's command fetches the flow's code in a second process and executes the flow in a third one. Each of them imports
Prefect: on a small machine that is half of the time to a run's first line. The engine calls the same parts of Prefect
3.9 in one process. `orchestration.runs.engine_start` starts the engine. Its parent is the supervisor,
`orchestration.runs.supervisor`.

A run that was submitted early waits here for its scheduled time, with all modules and the flow loaded.

Prefect's clients behave differently here in two ways:

- They retry from their first request on. Otherwise they retry a request without an answer only after they have had an
  answer, so that a wrong address fails at once. But a run makes clients while it runs, one for the slot of each task
  with tags, and a short outage of the API would fail such a task or run. The worker has used the same address, and
  `PREFECT_CLIENT_MAX_RETRIES` bounds the retries.
- The pause between retries is at most `LONGEST_RETRY_PAUSE_SECONDS`, give or take Prefect's jitter. Otherwise it
  doubles up to minutes in which the API may be back. Runs that had ended lost their pods before the end of their log
  was sent.
"""

import asyncio
import json
import os
import sys
import tempfile

from orchestration.prefect_compat import blocks, flow_runs
from orchestration.prefect_protocol import FLOW_RUN_ID_VARIABLE
from orchestration.protocol import LOG_LIMIT_VARIABLE, RESULTS_LIMIT_VARIABLE
from orchestration.runs import signed_results, workspace
from orchestration.runs.engine_process import GATE_VARIABLE
from orchestration.runs.lease_ledger import LeaseLedger
from orchestration.runs.log_limit import LogLimit
from orchestration.runs.server_clock import ServerClock

LONGEST_RETRY_PAUSE_SECONDS = 15.0

flow_runs.retry_first_requests()
flow_runs.bound_retry_pauses(lambda: LONGEST_RETRY_PAUSE_SECONDS)
flow_runs.share_certificates()


def _wait_to_begin() -> flow_runs.KnownRun | None:
    """Wait until the supervisor knows that the run still belongs to this Job.

    Returns:
        The run as the supervisor has read it. None without a supervisor, or if the API did not answer the supervisor.
    """
    if gate := os.environ.pop(GATE_VARIABLE, ""):
        with os.fdopen(int(gate), "rb") as opened:
            line = opened.readline()
        if not line.endswith(b"\n"):
            sys.exit(1)  # the supervisor has died
        read = json.loads(line)
        if environment := read.pop("environment"):
            os.environ.update(environment)
            flow_runs.reload_settings()
        if all(read.values()):
            return flow_runs.parse_known_run(**read)
    return None


def adapt_prefect(known: flow_runs.KnownRun | None = None) -> None:
    """Let Prefect's engine record leases, begin on time, import and ask little, and bound and sign what it stores."""
    flow_runs.observe_responses(LeaseLedger().observe)
    clock = ServerClock()
    flow_runs.observe_responses(clock.observe)
    flow_runs.hold_until_due(clock.now)
    blocks.look_up_before_import()
    flow_runs.keep_default_storage()
    flow_runs.check_version_once()
    if limit := os.environ.get(LOG_LIMIT_VARIABLE):
        flow_runs.limit_log_lines(LogLimit(limit).decide)
    if RESULTS_LIMIT_VARIABLE in os.environ:
        # Imported late: a run without a storage does not need the module. A signature counts as stored.
        from orchestration.runs import result_limit

        result_limit.enforce(known.flow_run if known else None)
    signed_results.require_signatures()


def main() -> None:
    """Execute the run that the environment names."""
    known = _wait_to_begin()
    adapt_prefect(known)
    # Nothing deletes the folder before the container is gone: at its exit this process still sends logs from there.
    folder = tempfile.mkdtemp(prefix="prefect-flow-run-")
    before = workspace.snapshot()
    prepared = asyncio.run(flow_runs.prepare_workspace(os.environ[FLOW_RUN_ID_VARIABLE], folder, known))
    workspace.enter(prepared, before)
    if known:
        flow_runs.use_known_run(known)
    flow_runs.run_engine()
