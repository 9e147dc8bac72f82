"""What a run's container says at its end of the memory it used, under both versions of cgroups."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration.execution import report
from orchestration.settings import ROOT

EXECUTION = [sys.executable, "-I", "-S", str(ROOT / "orchestration" / "execution.py")]


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (
            {"memory.peak": "1000\n", "memory.max": "2000\n", "memory.events": "low 0\noom 3\noom_kill 2\n"},
            {"peak": 1000, "limit": 2000, "oom_kills": 2},
        ),
        (
            {
                "memory/memory.max_usage_in_bytes": "1000\n",
                "memory/memory.limit_in_bytes": "9223372036854771712\n",
                "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
            },
            {"peak": 1000, "oom_kills": 1},
        ),
        ({"memory.max": "max\n"}, {}),
        ({}, {}),
    ],
    ids=["version 2", "version 1", "no limit", "none"],
)
def test_the_memory_of_a_cgroup(tmp_path: Path, files: dict[str, str], found: dict[str, int]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert report(tmp_path) == found


@pytest.mark.parametrize(
    ("command", "status"), [("exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137), ("pass", 0)]
)
def test_the_status_is_the_command_s(tmp_path: Path, command: str, status: int) -> None:
    message = tmp_path / "message"
    done = subprocess.run(
        [*EXECUTION, sys.executable, "-c", command], env={"TERMINATION_MESSAGE_PATH": str(message)}, check=False
    )
    assert done.returncode == status
    assert isinstance(json.loads(message.read_text()), dict)


def test_it_waits_for_a_command_that_ends_by_itself_after_sigterm(tmp_path: Path) -> None:
    """Both get the signal; only the command decides what it means."""
    command = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); print('up', flush=True); "
        "time.sleep(60)"
    )
    env = {"TERMINATION_MESSAGE_PATH": str(tmp_path / "message")}
    process = subprocess.Popen([*EXECUTION, sys.executable, "-c", command], env=env, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "its command has not been told yet"
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    subprocess.run(["kill", "-TERM", *children], check=True)
    assert process.wait(10) == 7
    process.stdout.close()
