"""Upgrade the previous release to this checkout by `make deploy` on a real cluster, during flow runs, and roll back.

`make test` does not collect this file; `make test-long FOR=cluster-upgrade` runs it.

The previous release is deployed from its own commit by its own `make deploy`, with its own charts, image and locked
packages. Flow runs record their actions in the warehouse, with their pod and their version of Prefect. So the tests do
not depend on the Prefect server that the upgrade replaces.
"""

import contextlib
import json
import re
import shutil
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from orchestration.operations.environment import Environment, Object
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.operations.port_forward import api_client
from orchestration.settings import ROOT
from tests.cluster.namespace import USED, Namespace, new, remove
from tests.e2e.checkout import CRON, SHIPPED_CRON, Checkout
from tests.e2e.runs import get_run, start_run, wait_until_ended
from tests.parts import asked, copy_of_checkout, wait_until
from tests.versions.catalogue import PREVIOUS, locked_version, previous_release

FLOW = '''
"""Record the actions of a flow run in the warehouse, and read there which phases of the test have begun."""

import os
import time

import prefect
import psycopg
from prefect import flow, task
from prefect.runtime import flow_run


def sql(statement, *values):
    # The upgrade may replace the pod of the local warehouse. A connection to the former pod would wait for minutes.
    limits = {"connect_timeout": 2, "tcp_user_timeout": 5_000}
    while True:
        try:
            with psycopg.connect(os.environ["WAREHOUSE_URL"], autocommit=True, **limits) as connection:
                cursor = connection.execute(statement, values)
                return cursor.fetchall() if cursor.description else []
        except psycopg.OperationalError:
            time.sleep(0.5)


def record(action):
    values = (flow_run.get_id(), os.environ["HOSTNAME"], prefect.__version__, action)
    sql("insert into actions (run, pod, prefect, action) values (%s, %s, %s, %s)", *values)


def is_past(phase, seconds=0):
    due = "began + make_interval(secs => %s) < now()"
    return bool(sql(f"select 1 from phases where name = %s and {due}", phase, seconds))


def count(action):
    return sql("select count(*) from actions where run = %s and action = %s", flow_run.get_id(), action)[0][0]


@task
def step(number):
    record(f"step {number}")


@task(retries=3, retry_delay_seconds=5)
def fails_twice():
    record("try")
    if count("try") < 3:
        raise RuntimeError("The test asked this try to fail")


@flow(retries=1, retry_delay_seconds=10)
def spans(phase: str = "", seconds: float = 0, fails: str = ""):
    """Take a step every two seconds until some seconds after a phase began. Then fail as `fails` demands."""
    record("begin")
    number = 0
    while not number or (phase and not is_past(phase, seconds)):
        number += 1
        step(number)
        time.sleep(2)
    if fails == "task":
        fails_twice()
    elif fails == "flow" and count("begin") == 1:
        raise RuntimeError("The test asked this attempt to fail")
    record("end")
'''

DEPLOYMENTS = """
  - name: held
    entrypoint: flows/spans.py:spans
    work_pool: {name: default, job_variables: &small {cpu_request: 20m, memory_request: 128Mi}}

  - name: minutely
    entrypoint: flows/spans.py:spans
    work_pool: {name: default, job_variables: *small}
    schedules:
      - {cron: "* * * * *", timezone: UTC}
"""

TABLES = """
create table actions (run text, pod text, prefect text, action text, time timestamptz default clock_timestamp());
create table phases (name text primary key, began timestamptz default now());
"""

PROBE = """
import sys, time, urllib.request
while True:
    began = time.time()
    try:
        urllib.request.urlopen(sys.argv[1], timeout=2).read()
        answered = 1
    except Exception:
        answered = 0
    print(began, answered, flush=True)
    time.sleep(max(0, began + 0.2 - time.time()))
"""

UPGRADE, UPGRADED, EVICTED, ROLLBACK, MOVED = "upgrade", "upgraded", "evicted", "rollback", "moved"
"""The phases of the test. Flow runs wait for them."""

