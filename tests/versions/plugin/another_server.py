"""Plugin of pytest: run the tests' Prefect server by the interpreter `SERVER_PYTHON`, with version `SERVER_VERSION`.

The plugin is outside the package `tests`, so that the tests of an older checkout can load it, too.
"""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest


@contextlib.contextmanager
def another_server(home: Path, **_: str) -> Iterator[str]:
    """Run a server of the other version with its state in `home`, and yield the URL of its API.

    The server makes its own database: this version's schema is not its own.
    """
    from tests import parts

    port = parts.free_port()
    url = f"http://127.0.0.1:{port}/api"
    command = [os.environ["SERVER_PYTHON"], "-m", "prefect", "server", "start", "--port", str(port)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PREFECT_HOME": str(home), "PYTHONTZPATH": ""}
    with (home / "server.log").open("a") as log:
        server = subprocess.Popen(command, env=variables, cwd=home, stdout=log, stderr=subprocess.STDOUT)
        try:
            parts.wait_until(lambda: parts.answers(f"{url}/health"), f"a Prefect server; see {home}/server.log", 180)
            with urlopen(f"{url}/admin/version", timeout=30) as response:  # noqa: S310 - of this machine
                assert json.load(response) == os.environ["SERVER_VERSION"]
            yield url
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def pytest_configure(config: pytest.Config) -> None:
    """Replace the server of `tests.parts`."""
    from tests import parts

    parts.prefect_server = another_server
