"""Run one dbt command in this process.

Three methods of dbt are wrapped, all there since dbt 1.5:

- `GraphRunnableTask._runtime_initialize` selects the nodes. dbt's events do not list them.
- `BaseRunner.safe_run` runs a node. dbt's events cannot make dbt run a node again.
- `ManifestLoader.build_manifest_state_check` decides whether an earlier parse still holds.

Of dbt's other private interfaces, `batches` uses what dbt's own retry sets, `RunTask.batch_map` and
`original_invocation_started_at`, and the attributes of `MicrobatchBatchRunner`. `selection` reads
`GraphRunnableTask._raise_next_tick`, which is set while dbt stops at a failed node.
"""

import gc
import json
import os
import signal
import sys
import threading
from typing import Any

from .parse_check import check_parse
from .reporter import Reporter

INTERRUPT_TIMEOUT_SECONDS = 2.5
"""How long dbt may take to cancel its SQL after an interrupt."""


def main(arguments: list[str]) -> None:
    """Run the arguments as dbt's command line does; without arguments run the command that stdin brings."""
    stdout = os.fdopen(os.dup(1), "w", buffering=1)
    if not arguments:
        os.dup2(2, 1)  # what dbt's macros print must not mix with the events

    from dbt.cli.main import dbtRunner
    from dbt.parser.manifest import ManifestLoader
    from dbt.task.base import BaseRunner
    from dbt.task.runnable import GraphRunnableTask

    state_check = ManifestLoader.build_manifest_state_check
    ManifestLoader.build_manifest_state_check = lambda loader: check_parse(state_check, loader)
    if arguments:
        sys.exit(not dbtRunner().invoke(arguments).success)

    # The imported modules stay, so the garbage collector need not look at them again and again.
    gc.freeze()
    line = sys.stdin.readline()
    if not line:
        return
    command = json.loads(line)
    os.environ.update(command["environment"])
    reporter = Reporter(command, stdout)

    def interrupt(*_: Any) -> None:
        # dbt hangs on SIGTERM. On the first SIGINT it cancels its SQL, which a second one would disturb.
        if not reporter.interrupted.is_set():
            reporter.interrupted.set()
            # In a thread, because the main thread may hold the reporter's lock when the signal arrives.
            threading.Thread(target=reporter.send, args=["interrupted"], daemon=True).start()
            end = threading.Timer(INTERRUPT_TIMEOUT_SECONDS, os._exit, [1])
            end.daemon = True
            end.start()
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=_interrupt_when_stdin_closes, daemon=True).start()

    initialize, safe_run = GraphRunnableTask._runtime_initialize, BaseRunner.safe_run

    def initialize_and_report(task: Any) -> None:
        initialize(task)
        reporter.selected(task)

    GraphRunnableTask._runtime_initialize = initialize_and_report
    BaseRunner.safe_run = lambda runner, manifest: reporter.run(safe_run, runner, manifest)

    reporter.ended(dbtRunner(callbacks=[reporter.listen]).invoke(command["arguments"]))
    stdout.flush()
    # Everything is sent and dbt's files are closed; tearing the interpreter down takes 0.3 s.
    os._exit(0)


def _interrupt_when_stdin_closes() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGINT)
