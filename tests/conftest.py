"""The parts that tests share: one Postgres and one Prefect server a session, a database a test."""

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

# A shell without job control starts what it puts in the background with SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before Prefect is imported: its settings are read once. Tests leave the person's own home alone.
_HOME = Path(f"/tmp/prefect-orchestration-{os.getpid()}")  # noqa: S108 - removed at the end
os.environ["PREFECT_HOME"] = str(_HOME)
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_LEVEL"] = "INFO"
# Whatever the shell says: without bytecode each process of pytest compiles all tests, each child what it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# One run of pytest with all of its processes, and those of pytest that its tests start.
_BEGINS_RUN = "TESTS_RUN" not in os.environ
os.environ.setdefault("TESTS_RUN", uuid4().hex[:8])
for _name in ("WAREHOUSE_URL", "WAREHOUSE_DIR", "WAREHOUSE_SCHEMA", "LANDING_ZONE", "DBT_THREADS", "PREFECT_API_URL"):
    os.environ.pop(_name, None)

# One example in a hundred may take a second more on a busy machine: none has a deadline.
# The short profile takes its seed from each test. Two runs draw the same examples only if they import the same modules:
# Hypothesis also draws constants from the source of `orchestration`, `flows` and other local modules that are imported,
# and no setting turns that off. A file alone draws other examples than the same file in the whole suite.
hypothesis.settings.register_profile("short", max_examples=100, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=5_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))

from orchestration.operations.local_cluster import binaries
from tests import parts, reporting
from tests.parts import Query, new_database, rows_of, settings_of

if TYPE_CHECKING:
    from tests.cluster.namespace import Namespace
    from tests.orchestration.dbt.conftest import Tiny


IN_ONE_PROCESS = (
    # Each has the cluster alone.
    ("tests/cluster/test_node.py", "tests/e2e/faults/test_kubernetes_api.py"),
)
"""Files that would wait for each other in two processes."""

FIRST = (
    *IN_ONE_PROCESS[0],
    # Meanwhile the other processes run what needs no cluster.
    "tests/test_readme.py",
    "tests/flows/test_faults.py",
    "tests/flows/test_example_flow.py",
    "tests/flows/test_warehouse.py",
    "tests/orchestration/deployments/test_kills.py",
    "tests/orchestration/dbt/test_ends.py",
    "tests/orchestration/runs/test_durable.py",
    "tests/orchestration/deployments/test_sync.py",
    "tests/orchestration/dbt/test_commands.py",
    "tests/orchestration/dbt/test_differential.py",
    "tests/orchestration/deployments/test_differential.py",
    "tests/e2e/test_environment.py",
    "tests/e2e/faults/test_servers.py",
    "tests/e2e/faults/test_workers.py",
    "tests/e2e/faults/test_reconcilers.py",
    "tests/e2e/test_prefect_work_pool.py",
    "tests/e2e/faults/test_nodes.py",
    "tests/e2e/test_prefect_server.py",
    "tests/e2e/test_kubectl_worker.py",
    "tests/e2e/faults/test_starts.py",
    "tests/e2e/faults/test_pods.py",
    "tests/docker/test_image.py",
)
"""The order in which `make test` hands out files to its processes, so that none is left alone with a long one.

Tests on the cluster mostly wait; the other files, which follow, use the processors meanwhile.
"""


