"""A flow that tests run in a separate process: it builds the dbt project in `SHOP`.

`SHOP_PYTHON` is the interpreter for dbt; by default the one with the tested dbt.

`shop_flow FLOW [RUN]` prints the id of a new flow run and runs the flow. With RUN it runs another attempt of that flow
run.
"""

import os
import sys
from uuid import UUID

from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from orchestration import warehouse
from orchestration.dbt import DbtProject
from tests.orchestration.dbt import versions

project = DbtProject(
    os.environ["SHOP"],
    environment=warehouse.environment,
    artifacts=os.environ["SHOP"] + ".kept",
    python=os.environ.get("SHOP_PYTHON") or versions.tested(),
)


@flow
def daily() -> None:
    """Build in the flow's thread."""
    project.build()


@task
def build() -> None:
    """Build in a task's thread."""
    project.build()


@flow
def in_task() -> None:
    """Build in the thread of a submitted task."""
    build.submit().result()


if __name__ == "__main__":
    called = {"daily": daily, "in_task": in_task}[sys.argv[1]]
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(sys.argv[2])) if len(sys.argv) > 2 else client.create_flow_run(called)
    print(run.id, flush=True)
    run_flow(called, flow_run=run)
