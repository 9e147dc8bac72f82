"""Measure how many runs a Prefect server takes: the knee, the deaths of API replicas, many runs that are due at once.

    python -m tests.benchmarks.load     # or: make bench-load

The server is that of the chart, as processes of this machine. The clients post what runs post, without interpreters.

1. The knee, for 1, 2 and 3 API replicas: more and more clients, each of which executes one run after the other.
2. At 70 % of the last knee, an API replica is killed every 30 s.
3. Live runs report at once: heartbeats, states of task runs and log lines.
4. Runs that are due in the same second wait for the slots of their work pool, in queues of three priorities.

Everything shares the processors, the clients too. With `--pgbouncer` the server connects to Postgres through PgBouncer.
With `--url` the clients measure the knee of a server elsewhere. The table is printed and appended to results.md, also
after Ctrl-C. On an idle machine the figures are recorded for the docs once all knees are found.
"""

import argparse
import asyncio
import contextlib
import itertools
import math
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from orchestration.errors import ClusterError, sentence
from tests.benchmarks import curves
from tests.benchmarks.pgbouncer_processes import describe_pgbouncer, find_pgbouncer
from tests.benchmarks.polls import Poll, find_passed_over
from tests.benchmarks.server_processes import ServerProcesses, server_processes
from tests.benchmarks.simulated_runs import (
    HEARTBEAT,
    LINES_OF_A_BATCH,
    REQUESTS_OF_A_RUN,
    TASKS,
    Credentials,
    Deployment,
    LiveRun,
    Recorder,
    RunError,
    Runs,
    Service,
)
from tests.benchmarks.table import Figure, describe_databases, percentile, results_table
from tests.parts import rows_of

PRIORITIES = {"high": 1, "normal": 2, "low": 3}
"""The work queues and their priorities."""

KNEE_SHARE = 0.95
"""The knee is the smallest number of clients with this share of the highest rate."""

STEADY_SHARE = 0.7
"""The share of the knee at which replicas are killed."""

RUN_RETRIES = 19
"""How often a run's client retries a request, as the work pool's chart sets it."""

POLL_SECONDS = 1.0
"""Between two polls of a worker while runs are due."""

CONCURRENT_CREATIONS = 8

CURVE_OPTIONS = ("replicas", "clients", "settle_seconds", "step_seconds")
"""The options whose defaults make the runs comparable that are recorded for the picture."""

DRAIN_SECONDS = 600
"""How long runs may take to end after the last one has begun, on a server that takes a few runs per second."""

RECORDING_PAUSE_SECONDS = 30
"""If the services record nothing for so long, what is missing counts as lost. They write at least every 5 s."""

Report = Callable[[Iterable[Figure]], None]


@dataclass(frozen=True)
class Target:
    """A Prefect server, and where its processes can be seen, these."""

    service: Service
    credentials: Credentials
    processes: ServerProcesses | None = None

    def runs(self, recorder: Recorder) -> Runs:
        """Return the simulated runs of this server."""
        return Runs(self.service, self.credentials, recorder)

    def processor_seconds(self) -> dict[str, float]:
        """Return the processor seconds so far of the clients, and of each part of the server that can be seen."""
        return {"clients": time.process_time()} | (self.processes.processor_seconds() if self.processes else {})


@dataclass(frozen=True)
class Step:
    """Holds the result of a number of clients.

    Args:
        clients: how many clients executed runs.
        rates: requests in each second.
        seconds: the seconds of each request.
        errors: failed attempts and failed runs, by name.
        processor: processor seconds by part.
    """

    clients: int
    rates: list[float]
    seconds: list[float]
    errors: Counter[str]
    processor: dict[str, float]

    @property
    def rate(self) -> float:
        """Requests per second."""
        return sum(self.rates) / len(self.rates)

    @property
    def runs_per_minute(self) -> float:
        """Runs per minute, by the requests that each run takes."""
        return 60 * self.rate / REQUESTS_OF_A_RUN

    @property
    def point(self) -> dict[str, float]:
        """Return the figures of this number of clients that the picture shows."""
        milliseconds = [1000 * value for value in self.seconds]
        return {
            "clients": self.clients,
            "requests_per_second": round(self.rate, 1),
            "runs_per_minute": round(self.runs_per_minute),
            "p50_ms": round(percentile(milliseconds, 50)),
            "p99_ms": round(percentile(milliseconds, 99)),
        }

    def figures(self, name: str) -> list[Figure]:
        """Return the rows of the table."""
        used = ", ".join(f"{part} {1000 * used / len(self.seconds):.1f}" for part, used in self.processor.items())
        note = [f"{self.runs_per_minute:.0f} runs/min", shown(self.errors), f"processor ms a request: {used}"]
        name = f"{name}, {self.clients} clients"
        return [
            Figure(f"{name}: requests", "1/s", self.rates, "; ".join(note)),
            latency(f"{name}: a request", self.seconds),
        ]


