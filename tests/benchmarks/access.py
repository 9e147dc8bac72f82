"""Measure what access control and the login by OIDC add to a request of the Prefect API.

    python -m tests.benchmarks.access --pairs 500     # or: make bench-access

Two servers on SQLite have the same content, one with access control and one without. The same requests go to both in
turn. Then the same requests go to one server in turn: by a person who has logged in through oauth2-proxy, and directly
with the operator's password. The table is printed and appended to results.md.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import httpx

from orchestration.operations.local_cluster import binaries
from tests.benchmarks.table import Figure, results_table
from tests.orchestration.access.guarded_server import CREDENTIALS, SERVER_CREDENTIAL, GuardedServer, guarded_server
from tests.orchestration.access.single_sign_on import HOST, SingleSignOn, read_cookies, single_sign_on
from tests.parts import client_of

WARM_UP_REQUESTS = 20

GOAL = "median at most 2"

Request = Callable[[httpx.Client, str], httpx.Response]
Caller = tuple[str, httpx.Client, str]
"""What the caller is called in the table, its client, and the flow run that it reads and writes."""

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


def compare(first: Caller, second: Caller, pairs: int) -> list[Figure]:
    """Return the times of each request of two callers in turn, and the difference of each pair, in ms."""
    figures = []
    for name, request in REQUESTS.items():
        times: dict[str, list[float]] = {first[0]: [], second[0]: []}
        for _ in range(WARM_UP_REQUESTS + pairs):
            for caller, client, run in (first, second):
                times[caller].append(1000 * _seconds(request, client, run))
        measured = {caller: found[WARM_UP_REQUESTS:] for caller, found in times.items()}
        added = [slow - fast for slow, fast in zip(*measured.values(), strict=True)]
        figures += [Figure(f"{name}, {caller}", "ms", found) for caller, found in measured.items()]
        figures.append(Figure(f"{name}, {first[0]}: difference of a pair", "ms", added, GOAL))
    return figures


def measure_control(pairs: int) -> list[Figure]:
    """Return what access control adds to each request."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        guarded = enter(guarded_server(Path(enter(tempfile.TemporaryDirectory()))))
        plain = enter(guarded_server(Path(enter(tempfile.TemporaryDirectory())), command="prefect"))
        guarded_run, plain_run = _create_run(guarded), _create_run(plain)
        guarded_client = enter(guarded.run_client(guarded_run))
        plain_client = enter(plain.client(SERVER_CREDENTIAL))
        return compare(
            ("with access control", guarded_client, guarded_run), ("without", plain_client, plain_run), pairs
        )


def measure_login(guarded: GuardedServer, sign_on: SingleSignOn, pairs: int) -> list[Figure]:
    """Return what the way through oauth2-proxy adds to each request of an operator."""
    run = _create_run(guarded)
    # The transport of the browser copies each request. Both clients of a pair are of one kind instead.
    with (
        sign_on.session("olga") as browser,
        client_of(f"http://127.0.0.1:{sign_on.proxy.number}/api") as person,
        guarded.client(CREDENTIALS["operator"]) as machine,
    ):
        person.headers.update({"Cookie": read_cookies(browser), "Host": HOST})
        return compare(("logged in", person, run), ("direct with a password", machine, run), pairs)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure what access control and the login add.")
    parser.add_argument("--pairs", type=int, default=500, help="requests of each kind to each server")
    options = parser.parse_args()
    parts = f"Prefect {version('prefect')} on SQLite, oauth2-proxy {binaries.MODULES['oauth2-proxy'][1]}"
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        report = enter(results_table(f"{parts}, load {os.getloadavg()[0]:.1f} before"))
        report(measure_control(options.pairs))
        guarded = enter(guarded_server(Path(enter(tempfile.TemporaryDirectory()))))
        sign_on = enter(single_sign_on(Path(enter(tempfile.TemporaryDirectory())), guarded.url))
        report(measure_login(guarded, sign_on, options.pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
