"""`orchestrate watch` as a process with a real server: what it reports, and that it survives failures."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestration.deployments import watch
from orchestration.deployments.record import slug
from orchestration.errors import ApiError
from orchestration.settings import ROOT
from tests.orchestration.deployments.conftest import Project
from tests.parts import free_port, prefect_server, wait_until

DAILY = {"cron": "0 6 * * *", "timezone": "Europe/Berlin"}


class Watcher:
    """An `orchestrate watch` process with its log."""

    def __init__(self, owner: str, api: str, folder: Path, every: str = "1") -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        self.log = folder / "watch.log"
        arguments = ["watch", "--owner", owner, "--every", every, "--port", str(port), "--wait", "60"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orchestration", *arguments],
                env=os.environ | {"PREFECT_API_URL": api, "PYTHONPATH": str(ROOT)},
                cwd=folder, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def get(self, path: str) -> str:
        """Return the body of a page, whatever its status; "" while nothing listens on the port."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + path, timeout=60).text
        return ""

    def metric(self, name: str, *labels: str) -> float | None:
        """Return the sample whose labels have these values, or None."""
        for line in self.get("/metrics").splitlines():
            if line.startswith(name + "{") and sorted(re.findall('="(.*?)"', line)) == sorted(labels):
                return float(line.rpartition(" ")[2])
        return None


@contextlib.contextmanager
def watching(owner: str, api: str, folder: Path, **options: str) -> Iterator[Watcher]:
    watcher = Watcher(owner, api, folder, **options)
    try:
        yield watcher
        watcher.process.send_signal(signal.SIGTERM)
        assert watcher.process.wait(180) == 0
    except BaseException:
        watcher.process.kill()
        watcher.process.wait()
        raise


def change(project: Project, method: str, path: str, **body: str) -> None:
    """Send a request until it succeeds: SQLite may be busy."""
    wait_until(lambda: project.api.request(method, path, json=body).is_success, f"{method} {path}")


def artifacts(project: Project) -> list[str]:
    """Return the owner's artifacts, oldest first."""
    body = {"artifacts": {"key": {"any_": [f"drift-{slug(project.owner)}"]}}, "sort": "CREATED_DESC"}
    found = project.api.post("/artifacts/filter", json=body).raise_for_status().json()
    return [artifact["data"] for artifact in reversed(found)]


def events(project: Project) -> list[dict[str, Any]]:
    """Return the owner's events, oldest first."""
    which = {"resource": {"id": [f"desired-state.{slug(project.owner)}"]}, "order": "ASC"}
    return list(project.api.post("/events/filter", json={"filter": which}).raise_for_status().json()["events"])


def test_drift_and_its_end_are_reported_once(project: Project, prefect_server: str) -> None:
    project.write({"name": "a", "schedules": [DAILY]}, variables=[{"name": project.unique("region"), "value": "eu"}])
    project.sync()
    deployment, variable = project.existing("a"), project.unique("region")
    with watching(project.owner, prefect_server, project.folder) as watcher:
        drifted = "desired_state_drifted_objects", project.owner
        wait_until(lambda: watcher.metric(*drifted, "deployment") == 0, "the first look")
        wait_until(lambda: len(artifacts(project)) == 1, "the first artifact")
        assert artifacts(project)[0].startswith("No drift since the last sync")

        change(project, "PATCH", f"/deployments/{deployment['id']}", description="By|hand")
        wait_until(lambda: watcher.metric(*drifted, "deployment") == 1, "the metric")
        assert watcher.metric(*drifted, "variable") == 0
        wait_until(lambda: len(artifacts(project)) == 2, "an artifact")
        assert f"Changed: deployment etl/{project.unique('a')}" in artifacts(project)[1]
        assert '| `` description `` | `` "Loads a day." `` | `` "By\\|hand" `` |' in artifacts(project)[1]
        [event] = wait_until(lambda: events(project), "an event")
        assert event["event"] == "desired-state.drifted"
        assert event["payload"]["objects"] == [
            {"kind": "deployment", "key": f"etl/{project.unique('a')}", "fields": ["description"]}
        ]

        change(project, "DELETE", f"/variables/name/{variable}")
        wait_until(lambda: watcher.metric(*drifted, "variable") == 1, "more drift")
        last_look = watcher.metric("desired_state_last_look_timestamp_seconds", project.owner)
        assert last_look
        wait_until(
            lambda: (watcher.metric("desired_state_last_look_timestamp_seconds", project.owner) or 0) > last_look + 2,
            "two further looks",
        )
        project.sync()
        wait_until(lambda: watcher.metric(*drifted, "deployment") == 0, "the end of the drift")
        wait_until(lambda: len(artifacts(project)) == 4, "an artifact")
        wait_until(lambda: len(events(project)) == 3, "an event")
        assert watcher.metric("desired_state_look_failures_total", project.owner) == 0
        assert "s since the last round" in watcher.get("/health")
        wait_until(lambda: len(watcher.log.read_text().splitlines()) >= 4, "the last log line")
    assert artifacts(project)[3].startswith("No drift since the last sync")
    assert [event["event"].partition(".")[2] for event in events(project)] == ["drifted", "drifted", "restored"]
    lines = [re.sub(r"^\d\S+Z ", "", line) for line in watcher.log.read_text().splitlines()]
    assert lines == [
        f"INFO {project.owner}: no drift since the last sync.",
        f"WARNING {project.owner}: 1 changed since the last sync: deployment etl/{project.unique('a')} (description)",
        f"WARNING {project.owner}: 2 changed since the last sync: deployment etl/{project.unique('a')} (description), "
        f"variable {variable} (deleted)",
        f"INFO {project.owner}: no drift since the last sync.",
    ]


