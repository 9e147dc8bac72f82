"""Checks of the Prefect server through its API: password, clocks, websocket, pools, schedules, late runs."""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from orchestration.deployments import schedules
from orchestration.errors import PipelineError
from orchestration.inspection.unfinished_runs import read_unfinished_runs
from orchestration.operations.doctor.cluster_checks import count, shorten
from orchestration.operations.doctor.findings import Finding, check, failed, ok, warning
from orchestration.operations.doctor.installation import Installation, UncheckedError
from orchestration.prefect_api import CLOCK_TOLERANCE, JSON, RESPONSE_TIMEOUT_SECONDS
from orchestration.terminal import one_line

GROUP = "prefect server"

PINGS = 5
SLOW_SECONDS, TOO_SLOW_SECONDS = 0.5, 5.0
"""The median time of a request that is worth a warning, and that fails the check."""

BROKEN_CLOCK = timedelta(seconds=30)
"""The difference of clocks from which on tokens, leases and schedules are wrong."""

WEBSOCKET_SECONDS = 5.0
"""How long a websocket must stay open."""


@check(GROUP, "api latency")
async def check_api_latency(installation: Installation) -> Finding:
    """The Prefect API answers, and soon."""
    times = []
    for _ in range(PINGS):
        start = time.monotonic()
        await installation.server.ask("POST", "/work_pools/filter", {"limit": 1}, idempotent=True)
        times.append(time.monotonic() - start)
    shown = f"{installation.server.url} answers in {median(times) * 1000:.0f} ms"
    if median(times) > TOO_SLOW_SECONDS:
        return failed(shown, "See docs/how-to/scale-out.md")
    if median(times) > SLOW_SECONDS:
        return warning(shown, "See docs/how-to/scale-out.md")
    return ok(shown)


@check(GROUP, "authentication")
async def check_authentication(installation: Installation) -> Finding:
    """The API refuses requests without a password."""
    url = installation.server.url
    async with httpx.AsyncClient(timeout=RESPONSE_TIMEOUT_SECONDS, verify=False) as client:  # noqa: S501 - nothing secret is sent
        status = (await client.post(f"{url}/work_pools/filter", json={"limit": 1})).status_code
    if status != 200:
        return ok(f"without a password it answers {status}")
    if urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1") and not installation.has_cluster:
        return warning("no password, on this machine alone", "Set PREFECT_SERVER_API_AUTH_STRING to USER:PASSWORD")
    return failed(
        "the API answers without a password: everyone who reaches it can run code", "Set auth.enabled to true"
    )


@check(GROUP, "clocks")
async def check_clocks(installation: Installation) -> Finding:
    """The clocks of this machine, Kubernetes' API server, the Prefect server and the database agree."""
    ahead = {name: offset async for name, offset in _offsets(installation)}
    if not ahead:
        raise UncheckedError("neither Kubernetes nor the Prefect server answers")
    wrong = [
        f"{name} is {abs(offset).total_seconds():.0f} s {'ahead' if offset > timedelta() else 'behind'}"
        for name, offset in ahead.items()
        if abs(offset) > CLOCK_TOLERANCE
    ]
    if any(abs(offset) > BROKEN_CLOCK for offset in ahead.values()):
        return failed(shorten(wrong), "Synchronise the clocks of the nodes and of this machine (NTP)")
    if wrong:
        return warning(shorten(wrong), "Synchronise the clocks of the nodes and of this machine (NTP)")
    return ok(f"this machine, {', '.join(ahead)} agree within {CLOCK_TOLERANCE.total_seconds():.0f} s")


async def _offsets(installation: Installation) -> AsyncIterator[tuple[str, timedelta]]:
    """Yield how far each clock that can be read is ahead of this machine's; the database's, of its client's clock."""
    try:
        before = datetime.now(UTC)
        created = datetime.fromisoformat(await installation.read_time())
        yield "kubernetes", _distance(created, before, datetime.now(UTC))
    except PipelineError:
        pass
    try:
        await installation.server.ask("GET", "/health")
        yield "prefect server", installation.server.ahead
    except PipelineError:
        pass
    try:
        seconds = (await installation.read_report())["database"]["ahead_seconds"]
        yield "database", timedelta(seconds=seconds)
    except (PipelineError, KeyError):
        pass


def _distance(moment: datetime, begin: datetime, end: datetime) -> timedelta:
    """Return how far a moment is outside of a span of time: negative before it, zero inside."""
    return moment - end if moment > end else min(moment - begin, timedelta())


@check(GROUP, "websocket")
async def check_websocket(installation: Installation) -> Finding:
    """A websocket to the API, as the UI and workers use it, opens and stays open."""
    from prefect.events.clients import PrefectEventSubscriber
    from prefect.events.filters import EventFilter, EventNameFilter

    _ = installation.server
    nothing = EventFilter(event=EventNameFilter(name=["orchestrate.doctor.never"]))
    start = time.monotonic()
    try:
        async with PrefectEventSubscriber(filter=nothing, reconnection_attempts=0) as subscriber:
            start = time.monotonic()
            async with asyncio.timeout(WEBSOCKET_SECONDS):
                async for _ in subscriber:
                    pass
    except TimeoutError:
        return ok(f"open for {WEBSOCKET_SECONDS:.0f} s")
    except Exception as error:
        return failed(
            f"{type(error).__name__} after {time.monotonic() - start:.0f} s: {' '.join(str(error).split())}",
            "Let the proxy pass websockets on, with long timeouts: docs/how-to/ingress-and-tls.md",
        )
    return failed(
        f"closed after {time.monotonic() - start:.0f} s",
        "Let the proxy pass websockets on, with long timeouts: docs/how-to/ingress-and-tls.md",
    )


