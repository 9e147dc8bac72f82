"""A flow that logs many lines, in its process and in a process pool, for `test_log_limit`."""

from prefect import flow, get_run_logger, task
from prefect.task_runners import ProcessPoolTaskRunner


@task
def chat(lines: int) -> None:
    """Log lines of 750 characters, each of which takes 1 kB in a request."""
    for number in range(lines):
        get_run_logger().info("%s line %s", "." * 740, number)


@flow(task_runner=ProcessPoolTaskRunner(max_workers=1))  # type: ignore[arg-type]
def chatty(lines: int) -> None:
    """Log in both processes."""
    chat.submit(lines).result()
    chat(lines)
    get_run_logger().error("the end")
