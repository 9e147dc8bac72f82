"""Exclusive and shared locks between threads and processes."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.settings import ROOT


def _lock_in_thread(file: Path, *, shared: bool = False) -> threading.Event:
    """Ask for the lock in a thread; return an event that is set once the thread holds it."""
    held = threading.Event()

    def take() -> None:
        with hold_lock(file, shared=shared):
            held.set()

    threading.Thread(target=take, daemon=True).start()
    return held


@pytest.mark.parametrize(
    ("mine", "theirs", "waits"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
    ids=lambda value: str(value),
)
def test_lock_waits_unless_both_holders_share_it(tmp_path: Path, mine: bool, theirs: bool, waits: bool) -> None:
    file = tmp_path / "made" / "lock"
    with hold_lock(file, shared=mine):
        held = _lock_in_thread(file, shared=theirs)
        assert held.wait(0.3 if waits else 60) is not waits
    assert held.wait(60)


def test_killed_process_releases_its_lock(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path\n"
        "from orchestration.operations.local_cluster.file_lock import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])): print('mine', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "mine\n"
        held = _lock_in_thread(file)
        assert not held.wait(0.3)
        holder.kill()
    assert held.wait(60)
