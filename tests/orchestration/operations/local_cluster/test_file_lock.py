"""Turns at what the machine has once."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.settings import ROOT


def _begin(file: Path, *, shared: bool = False) -> threading.Event:
    """Ask for a turn beside the test; what is returned is set when it is given."""
    given = threading.Event()

    def take() -> None:
        with hold_lock(file, shared=shared):
            given.set()

    threading.Thread(target=take, daemon=True).start()
    return given


@pytest.mark.parametrize(
    ("mine", "theirs", "waits"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
    ids=lambda value: str(value),
)
def test_who_waits_for_whom(tmp_path: Path, mine: bool, theirs: bool, waits: bool) -> None:
    file = tmp_path / "made" / "lock"
    with hold_lock(file, shared=mine):
        given = _begin(file, shared=theirs)
        assert given.wait(0.3 if waits else 10) is not waits
    assert given.wait(10)


def test_a_process_that_is_killed_gives_its_turn_back(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from orchestration.operations.local_cluster.file_lock import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "mine\n"
        given = _begin(file)
        assert not given.wait(0.3)
        holder.kill()
    assert given.wait(10)
