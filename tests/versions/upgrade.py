"""Test two versions together: a server that changes its version during a run, and Prefect's own worker of another.

`make test` does not collect this file; `make test-versions` runs it. Server and runs are local processes.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.settings import ROOT
from tests.parts import asked, client_of, free_port, kill_run_processes, served, wait_until
from tests.versions.catalogue import PREVIOUS, locked_version, previous_release

FLOW = """
import os, time
from pathlib import Path
from prefect import flow, get_run_logger, task
from prefect.concurrency.sync import concurrency

NOTES = Path(os.environ["NOTES"])

def wait_to_continue(name):
    (NOTES / name).touch()
    while not (NOTES / f"{name}-continue").exists():
        time.sleep(0.1)

@task(tags=["held"])
def step(number):
    wait_to_continue(f"step-{number}")
    get_run_logger().info("step %s", number)
    return number

@flow(log_prints=True)
def steps():
    with concurrency("held"):
        assert [step(1), step.submit(2).result()] == [1, 2]
"""


@contextlib.contextmanager
def serve_version(python: Path, version: str, home: Path, port: int) -> Iterator[None]:
    """Run a server on the database in `home`, whose schema is that of the newest server so far."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # As in the chart: a Job migrates, and an older server keeps a newer schema.
    variables["PREFECT_API_DATABASE_MIGRATE_ON_START"] = "false"
    # Leases survive a server, as in the chart's Redis.
    variables["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"] = "prefect.server.concurrency.lease_storage.filesystem"
    with served(home, port, python, variables) as url:
        with client_of(url) as api:
            assert asked(api, "GET", "/admin/version") == version
        yield


def migrate_database(python: Path, home: Path) -> None:
    """Migrate the database in `home` to the schema of the interpreter's Prefect."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PREFECT_HOME": str(home)
    }
    command = [str(python), "-m", "prefect", "server", "database", "upgrade", "--yes"]
    subprocess.run(command, env=variables, cwd=home, check=True, capture_output=True)


@pytest.mark.parametrize("way", ["upgrade", "rollback"])
def test_run_completes_while_the_server_changes_its_version(way: str, tmp_path: Path) -> None:
    python, checkout = previous_release()
    old, new = (python, PREVIOUS, checkout), (Path(sys.executable), locked_version(), ROOT)
    before, after = (old, new) if way == "upgrade" else (new, old)
    home, notes, port = tmp_path / "home", tmp_path / "notes", free_port()
    home.mkdir()
    notes.mkdir()
    (tmp_path / "flow.py").write_text(FLOW)
    migrate_database(before[0], home)

    def wait_for_step(name: str) -> None:
        wait_until(lambda: (notes / name).exists(), f"the run to reach {name}")

    with contextlib.ExitStack() as stack:
        with serve_version(*before[:2], home, port), client_of(f"http://127.0.0.1:{port}/api") as api:
            asked(api, "POST", "/v2/concurrency_limits/", {"name": "held", "limit": 1})
            flow = asked(api, "POST", "/flows/", {"name": "steps"})["id"]
            step = {"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}
            body = {"name": "daily", "flow_id": flow, "entrypoint": "flow.py:steps", "pull_steps": [step]}
            deployment = asked(api, "POST", "/deployments/", {**body, "concurrency_limit": 1})["id"]
            run = asked(api, "POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {}})["id"]
            claim = asked(api, "POST", f"/flow_runs/{run}/set_state", {"state": {"type": "PENDING"}})["state"]["id"]
            interpreter, _, root = before
            variables = os.environ | {
                "PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PREFECT__FLOW_RUN_ID": run, "NOTES": str(notes),
                "TMPDIR": str(tmp_path), "PYTHONPATH": str(root), "PREFECT_HOME": str(tmp_path / "run"),
                "PREFECT_CLIENT_MAX_RETRIES": "19",  # as the work pool's chart sets it
                "KUBERNETES_JOB": f"job-{claim[-12:]}", "TERMINATION_MESSAGE_PATH": str(tmp_path / "message"),
            }  # fmt: skip
            command = [str(interpreter), str(root / "orchestration/execution.py"), "prefect", "flow-run", "execute"]
            log = stack.enter_context((tmp_path / "log").open("w"))
            process = subprocess.Popen(
                command, env=variables, cwd=tmp_path, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
            )
            stack.callback(process.wait)
            stack.callback(kill_run_processes, run)
            wait_for_step("step-1")
        if way == "upgrade":
            migrate_database(after[0], home)
        (notes / "step-1-continue").touch()  # the run continues while no server answers
        with serve_version(*after[:2], home, port), client_of(f"http://127.0.0.1:{port}/api") as api:
            wait_for_step("step-2")
            (notes / "step-2-continue").touch()
            assert process.wait(300) == 0, (tmp_path / "log").read_text()
            ended = asked(api, "GET", f"/flow_runs/{run}")["state"]
            assert (ended["type"], ended["name"]) == ("COMPLETED", "Completed"), ended
            tasks = {"flow_runs": {"id": {"any_": [run]}}}

            def are_completed() -> bool:
                # The server writes task runs from their events.
                found = asked(api, "POST", "/task_runs/filter", tasks)
                return [task["state_type"] for task in found] == ["COMPLETED"] * 2

            wait_until(are_completed, "both task runs to be Completed", 60)
            assert asked(api, "GET", "/v2/concurrency_limits/held")["active_slots"] == 0
            limit = asked(api, "GET", f"/deployments/{deployment}")["global_concurrency_limit"]
            assert limit["active_slots"] == 0


@pytest.mark.parametrize("newer", ["server", "worker"])
def test_process_worker_of_the_other_version_executes_a_run(newer: str, tmp_path: Path) -> None:
    python, _ = previous_release()
    old, new = (python, PREVIOUS), (Path(sys.executable), locked_version())
    server, worker = (new, old) if newer == "server" else (old, new)
    home, port = tmp_path / "home", free_port()
    home.mkdir()
    (tmp_path / "flow.py").write_text("from prefect import flow\n\n@flow\ndef nothing(day: int = 1): pass\n")
    migrate_database(server[0], home)
    url = f"http://127.0.0.1:{port}/api"
    with serve_version(*server, home, port), client_of(url) as api:
        flow = asked(api, "POST", "/flows/", {"name": "nothing"})["id"]
        step = {"prefect.deployments.steps.set_working_directory": {"directory": str(tmp_path)}}
        body = {"name": "daily", "flow_id": flow, "entrypoint": "flow.py:nothing", "pull_steps": [step]}
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        variables |= {"PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path / "worker")}

        def prefect(*arguments: str) -> None:
            command = [str(worker[0]), "-m", "prefect", *arguments]
            done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr

        prefect("work-pool", "create", "processes", "--type", "process")
        deployment = asked(api, "POST", "/deployments/", {**body, "work_pool_name": "processes"})["id"]
        run = asked(api, "POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {"day": 2}})["id"]
        prefect("worker", "start", "--pool", "processes", "--run-once")
        state = asked(api, "GET", f"/flow_runs/{run}")["state"]
        assert (state["type"], state["name"]) == ("COMPLETED", "Completed"), state
