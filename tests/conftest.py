"""Fixtures that tests share: a Postgres and a Prefect server for each session, a database for each test."""

import contextlib
import functools
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from uuid import uuid4

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

# A shell without job control ignores SIGINT in background processes, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Set variables before Prefect is imported: it reads its settings once. Tests do not touch the person's PREFECT_HOME.
_HOME = Path(f"/tmp/prefect-orchestration-{os.getpid()}")  # noqa: S108 - removed at the end
os.environ["PREFECT_HOME"] = str(_HOME)
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"
# Always write bytecode. Without it each process of pytest compiles all tests, and each child all of its imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# The id of a run of pytest: of all its processes, and of the pytest processes that its tests start.
_BEGINS_RUN = "TESTS_RUN" not in os.environ
os.environ.setdefault("TESTS_RUN", uuid4().hex[:8])
for _name in ("WAREHOUSE_URL", "WAREHOUSE_DIR", "WAREHOUSE_SCHEMA", "LANDING_ZONE", "DBT_THREADS", "PREFECT_API_URL"):
    os.environ.pop(_name, None)
# `make test` passes its own arguments on to every make below it, which also prints other lines than one of a person.
for _name in ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"):
    os.environ.pop(_name, None)

# No example has a deadline: on a busy machine one in a hundred may take a second longer.
# The short profile derives its seed from each test. Two runs draw the same examples only if they import the same
# modules: Hypothesis also draws constants from the source of imported local modules such as `orchestration` and
# `flows`, and no setting turns that off. A file alone draws other examples than in the whole suite.
hypothesis.settings.register_profile("short", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=1_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries
from tests import parts, reporting
from tests.parts import Query, new_database, rows_of, settings_of

if TYPE_CHECKING:
    from tests.cluster.namespace import Namespace
    from tests.orchestration.dbt.conftest import Tiny


IN_ONE_PROCESS = (
    # Each of these uses the cluster alone.
    ("tests/cluster/test_node.py", "tests/e2e/faults/test_outages.py"),
    # These share a Prefect server, forks of dbt, and a project that is parsed and built once in a process: 30 processor
    # seconds.
    tuple(
        f"tests/orchestration/dbt/{file.name}"
        for file in sorted(Path(__file__).parent.glob("orchestration/dbt/test_*.py"))
    ),
    tuple(f"tests/flows/test_{name}.py" for name in ("example_flow", "warehouse", "backfill", "faults")),
    # These share a Kubernetes API server.
    tuple(
        f"tests/orchestration/operations/rotation/{file.name}"
        for file in sorted(Path(__file__).parent.glob("orchestration/operations/rotation/test_*.py"))
    ),
)
"""Groups of files that would wait for each other in two processes, or prepare the same things in each."""

FIRST = (
    *IN_ONE_PROCESS[0],
    # Meanwhile the other processes run tests without a cluster.
    *IN_ONE_PROCESS[1],
    *IN_ONE_PROCESS[2],
    "tests/test_readme.py",
    "tests/orchestration/services/test_retention.py",
    "tests/orchestration/test_migrations.py",
    "tests/orchestration/test_upgrade.py",
    "tests/orchestration/runs/test_durable.py",
    "tests/orchestration/deployments/test_sync.py",
    "tests/orchestration/deployments/test_differential.py",
    "tests/e2e/test_environment.py",
    "tests/e2e/faults/test_workers.py",
    "tests/e2e/faults/test_reconcilers.py",
    "tests/e2e/test_prefect_work_pool.py",
    "tests/e2e/faults/test_nodes.py",
    "tests/e2e/test_prefect_server.py",
    "tests/e2e/test_kubectl_worker.py",
    "tests/e2e/faults/test_starts.py",
    "tests/e2e/faults/test_pods.py",
    "tests/e2e/test_security.py",
    "tests/e2e/test_surroundings.py",
    "tests/docker/test_image.py",
    "tests/orchestration/services/test_service_faults.py",
    "tests/orchestration/runs/test_engine.py",
    "tests/orchestration/runs/test_result_signing.py",
    "tests/orchestration/worker/test_kubernetes_worker.py",
    "tests/helm/test_values.py",
    *IN_ONE_PROCESS[3],
    "tests/orchestration/operations/test_deploy_history.py",
    "tests/orchestration/deployments/test_running.py",
)
"""The files that `make test` starts first, so that no process ends alone with a long file.

Tests on the cluster mostly wait. The files that are not listed follow, and use the processors meanwhile.
"""


SERVERS_OF_SESSION = {"prefect_server", "guarded"}
"""Fixtures of the session that are a Prefect server. Add each new one: others are stopped while a file uses them."""


class _InGroups(LoadFileScheduling):  # type: ignore[misc] # xdist has no types
    """Schedules whole files, and each group of `IN_ONE_PROCESS` together."""

    GROUPS: ClassVar = {file: group[0] for group in IN_ONE_PROCESS for file in group}

    def _split_scope(self, nodeid: str) -> str:
        file = reporting.file_of(nodeid)
        return self.GROUPS.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    """Replace the scheduler of `--dist loadfile`."""
    return _InGroups(config, log)


def pytest_configure(config: pytest.Config) -> None:
    from orchestration.operations.local_cluster import choice

    try:
        choice.requested_cluster()
    except ClusterError as error:
        raise pytest.UsageError(str(error)) from None
    # Imported modules stay in memory. Repeated garbage collection of them took half of the time of the imports.
    gc.disable()
    config.addinivalue_line("markers", "alone: no other test may use the cluster at the same time")
    config.addinivalue_line(
        "markers", f"{reporting.FURTHER}: a further case of what another test shows: make test-long FOR=cases"
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    terminal = plugins.get_plugin("terminalreporter")
    distributed = plugins.hasplugin("dsession")
    if not distributed:
        plugins.register(reporting.Meter())
    if terminal and not hasattr(session.config, "workerinput"):
        plugins.register(reporting.Report(terminal, failures=distributed))
    if _BEGINS_RUN:
        plugins.register(_SharedNamespaces())


class _SharedNamespaces:
    """Deletes the namespaces that the processes of this run share, once the last test that may use them has ended.

    A server that idles takes the processor from other tests, and so do its databases and the pool of the fault tests.
    """

    FOLDER = "tests/e2e/"

    def __init__(self) -> None:
        self.left = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._count([item.nodeid for item in session.items])

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Count the tests. Every process collects all tests."""
        self._count(ids)

    def _count(self, ids: list[str]) -> None:
        self.left = sum(name.startswith(self.FOLDER) for name in ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" and report.nodeid.startswith(self.FOLDER):
            self.left -= 1
            if not self.left:
                with contextlib.suppress(ClusterError):  # the end of the run tries again
                    self.pytest_sessionfinish()

    def pytest_sessionfinish(self) -> None:
        """Delete what is left, as after an interrupted run."""
        from tests.e2e.release import remove_shared_namespaces

        remove_shared_namespaces()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave further cases to the long test, and order the files; each keeps the order of its tests."""
    if not os.environ.get("FURTHER_CASES"):
        left = [item for item in items if item.get_closest_marker(reporting.FURTHER)]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if not item.get_closest_marker(reporting.FURTHER)]
        if hasattr(config, "workeroutput"):
            config.workeroutput[reporting.FURTHER] = len(left)
    rank = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a cluster under CLUSTER=none, before their fixtures start anything."""
    if os.environ.get("CLUSTER") == "none" and "cluster" in getattr(item, "fixturenames", ()):
        pytest.skip(reporting.LEFT_OUT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip a test whose program is missing and cannot be built. In CI the test fails."""
    report = yield
    if call.excinfo and call.excinfo.errisinstance(binaries.MissingProgramError) and not os.environ.get("CI"):
        report.outcome = "skipped"
        report.longrepr = (__file__, 0, f"Skipped: {call.excinfo.value}")
    return report


@pytest.fixture(scope="session", autouse=True)
def _prefect_home() -> Iterator[None]:
    """Create PREFECT_HOME of temporary servers, with a migrated database."""
    _HOME.mkdir(exist_ok=True)
    shutil.copyfile(parts.migrated_database(), _HOME / "prefect.db")
    yield
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Run an embedded PostgreSQL for the session, and yield its URL."""
    # Not in pytest's temporary folders: another session that starts closes them to all users but root.
    with tempfile.TemporaryDirectory() as folder, parts.embedded_postgres(Path(folder)) as url:
        yield url


@pytest.fixture(scope="session")
def tiny(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Tiny"]:
    """A small dbt project whose commands run in forks of one process. From here on `DbtProject` starts these forks."""
    from tests.orchestration.dbt.conftest import forks

    with forks(postgres, tmp_path_factory.mktemp("tiny")) as made:
        yield made


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a Prefect server for the session, and yield the URL of its API."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tests.server_schema import server_database

    with (
        server_database() as database,
        parts.prefect_server(tmp_path_factory.mktemp("prefect"), **database) as url,
        temporary_settings({PREFECT_API_URL: url}),
    ):
        yield url
        # At the exit Prefect would try for a minute to send the last logs to a server that has ended.
        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=60)


@pytest.fixture(scope="module", autouse=True)
def _stopped_server(request: pytest.FixtureRequest) -> Iterator[None]:
    """Stop the session's Prefect servers unless a test of the file uses one: a server that idles costs time, too."""
    in_file = [item for item in request.session.items if item.nodeid.startswith(f"{request.node.nodeid}::")]
    are_used = any(not SERVERS_OF_SESSION.isdisjoint(getattr(item, "fixturenames", ())) for item in in_file)
    with contextlib.nullcontext() if are_used else parts.stopped_servers():
        yield


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the context of a real cluster, and create the cluster if it does not exist. It stays afterwards.

    Test files of all processes share the cluster. A file that is marked `alone` uses it exclusively.
    """
    from orchestration.operations.local_cluster import __main__ as command

    with contextlib.ExitStack() as stack:
        alone = request.node.get_closest_marker("alone") is not None
        try:
            context = stack.enter_context(command.shared(alone=alone))
        except ClusterError as error:
            if os.environ.get("CI") or os.environ.get("CLUSTER"):
                raise
            pytest.skip(str(error))
        yield context


@pytest.fixture
def namespace(cluster: str) -> Iterator["Namespace"]:
    """Yield a new namespace of the cluster for one test."""
    from tests.cluster.namespace import new

    with new(cluster, "test") as made:
        yield made


@functools.cache
def _pushed_image() -> str:
    """Build this checkout's image once in this process, push it to the cluster's registry, and return its name."""
    from tests.e2e.release import build_image

    return build_image()


@pytest.fixture(scope="module")
def image(cluster: str) -> str:
    """Return the name of this checkout's image in the cluster's registry."""
    from orchestration.operations.registry import has_image

    if not has_image(_pushed_image()):  # another file has created the cluster again
        _pushed_image.cache_clear()
    return _pushed_image()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Simulate a machine with Docker that can also run a node, with an empty cache. No test machine has both.

    No variable names a cluster.
    """
    from orchestration.operations.local_cluster import kind, node

    for name in ("CLUSTER", "KUBE_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kind, "is_docker_running", lambda: True)
    monkeypatch.setattr(node, "unavailable_reason", lambda: None)
    return monkeypatch


@pytest.fixture
def use_settings() -> Iterator[Callable[..., None]]:
    """Yield a function that sets variables of settings for the rest of a test: `use_settings(DBT_THREADS="2")`."""
    with contextlib.ExitStack() as stack:
        yield lambda **variables: stack.enter_context(settings_of(**variables))


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """Create an empty database, set `WAREHOUSE_URL` to it, and yield its URL."""
    with new_database(postgres) as url:
        yield url


@pytest.fixture
def query(database: str) -> Query:
    """Return a function that runs a statement in the test's database and returns its rows."""
    return functools.partial(rows_of, database)


@pytest.fixture
def landing_zone(tmp_path: Path, use_settings: Callable[..., None]) -> Path:
    """Return a writable landing zone with three days of January 2013 and the reference tables."""
    from flows import landing

    source = landing.folder()
    folder = tmp_path / "landing"
    folder.mkdir()
    for table in landing.REFERENCE:
        shutil.copyfile(source / f"{table}.csv", folder / f"{table}.csv")
    days = landing.days()[:3]
    for table in landing.DAILY:
        extract = landing.extract(table, days)
        content = ",".join(extract.columns).encode() + b"\n" + extract.csv
        (folder / f"{table}.csv").write_bytes(content)
    use_settings(LANDING_ZONE=str(folder))
    return folder