IN_PROGRESS: dict[str, Object] = {
    **{f"held-{number}": {"phase": UPGRADED} for number in range(1, 5)},
    # These end or fail while the deploy replaces the server.
    **{f"ends-after-{seconds}-s": {"phase": UPGRADE, "seconds": seconds} for seconds in (5, 15, 45)},
    "task-fails-after-5-s": {"phase": UPGRADE, "seconds": 5, "fails": "task"},
    "task-fails-after-20-s": {"phase": UPGRADE, "seconds": 20, "fails": "task"},
    "flow-fails-after-10-s": {"phase": UPGRADE, "seconds": 10, "fails": "flow"},
}
"""Parameters of the flow runs that begin before the upgrade and must complete in their pods."""

TO_EVICT = {"phase": EVICTED}
"""Parameters of the flow run that begins before the upgrade and loses its pod after it."""


POOL_VALUES = "helm/environments/local/prefect-work-pool.yaml"

FOR_ROLLBACK = (
    ("\npool:", '\napi: {auth: {rolesSecret: ""}}\npool:'),
    ('"{{ .Release.Namespace }}-runs"', '""'),
)
"""Changes of the pool's values for a deploy that is rolled back during flow runs.

docs/how-to/api-roles.md: the previous server does not know credentials of runs. docs/upgrading.md: the previous
reconciler handles no run in another namespace, so `make rollback` would wait for the end of these runs.
"""

WINDOW_SECONDS = range(5, 95, 10)
"""The due times of flow runs, in seconds after the deploy begins."""


@dataclass(frozen=True)
class Releases:
    """Reads the state of an environment to which two checkouts are deployed.

    Args:
        target: the environment.
        old: the checkout of the previous release.
        new: the copy of this checkout.
    """

    target: Environment
    old: Checkout
    new: Checkout

    def execute(self, statement: str) -> str:
        """Execute a statement in the warehouse and return its rows as text."""
        return self._psql("warehouse-0", "warehouse", statement)

    def begin(self, phase: str) -> None:
        """Begin a phase, so that the flow runs that wait for it end."""
        self.execute(f"insert into phases (name) values ('{phase}')")

    def actions(self, *names: str) -> dict[str, list[Object]]:
        """Return the recorded actions by flow run, oldest first: those with these names, or all."""
        rows = self.execute("select coalesce(json_agg(a order by time), '[]') from actions a")
        found = defaultdict(list)
        for row in json.loads(rows):
            if not names or row["action"] in names:
                found[row["run"]].append(row)
        return found

    def schema(self) -> str:
        """Return the revision of the Prefect server's database."""
        return self._psql("prefect-server-database-0", "prefect", "select version_num from alembic_version")

    def _psql(self, pod: str, user: str, statement: str) -> str:
        connect = ("psql", "-q", "-v", "ON_ERROR_STOP=1", "-U", user, "-d", user, "-Atc")
        return self.target.kubectl("exec", pod, "--", *connect, statement).strip()

    def images(self, component: str) -> set[str]:
        """Return the images of a component's pods, without pods that are ending."""
        return {
            pod["spec"]["containers"][0]["image"]
            for pod in self.target.objects("pods", "--selector", f"app.kubernetes.io/component={component}")
            if not pod["metadata"].get("deletionTimestamp")
        }

    def wait_until_replaced(self) -> None:
        """Wait until the API's replaced pods are gone. kubectl may forward a port to a pod that is ending."""
        selector = ("--selector", "app.kubernetes.io/component=api")
        wait_until(
            lambda: not any(pod["metadata"].get("deletionTimestamp") for pod in self.target.objects("pods", *selector)),
            "the replaced pods of the API to be gone",
        )

    def pods(self, run: str) -> list[Object]:
        """Return the pods of a flow run."""
        return self.target.objects("pods", "--selector", f"prefect.io/flow-run-id={run}")

    def deployment_id(self, api: httpx.Client, name: str) -> str:
        """Return the id of a deployment of the flow."""
        return str(asked(api, "GET", f"/deployments/name/spans/{name}")["id"])

    def scheduled_runs(self, api: httpx.Client, until: datetime) -> list[Object]:
        """Return the flow runs of the schedule that were due before a moment."""
        due = {"expected_start_time": {"before_": until.isoformat()}}
        body = {"deployments": {"name": {"any_": ["minutely"]}}, "flow_runs": due, "limit": 200}
        found: list[Object] = asked(api, "POST", "/flow_runs/filter", body)
        return found


