"""A checkout of a person's own, from which an environment is deployed by make."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from orchestration.environment.target import Environment

MAKE = ("make", "--silent", "--old-file", ".venv/ready")
"""With this checkout's environment as it is: its packages are the same, its code comes from the working directory."""

DAILY = "dbt-pipeline/dbt-pipeline-daily"


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

    def edit(self, path: str, old: str, new: str) -> None:
        """Replace a text in one of the copy's files."""
        text = (self.folder / path).read_text()
        assert old in text
        (self.folder / path).write_text(text.replace(old, new, 1))


def environment() -> dict[str, str]:
    """The process' environment without what the tests set for themselves."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
