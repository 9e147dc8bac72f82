"""Measure the time from a run's container to the first line of user code, and its processor seconds, without a cluster.

    python -m tests.benchmarks.starts --pairs 15     # or: make bench-starts

On one Prefect server, in alternation and one at a time:

- the floor: a process that imports the modules of Prefect's engine, without any server;
- runs of the flows in `CASES`, executed by the container's command in a folder that the deployment names;
- with `--before CHECKOUT`: the same runs with the code of another checkout.

A start is timed from exec of the supervisor. The processor seconds are those of supervisor and engine. The table is
printed and appended to results.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
from prefect.filesystems import RemoteFileSystem
from prefect.settings import PREFECT_API_URL, temporary_settings

from orchestration.settings import ROOT
from tests.benchmarks.table import Figure, results_table
from tests.parts import asked, client_of, prefect_server

FLOW = """\
import os, time
from pathlib import Path
{imports}
from prefect import flow

@flow
def first_line():
    now = time.monotonic()
    # The clock of another process's processor time, as of clock_getcpuclockid(3).
    supervisor = time.clock_gettime((~os.getppid() << 3) | 2)
    Path(os.environ["FIRST_LINE"]).write_text(f"{{now}} {{time.process_time() + supervisor}}")
"""

FLOOR = "a process that imports Prefect's engine"
FLOOR_CODE = """\
import os, time
import prefect.engine, prefect.flow_engine
from pathlib import Path
Path(os.environ["FIRST_LINE"]).write_text(f"{time.monotonic()} {time.process_time()}")
"""

BLOCK = "bench"


class Case(NamedTuple):
    """What the file of a flow imports, and variables of its run."""

    name: str
    imports: str = ""
    variables: Mapping[str, str] = {}


CASES = (
    Case("an empty flow"),
    Case("a flow with the example's imports", imports="import flows.example_flow"),
    # As the chart sets it for results in S3 or Redis.
    Case(
        "an empty flow with durable results",
        variables={"PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK": f"remote-file-system/{BLOCK}"},
    ),
)

OURS, BEFORE = "this project", "before"


class Start(NamedTuple):
    """The seconds from exec to the first line, and the processor seconds until then and until the end."""

    first_line: float
    processor: float
    processor_until_end: float


def measure_process(command: Sequence[str], variables: Mapping[str, str], folder: Path) -> Start:
    """Start a process that writes when its first line ran, wait until it ends, and return its figures.

    Raises:
        RuntimeError: the process failed.
    """
    with tempfile.TemporaryDirectory() as home:  # as in a new container
        note, log = Path(home, "first-line"), Path(home, "log")
        given = {"PREFECT_HOME": home, "TMPDIR": home, "FIRST_LINE": str(note), **variables}
        with log.open("w") as output:
            start = time.monotonic()
            process = subprocess.Popen(
                command, env=os.environ | given, cwd=folder, start_new_session=True, stdout=output, stderr=output
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not note.exists():
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()}")
        first_line, processor = map(float, note.read_text().split())
        return Start(first_line - start, processor, usage.ru_utime + usage.ru_stime)


def measure_run(api: httpx.Client, deployment: str, case: Case, checkout: Path) -> Start:
    """Execute a run as its container does, and return its figures.

    Raises:
        RuntimeError: the run failed.
    """
    path = f"/deployments/{deployment}/create_flow_run"
    run = asked(api, "POST", path, {"state": {"type": "SCHEDULED"}})["id"]
    claim = asked(api, "POST", f"/flow_runs/{run}/set_state", {"state": {"type": "PENDING"}})["state"]["id"]
    variables = {
        "PYTHONPATH": str(checkout),
        "PREFECT_API_URL": str(api.base_url).rstrip("/"),
        "PREFECT__FLOW_RUN_ID": run,
        "PREFECT_CLIENT_MAX_RETRIES": "19",  # as the work pool's chart sets it
        "KUBERNETES_JOB": f"job-{claim[-12:]}",
        "TERMINATION_MESSAGE_PATH": os.devnull,
        **case.variables,
    }
    execution = checkout / "orchestration/execution.py"
    command = [sys.executable, "-I", "-S", str(execution), "prefect", "flow-run", "execute"]
    found = measure_process(command, variables, checkout)
    state = asked(api, "GET", f"/flow_runs/{run}")["state"]
    if state["type"] != "COMPLETED":
        raise RuntimeError(f"Run {run} is {state['name']}: {state['message']}")
    return found


def create_deployment(api: httpx.Client, case: Case, folder: Path) -> str:
    """Write a case's flow into a folder, and return the id of its deployment."""
    (folder / "flow.py").write_text(FLOW.format(imports=case.imports))
    flow = asked(api, "POST", "/flows/", {"name": "first-line"})["id"]
    step = {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}
    body = {"name": case.name, "flow_id": flow, "entrypoint": "flow.py:first_line", "pull_steps": [step]}
    return str(asked(api, "POST", "/deployments/", body)["id"])


