"""The background services in the API's process, with SQLite and without Redis, as with `services.separate: false`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.settings import ROOT
from tests.parts import free_port, migrated_database, served, wait_until
from tests.service_faults import probe


def test_services_in_the_process_of_the_api_report_their_health(tmp_path: Path) -> None:
    shutil.copyfile(migrated_database(), tmp_path / "prefect.db")
    port, health = free_port(), free_port()
    variables = {"SERVICES_HEALTH_PORT": str(health), "PREFECT_UI_ENABLED": "false"}
    with served(tmp_path, port, sys.executable, os.environ | variables, "orchestration.server_process"):
        wait_until(lambda: probe(health, "/ready")[0] == 200, "the services to be ready", 240)
        body = wait_until(lambda: (found := probe(health, "/live"))[0] == 200 and found[1], "them to be alive")
        assert {"schedule_deployments", "EventPersister", "docket"} <= set(body["services"])

        def answering() -> bool:
            body = probe(health, "/live")[1]
            return bool(body and body["database"] == body["redis"] == "answers")

        wait_until(answering, "the database, and the memory in place of Redis, to answer")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SERVICES_HEALTH_PORT": "none"}, "SERVICES_HEALTH_PORT=none is no number above 0. "),
        pytest.param(
            {"SERVICES_HEALTH_PORT": "4201", "SERVICES_STALL_SECONDS": "0"},
            "SERVICES_STALL_SECONDS=0 is no number above 0. ",
            marks=pytest.mark.further,
        ),
        pytest.param({"SERVICES_HEALTH_PORT": "99999"}, "Cannot listen on port 99999: ", marks=pytest.mark.further),
    ],
    ids=["port", "stall", "taken"],
)
def test_wrong_variable_ends_the_start_with_its_name(variables: dict[str, str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orchestration.server_process", "version"],
        cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