def shown(errors: Counter[str]) -> str:
    """Return the errors as text."""
    return ", ".join(f"{count} {name}" for name, count in sorted(errors.items())) or "no errors"


def latency(name: str, seconds: Sequence[float], note: str = "") -> Figure:
    """Return the row of the seconds of requests."""
    values = [1000 * value for value in seconds]
    return Figure(name, "ms", values, f"p99 {percentile(values, 99):,.0f}{'; ' * bool(note)}{note}")


def drain_seconds(runs: int, rate: float) -> float:
    """Return how long runs may take to end on a server that takes `rate` requests per second."""
    return max(DRAIN_SECONDS, 3 * REQUESTS_OF_A_RUN * runs / rate)


def find_knee(steps: Sequence[Step]) -> Step:
    """Return the step with the fewest clients that reaches `KNEE_SHARE` of the highest rate."""
    highest = max(step.rate for step in steps)
    return next(step for step in steps if step.rate >= KNEE_SHARE * highest)


async def prepare(runs: Runs, limit: int | None = None) -> tuple[str, list[Deployment]]:
    """Create a work pool with a deployment for each priority; return the pool's name and the deployments."""
    pool = f"load-{uuid4().hex[:8]}"
    async with runs.operator() as operator:
        body = {"name": pool, "type": "kubernetes", "concurrency_limit": limit}
        await operator.ask("POST", "/work_pools/", body)
        flow = (await operator.ask("POST", "/flows/", {"name": "load"}))["id"]
        deployments = []
        for name, priority in PRIORITIES.items():
            queue = {"name": name, "priority": priority}
            await operator.ask("POST", f"/work_pools/{pool}/queues", queue)
            body = {"name": f"{pool}-{name}", "flow_id": flow, "work_pool_name": pool, "work_queue_name": name}
            deployments.append(Deployment((await operator.ask("POST", "/deployments/", body))["id"], priority))
    return pool, deployments


async def measure_steps(target: Target, name: str, options: argparse.Namespace, report: Report) -> list[Step]:
    """Measure more and more clients."""
    recorder = Recorder()
    runs = target.runs(recorder)
    _, deployments = await prepare(runs)

    async def execute_runs() -> None:
        for deployment in itertools.cycle(deployments):
            if not await runs.post_whole_run(deployment):
                await asyncio.sleep(1)

    clients: list[asyncio.Task[None]] = []
    steps = []
    try:
        for number in options.clients:
            clients += [asyncio.create_task(execute_runs()) for _ in range(number - len(clients))]
            await asyncio.sleep(options.settle_seconds)
            steps.append(await _measure_step(target, number, recorder, options.step_seconds))
            report(steps[-1].figures(name))
    finally:
        await end_tasks(clients)
    return steps