@dataclass(frozen=True)
class Before:
    """The previous release, with flow runs in progress.

    Args:
        runs: the id of each flow run of `IN_PROGRESS`, by its name there.
        to_evict: the id of the flow run that loses its pod after the upgrade.
        image: the image of the release.
        schema: the revision of the Prefect server's database.
        version: the version of the Prefect server.
        pods: the pod of each flow run, by the run's id.
        figures: how long the steps took.
    """

    runs: dict[str, str]
    to_evict: str
    image: str
    schema: str
    version: str
    pods: dict[str, Object]
    figures: str


@dataclass(frozen=True)
class After:
    """The environment after the upgrade.

    Args:
        image: the image of the new release.
        began: when the deploy began.
        ended: when the deploy had ended.
        outage: the outage of the Prefect API during the deploy.
        completed: when the last flow run of `IN_PROGRESS` had ended.
        figures: how long the steps took.
    """

    image: str
    began: datetime
    ended: datetime
    outage: "Outage"
    completed: datetime
    figures: str


@dataclass(frozen=True)
class Outage:
    """How long the Prefect API did not answer. A request with a timeout of 2 s is sent 5 times a second.

    Args:
        seconds: the sum of all outages, each from the first failed request to the next answer.
        failed: the number of requests that failed.
        requests: the number of requests.
    """

    seconds: float
    failed: int
    requests: int

    def __str__(self) -> str:
        return f"API away for {self.seconds:.1f} s, {self.failed} of {self.requests} requests failed"


def _prepare_checkout(folder: Path, target: Environment, venv: Path) -> Checkout:
    """Add the flow and its deployments to a release's files, allow more runs, and commit all."""
    (folder / ".venv").symlink_to(venv)
    made = Checkout(folder, target)
    made.edit("prefect.yaml", SHIPPED_CRON, CRON)
    made.edit(POOL_VALUES, "concurrencyLimit: 10", "concurrencyLimit: 30")
    (folder / "flows" / "spans.py").write_text(FLOW)
    (folder / "prefect.yaml").write_text((folder / "prefect.yaml").read_text() + DEPLOYMENTS)
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.com"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "A copy"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return made


