"""Kill `orchestrate sync` at random moments, run it again, and compare with an undisturbed sync.

    make test-long FOR=sync-kills KILLS=30

Two sets of files differ in everything that a sync can change. Each round begins with one set on the server, kills the
sync of the other set by SIGKILL, and repeats that sync. Then the server must have what an undisturbed sync leaves:
everything except ids and times is equal, and nothing is duplicated. No run that is scheduled or fell due meanwhile may
be missing, duplicated, or of a previous state of the files.

Runs of a previous state have one exception, which is counted and does not fail the test. With every change of a
deployment the server deletes the scheduled runs. A scheduler of the server that read the deployment before the change
and inserts after it puts runs of the old state back, whatever the client
(https://github.com/PrefectHQ/prefect/issues/17703).
"""

import contextlib
import io
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from orchestration.__main__ import main
from orchestration.deployments import schedules
from orchestration.deployments.schedules import title
from orchestration.settings import ROOT
from tests.long.longtest import Findings, Parameters
from tests.parts import prefect_server

KILLS_PER_SERVER = 8
"""Kills on one server. Its database grows by a run every three seconds, so each round takes longer."""

FLOW = """
from prefect import flow

@flow
def kills(day: int = 1) -> None:
    pass
"""

# The schedules of every few seconds reveal a run that did not exist when it fell due: the server's scheduler looks
# every five seconds and creates no runs in the past. No worker executes the runs: they become late, and must stay.
# Without DTSTART the server walks through all hours since 2020 whenever it looks: 0.14 s of its time.
FILES = {
    "a": """
name: kills
work_pools:
  - name: kills
    type: process
    concurrency_limit: 7
    queues: [{name: urgent, priority: 1}, {name: slow, priority: 3, concurrency_limit: 1}, {name: old, priority: 4}]
variables: [{name: kills_region, value: eu, tags: [a]}, {name: kills_old, value: 1}]
concurrency_limits: [{name: kills-database, limit: 5}, {name: kills-old, limit: 1}]
tag_concurrency_limits: [{tag: kills-warehouse, limit: 3}, {tag: kills-old, limit: 3}]
automations:
  - name: kills-note
    trigger: {type: event, expect: [a.b], posture: Reactive, threshold: 1, within: 0}
    actions: [{type: do-nothing}]
  - name: kills-old
    trigger: {type: event, expect: [a.b], posture: Reactive, threshold: 1, within: 0}
    actions: [{type: do-nothing}]
deployments:
  - name: seconds
    entrypoint: flow.py:kills
    work_pool: {name: kills}
    parameters: {day: 1}
    schedules:
      - {interval: 3, anchor_date: "2026-01-01T00:00:00Z"}
      - {cron: "*/10 * * * *", slug: tens}
  - name: nightly
    entrypoint: flow.py:kills
    tags: [a]
    work_pool: {name: kills, work_queue_name: slow}
    concurrency_limit: 2
    schedules:
      - {interval: 4, anchor_date: "2026-01-01T00:00:00Z"}
      - {cron: "0 6 * * *", timezone: Europe/Berlin}
      - {interval: 600}
      - {cron: "5 * * * *", slug: gone}
      - {cron: "6 * * * *", slug: gone-too}
    triggers:
      - {name: kills-files, expect: [x.y], parameters: {day: 4}}
      - {name: kills-more, expect: [x.z]}
  - name: old
    entrypoint: flow.py:kills
    work_pool: {name: kills, work_queue_name: old}
    schedules:
      - {interval: 5, anchor_date: "2026-01-01T00:00:00Z"}
      - {rrule: "DTSTART:20261101T000000\\nRRULE:FREQ=DAILY;BYHOUR=3"}
    triggers: [{name: kills-old-files, expect: [x.y]}]
""",
    "b": """
name: kills
work_pools:
  - name: kills
    type: process
    concurrency_limit: 8
    queues: [{name: slow, priority: 1}, {name: urgent, priority: 3}, {name: new, priority: 5}]
variables: [{name: kills_region, value: {us: [1, null]}}, {name: kills_new, value: 1}]
concurrency_limits: [{name: kills-database, limit: 6}, {name: kills-new, limit: 1}]
tag_concurrency_limits: [{tag: kills-warehouse, limit: 4}, {tag: kills-new, limit: 3}]
automations:
  - name: kills-note
    trigger: {type: event, expect: [a.c], posture: Reactive, threshold: 1, within: 0}
    actions: [{type: do-nothing}]
  - name: kills-new
    trigger: {type: event, expect: [a.b], posture: Reactive, threshold: 1, within: 0}
    actions: [{type: do-nothing}]
deployments:
  - name: seconds
    entrypoint: flow.py:kills
    work_pool: {name: kills}
    parameters: {day: 2}
    schedules:
      - {interval: 3, anchor_date: "2026-01-01T00:00:00Z"}
      - {cron: "*/15 * * * *", slug: tens}
  - name: nightly
    entrypoint: flow.py:kills
    tags: [b]
    work_pool: {name: kills, work_queue_name: urgent}
    concurrency_limit: 3
    schedules:
      - {interval: 4, anchor_date: "2026-01-01T00:00:00Z"}
      - {cron: "0 7 * * *", timezone: Europe/Berlin}
      - {interval: 600, parameters: {day: 3}}
      - {rrule: "DTSTART:20261101T000000\\nRRULE:FREQ=HOURLY;BYMINUTE=20", slug: new}
    triggers:
      - {name: kills-files, expect: [x.y], parameters: {day: 5}}
      - {name: kills-others, expect: [x.z]}
  - name: new
    entrypoint: flow.py:kills
    work_pool: {name: kills, work_queue_name: new}
    schedules: [{interval: 5, anchor_date: "2026-01-01T00:00:00Z"}, {interval: 1200, slug: new}]
    triggers: [{name: kills-new-files, expect: [x.y]}]
""",
}

