"""Many runs under random faults: none lost, none stuck, none twice at a time, nothing left.

    make test-long FOR=soak MINUTES=30 RUNS=200

Both charts are installed in a namespace of their own on the local cluster. Runs start evenly over the time, and every
20 s something dies: a run's pod or Job, a worker, the reconciler's leader, the API, the database. Each run keeps a
journal on the volume of results, four lines a second, which no kill undoes: it shows which execution was alive when,
and which step was taken how often.
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
from tests.e2e.faults.victims import FLOW_FILE, evict, fault_values, force_delete, kill_pod, leader_pod, list_states
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
from tests.e2e.runs import create_deployment, start_run
from tests.long.longtest import Findings, Parameters

MAX_LIVE_RUNS = 6
"""Runs that are under way at the most."""

FAULT_INTERVAL_SECONDS = 20.0
"""Seconds from one fault to the next."""

STUCK_AFTER_SECONDS = 90.0
"""Seconds of the Prefect API's presence for which a run that is due may be without a live pod. The longest that is
right: 60 for a claim whose worker died, and then the next one's time to take it."""

DRAIN_SECONDS = 300.0
"""Seconds that the last runs get once no more are started."""

JOB_TTL_SECONDS = 60
"""Seconds that a finished Job and its pod stay."""

RETRY_BUDGET: Object = {"crash_retries": 20, "disruption_retries": 20}
"""Job variables of all runs: of so few faults none may use it up, so that a run which is given up is a lost one."""

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
"""How many there are of each in as many faults as all of them, in random order."""

LOST_STATE_TYPES = ("FAILED", "CANCELLED")
"""Types of states beside Completed from which nobody brings a run back: it is lost."""

MEMORY_LIMIT, MEMORY_USE_MIB = "300Mi", 320
"""The memory limit of a run that is to exceed it, and the MiB that it uses; after that its limit is doubled."""


@dataclass
class Fault:
    """Something that was done.

    Args:
        kind: of `FAULTS`.
        run: the run that was hit; empty if something else was.
        pod: the one of the execution that was hit; empty if that was not known yet.
        at: when, in seconds since 1970.
    """

    kind: str
    run: str = ""
    pod: str = ""
    at: float = field(default_factory=time.time)


@dataclass
class Attempt:
    """A pod of a run, as it was seen; times are seconds since 1970.

    Args:
        begin: when its container began.
        end: when it ended, or else was last seen without having been told to end: one that hands its run over by its
            own hand takes a few seconds to go. What it does in them is in the journal.
    """

    begin: float
    end: float


@dataclass(frozen=True)
class Line:
    """A line of a run's journal."""

    at: float
    pod: str
    what: str

    @classmethod
    def read(cls, text: str) -> "Line":
        at, _, pod, what = text.split(" ", 3)
        return cls(float(at), pod, what)


def has_overlapping_attempts(journal: Sequence[Line]) -> bool:
    """Whether an execution wrote something after a later one had begun: lines are in the order of their writing."""
    order = list(dict.fromkeys(each.pod for each in journal))
    ranks = [order.index(each.pod) for each in journal]
    return ranks != sorted(ranks)


def count_repeated_steps(journal: Sequence[Line]) -> int:
    """How many steps were taken again that had finished: the same execution had gone on to another one."""
    finished: set[str] = set()
    again = 0
    under_way: dict[str, str] = {}
    for each in journal:
        if each.what == "alive":
            continue
        if each.what in finished:
            again += 1
        if each.pod in under_way:
            finished.add(under_way[each.pod])
        if each.what.startswith("step"):
            under_way[each.pod] = each.what
    return again


def read_journals(pool: Pool) -> dict[str, list[Line]]:
    """Read each run's journal from the volume of results, in the pod that cleans it.

    Raises:
        ClusterError: they cannot be read.
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
    """The Prefect API does not answer now."""


class ReconnectingApi:
    """The API of the release's server, through which a way is found anew when its pod is gone."""

    def __init__(self, server: Release) -> None:
        self._of = Environment("soak", server.namespace.context, server.namespace.name)
        self._user, _, self._password = read_credentials(self._of).partition(":")
        self._way = contextlib.ExitStack()
        self._client: httpx.Client | None = None

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        """A client, for some requests.

        Raises:
            ServerAwayError: one of them failed.
        """
        try:
            if self._client is None:
                url = self._way.enter_context(forward_port(self._of)).url
                login = (self._user, self._password)
                made = httpx.Client(base_url=f"{url}/api", auth=login, timeout=10)
                self._client = self._way.enter_context(made)
            yield self._client
        except (httpx.HTTPError, PipelineError) as error:
            self.close()
            raise ServerUnavailableError(str(error)) from None

    def close(self) -> None:
        """Leave."""
        self._client = None
        self._way.close()


