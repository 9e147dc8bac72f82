"""The flow that tests run in processes of its own: dbt's build of the project in `SHOP`.

Its arguments: a flow's name, and a flow run's id for another attempt of that; it prints the id and runs the flow. Or
`deploy`, which prints the id of a deployment of `daily`.
"""

import os
import sys
from pathlib import Path
from uuid import UUID

from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from orchestration import warehouse
from orchestration.dbt import DbtProject
from orchestration.settings import ROOT
from tests.orchestration.dbt import versions

project = DbtProject(
    os.environ["SHOP"],
    environment=warehouse.environment,
    artifacts=os.environ["SHOP"] + ".kept",
    python=versions.tested(),
)


@flow
def daily() -> None:
    """Build in the flow's own thread."""
    project.build()


@task
def build() -> None:
    """Build in a task's thread."""
    project.build()


@flow
def beside() -> None:
    """Build beside the flow's own thread."""
    build.submit().result()


if __name__ == "__main__":
    if sys.argv[1] == "deploy":
        # As prefect.yaml deploys flows: they are in the folder already.
        here = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
        entrypoint = f"{Path(__file__).relative_to(ROOT)}:daily"
        with get_client(sync_client=True) as client:
            flow_id = client.create_flow(daily)
            print(client.create_deployment(flow_id, "shop", entrypoint=entrypoint, pull_steps=here))
        sys.exit()
    called = {"daily": daily, "beside": beside}[sys.argv[1]]
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(sys.argv[2])) if len(sys.argv) > 2 else client.create_flow_run(called)
    print(run.id, flush=True)
    run_flow(called, flow_run=run)
