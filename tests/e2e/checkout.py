"""A copy of this checkout, from which tests deploy an environment by make."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from orchestration.operations.environment import Environment
from tests.parts import wait_until

MAKE = ("make", "--silent", "--old-file", ".venv/ready")
"""Use this checkout's virtual environment unchanged: its packages are the same, and the code comes from the working
directory."""

TOOLS_ON_PATH = "WITH_TOOLS="
"""Have make not look for kubectl and helm, a Python process for each target: the fixture `cluster` has put their
folders on PATH."""

DAILY = "dbt-pipeline/dbt-pipeline-daily"

SHIPPED_CRON = "0 6 * * *"
"""The schedule of the daily deployment in prefect.yaml, in New York's time."""

_HOUR = datetime.now(ZoneInfo("America/New_York")).hour

CRON = f"0 {_HOUR + 12} * * *" if 3 <= _HOUR <= 6 else SHIPPED_CRON
"""The schedule of the copy's daily deployment, by which no run starts during the tests. In most hours it is that of the
checkout: with another prefect.yaml the copy would need another image."""


@dataclass(frozen=True)
class Checkout:
    """A committed copy of this checkout that tests may change, and the environment that it deploys to."""

    folder: Path
    target: Environment

    def make(self, *arguments: str, status: int = 0, **variables: str) -> str:
        """Run make in the copy and return what it printed on both streams. Only `make up` looks for kubectl and helm.

        Args:
            arguments: the target, and further arguments of make.
            status: the expected exit status.
            variables: make variables; by default KUBE_CONTEXT and NAMESPACE name the environment.
        """
        command = MAKE if "up" in arguments else (*MAKE, TOOLS_ON_PATH)
        named = {"KUBE_CONTEXT": self.target.context, "NAMESPACE": self.target.namespace} | variables
        done = subprocess.run(
            [*command, *arguments, *(f"{name}={value}" for name, value in named.items())],
            cwd=self.folder,
            env=environment_without_prefect(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def wait_until_ready(self, env: str = "local") -> dict[str, Any]:
        """Wait until `make status` reports all components as ready, and return its JSON.

        A probe may be late on a busy node, so one look is not enough.
        """

        def read_if_ready() -> dict[str, Any] | None:
            output = self.make("status", ENV=env, JSON="1")
            read: dict[str, Any] = json.loads(output[output.index("{") :])
            ready = all(component["ready"] == component["wanted"] for component in read["components"])
            return read if ready and not read["problems"] else None

        status: dict[str, Any] = wait_until(read_if_ready, "all components to be ready", 300)
        return status

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace the first occurrence of a text in one of the copy's files."""
        text = (self.folder / path).read_text()
        assert old in text
        (self.folder / path).write_text(text.replace(old, new, 1))

    def commit(self) -> None:
        """Commit all changes of the copy."""
        identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
        for command in (["add", "-A"], [*identity, "commit", "-qm", "A change"]):
            subprocess.run(["git", *command], cwd=self.folder, check=True)

    @contextlib.contextmanager
    def restored(self, path: str) -> Iterator[Path]:
        """Yield one of the copy's files, which the block may change, and restore its content afterwards."""
        file = self.folder / path
        content = file.read_bytes()
        try:
            yield file
        finally:
            file.write_bytes(content)


def environment_without_prefect() -> dict[str, str]:
    """Return the process's environment variables without the PREFECT_ ones, which tests set for themselves."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
