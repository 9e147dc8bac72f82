"""A flow whose task runs in a process of its own, for `test_durable`."""

from prefect import flow, get_run_logger, task
from prefect.task_runners import ProcessPoolTaskRunner


@task(persist_result=True, result_serializer="json", result_storage_key="total")
def total() -> int:
    """Return a number that is stored."""
    get_run_logger().info("the task is executed")
    return 42


@flow(task_runner=ProcessPoolTaskRunner(max_workers=1))  # type: ignore[arg-type]
def pooled() -> None:
    """Log the task's result."""
    get_run_logger().info("the end: %s", total.submit().result())
