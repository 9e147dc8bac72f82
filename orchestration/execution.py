"""What a run's container executes its command by: it says at the end how much memory was used, and whether for want of
memory something was killed.

    python -I -S /app/orchestration/execution.py prefect flow-run execute

Where only a child of the container's first process is killed for its memory, as under cgroup v1, Kubernetes says
nothing of it. The report is the container's termination message, which outlives its log. Only what Python comes with is
imported: this must cost nothing.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

MESSAGE = Path(os.environ.get("TERMINATION_MESSAGE_PATH", "/dev/termination-log"))

PEAKS = ("memory.peak", "memory/memory.max_usage_in_bytes")
LIMITS = ("memory.max", "memory/memory.limit_in_bytes")
KILLS = ("memory.events", "memory/memory.oom_control")
"""Files below /sys/fs/cgroup, of version 2 and of version 1."""


def _first(names: tuple[str, ...], root: Path) -> str:
    for name in names:
        try:
            return (root / name).read_text().strip()
        except OSError:
            continue
    return ""


def report(root: Path = Path("/sys/fs/cgroup")) -> dict[str, int]:
    """Bytes of memory at the most (`peak`) and allowed (`limit`), and how many processes were killed for it."""
    found = {}
    for name, files in (("peak", PEAKS), ("limit", LIMITS)):
        text = _first(files, root)
        if text.isdigit() and int(text) < 2**60:  # more is no limit
            found[name] = int(text)
    kills = dict(line.split()[:2] for line in _first(KILLS, root).splitlines() if len(line.split()) >= 2)
    if kills.get("oom_kill", "").isdigit():
        found["oom_kills"] = int(kills["oom_kill"])
    return found


def main(command: list[str]) -> int:
    """Run the command to its end; its exit status, 128 and the signal's number if one ended it."""
    # tini sends it to the whole group, so the command has its own; this process sees how that ends.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    code = subprocess.call(command)
    try:
        MESSAGE.write_text(json.dumps(report()))
    except OSError as error:
        print(f"{MESSAGE} cannot be written to: {error}", file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
