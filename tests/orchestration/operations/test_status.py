"""The screen of `make status`, with names that contain markup."""

import io

from rich.console import Console

from orchestration.operations import status
from orchestration.operations.environment import Environment


def test_status_escapes_brackets_and_newlines_in_names() -> None:
    run = {"name": "a[/]b\nc", "flow": "[red]", "state": "RUNNING", "started": None, "expected": None, "seconds": 1.0}
    found = {
        "components": [{"name": "api", "ready": 1, "wanted": 1, "image": "[bold]image"}],
        "pools": [{"name": "[/x]", "status": "READY", "workers": 1, "limit": None}],
        "runs": [run],
        "deployments": [{"name": "f/[d]", "paused": False, "last": run, "next": None}],
        "problems": ["pod [/]: waits"],
    }
    stream = io.StringIO()
    status.print_status(Environment("local", "context", "ns"), found, Console(file=stream, width=200))
    shown = stream.getvalue()
    for name in ("[bold]image", "[/x]", "a[/]b\\nc", "[red]", "f/[d]", "pod [/]: waits"):
        assert name in shown, name
