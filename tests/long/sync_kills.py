"""Kill `orchestrate sync` at random moments, run it again, and compare with a sync that nobody disturbed.

    make test-long FOR=sync-kills KILLS=30

There are two sets of files that differ in everything a sync can do. Each round begins with one of them on the server,
kills the sync of the other with SIGKILL, runs that again, and compares what the server has with what an undisturbed
sync left: all but ids and times must be the same, nothing may be there twice, and of the runs to come, as of those that
fell due meanwhile, none may be missing, doubled or of another state of the files.

The last has an exception, which is counted and no failure. With every change of a deployment the server deletes the
runs to come; its own scheduler, if it read the deployment before that and inserts after it, puts runs of the old state
back, whoever makes the change (https://github.com/PrefectHQ/prefect/issues/17703).
"""

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

from orchestration.deployments import schedules
from orchestration.deployments.schedules import title
from orchestration.settings import ROOT
from tests.long.longtest import Findings, Parameters
from tests.parts import prefect_server

KILLS_PER_SERVER = 8
"""Kills on one server: its database grows by a run every three seconds, and each round takes longer."""

FLOW = """
from prefect import flow

@flow
def kills(day: int = 1) -> None:
    pass
"""

# The schedules of every few seconds show a run that was not there when it fell due: the server's own scheduler, which
# comes by every five, makes none of the past. Nobody executes them: they become late, and must stay.
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
    schedules: [{interval: 5, anchor_date: "2026-01-01T00:00:00Z"}, {rrule: FREQ=DAILY;BYHOUR=3}]
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
      - {rrule: FREQ=HOURLY;BYMINUTE=20, slug: new}
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
"""Keys whose values differ between two servers with the same state; of `begun` see :meth:`State.read`."""

WRITING_SHARE = 0.4
"""The last part of a sync's time, in which it talks to the server; before, it imports."""

KILLS_WHILE_WRITING_SHARE = 0.8
"""Of the kills fall in that part, the others anywhere."""

CHECKED_TIMES = 20
"""How many of a schedule's times to come are looked at, as far as they are within `AHEAD`."""

SCHEDULED_AHEAD = timedelta(minutes=50)
"""The server's own scheduler sees to it that an hour is scheduled, and three runs."""

SETTLING_SECONDS = 15.0
"""Seconds in which what is wrong may become right: between two rounds of the server's own scheduler."""


@dataclass(frozen=True)
class State:
    """What the server has of these files, without what differs between two servers."""

    things: dict[str, Any]
    begun: list[Any] = field(compare=False)
    """What a sync had begun and not reported as done."""
    serial: str = field(compare=False)
    """Of the owner's record: another after each write."""

    @classmethod
    def read(cls, api: httpx.Client) -> "State":
        """All of it, by the API alone."""
        found = {
            kind: [each for each in _read_all(api, path) if str(each["name"]).startswith(("kills", "tag:kills"))]
            for kind, path in (
                ("variables", "/variables/filter"),
                ("limits", "/v2/concurrency_limits/filter"),
                ("pools", "/work_pools/filter"),
                ("automations", "/automations/filter"),
            )
        }
        found["queues"] = [each for each in _read_all(api, "/work_queues/filter") if each["work_pool_name"] == "kills"]
        found["deployments"] = _read_deployments(api)
        owned = [each["data"] for each in _read_all(api, "/block_documents/filter", include_secrets=True)]
        found["records"] = records = [each for each in owned if each.get("owner") == "kills"]
        names = {each["id"]: each["name"] for each in [*found["pools"], *found["queues"], *found["deployments"]]}
        text = json.dumps(found)
        for id_, name in names.items():
            text = text.replace(id_, name)
        begun = [each for record in records for each in record["begun"]]
        return cls(_without_volatile(json.loads(text)), begun, "".join(each["serial"] for each in records))


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
    """`value` without ids and times; lists in an order of their own, as the server gives them in none."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if key not in VOLATILE_KEYS}
        return {key: _without_volatile(each) for key, each in kept.items() if key != "flow_id"}
    if isinstance(value, list):
        return sorted((_without_volatile(each) for each in value), key=lambda each: json.dumps(each, sort_keys=True))
    return value


def find_differences(found: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two states differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted({*found, *wanted})
        return [each for key in keys for each in find_differences(found.get(key), wanted.get(key), f"{path}.{key}")]
    if isinstance(found, list) and isinstance(wanted, list):
        more = [each for each in found if found.count(each) > wanted.count(each)]
        less = [each for each in wanted if wanted.count(each) > found.count(each)]
        if len(found) != len(wanted):
            return [f"{path.lstrip('.')}: {more} in place of {less}"]
        return [each for a, b in zip(more, less, strict=True) for each in find_differences(a, b, f"{path}[]")]
    return [] if found == wanted else [f"{path.lstrip('.')}: {found} in place of {wanted}"]


@dataclass(frozen=True)
class Schedule:
    """An active schedule of a deployment, as the server has it."""

    name: str
    """Of the deployment, and what the schedule says: the id is another when it was deleted and made again."""
    schedule: dict[str, Any]
    parameters: dict[str, Any]
    """What its runs get."""

    def times(self, after: datetime, number: int) -> list[datetime]:
        """The next times from then on."""
        return [each.astimezone(UTC) for each in schedules.next_times(self.schedule, number, after)]


def connect(url: str) -> httpx.Client:
    """The API at `url`."""
    # The server closes what was idle for five seconds, and httpx by itself would use it until then.
    return httpx.Client(base_url=url, timeout=60, limits=httpx.Limits(keepalive_expiry=1))


def active_schedules(api: httpx.Client) -> dict[str, Schedule]:
    """Whatever makes runs, by the schedule's id."""
    return {
        each["id"]: Schedule(
            f"{deployment['name']}, {title(schedules.normalize(each['schedule']))}",
            each["schedule"],
            deployment["parameters"] | each["parameters"],
        )
        for deployment in _read_deployments(api)
        for each in deployment["schedules"]
        if each["active"] and not deployment["paused"]
    }


