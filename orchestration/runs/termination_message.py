"""The termination message of a run's container: memory use, out-of-memory kills, held leases and fencing.

Kubernetes keeps the message with the status of the pod, however the container ends, and longer than the log. The
reconciler reads it. The supervisor imports this module, which therefore imports the standard library alone.

Where only a child of the container's first process is killed for its memory, as under cgroup v1, Kubernetes reports
nothing. So the message counts the kills of the whole cgroup.
"""

import json
import os
from pathlib import Path
from typing import Any

MESSAGE_PATH = Path(os.environ.get("TERMINATION_MESSAGE_PATH", "/dev/termination-log"))

PEAK_FILES = ("memory.peak", "memory/memory.max_usage_in_bytes")
LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes")
KILL_FILES = ("memory.events", "memory/memory.oom_control")
"""Files below /sys/fs/cgroup: first that of cgroup v2, then that of v1."""


def write(message: dict[str, Any]) -> None:
    """Replace the termination message.

    Raises:
        OSError: the file cannot be written.
    """
    MESSAGE_PATH.write_text(json.dumps(message))


def read_leases() -> list[str]:
    """Return the leases of concurrency slots in the termination message, which the engine writes."""
    try:
        return list(json.loads(MESSAGE_PATH.read_text())["leases"])
    except (OSError, ValueError, LookupError, TypeError):
        return []


def memory_report(root: Path = Path("/sys/fs/cgroup")) -> dict[str, int]:
    """Return what the container's cgroup reports about memory.

    Args:
        root: the folder of the cgroup's files.

    Returns:
        The greatest use (`peak`) and the `limit`, both in bytes, and the number of processes that were killed for
        memory (`oom_kills`). What the cgroup does not report is absent.
    """
    found = {}
    for name, files in (("peak", PEAK_FILES), ("limit", LIMIT_FILES)):
        text = _read_first(files, root)
        if text.isdigit() and int(text) < 2**60:  # cgroup v1 has a greater number for no limit
            found[name] = int(text)
    kills = dict(line.split()[:2] for line in _read_first(KILL_FILES, root).splitlines() if len(line.split()) >= 2)
    if kills.get("oom_kill", "").isdigit():
        found["oom_kills"] = int(kills["oom_kill"])
    return found


def _read_first(names: tuple[str, ...], root: Path) -> str:
    """Return the text of the first file that can be read; empty if none can."""
    for name in names:
        try:
            return (root / name).read_text().strip()
        except OSError:
            continue
    return ""
