"""Report on a run: what it loaded and built, how long that took, what failed and why."""

import base64
import importlib
import io
import sys
import textwrap
import threading
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any

from psycopg import sql

from orchestration import warehouse
from orchestration.errors import WarehouseError
from orchestration.settings import settings

if TYPE_CHECKING:
    from rich.console import RenderableType


_BAR_COLUMNS = 12
"""Width of the longest step's bar, in characters."""


@dataclass(frozen=True)
class Step:
    """One step of a run, with its outcome."""

    kind: str
    """extract, load, build or test."""
    name: str
    seconds: float
    rows: int | None = None
    """Rows that the step wrote."""
    cached: bool = False
    """An earlier run has done the step, and it is not needed again."""
    skipped: bool = False
    """The step did not run, because an earlier step failed."""
    failure: str | None = None
    """Why the step failed."""


@dataclass(frozen=True)
class Summary:
    """Holds the content of the report."""

    steps: list[Step]
    failure: str | None
    marts: dict[str, int] = field(default_factory=dict)
    """Rows by mart."""
    days: list[tuple[date, float]] = field(default_factory=list)
    """The newest 30 days, oldest first, with the share of flights that arrived on time, 0 to 1."""
    carriers: list[tuple[str, float]] = field(default_factory=list)
    """The carriers of the newest day with their share of flights on time, best first."""

    @property
    def headline(self) -> str:
        """The report in one line."""
        loaded = sum(step.rows or 0 for step in self.steps if step.kind == "load" and not step.cached)
        tests = [step for step in self.steps if step.kind == "test" and not step.skipped]
        passed = sum(1 for step in tests if not step.failure)
        built = sum(1 for step in self.steps if step.kind == "build" and not (step.failure or step.skipped))
        outcome = "Failed" if self.failure else "Completed"
        newest = f" to {self.days[-1][0]}" if self.days else ""
        if not self.steps:
            return f"The warehouse{newest}: {len(self.marts)} marts"
        return f"{outcome}{newest}: {loaded:,} rows loaded, {built} models built, {passed}/{len(tests)} tests passed"


def summarise(steps: list[Step], failure: str | None = None) -> Summary:
    """Return the content of the report: a run's steps, and rows and shares from the warehouse.

    After a failure the warehouse may be unreachable. Then the report has the steps alone.
    """
    try:
        return _summarise(steps, failure)
    except WarehouseError:
        if failure is None:
            raise
        return Summary(steps, failure)


def _summarise(steps: list[Step], failure: str | None) -> Summary:
    schema = settings().warehouse_schema
    with warehouse.explain_errors("Reading the marts"), warehouse.connect() as connection:
        names = connection.execute(
            "select table_name from information_schema.tables"
            " where table_schema = %s and table_type = 'BASE TABLE' order by table_name",
            [schema],
        ).fetchall()
        marts = {}
        for (name,) in names:
            query = sql.SQL("select count(*) from {}").format(sql.Identifier(schema, name))
            marts[name] = (connection.execute(query).fetchone() or (0,))[0]
        if "carrier_daily_punctuality" not in marts:
            return Summary(steps, failure, marts)
        table = sql.Identifier(schema, "carrier_daily_punctuality")
        share = sql.SQL("sum(arrived_on_time_share * flight_count) / sum(flight_count)")
        days = connection.execute(
            sql.SQL(
                "select flight_date, ({})::float from {} group by flight_date order by flight_date desc limit 30"
            ).format(share, table)
        ).fetchall()
        carriers = connection.execute(
            sql.SQL(
                "select carrier_name, arrived_on_time_share::float from {} "
                "where flight_date = (select max(flight_date) from {}) order by 2 desc, 1"
            ).format(table, table)
        ).fetchall()
    return Summary(steps, failure, marts, days[::-1], carriers)


def _outcome(step: Step) -> str:
    if step.failure:
        return "failed"
    if step.skipped:
        return "skipped"
    return "cached" if step.cached else "ok"


def _shown(summary: Summary) -> list[Step]:
    """Return the steps without the tests that passed."""
    return [step for step in summary.steps if step.kind != "test" or step.failure]


def _count(rows: int | None) -> str:
    return "" if rows is None else f"{rows:,}"


