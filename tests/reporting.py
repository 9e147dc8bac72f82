"""Report the processor seconds of tests, and fail a run in which a folder exceeds its budget in tests/budget.toml.

The seconds of a file are those of the process that runs its tests, of all processes that this process has started, and
of the pods in the namespaces of its tests. The local node's agent (orchestration/operations/local_cluster/agent.py)
measures the pods. On any other cluster they count as zero.
"""

import contextlib
import os
import statistics
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestration.operations.local_cluster import binaries, node_processes
from tests.cluster import namespace

PROCESSOR = "processor seconds"
"""The user property of a test's report with its processor seconds."""

LOOP = "loop seconds"
"""The user property with `loop_seconds` at the end of a file."""

LEFT_OUT = "CLUSTER=none: the test needs a cluster"
"""Why a test is skipped under CLUSTER=none."""

FURTHER = "further"
"""The marker of cases that `make test` leaves to a long test."""

NOTE = "note"
"""The user property with a line for the end of the run; an empty one is left out."""

BUDGET = Path(__file__).with_name("budget.toml")

TOLERANCE = 1.2
"""The multiple of its budget above which a folder fails."""

LONG_SECONDS = 30.0
"""Files that take longer are reported when they end."""

MOST_EXPENSIVE = 10
"""Number of files in the report."""

SAMPLE_SECONDS = 2.0
"""Minimum time between two samples within a file. A sample costs about 20 ms."""


def file_of(nodeid: str) -> str:
    """Return the file of a test's id."""
    return nodeid.partition("::")[0]


def loop_seconds() -> float:
    """Return the processor seconds of a fixed piece of work: how slow this machine is now, with what else it runs."""
    start = time.process_time()
    # More memory than the processor's caches of addresses cover: on a shared host these make most of the difference.
    made = {number * 7919 % 100_003: str(number) for number in range(100_000)}
    sum(len(made.get(number * 104_729 % 100_003, "")) for number in range(100_000))
    return time.process_time() - start


