"""Measure the pipeline, and next to each figure what it is compared with, in alternating pairs.

    python -m tests.benchmarks.run --pairs 7         # or: make bench

Whole processes are timed from exec to exit. The table is printed and appended to results.md.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from flows import backfill, landing, raw
from orchestration import warehouse
from orchestration.local.embedded_postgres import find_program
from orchestration.settings import ROOT
from tests.benchmarks.processes import BIN, measure_seconds, watch_memory
from tests.benchmarks.table import Figure, results_table
from tests.parts import answers, embedded_postgres, new_database, prefect_server

PROJECT = ROOT / "flows" / "warehouse"

EMPTY_FLOW = "from prefect import flow\n\n@flow\ndef empty():\n    pass\n\nempty()\n"


def measure_load(postgres: str, pairs: int) -> list[Figure]:
    """Load all five tables of the year by this project and by psql, from the same rows."""
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
                (psql, lambda: measure_seconds([find_program("psql"), "-qf", str(script)], warehouse.environment())),
            ):
                with new_database(postgres):
                    raw.prepare()
                    landing.release()  # so that each load unpacks the archive
                    start = time.perf_counter()
                    act()
                    seconds.append(time.perf_counter() - start)
    return [
        Figure("load the year, five tables", "rows/s", [rows / s for s in ours], f"{rows:,} rows"),
        Figure("the same by psql's \\copy, one after the other", "rows/s", [rows / s for s in psql], "unpacked before"),
    ]


def measure_one_day(postgres: str, pairs: int, server: str | None) -> list[Figure]:
    """Time a warm run of one day, an empty flow, and `dbt build` alone.

    Args:
        postgres: URL of the Postgres server.
        pairs: number of repetitions.
        server: URL of the Prefect API; None for Prefect's temporary server.
    """
    with_server = "with a server that stays up" if server else "with Prefect's temporary server"
    api = {"PREFECT_API_URL": server} if server else {}
    runs: list[float] = []
    empties: list[float] = []
    dbts: list[float] = []
    overheads: list[float] = []
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
        measure_seconds(run, environment)  # the first run is not warm
        measure_seconds(run, environment)
        measure_seconds(dbt, warehouse.environment())
        for _ in range(pairs):
            runs.append(measure_seconds(run, environment))
            # Outside the checkout, whose settings name a server. By default Prefect starts a temporary one.
            empties.append(measure_seconds([sys.executable, str(empty)], api, Path(folder)))
            # Make the day that was built last due again, so that dbt has the same work.
            newest = (
                "update raw.loads set load_id = nextval('raw.load_ids') where day = (select max(day) from raw.loads)"
            )
            with warehouse.connect() as connection:
                connection.execute(newest)
            dbts.append(measure_seconds(dbt, warehouse.environment()))
            overheads.append(runs[-1] - empties[-1] - dbts[-1])
            if server:
                for part, seconds in _read_parts_of_newest_run(server).items():
                    parts.setdefault(part, []).append(seconds)
        for _ in range(pairs):
            process = subprocess.Popen(
                run, cwd=ROOT, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            with watch_memory(process) as memory:
                process.wait()
            flow_memory.append(memory.flow)
            all_memory.append(memory.together)
    figures = [
        Figure(f"`make run` of one day, warm, {with_server}", "s", runs),
        Figure(f"an empty Prefect flow, {with_server}", "s", empties),
        Figure("`dbt build` of the same day", "s", dbts),
        Figure("the run less both, pair by pair", "s", overheads, "at most 2"),
        Figure("peak memory of the run: flow and dbt", "MB", flow_memory, "proportional set size"),
    ]
    if server:
        figures += [Figure(f"of the run: {part}", "s", seconds) for part, seconds in parts.items()]
    else:
        figures.append(Figure("peak memory with Prefect's temporary server", "MB", all_memory, "at most 500"))
    return figures


def _read_parts_of_newest_run(api: str) -> dict[str, float]:
    """Return the seconds of the parts of the newest run, from its server and from its report."""

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
        "load, the longest of those in parallel": max(loads),
        "ingest, with Prefect's tasks": seconds["ingest"],
        "transform: dbt": seconds["transform"],
        "report": seconds["report"],
    }


def measure_imports(pairs: int) -> list[Figure]:
    """Time the imports of Prefect, and of the flow with Prefect, as whole processes."""

    def measure(code: str) -> float:
        return measure_seconds([sys.executable, "-c", code], {})

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
    """Time the backfill of the year, and one warm day times 365."""
    years: list[float] = []
    days: list[float] = []
    for _ in range(pairs):
        with new_database(postgres) as url:
            environment = {"WAREHOUSE_URL": url, "PREFECT_API_URL": server}
            years.append(measure_seconds([sys.executable, "flows/backfill.py"], environment))
        with new_database(postgres) as url:
            environment = {"WAREHOUSE_URL": url, "PREFECT_API_URL": server}
            measure_seconds([sys.executable, "flows/example_flow.py"], environment)
            days.append(measure_seconds([sys.executable, "flows/example_flow.py"], environment))
    factor = [365 * day / year for day, year in zip(days, years, strict=True)]
    return [
        Figure("backfill of the year, 365 days", "s", years, "with a server that stays up"),
        Figure("one warm day", "s", days),
        Figure("365 such days against the backfill", "times", factor, "365 x one day, not run; at least 20"),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the pipeline, and return the exit status."""
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