def markdown(summary: Summary) -> str:
    """Return the report as Markdown, for Prefect's artifact."""
    lines = [f"**{summary.headline}**", ""]
    if summary.failure:
        lines += [f"> {summary.failure}", ""]
    if summary.steps:
        lines += ["| step | what | rows written | rows in it | seconds | outcome |", "|---|---|---:|---:|---:|---|"]
        lines += [
            f"| {step.kind} | `{step.name}` | {_count(step.rows)} | {_count(summary.marts.get(step.name))} "
            f"| {step.seconds:.2f} "
            f"| {_outcome(step)}{': ' + _cell(step.failure) if step.failure else ''} |"
            for step in _shown(summary)
        ]
    else:
        lines += ["| mart | rows |", "|---|---:|"]
        lines += [f"| `{name}` | {rows:,} |" for name, rows in summary.marts.items()]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def terminal(summary: Summary) -> "RenderableType":
    """Return the report as tables of rich."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "cached": "blue", "skipped": "yellow", "failed": "red"}
    headline = Text(summary.headline, style="bold red" if summary.failure else "bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)

    def column(header: str, **options: Any) -> None:
        """Add a column that keeps its width on a narrow terminal; `what` is cut instead."""
        table.add_column(header, no_wrap=True, min_width=len(header), **options)

    if not summary.steps:
        column("what")
        column("rows", justify="right")
        for name, rows in summary.marts.items():
            table.add_row(name, f"{rows:,}")
        return Group(Text(), headline, table)
    column("step", style="dim")
    table.add_column("what", no_wrap=True)
    column("written", justify="right")
    column("rows", justify="right")
    column("seconds", justify="right")
    column(" " * _BAR_COLUMNS)
    longest = max(step.seconds for step in summary.steps) or 1
    kind = ""
    for step in _shown(summary):
        if first_of_kind := step.kind != kind:
            table.add_section()
            kind = step.kind
        outcome = _outcome(step)
        bar = "━" * round(_BAR_COLUMNS * step.seconds / longest)
        table.add_row(
            kind if first_of_kind else "",
            step.name,
            _count(step.rows),
            _count(summary.marts.get(step.name)),
            f"{step.seconds:.2f}",
            Text(bar if outcome == "ok" else f"{bar} {outcome}".strip(), style=colours[outcome]),
        )
    return Group(Text(), headline, table)


def show(summary: Summary) -> None:
    """Print the report."""
    from rich.console import Console

    # Without a terminal rich would take 80 columns.
    Console(width=None if sys.stdout.isatty() else 100).print(terminal(summary))


def preload() -> None:
    """Import the modules of :func:`plot` (1 s) in a thread, in parallel with other work."""
    threading.Thread(target=importlib.import_module, args=["matplotlib.figure"], daemon=True).start()


def plot(summary: Summary) -> bytes:
    """Return the report as a PNG: carriers of the newest day, the newest 30 days, the seconds of the steps."""
    # pyplot would have global state and take twice the import time.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.dates import DateFormatter, DayLocator
    from matplotlib.figure import Figure

    timed = (step for step in summary.steps if step.seconds > 0 and step.kind != "test")
    steps = sorted(timed, key=lambda step: step.seconds)[-12:]
    figure = Figure(figsize=(15 if steps else 10, 4.5), layout="constrained")
    axes = figure.subplots(1, 3 if steps else 2)
    by_carrier, by_day = axes[0], axes[1]

    newest = summary.days[-1][0]
    names = [name for name, _ in summary.carriers][::-1]
    shares = [100 * share for _, share in summary.carriers][::-1]
    by_carrier.barh(names, shares, color=["#2a9d8f" if share >= 80 else "#e9c46a" for share in shares])
    by_carrier.set(title=f"Arrived on time, {newest}", xlabel="% of scheduled flights", xlim=(0, 100))

    days = [day for day, _ in summary.days]
    by_day.plot(days, [100 * share for _, share in summary.days], marker="o", color="#264653")
    by_day.set(title="Arrived on time, newest 30 days", ylabel="% of scheduled flights", ylim=(0, 100))
    by_day.set_xlim(days[0] - timedelta(days=1), newest + timedelta(days=1))
    by_day.xaxis.set_major_locator(DayLocator(interval=1 + len(days) // 8))  # type: ignore[no-untyped-call]
    by_day.xaxis.set_major_formatter(DateFormatter("%d %b"))  # type: ignore[no-untyped-call]
    by_day.tick_params(axis="x", rotation=45)

    if steps:
        colours = {"extract": "#f4a261", "load": "#2a9d8f", "build": "#264653"}
        axes[2].barh(
            [textwrap.shorten(step.name, 30, placeholder="…") for step in steps],
            [step.seconds for step in steps],
            color=["#e76f51" if step.failure else colours[step.kind] for step in steps],
        )
        axes[2].set(title="The longest steps", xlabel="seconds")
    for subplot in axes:
        subplot.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def as_data_url(png: bytes) -> str:
    """Return a `data:` URL of the picture, which the UI shows without a file store."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