async def _deployments(installation: Installation) -> list[JSON]:
    """Return all deployments, each with its full `title`."""
    flows = {flow["id"]: flow["name"] for flow in await installation.server.all("/flows/filter")}
    found = await installation.server.all("/deployments/filter")
    return [
        deployment | {"title": one_line(f"{flows.get(deployment['flow_id'], '?')}/{deployment['name']}")}
        for deployment in found
    ]


def _is_scheduled(deployment: JSON) -> bool:
    return any(schedule["active"] for schedule in deployment["schedules"])


@check(GROUP, "work pools")
async def check_work_pools(installation: Installation) -> Finding:
    """Each work pool with deployments has a worker, is not paused and has a limit above 0."""
    deployments = await _deployments(installation)
    problems = []
    pools = await installation.server.all("/work_pools/filter")
    used = [pool for pool in pools if any(deployment["work_pool_name"] == pool["name"] for deployment in deployments)]
    for pool in used:
        path = f"/work_pools/{quote(pool['name'], safe='')}"
        name = one_line(pool["name"])
        if pool["is_paused"]:
            problems.append((f"{name} is paused", f"prefect work-pool resume '{name}'"))
        elif pool["concurrency_limit"] == 0:
            problems.append(
                (f"{name} has the concurrency limit 0", f"prefect work-pool clear-concurrency-limit '{name}'")
            )
        elif pool["status"] == "NOT_READY":
            cure = "Look at the worker: kubectl get pods -l app.kubernetes.io/component=worker"
            problems.append((f"{name} has no worker", cure))
        for queue in await installation.server.all(f"{path}/queues/filter"):
            # The queue `default` is paused with its pool.
            if queue["is_paused"] and not pool["is_paused"]:
                problems.append((f"queue {one_line(queue['name'])} of {name} is paused", "Resume the queue in the UI"))
            elif queue["concurrency_limit"] == 0:
                cure = "Raise the limit of the queue, in pool.queues or in the UI"
                problems.append((f"queue {one_line(queue['name'])} of {name} has the concurrency limit 0", cure))
    if problems:
        return failed(shorten(text for text, _ in problems), problems[0][1])
    return ok(f"{count(used, 'pool')} with deployments, ready")


@check(GROUP, "schedules")
async def check_schedules(installation: Installation) -> Finding:
    """Each schedule fires, and its deployment can run: not paused, in a work pool, with a limit above 0."""
    deployments = await _deployments(installation)
    pools = {pool["name"] for pool in await installation.server.all("/work_pools/filter")}
    dead, intended = [], []
    for deployment in deployments:
        title = deployment["title"]
        if not deployment["schedules"]:
            continue
        if deployment["paused"] or not _is_scheduled(deployment):
            intended.append(f"{title} is paused" if deployment["paused"] else f"no schedule of {title} is active")
            continue
        limit = (deployment.get("global_concurrency_limit") or {}).get("limit")
        if not deployment["work_pool_name"]:
            dead.append((f"{title} has no work pool", "Deploy it with a work pool"))
        elif deployment["work_pool_name"] not in pools:
            dead.append((f"the work pool of {title} does not exist", "make deploy, or name another work pool"))
        elif limit == 0:
            dead.append((f"{title} has the concurrency limit 0", "Raise concurrency_limit of the deployment"))
        dead += [
            (f"{title}: {problem}", "Correct the schedule of the deployment")
            for schedule in deployment["schedules"]
            if schedule["active"] and (problem := _never_fires(schedule["schedule"]))
        ]
    if dead:
        return failed(shorten(text for text, _ in dead), dead[0][1])
    if intended:
        return warning(shorten(intended), "Resume it if that is not intended: prefect deployment schedule resume")
    scheduled = [deployment for deployment in deployments if _is_scheduled(deployment)]
    return ok(f"{count(scheduled, 'deployment')} with a schedule")


def _never_fires(schedule: JSON) -> str:
    """Return why a schedule has no date in the future; empty if it has one."""
    rule: dict[str, Any] = {key: value for key, value in schedule.items() if value is not None}
    return one_line((schedules.find_problem(rule) or "").partition(". ")[0])


@check(GROUP, "late runs")
async def check_late_runs(installation: Installation) -> Finding:
    """No run is late, or claimed and not started."""
    runs = await read_unfinished_runs(installation.server, stuck=True)
    if runs:
        shown = f"{one_line(runs[0]['name'])}: {one_line(runs[0]['why'])}"
        return warning(f"{count(runs, 'run')}, such as {shown}", "orchestrate runs --stuck lists them")
    return ok("no run is late")
