"""The daily job: load a day of flights, build the dbt project, report.

    python flows/example_flow.py                     # the next day
    python flows/example_flow.py --day 2013-02-08

A flow names its tasks and their order; what they do is in `flows.landing`, `flows.raw`,
`flows.report` and the dbt project `flows/warehouse`, none of which knows Prefect.
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
"""They test the code, not the data, and those of an incremental model need it to be there."""

at_once = cast("TaskRunner[PrefectFuture[Any]]", ThreadPoolTaskRunner(max_workers=4))
"""Tasks that are submitted run beside each other: loads wait for Postgres more than for Python."""

Day = Annotated[
    date,
    BeforeValidator(lambda value: landing.parse_day(value) if isinstance(value, str) else value),
]


def another_attempt_may_help(_task: Any, _run: Any, state: Any) -> bool:
    """Retry a lost connection or a deadlock; what an operator must cure fails at once."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, WarehouseError) and error.transient


def reference_key(_context: TaskRunContext, parameters: dict[str, Any]) -> str:
    """The same file in the same warehouse need not be loaded again."""
    table = parameters["table"]
    return f"reference-{table}-{landing.fingerprint([table])}-{raw.identity()}"


@task(
    task_run_name=lambda: f"load {raw.span(task_run.parameters['days'])}",
    retries=3,
    retry_delay_seconds=[1, 5, 25],
    retry_condition_fn=another_attempt_may_help,
)
def load_days(days: list[date], run: str | None = None) -> list[Step]:
    """Replace the flights and weather of the days, all or nothing."""
    loaded = raw.load_days(days, run)
    span = raw.span(days)
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
    retry_condition_fn=another_attempt_may_help,
)
def load_reference(table: str) -> dict[str, float]:
    """Replace a reference table; not again within a day while file and warehouse are the same."""
    loaded = raw.load_reference(table)
    return {"rows": loaded.rows, "seconds": loaded.extract_seconds + loaded.load_seconds}


def submit_references(full_refresh: bool) -> dict[str, PrefectFuture[dict[str, float]]]:
    """Start loading the reference tables, beside whatever else the flow does."""
    load = load_reference.with_options(refresh_cache=full_refresh)
    return {table: load.submit(table) for table in landing.REFERENCE}


def reference_steps(futures: dict[str, PrefectFuture[dict[str, float]]]) -> list[Step]:
    """Wait for the reference tables; what became of them."""
    steps = []
    for table, future in futures.items():
        loaded = future.result()
        cached = future.state.name == "Cached"
        seconds = 0.0 if cached else loaded["seconds"]
        steps.append(Step("load", f"raw.{table}", seconds, int(loaded["rows"]), cached=cached))
    return steps


@flow(task_runner=at_once)
def ingest(
    day: Day | None = None,
    full_refresh: bool = False,
) -> list[Step]:
    """Load a day's flights and weather, and the reference tables, all at once.

    Args:
        day: The day to load. Empty loads the newest loaded day + 1, or the first.
        full_refresh: Load the reference tables again, even if their files are the same.
    """
    logger = get_run_logger()
    if day:
        day = landing.check_day(day)
    raw.prepare()
    # Another attempt of a run goes on with its day, and does not take the next one.
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
        full_refresh: Rebuild incremental models from nothing.
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
            "See what there is with: make dbt CMD=ls"
        )
    return dbt_steps(result)


def dbt_steps(result: DbtResult) -> list[Step]:
    """dbt's nodes as steps of the report."""
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
        steps: What a run did. Empty reports on the warehouse alone.
        failure: Why that run failed. Empty if it did not.
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
def reported(steps: list[Step]) -> Iterator[None]:
    """Report on the `steps` that the block took, also when one of them failed."""
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

    A day is loaded as a whole or not at all, so a run may be repeated or killed at any point.

    Args:
        day: The day to load. Empty loads the newest loaded day + 1, or the first.
        full_refresh: Load the reference tables again and rebuild incremental models from nothing.
        select: Build only these nodes, in dbt's selection syntax, for example
            `carrier_daily_punctuality+`. Empty builds all.
    """
    dbt_project.warm()
    steps: list[Step] = []
    with reported(steps):
        steps += ingest(day, full_refresh)
        steps += transform(select, full_refresh)


def run_by_hand(flow_call: Any) -> int:
    """Run a flow from the command line; returns the exit status, the failure in one sentence."""
    # Only a run that is started by hand may need a temporary server: a pod never imports this.
    from orchestration.local.temporary_server import reachable_server

    # To the end of the process, as Prefect sends its last logs and events while Python exits.
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
    """The command line of the pipeline."""
    parser = argparse.ArgumentParser(description=(dbt_pipeline.description or "").splitlines()[0])
    parser.add_argument("--day", help="YYYY-MM-DD; default: the newest loaded day + 1, or the first")
    parser.add_argument("--full-refresh", action="store_true", help="rebuild from nothing")
    parser.add_argument("--select", help="dbt selection; default: everything")
    options = parser.parse_args(arguments)
    dbt_project.warm()
    return run_by_hand(lambda: dbt_pipeline(day=options.day, full_refresh=options.full_refresh, select=options.select))


if __name__ == "__main__":
    sys.exit(main())