def measure(pairs: int, before: Path | None) -> dict[str, list[Start]]:
    """Return the figures of each start, by what started.

    Args:
        pairs: how many starts of each.
        before: another checkout, or None.
    """
    checkouts = {OURS: ROOT} | ({BEFORE: before} if before else {})
    with (
        tempfile.TemporaryDirectory() as home,
        tempfile.TemporaryDirectory() as folder,
        prefect_server(Path(home)) as url,
        client_of(url) as api,
    ):
        with temporary_settings({PREFECT_API_URL: url}):
            RemoteFileSystem(basepath="memory://results").save(BLOCK)
        starts: dict[str, Callable[[], Start]] = {
            FLOOR: lambda: measure_process([sys.executable, "-c", FLOOR_CODE], {}, Path(folder))
        }
        for number, case in enumerate(CASES):
            code = Path(folder, str(number))
            code.mkdir()
            deployment = create_deployment(api, case, code)
            for name, checkout in checkouts.items():
                starts[f"{case.name}, {name}"] = (
                    lambda made=deployment, case=case, checkout=checkout: measure_run(api, made, case, checkout)  # type: ignore[misc]
                )
        for start in starts.values():
            start()  # the first of each compiles modules
        found: dict[str, list[Start]] = {name: [] for name in starts}
        for number in range(pairs):
            for name in [*starts] if number % 2 else [*reversed(starts)]:
                found[name].append(starts[name]())
            latest = ", ".join(f"{name} {measured[-1].first_line:.2f} s" for name, measured in found.items())
            print(f"{number + 1} of {pairs}: {latest}", file=sys.stderr, flush=True)
        return found


def figures(found: dict[str, list[Start]]) -> list[Figure]:
    """Return the rows of the table: seconds and processor seconds of each, and seconds above the floor."""
    rows = []
    for name, starts in found.items():
        rows.append(Figure(f"{name}: exec to first line", "s", [start.first_line for start in starts]))
        if name != FLOOR:
            above = [start.first_line - floor.first_line for start, floor in zip(starts, found[FLOOR], strict=True)]
            rows.append(Figure(f"{name}: above the floor", "s", above, "at most 0.6"))
        rows.append(Figure(f"{name}: processor until the first line", "s", [start.processor for start in starts]))
        rows.append(Figure(f"{name}: processor until the end", "s", [start.processor_until_end for start in starts]))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure the time from a run's container to its first line.")
    parser.add_argument("--pairs", type=int, default=15, help="starts of each")
    parser.add_argument("--before", type=Path, help="another checkout, whose runs are measured as well")
    options = parser.parse_args(arguments)
    with results_table(f"SQLite, load {os.getloadavg()[0]:.1f} before") as report:
        report(figures(measure(options.pairs, options.before and options.before.resolve())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