class Meter:
    """Measures the processor seconds of each test, in the process that runs it."""

    def __init__(self) -> None:
        os.environ[node_processes.TESTS_PROCESS] = str(os.getpid())
        self.began = time.time()
        self.strangers: set[tuple[int, float]] = set()
        self.daemons: dict[tuple[int, float], float] = {}
        self.sampled = 0.0
        self.spent = self.seconds()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        try:
            return (yield)
        finally:
            last = nextitem is None or file_of(nextitem.nodeid) != file_of(item.nodeid)
            if last or time.monotonic() - self.sampled > SAMPLE_SECONDS:
                spent = self.seconds()
                # The kernel forgets the usage of a killed process, so a difference may be negative.
                item.user_properties.append((PROCESSOR, max(0.0, spent - self.spent)))
                self.spent = spent
            if last:
                item.user_properties.append((LOOP, loop_seconds()))

    def seconds(self) -> float:
        """Return the processor seconds so far of this process, its children, its daemons and its pods."""
        self.sampled = time.monotonic()
        own, nodes = psutil.Process(), node_processes.process_ids()
        tree = [own, *(child for child in own.children(recursive=True) if child.pid not in nodes)]
        self._find_daemons({process.pid for process in tree})
        pods = node_processes.pod_processor_seconds()
        return sum(map(_used, tree)) + sum(self.daemons.values()) + sum(pods.get(name, 0.0) for name in namespace.USED)

    def _find_daemons(self, tree: set[int]) -> None:
        """Find processes that were started here and left the process tree, such as an embedded Postgres."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                key = (process.pid, process.create_time())
                if key in self.strangers or process.pid in tree or key[1] < self.began - 1:
                    continue
                if key in self.daemons or process.environ().get(node_processes.TESTS_PROCESS) == str(os.getpid()):
                    family = [process, *process.children(recursive=True)] if process.ppid() == 1 else []
                    self.daemons[key] = max(self.daemons.get(key, 0.0), sum(map(_used, family)))
                else:
                    self.strangers.add(key)


def _of_node() -> dict[tuple[int, float], float]:
    """Return the processor seconds of each process of the local node, by its id and the time of its start."""
    found = {}
    for pid in node_processes.process_ids():
        with contextlib.suppress(psutil.NoSuchProcess):  # a test restarts the node
            process = psutil.Process(pid)
            found[pid, process.create_time()] = _used(process)
    return found


def _since(before: Mapping[tuple[int, float], float], now: Mapping[tuple[int, float], float]) -> float:
    """Return how much the values have grown. A process that has started since began with 0."""
    return sum(seconds - before.get(key, 0.0) for key, seconds in now.items())


def _used(process: psutil.Process) -> float:
    """Return the processor seconds of a process and of its children that have ended."""
    try:
        return float(sum(process.cpu_times()[:4]))
    except psutil.Error:
        return 0.0


class Report:
    """Reports failures and long files during a run, costs at its end, and fails a run over budget."""

    def __init__(self, terminal: pytest.TerminalReporter, *, failures: bool) -> None:
        self.terminal = terminal
        self.failures = failures
        self.left: Counter[str] = Counter()
        self.wall: dict[str, float] = Counter()  # type: ignore[assignment] # a Counter takes any number
        self.processor: dict[str, float] = Counter()  # type: ignore[assignment]
        self.loops: list[float] = []
        self.began = time.monotonic()
        self.pods = node_processes.pod_processor_seconds()
        self.node = _of_node()
        self.over: list[str] = []
        self.cached = _cached()
        self.left_out: Counter[str] = Counter()
        self.further = 0
        self.notes: list[str] = []

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        if not os.environ.get("FURTHER_CASES"):
            self.further += sum(item.get_closest_marker(FURTHER) is not None for item in items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take the number from a process of xdist. Every process collects all tests."""
        self.further = getattr(node, "workeroutput", {}).get(FURTHER, self.further)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.left = Counter(file_of(item.nodeid) for item in session.items)

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Count the tests of each file. Every process collects all tests."""
        self.left = Counter(map(file_of, ids))

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = file_of(report.nodeid)
        self.wall[file] += report.duration
        self.left[file] -= report.when == "teardown"
        self.left_out[file] += report.skipped and LEFT_OUT in str(report.longrepr)
        lines = []
        if report.failed and self.failures:
            lines += [f"{report.nodeid}: {report.when} failed after {report.duration:.0f} s", report.longreprtext]
        if report.when == "teardown":
            lines += [f"{report.nodeid}: {value}" for name, value in report.user_properties if name == "took"]
            self.notes += [str(value) for name, value in report.user_properties if name == NOTE and value]
            numbers = [(name, value) for name, value in report.user_properties if isinstance(value, float)]
            self.processor[file] += sum(value for name, value in numbers if name == PROCESSOR)
            self.loops += [value for name, value in numbers if name == LOOP]
        if not self.left[file] and self.wall[file] > LONG_SECONDS:
            lines.append(f"{file}: {self.wall[file]:.0f} s, {self.processor[file]:.0f} processor seconds")
        for line in lines:
            self.terminal.write_line(f"\n{line}")  # after pytest's dots

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.further:
            session.exitstatus = pytest.ExitCode.OK
        whole = session.config.args in (["tests"], [str(session.config.rootpath)]) and not session.config.option.keyword
        # A run that builds a program for the cache is not held to the budget: a build costs as much as many tests.
        if exitstatus == 0 and whole and self.loops and _cached() == self.cached:
            self.over = over_budget(self.processor, statistics.median(self.loops), tomllib.loads(BUDGET.read_text()))
            if self.over:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self) -> None:
        write = self.terminal.write_line
        if sum(self.wall.values()) >= LONG_SECONDS:
            self._write_costs()
        if files := sorted(+self.left_out):
            tests = f"{self.left_out.total()} tests that need a cluster"
            write(f"Left out: {tests}. Run them: make test TESTS='{' '.join(files)}'")
        if self.further:
            write(f"Left out: {self.further} further cases. Run them: make test-long FOR=cases")
        for line in self.notes:
            write(line)
        for line in self.over:
            write(line, red=True, bold=True)

    def _write_costs(self) -> None:
        write = self.terminal.write_line
        write(f"\n{'processor s':>12}{'wall s':>9}  the {MOST_EXPENSIVE} most expensive files")
        for file, seconds in sorted(self.processor.items(), key=lambda entry: -entry[1])[:MOST_EXPENSIVE]:
            write(f"{seconds:>12.0f}{self.wall[file]:>9.0f}  {file}")
        folders: Counter[str] = Counter()
        for file, seconds in self.processor.items():
            folders[file.rpartition("/")[0]] += seconds  # type: ignore[assignment]
        for folder, seconds in sorted(folders.items(), key=lambda entry: -entry[1]):
            write(f"{seconds:>12.0f}{'':>9}  {folder}/")
        now = node_processes.pod_processor_seconds()
        pods = sum(seconds - self.pods.get(name, 0.0) for name, seconds in now.items())
        write(f"{pods:>12.0f}{'':>9}  all pods, those of the shared server among them")
        write(f"{_since(self.node, _of_node()):>12.0f}{'':>9}  the node: control plane, kubelet, containerd")
        write(f"{sum(self.processor.values()):>12.0f}{time.monotonic() - self.began:>9.0f}  all files")


def _cached() -> set[str]:
    """Return the names of the folders in the cache of programs."""
    return {folder.name for folder in binaries.cache().glob("*") if folder.is_dir()}


def over_budget(spent: Mapping[str, float], loop: float, budget: Mapping[str, object]) -> list[str]:
    """Return a line for each folder over its budget, with its most expensive file.

    Args:
        spent: processor seconds by file.
        loop: the median of `loop_seconds()` over the files of the run.
        budget: tests/budget.toml.
    """
    limits: dict[str, float] = dict(budget["processor_seconds"])  # type: ignore[call-overload]
    # The loop shows slow memory, not a processor that others share: a short one does not make the limits stricter.
    slower = max(1, loop / float(budget["loop"]))  # type: ignore[arg-type]
    lines = []
    for folder, limit in limits.items():
        inside = {file: seconds for file, seconds in spent.items() if _folder(file, limits) == folder}
        total = sum(inside.values()) / slower
        if total > TOLERANCE * limit:
            most = max(inside, key=lambda file: inside[file])
            lines.append(
                f"{folder} took {total:.0f} processor seconds, {100 * (total / limit - 1):.0f} % over its budget of"
                f" {limit:.0f} (tests/budget.toml). Most of it: {most}, {inside[most] / slower:.0f} s"
            )
    return lines


def _folder(file: str, limits: Mapping[str, float]) -> str:
    """Return the innermost folder of a file that has a budget."""
    return max((folder for folder in limits if file.startswith(folder.rstrip("/") + "/")), key=len, default="")
