"""Inject random faults into many runs: no run is lost, stuck or executed twice at a time, and nothing is left.

    make test-long FOR=soak MINUTES=30 RUNS=200

Both charts are installed in a new namespace of the local cluster. Runs start evenly over the time. Every 20 s a fault
hits a run's pod or Job, a worker, the reconciler's leader, the API or the database. Each run writes a journal to the
results volume, four lines a second, which survives every kill. The journal shows when each run attempt was alive, and
how often each step was taken.
"""

import contextlib
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Any

import httpx

from orchestration.errors import ClusterError, PipelineError
from orchestration.operations.environment import Environment
from orchestration.operations.local_cluster import __main__ as local_cluster
from orchestration.operations.port_forward import forward_port, read_credentials
from tests.cluster.namespace import proxied, restricted
from tests.e2e.faults.victims import FLOW_FILE, evict, fault_values, force_delete, kill_pod, leader_pod
from tests.e2e.pace import IS_SHIPPED
from tests.e2e.release import (
    Object,
    Pool,
    Release,
    build_image,
    install_pool,
    pool_values,
    probe_config_map,
    server_values,
)
from tests.e2e.runs import create_deployment
from tests.long.longtest import Findings, Parameters

MAX_LIVE_RUNS = 6
"""Upper bound for runs that are not completed at the same time."""

LOOK_SECONDS = 0.5 if IS_SHIPPED else 1.0
"""Seconds from one look at all runs and pods to the next. Next to other tests each look takes their processor."""

FAULT_INTERVAL_SECONDS = 20.0
"""Seconds from one fault to the next."""

STUCK_AFTER_SECONDS = 90.0 if IS_SHIPPED else 180.0
"""Seconds for which a due run may have no live pod while the Prefect API answers: 60 s until the claim of a dead worker
is released, and the time of the next claim. Next to other tests all of that takes longer."""

DRAIN_SECONDS = 300.0 if IS_SHIPPED else 600.0
"""Seconds for the last runs to complete after the last start."""

JOB_TTL_SECONDS = 60
"""Seconds after which a finished Job and its pod are deleted."""

RETRY_BUDGET: Object = {"crash_retries": 20, "disruption_retries": 20}
"""Job variables of all runs. No run meets enough faults to use up the budget, so a run that is given up is lost."""

FAULTS = {
    "pod killed": 4,
    "pod force-deleted": 3,
    "pod evicted": 3,
    "Job deleted": 3,
    "out of memory": 3,
    "worker killed": 2,
    "leader killed": 2,
    "API killed": 2,
    "database killed": 1,
}
"""The number of faults of each kind in one sequence. The order of each sequence is random."""

LOST_STATE_TYPES = ("FAILED", "CANCELLED")
"""Types of final states, apart from Completed, after which nothing retries a run: the run is lost."""

MEMORY_LIMIT, MEMORY_USE_MIB = "300Mi", 320
"""The memory limit of a run that exceeds it, and the MiB that the run uses. Its retry has twice the limit."""


@dataclass
class Fault:
    """A fault that was injected.

    Args:
        kind: a key of `FAULTS`.
        run: id of the run that was hit; empty if no run was.
        pod: pod of the run attempt that was hit; empty if the pod was not known yet.
        time: in seconds since 1970.
    """

    kind: str
    run: str = ""
    pod: str = ""
    time: float = field(default_factory=time.time)


@dataclass
class Attempt:
    """A run attempt, by the container of its pod; times are seconds since 1970.

    Args:
        begin: start of the container.
        end: end of the container. For a container that has not ended, when it was last seen before its pod was
            terminating: a terminating attempt that has handed over its run takes a few seconds to end. The journal
            shows what it does in these seconds.
    """

    begin: float
    end: float


@dataclass(frozen=True)
class Line:
    """A line of a run's journal.

    Args:
        time: in seconds since 1970.
        pod: pod of the run attempt.
        what: `began`, `alive`, `ended`, or `step` and its number.
    """

    time: float
    pod: str
    what: str

    @classmethod
    def read(cls, text: str) -> "Line":
        """Parse a line."""
        seconds, _, pod, what = text.split(" ", 3)
        return cls(float(seconds), pod, what)


def has_overlapping_attempts(journal: Sequence[Line]) -> bool:
    """Return whether a run attempt wrote a line after a later one had begun. Lines are in the order of writing."""
    order = list(dict.fromkeys(line.pod for line in journal))
    ranks = [order.index(line.pod) for line in journal]
    return ranks != sorted(ranks)


