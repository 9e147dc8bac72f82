"""Record what the benchmarks of load, upgrade and retention measure on an idle machine, and draw it: `make picture`."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.table import describe_commit

# matplotlib takes 0.6 s to import, in each process that collects the tests: only the functions that draw import it.
if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

LOAD, PGBOUNCER, UPGRADE, RETENTION = (
    Path(__file__).with_name(f"{name}.json") for name in ("load", "load-pgbouncer", "upgrade", "retention")
)
"""The newest results of an idle machine. A file exists once its benchmark has run on one."""

PICTURES = {
    LOAD: "load.svg",
    PGBOUNCER: "load-pgbouncer.svg",
    UPGRADE: "upgrade.svg",
    RETENTION: "retention.svg",
}
"""The name of the picture of each file of results."""

PAGE_GOAL_MS = 1000
"""The goal for the p95 of each page of the UI."""

IDLE_LOAD = 0.5
"""The highest load average for each core, before the benchmark, of a machine that counts as idle."""

COLOURS = ("#1b6ca8", "#e07b00", "#3c8d2f")

Record = dict[str, Any]


def record(file: Path, figures: Record, load_before: float) -> None:
    """Write the figures of a full benchmark to a file of results, unless other programs used the machine before it.

    Args:
        file: a key of `PICTURES`.
        figures: what the picture shows.
        load_before: the load average of the machine before the benchmark.
    """
    cores = os.cpu_count() or 1
    if load_before > IDLE_LOAD * cores:
        limit = f"at most {IDLE_LOAD * cores:g} on {cores} cores"
        print(f"Not recorded for the picture: the load before was {load_before:.1f}, {limit}.", file=sys.stderr)
        return
    machine = f"{platform.machine()} with {cores} cores"
    origin = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "commit": describe_commit(), "machine": machine}
    file.write_text(json.dumps(origin | figures, indent=1) + "\n")
    print(f"Recorded in {file}. Draw it: make picture, make docs", file=sys.stderr)


def draw_all(folder: Path) -> None:
    """Draw the picture of each file of results that exists into a folder."""
    drawn = ((LOAD, draw_load), (PGBOUNCER, draw_load), (UPGRADE, draw_upgrade), (RETENTION, draw_retention))
    for file, draw in drawn:
        if file.exists():
            draw(json.loads(file.read_text()), folder / PICTURES[file])


def draw_load(found: Record, file: Path) -> None:
    """Draw requests per second, runs per minute and the duration of a request by the number of clients.

    A ring marks each knee.
    """
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(9, 3.6), layout="constrained")
    rates, times = picture.subplots(1, 2)
    for colour, (replicas, curve) in zip(COLOURS, found["replicas"].items(), strict=False):
        points = curve["points"]
        clients = [point["clients"] for point in points]
        label = f"{replicas} API replica{'s' * (replicas != '1')}"
        knee = knee_of(curve)
        knees = f"{label}: {knee['runs_per_minute']:.0f} runs/min"
        rates.plot(clients, [point["requests_per_second"] for point in points], "o-", color=colour, label=knees)
        rates.plot(knee["clients"], knee["requests_per_second"], "o", ms=12, mfc="none", color=colour)
        for name, line in (("p50", "o-"), ("p99", "o--")):
            times.plot(clients, [point[f"{name}_ms"] for point in points], line, color=colour, label=f"{label}, {name}")
    rates.set(xlabel="clients, each with one run after the other", ylabel="requests per second")
    rates.margins(y=0.1)
    rates.set_ylim(0, None)
    by_minute = 60 / found["requests_of_a_run"]
    minutes = rates.secondary_yaxis("right", functions=(lambda rate: rate * by_minute, lambda runs: runs / by_minute))
    minutes.set_ylabel("runs per minute")
    times.set(xlabel="clients", ylabel="ms for a request", yscale="log")
    times.spines["right"].set_visible(False)
    for axes in (rates, times):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.spines["top"].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    _save(picture, file)


def draw_upgrade(found: Record, file: Path) -> None:
    """Draw the seconds of each migration and index, and the longest lock that each of them held."""
    from matplotlib.figure import Figure as Picture

    steps = found["steps"]
    picture = Picture(figsize=(9, 0.7 * len(steps) + 1.2), layout="constrained")
    axes = picture.subplots()
    places = [*range(len(steps))][::-1]
    for shift, key, colour, label in (
        (0.2, "seconds", COLOURS[0], "duration"),
        (-0.2, "lock_seconds", COLOURS[1], "longest lock that blocks writes or reads"),
    ):
        values = [step[key] for step in steps]
        axes.barh([place + shift for place in places], values, height=0.36, color=colour, label=label)
        for place, value in zip(places, values, strict=True):
            axes.annotate(
                f"{value:.2f} s", (value, place + shift), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set(xlabel="seconds", yticks=places, yticklabels=[step["name"] for step in steps])
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _save(picture, file)


def draw_retention(found: Record, file: Path) -> None:
    """Draw the p95 of each page, and the size of the tables, by the number of runs in the history."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(9, 3.9), layout="constrained")
    times, sizes = picture.subplots(1, 2, width_ratios=(3, 2))
    runs = [size["runs"] for size in found["sizes"]]
    for number, page in enumerate(found["sizes"][-1]["pages"]):
        values = [size["pages"][number]["p95_ms"] for size in found["sizes"]]
        times.plot(runs, values, "o-", ms=4, label=f"{page['name']}: {values[-1]:,} ms")
    times.axhline(PAGE_GOAL_MS, color="grey", ls=":", label=f"goal: {PAGE_GOAL_MS:,} ms")
    times.set(xlabel="flow runs in the database", ylabel="ms until the page has its content, p95", yscale="log")
    times.yaxis.set_major_formatter("{x:,.0f}")
    times.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    sizes.plot(runs, [size["megabytes"] / 1000 for size in found["sizes"]], "o-", color=COLOURS[0])
    sizes.set(xlabel="flow runs in the database", ylabel="GB of the tables with their indexes", yscale="log")
    sizes.yaxis.set_major_formatter("{x:,g}")
    for axes in (times, sizes):
        axes.set_xscale("log")
        axes.set_xticks(runs, [f"{count:,}" for count in runs])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    _save(picture, file)


