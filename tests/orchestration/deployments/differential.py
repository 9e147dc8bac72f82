"""Compare what `prefect deploy --all` and `orchestrate sync` leave on a server, field by field."""

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestration.__main__ import main
from orchestration.settings import ROOT

SERVER_FIELDS = {
    "id", "created", "updated", "created_by", "updated_by", "flow_id", "work_queue_id", "last_polled", "status",
    "labels", "deployment_id", "max_scheduled_runs",
}  # fmt: skip
"""Fields that the server sets."""

VERSION = {"version", "version_id", "version_branch", "version_info"}
"""Fields that Prefect sets from the flow's file or from git if the file of desired state has no version."""

BEGAN = datetime.now(UTC)
"""Anchors since then are the times at which the server received a schedule. Both commands take minutes."""


@dataclass
class Sides:
    """A folder with flow files and a prefect.yaml. Its owner and pool are unique on the server that all tests share."""

    folder: Path
    api: httpx.Client
    capture: pytest.CaptureFixture[str]
    owner: str
    deployer: subprocess.Popen[str]
    variables: Collection[str]

    @property
    def pool(self) -> str:
        return f"pool-{self.owner}"

    def make_pool(self) -> None:
        """Create the pool."""
        variables = {"type": "object", "properties": {"image": {"type": "string"}, "cpu": {"type": "integer"}}}
        template = {"job_configuration": {"image": "{{ image }}"}, "variables": variables}
        body = {"name": self.pool, "type": "process", "base_job_template": template}
        self.api.post("/work_pools/", json=body).raise_for_status()
        self.api.post(f"/work_pools/{self.pool}/queues", json={"name": "urgent"}).raise_for_status()

    def deploy(self) -> tuple[str, dict[str, Any]]:
        """Run `prefect deploy --all`, and return the error, if any, and the state that it leaves."""
        environment = {name: os.environ[name] for name in self.variables}
        assert self.deployer.stdin
        assert self.deployer.stdout
        self.deployer.stdin.write(json.dumps([str(self.folder), environment]) + "\n")
        self.deployer.stdin.flush()
        failed, output = json.loads(self.deployer.stdout.readline())
        skipped = "Skipping deployment configuration" in output or "Skipping." in output
        return " ".join(output.split())[-400:] if failed or skipped else "", self.state()

    def sync(self, *arguments: str) -> tuple[str, dict[str, Any]]:
        """Run `orchestrate sync`, and return the error, if any, and the state that it leaves."""
        status, output = self.run("sync", *arguments)
        return output if status else "", self.state()

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run `orchestrate`, and return its exit status and output."""
        self.capture.readouterr()
        with contextlib.chdir(self.folder):
            status = main(arguments)
        printed = self.capture.readouterr()
        return status, printed.out + printed.err

    def deployments(self) -> list[dict[str, Any]]:
        """Return the pool's deployments."""
        body = {"work_pools": {"name": {"any_": [self.pool]}}, "sort": "NAME_ASC"}
        return self.listed("deployments", body)

    def listed(self, kind: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        return list(self.api.post(f"/{kind}/filter", json=body).raise_for_status().json())

    def automations(self) -> dict[str, list[dict[str, Any]]]:
        """Return the newest automations by the id of the deployment that they run."""
        found: dict[str, list[dict[str, Any]]] = {}
        for automation in self.listed("automations", {"sort": "CREATED_DESC"}):
            found.setdefault(str(automation["actions"][0].get("deployment_id")), []).append(automation)
        return found

    def state(self) -> dict[str, Any]:
        """Return the pool's deployments with their automations, without the fields that the server sets."""
        found = {}
        deployments, automations = self.deployments(), self.automations()
        ids = sorted({deployment["flow_id"] for deployment in deployments})
        flows = {flow["id"]: flow["name"] for flow in self.listed("flows", {"flows": {"id": {"any_": ids}}})}
        for deployment in deployments:
            related = automations.get(deployment["id"], [])
            made = _plain(deployment, deployment["id"])
            made["tags"] = sorted(set(made["tags"]))
            # Without a docstring Prefect sends the text None. It sends an anchor with the offset of the file.
            made["description"] = None if made["description"] == "None" else made["description"]
            for schedule in made["schedules"]:
                if anchor := schedule["schedule"].get("anchor_date"):
                    schedule["schedule"]["anchor_date"] = _moment(anchor)
            made["schedules"] = sorted(made["schedules"], key=str)
            plain = [_plain(automation, deployment["id"]) for automation in related]
            made["automations"] = sorted(plain, key=lambda automation: automation["name"])
            found[f"{flows[deployment['flow_id']]}/{deployment['name']}"] = made
        return found

    def clear(self) -> None:
        """Delete the pool's deployments and their automations."""
        automations = self.automations()
        for deployment in self.deployments():
            for one in automations.get(deployment["id"], []):
                self.api.delete(f"/automations/{one['id']}").raise_for_status()
            self.api.delete(f"/deployments/{deployment['id']}").raise_for_status()


def _moment(anchor: str) -> str:
    """Return the time of an anchor, or "now": without an anchor a schedule begins when the server receives it."""
    found = datetime.fromisoformat(anchor)
    is_now = BEGAN - timedelta(minutes=1) < found < datetime.now(UTC) + timedelta(minutes=1)
    return "now" if is_now else found.astimezone(UTC).isoformat()


SETS = ("expect", "after", "for_each")
"""Fields of a trigger that are sets: the server lists them in any order."""


def _plain(value: Any, deployment: str) -> Any:
    if isinstance(value, dict):
        made = {key: _plain(inner, deployment) for key, inner in value.items() if key not in SERVER_FIELDS}
        return {key: sorted(inner) if key in SETS and isinstance(inner, list) else inner for key, inner in made.items()}
    if isinstance(value, list):
        return [_plain(inner, deployment) for inner in value]
    return value.replace(deployment, "ID") if isinstance(value, str) else value


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield the differences between two states."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}, key=str):
            yield from differences(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{path}[{number}]")
    elif one != other or type(one) is not type(other):
        yield f"{path}: {one!r} != {other!r}"


@contextlib.contextmanager
def deploying(url: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that runs `prefect deploy` for all cases: Prefect imports slowly and leaves connections open."""
    command = [sys.executable, "-m", "tests.orchestration.deployments.differential"]
    variables = {"PREFECT_API_URL": url, "PYTHONPATH": str(ROOT), "PREFECT_CLI_PROMPT": "false"}
    with subprocess.Popen(
        command, cwd=folder, env=os.environ | variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            assert process.stdin
            process.stdin.close()


def _serve() -> None:
    """Deploy the folder that each line names, and answer with whether that failed and with the output."""
    from prefect.cli import _app
    from prefect.cli.deploy._commands import deploy

    answers = sys.stdout
    for line in sys.stdin:
        folder, variables = json.loads(line)
        os.chdir(folder)
        os.environ.update(variables)
        failed, output = False, io.StringIO()
        _app.console.file = output
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                asyncio.run(deploy(deploy_all=True))
            except SystemExit as ended:
                failed = bool(ended.code)
        print(json.dumps([failed, output.getvalue()]), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