def count_repeated_steps(journal: Sequence[Line]) -> int:
    """Return how many finished steps were repeated. A step is finished once its run attempt has begun the next one."""
    finished: set[str] = set()
    repeated = 0
    current: dict[str, str] = {}
    for line in journal:
        if line.what == "alive":
            continue
        if line.what in finished:
            repeated += 1
        if line.pod in current:
            finished.add(current[line.pod])
        if line.what.startswith("step"):
            current[line.pod] = line.what
    return repeated


def read_journals(pool: Pool) -> dict[str, list[Line]]:
    """Return the journals by run, read from the results volume in the pod that cleans it.

    Raises:
        ClusterError: the journals cannot be read.
    """
    [pod] = pool.pods("results")
    script = "[ ! -d /results/journal ] || { cd /results/journal && grep -H '' *; }"
    text = pool.namespace.kubectl("exec", _pod_name(pod), "--", "sh", "-c", script)
    found: dict[str, list[Line]] = defaultdict(list)
    for line in text.splitlines():
        run, _, rest = line.partition(":")
        found[run].append(Line.read(rest))
    return found


class ServerUnavailableError(Exception):
    """The Prefect API does not answer at the moment."""


class ReconnectingApi:
    """Connects to the Prefect API of a release, and connects again after its pod is gone."""

    def __init__(self, server: Release) -> None:
        self._environment = Environment("soak", server.namespace.context, server.namespace.name)
        self._user, _, self._password = read_credentials(self._environment).partition(":")
        self._connection = contextlib.ExitStack()
        self._client: httpx.Client | None = None

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """Yield a client for the requests of the block.

        Raises:
            ServerUnavailableError: a request failed.
        """
        try:
            if self._client is None:
                url = self._connection.enter_context(forward_port(self._environment)).url
                login = (self._user, self._password)
                client = httpx.Client(base_url=f"{url}/api", auth=login, timeout=10)
                self._client = self._connection.enter_context(client)
            yield self._client
        except (httpx.HTTPError, PipelineError) as error:
            self.close()
            raise ServerUnavailableError(str(error)) from None

    def close(self) -> None:
        """Close the connection."""
        self._client = None
        self._connection.close()


