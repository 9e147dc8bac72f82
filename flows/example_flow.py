"""Run the daily job: load a day of flights, build the dbt project, report.

    python flows/example_flow.py                     # the next day
    python flows/example_flow.py --day 2013-02-08

A flow names its tasks and their order. The work is in `flows.landing`, `flows.raw`, `flows.report` and the dbt project
`flows/warehouse`, which do not import Prefect.
"""

import argparse
import atexit
import contextlib
import sys
from collections.abc import Iterator, Sequence
from datetime import date, timedelta
from typing import Annotated, Any, cast

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run, task_run
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from pydantic import BeforeValidator

from flows import landing, raw
from flows import report as reporting
from flows.report import Step
from orchestration import warehouse
from orchestration.dbt import DbtProject, DbtResult
from orchestration.errors import DbtError, PipelineError, WarehouseError, explains_itself, hide_explained_tracebacks
from orchestration.settings import ROOT, settings

hide_explained_tracebacks()

dbt_project = DbtProject(ROOT / "flows" / "warehouse", environment=warehouse.environment)

NO_UNIT_TESTS = ["--exclude-resource-type", "unit_test"]
"""Unit tests test the code and not the data, and those of an incremental model need the model's relation."""

parallel_tasks = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=4))
"""Runs submitted tasks in four threads: a load waits for Postgres longer than it computes."""

Day = Annotated[
    date,
    BeforeValidator(lambda value: landing.parse_day(value) if isinstance(value, str) else value),
]


def is_transient(_task: Any, _run: Any, state: Any) -> bool:
    """Return whether a retry may help: after a lost connection or a deadlock, not where an operator must act."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, WarehouseError) and error.transient


def reference_key(_context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """Return the cache key of a reference table: the same file in the same warehouse is loaded once."""
    table = parameters["table"]
    return f"reference-{table}-{landing.fingerprint([table])}-{raw.identity()}"


@task(
    task_run_name=lambda: f"load {raw.days_as_text(task_run.parameters['days'])}",
    retries=3,
    retry_delay_seconds=[1, 5, 25],
    retry_condition_fn=is_transient,
)
def load_days(days: list[date], run: str | None = None) -> list[Step]:
    """Replace the flights and weather of the days in one transaction."""
    loaded = raw.load_days(days, run)
    span = raw.days_as_text(days)
    return [
        Step("extract", span, loaded.extract_seconds, loaded.rows),
        *(Step("load", f"raw.{table} {span}", loaded.load_seconds, rows) for table, rows in loaded.tables.items()),
    ]


@task(
    task_run_name="load {table}",
    cache_key_fn=reference_key,
    cache_expiration=timedelta(days=1),
    persist_result=True,
    result_serializer="json",
    retries=3,
    retry_delay_seconds=[1, 5, 25],
    retry_condition_fn=is_transient,
)
def load_reference(table: str) -> dict[str, float]:
    """Replace a reference table, at most once a day while file and warehouse are the same."""
    loaded = raw.load_reference(table)
    return {"rows": loaded.rows, "seconds": loaded.extract_seconds + loaded.load_seconds}


def submit_references(full_refresh: bool) -> dict[str, PrefectFuture[dict[str, float]]]:
    """Start loading the reference tables in parallel with the rest of the flow."""
    load = load_reference.with_options(refresh_cache=full_refresh)
    return {table: load.submit(table) for table in landing.REFERENCE}


def reference_steps(futures: dict[str, PrefectFuture[dict[str, float]]]) -> list[Step]:
    """Wait for the reference tables; return their steps of the report."""
    steps = []
    for table, future in futures.items():
        loaded = future.result()
        cached = future.state.name == "Cached"
        seconds = 0.0 if cached else loaded["seconds"]
        steps.append(Step("load", f"raw.{table}", seconds, int(loaded["rows"]), cached=cached))
    return steps


@flow(task_runner=parallel_tasks)
def ingest(
    day: Day | None = None,
    full_refresh: bool = False,
) -> list[Step]:
    """Load a day's flights and weather, and in parallel the reference tables.

    Args:
        day: The day to load. Empty loads the newest loaded day + 1, or the first.
        full_refresh: Load the reference tables again, even if their files are the same.
    """
    logger = get_run_logger()
    if day:
        day = landing.check_day(day)
    raw.prepare()
    # A retry continues with the day that the run has loaded, and does not take the next day.
    run = str(flow_run.root_flow_run_id)
    earlier = raw.loaded_by(run)
    day = day or (earlier[0] if earlier else raw.next_day())
    references = submit_references(full_refresh)
    if earlier and earlier[0] == day:
        logger.info("An earlier attempt of this run has loaded %s.", day)
        steps = [Step("load", f"raw.{table} {day}", 0.0, rows, cached=True) for table, rows in earlier[1].items()]
    elif day:
        steps = load_days.submit([day], run).result()
    else:
        steps = []
        logger.info("Nothing new to load: the landing zone ends on %s.", landing.days()[-1])
    landing.release()
    return steps + reference_steps(references)


@flow
def transform(select: str | None = None, full_refresh: bool = False) -> list[Step]:
    """Build the dbt project: models and their tests, in order of dependency.

    Args:
        select: Build only these nodes, in dbt's selection syntax, for example
            `carrier_daily_punctuality+`. Empty builds all.
        full_refresh: Rebuild incremental models from scratch.
    """
    logger = get_run_logger()
    dbt_project.warm()
    reporting.preload()
    schema = settings().warehouse_schema
    with warehouse.exclusive_lock(
        f"dbt build in {schema}",
        on_wait=lambda: logger.info("Another run builds schema %s; waiting for it to end.", schema),
    ):
        result = dbt_project.build(
            select=select, full_refresh=full_refresh, flags=NO_UNIT_TESTS, inputs=raw.newest_load()
        )
    if select and not result.nodes:
        raise DbtError(
            f"The selection {select!r} matches no node in the dbt project {dbt_project.path}; nothing was built. "
            "List the nodes with: make dbt CMD=ls"
        )
    return dbt_steps(result)


def dbt_steps(result: DbtResult) -> list[Step]:
    """Return dbt's nodes as steps of the report."""
    return [
        Step(
            "test" if node.kind in ("test", "unit_test") else "build",
            node.name,
            node.seconds,
            node.rows,
            cached=node.status == "reused",
            failure=node.reason if node.failed else None,
            skipped=node.status == "skipped",
        )
        for node in result.nodes
        if node.kind in ("model", "seed", "snapshot", "test", "unit_test")
    ]


