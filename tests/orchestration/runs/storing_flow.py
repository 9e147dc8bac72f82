"""A flow whose tasks store large results from another process, for `test_result_limit`."""

import os

from prefect import flow, task
from prefect.task_runners import ProcessPoolTaskRunner


@task(persist_result=True)
def fill(number: int) -> bytes:
    """Return a result of 1 MiB, which is 1.4 MiB in the storage."""
    del number
    return os.urandom(2**20)


@flow(task_runner=ProcessPoolTaskRunner(max_workers=1), persist_result=False)  # type: ignore[arg-type]
def store(results: int) -> None:
    """Store results."""
    fill.map(range(results)).result()