@dataclass
class Outcome:
    """What was found.

    Args:
        runs: ids by name.
        faults: what was done.
        journals: by run's id.
        attempts: pods by name, by run's id.
        states: of those runs that are not Completed.
        waited: by run's id, the longest time in seconds that it was due and had no live pod.
        left: pods, Jobs and slots that are still there, in words.
    """

    runs: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    journals: dict[str, list[Line]] = field(default_factory=dict)
    attempts: dict[str, dict[str, Attempt]] = field(default_factory=lambda: defaultdict(dict))
    states: dict[str, str] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    left: list[str] = field(default_factory=list)

    def names(self, ids: Sequence[str]) -> list[str]:
        """Of runs."""
        return sorted(name for name, id_ in self.runs.items() if id_ in ids)

    @property
    def stuck(self) -> list[str]:
        """Runs that were due and had no live pod for too long."""
        return [each for each, seconds in self.waited.items() if seconds > STUCK_AFTER_SECONDS]

    @property
    def doubled(self) -> list[str]:
        """Runs whose flow was executed twice at a time, by their journals."""
        return [run for run, journal in self.journals.items() if has_overlapping_attempts(journal)]

    @property
    def unwritten(self) -> list[str]:
        """Completed runs whose journals do not say that they ended: nothing is known of their attempts."""
        return [
            id_
            for id_ in self.runs.values()
            if id_ not in self.states and not any(line.what == "ended" for line in self.journals.get(id_, []))
        ]

    @property
    def beside(self) -> list[float]:
        """Of each pair of a run's containers the seconds for which one was there before the last one had ended."""
        found = []
        for pods in self.attempts.values():
            ordered = sorted(pods.values(), key=lambda each: each.begin)
            # Kubernetes' times have no fractions.
            found += [
                earlier.end - later.begin for earlier, later in pairwise(ordered) if later.begin < earlier.end - 1
            ]
        return found

    @property
    def taken_again(self) -> dict[str, int]:
        """How many finished steps were taken again, by run."""
        return {run: again for run, journal in self.journals.items() if (again := count_repeated_steps(journal))}

    @property
    def wrong(self) -> list[str]:
        """All that must not be, with the names of the runs."""
        said = {
            "lost": [f"{name} ({self.states[id_]})" for name, id_ in self.runs.items() if id_ in self.states],
            f"without a live pod for over {STUCK_AFTER_SECONDS:.0f} s": self.names(self.stuck),
            "completed without a journal of it": self.names(self.unwritten),
            "twice at a time": self.names(self.doubled),
            "containers beside the run's next one": [f"{seconds:.0f} s" for seconds in self.beside],
            "finished steps taken again": self.names(list(self.taken_again)),
            "left": self.left,
        }
        return [f"{what}: {', '.join(which)}" for what, which in said.items() if which]

    def recoveries(self) -> dict[str, list[float]]:
        """Seconds from the last sign of life of an execution that was hit to the next one's first line, by fault.

        One that was hit before its first line gave none: that is from the fault.
        """
        found: dict[str, list[float]] = defaultdict(list)
        for fault in self.faults:
            journal = self.journals.get(fault.run, [])
            order = list(dict.fromkeys(each.pod for each in journal))
            pod = fault.pod or (order[0] if order else "")
            last = max((each.at for each in journal if each.pod == pod), default=fault.at)
            if later := [each.at for each in journal if each.at > last]:  # else it ended before it was hit
                found[fault.kind].append(min(later) - last)
        return found

    @property
    def figures(self) -> dict[str, str | float]:
        """The results, by name."""
        kinds = Counter(each.kind for each in self.faults)
        steps = sum(each.what.startswith("step") for journal in self.journals.values() for each in journal)
        found: dict[str, str | float] = {
            "runs": len(self.runs),
            "faults": f"{len(self.faults)}: {', '.join(f'{kind} {kinds[kind]}' for kind in FAULTS if kinds[kind])}",
            "each run's budget": " and ".join(f"{name} {value}" for name, value in RETRY_BUDGET.items()),
            "executions": sum(map(len, self.attempts.values())),
            "steps begun": steps,
            "runs lost": len(self.states),
            f"due runs without a live pod for over {STUCK_AFTER_SECONDS:.0f} s while the API was there": len(
                self.stuck
            ),
            "the longest of that (s)": round(max(self.waited.values(), default=0)),
            "runs whose flow was executed twice at a time": len(self.doubled),
            "containers that began before the run's last one had ended": len(self.beside),
            "finished steps taken again": sum(self.taken_again.values()),
            "pods, Jobs and slots left at the end": len(self.left),
        }
        recoveries = self.recoveries()
        every = {"all of them": [seconds for each in recoveries.values() for seconds in each]}
        for kind, seconds in [*((kind, recoveries.get(kind, [])) for kind in FAULTS), *every.items()]:
            if seconds:
                name = f"{kind}, from the last sign of life to the next execution's first line: n, median, max (s)"
                found[name] = f"{len(seconds)}, {statistics.median(seconds):.1f}, {max(seconds):.1f}"
        return found


