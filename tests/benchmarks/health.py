"""Measure how soon the health of the background services turns red at each fault, and green again.

    python -m tests.benchmarks.health --pairs 3      # or: make bench-health

The services run at the chart's limits, on a real Postgres and Redis of this machine. A fault lasts until its probe is
red and 30 s longer. Then the fault ends, or where the process needs a restart, the process is killed and starts again.
Meanwhile events are published, and counted in the database at the end. The table is printed and appended to results.md.
The exit status is 1 if a probe has not shown a fault.
"""

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests import service_faults
from tests.benchmarks.table import Figure, describe_databases, results_table
from tests.parts import debian_postgres, wait_until
from tests.service_faults import Services, migrated_template, running_services

LIMIT_SECONDS = 600
PUBLISH_SECONDS = 1

LIVE_SECONDS = 60
"""For how long the chart's liveness probe may fail until Kubernetes restarts the pod."""

Fault = Callable[[Services], contextlib.AbstractContextManager[None]]


def at_once(act: Callable[[Services], None]) -> Fault:
    """Return a fault that ends when it begins."""

    @contextlib.contextmanager
    def inject(services: Services) -> Iterator[None]:
        act(services)
        yield

    return inject


def inside(*fault: str) -> Fault:
    """Return a fault inside the process, which does not end."""

    @contextlib.contextmanager
    def inject(services: Services) -> Iterator[None]:
        services.tell(*fault)
        yield

    return inject


Faults = tuple[tuple[str, Fault], ...]

OF_POSTGRES: Faults = (
    ("Postgres refuses connections", service_faults.database_refuses),
    ("Postgres does not answer", service_faults.database_is_silent),
    ("Postgres is read-only", service_faults.database_is_read_only),
    ("Postgres has no free connections", service_faults.database_has_no_connections),
)
"""Faults of Postgres, which the services survive."""

OF_REDIS: Faults = (
    ("Valkey refuses connections", service_faults.redis_refuses),
    ("Valkey does not answer", service_faults.redis_is_silent),
    ("Valkey is emptied", at_once(service_faults.empty_redis)),
    ("Valkey fails over", at_once(service_faults.fail_redis_over)),
)
"""Faults of Redis, which the services survive."""

AT_ONCE = {name for name, _ in OF_REDIS[2:]}
"""Faults that end when they begin."""

BROKEN: Faults = (
    ("the process is stopped", service_faults.stopped_process),
    ("the event loop is blocked", inside("block", "3600")),
    ("a service's task has ended", inside("end", "EventPersister")),
    ("a service's loop hangs", inside("hang", "ReactiveTriggers")),
)
"""Faults of the process, which need a restart."""


@dataclass
class Measured:
    """Collects the seconds of each fault, and what was lost.

    Args:
        stall_seconds: how long a service may make no progress.
        hold_seconds: how long a fault lasts after its probe is red.
    """

    stall_seconds: float
    hold_seconds: float
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    lost: Counter[str] = field(default_factory=Counter)
    published: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, what: str, seconds: float) -> None:
        """Add a value, and show it."""
        with self.lock:
            self.seconds[name, what].append(seconds)
            print(f"{name}: {what} {seconds:.1f} s", file=sys.stderr, flush=True)

    def fail(self, failure: str) -> None:
        """Note that a probe has not shown a fault, and show it."""
        self.failures.append(failure)
        print(failure, file=sys.stderr, flush=True)

    def figures(self) -> list[Figure]:
        """Return a figure for each fault and probe."""
        return [
            Figure(f"{name}: {what}", "s", values, self._losses(name) if "green" in what else "")
            for (name, what), values in sorted(self.seconds.items())
        ]

    def _losses(self, name: str) -> str:
        return f"{self.lost[name]} of {self.published[name]} lost: events, and the states of task runs in them"