def load_table(found: Record) -> list[list[str]]:
    """Return a row for each number of API replicas: the knee, and the durations of requests there."""
    rows = []
    for replicas, curve in found["replicas"].items():
        knee = knee_of(curve)
        rates = [f"{knee['runs_per_minute']:.0f}", f"{knee['requests_per_second']:.0f}", f"{knee['clients']:.0f}"]
        rows.append([replicas, *rates, f"{knee['p50_ms']:,.0f}", f"{knee['p99_ms']:,.0f}"])
    return rows


def phases_table(found: Record) -> list[list[str]]:
    """Return a row for each figure of the phases after the knees, in the order of the measurement."""
    rows = []
    for figure in found["phases"]:
        # A single value is its median.
        shown = [figure[name] for name in ("median", "p99", "max")][: 1 if figure["n"] == 1 else None]
        cells = [f"{value:,.{0 if value >= 1000 or value == int(value) else 2}f}" for value in shown]
        cells += [""] * (3 - len(cells))
        rows.append([figure["name"], figure["unit"], f"{figure['n']:,}", *cells, figure["note"]])
    return rows


def upgrade_table(found: Record) -> list[list[str]]:
    """Return a row for each migration: seconds, and seconds of its longest lock that blocks writes or reads."""
    return [[step["name"], f"{step['seconds']:.2f}", f"{step['lock_seconds']:.2f}"] for step in found["steps"]]


def retention_table(found: Record) -> list[list[str]]:
    """Return a row for each page: its p95 in ms at each size of the history, complete, and of its slowest request."""
    rows = []
    for number, page in enumerate(found["sizes"][-1]["pages"]):
        growth = " → ".join(f"{size['pages'][number]['p95_ms']:,}" for size in found["sizes"])
        slowest = ""
        if "slowest_request" in page:
            slowest = f"{page['slowest_request_p95_ms']:,}: `{page['slowest_request']}`"
        rows.append([page["name"], growth, f"{page['p50_ms']:,}", f"{page['complete_p95_ms']:,}", slowest])
    return rows


def deletion_table(found: Record) -> list[list[str]]:
    """Return a row for each kind of record: how many were old, how many of them were deleted, and how fast."""
    return [
        [kind["name"], f"{kind['old']:,}", f"{kind['deleted']:,}", f"{kind['per_second']:,}"]
        for kind in found["deletions"]
    ]


def _save(picture: "Picture", file: Path) -> None:
    import matplotlib as mpl

    # Text as text, and no random ids: the picture changes only with its figures.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": file.stem}):
        picture.savefig(file, metadata={"Date": None})


def knee_of(curve: Record) -> dict[str, float]:
    """Return the point of a curve's knee."""
    return next(point for point in curve["points"] if point["clients"] == curve["knee_clients"])
