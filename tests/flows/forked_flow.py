"""Run a flow's command line in a fork, with dbt in another: for runs that need a process, and not a new interpreter.

`forked_flow PYTHON MODULE ARGUMENTS` runs the module, and PYTHON is the interpreter for its dbt.
"""

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from orchestration.dbt import DbtProject
from orchestration.settings import ROOT
from tests import server_forks


def run(
    python: Path, module: str, *arguments: str, variables: Mapping[str, str], folder: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    """Run a flow's module to its end; return its status and output.

    Args:
        python: the interpreter for dbt, such as `Tiny.python`.
        module: the module: `flows.example_flow`.
        arguments: its arguments.
        variables: environment variables in addition to those of this process.
        folder: the checkout whose code runs.
    """
    command = [__name__, str(python), module, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder), **variables}
    return server_forks.run(command, environment, folder, 900)


if __name__ == "__main__":
    defaults = DbtProject.__init__.__kwdefaults__
    assert defaults
    defaults["python"] = sys.argv[1]
    del sys.argv[:2]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