class Soak:
    """The runs, the faults, and what is seen of both.

    Args:
        server: the release with the API and its database.
        pool: the release with workers and reconcilers.
        kubernetes: the URL of the cluster's API.
        chance: of the faults and of what the runs take.
    """

    def __init__(self, server: Release, pool: Pool, kubernetes: str, chance: random.Random) -> None:
        self.server, self.pool, self.chance = server, pool, chance
        self.api = ReconnectingApi(server)
        self.kubernetes = httpx.Client(base_url=kubernetes, timeout=30)
        self.seen = Outcome()
        self._deployment = ""
        self._runs: dict[str, Object] = {}
        self._live: dict[str, list[str]] = {}
        self._without: dict[str, float] = {}
        self._away_since = 0.0
        self._hungry: list[Fault] = []
        self._over: set[str] = set()
        self._bag: list[str] = []
        self._takes: list[Object] = []

    def run(self, minutes: float, runs: int) -> Outcome:
        """Start the runs and make the faults; what was found once all is over.

        Ctrl-C ends it early: then what was found is what there was until now.
        """
        self._deploy()
        for _ in range(runs):
            pieces = self.chance.randint(2, 8)
            seconds = round(self.chance.triangular(3, 60, 10) / pieces, 2)
            self._takes.append({"pieces": pieces, "seconds": seconds})
        began = time.monotonic()
        length = 60 * minutes
        fault_at, said_at, told = began + FAULT_INTERVAL_SECONDS / 2, began, 0
        # The end of the time is for the last ones to end in.
        pause = max(length - 20, 1) / runs
        deadline = began + length + DRAIN_SECONDS
        try:
            while (now := time.monotonic()) < deadline:
                try:
                    if len(self.seen.runs) < runs and now >= began + pause * len(self.seen.runs):
                        self._start_one()
                    self._look()
                    if len(self.seen.runs) == runs and self._given_up().issuperset(self.seen.states):
                        break
                except ServerUnavailableError:
                    self._away_since = self._away_since or time.time()
                if now >= fault_at and now < began + length:
                    fault_at = (
                        max(fault_at + FAULT_INTERVAL_SECONDS, now + FAULT_INTERVAL_SECONDS / 2)
                        if self._fault()
                        else now + 1
                    )
                if now >= said_at:
                    said_at = now + 10
                    self._say(now - began)
                    for each in self.seen.faults[told:]:
                        print(f"          {each.kind} {self._named(each.run)}".rstrip(), flush=True)
                    told = len(self.seen.faults)
                time.sleep(0.5)
            self._wait_for_the_end_of_what_is_left()
        except KeyboardInterrupt:
            print("Interrupted: this is what was found until now.", file=sys.stderr)
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

    def _start_one(self) -> None:
        if len(self.seen.states.keys() - self._over) >= MAX_LIVE_RUNS:
            return
        name = f"soak-{len(self.seen.runs) + 1:03}"
        # With a key: it is asked for again if the answer was lost.
        more: Object = {"name": name, "idempotency_key": name, "parameters": self._takes[len(self.seen.runs)]}
        if self._hungry:
            more["parameters"] = more["parameters"] | {"memory": MEMORY_USE_MIB}
            more["job_variables"] = {"memory_limit": MEMORY_LIMIT, "memory_growth": 2}
        with self.api.client() as client:
            run = start_run(client, self._deployment, **more)
        self.seen.runs[name] = run
        self.seen.states[run] = "Scheduled"
        if self._hungry:
            self._hungry.pop().run = run

    def _look(self) -> None:
        """Read the runs that are not Completed, and then the pods of all."""
        body = {
            "deployments": {"id": {"any_": [self._deployment]}},
            "flow_runs": {"state": {"type": {"not_any_": ["COMPLETED"]}}},
            "limit": 200,
        }
        with self.api.client() as client:
            found: list[Object] = client.post("/flow_runs/filter", json=body).raise_for_status().json()
        if self._away_since:
            away, self._away_since = time.time() - self._away_since, 0.0
            self._without = {run: since + away for run, since in self._without.items()}
        self._runs = {each["id"]: each for each in found}
        self.seen.states = {each["id"]: each["state_name"] for each in found}
        self._see_pods()
        now = time.time()
        for id_, run in self._runs.items():
            due = _timestamp(run["next_scheduled_start_time"] or run["expected_start_time"])
            waits = run["state_type"] == "SCHEDULED" and due > now
            if waits or self._live.get(id_) or run["state_type"] in LOST_STATE_TYPES:
                if run["state_type"] in LOST_STATE_TYPES and id_ not in self._over:
                    print(f"          {run['name']} is {run['state_name']}: {run['state']['message']}", flush=True)
                    self._over.add(id_)
                self._without.pop(id_, None)
                continue
            waited = now - self._without.setdefault(id_, now)
            if waited > STUCK_AFTER_SECONDS >= self.seen.waited[id_]:
                print(f"          {run['name']}: no live pod for {waited:.0f} s", flush=True)
                with self.api.client() as client:
                    for each in list_states(client, id_):
                        print(f"          {each['timestamp']} {each['name']}: {each['message']}", flush=True)
            self.seen.waited[id_] = max(self.seen.waited[id_], waited)
        for id_ in self._without.keys() - self._runs.keys():
            del self._without[id_]

    def _given_up(self) -> set[str]:
        """Runs whose end is not waited for: they have failed, or are stuck."""
        now = time.time()
        return self._over | {run for run, since in self._without.items() if now - since > STUCK_AFTER_SECONDS}

    def _see_pods(self) -> None:
        path = f"/api/v1/namespaces/{self.pool.namespace.name}/pods"
        query = {"labelSelector": "prefect.io/flow-run-id"}
        self._live = defaultdict(list)
        for pod in self.kubernetes.get(path, params=query).raise_for_status().json()["items"]:
            name, run = pod["metadata"]["name"], pod["metadata"]["labels"]["prefect.io/flow-run-id"]
            if pod["status"]["phase"] in ("Pending", "Running"):
                self._live[run].append(name)
            [container] = pod["status"].get("containerStatuses") or [{}]
            state = container.get("state", {})
            if moment := (state.get("running") or state.get("terminated") or {}).get("startedAt"):
                execution = self.seen.attempts[run].setdefault(name, Attempt(_timestamp(moment), _timestamp(moment)))
                if end := (state.get("terminated") or {}).get("finishedAt"):
                    execution.end = min(_timestamp(end), _timestamp(pod["metadata"].get("deletionTimestamp", end)))
                elif "deletionTimestamp" not in pod["metadata"]:
                    execution.end = time.time()

    def _fault(self) -> bool:
        """Make the next one; whether there was something for it to hit."""
        if not self._bag:
            self._bag = list(Counter(FAULTS).elements())
            self.chance.shuffle(self._bag)
        kind = self._bag[-1]
        namespace = self.pool.namespace
        fault = Fault(kind)
        if kind in ("pod killed", "pod force-deleted", "pod evicted", "Job deleted"):
            # Of those that execute: who has two pods at a time is another matter.
            begun = {run: pods[0] for run, pods in self._live.items() if pods and pods[0] in self.seen.attempts[run]}
            if not begun:
                return False
            fault.run = self.chance.choice(sorted(begun))
            fault.pod = begun[fault.run]
        with contextlib.suppress(ClusterError):  # what was to be hit has just ended
            if kind == "pod killed":
                kill_pod(self.pool, fault.pod)
            elif kind == "pod force-deleted":
                force_delete(namespace, fault.pod)
            elif kind == "pod evicted":
                evict(namespace, fault.pod)
            elif kind == "Job deleted":
                namespace.kubectl("delete", "job", fault.pod.rpartition("-")[0], "--wait=false")
            elif kind == "out of memory":
                self._hungry.append(fault)  # the next run that is started
            elif kind == "worker killed":
                force_delete(namespace, self.chance.choice(sorted(map(_pod_name, self.pool.pods("worker")))))
            elif kind == "leader killed":
                force_delete(namespace, leader_pod(self.pool))
            elif kind == "API killed":
                force_delete(namespace, *map(_pod_name, self.server.pods("api")))
            elif kind == "database killed":
                force_delete(namespace, "prefect-server-database-0")
        self._bag.pop()
        self.seen.faults.append(fault)
        return True

    def _wait_for_the_end_of_what_is_left(self) -> None:
        """No pod or Job of a run, and no slot of a limit, may be there once its time is over."""
        deadline = time.monotonic() + JOB_TTL_SECONDS + 60
        while True:
            with contextlib.suppress(ServerUnavailableError):
                self.seen.left = self._left()
                if not self.seen.left or time.monotonic() > deadline:
                    return
            time.sleep(1)

    def _left(self) -> list[str]:
        found = []
        of_runs = {"labelSelector": "prefect.io/flow-run-id"}
        for path in ("/api/v1/namespaces/{}/pods", "/apis/batch/v1/namespaces/{}/jobs"):
            answer = self.kubernetes.get(path.format(self.pool.namespace.name), params=of_runs).raise_for_status()
            found += [f"{path.rpartition('/')[2]} {each['metadata']['name']}" for each in answer.json()["items"]]
        with self.api.client() as client:
            for limit in client.post("/concurrency_limits/filter", json={}).raise_for_status().json():
                if limit["active_slots"]:
                    found.append(f"{len(limit['active_slots'])} slots of the tag {limit['tag']}")
            for limit in client.post("/v2/concurrency_limits/filter", json={}).raise_for_status().json():
                if limit["active_slots"]:
                    found.append(f"{limit['active_slots']} slots of {limit['name']}")
        return found

    def _named(self, run: str) -> str:
        return next((name for name, id_ in self.seen.runs.items() if id_ == run), "")

    def _say(self, seconds: float) -> None:
        seen = self.seen
        print(
            f"{seconds:7.0f} s  {len(seen.runs)} started, {len(seen.states)} under way, {len(seen.faults)} faults, "
            f"{sum(map(len, seen.attempts.values()))} executions, longest without a live pod "
            f"{max(seen.waited.values(), default=0):.0f} s",
            flush=True,
        )