async def end_tasks(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and raise the first error of one that has failed."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


async def _measure_step(target: Target, clients: int, recorder: Recorder, seconds: int) -> Step:
    errors, failed = Counter(recorder.attempts), len(recorder.failed)
    processor = target.processor_seconds()
    start = time.monotonic()
    first = len(recorder.requests)
    await asyncio.sleep(seconds)
    while not (requests := [request for request in recorder.requests[first:] if request[0] < start + seconds]):
        await asyncio.sleep(1)
        seconds = math.ceil(time.monotonic() - start)
    counts = Counter(int(ended - start) for ended, _ in requests)
    return Step(
        clients,
        [float(counts[second]) for second in range(seconds)],
        [took for _, took in requests],
        recorder.attempts - errors + Counter({"failed runs": len(recorder.failed) - failed}),
        {part: used - processor[part] for part, used in target.processor_seconds().items()},
    )


async def kill_in_turn(processes: ServerProcesses, every: float, ended: asyncio.Event) -> list[float]:
    """Kill API replicas in turn, and start each again, until the end.

    Args:
        processes: the server's.
        every: seconds from one kill to the next. A replica that is still starting delays the next kill.
        ended: ends the kills, after the last replica is ready.

    Returns:
        How many seconds each replica took until its API answered again.
    """
    seconds: list[float] = []
    begin = time.monotonic()
    for number, replica in enumerate(itertools.cycle(processes.replicas), 1):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), max(0, begin + number * every - time.monotonic()))
        if ended.is_set():
            break
        processes.service.ready.remove(replica.url)
        replica.kill()
        start = time.monotonic()
        replica.launch()
        while not await asyncio.to_thread(replica.is_ready):
            await asyncio.sleep(0.5)
        processes.service.ready.append(replica.url)
        seconds.append(time.monotonic() - start)
        print(f"A replica was killed, and is ready after {seconds[-1]:.1f} s", file=sys.stderr)
    return seconds


async def measure_kills(target: Target, name: str, knee: Step, options: argparse.Namespace, report: Report) -> None:
    """Start runs at a steady rate while API replicas are killed.

    Args:
        target: a server of this machine.
        name: names the rows of the table.
        knee: that of the server.
        options: those of the command line.
        report: prints figures.
    """
    rate = STEADY_SHARE * knee.runs_per_minute
    assert target.processes
    recorder = Recorder()
    runs = target.runs(recorder)
    _, deployments = await prepare(runs)
    recorder.requests.clear()
    ended = asyncio.Event()
    killing = asyncio.create_task(kill_in_turn(target.processes, options.kill_seconds, ended))
    posting: list[asyncio.Task[bool]] = []
    begin = time.monotonic()
    try:
        for number in range(max(1, round(options.minutes * rate))):
            await asyncio.sleep(begin + number * 60 / rate - time.monotonic())
            deployment = deployments[number % len(deployments)]
            posting.append(asyncio.create_task(runs.post_whole_run(deployment)))
        await asyncio.sleep(begin + 60 * options.minutes - time.monotonic())
        ended.set()
        kills = await killing
        await asyncio.wait(posting, timeout=drain_seconds(len(posting), knee.rate))
    finally:
        await end_tasks([killing, *posting])
    for failure in recorder.failed:
        print(f"A run failed: {failure}", file=sys.stderr)
    outcomes = Outcomes.read(target.processes.database, deployments)
    lost = await _count_lost_task_runs(target.processes.database, deployments)
    note = f"{len(posting)} runs, {rate:.0f} per minute"
    report(
        [
            latency(f"{name}: a request with its retries", recorder.seconds, shown(recorder.attempts)),
            Figure(f"{name}: runs that failed", "", [float(len(posting) - recorder.completed)], f"goal 0; {note}"),
            Figure(f"{name}: runs not Completed once", "", [float(outcomes.not_once)], "goal 0"),
            Figure(f"{name}: task runs lost", "", [float(lost)], f"of {TASKS * len(posting)}"),
            *([Figure(f"{name}: from kill to ready", "s", kills)] if kills else []),
        ]
    )


async def _count_lost_task_runs(database: str, deployments: Sequence[Deployment]) -> int:
    """Return how many task runs of Completed runs are not Completed, after the services had time to record them."""
    statement = (
        "select count(t.id) from flow_run r "
        "left join task_run t on t.flow_run_id = r.id and t.state_type = 'COMPLETED' "
        "where r.deployment_id = any(%s::uuid[]) and r.state_type = 'COMPLETED' group by r.id"
    )
    ids = [deployment.id for deployment in deployments]

    def count() -> Counter[str]:
        found = [int(number) for (number,) in rows_of(database, statement, ids)]
        return Counter({"task runs": TASKS * len(found) - sum(found)})

    return (await _count_losses(count))["task runs"]