VOLATILE_KEYS = {
    "id", "created", "updated", "created_by", "updated_by", "last_polled", "status", "serial", "begun", "anchor_date",
}  # fmt: skip
"""Keys whose values differ between two servers with the same state. `State.read` reads `begun`."""

WRITING_SHARE = 0.4
"""The share of a sync's time, at its end, in which it writes to the server. Before, it imports modules."""

KILLS_WHILE_WRITING_SHARE = 0.8
"""The share of kills that fall in that part. The other kills fall at any moment."""

CHECKED_TIMES = 20
"""How many of a schedule's next times are checked, as far as they are within `SCHEDULED_AHEAD`."""

SCHEDULED_AHEAD = timedelta(minutes=50)
"""The time for which runs must exist. The server's scheduler creates the runs of the next hour, and at least three."""

COMMAND_TIMEOUT_SECONDS = 600.0
"""Upper bound for a command that is not killed."""

SETTLING_SECONDS = 15.0
"""Seconds in which a wrong run may be corrected: the server's scheduler runs every five."""


@dataclass(frozen=True)
class State:
    """What the server has of these files, without what differs between two servers.

    Args:
        objects: the objects by kind.
        begun: changes that a sync had begun and not recorded as done.
        serial: serial of the owner's record, which each write changes.
    """

    objects: dict[str, Any]
    begun: list[Any] = field(compare=False)
    serial: str = field(compare=False)

    @classmethod
    def read(cls, api: httpx.Client) -> "State":
        """Read the state by the API alone."""
        found = {
            kind: [item for item in _read_all(api, path) if str(item["name"]).startswith(("kills", "tag:kills"))]
            for kind, path in (
                ("variables", "/variables/filter"),
                ("limits", "/v2/concurrency_limits/filter"),
                ("pools", "/work_pools/filter"),
                ("automations", "/automations/filter"),
            )
        }
        queues = _read_all(api, "/work_queues/filter")
        found["queues"] = [queue for queue in queues if queue["work_pool_name"] == "kills"]
        found["deployments"] = _read_deployments(api)
        blocks = [block["data"] for block in _read_all(api, "/block_documents/filter", include_secrets=True)]
        found["records"] = records = [data for data in blocks if data.get("owner") == "kills"]
        names = {item["id"]: item["name"] for item in [*found["pools"], *found["queues"], *found["deployments"]]}
        text = json.dumps(found)
        for id_, name in names.items():
            text = text.replace(id_, name)
        begun = [change for record in records for change in record["begun"]]
        return cls(_without_volatile(json.loads(text)), begun, "".join(record["serial"] for record in records))