def _timestamp(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def _pod_name(pod: Mapping[str, Any]) -> str:
    return str(pod["metadata"]["name"])


def soak_values(values: Object) -> Object:
    """Values of a pool for this, from the least ones: two workers, and nothing that stays long when it is over."""
    made = fault_values(values)
    made["worker"]["replicas"] = made["reconciler"]["replicas"] = 2
    made["runs"]["ttlSecondsAfterFinished"] = JOB_TTL_SECONDS
    return made


@contextlib.contextmanager
def installed_charts() -> Iterator[tuple[Release, Pool]]:
    """The releases of the server and the pool, in a namespace of their own on the local cluster; gone afterwards."""
    with local_cluster.shared() as context, restricted(context, "soak") as namespace:
        image = build_image()
        server = Release("prefect-server", "prefect-server", namespace)
        server.deploy(server_values(image))
        yield server, install_pool(server, namespace, soak_values(pool_values(image)), probe_config_map(FLOW_FILE))


def run(parameters: Parameters) -> Findings:
    """Soak for `MINUTES` with `RUNS` runs and faults that `SEED` draws."""
    with installed_charts() as (server, pool), proxied(pool.namespace.context) as url:
        print(f"Namespace {pool.namespace.name} of {pool.namespace.context}", flush=True)
        chance = random.Random(parameters["SEED"])  # noqa: S311 - faults, no secret
        seen = Soak(server, pool, url, chance).run(parameters["MINUTES"], int(parameters["RUNS"]))
    if "interrupted" in seen.left:
        for name, value in seen.figures.items():
            print(f"{name}: {value}")
        raise KeyboardInterrupt
    return Findings(seen.figures, seen.wrong)