@dataclass
class Outcome:
    """What the soak observed.

    Args:
        runs: ids of the runs by name.
        faults: the injected faults.
        journals: journals by the run's id.
        attempts: by the run's id, its attempts by the name of the pod.
        states: by the run's id, the state names of runs that are not Completed.
        waited: by the run's id, the longest time in seconds for which it was due and had no live pod.
        left: descriptions of the pods, Jobs and slots that were left at the end.
    """

    runs: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    journals: dict[str, list[Line]] = field(default_factory=dict)
    attempts: dict[str, dict[str, Attempt]] = field(default_factory=lambda: defaultdict(dict))
    states: dict[str, str] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    left: list[str] = field(default_factory=list)

    def names(self, ids: Sequence[str]) -> list[str]:
        """Return the names of runs, sorted."""
        return sorted(name for name, id_ in self.runs.items() if id_ in ids)

    @property
    def stuck(self) -> list[str]:
        """Runs that were due and had no live pod for more than `STUCK_AFTER_SECONDS`."""
        return [run for run, seconds in self.waited.items() if seconds > STUCK_AFTER_SECONDS]

    @property
    def executed_twice(self) -> list[str]:
        """Runs that two attempts executed at the same time, by their journals."""
        return [run for run, journal in self.journals.items() if has_overlapping_attempts(journal)]

    @property
    def unwritten(self) -> list[str]:
        """Completed runs without an end in their journal: nothing is known of their attempts."""
        return [
            id_
            for id_ in self.runs.values()
            if id_ not in self.states and not any(line.what == "ended" for line in self.journals.get(id_, []))
        ]

    @property
    def overlaps(self) -> list[float]:
        """Seconds for which a container of a run had started before the previous container ended."""
        found = []
        for attempts in self.attempts.values():
            ordered = sorted(attempts.values(), key=lambda attempt: attempt.begin)
            # Times of Kubernetes are whole seconds.
            found += [
                earlier.end - later.begin for earlier, later in pairwise(ordered) if later.begin < earlier.end - 1
            ]
        return found

    @property
    def repeated_steps(self) -> dict[str, int]:
        """Number of finished steps that were repeated, by run."""
        return {run: count for run, journal in self.journals.items() if (count := count_repeated_steps(journal))}

    @property
    def wrong(self) -> list[str]:
        """The violations of what the soak asserts, with the names of the runs."""
        violations = {
            "lost": [f"{name} ({self.states[id_]})" for name, id_ in self.runs.items() if id_ in self.states],
            f"without a live pod for over {STUCK_AFTER_SECONDS:.0f} s": self.names(self.stuck),
            "completed without a journal of it": self.names(self.unwritten),
            "executed twice at a time": self.names(self.executed_twice),
            "overlapping containers of a run": [f"{seconds:.0f} s" for seconds in self.overlaps],
            "finished steps repeated": self.names(list(self.repeated_steps)),
            "left": self.left,
        }
        return [f"{what}: {', '.join(which)}" for what, which in violations.items() if which]

    def recoveries(self) -> dict[str, list[float]]:
        """Return the recovery times by kind of fault, in seconds.

        They count from the last line of the run attempt that was hit to the first line of the next attempt. For an
        attempt that was hit before its first line they count from the fault.
        """
        found: dict[str, list[float]] = defaultdict(list)
        for fault in self.faults:
            journal = self.journals.get(fault.run, [])
            order = list(dict.fromkeys(line.pod for line in journal))
            pod = fault.pod or (order[0] if order else "")
            last = max((line.time for line in journal if line.pod == pod), default=fault.time)
            if later := [line.time for line in journal if line.time > last]:  # else the run ended before the fault
                found[fault.kind].append(min(later) - last)
        return found

    @property
    def figures(self) -> dict[str, str | float]:
        """The results by name."""
        kinds = Counter(fault.kind for fault in self.faults)
        steps = sum(line.what.startswith("step") for journal in self.journals.values() for line in journal)
        found: dict[str, str | float] = {
            "runs": len(self.runs),
            "faults": f"{len(self.faults)}: {', '.join(f'{kind} {kinds[kind]}' for kind in FAULTS if kinds[kind])}",
            "each run's budget": " and ".join(f"{name} {value}" for name, value in RETRY_BUDGET.items()),
            "run attempts": sum(map(len, self.attempts.values())),
            "steps begun": steps,
            "runs lost": len(self.states),
            f"due runs without a live pod for over {STUCK_AFTER_SECONDS:.0f} s while the API was there": len(
                self.stuck
            ),
            "the longest time without a live pod (s)": round(max(self.waited.values(), default=0)),
            "runs whose flow was executed twice at a time": len(self.executed_twice),
            "containers that started before the run's previous one had ended": len(self.overlaps),
            "finished steps repeated": sum(self.repeated_steps.values()),
            "pods, Jobs and slots left at the end": len(self.left),
        }
        recoveries = self.recoveries()
        together = {"all faults": [seconds for values in recoveries.values() for seconds in values]}
        for kind, seconds in [*((kind, recoveries.get(kind, [])) for kind in FAULTS), *together.items()]:
            if seconds:
                name = f"{kind}, from the last line to the next run attempt's first line: n, median, max (s)"
                found[name] = f"{len(seconds)}, {statistics.median(seconds):.1f}, {max(seconds):.1f}"
        return found