def _read_all(api: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        page = api.post(path, json=body | {"limit": 200, "offset": len(found)}).raise_for_status().json()
        found += page
        if len(page) < 200:
            return found


def _read_deployments(api: httpx.Client) -> list[dict[str, Any]]:
    return _read_all(api, "/deployments/filter", flows={"name": {"any_": ["kills"]}})


def _without_volatile(value: Any) -> Any:
    """Return `value` without ids and times, and with sorted lists: the server returns them in any order."""
    if isinstance(value, dict):
        kept = {key: field for key, field in value.items() if key not in VOLATILE_KEYS}
        return {key: _without_volatile(field) for key, field in kept.items() if key != "flow_id"}
    if isinstance(value, list):
        return sorted((_without_volatile(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    return value


def find_differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Return where two states differ, one text for each place."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        return [text for key in keys for text in find_differences(found.get(key), wanted.get(key), f"{path}.{key}")]
    if isinstance(found, list) and isinstance(wanted, list):
        more = [item for item in found if found.count(item) > wanted.count(item)]
        less = [item for item in wanted if wanted.count(item) > found.count(item)]
        if len(found) != len(wanted):
            return [f"{path.lstrip('.')}: {more} in place of {less}"]
        return [text for a, b in zip(more, less, strict=True) for text in find_differences(a, b, f"{path}[]")]
    return [] if found == wanted else [f"{path.lstrip('.')}: {found} in place of {wanted}"]


@dataclass(frozen=True)
class Schedule:
    """An active schedule of a deployment on the server.

    Args:
        name: the name of the deployment, and the rule of the schedule. A schedule that is deleted and created again
            keeps its name and gets another id.
        schedule: the rule, as the API has it.
        parameters: the parameters of the schedule's runs.
    """

    name: str
    schedule: dict[str, Any]
    parameters: dict[str, Any]

    def times(self, after: datetime, number: int) -> list[datetime]:
        """Return the next times of the schedule."""
        return [moment.astimezone(UTC) for moment in schedules.next_times(self.schedule, number, after)]


def connect(url: str) -> httpx.Client:
    """Return a client of the API at `url`."""
    # The server closes a connection after five idle seconds. httpx would use the connection until then.
    return httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(keepalive_expiry=1))


def active_schedules(api: httpx.Client) -> dict[str, Schedule]:
    """Return the active schedules by id."""
    return {
        schedule["id"]: Schedule(
            f"{deployment['name']}, {title(schedules.normalize(schedule['schedule']))}",
            schedule["schedule"],
            deployment["parameters"] | schedule["parameters"],
        )
        for deployment in _read_deployments(api)
        for schedule in deployment["schedules"]
        if schedule["active"] and not deployment["paused"]
    }


@dataclass(frozen=True)
class WrongRun:
    """A run that is missing, duplicated or outdated.

    Args:
        defect: `missing`, `duplicated`, or `stale` for a run of a previous state of the files.
        schedule: the name of its schedule.
        time: the time for which it is scheduled.
    """

    defect: str
    schedule: str
    time: datetime

    def __str__(self) -> str:
        return f"{self.defect}: {self.schedule} at {self.time:%H:%M:%S}"


def find_wrong_runs(
    api: httpx.Client, before: Mapping[str, Schedule], since: datetime, done: datetime
) -> list[WrongRun]:
    """Return the runs that are missing, duplicated, or of no current schedule.

    Args:
        api: client of the server.
        before: the active schedules before the sync.
        since: the time of `before`. From then on, no run may be missing at a time that a schedule had before the sync
            and still has. A run that fell due between `since` and `done` may have the parameters of either state.
        done: the end of the sync. From then on, all runs must be those of the current schedules.
    """
    which = {"flows": {"name": {"any_": ["kills"]}}, "flow_runs": {"expected_start_time": {"after_": f"{since}"}}}
    now = active_schedules(api)
    found: dict[str, dict[datetime, dict[str, Any]]] = defaultdict(dict)
    times: Counter[tuple[str, datetime]] = Counter()
    for run in {run["id"]: run for run in _read_all(api, "/flow_runs/filter", sort="ID_DESC", **which)}.values():
        id_, time_ = run["created_by"]["id"], datetime.fromisoformat(run["expected_start_time"])
        found[id_][time_] = run["parameters"]
        schedule = now.get(id_) or before.get(id_)
        times[schedule.name if schedule else id_, time_] += 1
    wrong = [WrongRun("duplicated", name, time_) for (name, time_), number in times.items() if number > 1]
    for id_ in {*found, *now}:
        schedule, old, runs = now.get(id_), before.get(id_), found[id_]
        name = schedule.name if schedule else old.name if old else id_
        right: list[datetime] = []
        if schedule:
            passed = 1 + int((done - since).total_seconds())  # no schedule here has more than one run a second
            due = {*schedule.times(since, passed)} & {*old.times(since, passed)} if old else set()
            coming = schedule.times(done, CHECKED_TIMES)
            # The server creates at least three runs, of which one may be due by now.
            required = {moment for moment in due if moment <= done} | {
                *coming[:2],
                *(moment for moment in coming if moment <= done + SCHEDULED_AHEAD),
            }
            wrong += [WrongRun("missing", name, moment) for moment in required if moment not in runs]
            right = schedule.times(done, len(runs) + 1)
        for time_, parameters in runs.items():
            known = [source.parameters for source in (schedule, old if time_ <= done else None) if source]
            if (time_ > done and time_ not in right) or (known and parameters not in known):
                wrong.append(WrongRun("stale", name, time_))
    return sorted(wrong, key=lambda run: (run.defect, run.schedule, run.time))


def find_lasting_wrong_runs(
    api: httpx.Client, before: Mapping[str, Schedule], since: datetime, done: datetime
) -> list[WrongRun]:
    """Return the wrong runs that are still wrong after `SETTLING_SECONDS`."""
    deadline = time.monotonic() + SETTLING_SECONDS
    while (wrong := find_wrong_runs(api, before, since, done)) and time.monotonic() < deadline:
        time.sleep(2)  # a look reads all runs, and the server's scheduler looks every five seconds
    return wrong


@dataclass(frozen=True)
class Project:
    """A folder with both sets of files, and the server that they are synced to."""

    folder: Path
    api: httpx.Client

    def __post_init__(self) -> None:
        (self.folder / "flow.py").write_text(FLOW)
        for name, text in FILES.items():
            (self.folder / f"{name}.yaml").write_text(text)

    def start(self, command: str, name: str) -> "subprocess.Popen[str]":
        """Start `orchestrate plan` or `orchestrate sync` of a set of files as a process.

        Args:
            command: `plan` or `sync`.
            name: the set of files, `a` or `b`.
        """
        return subprocess.Popen(
            [sys.executable, "-m", "orchestration", command, "--prune", f"{name}.yaml"],
            cwd=self.folder,
            env=os.environ | {"PREFECT_API_URL": str(self.api.base_url).rstrip("/"), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, name: str) -> list[str]:
        """Run the command in this process, which has imported Prefect, and return its failure if it fails.

        A plan with changes fails.
        """
        from prefect.settings import PREFECT_API_URL, temporary_settings

        output = io.StringIO()
        with (
            temporary_settings({PREFECT_API_URL: str(self.api.base_url).rstrip("/")}),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            status = main([command, "--prune", f"{name}.yaml"])
        return [f"{command} of {name} ends with {status}: {output.getvalue()[-1000:]}"] if status else []

    def run_process(self, command: str, name: str) -> list[str]:
        """Run the command as a process to its end, and return its failure if it fails."""
        process = self.start(command, name)
        try:
            output = process.communicate(timeout=COMMAND_TIMEOUT_SECONDS)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [f"{command} of {name} ends with {process.returncode}: {output[-1000:]}"] if process.returncode else []


@dataclass(frozen=True)
class Baseline:
    """The undisturbed syncs.

    Args:
        seconds: duration of the process of the second sync.
        states: the state after each sync, by the set of files.
    """

    seconds: float
    states: dict[str, State] = field(repr=False)

    @classmethod
    def measure(cls, project: Project) -> "Baseline":
        """Sync `a`, which creates everything, and then `b`."""
        states: dict[str, State] = {}
        for name in FILES:
            before, since, began = active_schedules(project.api), datetime.now(UTC), time.monotonic()
            # The second is measured.
            problems = project.run_process("sync", name) if states else project.run("sync", name)
            seconds = time.monotonic() - began
            runs = find_lasting_wrong_runs(project.api, before, since, datetime.now(UTC))
            if problems := [*problems, *(str(run) for run in runs if run.defect != "stale")]:
                raise RuntimeError(f"an undisturbed sync of {name}: {'; '.join(problems)}")
            states[name] = State.read(project.api)
        return cls(seconds, states)


@dataclass(frozen=True)
class Outcome:
    """What one killed sync and the sync after it left.

    Args:
        moment: seconds from the start of the sync to its kill, or to its end if it ended earlier.
        ended: whether the sync ended before its kill.
        written: whether the sync had begun to change the server.
        open: number of changes that the sync had begun and not recorded as done.
        problems: failed commands, and differences to what an undisturbed sync leaves.
        runs: the wrong runs.
    """

    moment: float
    ended: bool
    written: bool
    open: int
    problems: list[str]
    runs: list[WrongRun]

    @property
    def reached(self) -> str:
        """`before`, `while` or `after`: whether the kill came before, while or after the sync changed the server."""
        return "while" if self.open else "after" if self.written else "before"

    @property
    def wrong(self) -> list[str]:
        """All problems and wrong runs, except the runs that the server's scheduler put back."""
        return [*self.problems, *(str(run) for run in self.runs if run.defect != "stale")]

    def __str__(self) -> str:
        stale = sum(run.defect == "stale" for run in self.runs)
        verdict = "ok" + (f", {stale} runs put back by Prefect's scheduler" if stale else "")
        if self.wrong:
            verdict = "\n  ".join(["WRONG", *(text[:300] for text in self.wrong[:10])])
            verdict += f"\n  and {len(self.wrong) - 10} more" if len(self.wrong) > 10 else ""
        how = f"killed {self.reached} it changed the server ({self.open} begun)"
        if self.ended:
            how = "ended before its kill"
        return f"{how}, {self.moment:.2f} s after its start, {verdict}"


def kill_at_random(
    project: Project, name: str, undisturbed: Baseline, seconds: float, chance: random.Random
) -> Outcome:
    """Kill a sync and run it again; the server has the other set of files.

    Args:
        project: the files and the server.
        name: the set of files to sync.
        undisturbed: the syncs to compare with.
        seconds: duration of a sync.
        chance: draws the moment of the kill.
    """
    api = project.api
    before, serial, since = active_schedules(api), State.read(api).serial, datetime.now(UTC)
    part = WRITING_SHARE if chance.random() < KILLS_WHILE_WRITING_SHARE else 1
    moment, began = seconds * chance.uniform(1 - part, 1), time.monotonic()
    process, ended = project.start("sync", name), True
    try:
        output = process.communicate(timeout=moment)[0]
        moment = time.monotonic() - began
        failure = f"before its kill sync of {name} ends with {process.returncode}: {output}"
        problems = [failure] if process.returncode else []
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        problems, ended = [], False
    killed = State.read(api)
    problems += project.run("sync", name)
    done = datetime.now(UTC)
    problems += project.run("plan", name)
    runs = find_lasting_wrong_runs(api, before, since, done)
    problems += find_differences(State.read(api).objects, undisturbed.states[name].objects)
    return Outcome(moment, ended, killed.serial != serial, len(killed.begun), problems, runs)


def run_rounds(project: Project, kills: int, chance: random.Random) -> tuple[Baseline, list[Outcome]]:
    """Kill `kills` syncs, of `a` and `b` in turn, and print the outcome of each.

    A sync that ends before its kill does not count. Its duration is then the upper bound for the next moments.
    """
    undisturbed = Baseline.measure(project)
    seconds = undisturbed.seconds
    outcomes: list[Outcome] = []
    while (killed := sum(not outcome.ended for outcome in outcomes)) < kills:
        outcome = kill_at_random(project, "ab"[len(outcomes) % 2], undisturbed, seconds, chance)
        outcomes.append(outcome)
        seconds = min(seconds, outcome.moment) if outcome.ended else seconds
        print(f"{killed + (not outcome.ended)} of {kills}: {outcome}", flush=True)
    return undisturbed, outcomes


def run(parameters: Parameters) -> Findings:
    """Kill `KILLS` syncs at the moments that `SEED` draws."""
    chance = random.Random(parameters["SEED"])  # noqa: S311 - moments, no secret
    outcomes: list[Outcome] = []
    while (killed := sum(not outcome.ended for outcome in outcomes)) < parameters["KILLS"]:
        with (
            tempfile.TemporaryDirectory() as folder,
            tempfile.TemporaryDirectory() as home,
            prefect_server(Path(home)) as url,
            connect(url) as api,
        ):
            kills = min(int(parameters["KILLS"]) - killed, KILLS_PER_SERVER)
            undisturbed, more = run_rounds(Project(Path(folder), api), kills, chance)
            outcomes += more
    moments = [outcome.moment for outcome in outcomes if not outcome.ended]
    reached = Counter(outcome.reached for outcome in outcomes if not outcome.ended)
    wrong = Counter(run.defect for outcome in outcomes for run in outcome.runs)
    figures: dict[str, str | float] = {
        "killed syncs": len(moments),
        "seconds of an undisturbed sync": round(undisturbed.seconds, 1),
        "moment of the kill: min, median, max (s)": f"{min(moments):.1f}, {statistics.median(moments):.1f}, "
        f"{max(moments):.1f}",
        "killed before, while, after it changed the server": f"{reached['before']}, {reached['while']}, "
        f"{reached['after']}",
        "syncs that ended before their kill, not counted": len(outcomes) - len(moments),
        "differences to an undisturbed sync after the next sync": sum(bool(outcome.problems) for outcome in outcomes),
        "runs missing, duplicated": f"{wrong['missing']}, {wrong['duplicated']}",
        "runs of the previous state, put back by Prefect's scheduler": wrong["stale"],
    }
    return Findings(figures, [text for outcome in outcomes for text in outcome.wrong])
