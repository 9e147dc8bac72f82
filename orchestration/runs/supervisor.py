"""What a run's container executes its command by: it says at the end how much memory was used, and whether for want of
memory something was killed; and it ends what goes on elsewhere.

    python -I -S /app/orchestration/runs/supervisor.py prefect flow-run execute

That command, which a worker asks for by itself, is executed by `orchestration.runs.engine` in place of Prefect's three
processes, and this one supervises it: asked to end by SIGTERM, or where the run is to be cancelled, it tells the engine
why, and when that has ended it says what becomes of the run: Cancelled, or AwaitingRetry for a worker to take it again.
Prefect's command says so first, and a next execution may begin beside one that is still cleaning up. Any other command
is executed as it is, and gets SIGTERM itself.

Where only a child of the container's first process is killed for its memory, as under cgroup v1, Kubernetes says
nothing of it. The report is the container's termination message, which outlives its log.

What the engine leaves of the concurrency slots that it held is given back by this process, or where that is killed as
well, by who reads the message.

A node that is cut off executes on while its pod is given up and its run tried again. So an execution asks the Prefect
API every `EVERY` seconds whether its Job is fenced, by a label of its run, and if it is, kills itself; the retry waits
for `STOPPED` seconds from when it was. What cannot ask cannot report either, and asks again every `SOON` seconds.

A Job's name ends with its claim (`claim_of`), which is the fencing token: nothing of a run is executed before the
Prefect API has said that the claim was not given away. So a Job whose creation was delayed until another worker had the
run executes nothing. The engine loads meanwhile, and waits for the answer.

Only what Python comes with is imported: this must cost nothing.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:  # a Job's command runs this file with -I, by which Python adds no folder of ours to the path
    sys.path.append(str(Path(__file__).parents[2]))

from orchestration import prefect_protocol
from orchestration.protocol import (
    CAUSE_LABEL,
    CHECK_INTERVAL_SECONDS,
    CHECK_TIMEOUT_SECONDS,
    DEADLINE_VARIABLE,
    DISRUPTION_RETRIES,
    DISRUPTIONS_LABEL,
    FENCED_LABEL_PREFIX,
    RECHECK_INTERVAL_SECONDS,
    is_given_away,
    whole_number,
)

COMMAND = ["prefect", "flow-run", "execute"]


BEGIN_SECONDS = 240.0
"""How long an execution that has not begun asks an API that does not answer whether it may."""

GATE = "EXECUTION_GATE"
"""Variable with the file descriptor from which the engine reads a byte once it may begin."""

LAST_WORDS = 5.0
"""Seconds of a pod's grace period that are left, when what does not end by itself is killed, to say so."""

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
    """Return the bytes of memory used at most (`peak`) and allowed (`limit`), and the processes killed for it."""
    found = {}
    for name, files in (("peak", PEAKS), ("limit", LIMITS)):
        text = _first(files, root)
        if text.isdigit() and int(text) < 2**60:  # more is no limit
            found[name] = int(text)
    kills = dict(line.split()[:2] for line in _first(KILLS, root).splitlines() if len(line.split()) >= 2)
    if kills.get("oom_kill", "").isdigit():
        found["oom_kills"] = int(kills["oom_kill"])
    return found