class Soak:
    """Starts runs, injects faults, and observes both.

    Args:
        server: the release with the API and its database.
        pool: the release with workers and reconcilers.
        kubernetes: URL of the Kubernetes API.
        chance: draws the faults, what they hit, and the sizes of the runs.
        first: the kinds of the first faults, in order. `chance` draws those after them.
    """

    def __init__(
        self, server: Release, pool: Pool, kubernetes: str, chance: random.Random, first: Sequence[str] = ()
    ) -> None:
        self.server, self.pool, self.chance = server, pool, chance
        self.api = ReconnectingApi(server)
        self.kubernetes = httpx.Client(base_url=kubernetes, timeout=30)
        self.seen = Outcome()
        self._deployment = ""
        self._runs: dict[str, Object] = {}
        self._live: dict[str, list[str]] = {}
        self._without_pod_since: dict[str, float] = {}
        self._server_down_since = 0.0
        self._memory_faults: list[Fault] = []
        self._lost: set[str] = set()
        self._sequence = [*reversed(first)]
        self._sizes: list[Object] = []

    def run(self, minutes: float, runs: int, faults: int = 0) -> Outcome:
        """Start the runs, inject the faults, and return the outcome when all runs have ended.

        After Ctrl-C the outcome is what was observed until then.

        Args:
            minutes: how long faults are injected.
            runs: how many runs are started.
            faults: how many faults are injected at least, after the minutes if need be.
        """
        self._deploy()
        for _ in range(runs):
            pieces = self.chance.randint(2, 8)
            seconds = round(self.chance.triangular(3, 60, 10) / pieces, 2)
            self._sizes.append({"pieces": pieces, "seconds": seconds})
        began = time.monotonic()
        length = 60 * minutes
        fault_time, report_time, reported = began + FAULT_INTERVAL_SECONDS / 2, began, 0
        # No run starts in the last 20 s.
        pause = max(length - 20, 1) / runs
        deadline = began + length + DRAIN_SECONDS
        try:
            while (now := time.monotonic()) < deadline:
                try:
                    if len(self.seen.runs) < runs and now >= began + pause * len(self.seen.runs):
                        self._start_run()
                    self._observe()
                    if len(self.seen.runs) == runs and self._given_up().issuperset(self.seen.states):
                        break
                except ServerUnavailableError:
                    self._server_down_since = self._server_down_since or time.time()
                except httpx.HTTPError as error:
                    print(f"          the Kubernetes API does not answer: {error}", flush=True)
                if now >= fault_time and (now < began + length or len(self.seen.faults) < faults):
                    fault_time = (
                        max(fault_time + FAULT_INTERVAL_SECONDS, now + FAULT_INTERVAL_SECONDS / 2)
                        if self._inject_fault()
                        else now + 1
                    )
                if now >= report_time:
                    report_time = now + 10
                    self._print_progress(now - began)
                    for fault in self.seen.faults[reported:]:
                        print(f"          {fault.kind} {self._name(fault.run)}".rstrip(), flush=True)
                    reported = len(self.seen.faults)
                time.sleep(LOOK_SECONDS)
            self._wait_until_nothing_is_left()
        except KeyboardInterrupt:
            print("Interrupted: the figures are those until now.", file=sys.stderr)
            self.seen.left.append("interrupted")
        finally:
            self.seen.journals = read_journals(self.pool)
            self.api.close()
            self.kubernetes.close()
        return self.seen

    def _deploy(self) -> None:
        with self.api.client() as client:
            self._deployment = create_deployment(
                client, self.pool, entrypoint="/probe/flow.py:piecewise", job_variables=RETRY_BUDGET,
                concurrency_limit=2 * MAX_LIVE_RUNS, concurrency_options={"collision_strategy": "ENQUEUE"},
            )  # fmt: skip
            client.post("/concurrency_limits/", json={"tag": "piece", "concurrency_limit": 100}).raise_for_status()

    def _start_run(self) -> None:
        if len(self.seen.states.keys() - self._lost) >= MAX_LIVE_RUNS:
            return
        name = f"soak-{len(self.seen.runs) + 1:03}"
        # If the answer is lost, the request is repeated. The key makes it idempotent.
        body: Object = {"name": name, "idempotency_key": name, "parameters": self._sizes[len(self.seen.runs)]}
        body["state"] = {"type": "SCHEDULED"}
        if self._memory_faults:
            body["parameters"] = body["parameters"] | {"memory": MEMORY_USE_MIB}
            body["job_variables"] = {"memory_limit": MEMORY_LIMIT, "memory_growth": 2}
        # Not `start_run`, which waits for a server that is down.
        with self.api.client() as client:
            created = client.post(f"/deployments/{self._deployment}/create_flow_run", json=body)
            run = str(created.raise_for_status().json()["id"])
        self.seen.runs[name] = run
        self.seen.states[run] = "Scheduled"
        if self._memory_faults:
            self._memory_faults.pop().run = run

    def _observe(self) -> None:
        """Read the runs that are not Completed, and then the pods of all runs."""
        body = {
            "deployments": {"id": {"any_": [self._deployment]}},
            "flow_runs": {"state": {"type": {"not_any_": ["COMPLETED"]}}},
            "limit": 200,
        }
        with self.api.client() as client:
            found: list[Object] = client.post("/flow_runs/filter", json=body).raise_for_status().json()
        if self._server_down_since:
            outage, self._server_down_since = time.time() - self._server_down_since, 0.0
            self._without_pod_since = {run: since + outage for run, since in self._without_pod_since.items()}
        self._runs = {run["id"]: run for run in found}
        self.seen.states = {run["id"]: run["state_name"] for run in found}
        self._observe_pods()
        now = time.time()
        for id_, run in self._runs.items():
            due = _timestamp(run["next_scheduled_start_time"] or run["expected_start_time"])
            waits = run["state_type"] == "SCHEDULED" and due > now
            if waits or self._live.get(id_) or run["state_type"] in LOST_STATE_TYPES:
                if run["state_type"] in LOST_STATE_TYPES and id_ not in self._lost:
                    print(f"          {run['name']} is {run['state_name']}: {run['state']['message']}", flush=True)
                    self._lost.add(id_)
                self._without_pod_since.pop(id_, None)
                continue
            waited = now - self._without_pod_since.setdefault(id_, now)
            if waited > STUCK_AFTER_SECONDS >= self.seen.waited[id_]:
                print(f"          {run['name']}: no live pod for {waited:.0f} s", flush=True)
                with self.api.client() as client:
                    states = client.get("/flow_run_states/", params={"flow_run_id": id_}).raise_for_status().json()
                    for state in sorted(states, key=lambda state: str(state["timestamp"])):
                        print(f"          {state['timestamp']} {state['name']}: {state['message']}", flush=True)
            self.seen.waited[id_] = max(self.seen.waited[id_], waited)
        for id_ in self._without_pod_since.keys() - self._runs.keys():
            del self._without_pod_since[id_]

    def _given_up(self) -> set[str]:
        """Return the runs whose end the soak does not wait for: they are lost or stuck."""
        now = time.time()
        return self._lost | {run for run, since in self._without_pod_since.items() if now - since > STUCK_AFTER_SECONDS}

    def _observe_pods(self) -> None:
        """Read the pods of all runs: which are live, and when their containers started and ended."""
        path = f"/api/v1/namespaces/{self.pool.namespace.name}/pods"
        query = {"labelSelector": "prefect.io/flow-run-id"}
        looked = time.time()  # the answer may be late, and then shows an earlier moment
        pods = self.kubernetes.get(path, params=query).raise_for_status().json()["items"]
        self._live = defaultdict(list)
        for pod in pods:
            name, run = pod["metadata"]["name"], pod["metadata"]["labels"]["prefect.io/flow-run-id"]
            if pod["status"]["phase"] in ("Pending", "Running"):
                self._live[run].append(name)
            [container] = pod["status"].get("containerStatuses") or [{}]
            state = container.get("state", {})
            if moment := (state.get("running") or state.get("terminated") or {}).get("startedAt"):
                attempt = self.seen.attempts[run].setdefault(name, Attempt(_timestamp(moment), _timestamp(moment)))
                if end := (state.get("terminated") or {}).get("finishedAt"):
                    attempt.end = min(_timestamp(end), _timestamp(pod["metadata"].get("deletionTimestamp", end)))
                elif "deletionTimestamp" not in pod["metadata"]:
                    attempt.end = looked

    def _inject_fault(self) -> bool:
        """Inject the next fault, and return whether there was something to hit."""
        if not self._sequence:
            self._sequence = list(Counter(FAULTS).elements())
            self.chance.shuffle(self._sequence)
        kind = self._sequence[-1]
        namespace = self.pool.namespace
        fault = Fault(kind)
        if kind in ("pod killed", "pod force-deleted", "pod evicted", "Job deleted"):
            # Only runs whose container has started.
            begun = {run: pods[0] for run, pods in self._live.items() if pods and pods[0] in self.seen.attempts[run]}
            if not begun:
                return False
            fault.run = self.chance.choice(sorted(begun))
            fault.pod = begun[fault.run]
        with contextlib.suppress(ClusterError):  # the target has just ended
            if kind == "pod killed":
                kill_pod(self.pool, fault.pod)
            elif kind == "pod force-deleted":
                force_delete(namespace, fault.pod)
            elif kind == "pod evicted":
                evict(namespace, fault.pod)
            elif kind == "Job deleted":
                namespace.kubectl("delete", "job", fault.pod.rpartition("-")[0], "--wait=false")
            elif kind == "out of memory":
                self._memory_faults.append(fault)  # hits the next run that starts
            elif kind == "worker killed":
                force_delete(namespace, self.chance.choice(sorted(map(_pod_name, self.pool.pods("worker")))))
            elif kind == "leader killed":
                force_delete(namespace, leader_pod(self.pool))
            elif kind == "API killed":
                force_delete(namespace, *map(_pod_name, self.server.pods("api")))
            elif kind == "database killed":
                # Not by --force: the next pod could start while the killed Postgres still writes to the volume.
                namespace.kubectl("delete", "pod", "prefect-server-database-0", "--grace-period=1", "--wait=false")
        self._sequence.pop()
        self.seen.faults.append(fault)
        return True

    def _wait_until_nothing_is_left(self) -> None:
        """Wait until no pod and no Job of a run and no concurrency slot is left, or their time is over."""
        deadline = time.monotonic() + JOB_TTL_SECONDS + DRAIN_SECONDS / 2
        while True:
            try:
                self.seen.left = self._list_leftovers()
            except (ServerUnavailableError, httpx.HTTPError) as error:
                self.seen.left = [f"unknown pods, Jobs or slots: an API does not answer: {error}"]
            if not self.seen.left or time.monotonic() > deadline:
                return
            time.sleep(1)

    def _list_leftovers(self) -> list[str]:
        """Return descriptions of the pods and Jobs of runs and of the taken slots."""
        found = []
        selector = {"labelSelector": "prefect.io/flow-run-id"}
        for path in ("/api/v1/namespaces/{}/pods", "/apis/batch/v1/namespaces/{}/jobs"):
            answer = self.kubernetes.get(path.format(self.pool.namespace.name), params=selector).raise_for_status()
            found += [f"{path.rpartition('/')[2]} {item['metadata']['name']}" for item in answer.json()["items"]]
        with self.api.client() as client:
            for limit in client.post("/concurrency_limits/filter", json={}).raise_for_status().json():
                if limit["active_slots"]:
                    found.append(f"{len(limit['active_slots'])} slots of the tag {limit['tag']}")
            for limit in client.post("/v2/concurrency_limits/filter", json={}).raise_for_status().json():
                if limit["active_slots"]:
                    found.append(f"{limit['active_slots']} slots of {limit['name']}")
        return found

    def _name(self, run: str) -> str:
        """Return the name of a run; empty if there is no such run."""
        return next((name for name, id_ in self.seen.runs.items() if id_ == run), "")

    def _print_progress(self, seconds: float) -> None:
        seen = self.seen
        print(
            f"{seconds:7.0f} s  {len(seen.runs)} started, {len(seen.states)} not completed, {len(seen.faults)} faults, "
            f"{sum(map(len, seen.attempts.values()))} run attempts, longest time without a live pod "
            f"{max(seen.waited.values(), default=0):.0f} s",
            flush=True,
        )