class _InGroups(LoadFileScheduling):  # type: ignore[misc] # xdist has no types
    """Hands out whole files, and those of `IN_ONE_PROCESS` together."""

    GROUPS: ClassVar = {file: group[0] for group in IN_ONE_PROCESS for file in group}

    def _split_scope(self, nodeid: str) -> str:
        file = reporting.file_of(nodeid)
        return self.GROUPS.get(file, file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> LoadFileScheduling:
    """Replace the scheduler of `--dist loadfile`."""
    return _InGroups(config, log)


def pytest_configure(config: pytest.Config) -> None:
    from orchestration.errors import ClusterError
    from orchestration.operations.local_cluster import choice

    try:
        choice.requested_cluster()
    except ClusterError as error:
        raise pytest.UsageError(str(error)) from None
    # What is imported for the tests stays: to look at it again and again took half of the time that the imports do.
    gc.disable()
    config.addinivalue_line("markers", "alone: no other test may use the cluster at the same time")


def pytest_sessionstart(session: pytest.Session) -> None:
    plugins = session.config.pluginmanager
    terminal = plugins.get_plugin("terminalreporter")
    distributed = plugins.hasplugin("dsession")
    if not distributed:
        plugins.register(reporting.Meter())
    if terminal and not hasattr(session.config, "workerinput"):
        plugins.register(reporting.Report(terminal, failures=distributed))


def pytest_sessionfinish() -> None:
    """Remove what the processes of this run have shared on the cluster."""
    if _BEGINS_RUN:
        from tests.e2e.release import remove_shared_namespaces

        remove_shared_namespaces()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; each keeps the order of its tests."""
    rank = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what needs a cluster before anything is made for it."""
    if os.environ.get("CLUSTER") == "none" and "cluster" in getattr(item, "fixturenames", ()):
        pytest.skip(reporting.LEFT_OUT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip a test whose program is not here, where none is to be made; in CI it fails."""
    report = yield
    if call.excinfo and call.excinfo.errisinstance(binaries.MissingProgramError) and not os.environ.get("CI"):
        report.outcome = "skipped"
        report.longrepr = (__file__, 0, f"Skipped: {call.excinfo.value}")
    return report


@pytest.fixture(scope="session", autouse=True)
def _prefect_home() -> Iterator[None]:
    """What flows' temporary servers keep their state in."""
    _HOME.mkdir(exist_ok=True)
    shutil.copyfile(parts.migrated_database(), _HOME / "prefect.db")
    yield
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of an embedded PostgreSQL of the session's own."""
    # Not where pytest keeps its folders: another session that begins closes that to all but root.
    with tempfile.TemporaryDirectory() as folder, parts.embedded_postgres(Path(folder)) as url:
        yield url


@pytest.fixture(scope="session")
def tiny(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Tiny"]:
    """A dbt project for many commands, and what runs them in forks; from here on that is what `DbtProject` starts."""
    from tests.orchestration.dbt.conftest import forks

    with forks(postgres, tmp_path_factory.mktemp("tiny")) as made:
        yield made


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The API's URL of a Prefect server of the session's own."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        parts.prefect_server(tmp_path_factory.mktemp("prefect")) as url,
        temporary_settings({PREFECT_API_URL: url}),
    ):
        yield url


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> Iterator[str]:
    """The context of a real cluster, made if need be; `make cluster-down` takes it away.

    Test files share it, also those of other processes; one that is marked `alone` has it to itself.
    """
    from orchestration.errors import ClusterError
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
    """A namespace of the cluster, of the test's own."""
    from tests.cluster.namespace import new

    with new(cluster, "test") as made:
        yield made


@pytest.fixture(scope="module")
def image(cluster: str) -> str:
    """The image of this checkout, built and pushed to where the cluster pulls from; its name."""
    from tests.e2e.release import build_image

    return build_image()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A machine with Docker that can also run a node, as the code sees it. No test machine has both.

    The cache is empty, and no variable names a cluster.
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
    """Set settings' variables for the rest of a test: `use_settings(DBT_THREADS="2")`."""
    with contextlib.ExitStack() as stack:
        yield lambda **variables: stack.enter_context(settings_of(**variables))


@pytest.fixture
def database(postgres: str) -> Iterator[str]:
    """A new, empty database; `WAREHOUSE_URL` names it."""
    with new_database(postgres) as url:
        yield url


@pytest.fixture
def query(database: str) -> Query:
    """Run a statement in the test's database; its rows."""
    return functools.partial(rows_of, database)


@pytest.fixture
def landing_zone(tmp_path: Path, use_settings: Callable[..., None]) -> Path:
    """A writable landing zone with three days of January 2013 and the reference tables."""
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