@dataclass(frozen=True)
class WrongRun:
    """A run that is not as it should be."""

    how: str
    """missing; doubled; stale: of a state of the files that no longer is."""
    schedule: str
    time: datetime

    def __str__(self) -> str:
        return f"{self.how}: {self.schedule} at {self.time:%H:%M:%S}"


def find_wrong_runs(
    api: httpx.Client, before: Mapping[str, Schedule], since: datetime, done: datetime
) -> list[WrongRun]:
    """Runs that are missing, doubled, or none of the schedules that are there now.

    Args:
        api: of the server.
        before: what `schedules_of` was then.
        since: from when on none may be missing of a time that a schedule had before and has now. Runs that fell due
            between then and `done` may have the parameters of before or of now.
        done: from when on all must be as the schedules are now.
    """
    which = {"flows": {"name": {"any_": ["kills"]}}, "flow_runs": {"expected_start_time": {"after_": f"{since}"}}}
    now = active_schedules(api)
    found: dict[str, dict[datetime, dict[str, Any]]] = defaultdict(dict)
    times: Counter[tuple[str, datetime]] = Counter()
    for run in {each["id"]: each for each in _read_all(api, "/flow_runs/filter", sort="ID_DESC", **which)}.values():
        id_, time_ = run["created_by"]["id"], datetime.fromisoformat(run["expected_start_time"])
        found[id_][time_] = run["parameters"]
        schedule = now.get(id_) or before.get(id_)
        times[schedule.name if schedule else id_, time_] += 1
    wrong = [WrongRun("doubled", name, time_) for (name, time_), number in times.items() if number > 1]
    for id_ in {*found, *now}:
        schedule, old, runs = now.get(id_), before.get(id_), found[id_]
        name = schedule.name if schedule else old.name if old else id_
        right: list[datetime] = []
        if schedule:
            passed = 1 + int((done - since).total_seconds())  # no schedule here has more than one a second
            due = {*schedule.times(since, passed)} & {*old.times(since, passed)} if old else set()
            coming = schedule.times(done, CHECKED_TIMES)
            # The server makes three at least, of which one may be due by now.
            must = {each for each in due if each <= done} | {
                *coming[:2],
                *(e for e in coming if e <= done + SCHEDULED_AHEAD),
            }
            wrong += [WrongRun("missing", name, each) for each in must if each not in runs]
            right = schedule.times(done, len(runs) + 1)
        for time_, parameters in runs.items():
            known = [each.parameters for each in (schedule, old if time_ <= done else None) if each]
            if (time_ > done and time_ not in right) or (known and parameters not in known):
                wrong.append(WrongRun("stale", name, time_))
    return sorted(wrong, key=lambda each: (each.how, each.schedule, each.time))


def find_lasting_wrong_runs(
    api: httpx.Client, before: Mapping[str, Schedule], since: datetime, done: datetime
) -> list[WrongRun]:
    """Return the wrong runs that are still wrong after `SETTLING_SECONDS`."""
    deadline = time.monotonic() + SETTLING_SECONDS
    while (wrong := find_wrong_runs(api, before, since, done)) and time.monotonic() < deadline:
        time.sleep(0.5)
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
        """`orchestrate plan` or `sync` of a set of files."""
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
        """Run it to its end; what is wrong with that: it fails, or the plan has something to do."""
        process = self.start(command, name)
        said = process.communicate()[0]
        return [f"{command} of {name} ends with {process.returncode}: {said[-1000:]}"] if process.returncode else []


@dataclass(frozen=True)
class Baseline:
    """Syncs that nobody disturbed."""

    seconds: float
    """From the start of the process to its end."""
    states: dict[str, State] = field(repr=False)

    @classmethod
    def measure(cls, project: Project) -> "Baseline":
        """Sync `a`, which makes everything, and then `b`."""
        states = {}
        for name in FILES:
            before, since, began = active_schedules(project.api), datetime.now(UTC), time.monotonic()
            problems = project.run("sync", name)
            seconds = time.monotonic() - began
            runs = find_lasting_wrong_runs(project.api, before, since, datetime.now(UTC))
            if problems := [*problems, *(str(run) for run in runs if run.how != "stale")]:
                raise RuntimeError(f"an undisturbed sync of {name}: {'; '.join(problems)}")
            states[name] = State.read(project.api)
        return cls(seconds, states)


