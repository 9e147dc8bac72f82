"""What a flow run does between the start of its container and its first line: imports and requests."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.blocks.notifications import SlackWebhook
from prefect.filesystems import RemoteFileSystem

from orchestration.settings import ROOT
from tests.parts import asked, client_of, kill_run_processes

FLOW = """
import gc, json, os, sys
from pathlib import Path
from types import ModuleType
from urllib.request import urlopen
from prefect import flow

@flow
def first_line():
    if "FIRST_LINE_URL" in os.environ:
        urlopen(os.environ["FIRST_LINE_URL"]).read()
    loaded = sorted(name for name, module in sys.modules.items() if type(module) is ModuleType)
    found = {"modules": loaded, "gc": gc.isenabled(), "frozen": gc.get_freeze_count() > 0}
    Path(os.environ["NOTES"]).write_text(json.dumps(found))
"""


@contextmanager
def claimed_run(api_url: str, folder: Path, name: str) -> Iterator[dict[str, str]]:
    """Yield the variables of a run that a worker has claimed, and end its processes afterwards."""
    (folder / "flow.py").write_text(FLOW)
    with client_of(api_url) as api:
        flow = asked(api, "POST", "/flows/", {"name": "first-line"})["id"]
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}
        body = {"name": name, "flow_id": flow, "entrypoint": "flow.py:first_line", "pull_steps": [step]}
        deployment = asked(api, "POST", "/deployments/", body)["id"]
        run = asked(api, "POST", f"/deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]
        claim = asked(api, "POST", f"/flow_runs/{run}/set_state", {"state": {"type": "PENDING"}})["state"]["id"]
        try:
            yield {
                "PREFECT_API_URL": api_url, "PREFECT__FLOW_RUN_ID": run, "KUBERNETES_JOB": f"job-{claim[-12:]}",
                "TERMINATION_MESSAGE_PATH": str(folder / "message"), "NOTES": str(folder / "notes"),
                "TMPDIR": str(folder), "PREFECT_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT),
            }  # fmt: skip
            assert asked(api, "GET", f"/flow_runs/{run}")["state"]["name"] == "Completed"
        finally:
            kill_run_processes(run)


def execute(variables: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Execute a run by the container's command; return what its first line found."""
    execution = str(ROOT / "orchestration/execution.py")
    subprocess.run(
        [sys.executable, "-I", "-S", execution, "prefect", "flow-run", "execute"],
        env=os.environ | variables, cwd=folder, start_new_session=True, check=True, timeout=300,
    )  # fmt: skip
    return dict(json.loads((folder / "notes").read_text()))


UNUSED = {
    "prefect.blocks.notifications", "prefect.blocks.webhook", "prefect.server", "fastapi", "sqlalchemy",
    "prefect_kubernetes", "kubernetes_asyncio", "prefect_docker", "docker", "prefect_redis", "redis", "psycopg",
    "numpy", "matplotlib", "dbt", "orchestration.settings", "orchestration.prefect_compat.results",
    "orchestration.prefect_compat.workers",
}  # fmt: skip
"""Modules of the image that an empty flow does not need."""


def test_run_with_durable_results_imports_no_module_that_it_does_not_use(prefect_server: str, tmp_path: Path) -> None:
    """The run loads the block of its results' storage, for which Prefect would import all integrations."""
    RemoteFileSystem(basepath="memory://results").save("starts", overwrite=True)
    with claimed_run(prefect_server, tmp_path, "imports") as variables:
        storage = {"PREFECT_RESULTS_DEFAULT_STORAGE_BLOCK": "remote-file-system/starts"}
        found = execute(variables | storage, tmp_path)
    assert "prefect.filesystems" in found["modules"]
    assert sorted(UNUSED.intersection(found["modules"])) == []
    assert (found["gc"], found["frozen"]) == (True, True)


DEFERRED = """
import inspect, os, pickle, sys
from types import ModuleType
from orchestration.prefect_compat import blocks

blocks.defer_notifications()
import prefect
from prefect.blocks.core import Block
blocks.look_up_before_import()

NAME = "prefect.blocks.notifications"
assert prefect.flow and Block.get_block_class_from_key("local-file-system").__name__ == "LocalFileSystem"
assert inspect.getmodule(Block)  # reads a name of each module
deferred = sys.modules[NAME]
assert type(deferred) is not ModuleType

for use in sys.argv[1:]:
    if os.fork():  # each in a process without the imports of the others
        assert os.wait()[1] == 0, use
        continue
    exec(use)
    assert type(sys.modules[NAME]) is ModuleType
    from prefect.blocks.notifications import SlackWebhook as found
    assert found is Block.get_block_class_from_key("slack-webhook") is deferred.SlackWebhook
    assert prefect.blocks.notifications is sys.modules[NAME]
    break
"""

USES = (
    "assert Block.get_block_class_from_key('slack-webhook').__name__ == 'SlackWebhook'",
    "from prefect.blocks.notifications import SlackWebhook",
    "import prefect.blocks; assert prefect.blocks.notifications.SlackWebhook",
    "from prefect.blocks.notifications import *; assert SlackWebhook",
    f"assert pickle.loads({pickle.dumps(SlackWebhook)!r})",
    "assert deferred.SlackWebhook",
    # As before, a class that no imported module has is searched in all integrations.
    "assert Block.get_block_class_from_key('redis-database').__module__ == 'prefect_redis.blocks'",
)


def test_deferred_blocks_are_imported_by_each_way_to_use_one() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", DEFERRED, *USES], env=environment, check=True)
