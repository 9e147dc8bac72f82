"""Measure the pipeline, each figure beside what it is compared with, in alternating pairs.

    python -m tests.benchmarks.run --pairs 7         # or: make bench

Whole processes are timed from exec to exit. The table is printed and appended to results.md.
"""

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from flows import backfill, landing, raw
from orchestration import warehouse
from orchestration.local.embedded_postgres import find_program
from orchestration.settings import ROOT
from tests.parts import answers, embedded_postgres, new_database, prefect_server

RESULTS = Path(__file__).with_name("results.md")
BIN = Path(sys.executable).parent
PROJECT = ROOT / "flows" / "warehouse"

EMPTY_FLOW = "from prefect import flow\n\n@flow\ndef empty():\n    pass\n\nempty()\n"


@dataclass(frozen=True)
class Figure:
    """A row of the table."""

    name: str
    unit: str
    values: list[float]
    note: str = ""

    def row(self) -> str:
        """The row as Markdown: n, median, min, max."""
        values = self.values
        digits = 0 if min(values) >= 1000 else 2
        shown = (statistics.median(values), min(values), max(values))
        figures = " | ".join(f"{value:,.{digits}f}" for value in shown)
        return f"| {self.name} | {self.unit} | {len(values)} | {figures} | {self.note} |"


def time_command(command: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT) -> tuple[float, str]:
    """Seconds that a command takes from exec to exit, and what it prints.

    Raises:
        RuntimeError: it fails.
    """
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds, done.stdout + done.stderr


def _seconds(command: Sequence[str], environment: Mapping[str, str], folder: Path = ROOT) -> float:
    return time_command(command, environment, folder)[0]


@dataclass
class Memory:
    """The highest proportional set size, in MB, of a process and its children."""

    flow: float = 0
    server: float = 0
    """Prefect's temporary server, where the run starts one."""
    together: float = 0


@contextlib.contextmanager
def _watch_memory(process: "subprocess.Popen[bytes]") -> Iterator[Memory]:
    memory, done = Memory(), threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            flow = server = 0.0
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(process.pid)
                for each in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.Error):
                        size = each.memory_full_info().pss / 2**20
                        if "orchestration.local.temporary_server" in each.cmdline():
                            server += size
                        else:
                            flow += size
            memory.flow = max(memory.flow, flow)
            memory.server = max(memory.server, server)
            memory.together = max(memory.together, flow + server)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield memory
    finally:
        done.set()
        watcher.join()


def measure_load(postgres: str, pairs: int) -> list[Figure]:
    """All five tables of the year: this project's load beside that of psql, from the same rows."""
    rows = sum(landing.extract(table, landing.days()).rows for table in landing.DAILY)
    rows += sum(landing.extract_all(table).rows for table in landing.REFERENCE)
    ours: list[float] = []
    psql: list[float] = []

    def load() -> None:
        days = landing.days()
        chunks = [days[start : start + backfill.CHUNK_DAYS] for start in range(0, len(days), backfill.CHUNK_DAYS)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(raw.load_reference, landing.REFERENCE))
            list(pool.map(raw.load_days, chunks))

    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "copy.sql"
        lines = []
        for table in (*landing.DAILY, *landing.REFERENCE):
            extract = landing.extract(table, landing.days()) if table in landing.DAILY else landing.extract_all(table)
            (Path(folder) / f"{table}.csv").write_bytes(extract.csv)
            lines.append(
                f"\\copy raw.{table} ({', '.join(extract.columns)}) from '{folder}/{table}.csv' (format csv, null 'NA')"
            )
        script.write_text("\n".join(lines))
        for _ in range(pairs):
            for seconds, act in (
                (ours, load),
                (psql, lambda: _seconds([find_program("psql"), "-qf", str(script)], warehouse.environment())),
            ):
                with new_database(postgres):
                    raw.prepare()
                    landing.release()  # unpacking the archive is part of the load
                    start = time.perf_counter()
                    act()
                    seconds.append(time.perf_counter() - start)
    return [
        Figure("load the year, five tables", "rows/s", [rows / s for s in ours], f"{rows:,} rows"),
        Figure("the same by psql's \\copy, one after the other", "rows/s", [rows / s for s in psql], "unpacked before"),
    ]