@dataclass(frozen=True)
class Outcome:
    """What became of one killed sync."""

    moment: float
    """Seconds from its start to its kill, or to its end if that came first."""
    ended: bool
    """Whether it ended before it was to be killed."""
    written: bool
    """Whether it had begun to change the server."""
    open: int
    """Things that it had begun and not reported as done."""
    problems: list[str]
    """What failed, and where the server differs from what an undisturbed sync leaves."""
    runs: list[WrongRun]

    @property
    def reached(self) -> str:
        """Whether it was killed before, while or after it changed the server."""
        return "while" if self.open else "after" if self.written else "before"

    @property
    def wrong(self) -> list[str]:
        """All that is wrong, but for what the server's own scheduler does to every change."""
        return [*self.problems, *(str(run) for run in self.runs if run.how != "stale")]

    def __str__(self) -> str:
        stale = sum(run.how == "stale" for run in self.runs)
        verdict = "ok" + (f", {stale} runs put back by Prefect's scheduler" if stale else "")
        if self.wrong:
            verdict = "\n  ".join(["WRONG", *(each[:300] for each in self.wrong[:10])])
            verdict += f"\n  and {len(self.wrong) - 10} more" if len(self.wrong) > 10 else ""
        how = "ended by itself" if self.ended else f"killed {self.reached} it changed the server ({self.open} begun)"
        return f"{how}, {self.moment:.2f} s from its start, {verdict}"


def kill_at_random(
    project: Project, name: str, undisturbed: Baseline, seconds: float, chance: random.Random
) -> Outcome:
    """One round: the other set of files is on the server; a killed sync of this one, and that sync again.

    Args:
        project: with the server.
        name: of the set of files.
        undisturbed: syncs to compare with.
        seconds: that a sync takes.
        chance: draws the moment.
    """
    api = project.api
    before, serial, since = active_schedules(api), State.read(api).serial, datetime.now(UTC)
    part = WRITING_SHARE if chance.random() < KILLS_WHILE_WRITING_SHARE else 1
    moment, began = seconds * chance.uniform(1 - part, 1), time.monotonic()
    process, ended = project.start("sync", name), True
    try:
        said = process.communicate(timeout=moment)[0]
        moment = time.monotonic() - began
        problems = [f"before its kill sync of {name} ends with {process.returncode}: {said}"] * bool(process.returncode)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        problems, ended = [], False
    killed = State.read(api)
    problems += project.run("sync", name)
    done = datetime.now(UTC)
    problems += project.run("plan", name)
    runs = find_lasting_wrong_runs(api, before, since, done)
    problems += find_differences(State.read(api).things, undisturbed.states[name].things)
    return Outcome(moment, ended, killed.serial != serial, len(killed.begun), problems, runs)


def run_rounds(project: Project, kills: int, chance: random.Random) -> tuple[Baseline, list[Outcome]]:
    """Kill that many syncs, in turn of `a` and of `b`; print what became of each.

    One that ends before its kill is not among them: it shows that a sync takes less time, from which others are drawn.
    """
    undisturbed = Baseline.measure(project)
    seconds = undisturbed.seconds
    outcomes: list[Outcome] = []
    while (killed := sum(not each.ended for each in outcomes)) < kills:
        outcome = kill_at_random(project, "ab"[len(outcomes) % 2], undisturbed, seconds, chance)
        outcomes.append(outcome)
        seconds = min(seconds, outcome.moment) if outcome.ended else seconds
        print(f"{killed + (not outcome.ended)} of {kills}: {outcome}", flush=True)
    return undisturbed, outcomes


def run(parameters: Parameters) -> Findings:
    """Kill `KILLS` syncs at moments that `SEED` draws."""
    chance = random.Random(parameters["SEED"])  # noqa: S311 - moments, no secret
    outcomes: list[Outcome] = []
    while (killed := sum(not each.ended for each in outcomes)) < parameters["KILLS"]:
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
    wrong = Counter(run.how for outcome in outcomes for run in outcome.runs)
    figures: dict[str, str | float] = {
        "killed syncs": len(moments),
        "seconds of an undisturbed sync": round(undisturbed.seconds, 1),
        "moment of the kill: min, median, max (s)": f"{min(moments):.1f}, {statistics.median(moments):.1f}, "
        f"{max(moments):.1f}",
        "killed before, while, after it changed the server": f"{reached['before']}, {reached['while']}, "
        f"{reached['after']}",
        "that ended before their kill, beside these": len(outcomes) - len(moments),
        "after the next sync other than undisturbed": sum(bool(each.problems) for each in outcomes),
        "runs missing, doubled": f"{wrong['missing']}, {wrong['doubled']}",
        "runs of another state of the files, put back by Prefect's own scheduler": wrong["stale"],
    }
    return Findings(figures, [each for outcome in outcomes for each in outcome.wrong])