async def _count_losses(count: Callable[[], Counter[str]]) -> Counter[str]:
    """Count what is not recorded until nothing is missing, or the services have recorded nothing for a while."""
    lost, unchanged = count(), 0
    while any(lost.values()) and unchanged < RECORDING_PAUSE_SECONDS:
        await asyncio.sleep(1)
        before, lost = lost, await asyncio.to_thread(count)
        unchanged = unchanged + 1 if lost == before else 0
    return lost


async def measure_live(target: Target, rate: float, options: argparse.Namespace, report: Report) -> None:
    """Let live runs report, each of them once in `--report-seconds`.

    Args:
        target: a server of this machine.
        rate: requests per second that the server takes.
        options: those of the command line.
        report: prints figures.
    """
    assert target.processes
    database = target.processes.database
    recorder = Recorder()
    runs = target.runs(recorder)
    _, deployments = await prepare(runs)
    turns = asyncio.Semaphore(CONCURRENT_CREATIONS)
    reporting: dict[str, LiveRun] = {}
    ready: set[int] = set()
    starts = asyncio.Event()
    end = math.inf

    async def live(number: int) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with turns:
                    run = await runs.create(operator, deployments[number % len(deployments)])
                    if not await runs.claim(worker, run):
                        raise RunError(f"The claim of run {run} was refused")
                    reporting[run] = await stack.enter_async_context(runs.live(run))
                ready.add(number)
                await starts.wait()
                due = time.monotonic() + random.uniform(0, options.report_seconds)  # noqa: S311
                while due < end:
                    await asyncio.sleep(due - time.monotonic())
                    await reporting[run].report()
                    due += options.report_seconds
        except RunError as error:
            ready.add(number)
            recorder.failed.append(str(error))
            print(f"A run failed: {error}", file=sys.stderr)

    async with runs.operator() as operator, runs.worker() as worker:
        lives = [asyncio.create_task(live(number)) for number in range(options.live)]
        try:
            while len(ready) < options.live:
                await asyncio.sleep(0.5)
            recorder.requests.clear()
            end = time.monotonic() + options.report_seconds + options.live_seconds
            starts.set()
            # Every run has reported once before the measurement begins.
            await asyncio.sleep(options.report_seconds)
            step = await _measure_step(target, options.live, recorder, options.live_seconds)
            await asyncio.wait(lives, timeout=drain_seconds(options.live, rate))
        finally:
            await end_tasks(lives)
    posted = sum(run.reports for run in reporting.values())
    began = time.monotonic()
    lost = await _count_losses(lambda: _missing_reports(database, [*reporting], posted))
    name = f"{options.live:,} live runs that report every {options.report_seconds:g} s"
    cores = ", ".join(f"{part} {used / options.live_seconds:.2f}" for part, used in step.processor.items())
    waited = f"{time.monotonic() - began:.0f} s after the last run"
    lines = LINES_OF_A_BATCH * posted
    report(
        [
            Figure(f"{name}: requests", "1/s", step.rates, f"{shown(step.errors)}; cores: {cores}"),
            latency(f"{name}: a request", step.seconds),
            Figure(f"{name}: runs that failed", "", [float(options.live - recorder.completed)], "goal 0"),
            *(
                Figure(
                    f"{name}: {kind} lost",
                    "",
                    [float(number)],
                    f"of {lines if kind == 'log lines' else posted:,}, {waited}",
                )
                for kind, number in lost.items()
            ),
        ]
    )


def _missing_reports(database: str, runs: Sequence[str], posted: int) -> Counter[str]:
    """Return what the database lacks of the reports of live runs.

    Args:
        database: the URL of the database.
        runs: the ids of the runs.
        posted: how many reports the runs have posted.
    """
    heartbeats = f"select count(*) from events where event = '{HEARTBEAT}' and resource_id = any(%s)"
    completed = "select count(*) from task_run where flow_run_id = any(%s::uuid[]) and state_type = 'COMPLETED'"
    lines = "select count(*) from log where flow_run_id = any(%s::uuid[])"
    [(found,)] = rows_of(database, heartbeats, [f"prefect.flow-run.{run}" for run in runs])
    [(recorded,)] = rows_of(database, completed, list(runs))
    [(written,)] = rows_of(database, lines, list(runs))
    return Counter(
        {
            "heartbeats": posted - int(found),
            "task runs": posted - int(recorded),
            "log lines": LINES_OF_A_BATCH * posted - int(written),
        }
    )


