"""Draw the pictures of README and docs: `make picture`.

Most show a run that loads a day after a month of days. Those of load and of the upgrade show the recorded benchmarks.
"""

import io
import tempfile
from pathlib import Path

from rich.console import Console

from flows import landing, raw, report
from flows.example_flow import NO_UNIT_TESTS, dbt_project, dbt_steps
from flows.report import Step
from orchestration.dbt.summary import gantt
from tests.benchmarks import curves
from tests.parts import embedded_postgres, new_database

IMAGES = Path(__file__).with_name("images")

# Rich's template, without the web font that it would download. The reader's browser has a monospaced font.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
    <style>
    .{unique_id}-matrix {{ font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: {char_height}px;
        line-height: {line_height}px; font-variant-east-asian: full-width; }}
    .{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
    {styles}
    </style>
    <defs><clipPath id="{unique_id}-clip-terminal">
    <rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>{lines}</defs>
    {chrome}
    <g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
    {backgrounds}
    <g class="{unique_id}-matrix">{matrix}</g>
    </g>
</svg>
"""


def main() -> None:
    """Draw the benchmarks; load January into a new warehouse, build, run one more day, and draw its report."""
    with tempfile.TemporaryDirectory() as folder, embedded_postgres(Path(folder)) as postgres, new_database(postgres):
        days = landing.days()[:31]
        raw.prepare()
        raw.load_days(days[:-1])
        for table in landing.REFERENCE:
            raw.load_reference(table)
        dbt_project.build(flags=NO_UNIT_TESTS)
        loaded = raw.load_days(days[-1:])
        steps = [Step("extract", raw.days_as_text(days[-1:]), loaded.extract_seconds, loaded.rows)]
        steps += [Step("load", f"raw.{t} {days[-1]}", loaded.load_seconds, n) for t, n in loaded.tables.items()]
        steps += [Step("load", f"raw.{t}", 0, landing.extract_all(t).rows, cached=True) for t in landing.REFERENCE]
        built = dbt_project.build(flags=NO_UNIT_TESTS)
        summary = report.summarise(steps + dbt_steps(built))
    console = Console(record=True, width=84, file=io.StringIO())
    console.print(report.terminal(summary))
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "report.svg").write_text(console.export_svg(title="make run", code_format=SVG, unique_id="report"))
    (IMAGES / "plot.png").write_bytes(report.plot(summary))
    (IMAGES / "dbt-threads.svg").write_text(gantt(built))
    curves.draw_all(IMAGES)


if __name__ == "__main__":
    main()