@flow
def report(
    steps: list[Step] | None = None,
    failure: str | None = None,
) -> None:
    """Show what was loaded and built, as artifacts in the UI and as a table on the terminal.

    Args:
        steps: The steps of a run. Empty reports on the warehouse alone.
        failure: Why the run failed. Empty after a successful run.
    """
    summary = reporting.summarise(steps or [], failure)
    get_run_logger().info(summary.headline)
    reporting.show(summary)
    create_markdown_artifact(key="daily-report", markdown=reporting.markdown(summary), description=summary.headline)
    if summary.days:
        create_image_artifact(
            key="daily-report-plot",
            image_url=reporting.as_data_url(reporting.plot(summary)),
            description=summary.headline,
        )


@contextlib.contextmanager
def report_at_end(steps: list[Step]) -> Iterator[None]:
    """Report on the `steps` at the end of the block, also after a failure."""
    try:
        yield
    except PipelineError as error:
        if isinstance(error, DbtError) and error.result:
            steps += dbt_steps(error.result)
        report(steps, str(error))
        raise
    report(steps)


@flow
def dbt_pipeline(
    day: Day | None = None,
    full_refresh: bool = False,
    select: str | None = None,
) -> None:
    """Load a day of flights into the warehouse, build the dbt project and report.

    A day is loaded as a whole or not at all. A run is idempotent: it may be repeated, and killed at any point.

    Args:
        day: The day to load. Empty loads the newest loaded day + 1, or the first.
        full_refresh: Load the reference tables again and rebuild incremental models from scratch.
        select: Build only these nodes, in dbt's selection syntax, for example
            `carrier_daily_punctuality+`. Empty builds all.
    """
    dbt_project.warm()
    steps: list[Step] = []
    with report_at_end(steps):
        steps += ingest(day, full_refresh)
        steps += transform(select, full_refresh)


def run_from_command_line(flow_call: Any) -> int:
    """Run a flow and print its failure in one sentence; return the exit status."""
    # Imported here, because a pod never needs a temporary server.
    from orchestration.local.temporary_server import reachable_server

    # The server runs until Python exits, because Prefect sends its last logs and events then.
    until_exit = contextlib.ExitStack()
    atexit.register(until_exit.close)
    try:
        until_exit.enter_context(reachable_server())
        flow_call()
    except KeyboardInterrupt:
        print("Interrupted; a day is loaded whole or not at all. Run it again.", file=sys.stderr)
        return 130
    except Exception as error:
        if not explains_itself(error):
            raise
        print(f"\nFailed: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of the daily job; return the exit status."""
    parser = argparse.ArgumentParser(description=(dbt_pipeline.description or "").splitlines()[0])
    parser.add_argument("--day", help="YYYY-MM-DD; default: the newest loaded day + 1, or the first")
    parser.add_argument("--full-refresh", action="store_true", help="rebuild from scratch")
    parser.add_argument("--select", help="dbt selection; default: everything")
    options = parser.parse_args(arguments)
    dbt_project.warm()
    return run_from_command_line(
        lambda: dbt_pipeline(day=options.day, full_refresh=options.full_refresh, select=options.select)
    )


if __name__ == "__main__":
    sys.exit(main())