@dataclass(frozen=True)
class Outcomes:
    """Holds the rows of the database about the runs of deployments.

    Args:
        not_once: runs that are not Completed, or were Running or Completed more than once.
        at_once: how many runs were Pending or Running at the same time, at most.
        completed: when each run was Completed.
    """

    not_once: int
    at_once: int
    completed: list[datetime]

    @classmethod
    def read(cls, database: str, deployments: Sequence[Deployment]) -> "Outcomes":
        """Read the outcomes."""
        statement = (
            "select r.id, r.state_type::text, s.type::text, s.timestamp, s.created from flow_run r "
            "join flow_run_state s on s.flow_run_id = r.id where r.deployment_id = any(%s::uuid[])"
        )
        runs: dict[Any, Counter[str]] = {}
        moments: list[tuple[datetime, int]] = []
        completed = []
        not_completed = set()
        ids = [deployment.id for deployment in deployments]
        for run, final, type_, at, written in rows_of(database, statement, ids):
            runs.setdefault(run, Counter())[type_] += 1
            if final != "COMPLETED":
                not_completed.add(run)
            # A state's timestamp is that of its request, which may then wait for a slot.
            moments += {"PENDING": [(written, 1)], "COMPLETED": [(written, -1)]}.get(type_, [])
            completed += [at] * (type_ == "COMPLETED")
        executed_twice = {run for run, types in runs.items() if types["RUNNING"] > 1 or types["COMPLETED"] > 1}
        return cls(
            len(not_completed | executed_twice),
            # At equal times the end of one run is before the claim of another.
            max(itertools.accumulate(change for _, change in sorted(moments)), default=0),
            completed,
        )


async def measure_due_at_once(target: Target, rate: float, options: argparse.Namespace, report: Report) -> None:
    """Execute runs that are due in the same second through the limit of their work pool.

    Args:
        target: a server of this machine.
        rate: requests per second that the server takes.
        options: those of the command line.
        report: prints figures.
    """
    assert target.processes
    recorder = Recorder()
    runs = target.runs(recorder)
    pool, deployments = await prepare(runs, options.limit)
    due = datetime.now(UTC) + timedelta(seconds=5 + 1.5 * options.runs / rate)
    turns = asyncio.Semaphore(CONCURRENT_CREATIONS)
    priorities: dict[str, int] = {}
    async with runs.operator() as operator:

        async def create(number: int) -> None:
            deployment = deployments[number % len(deployments)]
            async with turns:
                priorities[await runs.create(operator, deployment, due)] = deployment.priority

        await asyncio.gather(*map(create, range(options.runs)))
    late = (datetime.now(UTC) - due).total_seconds()
    print(f"The last run was created {abs(late):.0f} s {'after' if late > 0 else 'before'} it was due", file=sys.stderr)
    await asyncio.sleep(max(0, -late))
    recorder.requests.clear()
    polls: list[Poll] = []
    deadline = time.monotonic() + drain_seconds(options.runs, rate)

    async def work(number: int) -> None:
        await asyncio.sleep(POLL_SECONDS * number / options.workers)
        await execute_due_runs(runs, pool, polls, options.runs, deadline)

    await asyncio.gather(*map(work, range(options.workers)))
    outcomes = Outcomes.read(target.processes.database, deployments)
    name = f"{options.runs:,} runs due at once"
    waits = [(at - due).total_seconds() for at in outcomes.completed]
    pool_timeouts = sum(map(target.processes.count_in_logs, ("QueuePool limit", "query_wait_timeout")))
    alone, at_once = find_passed_over(polls, priorities)
    failures = sum(count for status, count in recorder.attempts.items() if status.startswith("5"))
    report(
        [
            Figure(
                f"{name}: from due to Completed",
                "s",
                waits or [0.0],
                f"limit {options.limit}, {options.workers} workers",
            ),
            latency(f"{name}: a request", recorder.seconds, shown(recorder.attempts)),
            Figure(f"{name}: runs not Completed once", "", [float(outcomes.not_once)], "goal 0"),
            Figure(
                f"{name}: handed out before a higher priority", "", [float(len(alone))], f"goal 0; {len(polls)} polls"
            ),
            Figure(
                f"{name}: the same, by two polls at the same time", "", [float(len(at_once))], "Prefect locks due runs"
            ),
            Figure(f"{name}: at once, at most", "", [float(outcomes.at_once)], f"limit {options.limit}"),
            Figure(f"{name}: answers of 500 or more", "", [float(failures)], "goal 0"),
            Figure("pool timeouts in the server's logs", "", [float(pool_timeouts)], "goal 0"),
        ]
    )