@pytest.fixture(scope="module")
def releases(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Releases]:
    """Both checkouts, for namespaces that do not exist yet. The fixture removes the namespaces afterwards."""
    target = Environment("local", cluster, f"upgrade-{uuid4().hex[:8]}")
    USED.update(target.namespaces)
    python, files = previous_release()
    old, new_folder = tmp_path_factory.mktemp("old") / "checkout", tmp_path_factory.mktemp("new")
    shutil.copytree(files, old, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis", ".venv"))
    copy_of_checkout(new_folder)
    made = Releases(
        target,
        _prepare_checkout(old, target, python.parent.parent),
        _prepare_checkout(new_folder, target, ROOT / ".venv"),
    )
    with hold_lock(binaries.cache() / "environments.lock"):
        try:
            yield made
        finally:
            for name in target.namespaces:
                remove(Namespace(cluster, name))


@pytest.fixture(scope="module")
def before(releases: Releases) -> Before:
    """The previous release, deployed, with its flow runs in progress."""
    start = time.monotonic()
    output = releases.old.make("deploy")
    deployed = time.monotonic()
    releases.execute(TABLES)
    with api_client(releases.target) as api:
        held = releases.deployment_id(api, "held")
        runs = {name: start_run(api, held, name=name, parameters=given) for name, given in IN_PROGRESS.items()}
        evicted = start_run(api, held, name="evicted", parameters=TO_EVICT)
        started = {*runs.values(), evicted}
        wait_until(lambda: set(releases.actions("step 1")) >= started, "all flow runs to be in progress", 300)
        version = asked(api, "GET", "/admin/version")
    [image] = releases.images("worker")
    return Before(
        runs, evicted, image, releases.schema(), version,
        pods={run: pod for run in started for pod in releases.pods(run)},
        figures=(
            f"deploy {deployed - start:.0f} s ({_step_seconds(output)}), "
            f"{len(started)} flow runs in progress {time.monotonic() - deployed:.0f} s later"
        ),
    )  # fmt: skip


def _step_seconds(output: str) -> str:
    """Return the steps in the output of a make target, each with its seconds."""
    steps = re.findall(r"^([A-Z][^(\n]*) \([^)]*\) \.\.\. ([\d.]+) s$", output, re.MULTILINE)
    assert steps, output
    return ", ".join(f"{step[0].lower()}{step[1:]} {seconds} s" for step, seconds in steps)


@contextlib.contextmanager
def _measured_outage(releases: Releases) -> Iterator[list[Outage]]:
    """Send requests to the Prefect API while the block lasts; afterwards the yielded list has the outage."""
    found: list[Outage] = []
    url = f"http://prefect-server-api.{releases.target.namespace}.svc.cluster.local:4200/api/ready"
    with new(releases.target.context, "probe") as namespace:
        namespace.pod("probe", "python3", "-c", PROBE, url)

        def is_answered() -> bool:
            return namespace.kubectl("logs", "probe").endswith(" 1\n")

        wait_until(is_answered, "the Prefect API to answer")
        yield found
        wait_until(is_answered, "the Prefect API to answer again")
        lines = [line.split() for line in namespace.kubectl("logs", "probe").splitlines()]
    found.append(_outage([(float(moment), answered == "1") for moment, answered in lines]))


def _outage(answers: Sequence[tuple[float, bool]]) -> Outage:
    """Return the outage in a sequence of requests: when each was sent, and whether the API answered."""
    seconds, since = 0.0, None
    for moment, answered in answers:
        if not answered:
            since = moment if since is None else since
        elif since is not None:
            seconds += moment - since
            since = None
    assert since is None, "the Prefect API does not answer"
    return Outage(seconds, sum(not answered for _, answered in answers), len(answers))


@pytest.fixture(scope="module")
def after(releases: Releases, before: Before) -> After:
    """The environment after `make deploy` of this checkout. All flow runs of `IN_PROGRESS` have ended."""
    start = time.monotonic()
    for shipped, changed in FOR_ROLLBACK:
        releases.new.edit(POOL_VALUES, shipped, changed)
    releases.new.make("push")  # so that the deploy builds no image
    pushed = time.monotonic()
    assert "prefect-server: Deployment/prefect-server-api is changed" in releases.new.make("plan", status=2)
    planned = time.monotonic()
    with _measured_outage(releases) as outages:
        # So that a run of the schedule is due within the first half minute.
        wait_until(lambda: 35 < datetime.now(UTC).second < 45, "the end of a minute", 90)
        with api_client(releases.target) as api:
            held = releases.deployment_id(api, "held")
            for seconds in WINDOW_SECONDS:
                due = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
                state = {"type": "SCHEDULED", "state_details": {"scheduled_time": due}}
                start_run(api, held, name=f"due-after-{seconds}-s", state=state)
        releases.begin(UPGRADE)
        began = datetime.now(UTC)
        output = releases.new.make("deploy")
        ended = datetime.now(UTC)
    releases.begin(UPGRADED)
    releases.wait_until_replaced()
    with api_client(releases.target) as api:
        for run in before.runs.values():
            wait_until_ended(api, run, 240)
    [image] = releases.images("worker")
    figures = (
        f"image {pushed - start:.0f} s, plan {planned - pushed:.0f} s, "
        f"deploy {(ended - began).total_seconds():.0f} s ({_step_seconds(output)}), {outages[0]}"
    )
    return After(image, began, ended, outages[0], datetime.now(UTC), figures)


@pytest.fixture
def record_figures(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that adds figures to the test's report, from which the long test's results have them."""
    # pytest's record_property warns in a run with --junitxml, and warnings are errors.
    return lambda figures: request.node.user_properties.append(("took", figures))


def _state_names(api: httpx.Client, run: str) -> list[str]:
    """Return the names of all states that a flow run had, oldest first."""
    states = asked(api, "GET", f"/flow_run_states/?flow_run_id={run}")
    return [state["name"] for state in sorted(states, key=lambda state: str(state["timestamp"]))]


def _lateness(run: Object, actions: Sequence[Object]) -> float:
    """Return the seconds from a flow run's scheduled time to its begin."""
    due = datetime.fromisoformat(run["expected_start_time"])
    return (datetime.fromisoformat(actions[0]["time"]) - due).total_seconds()


def test_release_before_has_flow_runs_in_progress(
    releases: Releases, before: Before, record_figures: Callable[[str], None]
) -> None:
    assert before.version == PREVIOUS
    assert len(before.runs) == 10
    assert before.pods.keys() == {*before.runs.values(), before.to_evict}
    for pod in before.pods.values():
        assert pod["spec"]["containers"][0]["image"] == before.image
        assert pod["status"]["phase"] == "Running"
    assert {action["prefect"] for actions in releases.actions().values() for action in actions} == {PREVIOUS}
    record_figures(before.figures)


def test_deploy_upgrades_server_schema_worker_and_reconciler(
    releases: Releases, before: Before, after: After, record_figures: Callable[[str], None]
) -> None:
    assert after.image != before.image
    for component in ("api", "services", "worker", "reconciler", "drift"):
        assert releases.images(component) == {after.image}, component
    for component in ("prefect-server-api", "prefect-work-pool-worker", "prefect-work-pool-reconciler"):
        # The reconciler's memory limit has no room for an import of Prefect.
        command = ("python", "-c", "from importlib.metadata import version; print(version('prefect'))")
        assert releases.target.kubectl("exec", f"deployment/{component}", "--", *command).strip() == locked_version()
    with api_client(releases.target) as api:
        assert asked(api, "GET", "/admin/version") == locked_version()
    head = ("python", "-c", "from orchestration.migrations import _revisions; print(_revisions()[0])")
    schema = releases.schema()
    assert schema == releases.target.kubectl("exec", "deployment/prefect-server-api", "--", *head).strip()
    log = releases.target.kubectl("logs", "job/prefect-server-migrations-2")
    assert f"The schema went from {before.schema} to {schema}." in log
    record_figures(after.figures)


def test_runs_in_progress_complete_once_in_their_pods(
    releases: Releases, before: Before, after: After, record_figures: Callable[[str], None]
) -> None:
    recorded = releases.actions()
    with api_client(releases.target) as api:
        for name, run in before.runs.items():
            attempts = 2 if name.startswith("flow-fails") else 1
            states = _state_names(api, run)
            assert states[-1] == "Completed", (name, states)
            assert "Crashed" not in states, (name, states)
            assert states.count("Pending") == 1, (name, states)
            counts = Counter(action["action"] for action in recorded[run])
            assert counts["begin"] == attempts, (name, counts)
            assert counts["end"] == 1, (name, counts)
            assert counts["try"] == (3 if name.startswith("task-fails") else 0), (name, counts)
            steps = {action: count for action, count in counts.items() if action.startswith("step")}
            assert set(steps.values()) == {1}, (name, steps)
            assert len(steps) > 10, (name, steps)
            assert {(action["pod"], action["prefect"]) for action in recorded[run]} == {
                (before.pods[run]["metadata"]["name"], PREVIOUS)
            }
            [pod] = releases.pods(run)
            assert pod["metadata"]["uid"] == before.pods[run]["metadata"]["uid"]
            assert pod["spec"]["containers"][0]["image"] == before.image
            assert pod["status"]["phase"] == "Succeeded"
            assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
            assert len(releases.target.objects("jobs", "--selector", f"prefect.io/flow-run-id={run}")) == 1
    seconds = (after.completed - after.ended).total_seconds()
    record_figures(f"{len(before.runs)} of {len(before.runs)}, the last {seconds:.0f} s after the deploy")


def test_some_runs_end_and_fail_during_the_upgrade(releases: Releases, before: Before, after: After) -> None:
    """The other tests would pass, too, if no run ended during the upgrade."""
    recorded = releases.actions("end", "try", "begin")
    during = {
        name: [
            action["action"]
            for action in recorded[run]
            if after.began < datetime.fromisoformat(action["time"]) < after.ended
        ]
        for name, run in before.runs.items()
    }
    assert during["ends-after-5-s"] == ["end"]
    assert during["ends-after-15-s"] == ["end"]
    assert during["task-fails-after-5-s"].count("try") == 3
    assert during["flow-fails-after-10-s"].count("begin") == 1


def test_runs_that_are_due_during_the_upgrade_are_executed_once(
    releases: Releases, before: Before, after: After, record_figures: Callable[[str], None]
) -> None:
    body = {"flow_runs": {"name": {"like_": "due-after-"}}}
    with api_client(releases.target) as api:
        due = asked(api, "POST", "/flow_runs/filter", body)
        ends = {run["id"]: wait_until_ended(api, run["id"], 240) for run in due}
        assert len(ends) == len(WINDOW_SECONDS)
        for run in ends:
            states = _state_names(api, run)
            assert states[-1] == "Completed", states
            assert "Crashed" not in states, states
    versions = {before.image: PREVIOUS, after.image: locked_version()}
    recorded = releases.actions("begin", "end")
    for run in ends:
        [pod] = releases.pods(run)
        version = versions[pod["spec"]["containers"][0]["image"]]
        assert [(action["action"], action["prefect"]) for action in recorded[run]] == [
            ("begin", version), ("end", version),
        ]  # fmt: skip
    late = max(_lateness(run, recorded[run_id]) for run_id, run in ends.items())
    old = sum(recorded[run][0]["prefect"] == PREVIOUS for run in ends)
    record_figures(f"{len(ends)} runs, {old} with the older image, begun up to {late:.0f} s after their scheduled time")


def test_schedule_has_one_run_each_minute(
    releases: Releases, before: Before, after: After, record_figures: Callable[[str], None]
) -> None:
    with api_client(releases.target) as api:
        due = releases.scheduled_runs(api, after.completed + timedelta(minutes=1))
        ends = {run["id"]: wait_until_ended(api, run["id"], 240) for run in due}
    assert {run["state_name"] for run in ends.values()} == {"Completed"}
    moments = sorted(datetime.fromisoformat(run["expected_start_time"]) for run in ends.values())
    assert {int((late - early).total_seconds()) for early, late in pairwise(moments)} == {60}
    assert any(after.began < moment < after.ended for moment in moments)
    recorded = releases.actions("begin", "end")
    assert {tuple(action["action"] for action in recorded[run]) for run in ends} == {("begin", "end")}
    assert {action["prefect"] for run in ends for action in recorded[run]} == {PREVIOUS, locked_version()}
    late = max(_lateness(run, recorded[run_id]) for run_id, run in ends.items())
    record_figures(f"{len(ends)} runs, begun up to {late:.0f} s after their scheduled time")


def test_run_with_the_older_image_completes_after_the_upgrade(releases: Releases, before: Before, after: After) -> None:
    """A deployment's own image may be built from the previous release."""
    with api_client(releases.target) as api:
        held = releases.deployment_id(api, "held")
        run = start_run(api, held, job_variables={"image": before.image})
        assert wait_until_ended(api, run)["state_name"] == "Completed"
    [pod] = releases.pods(run)
    assert pod["spec"]["containers"][0]["image"] == before.image
    assert [action["prefect"] for action in releases.actions("begin")[run]] == [PREVIOUS]


def test_run_that_is_evicted_after_the_upgrade_completes_with_the_newer_image(
    releases: Releases, before: Before, after: After, record_figures: Callable[[str], None]
) -> None:
    with api_client(releases.target) as api:
        assert get_run(api, before.to_evict)["state_type"] == "RUNNING"
        start = time.monotonic()
        releases.target.kubectl("delete", "pod", before.pods[before.to_evict]["metadata"]["name"], "--wait=false")
        wait_until(lambda: len(releases.actions("begin")[before.to_evict]) == 2, "its second run attempt", 180)
        record_figures(f"second run attempt {time.monotonic() - start:.0f} s after the eviction")
        releases.begin(EVICTED)
        assert wait_until_ended(api, before.to_evict)["state_name"] == "Completed"
        assert "Crashed" not in _state_names(api, before.to_evict)
    recorded = releases.actions("begin", "end")[before.to_evict]
    assert [(action["action"], action["prefect"]) for action in recorded] == [
        ("begin", PREVIOUS),
        ("begin", locked_version()),
        ("end", locked_version()),
    ]


def test_rollback_keeps_the_schema_and_a_run_in_progress(
    releases: Releases, before: Before, after: After, record_figures: Callable[[str], None]
) -> None:
    schema = releases.schema()
    with api_client(releases.target) as api:
        held = releases.deployment_id(api, "held")
        run = start_run(api, held, parameters={"phase": ROLLBACK})
        wait_until(lambda: run in releases.actions("step 1"), "the run to be in progress", 120)
    with _measured_outage(releases) as outages:
        start = time.monotonic()
        output = releases.new.make("rollback")
        seconds = time.monotonic() - start
    releases.begin(ROLLBACK)
    releases.wait_until_replaced()
    with api_client(releases.target) as api:
        assert asked(api, "GET", "/admin/version") == PREVIOUS
        assert wait_until_ended(api, run)["state_name"] == "Completed"
        later = start_run(api, held)
        assert wait_until_ended(api, later)["state_name"] == "Completed"
    for component in ("api", "services", "worker", "reconciler"):
        assert releases.images(component) == {before.image}, component
    assert releases.schema() == schema
    recorded = releases.actions("begin", "end")
    assert [action["prefect"] for action in recorded[run]] == [locked_version()] * 2
    assert [action["prefect"] for action in recorded[later]] == [PREVIOUS] * 2
    record_figures(f"{seconds:.0f} s ({_step_seconds(output)}), {outages[0]}")


def test_upgrade_with_the_shipped_values_moves_runs_to_their_namespace_and_loses_none(
    releases: Releases, before: Before, after: After, record_figures: Callable[[str], None]
) -> None:
    """The previous release is installed, by the rollback."""
    target = releases.target
    with api_client(target) as api:
        held = releases.deployment_id(api, "held")
        stays, evicted = (start_run(api, held, parameters={"phase": MOVED}) for _ in range(2))
        wait_until(lambda: set(releases.actions("step 1")) >= {stays, evicted}, "the runs to be in progress", 120)
    pods = {run: releases.pods(run)[0] for run in (stays, evicted)}
    assert {pod["metadata"]["namespace"] for pod in pods.values()} == {target.namespace}
    for shipped, changed in FOR_ROLLBACK:
        releases.new.edit(POOL_VALUES, changed, shipped)
    start = time.monotonic()
    output = releases.new.make("deploy")
    seconds = time.monotonic() - start
    releases.wait_until_replaced()
    with api_client(target) as api:
        assert {get_run(api, run)["state_type"] for run in pods} == {"RUNNING"}
        later = start_run(api, held)
        assert wait_until_ended(api, later)["state_name"] == "Completed"
        target.kubectl("delete", "pod", pods[evicted]["metadata"]["name"], "--wait=false")
        wait_until(lambda: len(releases.actions("begin")[evicted]) == 2, "the second run attempt", 180)
        releases.begin(MOVED)
        for run in pods:
            assert wait_until_ended(api, run)["state_name"] == "Completed"
            assert "Crashed" not in _state_names(api, run)
    recorded = releases.actions("begin", "end")
    new = locked_version()
    assert {run: [action["prefect"] for action in recorded[run]] for run in (stays, evicted, later)} == {
        stays: [PREVIOUS, PREVIOUS], evicted: [PREVIOUS, new, new], later: [new, new],
    }  # fmt: skip
    [pod] = releases.pods(stays)
    assert pod["metadata"]["uid"] == pods[stays]["metadata"]["uid"]
    for run in (evicted, later):
        [pod] = [pod for pod in releases.pods(run) if pod["metadata"]["uid"] != pods[evicted]["metadata"]["uid"]]
        assert pod["metadata"]["namespace"] == target.runs_namespace
    record_figures(f"deploy {seconds:.0f} s ({_step_seconds(output)})")
