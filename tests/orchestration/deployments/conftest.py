"""A project with files of desired state, and a server to sync them to."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml

from orchestration.__main__ import main
from tests.parts import client_of

FLOW = '''
from prefect import flow

@flow
def etl(day: int = 1, name: str = "x") -> None:
    """Loads a day."""

@flow
def report(title: str) -> None:
    pass
'''


@dataclass
class Project:
    """A folder with flow.py and files. Its owner and names are unique on the server that all tests share."""

    folder: Path
    api: httpx.Client
    capture: pytest.CaptureFixture[str]
    owner: str

    @property
    def pool(self) -> str:
        return f"pool-{self.owner}"

    def write(self, *deployments: dict[str, Any], file: str = "prefect.yaml", **more: Any) -> None:
        """Write a file with deployments of `etl` in the project's pool, and with other keys."""
        entries = [
            {"entrypoint": "flow.py:etl", "work_pool": {"name": self.pool}, **entry, "name": self.unique(entry["name"])}
            for entry in deployments
        ]
        document = {"name": self.owner, "work_pools": [{"name": self.pool, "type": "process"}], "deployments": entries}
        (self.folder / file).write_text(yaml.safe_dump(document | more, sort_keys=False))

    def unique(self, name: str) -> str:
        """Return a name that no other test uses."""
        return f"{name}-{self.owner}"

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run `orchestrate`, and return its exit status and output."""
        self.capture.readouterr()
        status = main(arguments)
        printed = self.capture.readouterr()
        return status, printed.out + printed.err

    def prepare(self, *arguments: str) -> None:
        """Sync what a test begins with. `sync` also checks what the sync leaves, and takes twice as long."""
        status, output = self.run("sync", *arguments)
        assert status == 0, output

    def sync(self, *arguments: str) -> str:
        """Sync, check that a plan is empty then, and return the output of the sync."""
        status, output = self.run("sync", *arguments)
        assert status == 0, output
        status, planned = self.run("plan", *arguments)
        assert status == 0, f"a change is left after the sync: {planned}"
        return output

    def clear(self) -> None:
        """Delete the deployments: each plan of a later test would read them, and the server schedules their runs."""
        which = {"deployments": {"name": {"like_": self.owner}}}
        for deployment in self.api.post("/deployments/filter", json=which).raise_for_status().json():
            self.api.delete(f"/deployments/{deployment['id']}").raise_for_status()

    def deployment(self, name: str, flow: str = "etl") -> dict[str, Any] | None:
        answer = self.api.get(f"/deployments/name/{flow}/{self.unique(name)}")
        return None if answer.status_code == 404 else dict(answer.raise_for_status().json())

    def existing(self, name: str) -> dict[str, Any]:
        found = self.deployment(name)
        assert found, f"{name} is not on the server"
        return found

    def runs(self, name: str) -> list[dict[str, Any]]:
        """Return the runs of a deployment by due time."""
        which = {"deployments": {"id": {"any_": [self.existing(name)["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
        return list(self.api.post("/flow_runs/filter", json=which).raise_for_status().json())

    def start(self, name: str, state: str = "RUNNING") -> str:
        """Create a run in a state, and return its id."""
        path = f"/deployments/{self.existing(name)['id']}/create_flow_run"
        run = str(self.api.post(path, json={}).raise_for_status().json()["id"])
        self.state(run, state)
        return run

    def state(self, run: str, state: str) -> None:
        body = {"state": {"type": state}, "force": True}
        self.api.post(f"/flow_runs/{run}/set_state", json=body).raise_for_status()


@pytest.fixture
def project(
    tmp_path: Path, prefect_server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flow.py").write_text(FLOW)
    with client_of(prefect_server) as api:
        made = Project(tmp_path, api, capsys, f"o{os.getpid()}{uuid4().hex[:6]}")
        yield made
        made.clear()
