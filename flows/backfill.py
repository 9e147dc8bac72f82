"""Load a range of days in chunks, then build the dbt project once.

    python flows/backfill.py --first 2013-01-01 --last 2013-03-31

The backfill skips loaded days, so an interrupted backfill continues where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import date

from prefect import flow, get_run_logger
from prefect.futures import as_completed

from flows import landing, raw
from flows.example_flow import (
    Day,
    dbt_project,
    load_days,
    parallel_tasks,
    reference_steps,
    report_at_end,
    run_from_command_line,
    submit_references,
    transform,
)
from flows.report import Step
from orchestration.errors import DayError

CHUNK_DAYS = 31
"""Days in one transaction: enough for COPY's full speed, and little work is lost by a kill."""


@flow(task_runner=parallel_tasks)
def ingest_range(first: date, last: date, full_refresh: bool = False) -> list[Step]:
    """Load the days from `first` to `last` that are not loaded yet; with `full_refresh` all of them."""
    logger = get_run_logger()
    raw.prepare()
    loaded = set() if full_refresh else set(raw.loaded_days())
    days = [day for day in landing.days() if first <= day <= last]
    missing = [day for day in days if day not in loaded]
    logger.info("%s to %s: %d days, %d of them to load.", first, last, len(days), len(missing))
    references = submit_references(full_refresh)
    chunks = [missing[start : start + CHUNK_DAYS] for start in range(0, len(missing), CHUNK_DAYS)]
    steps: list[Step] = []
    loading = [load_days.submit(chunk) for chunk in chunks]
    for done, future in enumerate(as_completed(loading), start=1):
        chunk_steps: list[Step] = future.result()
        steps += chunk_steps
        logger.info("%d of %d chunks are loaded.", done, len(chunks))
    landing.release()
    return steps + reference_steps(references)


@flow
def backfill(
    first: Day | None = None,
    last: Day | None = None,
    full_refresh: bool = False,
) -> None:
    """Load every day of a range that is not loaded yet, build the dbt project once, and report.

    Args:
        first: The first day. Empty means the first available day.
        last: The last day. Empty means the last available day.
        full_refresh: Load loaded days again, and rebuild incremental models from scratch.
    """
    dbt_project.warm()
    steps: list[Step] = []
    with report_at_end(steps):
        first = landing.check_day(first or landing.days()[0])
        last = landing.check_day(last or landing.days()[-1])
        if first > last:
            raise DayError(f"The first day, {first}, is after the last, {last}. Exchange them.")
        steps += ingest_range(first, last, full_refresh)
        steps += transform(full_refresh=full_refresh)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of the backfill; return the exit status."""
    parser = argparse.ArgumentParser(description=(backfill.description or "").splitlines()[0])
    parser.add_argument("--first", help="YYYY-MM-DD; default: the first available day")
    parser.add_argument("--last", help="YYYY-MM-DD; default: the last available day")
    parser.add_argument("--full-refresh", action="store_true", help="load and build everything again")
    options = parser.parse_args(arguments)
    dbt_project.warm()
    return run_from_command_line(
        lambda: backfill(first=options.first, last=options.last, full_refresh=options.full_refresh)
    )


if __name__ == "__main__":
    sys.exit(main())
