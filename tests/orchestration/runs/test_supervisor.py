"""The supervisor of a flow run: memory report, exit status, fencing, disruption budget and its HTTP client."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from uuid import uuid4

import httpx
import psutil
import pytest

from orchestration.prefect_api import Server
from orchestration.protocol import DISRUPTIONS_LABEL, FENCED_LABEL_PREFIX
from orchestration.reconciler import actions
from orchestration.runs import run_client, supervisor
from orchestration.runs.run_client import RunClient, count_own_schedules
from orchestration.runs.termination_message import memory_report
from orchestration.settings import ROOT
from tests.parts import asked, client_of

SUPERVISOR = [sys.executable, "-I", "-S", str(ROOT / "orchestration/execution.py")]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            {"memory.peak": "1000\n", "memory.max": "2000\n", "memory.events": "low 0\noom 3\noom_kill 2\n"},
            {"peak": 1000, "limit": 2000, "oom_kills": 2},
        ),
        (
            {
                "memory/memory.max_usage_in_bytes": "1000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
            },
            {"peak": 1000, "oom_kills": 1},
        ),
        ({"memory.max": "max\n"}, {}),
        ({}, {}),
    ],
    ids=["version 2", "version 1", "no limit", "none"],
)
def test_memory_report_reads_both_versions_of_cgroups(
    tmp_path: Path, files: dict[str, str], found: dict[str, int]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_report(tmp_path) == found


@pytest.mark.parametrize(
    ("command", "status"), [("exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137), ("pass", 0)]
)
def test_exit_status_is_that_of_the_command(tmp_path: Path, command: str, status: int) -> None:
    message = tmp_path / "message"
    done = subprocess.run(
        [*SUPERVISOR, sys.executable, "-c", command], env={"TERMINATION_MESSAGE_PATH": str(message)}, check=False
    )
    assert done.returncode == status
    assert isinstance(json.loads(message.read_text()), dict)


def test_unwritable_termination_message_is_logged_and_fails_nothing(tmp_path: Path) -> None:
    """`LOG_FORMAT` may belong to the flow: an unknown format is no error here."""
    path = tmp_path / "absent" / "message"
    env = {"TERMINATION_MESSAGE_PATH": str(path), "PREFECT__FLOW_RUN_ID": "5f0c", "LOG_FORMAT": "of the flow"}
    done = subprocess.run([*SUPERVISOR, "true"], env=env, capture_output=True, text=True, check=True)
    message = f"ERROR The termination message {path} cannot be written: [Errno 2] No such file or directory: '{path}'."
    assert re.fullmatch(rf"\S+Z {re.escape(message)} flow_run_id=5f0c\n", done.stderr), done.stderr


def test_fenced_job_is_killed_with_its_child_processes(prefect_server: str, tmp_path: Path) -> None:
    """Another Job of the same run continues."""
    with client_of(prefect_server) as api:
        flow = api.post("/flows/", json={"name": "fenced"}).raise_for_status().json()["id"]
        run = api.post("/flow_runs/", json={"flow_id": flow}).raise_for_status().json()["id"]
    # The usual interval of checks would only prolong the test.
    code = (
        "import sys; from orchestration.runs import run_client, supervisor; "
        "run_client.CHECK_INTERVAL_SECONDS, run_client.CHECK_TIMEOUT_SECONDS = 0.1, 60; "
        "sys.exit(supervisor.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "sh", "-c", "sleep 600 & echo $!; wait"]
    messages = {job: tmp_path / job for job in ("old", "new")}
    processes = {
        job: subprocess.Popen(
            command,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT),
                "PREFECT_API_URL": prefect_server,
                "PREFECT__FLOW_RUN_ID": run,
                "KUBERNETES_JOB": job,
                "TERMINATION_MESSAGE_PATH": str(message),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for job, message in messages.items()
    }
    try:
        assert processes["old"].stdout
        child = psutil.Process(int(processes["old"].stdout.readline()))
        with client_of(prefect_server) as api:
            api.patch(f"/flow_runs/{run}/labels", json={f"{FENCED_LABEL_PREFIX}old": True}).raise_for_status()
        assert processes["old"].wait(300) == -signal.SIGKILL
        line = rf"\S+Z ERROR Job old was given up, and .* flow_run_id={run}\n"
        assert re.fullmatch(line, processes["old"].stdout.read())
        assert json.loads(messages["old"].read_text()) == {"fenced": 1}
        psutil.wait_procs([child], 60)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        time.sleep(1)
        assert processes["new"].poll() is None
    finally:
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.mark.parametrize(
    ("run_budget", "deployment_budget", "pool_budget", "retries"),
    [(3, 2, 1, 3), (None, 2, 1, 2), (None, None, 1, 1), (0, 2, 1, 0), (None, None, None, 10), ("many", 2, 1, 10)],
)
def test_disruption_budget_is_that_of_the_run_else_the_deployment_else_the_pool(
    prefect_server: str,
    run_budget: object,
    deployment_budget: object,
    pool_budget: object,
    retries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_client, "CHECK_TIMEOUT_SECONDS", 60)  # here nothing asks again

    def variables(budget: object) -> dict[str, object]:
        return {} if budget is None else {"disruption_retries": budget}

    name = f"budget-{uuid4().hex[:6]}"
    with client_of(prefect_server) as api:
        properties = {
            "disruption_retries": {"title": "Disruption Retries"}
            | ({"default": pool_budget} if pool_budget is not None else {})
        }
        template = {"job_configuration": {"name": ""}, "variables": {"properties": properties}}
        asked(api, "POST", "/work_pools/", {"name": name, "type": "kubernetes", "base_job_template": template})
        body = {"name": name, "flow_id": asked(api, "POST", "/flows/", {"name": "budget"})["id"]}
        body |= {"work_pool_name": name, "job_variables": variables(deployment_budget)}
        deployment = asked(api, "POST", "/deployments/", body)["id"]
        path = f"/deployments/{deployment}/create_flow_run"
        run = asked(api, "POST", path, {"job_variables": variables(run_budget)})
        client = RunClient(prefect_server, run["id"], "job")
        assert client.disruption_retries(client.read_run()) == retries
        fields = {"job_variables": variables(run_budget), "deployment_id": deployment, "work_pool_name": name}
        assert asyncio.run(_reconciler_budget(prefect_server, fields)) == retries


async def _reconciler_budget(url: str, fields: dict[str, object]) -> int:
    """Return the disruption budget that the reconciler reads for a run with these fields."""
    async with httpx.AsyncClient(base_url=url, timeout=75) as client:
        retries = await actions.read_budget(Server(client, url), fields)
    assert retries
    return retries.disruption_retries


def test_disruption_is_counted_once_if_an_answer_is_lost(prefect_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "EngineProcess", lambda: None)
    monkeypatch.setattr(supervisor, "RECHECK_INTERVAL_SECONDS", 0)
    monkeypatch.setattr(run_client, "CHECK_TIMEOUT_SECONDS", 60)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    sent: list[dict[str, Any]] = []

    class Losing(RunClient):
        def set_labels(self, labels: dict[str, Any]) -> None:
            super().set_labels(labels)
            sent.append(labels)
            if len(sent) == 1:
                raise TimeoutError("timed out")

    with client_of(prefect_server) as api:
        flow = asked(api, "POST", "/flows/", {"name": "disrupted"})["id"]
        run = asked(api, "POST", "/flow_runs/", {"flow_id": flow, "state": {"type": "RUNNING"}})["id"]
        supervisor.Supervisor(Losing(prefect_server, run, "job"))._conclude(1)
        state = asked(api, "GET", f"/flow_runs/{run}")["state"]
    assert sent == [{DISRUPTIONS_LABEL: 1}] * 2
    assert state["message"] == "Retry 1 of 10 after a disruption. Its pod was asked to end."


P, R, S, F = "PENDING", "RUNNING", "SCHEDULED", "FAILED"


@pytest.mark.parametrize(
    ("states", "count"),
    [
        ([S, P, R, S, P], 1),
        ([S, P, R, S, "Late", P, R, S, P, R, S, P], 3),
        ([S, P, R, S, S, P], 1),  # waits for a slot of its deployment
        ([S, P, R, "Retry 1 of 10 after a disruption.", P], 0),
        ([S, P, R, "CRASHED", "Retry 1 of 3 after a crash", P], 0),
        ([S, P, R, S, R, S, R], 0),  # the process retries its flow
        ([S, P, R, "PAUSED", S, P], 0),
        ([S, P, R, S, P, R, S, P, R, F, S, P], 0),  # a person retries the run
        ([S, P, R, S, P, F, S, P, R, S, P], 1),
        ([P], 0),
    ],
)
def test_own_schedules_are_counted_from_the_states(states: list[str], count: int) -> None:
    listed = [
        {
            "type": S if state[1].islower() else state,
            "name": "Late" if state == "Late" else state.title(),
            "message": state if state.startswith("Retry") else None,
        }
        for state in states
    ]
    assert count_own_schedules(listed) == count


def test_client_sends_the_user_and_the_custom_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy requires a header, and sends none in its response, not even the date."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_known = self.headers["X-Team"] == "data" and self.headers["Authorization"] == "Basic dTpw"
            self.send_response_only(200 if is_known else 403)
            self.end_headers()
            self.wfile.write(json.dumps({"labels": {f"{FENCED_LABEL_PREFIX}job": True}}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", "u:p")
        client = RunClient(url, "run", "job")
        with pytest.raises(HTTPError):
            client.read_run()
        monkeypatch.setenv("PREFECT_CLIENT_CUSTOM_HEADERS", '{"X-Team": "data"}')
        assert client.is_fenced(client.read_run())
        assert not RunClient(url, "run", "other").is_fenced(client.read_run())
        server.shutdown()


def test_sigterm_does_not_end_the_supervisor_before_its_command(tmp_path: Path) -> None:
    """tini sends both the signal, and the command decides how to end."""
    command = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); "
        "time.sleep(600)"
    )
    env = {"TERMINATION_MESSAGE_PATH": str(tmp_path / "message")}
    with subprocess.Popen(
        [*SUPERVISOR, sys.executable, "-c", command], env=env, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"up\n"
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert process.poll() is None, "the supervisor waits for its command"
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            subprocess.run(["kill", "-TERM", *children], check=True)
            assert process.wait(60) == 7
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