@pytest.mark.further
def test_drift_that_ended_without_a_watcher_is_reported_by_the_next(project: Project, prefect_server: str) -> None:
    project.write({"name": "a"})
    project.sync()
    change(project, "PATCH", f"/deployments/{project.existing('a')['id']}", description="x")
    with watching(project.owner, prefect_server, project.folder):
        wait_until(lambda: len(artifacts(project)) == 1, "an artifact")
    with watching(project.owner, prefect_server, project.folder):
        wait_until(lambda: len(artifacts(project)) == 2, "an artifact for the same drift")
    project.sync()
    with watching(project.owner, prefect_server, project.folder):
        wait_until(lambda: len(artifacts(project)) == 3, "an artifact")
        wait_until(lambda: len(events(project)) == 2, "events")
    assert [event["event"].partition(".")[2] for event in events(project)] == ["drifted", "restored"]


@pytest.mark.further
def test_watcher_waits_for_the_first_sync(project: Project, prefect_server: str) -> None:
    with watching(project.owner, prefect_server, project.folder) as watcher:
        failures = "desired_state_look_failures_total", project.owner
        wait_until(lambda: (watcher.metric(*failures) or 0) >= 2, "looks that fail")
        assert watcher.metric("desired_state_drifted_objects", project.owner, "deployment") is None, "no look succeeded"
        assert "never synced" in watcher.get("/health")
        other = project.unique("other")
        project.write(name=other, work_pools=[], variables=[{"name": project.unique("region"), "value": "eu"}])
        project.sync()
        wait_until(lambda: other in watcher.get("/health"), "a failure that names the other owner")
        project.write({"name": "a"})
        project.sync()
        wait_until(lambda: artifacts(project), "a look")
        again = f"{project.owner}: drift checks succeed again."
        wait_until(lambda: again in watcher.log.read_text(), "the end of the failure in the log")
    assert watcher.log.read_text().count("has never synced to") == 1


def test_watcher_survives_an_unreachable_server(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with prefect_server(tmp_path) as url:
            watcher = stack.enter_context(watching("absent-owner", url, tmp_path))
            wait_until(lambda: "never synced" in watcher.log.read_text(), "the first failure")
        wait_until(lambda: "does not answer" in watcher.log.read_text(), "the unreachable server in the log")
        failures = watcher.metric("desired_state_look_failures_total", "absent-owner") or 0
        wait_until(
            lambda: (watcher.metric("desired_state_look_failures_total", "absent-owner") or 0) > failures + 1,
            "further looks",
        )
        assert watcher.log.read_text().count("does not answer") == 1


def test_health_fails_without_a_look_for_three_intervals() -> None:
    state = watch._State("owner", every=300)
    assert state.pulse.health()[0] == 200
    state.pulse.last -= 3 * 300 + 59
    assert state.pulse.health()[0] == 200
    state.pulse.last -= 2
    assert state.pulse.health()[0] == 503
    state.record_check([])
    assert state.pulse.health()[0] == 200


def test_failure_is_logged_once_for_each_cause(caplog: pytest.LogCaptureFixture) -> None:
    state = watch._State("owner", every=300)
    for table in ("flow", "flow", "flow_run"):
        state.record_failure(ApiError(f"The Prefect API fails (500) on POST /flows/filter: No space. Table {table}"))
    assert [record.message.partition("Table ")[2] for record in caplog.records] == [
        "flow. The next drift check tries again.",
        "flow_run. The next drift check tries again.",
    ]
    assert state.pulse.trouble.endswith("Table flow_run")


def test_wrong_option_is_refused_in_one_line(project: Project) -> None:
    status, output = project.run("watch", "--owner", "x", "--every", "0")
    assert (status, output.count("\n")) == (1, 1)
    assert " ERROR --every 0 is too short" in output
    status, output = project.run("watch", "--owner", "x", "--port", str(project.api.base_url.port))
    assert (status, output.count("\n")) == (1, 1)
    assert "Address already in use. Pass another one: --port" in output