def _timestamp(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _pod_name(pod: Mapping[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def soak_values(values: Object) -> Object:
    """Return the values of the soak's pool: two workers, two reconcilers, and finished Jobs that are deleted soon."""
    changed = fault_values(values)
    changed["worker"]["replicas"] = changed["reconciler"]["replicas"] = 2
    changed["runs"]["ttlSecondsAfterFinished"] = JOB_TTL_SECONDS
    return changed


@contextlib.contextmanager
def installed_charts() -> Iterator[tuple[Release, Pool]]:
    """Install server and pool in a new namespace of the local cluster while the block lasts, and yield both."""
    with local_cluster.shared() as context, restricted(context, "soak") as namespace:
        image = build_image()
        server = Release("prefect-server", "prefect-server", namespace)
        server.deploy(server_values(image))
        yield server, install_pool(server, namespace, soak_values(pool_values(image)), probe_config_map(FLOW_FILE))


def run(parameters: Parameters) -> Findings:
    """Soak for `MINUTES` with `RUNS` runs and the faults that `SEED` draws."""
    with installed_charts() as (server, pool), proxied(pool.namespace.context) as url:
        print(f"Namespace {pool.namespace.name} of {pool.namespace.context}", flush=True)
        chance = random.Random(parameters["SEED"])  # noqa: S311 - faults, no secret
        seen = Soak(server, pool, url, chance).run(parameters["MINUTES"], int(parameters["RUNS"]))
    if "interrupted" in seen.left:
        for name, value in seen.figures.items():
            print(f"{name}: {value}")
        raise KeyboardInterrupt
    return Findings(seen.figures, seen.wrong)