def measure_one_day(postgres: str, pairs: int, server: str | None) -> list[Figure]:
    """A warm run of one day beside an empty flow and `dbt build` alone."""
    with_server = "with a server that stays up" if server else "with Prefect's temporary server"
    api = {"PREFECT_API_URL": server} if server else {}
    runs: list[float] = []
    empties: list[float] = []
    dbts: list[float] = []
    over: list[float] = []
    flow_memory: list[float] = []
    all_memory: list[float] = []
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, new_database(postgres) as url:
        empty = Path(folder) / "empty.py"
        empty.write_text(EMPTY_FLOW)
        environment = {"WAREHOUSE_URL": url, **api}
        dbt = [
            *(str(BIN / "dbt"), "build", "--exclude-resource-type", "unit_test", "--target-path", f"{folder}/target"),
            *("--log-path", folder, "--project-dir", str(PROJECT), "--profiles-dir", str(PROJECT)),
        ]
        run = [sys.executable, "flows/example_flow.py"]
        _seconds(run, environment)  # the first day is not warm
        _seconds(run, environment)
        _seconds(dbt, warehouse.environment())
        for _ in range(pairs):
            runs.append(_seconds(run, environment))
            # Outside the checkout, whose settings name a server: Prefect's own default is a temporary one.
            empties.append(_seconds([sys.executable, str(empty)], api, Path(folder)))
            # The same work: the day that was built last is due again.
            newest = (
                "update raw.loads set load_id = nextval('raw.load_ids') where day = (select max(day) from raw.loads)"
            )
            with warehouse.connect() as connection:
                connection.execute(newest)
            dbts.append(_seconds(dbt, warehouse.environment()))
            over.append(runs[-1] - empties[-1] - dbts[-1])
            if server:
                for part, seconds in _read_parts_of_newest_run(server).items():
                    parts.setdefault(part, []).append(seconds)
        for _ in range(pairs):
            process = subprocess.Popen(
                run, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            with _watch_memory(process) as memory:
                process.wait()
            flow_memory.append(memory.flow)
            all_memory.append(memory.together)
    figures = [
        Figure(f"`make run` of one day, warm, {with_server}", "s", runs),
        Figure(f"an empty Prefect flow, {with_server}", "s", empties),
        Figure("`dbt build` of the same day", "s", dbts),
        Figure("the run less both, pair by pair", "s", over, "at most 2"),
        Figure("peak memory of the run: flow and dbt", "MB", flow_memory, "proportional set size"),
    ]
    if server:
        figures += [Figure(f"of the run: {part}", "s", seconds) for part, seconds in parts.items()]
    else:
        figures.append(Figure("peak memory with Prefect's temporary server", "MB", all_memory, "at most 500"))
    return figures


def _read_parts_of_newest_run(api: str) -> dict[str, float]:
    """Where the newest run's time went, as its server and its report say."""

    def newest(flow: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = httpx.post(
            f"{api}/flow_runs/filter",
            json={"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 1},
        ).json()
        return found[0]

    steps = newest("report")["parameters"]["steps"]
    seconds = {flow: float(newest(flow)["total_run_time"]) for flow in ("ingest", "transform", "report")}
    loads = [step["seconds"] for step in steps if step["kind"] == "load"]
    return {
        "extract": sum(step["seconds"] for step in steps if step["kind"] == "extract"),
        "load, the longest of those at once": max(loads),
        "ingest, with Prefect's tasks": seconds["ingest"],
        "transform: dbt": seconds["transform"],
        "report": seconds["report"],
    }


def measure_imports(pairs: int) -> list[Figure]:
    """Python, Prefect and the flow's own imports."""

    def measure(code: str) -> float:
        return _seconds([sys.executable, "-c", code], {})

    prefect: list[float] = []
    flow: list[float] = []
    for _ in range(pairs):
        prefect.append(measure("import prefect.flows, prefect.tasks"))
        flow.append(measure("import flows.example_flow"))
    return [
        Figure("import Prefect, whole process", "s", prefect),
        Figure("import the flow and Prefect, whole process", "s", flow),
    ]


def measure_backfill(postgres: str, server: str, pairs: int) -> list[Figure]:
    """The backfill of the year beside one warm day, times 365."""
    years: list[float] = []
    days: list[float] = []
    for _ in range(pairs):
        with new_database(postgres) as url:
            environment = {"WAREHOUSE_URL": url, "PREFECT_API_URL": server}
            years.append(_seconds([sys.executable, "flows/backfill.py"], environment))
        with new_database(postgres) as url:
            environment = {"WAREHOUSE_URL": url, "PREFECT_API_URL": server}
            _seconds([sys.executable, "flows/example_flow.py"], environment)
            days.append(_seconds([sys.executable, "flows/example_flow.py"], environment))
    factor = [365 * day / year for day, year in zip(days, years, strict=True)]
    return [
        Figure("backfill of the year, 365 days", "s", years, "with a server that stays up"),
        Figure("one warm day", "s", days),
        Figure("365 such days against the backfill", "times", factor, "365 x one day, not run; at least 20"),
    ]


def describe_commit() -> str:
    """The commit that is measured."""
    described = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


@contextlib.contextmanager
def results_table(parts: str) -> Iterator[Callable[[Iterable[Figure]], None]]:
    """What figures of a table are given to: each is printed as soon as it is measured; at the end, also an early
    one, all are appended to the results.
    """
    rows = [_heading(parts)]
    print(rows[0], flush=True)

    def report(figures: Iterable[Figure]) -> None:
        for figure in figures:
            rows.append(figure.row())
            print(rows[-1], flush=True)

    try:
        yield report
    finally:
        if len(rows) > 1:
            with RESULTS.open("a") as results:
                results.write("\n".join(rows) + "\n")


def _heading(parts: str) -> str:
    """The beginning of a table in the results: when, what, on which machine, with which parts."""
    return (
        f"\n## {datetime.now(UTC):%Y-%m-%d}, {describe_commit()}\n\n{platform.machine()}, {os.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / 2**30:.0f} GB, Python {platform.python_version()}, {parts}.\n\n"
        "| what | unit | n | median | min | max | |\n|---|---|---:|---:|---:|---:|---|"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and append it to the results."""
    parser = argparse.ArgumentParser(description="Measure the pipeline.")
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args(arguments)
    if answers("http://127.0.0.1:4200/api/health"):
        parser.error("a Prefect server is up on port 4200, so that a run would not start a temporary one; stop it")
    with (
        results_table("embedded PostgreSQL 18") as report,
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as home,
        tempfile.TemporaryDirectory() as own_home,
        embedded_postgres(Path(folder)) as postgres,
    ):
        os.environ |= {
            "PREFECT_HOME": own_home,
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "DO_NOT_TRACK": "1",
        }
        pairs = options.pairs
        report(measure_load(postgres, pairs))
        report(measure_imports(pairs))
        report(measure_one_day(postgres, pairs, None))
        with prefect_server(Path(home)) as server:
            report(measure_one_day(postgres, pairs, server))
            report(measure_backfill(postgres, server, pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