async def execute_due_runs(runs: Runs, pool: str, polls: list[Poll], number: int, deadline: float) -> None:
    """Poll, claim and execute runs as a worker does, until `number` runs have ended.

    A worker polls again when the claims of its last poll are answered.

    Args:
        runs: the simulated runs.
        pool: the name of the work pool.
        polls: gets each poll that had runs in its answer.
        number: the number of runs.
        deadline: when to end at the latest, on the clock of `time.monotonic`.
    """
    executing: set[asyncio.Task[None]] = set()

    async def execute(run: str) -> None:
        try:
            await runs.execute(worker, run)
        except RunError as error:
            runs.recorder.failed.append(str(error))
            print(f"A run failed: {error}", file=sys.stderr)

    async def claim(run: str) -> bool:
        if granted := await runs.claim(worker, run):
            executing.add(task := asyncio.create_task(execute(run)))
            task.add_done_callback(executing.discard)
        return granted

    async with runs.worker() as worker:
        while runs.recorder.completed + len(runs.recorder.failed) < number and time.monotonic() < deadline:
            now, started = datetime.now(UTC).isoformat(), time.monotonic()
            answer = await worker.ask("POST", f"/work_pools/{pool}/get_scheduled_flow_runs", {"scheduled_before": now})
            if found := [entry["flow_run"]["id"] for entry in answer]:
                polls.append(poll := Poll(started, time.monotonic(), found))
                granted = await asyncio.gather(*map(claim, found))
                poll.claimed = time.monotonic()
                poll.refused.update(run for run, is_granted in zip(found, granted, strict=True) if not is_granted)
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.gather(*executing)


def measure_own_server(
    options: argparse.Namespace, pgbouncer: Sequence[str], report: Report, found: curves.Record
) -> None:
    """Measure the server of the chart as processes of this machine.

    Args:
        options: those of the command line.
        pgbouncer: the command of a PgBouncer, through which the server connects to Postgres; or none.
        report: prints figures.
        found: gets the curve of each number of replicas, and the figures of each later phase.
    """

    def report_phase(figures: Iterable[Figure]) -> None:
        figures = list(figures)
        report(figures)
        found["phases"] += [figure.record for figure in figures]

    with (
        tempfile.TemporaryDirectory() as folder,
        server_processes(Path(folder), options.replicas[0], pgbouncer) as processes,
    ):
        target = Target(processes.service, processes.credentials, processes)
        for replicas in options.replicas:
            processes.start_api(replicas)
            name = f"{replicas} API replica{'s' * (replicas > 1)}"
            print(f"{name}: the knee", file=sys.stderr)
            steps = asyncio.run(measure_steps(target, name, options, report))
            knee = find_knee(steps)
            found["replicas"][str(replicas)] = {"knee_clients": knee.clients, "points": [step.point for step in steps]}
            note = f"{knee.clients} clients, {knee.rate:.0f} requests/s"
            report([Figure(f"{name}: the knee", "runs/min", [knee.runs_per_minute], note)])
        if options.minutes:
            title = f"{name} at {STEADY_SHARE:.0%}, one killed every {options.kill_seconds:g} s"
            print(title, file=sys.stderr)
            asyncio.run(measure_kills(target, title, knee, options, report_phase))
        if options.live:
            print(f"{options.live:,} live runs", file=sys.stderr)
            asyncio.run(measure_live(target, knee.rate, options, report_phase))
        if options.runs:
            print(f"{options.runs:,} runs due at once", file=sys.stderr)
            asyncio.run(measure_due_at_once(target, knee.rate, options, report_phase))


