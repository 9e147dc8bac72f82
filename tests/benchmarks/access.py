"""Measure what access control adds to a request of the Prefect API.

    python -m tests.benchmarks.access --pairs 500     # or: make bench-access

Two servers on SQLite have the same content, one with access control and one without. The same requests go to both in
turn. The table is printed and appended to results.md.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import httpx

from tests.benchmarks.table import Figure, results_table
from tests.orchestration.access.guarded_server import SERVER_CREDENTIAL, GuardedServer, guarded_server

WARM_UP_REQUESTS = 20

Request = Callable[[httpx.Client, str], httpx.Response]

REQUESTS: dict[str, Request] = {
    "read a flow run": lambda client, run: client.get(f"/flow_runs/{run}"),
    "write a label of a flow run": lambda client, run: client.patch(f"/flow_runs/{run}/labels", json={"a": "b"}),
    "write a log line": lambda client, run: client.post("/logs/", json=[_line(run)]),
}


def _line(run: str) -> dict[str, object]:
    return {"name": "n", "level": 20, "message": "m", "timestamp": "2026-01-01T00:00:00Z", "flow_run_id": run}


def _create_run(server: GuardedServer) -> str:
    with server.client(SERVER_CREDENTIAL) as client:
        flow = client.post("/flows/", json={"name": "measured"}).raise_for_status().json()["id"]
        return str(client.post("/flow_runs/", json={"flow_id": flow}).raise_for_status().json()["id"])


def _seconds(request: Request, client: httpx.Client, run: str) -> float:
    start = time.perf_counter()
    request(client, run).raise_for_status()
    return time.perf_counter() - start


def measure(pairs: int) -> list[Figure]:
    """Return the times of each request with and without access control, and the difference of each pair, in ms."""
    figures = []
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        guarded = enter(guarded_server(Path(enter(tempfile.TemporaryDirectory()))))
        plain = enter(guarded_server(Path(enter(tempfile.TemporaryDirectory())), command="prefect"))
        guarded_run, plain_run = _create_run(guarded), _create_run(plain)
        guarded_client = enter(guarded.run_client(guarded_run))
        plain_client = enter(plain.client(SERVER_CREDENTIAL))
        for name, request in REQUESTS.items():
            with_control: list[float] = []
            without_control: list[float] = []
            for _ in range(WARM_UP_REQUESTS + pairs):
                with_control.append(1000 * _seconds(request, guarded_client, guarded_run))
                without_control.append(1000 * _seconds(request, plain_client, plain_run))
            with_control, without_control = with_control[WARM_UP_REQUESTS:], without_control[WARM_UP_REQUESTS:]
            added = statistics.median(with_control) - statistics.median(without_control)
            figures += [
                Figure(f"{name}, with access control", "ms", with_control),
                Figure(f"{name}, without", "ms", without_control),
                Figure(f"{name}: difference of the medians", "ms", [added], "at most 2"),
            ]
    return figures


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure what access control adds to a request.")
    parser.add_argument("--pairs", type=int, default=500, help="requests of each kind to each server")
    options = parser.parse_args()
    with results_table(f"Prefect {version('prefect')} on SQLite") as report:
        report(measure(options.pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
