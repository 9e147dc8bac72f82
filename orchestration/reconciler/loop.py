"""The reconciler's rounds: read everything, decide, act; nothing that a round needs is left from the one before.

What one that begins anew would read again and find unchanged is counted instead, see `decide.is_steady`.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from urllib.parse import quote

import httpx
import prometheus_client as prometheus

from orchestration import prefect_api
from orchestration.errors import ClusterError, PipelineError
from orchestration.health import Pulse, served
from orchestration.logs import RUN_ID
from orchestration.prefect_api import JSON, RefusedError, Server
from orchestration.reconciler import claims, pod_records
from orchestration.reconciler import kubernetes_client as kubernetes
from orchestration.reconciler.actions import carry_out
from orchestration.reconciler.concurrency import gather_bounded
from orchestration.reconciler.decide import Action, Stop, decide, is_steady
from orchestration.reconciler.kubernetes_client import Cluster
from orchestration.reconciler.leader_election import LeaderElection
from orchestration.reconciler.model import ORDINARY, Job, Pod, Policy, Run
from orchestration.reconciler.pod_events import PodEvents
from orchestration.reconciler.pod_records import Note

logger = logging.getLogger(__name__)

LIVE = ["PENDING", "RUNNING", "CANCELLING"]

RECENT = timedelta(hours=1)
"""How long after its crash a run is looked at: as long as a reconciler may be away and still try it again."""

GRACE = 60
"""Seconds without a turn of the loop after which it counts as ill."""

MANY = 10_000
"""How many steady runs a request names: a database takes 32,767 at most."""

CREATED_AFTER = timedelta(seconds=20)
"""How long a pod may have a node and no container before events are asked why."""

REFUSED_AFTER = timedelta(seconds=3)
"""How long a Job may be without a pod before its events are asked why."""


def _subject(action: Action) -> str:
    """Name what an action concerns."""
    return f"Job {action.job}" if isinstance(action, Stop) else f"Run {action.run.name}"


@dataclass(frozen=True)
class Seen:
    """What a round has read.

    Args:
        runs: by id; None are those that the API does not have.
        jobs: by run.
        pods: by run.
    """

    runs: Mapping[str, Run | None]
    jobs: Mapping[str, Sequence[Job]]
    pods: Mapping[str, Sequence[Pod]]


async def look(server: Server, cluster: Cluster, pool: str, steady: Mapping[str, Run]) -> Seen:
    """Read the pool's runs and Jobs, and then, as a pod is older than what its run says, the pods.

    One API's answer is read while the other's is on its way.

    Args:
        server: of the runs.
        cluster: of their Jobs and pods.
        pool: the name of the pool.
        steady: runs that were steady in an earlier round, by id: they are counted, and not read while they are Running.

    Raises:
        PipelineError: one of both does not answer: there is no round then.
    """
    clusters = await cluster.identities()
    pool_id = (await server.ask("GET", f"/work_pools/{quote(pool, safe='')}"))["id"]
    still, live, crashed, jobs = await asyncio.gather(
        _still(server, pool, steady),
        _runs(server, pool, {"state": {"type": {"any_": LIVE}}, "id": {"not_any_": [*steady]}}),
        _runs(
            server,
            pool,
            {
                "state": {"type": {"any_": ["CRASHED"]}},
                "end_time": {"after_": (server.now - RECENT).isoformat()},
            },
        ),
        cluster.jobs(pool_id, server.ahead),
    )
    known = [*still, *live, *crashed]
    ours = [each for each in known if each.is_of(clusters, cluster.namespace)]
    gone, pods = await asyncio.gather(
        _gone(server, sorted({each.deployment for each in ours} - {""})), cluster.pods(pool_id, server.ahead)
    )
    runs: dict[str, Run | None] = {each.id: replace(each, abandoned=each.deployment in gone) for each in ours}
    with_pods = {each.job for each in pods}
    waiting = [
        each
        for each in jobs
        if each.name not in with_pods and not each.over and server.now - each.created > REFUSED_AFTER
    ]
    said = await gather_bounded([cluster.refused(each.name) for each in waiting])
    why = {each.name: text for each, text in zip(waiting, said, strict=True) if isinstance(text, str)}
    pods = await _with_events(cluster, pods, server)
    # Kubernetes says so some time after the pod has ended: long after it, where its API was away.
    ended = {each.job for each in pods if each.end}
    jobs = [
        replace(each, refused=why.get(each.name, ""), over=each.over or (each.once and each.name in ended))
        for each in jobs
    ]
    # What lives without a run that is alive: of one that is over, or that somebody has deleted.
    unknown = {each.run for each in pods if each.live or each.lingers} | {each.run for each in jobs if not each.over}
    # And of what has ended, what is not noted yet.
    unknown |= {each.run for some in pod_records.of_jobs(jobs, pods).values() for each in some}
    unknown -= {each.id for each in known}
    runs |= await _named(server, sorted(unknown))
    late = await claims.given_away(server, runs, jobs)
    jobs = [replace(each, given_away=True) if each.name in late else each for each in jobs]
    of_jobs: dict[str, list[Job]] = defaultdict(list)
    of_pods: dict[str, list[Pod]] = defaultdict(list)
    for job in jobs:
        of_jobs[job.run].append(job)
    for pod in pods:
        of_pods[pod.run].append(pod)
    return Seen(runs, of_jobs, of_pods)


async def _with_events(cluster: Cluster, pods: list[Pod], server: Server) -> list[Pod]:
    """The pods, those whose containers cannot be created with the reason, which only events have."""
    if not any(_is_creating(each, server) for each in pods):
        return pods
    try:
        why = await cluster.stuck()
    except ClusterError:
        return pods
    return [replace(each, waiting=why.get(each.name)) if _is_creating(each, server) else each for each in pods]


def _is_creating(pod: Pod, server: Server) -> bool:
    """Whether a pod has a node and no container for so long that something may keep it from one."""
    waits = pod.waiting is None or pod.waiting[0] in ORDINARY
    since = pod.scheduled
    return pod.live and not pod.started and waits and since is not None and server.now - since > CREATED_AFTER


async def _runs(server: Server, pool: str, which: JSON) -> list[Run]:
    pages = server.pages("/flow_runs/filter", flow_runs=which, work_pools={"name": {"any_": [pool]}})
    return [Run.read(each) async for page in pages for each in page if each["state"]]


async def _still(server: Server, pool: str, steady: Mapping[str, Run]) -> list[Run]:
    """Of runs that were steady, those that are Running as they were read, and the others as they are now.

    If one was deleted none is known: whatever lives of them is asked for by its id.
    """
    if not steady:
        return []
    running: JSON = {"id": {"any_": [*steady]}, "state": {"type": {"any_": ["RUNNING"]}}}
    number = await server.ask("POST", "/flow_runs/count", {"flow_runs": running}, idempotent=True)
    if number == len(steady):
        return [*steady.values()]
    others = await _runs(server, pool, running | {"state": {"type": {"not_any_": ["RUNNING"]}}})
    if number + len(others) < len(steady):
        return others
    return [*others, *(steady[each] for each in steady.keys() - {each.id for each in others})]


async def _gone(server: Server, deployments: Sequence[str]) -> set[str]:
    """Which of them the server does not have any more: a run keeps the id of its own."""
    these = {"deployments": {"id": {"any_": deployments}}}
    if await server.ask("POST", "/deployments/count", these, idempotent=True) == len(deployments):
        return set()  # without reading what is in them
    return {*deployments} - {each["id"] for each in await server.all("/deployments/filter", **these)}


async def _named(server: Server, ids: Sequence[str]) -> dict[str, Run | None]:
    found: dict[str, Run | None] = dict.fromkeys(ids)
    for start in range(0, len(ids), prefect_api.PAGE):
        which = {"id": {"any_": ids[start : start + prefect_api.PAGE]}}
        for each in await server.all("/flow_runs/filter", flow_runs=which):
            found[each["id"]] = Run.read(each) if each["state"] else None
    return found


class Reconciler:
    """The loop.

    Args:
        server: of the runs.
        cluster: of their pods.
        pool: whose runs.
        policy: how patient to be.
        lead: who acts, of several; None acts always.
        pulse: its sign of life and its metrics.
        events: tells what happens to pods; None tells nothing.
    """

    def __init__(
        self,
        server: Server,
        cluster: Cluster,
        pool: str,
        policy: Policy,
        lead: LeaderElection | None,
        pulse: Pulse,
        events: PodEvents | None = None,
    ) -> None:
        self.server, self.cluster, self.pool, self.policy = server, cluster, pool, policy
        self.lead, self.pulse, self.events = lead, pulse, events
        self.steady: dict[str, Run] = {}
        """Runs about which nothing was to be decided and that need not be read again; without it all are."""
        self.reported: dict[str, str] = {}
        """The failures of single runs and Jobs in the newest round, by run or Job."""
        registry = pulse.registry
        self.actions = prometheus.Counter(
            "reconciler_actions_total", "What was done about runs.", ["action"], registry=registry
        )
        self.rounds = prometheus.Histogram(
            "reconciler_round_seconds", "How long a round took.", registry=registry,
            buckets=(0.1, 0.2, 0.5, 1, 2, 5, 10),
        )  # fmt: skip
        self.failures = prometheus.Counter("reconciler_failures_total", "Rounds that failed.", registry=registry)
        self.live = prometheus.Gauge("reconciler_live_runs", "Runs that are claimed or under way.", registry=registry)
        self.leading = prometheus.Gauge("reconciler_leader", "Whether this one acts.", registry=registry)
        self.last = prometheus.Gauge(
            "reconciler_last_round_timestamp_seconds", "When a round last succeeded.", registry=registry
        )

    async def run(self, every: float) -> None:
        """Rounds, until cancelled, the next one early if a pod dies; what fails is said once and tried again."""
        heard = asyncio.Event()
        listening = asyncio.create_task(self.cluster.listen(heard))
        try:
            while True:
                began = time.monotonic()
                heard.clear()
                done: list[str] = []
                try:
                    leads = self.lead is None or await self.lead.acquire_or_renew()
                    self.leading.set(leads)
                    if leads:
                        done = await self.round()
                    elif self.events:
                        self.events.forget()
                    if self.pulse.trouble:
                        logger.info("Rounds succeed again.")
                    self.pulse.trouble = ""
                except Exception as error:
                    self.failures.inc()
                    if str(error) != self.pulse.trouble:
                        # An error that does not explain itself is a mistake in this program, and no reason to stop.
                        trace = None if isinstance(error, PipelineError) else error
                        logger.error("%s. The next round tries again.", str(error).rstrip("."), exc_info=trace)
                    self.pulse.trouble = str(error)
                self.pulse.beat()
                # What was done is often half of it: a crash is followed by a retry. No round follows another at once.
                await asyncio.sleep(every / 10)
                rest = 0 if done else every - (time.monotonic() - began)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(heard.wait(), rest)
        finally:
            listening.cancel()
            await asyncio.wait([listening])
            if self.lead:
                with contextlib.suppress(PipelineError):
                    await self.lead.release()

    async def round(self) -> list[str]:
        """One round; what was done, a line each."""
        began = time.monotonic()
        seen = await look(self.server, self.cluster, self.pool, self.steady)
        # To read a thousand runs may take longer than leadership holds.
        if self.lead and not await self.lead.acquire_or_renew():
            return []
        now = self.server.now
        todo: list[tuple[Action, list[Pod]]] = []
        before: list[Note] = []
        after: list[Note] = []
        steady: dict[str, Run] = {}
        failures: list[tuple[str, BaseException]] = []
        for id_, run in seen.runs.items():
            jobs, pods = seen.jobs.get(id_, ()), list(seen.pods.get(id_, ()))
            try:
                decided = decide(run, jobs, pods, now, self.policy)
                notes = pod_records.unnoted(run, jobs, pods)
            except Exception as error:
                failures.append((f"Run {id_}", error))
                continue
            todo += [(each, pods) for each in decided]
            # What is tried again may be claimed at once, and its worker writes labels; all else can wait.
            (before if decided else after).extend(notes)
            if run and len(steady) < MANY and is_steady(run, jobs, pods):
                steady[id_] = run
        self.steady = steady
        self.live.set(sum(run is not None and run.type in LIVE for run in seen.runs.values()))
        noted = await gather_bounded([self._note(each) for each in before])
        done = await gather_bounded([self._act(action, pods) for action, pods in todo])
        noted += await gather_bounded([self._note(each) for each in after])
        emitted = await gather_bounded([self._tell([pod for some in seen.pods.values() for pod in some])])
        for (action, _), outcome in zip(todo, done, strict=True):
            if isinstance(outcome, str) and outcome:
                run_id = None if isinstance(action, Stop) else action.run.id
                logger.info("%s", outcome, extra={RUN_ID: run_id})
        self.rounds.observe(time.monotonic() - began)
        acted = zip((_subject(action) for action, _ in todo), done, strict=True)
        noting = zip((f"Job {each.job}" for each in [*before, *after]), noted, strict=True)
        results = [*acted, *noting, ("Pod events", emitted[0])]
        self._report([*failures, *(each for each in results if isinstance(each[1], BaseException))])
        self.last.set_to_current_time()
        return [each for each in done if isinstance(each, str) and each]

    def _report(self, failures: Sequence[tuple[str, BaseException]]) -> None:
        """Log the failures of single runs and Jobs, each once.

        A user can write what makes one run fail. That must not keep the reconciler from the others.

        Raises:
            BaseException: a failure that concerns all: an API that does not answer.
        """
        reported: dict[str, str] = {}
        for subject, error in failures:
            concerns_all = isinstance(error, PipelineError) and not isinstance(error, RefusedError)
            if concerns_all or not isinstance(error, Exception):
                raise error
            self.failures.inc()
            reported[subject] = f"{subject} is left as it is: {str(error).rstrip('.') or type(error).__name__}."
            if self.reported.get(subject) != reported[subject]:
                logger.error("%s", reported[subject], exc_info=None if isinstance(error, PipelineError) else error)
        self.reported = reported

    async def _note(self, note: Note) -> None:
        if self.lead is None or self.lead.is_leader:
            await pod_records.note(self.server, self.cluster, note)

    async def _tell(self, pods: Sequence[Pod]) -> None:
        if self.events and (self.lead is None or self.lead.is_leader):
            await self.events.tell(pods)

    async def _act(self, action: Action, pods: list[Pod]) -> str:
        if self.lead and not self.lead.is_leader:
            return ""
        try:
            # Of several requests the last may be made much later than the first, and by then be another's to make.
            async with asyncio.timeout_at(self.lead.deadline if self.lead else None):
                said = await carry_out(self.server, self.cluster, action, pods)
        except TimeoutError:
            raise PipelineError(f"{type(action).__name__} took longer than leadership lasts") from None
        if said:
            self.actions.labels(type(action).__name__.lower()).inc()
        return said


async def reconcile(
    pool: str,
    namespace: str,
    policy: Policy,
    *,
    every: float,
    port: int,
    wait: float,
    lease: str = "",
    identity: str = "",
    url: str = "",
    pod_events: bool = True,
) -> None:
    """Reconcile until SIGTERM or SIGINT.

    Args:
        pool: whose runs.
        namespace: where their Jobs are.
        policy: how patient to be.
        every: seconds from one round to the next.
        port: of `/metrics` and `/health`.
        wait: seconds to wait for the Prefect API at first.
        lease: the Lease of those of whom one acts; without it this one always does.
        identity: this one's name among them.
        url: of the Kubernetes API, if this is no pod.
        pod_events: tell the server what happens to pods.

    Raises:
        PipelineError: it cannot begin.
    """
    pulse = Pulse(3 * every + GRACE)
    with served(pulse, port):
        async with kubernetes.connected(namespace, url) as cluster, prefect_api.connected(wait) as server:
            # A round that fails is made anew, from what is then; and what this one has sent must not linger.
            server.patience, server.client.timeout = 0, httpx.Timeout(2 * kubernetes.TIMEOUT)
            lead = LeaderElection(cluster, lease, identity) if lease else None
            # To look through Prefect's modules for garbage with each thousand pods takes a tenth of a second.
            gc.collect()
            gc.freeze()
            events = PodEvents(server, namespace) if pod_events else None
            reconciler = Reconciler(server, cluster, pool, policy, lead, pulse, events)
            working = asyncio.create_task(reconciler.run(every))
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, working.cancel)
            with contextlib.suppress(asyncio.CancelledError):
                await working