def measure_url(options: argparse.Namespace, report: Report) -> None:
    """Measure the knee of a server elsewhere. All clients have the credential of `PREFECT_API_AUTH_STRING`.

    Raises:
        RunError: the server does not answer, or refuses a request.
    """
    try:
        httpx.get(f"{options.url.rstrip('/')}/health", timeout=10).raise_for_status()
    except httpx.HTTPError as error:
        raise RunError(f"{options.url}/health: {error}") from error
    credential = os.environ.get("PREFECT_API_AUTH_STRING", "")
    target = Target(Service([options.url.rstrip("/")]), Credentials(credential, credential, lambda _: credential))
    knee = find_knee(asyncio.run(measure_steps(target, "the server", options, report)))
    report([Figure("the server: the knee", "runs/min", [knee.runs_per_minute], f"{knee.clients} clients")])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and append; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure how many runs a Prefect server takes.")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3], help="numbers of API replicas, ascending")
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 8, 16, 32], help="numbers of clients, ascending")
    parser.add_argument("--settle-seconds", type=int, default=2, help="before each number of clients is measured")
    parser.add_argument("--step-seconds", type=int, default=8, help="for which each number of clients is measured")
    parser.add_argument("--minutes", type=float, default=5, help="for which replicas are killed in turn; 0: not at all")
    parser.add_argument("--kill-seconds", type=float, default=30, help="from one kill to the next")
    parser.add_argument("--live", type=int, default=1000, help="live runs that report at once; 0: none")
    parser.add_argument("--live-seconds", type=int, default=60, help="for which their reports are measured")
    parser.add_argument("--report-seconds", type=float, default=30, help="from one report of a live run to the next")
    parser.add_argument("--runs", type=int, default=1000, help="runs that are due in the same second; 0: none")
    parser.add_argument("--limit", type=int, default=100, help="of the work pool of these runs")
    parser.add_argument("--workers", type=int, default=2, help="that claim these runs")
    parser.add_argument("--pgbouncer", action="store_true", help="the server connects to Postgres through PgBouncer")
    parser.add_argument("--url", help="measure the knee of this API alone, by the user of PREFECT_API_AUTH_STRING")
    options = parser.parse_args(arguments)
    # A terminated benchmark ends what it has started, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    # This import lets Prefect's clients retry as in the pod of a run.
    import orchestration.runs.engine  # noqa: F401

    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # three connections of each live run
    load_before = os.getloadavg()[0]
    try:
        pgbouncer = find_pgbouncer() if options.pgbouncer else []
        parts = options.url or describe_databases()
    except ClusterError as error:
        print(sentence(error), file=sys.stderr)
        return 1
    if pgbouncer:
        parts += f" through {describe_pgbouncer(pgbouncer)}"
    parts = f"Prefect {version('prefect')}, {parts}"
    found: curves.Record = {"parts": parts, "requests_of_a_run": REQUESTS_OF_A_RUN, "replicas": {}, "phases": []}
    with (
        temporary_settings({PREFECT_CLIENT_MAX_RETRIES: RUN_RETRIES}),
        results_table(f"{parts}, load {load_before:.1f} before") as report,
    ):
        try:
            if options.url:
                measure_url(options, report)
            else:
                measure_own_server(options, pgbouncer, report, found)
        except KeyboardInterrupt:
            print("Interrupted: the table has the figures so far.", file=sys.stderr)
            return 130
        except RunError as error:
            print(f"The server cannot be measured: {error}", file=sys.stderr)
            return 1
        finally:
            # Also if a later phase failed or was interrupted: the record then has the phases before it.
            is_default = all(getattr(options, name) == parser.get_default(name) for name in CURVE_OPTIONS)
            if is_default and len(found["replicas"]) == len(options.replicas):
                curves.record(curves.PGBOUNCER if pgbouncer else curves.LOAD, found, load_before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
