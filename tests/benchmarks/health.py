"""Measure how soon the health of the background services turns red at each fault, and green again.

    python -m tests.benchmarks.health --pairs 3      # or: make bench-health

The services run at the chart's limits, on a real Postgres and Redis of this machine. A fault lasts until its probe is
red and 30 s longer. Then the fault ends, or where the process needs a restart, the process starts again. Meanwhile
events are published, and counted in the database at the end. The table is printed and appended to results.md.
"""

import argparse
import contextlib
import functools
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import service_faults
from tests.benchmarks.table import Figure, results_table
from tests.parts import debian_postgres, wait_until
from tests.service_faults import Services, migrated_template, running_services

STALL_SECONDS = 60
HOLD_SECONDS = 30
LIMIT_SECONDS = 600

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


class Measured:
    """Collects the seconds of each fault."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.lost: dict[str, int] = defaultdict(int)
        self.lock = threading.Lock()

    def add(self, name: str, what: str, seconds: float) -> None:
        """Add a value, and show it."""
        with self.lock:
            self.seconds[name, what].append(seconds)
            print(f"{name}: {what} {seconds:.1f} s", file=sys.stderr, flush=True)

    def figures(self) -> list[Figure]:
        """Return a figure for each fault and probe."""
        return [
            Figure(f"{name}: {what}", "s", values, f"{self.lost[name]} events lost" if "green" in what else "")
            for (name, what), values in sorted(self.seconds.items())
        ]


def wait_for_status(services: Services, path: str, healthy: bool, seconds: float) -> float | None:
    """Return after how many seconds a probe succeeded or failed; None if it did not."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if (services.probe(path)[0] == 200) == healthy:
            return time.monotonic() - start
        time.sleep(0.5)
    return None


def publish_each(services: Services, ended: threading.Event) -> None:
    """Publish an event each 5 s until the end."""
    while not ended.wait(5):
        with contextlib.suppress(OSError, service_faults.RedisError):
            services.publish()


def measure_outage(name: str, fault: Fault, services: Services, measured: Measured) -> None:
    """Measure a fault of a dependency."""
    ended = threading.Event()
    publishing = threading.Thread(target=publish_each, args=(services, ended))
    publishing.start()
    wait_until(services.have_passed, "all services to make progress", LIMIT_SECONDS)
    try:
        with fault(services):
            began = time.monotonic()
            # A fault that ends at once may be over before a service is late.
            red = wait_for_status(services, "/ready", False, 2.5 * STALL_SECONDS)
            if red is not None:
                measured.add(name, "readiness red after", red)
                if name not in AT_ONCE:
                    time.sleep(HOLD_SECONDS)
                    began = time.monotonic()
            assert services.probe("/live")[0] == 200, f"{name}: {services.probe('/live')}"
        services.wait_for("/ready", True, LIMIT_SECONDS)
        if red is not None:
            measured.add(name, "green after its end", time.monotonic() - began)
    finally:
        ended.set()
        publishing.join()
    with contextlib.suppress(AssertionError):
        wait_until(lambda: services.count_lost_events() == 0, "the events to be in the database", 60)
    measured.lost[name] += services.count_lost_events()
    services.published.clear()


def measure_outages(faults: Sequence[tuple[str, Fault]], repetitions: int, measured: Measured) -> None:
    """Measure faults one after the other."""
    with _services() as start, start() as services:
        for _ in range(repetitions):
            for name, fault in faults:
                measure_outage(name, fault, services, measured)


def measure_broken(repetitions: int, measured: Measured) -> None:
    """Measure faults that need a restart."""
    with _services() as start:
        for _ in range(repetitions):
            for name, fault in BROKEN:
                with start() as services:
                    wait_until(services.have_passed, "all services to make progress", LIMIT_SECONDS)
                    with fault(services), ThreadPoolExecutor(1) as other:
                        live = other.submit(wait_for_status, services, "/live", False, LIMIT_SECONDS)
                        red = wait_for_status(services, "/ready", False, LIMIT_SECONDS)
                        assert red is not None
                        measured.add(name, "readiness red after", red)
                        seconds = live.result()
                    assert seconds is not None, name
                    measured.add(name, "liveness red after", seconds)
                    services.process.kill()
                began = time.monotonic()
                with start():
                    measured.add(name, "green after a restart", time.monotonic() - began)


@contextlib.contextmanager
def _services() -> Iterator[Callable[[], contextlib.AbstractContextManager[Services]]]:
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(debian_postgres())
        template = stack.enter_context(migrated_template(postgres))
        log = stack.enter_context(tempfile.TemporaryFile("w"))

        @contextlib.contextmanager
        def start() -> Iterator[Services]:
            with (
                tempfile.TemporaryDirectory() as folder,
                running_services(postgres, template, Path(folder), STALL_SECONDS, log) as services,
            ):
                yield services

        yield start


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and append the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="how often to inject each fault")
    repetitions = parser.parse_args(argv).pairs
    measured = Measured()
    tasks = [
        functools.partial(measure_outages, OF_POSTGRES, repetitions, measured),
        functools.partial(measure_outages, OF_REDIS, repetitions, measured),
        functools.partial(measure_broken, repetitions, measured),
    ]
    with results_table("background services at 60 s, PostgreSQL and Redis of this machine") as report:
        with ThreadPoolExecutor(len(tasks)) as pool:
            running = [pool.submit(task) for task in tasks]
        report(measured.figures())
    for future in running:
        future.result()


if __name__ == "__main__":
    main()
