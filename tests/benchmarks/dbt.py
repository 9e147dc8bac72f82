"""Compare a dbt project in a flow with dbt's command line, in alternating pairs.

    python -m tests.benchmarks.dbt --pairs 7         # or: make bench-dbt

Whole processes are timed from exec to exit. dbt has parsed the project before; Postgres and the Prefect server are up.
The table is printed and appended to results.md.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from orchestration import warehouse
from tests.benchmarks.processes import BIN, measure_seconds, time_command
from tests.benchmarks.table import Figure, results_table
from tests.orchestration.dbt.projects import fast
from tests.parts import embedded_postgres, new_database, prefect_server

SIZES = {20: ("", "at most 2.5"), 300: ("at most 1.15", ""), 1000: ("at most 1.10", "")}
"""The projects by their number of nodes, and the flow's goals: its time as a multiple of the command line's, and the
seconds that it may take longer. An empty text is no goal."""

LOG_LINES = 100_000
"""The lines that a model of the project with much log writes."""

FLOW = """
import resource
import sys
from orchestration import warehouse
from orchestration.dbt import DbtProject

project = DbtProject(sys.argv[1], environment=warehouse.environment, artifacts=sys.argv[1] + ".kept")
project.warm()

from prefect import flow

@flow
def daily():
    project.build()

daily()
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def _project_with_many_log_lines(folder: Path) -> Path:
    """Write the smallest project with a model that logs `LOG_LINES` lines, and return its folder."""
    project = fast(folder, 20)
    model = project / "models" / "amber_0.sql"
    line = "{% do log('line ' ~ i, info=true) %}"
    loop = f"{{% if execute %}}{{% for i in range({LOG_LINES}) %}}{line}{{% endfor %}}{{% endif %}}"
    model.write_text(f"{model.read_text()}\n{loop}\n")
    return project


def _seconds_of_nodes(target: Path) -> float:
    """Return the seconds from the first node's start to the last node's end, as dbt wrote them."""
    results = json.loads((target / "run_results.json").read_text())["results"]
    times = [
        datetime.fromisoformat(timing[key])
        for result in results
        for timing in result["timing"]
        for key in ("started_at", "completed_at")
    ]
    return (max(times) - min(times)).total_seconds()


def compare_with_command_line(
    postgres: str, server: str, project: Path, name: str, goals: tuple[str, str], pairs: int
) -> list[Figure]:
    """Build a project in a flow and by `dbt build`, in alternating pairs.

    Args:
        postgres: URL of the Postgres server.
        server: URL of the Prefect API.
        project: the folder of the dbt project.
        name: the project's name in the table.
        goals: the flow's goals, as in `SIZES`.
        pairs: number of pairs.
    """
    ours: list[float] = []
    dbts: list[float] = []
    peaks: list[float] = []
    our_spans: list[float] = []
    dbts_spans: list[float] = []
    unsent = 0
    with new_database(postgres) as url, tempfile.TemporaryDirectory() as folder:
        flow = [sys.executable, "-c", FLOW, str(project)]
        dbt = [
            *(str(BIN / "dbt"), "build", "--target-path", f"{folder}/target", "--log-path", folder),
            *("--project-dir", str(project), "--profiles-dir", str(project)),
        ]
        environment = {"WAREHOUSE_URL": url, "PREFECT_API_URL": server}
        time_command(flow, environment)  # the first builds parse the project
        time_command(dbt, warehouse.environment())
        for _ in range(pairs):
            seconds, output = time_command(flow, environment)
            ours.append(seconds)
            our_spans.append(_seconds_of_nodes(project / "target"))
            dbts.append(measure_seconds(dbt, warehouse.environment()))
            dbts_spans.append(_seconds_of_nodes(Path(folder) / "target"))
            peaks.append(float(re.findall(r"^peak (.+)$", output, re.MULTILINE)[0]))
            unsent += sum(int(number) for number in re.findall(r"did not take \d+ events and (\d+) lines", output))
    both = list(zip(ours, dbts, strict=True))
    figures = [
        Figure(f"{name} in a flow", "s", ours),
        Figure(f"{name} by `dbt build`", "s", dbts),
        Figure("the flow against that, pair by pair", "times", [a / b for a, b in both], goals[0]),
        Figure("the flow less that, pair by pair", "s", [a - b for a, b in both], goals[1]),
        Figure("first node's start to last node's end, in the flow", "s", our_spans),
        Figure("the same by `dbt build`", "s", dbts_spans),
        Figure("peak memory of the flow's process, without dbt's", "MB", peaks, "at most 250"),
    ]
    if unsent:
        figures.append(Figure("log lines that were counted and not sent, per run", "lines", [unsent / pairs]))
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure dbt in a flow, and return the exit status."""
    parser = argparse.ArgumentParser(description="Measure dbt in a flow.")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="numbers of nodes of the projects")
    parser.add_argument("--line-pairs", type=int, default=3, help="pairs of the project with much log; 0 for none")
    options = parser.parse_args(arguments)
    with (
        results_table("embedded PostgreSQL 18, Prefect's server on SQLite") as report,
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as home,
        tempfile.TemporaryDirectory() as own_home,
        embedded_postgres(Path(folder) / "postgres") as postgres,
        prefect_server(Path(home)) as server,
    ):
        os.environ |= {"PREFECT_HOME": own_home, "DO_NOT_TRACK": "1"}
        projects = [
            (fast(Path(folder) / f"fast{nodes}", nodes), f"{nodes:,} nodes", SIZES.get(nodes, ("", "")), options.pairs)
            for nodes in options.sizes
        ]
        if options.line_pairs:
            name = f"20 nodes, {LOG_LINES:,} lines of log,"
            projects.append(
                (_project_with_many_log_lines(Path(folder) / "much-log"), name, ("", ""), options.line_pairs)
            )
        for project, name, goals, pairs in projects:
            report(compare_with_command_line(postgres, server, project, name, goals, pairs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