def wait_for_status(services: Services, path: str, healthy: bool, seconds: float) -> float | None:
    """Return after how many seconds a probe succeeded or failed; None if it did not."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if (services.probe(path)[0] == 200) == healthy:
            return time.monotonic() - start
        time.sleep(0.5)
    return None


@contextlib.contextmanager
def publishing(name: str, services: Services, measured: Measured) -> Iterator[None]:
    """Publish events while the block lasts; then count those that the services do not write."""
    ended = threading.Event()

    def publish_events() -> None:
        while not ended.wait(PUBLISH_SECONDS):
            with contextlib.suppress(OSError, service_faults.RedisError):
                services.publish()

    thread = threading.Thread(target=publish_events)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    with contextlib.suppress(AssertionError):
        wait_until(lambda: services.count_lost_events() == 0, "the events to be in the database", 60)
    measured.lost[name] += services.count_lost_events()
    measured.published[name] += 2 * len(services.published)
    services.published.clear()


def measure_outage(name: str, fault: Fault, services: Services, measured: Measured) -> None:
    """Measure a fault of a dependency."""
    with publishing(name, services, measured):
        wait_until(services.have_passed, "all services to make progress", LIMIT_SECONDS)
        with fault(services):
            began = time.monotonic()
            red = wait_for_status(services, "/ready", False, 2.5 * measured.stall_seconds)
            if red is not None:
                measured.add(name, "readiness red after", red)
                if name not in AT_ONCE:
                    time.sleep(measured.hold_seconds)
            elif name not in AT_ONCE:
                measured.fail(f"{name}: readiness is green after {2.5 * measured.stall_seconds:g} s of the fault")
            if wait_for_status(services, "/live", True, LIVE_SECONDS) is None:
                measured.fail(f"{name}: liveness is red: {services.probe('/live')}")
            if name not in AT_ONCE:
                began = time.monotonic()
        services.wait_for("/ready", True, LIMIT_SECONDS)
        if red is not None:
            measured.add(name, "green after its end", time.monotonic() - began)
        elif name in AT_ONCE:
            # The fault was over before a service was late.
            measured.add(name, "readiness stays green for", time.monotonic() - began)


def measure_outages(faults: Sequence[tuple[str, Fault]], repetitions: int, measured: Measured) -> None:
    """Measure faults one after the other."""
    with _services(measured.stall_seconds) as start, start() as services:
        for _ in range(repetitions):
            for name, fault in faults:
                measure_outage(name, fault, services, measured)


def measure_broken(repetitions: int, measured: Measured) -> None:
    """Measure faults that need a restart."""
    with _services(measured.stall_seconds) as start:
        for _ in range(repetitions):
            for name, fault in BROKEN:
                with start() as services, publishing(name, services, measured):
                    wait_until(services.have_passed, "all services to make progress", LIMIT_SECONDS)
                    with fault(services), ThreadPoolExecutor(1) as other:
                        live = other.submit(wait_for_status, services, "/live", False, LIMIT_SECONDS)
                        red = wait_for_status(services, "/ready", False, LIMIT_SECONDS)
                        for what, seconds in (("readiness", red), ("liveness", live.result())):
                            if seconds is None:
                                measured.fail(f"{name}: {what} is green after {LIMIT_SECONDS} s of the fault")
                            else:
                                measured.add(name, f"{what} red after", seconds)
                        with services.process:
                            services.process.kill()
                    began = time.monotonic()
                    services.launch()
                    wait_until(services.have_started, "the services to be ready", LIMIT_SECONDS)
                    measured.add(name, "green after a restart", time.monotonic() - began)


@contextlib.contextmanager
def _services(stall_seconds: float) -> Iterator[Callable[[], contextlib.AbstractContextManager[Services]]]:
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(debian_postgres())
        template = stack.enter_context(migrated_template(postgres))
        log = stack.enter_context(tempfile.TemporaryFile("w"))

        @contextlib.contextmanager
        def start() -> Iterator[Services]:
            with (
                tempfile.TemporaryDirectory() as folder,
                running_services(postgres, template, Path(folder), stall_seconds, log) as services,
            ):
                yield services

        yield start


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and append the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="how often to inject each fault")
    parser.add_argument("--stall-seconds", type=float, default=60, help="how long a service may make no progress")
    parser.add_argument("--hold-seconds", type=float, default=30, help="how long a fault lasts after its probe is red")
    options = parser.parse_args(argv)
    load_before = os.getloadavg()[0]
    measured = Measured(options.stall_seconds, options.hold_seconds)
    tasks = [
        functools.partial(measure_outages, OF_POSTGRES, options.pairs, measured),
        functools.partial(measure_outages, OF_REDIS, options.pairs, measured),
        functools.partial(measure_broken, options.pairs, measured),
    ]
    parts = f"background services at {options.stall_seconds:g} s, {describe_databases()}, load {load_before:.1f} before"
    with results_table(parts) as report:
        with ThreadPoolExecutor(len(tasks)) as pool:
            running = [pool.submit(task) for task in tasks]
        report(measured.figures())
    for future in running:
        future.result()
    return 1 if measured.failures else 0


if __name__ == "__main__":
    sys.exit(main())
