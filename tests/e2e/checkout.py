"""A checkout of a person's own, from which an environment is deployed by make."""

import json
import os
import subprocess
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from orchestration.operations.environment import Environment
from tests.parts import wait_until

MAKE = ("make", "--silent", "--old-file", ".venv/ready")
"""With this checkout's environment as it is: its packages are the same, its code comes from the working directory."""

DAILY = "dbt-pipeline/dbt-pipeline-daily"

CRON = f"0 {(datetime.now(ZoneInfo('America/New_York')).hour + 12) % 24} * * *"
"""When the copy's daily run is due: half a day from now, as one of the schedule's own would be among those of tests."""


@dataclass(frozen=True)
class Checkout:
    """A copy of this checkout, committed, that tests may change, and the environment that it deploys to."""

    folder: Path
    target: Environment

    def make(self, *arguments: str, status: int = 0, **variables: str) -> str:
        """Run make in the copy on the environment; what it printed on both streams."""
        named = {"KUBE_CONTEXT": self.target.context, "NAMESPACE": self.target.namespace} | variables
        done = subprocess.run(
            [*MAKE, *arguments, *(f"{name}={value}" for name, value in named.items())],
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def steady(self, env: str = "local") -> dict[str, Any]:
        """What `make status` finds, once all is ready: on a busy node a probe may have been answered late."""

        def found() -> dict[str, Any] | None:
            output = self.make("status", ENV=env, JSON="1")
            shown: dict[str, Any] = json.loads(output[output.index("{") :])
            ready = all(each["ready"] == each["wanted"] for each in shown["components"])
            return shown if ready and not shown["problems"] else None

        status: dict[str, Any] = wait_until(found, "all to be ready", 90)
        return status

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace a text in one of the copy's files."""
        text = (self.folder / path).read_text()
        assert old in text
        (self.folder / path).write_text(text.replace(old, new, 1))


def environment() -> dict[str, str]:
    """The process' environment without what the tests set for themselves."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