class Api:
    """What the Prefect API says of this execution's run.

    Args:
        url: of the API.
        run: the flow run's id.
        job: the name of this execution's Job.
    """

    def __init__(self, url: str, run: str, job: str) -> None:
        self.url = url
        self.run = f"/flow_runs/{run}"
        self.states = f"/flow_run_states/?flow_run_id={run}"
        self.job = job
        self.csrf: dict[str, str] = {}
        """Headers of a token, where the API protects itself against forged requests."""
        self.date = ""
        """When it last answered, on its clock, as HTTP has it; empty if it does not say so."""

    def ask(self, path: str = "", body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The run; or the answer to what is sent to `path` below it.

        Raises:
            Exception: it does not answer, or with what makes no sense.
        """
        return dict(json.loads(self._answer(self.run + path, body)))

    def label(self, labels: dict[str, Any]) -> None:
        """Give the run these labels."""
        self._answer(f"{self.run}/labels", labels, "PATCH")

    def disruption_retries(self, run: dict[str, Any]) -> int:
        """Return how often a run may be tried again after a disruption.

        It is a job variable of the run, else of its deployment, else of its pool.

        Raises:
            Exception: the API does not answer.
        """
        from urllib.parse import quote

        name = "disruption_retries"
        given = (run.get("job_variables") or {}).get(name)
        if given is None and (deployment := run.get("deployment_id")):
            found = json.loads(self._answer(f"/deployments/{deployment}", None))
            given = (found.get("job_variables") or {}).get(name)
        if given is None and (pool := run.get("work_pool_name")):
            template = json.loads(self._answer(f"/work_pools/{quote(pool, safe='')}", None))["base_job_template"]
            given = template.get("variables", {}).get("properties", {}).get(name, {}).get("default")
        try:
            return DISRUPTION_RETRIES if given is None else int(given)
        except (TypeError, ValueError, OverflowError):
            return DISRUPTION_RETRIES

    def give_back(self, leases: list[str]) -> list[str]:
        """End leases of concurrency slots; those that are left because it does not answer."""
        for number, lease in enumerate(leases):
            try:
                self._answer("/v2/concurrency_limits/decrement-with-lease", {"lease_id": lease})
            except Exception:  # whatever it is, somebody else may do it
                return leases[number:]
        return []

    def _answer(self, path: str, body: dict[str, Any] | None, method: str | None = None) -> bytes:
        from urllib.error import HTTPError  # the command does not wait for it

        try:
            return self._request(path, body, method)
        except HTTPError as error:
            if not (body and error.code == 403 and b"CSRF token" in error.read()):
                raise
        client = os.urandom(16).hex()
        token = json.loads(self._request(f"/csrf-token?client={client}", None))["token"]
        self.csrf = {"Prefect-Csrf-Token": token, "Prefect-Csrf-Client": client}
        return self._request(path, body, method)

    def _request(self, path: str, body: dict[str, Any] | None, method: str | None = None) -> bytes:
        # The command does not wait for these.
        import base64
        import ssl
        from urllib.request import Request, urlopen

        headers = json.loads(os.environ.get("PREFECT_CLIENT_CUSTOM_HEADERS") or "{}") | self.csrf
        headers["Content-Type"] = "application/json"
        if password := os.environ.get("PREFECT_API_AUTH_STRING"):
            headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
        if key := os.environ.get("PREFECT_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        context = None
        if self.url.startswith("https:"):
            context = ssl.create_default_context(cafile=os.environ.get("PREFECT_API_SSL_CERT_FILE"))
            if os.environ.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "").lower() in ("1", "true"):
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        data = json.dumps(body).encode() if body else None
        # It is the API that the run reports to.
        request = Request(self.url + path, data, headers, method=method)  # noqa: S310
        with urlopen(request, timeout=CHECK_TIMEOUT_SECONDS, context=context) as answer:  # noqa: S310
            self.date = answer.headers["Date"] or ""
            return bytes(answer.read())

    def is_fenced(self, run: dict[str, Any]) -> bool:
        """Whether this execution was given up, as the run says."""
        return bool((run.get("labels") or {}).get(FENCED_LABEL_PREFIX + self.job))

    def may_begin(self) -> bool:
        """Wait for the answer whether this execution may begin: its Job is not fenced, its claim not given away.

        Raises:
            TimeoutError: the API has not answered for `BEGIN_SECONDS`.
        """
        deadline = time.monotonic() + BEGIN_SECONDS
        while True:
            try:
                return not self.is_fenced(self.ask()) and not self.is_given_away()
            except Exception as error:
                if _refused(error):  # as what is executed will be
                    return True
                if time.monotonic() > deadline:
                    raise TimeoutError(f"The Prefect API at {self.url} does not answer: {error}") from None
                time.sleep(RECHECK_INTERVAL_SECONDS)

    def is_given_away(self) -> bool:
        """Return whether the Job's claim of the run is over.

        Raises:
            Exception: as of `ask`.
        """
        return is_given_away(self.job, json.loads(self._answer(self.states, None)))

    def is_mine(self, run: dict[str, Any]) -> bool:
        """Whether the run goes on in no other Job than this execution's, as far as its workers have recorded."""
        recorded = str(run.get("infrastructure_pid") or "")
        return not recorded or recorded.endswith(f":{self.job}")

    def runs(self) -> Iterator[dict[str, Any]]:
        """The run, again and again."""
        pause = CHECK_INTERVAL_SECONDS
        while True:
            time.sleep(pause)
            try:
                run, pause = self.ask(), CHECK_INTERVAL_SECONDS
            except Exception as error:  # whatever it is, the next question may be answered
                # What is refused is refused again.
                pause = CHECK_INTERVAL_SECONDS if _refused(error) else RECHECK_INTERVAL_SECONDS
                continue
            yield run


def _refused(error: Exception) -> bool:
    """Whether it is an HTTP error, which has a code, of the client's."""
    return getattr(error, "code", 500) < 500


def _give_up(job: str) -> None:
    """Kill this process's group."""
    print(f"Job {job} was given up, and its run goes on elsewhere: this execution ends.", flush=True)
    write({"fenced": 1})
    os.killpg(0, signal.SIGKILL)


def _stop_when_fenced(api: Api) -> None:
    for run in api.runs():
        if api.is_fenced(run):
            _give_up(api.job)


def write(message: dict[str, Any]) -> None:
    """Leave that message, in place of what was left before."""
    try:
        MESSAGE.write_text(json.dumps(message))
    except OSError as error:
        print(f"{MESSAGE} cannot be written to: {error}", file=sys.stderr)


def _leases() -> list[str]:
    """What the engine holds, as it has left it."""
    try:
        return list(json.loads(MESSAGE.read_text())["leases"])
    except (OSError, ValueError, LookupError, TypeError):
        return []


class Engine:
    """`orchestration.runs.engine`, in a process group of its own with what it starts.

    While its flow can be interrupted it is connected to a port of this process, and learns from a byte why it is about
    to get SIGTERM; from the signal alone it would say that it has crashed. The messages are those of
    `orchestration.prefect_protocol`.
    """

    def __init__(self) -> None:
        self._connection: socket.socket | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._token = os.urandom(16).hex()
        read, self._gate = os.pipe()
        where = {
            prefect_protocol.CONTROL_PORT_VARIABLE: str(self._listener.getsockname()[1]),
            prefect_protocol.CONTROL_TOKEN_VARIABLE: self._token,
            GATE: str(read),
        }
        # Not from the folder that it starts in, where a user may have a package of that name.
        command = [sys.executable, "-P", "-m", "orchestration.runs.engine"]
        self.process = subprocess.Popen(command, env=os.environ | where, start_new_session=True, pass_fds=[read])
        os.close(read)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with contextlib.suppress(OSError):
                connection.settimeout(CHECK_TIMEOUT_SECONDS)
                if connection.makefile("rb", 0).readline().strip() == self._token.encode():
                    # It offers to say how it ended, and at its end it would wait to hear that nobody asks.
                    connection.sendall(prefect_protocol.NO_RECEIPTS)
                    self._connection = connection
                    return
            connection.close()

    def begin(self) -> None:
        """Let it execute the run."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._gate, b"b")

    def warned(self, why: bytes, patience: float) -> bool:
        """Tell it why it will get SIGTERM; whether it may get that. What has not begun, or does not answer, may not.

        Args:
            why: it ends.
            patience: seconds for its answer. A flow that holds Python's lock, as in a library's C code, delays that.
        """
        if not self._connection:
            return False
        try:
            self._connection.settimeout(max(patience, RECHECK_INTERVAL_SECONDS))
            self._connection.sendall(why)
            while said := self._connection.recv(64):
                if said.endswith(prefect_protocol.ACKNOWLEDGED):
                    return True
        except TimeoutError:
            return False
        except OSError:
            pass
        # It has hung up: its flow hears signals by a handler of its own, or is over.
        return True

    def kill(self, number: signal.Signals) -> None:
        """Send it a signal, and what it started."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.returncode is None:
                os.killpg(self.process.pid, number)


class Supervisor:
    """Of an engine: it ends it when asked to, and then says what becomes of its run."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._asked = threading.Event()
        self._cancelling = False
        self._fenced = False
        # What Prefect's worker says of a Job that Kubernetes does not try again, and of one that it does.
        self._after = os.environ.get("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR", "reschedule")
        self._has_deadline = bool(os.environ.get(DEADLINE_VARIABLE))
        self._counted: tuple[int, int] | None = None
        grace = float(os.environ.get("GRACE_SECONDS") or 30)
        self._patience = max(grace - LAST_WORDS, grace / 2)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._asked.set())
        self._engine = Engine()

    def run(self) -> int:
        """Wait for the end; the exit status."""
        for each in (self._watch, self._end):
            threading.Thread(target=each, daemon=True).start()
        code = self._engine.process.wait()
        if held := _leases():
            write({"leases": self._api.give_back(held)})
        if self._fenced:
            _give_up(self._api.job)
        # One that is cancelled in its last moments ends by itself, and is refused what it says of that.
        return self._conclude(code) if self._asked.is_set() or self._state() == "CANCELLING" else code

    def _watch(self) -> None:
        try:
            begins = self._api.may_begin()
        except TimeoutError as error:
            print(f"{error}. The run has not begun, and this execution ends.", flush=True)
            self._engine.kill(signal.SIGKILL)
            return
        if not begins:
            self._fenced = True
            self._engine.kill(signal.SIGKILL)
            return
        self._engine.begin()
        for run in self._api.runs():
            if self._api.is_fenced(run):
                self._fenced = True
                self._engine.kill(signal.SIGKILL)
            if run.get("state_type") == "CANCELLING":
                self._cancelling = True
                self._asked.set()

    def _end(self) -> None:
        self._asked.wait()
        deadline = time.monotonic() + self._patience
        after = {"reschedule": prefect_protocol.RESCHEDULE, "relinquish": prefect_protocol.RELINQUISH}.get(
            self._after, b""
        )
        why = prefect_protocol.CANCEL if self._state() == "CANCELLING" or self._cancelling else after
        if why and not self._engine.warned(why, deadline - time.monotonic()):
            self._engine.kill(signal.SIGKILL)
        elif self._state() in ("PENDING", "RUNNING", "CANCELLING", ""):  # else it is about to end
            self._engine.kill(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._engine.process.wait(max(deadline - time.monotonic(), 0))
            self._engine.kill(signal.SIGKILL)

    def _state(self) -> str:
        """What the run is; empty if nobody answers."""
        with contextlib.suppress(Exception):
            return str(self._api.ask()["state_type"])
        return ""

    def _conclude(self, code: int) -> int:
        """Say what becomes of the run, unless that is said or it goes on elsewhere; the exit status."""
        from email.utils import parsedate_to_datetime

        while True:
            try:
                run = self._api.ask()
                state = run["state_type"]
                if self._api.is_fenced(run):
                    _give_up(self._api.job)
                if not self._api.is_mine(run):
                    return 0
                if state in ("PENDING", "RUNNING", "CANCELLING") and self._api.is_given_away():
                    _give_up(self._api.job)
                if state == "CANCELLING":
                    self._api.ask("/set_state", {"state": {"type": "CANCELLED"}})
                elif state in ("PENDING", "RUNNING") and self._after == "relinquish":
                    return code or 1  # by which Kubernetes tries it again
                elif state in ("PENDING", "RUNNING") and self._after == "reschedule":
                    if self._has_deadline:
                        return code or 1  # the reconciler knows if it has passed, after which nothing is tried again
                    number, budget = self._count(run)
                    # By this clock, which may be wrong, only where the other is not known.
                    now = parsedate_to_datetime(self._api.date) if self._api.date else datetime.now(UTC)
                    self._api.ask("/set_state", {"state": after_sigterm(number, budget, now)})
                    return 0
                return code
            except Exception as error:  # as long as the pod's grace period lasts
                if _refused(error):
                    return code
                time.sleep(RECHECK_INTERVAL_SECONDS)

    def _count(self, run: dict[str, Any]) -> tuple[int, int]:
        """Draw on the budget for disruptions, once: which retry this is, and of how many."""
        if self._counted is None:
            budget = self._api.disruption_retries(run)
            number = whole_number((run.get("labels") or {}).get(DISRUPTIONS_LABEL)) + 1
            self._api.label({DISRUPTIONS_LABEL: number} if number <= budget else {CAUSE_LABEL: "disruption"})
            self._counted = number, budget
        return self._counted


def after_sigterm(number: int, budget: int, now: datetime) -> dict[str, Any]:
    """Return the state of a run whose pod was asked to end.

    Args:
        number: which retry after a disruption this one would be, from 1 on.
        budget: how many there are.
        now: on the clock of the Prefect API.
    """
    asked = "Its pod was asked to end."
    if number > budget:
        message = f"No retry: all {budget} after a disruption are used up. {asked}"
        return {"type": "CRASHED", "name": "Crashed", "message": message}
    message = f"Retry {number} of {budget} after a disruption. {asked}"
    details = {"scheduled_time": now.isoformat()}
    return {"type": "SCHEDULED", "name": "AwaitingRetry", "message": message, "state_details": details}


def main(command: list[str]) -> int:
    """Run the command to its end; its exit status, 128 and the signal's number if one ended it."""
    found = [
        os.environ.get(name, "")
        for name in ("PREFECT_API_URL", prefect_protocol.FLOW_RUN_ID_VARIABLE, "KUBERNETES_JOB")
    ]
    api = Api(*found) if all(found) else None
    if api and command == COMMAND:
        code = Supervisor(api).run()
    else:
        # tini sends it to the whole group, so the command has its own; this process sees how that ends.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        if api:
            try:
                begins = api.may_begin()
            except TimeoutError as error:
                print(f"{error}. The run has not begun, and this execution ends.", flush=True)
                return 1
            if not begins:
                _give_up(api.job)
            threading.Thread(target=_stop_when_fenced, args=[api], daemon=True).start()
        code = subprocess.call(command)
    left = _leases()
    write(report() | ({"leases": left} if left else {}))
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
