"""Runs the rounds of the reconciler: read everything, decide, act.

The reconciler is stateless: a new process decides the same. The runs that it keeps between rounds only save requests,
see `decide.is_steady`.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Sequence
from datetime import datetime

import httpx
import prometheus_client as prometheus

from orchestration import api_settings, prefect_api
from orchestration.errors import PipelineError
from orchestration.health import Pulse, served
from orchestration.logs import RUN_ID
from orchestration.prefect_api import RefusedError, Server
from orchestration.reconciler import kubernetes_client as kubernetes
from orchestration.reconciler import pod_records
from orchestration.reconciler.actions import carry_out
from orchestration.reconciler.concurrency import gather_bounded
from orchestration.reconciler.decide import Action, Stop, decide, is_steady
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.leader_election import LeaderElection
from orchestration.reconciler.model import Pod, Policy, Run
from orchestration.reconciler.pod_events import PodEvents
from orchestration.reconciler.pod_records import PodRecord
from orchestration.reconciler.slot_leases import SlotLeases
from orchestration.reconciler.snapshot import read_snapshot

logger = logging.getLogger(__name__)

HEALTH_GRACE_SECONDS = 60
"""Seconds without a round, on top of three intervals, after which the reconciler is unhealthy."""

IDLE_SECONDS = 10.0
"""Seconds from one round to the next while nothing is live and no Job changes."""

MAX_STEADY_RUNS = 10_000
"""How many steady runs one request names at most. A database takes 32,767."""


def _subject(action: Action) -> str:
    """Name what an action concerns."""
    return f"Job {action.job}" if isinstance(action, Stop) else f"Run {action.run.name}"


class ReconciledNamespace:
    """Holds what the reconciler keeps of a namespace between rounds.

    Args:
        cluster: the namespace with Jobs and pods of runs.
        slot_leases: renews the leases of the runs there.
        events: emits the events of its pods; None for none.
    """

    def __init__(self, cluster: Cluster, slot_leases: SlotLeases, events: PodEvents | None) -> None:
        self.cluster, self.slot_leases, self.events = cluster, slot_leases, events
        self.steady: dict[str, Run] = {}
        """The steady runs of the newest round, by id. They need not be read again while they are Running."""
        self.reported: dict[str, str] = {}
        """The failures of single runs and Jobs in the newest round, by run or Job. Each is logged once."""
        self.live_runs = 0
        """How many runs are Pending, Running or Cancelling."""
        self.is_idle = False
        """Whether the newest round has found nothing live, and nothing to do."""

    def forget(self) -> None:
        """Forget what may have changed, as another reconciler is the leader now."""
        self.is_idle = False
        if self.events:
            self.events.forget()


class Reconciler:
    """Brings the runs of a work pool and their pods into agreement, in rounds.

    Args:
        server: the Prefect API.
        clusters: the namespaces with Jobs and pods of runs. Each round handles one after the other.
        pool: the name of the work pool.
        policy: how long to wait before each action.
        election: the leader election; None for a reconciler that always acts.
        pulse: the liveness and the metrics of the process.
        pod_events: whether to emit the events of pods.
    """

    def __init__(
        self,
        server: Server,
        clusters: Sequence[Cluster],
        pool: str,
        policy: Policy,
        election: LeaderElection | None,
        pulse: Pulse,
        *,
        pod_events: bool = False,
    ) -> None:
        self.server, self.pool, self.policy = server, pool, policy
        self.election, self.pulse = election, pulse
        self.namespaces = [
            ReconciledNamespace(
                cluster, SlotLeases(server), PodEvents(server, cluster.namespace) if pod_events else None
            )
            for cluster in clusters
        ]
        registry = pulse.registry
        self.actions = prometheus.Counter(
            "reconciler_actions_total", "Actions that were carried out.", ["action"], registry=registry
        )
        self.rounds = prometheus.Histogram(
            "reconciler_round_seconds", "Duration of a round.", registry=registry,
            buckets=(0.1, 0.2, 0.5, 1, 2, 5, 10),
        )  # fmt: skip
        self.failures = prometheus.Counter("reconciler_failures_total", "Rounds that failed.", registry=registry)
        self.live = prometheus.Gauge(
            "reconciler_live_runs", "Runs that are Pending, Running or Cancelling.", registry=registry
        )
        self.leading = prometheus.Gauge("reconciler_leader", "1 if this process is the leader.", registry=registry)
        self.last = prometheus.Gauge(
            "reconciler_last_round_timestamp_seconds", "Time of the last successful round.", registry=registry
        )

    async def run(self, every: float) -> None:
        """Run rounds until cancelled. A pod that ends starts the next round early.

        While all namespaces are idle, rounds are left out until a Job changes. The Lease is renewed all the same. A
        failure is logged once, and the next round tries again.

        Args:
            every: seconds from the start of one round to the next.
        """
        pod_ended, job_changed = asyncio.Event(), asyncio.Event()
        watching = [
            asyncio.create_task(watch)
            for namespace in self.namespaces
            for watch in (namespace.cluster.watch_pods(pod_ended), namespace.cluster.watch_jobs(job_changed))
        ]
        last_round = 0.0
        try:
            while True:
                began = time.monotonic()
                is_idle = all(namespace.is_idle for namespace in self.namespaces)
                is_idle &= not (pod_ended.is_set() or job_changed.is_set() or any(watch.done() for watch in watching))
                is_due = not is_idle or began - last_round > IDLE_SECONDS
                pod_ended.clear()
                results: list[str] = []
                try:
                    is_leader = self.election is None or await self.election.acquire_or_renew()
                    self.leading.set(is_leader)
                    if not is_leader:
                        for namespace in self.namespaces:
                            namespace.forget()
                    elif is_due:
                        job_changed.clear()
                        last_round = began
                        results = await self.round()
                    if self.pulse.trouble:
                        logger.info("Rounds succeed again.")
                    self.pulse.trouble = ""
                except Exception as error:
                    self.failures.inc()
                    for namespace in self.namespaces:
                        namespace.is_idle = False  # what has woken this round is not handled
                    if str(error) != self.pulse.trouble:
                        # Any other error is a bug. It must not stop the reconciler.
                        trace = None if isinstance(error, PipelineError) else error
                        logger.error("%s. The next round tries again.", str(error).rstrip("."), exc_info=trace)
                    self.pulse.trouble = str(error)
                self.pulse.beat()
                # An action often needs another round: a retry follows a crash. The pause keeps rounds apart.
                await asyncio.sleep(every / 10)
                rest = 0 if results else every - (time.monotonic() - began)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(pod_ended.wait(), rest)
        finally:
            for watch in watching:
                watch.cancel()
            await asyncio.wait(watching)
            if self.election:
                with contextlib.suppress(PipelineError):
                    await self.election.release()

    async def round(self) -> list[str]:
        """Run one round, and return a line for each action that was carried out.

        Raises:
            PipelineError: an API does not answer.
        """
        began = time.monotonic()
        outcomes = [outcome for namespace in self.namespaces for outcome in await self._reconcile(namespace)]
        self.live.set(sum(namespace.live_runs for namespace in self.namespaces))
        self.rounds.observe(time.monotonic() - began)
        self.last.set_to_current_time()
        return outcomes

    async def _reconcile(self, namespace: ReconciledNamespace) -> list[str]:
        """Run one round in a namespace, and return a line for each action that was carried out.

        Raises:
            PipelineError: an API does not answer.
        """
        cluster = namespace.cluster
        namespace.is_idle = False
        snapshot = await read_snapshot(self.server, cluster, self.pool, namespace.steady)
        # Reading a thousand runs may take longer than the leadership lasts.
        if self.election and not await self.election.acquire_or_renew():
            return []
        now = self.server.now
        actions: list[tuple[Action, list[Pod]]] = []
        records_before: list[PodRecord] = []
        records_after: list[PodRecord] = []
        steady: dict[str, Run] = {}
        failures: list[tuple[str, BaseException]] = []
        for run_id, run in snapshot.runs.items():
            jobs, pods = snapshot.jobs.get(run_id, ()), list(snapshot.pods.get(run_id, ()))
            try:
                decided = decide(run, jobs, pods, now, self.policy)
                records = pod_records.build_pod_records(run, jobs, pods)
            except Exception as error:
                failures.append((f"Run {run_id}", error))
                continue
            actions += [(action, pods) for action in decided]
            # A worker may claim a retried run immediately and then writes its labels. All other records can wait.
            (records_before if decided else records_after).extend(records)
            if run and len(steady) < MAX_STEADY_RUNS and is_steady(run, jobs, pods):
                steady[run_id] = run
        namespace.steady = steady
        namespace.live_runs = snapshot.live_runs
        recorded = await gather_bounded([self._write_record(cluster, record) for record in records_before])
        outcomes = await gather_bounded([self._act(cluster, action, pods) for action, pods in actions])
        recorded += await gather_bounded([self._write_record(cluster, record) for record in records_after])
        all_pods = [pod for pods in snapshot.pods.values() for pod in pods]
        found = [run for run in snapshot.runs.values() if run]
        emitted, renewed = await gather_bounded(
            [self._emit_pod_events(namespace, all_pods), self._renew_slot_leases(namespace, found, now)]
        )
        for (action, _), outcome in zip(actions, outcomes, strict=True):
            if isinstance(outcome, str) and outcome:
                run_id_of_line = None if isinstance(action, Stop) else action.run.id
                logger.info("%s", outcome, extra={RUN_ID: run_id_of_line})
        results = [
            *zip((_subject(action) for action, _ in actions), outcomes, strict=True),
            *zip((f"Job {record.job}" for record in [*records_before, *records_after]), recorded, strict=True),
            ("Pod events", emitted),
            ("Slot leases", renewed),
        ]
        failures += [(subject, result) for subject, result in results if isinstance(result, BaseException)]
        self._report(namespace, failures)
        namespace.is_idle = not (snapshot.is_live or actions or failures or records_before or records_after)
        return [outcome for outcome in outcomes if isinstance(outcome, str) and outcome]

    def _report(self, namespace: ReconciledNamespace, failures: Sequence[tuple[str, BaseException]]) -> None:
        """Log the failures of single runs and Jobs, each once.

        A user can write labels or names that make one run fail. The other runs must not be affected.

        Raises:
            BaseException: a failure that concerns all runs: an API does not answer.
        """
        reported: dict[str, str] = {}
        for subject, error in failures:
            concerns_all = isinstance(error, PipelineError) and not isinstance(error, RefusedError)
            if concerns_all or not isinstance(error, Exception):
                raise error
            self.failures.inc()
            reported[subject] = f"{subject} is skipped in this round: {str(error).rstrip('.') or type(error).__name__}."
            if namespace.reported.get(subject) != reported[subject]:
                logger.error("%s", reported[subject], exc_info=None if isinstance(error, PipelineError) else error)
        namespace.reported = reported

    async def _write_record(self, cluster: Cluster, record: PodRecord) -> None:
        if self._is_leader:
            await pod_records.write_pod_record(self.server, cluster, record)

    async def _emit_pod_events(self, namespace: ReconciledNamespace, pods: Sequence[Pod]) -> None:
        if namespace.events and self._is_leader:
            await namespace.events.emit(pods)

    async def _renew_slot_leases(self, namespace: ReconciledNamespace, runs: Sequence[Run], now: datetime) -> None:
        if self._is_leader:
            await namespace.slot_leases.renew(runs, now)

    async def _act(self, cluster: Cluster, action: Action, pods: list[Pod]) -> str:
        if not self._is_leader:
            return ""
        try:
            # An action has several requests. The last may be due when another reconciler is the leader.
            async with asyncio.timeout_at(self.election.deadline if self.election else None):
                outcome = await carry_out(self.server, cluster, action, pods, self.policy.log_lines)
        except TimeoutError:
            raise PipelineError(f"{type(action).__name__} took longer than the Lease is valid") from None
        if outcome:
            self.actions.labels(type(action).__name__.lower()).inc()
        return outcome

    @property
    def _is_leader(self) -> bool:
        return self.election is None or self.election.is_leader


async def reconcile(
    pool: str,
    namespaces: Sequence[str],
    policy: Policy,
    *,
    every: float,
    port: int,
    wait: float,
    lease: str = "",
    lease_namespace: str = "",
    identity: str = "",
    url: str = "",
    pod_events: bool = True,
) -> None:
    """Reconcile until SIGTERM or SIGINT.

    Args:
        pool: the name of the work pool.
        namespaces: the namespaces with the Jobs of its runs.
        policy: how long to wait before each action.
        every: seconds from the start of one round to the next.
        port: the port of `/metrics` and `/health`.
        wait: seconds to wait for the Prefect API at the start.
        lease: the name of the Lease for leader election; empty for a reconciler that always acts.
        lease_namespace: the namespace of the Lease; empty for the first of the namespaces.
        identity: the name of this candidate in the leader election.
        url: the URL of the Kubernetes API outside of a pod; empty inside.
        pod_events: whether to emit the events of pods.

    Raises:
        PipelineError: the reconciler cannot start.
    """
    pulse = Pulse(3 * every + HEALTH_GRACE_SECONDS)
    with served(pulse, port):
        async with (
            kubernetes.connected(namespaces[0], url) as cluster,
            prefect_api.connected(wait, settings=api_settings.read_in_child()) as server,
        ):
            # No retries and short timeouts: the next round decides again, and a late request must not take effect then.
            server.retry_seconds, server.client.timeout = 0, httpx.Timeout(2 * kubernetes.TIMEOUT_SECONDS)
            clusters = [cluster, *(cluster.in_namespace(name) for name in namespaces[1:])]
            of_lease = cluster.in_namespace(lease_namespace or cluster.namespace)
            election = LeaderElection(of_lease, lease, identity) if lease else None
            # Without this, garbage collection scans all modules for each thousand pods.
            gc.collect()
            gc.freeze()
            reconciler = Reconciler(server, clusters, pool, policy, election, pulse, pod_events=pod_events)
            working = asyncio.create_task(reconciler.run(every))
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, working.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await working
