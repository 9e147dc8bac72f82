"""What a run's container executes its command by: it says at the end how much memory was used, and whether for want of
memory something was killed; and it ends what goes on elsewhere.

    python -I -S /app/orchestration/execution.py prefect flow-run execute

Where only a child of the container's first process is killed for its memory, as under cgroup v1, Kubernetes says
nothing of it. The report is the container's termination message, which outlives its log.

A node that is cut off executes on while its pod is given up and its run tried again. So an execution asks the Prefect
API every `EVERY` seconds whether its Job is fenced, by a label of its run, and if it is, kills itself; the retry waits
for `STOPPED` seconds from when it was. What cannot ask cannot report either, and asks again every `SOON` seconds.

Only what Python comes with is imported: this must cost nothing.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

FENCED = "reconciler.fenced."
"""The label of a run, before a Job's name, that says that this Job's execution was given up."""

EVERY, SOON, TIMEOUT = 15.0, 3.0, 5.0
"""Seconds from one question to the next, to the next after one that was not answered, and for an answer."""

STOPPED = EVERY + 2 * TIMEOUT
"""Seconds after which whatever can ask has stopped."""

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


def is_fenced(api: str, run: str, job: str) -> bool:
    """Ask the Prefect API whether this execution was given up.

    Args:
        api: its URL.
        run: the flow run's id.
        job: the name of this execution's Job.

    Raises:
        Exception: it does not answer, or with what makes no sense.
    """
    # The command does not wait for these.
    import base64
    import ssl
    from urllib.request import Request, urlopen

    headers = {}
    if password := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
    if key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    context = None
    if api.startswith("https:"):
        context = ssl.create_default_context(cafile=os.environ.get("PREFECT_API_SSL_CERT_FILE"))
        if os.environ.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "").lower() in ("1", "true"):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = Request(f"{api}/flow_runs/{run}", headers=headers)  # noqa: S310 - the API that the run reports to
    with urlopen(request, timeout=TIMEOUT, context=context) as answer:  # noqa: S310
        labels = json.load(answer).get("labels") or {}
    return bool(labels.get(FENCED + job))


def stop_when_fenced(api: str, run: str, job: str) -> None:
    """Kill this process's group once its execution is given up."""
    pause = EVERY
    while True:
        time.sleep(pause)
        try:
            fenced, pause = is_fenced(api, run, job), EVERY
        except Exception:  # whatever it is, the next question may be answered
            fenced, pause = False, SOON
        if fenced:
            print(f"Job {job} was given up, and its run goes on elsewhere: this execution ends.", flush=True)
            _write({"fenced": 1})
            os.killpg(0, signal.SIGKILL)


def _write(message: dict[str, int]) -> None:
    try:
        MESSAGE.write_text(json.dumps(message))
    except OSError as error:
        print(f"{MESSAGE} cannot be written to: {error}", file=sys.stderr)


def main(command: list[str]) -> int:
    """Run the command to its end; its exit status, 128 and the signal's number if one ended it."""
    # tini sends it to the whole group, so the command has its own; this process sees how that ends.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    asked = [os.environ.get(name, "") for name in ("PREFECT_API_URL", "PREFECT__FLOW_RUN_ID", "KUBERNETES_JOB")]
    if all(asked):
        threading.Thread(target=stop_when_fenced, args=asked, daemon=True).start()
    code = subprocess.call(command)
    _write(report())
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
