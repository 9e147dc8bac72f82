"""Load the pages of Prefect's UI without a browser: the requests that the UI sends to the API, in its order.

The requests were recorded from the UI of Prefect 3.9.1 (`/v2`) in Chromium. As in a browser, six are open at a time. A
request that needs the answer of another follows it.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx

JSON = dict[str, Any]

CONNECTIONS = 6
"""How many connections a browser opens to a server that speaks HTTP/1.1."""


@dataclass(frozen=True)
class Subject:
    """Holds the run whose page is loaded, and what the page of its deployment needs."""

    run: str
    deployment: str
    flow: str
    start: datetime
    end: datetime


@dataclass
class Loaded:
    """Holds how long a page took.

    Attributes:
        shown: seconds until the page had its content.
        complete: seconds until no request was left: a list counts the task runs of each of its rows.
        requests: the seconds of each request, by method and path, from when a connection is free.
    """

    shown: float = 0.0
    complete: float = 0.0
    requests: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


class _Browser:
    """Sends the requests of one page, and measures them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.loaded = Loaded()
        self._connections = asyncio.Semaphore(CONNECTIONS)
        self._start = time.perf_counter()

    async def get(self, path: str, id_: str = "", suffix: str = "") -> Any:
        """Return the answer to a GET of `path`, an id and a suffix."""
        return await self._ask("GET", path, f"{path}{id_}{suffix}", None, suffix)

    async def post(self, path: str, **body: Any) -> Any:
        """Return the answer to a POST."""
        return await self._ask("POST", path, path, body, "")

    async def _ask(self, method: str, name: str, path: str, body: JSON | None, suffix: str) -> Any:
        async with self._connections:
            start = time.perf_counter()
            answer = (await self.client.request(method, path, json=body)).raise_for_status().json()
            self.loaded.requests[f"{method} {name}{suffix and '...'}{suffix}"].append(time.perf_counter() - start)
        return answer

    def show(self) -> None:
        """Note that the page has its content."""
        self.loaded.shown = time.perf_counter() - self._start

    def complete(self) -> Loaded:
        """Note that no request is left, and return the measurements."""
        self.loaded.complete = time.perf_counter() - self._start
        return self.loaded


def _past(days: int) -> JSON:
    now = datetime.now(UTC)
    return {"after_": (now - timedelta(days=days)).isoformat(), "before_": now.isoformat()}


def _any(*ids: str) -> JSON:
    return {"operator": "and_", "id": {"any_": list(ids)}}


async def _start(browser: _Browser) -> None:
    """Send what every page sends first."""
    await asyncio.gather(browser.get("/health"), browser.get("/admin/settings"), browser.get("/admin/version"))


async def _count_tasks_of_each(browser: _Browser, runs: Sequence[JSON]) -> None:
    counts = (browser.post("/ui/flow_runs/count-task-runs", flow_run_ids=[run["id"]]) for run in runs)
    await asyncio.gather(*counts)


async def _dashboard(browser: _Browser, _: Subject) -> None:
    day = _past(1)
    newest: JSON = {"sort": "EXPECTED_START_TIME_DESC", "offset": 0}

    def runs(*types: str) -> JSON:
        state = {"state": {"operator": "and_", "type": {"any_": list(types)}}} if types else {}
        return {"operator": "and_", "expected_start_time": day} | state

    def tasks(*types: str) -> JSON:
        state = {"state": {"operator": "and_", "type": {"any_": list(types)}}}
        return {"operator": "and_", "subflow_runs": {"exists_": False}, "start_time": day} | state

    await _start(browser)
    groups = (("FAILED", "CRASHED"), ("RUNNING", "PENDING", "CANCELLING"), ("COMPLETED",), ("SCHEDULED", "PAUSED"),
              ("CANCELLED",))  # fmt: skip
    of_tasks = (("COMPLETED", "FAILED", "CRASHED", "RUNNING"), ("COMPLETED",), ("FAILED", "CRASHED"), ("RUNNING",))
    found, failed, *_rest = await asyncio.gather(
        browser.post("/flow_runs/filter", **newest, flow_runs=runs()),
        browser.post("/flow_runs/filter", **newest, flow_runs=runs(*groups[0])),
        browser.post("/flow_runs/filter", sort="ID_DESC", offset=0, limit=1),
        browser.post("/work_pools/filter", offset=0),
        browser.post("/flow_runs/count", flow_runs=runs()),
        *(browser.post("/flow_runs/count", flow_runs=runs(*group)) for group in groups),
        *(browser.post("/task_runs/count", task_runs=tasks(*group)) for group in of_tasks),
        browser.post(
            "/task_runs/history",
            history_start=day["after_"], history_end=day["before_"], history_interval_seconds=4320,
            flow_runs={"operator": "and_"}, task_runs={"operator": "and_", "start_time": day},
        ),
    )  # fmt: skip
    browser.show()
    flows = sorted({run["flow_id"] for run in found})
    deployments = sorted({run["deployment_id"] for run in found if run["deployment_id"]})
    of_flow = newest | {"flow_runs": runs(*groups[0])}
    await asyncio.gather(
        browser.post("/flow_runs/paginate", page=1, limit=100, sort="START_TIME_DESC"),
        browser.post("/flows/filter", flows=_any(*flows), offset=0, sort="CREATED_DESC"),
        browser.post("/deployments/filter", deployments=_any(*deployments), offset=0, sort="CREATED_DESC"),
        *(browser.post("/flow_runs/count", **of_flow, flows=_any(flow)) for flow in flows),
        *(browser.post("/flow_runs/filter", **of_flow, flows=_any(flow), limit=1) for flow in flows),
        _count_tasks_of_each(browser, failed[:3]),
    )


async def _runs(browser: _Browser, _: Subject) -> None:
    week = {"flow_runs": {"operator": "and_", "expected_start_time": _past(7)}}
    newest: JSON = {"sort": "EXPECTED_START_TIME_DESC"}
    page: JSON = {"page": 1, "limit": 100}
    await _start(browser)

    def lists(chosen: JSON) -> list[Awaitable[Any]]:
        return [
            browser.post("/flow_runs/paginate", **page, sort="START_TIME_DESC", **chosen),
            browser.post("/task_runs/paginate", **page, **newest, **chosen),
            browser.post("/ui/flow_runs/history", **newest, limit=1000, offset=0, **chosen),
        ]

    choices = (
        browser.post(f"/{kind}/filter", limit=100, offset=0, sort="NAME_ASC") for kind in ("flows", "deployments")
    )
    counts = (browser.post("/flow_runs/count"), browser.post("/task_runs/count"))
    await asyncio.gather(*counts, *lists({}), *choices, browser.post("/work_pools/filter", limit=100, offset=0))
    found, *_rest = await asyncio.gather(*lists(week))
    browser.show()
    runs = found["results"]
    flows = sorted({run["flow_id"] for run in runs})
    await asyncio.gather(
        browser.post("/ui/flow_runs/count-task-runs", flow_run_ids=[run["id"] for run in runs]),
        browser.post("/flows/filter", flows=_any(*flows), offset=0, sort="NAME_ASC"),
        _count_tasks_of_each(browser, runs),
    )


async def _run(browser: _Browser, subject: Subject) -> None:
    only = {"operator": "and_", "any_": [subject.run]}
    span = {"since": subject.start.isoformat(), "until": subject.end.isoformat()}
    events = {
        "any_resource": {"id": [f"prefect.flow-run.{subject.run}"]},
        "event": {"exclude_prefix": ["prefect.log.write", "prefect.task-run."]},
        "occurred": span,
        "order": "ASC",
    }
    await _start(browser)
    await asyncio.gather(
        browser.get("/flow_runs/", subject.run),
        _logs(browser, subject.run),
        browser.post(
            "/artifacts/filter",
            artifacts={"operator": "and_", "flow_run_id": {"any_": [subject.run]}, "type": {"not_any_": ["result"]}},
            sort="ID_DESC", offset=0,
        ),
        browser.post("/task_runs/paginate", page=1, sort="EXPECTED_START_TIME_DESC", flow_runs=_any(subject.run)),
    )  # fmt: skip
    browser.show()
    await asyncio.gather(
        browser.get("/flows/", subject.flow),
        browser.get("/deployments/", subject.deployment),
        browser.post("/task_runs/count", task_runs={"operator": "and_", "flow_run_id": only | {"is_null_": False}}),
        browser.post("/flow_runs/count", flow_runs={"operator": "and_", "parent_flow_run_id": only}),
        browser.get("/flow_runs/", subject.run, "/graph-v2"),
        browser.post("/events/filter", filter=events, limit=50),
    )


async def _logs(browser: _Browser, run: str, offset: int = 0) -> list[JSON]:
    chosen = {"operator": "and_", "level": {"ge_": 0}, "flow_run_id": {"any_": [run]}}
    lines: list[JSON] = await browser.post("/logs/filter", limit=50, sort="TIMESTAMP_ASC", logs=chosen, offset=offset)
    return lines


async def _logs_of_run(browser: _Browser, subject: Subject) -> None:
    """Read the log of a run to its end, as the tab does that is scrolled."""
    lines = await _logs(browser, subject.run)
    browser.show()
    read = len(lines)
    while lines:
        lines = await _logs(browser, subject.run, read)
        read += len(lines)


async def _deployments(browser: _Browser, _: Subject) -> None:
    by_name: JSON = {"offset": 0, "sort": "NAME_ASC"}
    chosen = {
        "operator": "and_",
        "flow_or_deployment_name": {"like_": ""},
        "tags": {"operator": "and_", "all_": []},
    }
    await _start(browser)
    found, *_rest = await asyncio.gather(
        browser.post("/deployments/filter", **by_name, deployments=chosen, limit=10),
        browser.post("/deployments/count", **by_name),
        browser.post("/deployments/count", **by_name, deployments=chosen),
    )
    browser.show()
    of_each = [{"deployments": _any(row["id"]), "sort": "START_TIME_DESC", "offset": 0} for row in found]
    await asyncio.gather(
        browser.post("/flows/filter", **by_name, flows=_any(*sorted({row["flow_id"] for row in found}))),
        browser.post("/deployments/filter", **by_name),
        *(browser.post("/flow_runs/filter", **one, limit=limit) for one in of_each for limit in (0, 21)),
    )


async def _deployment(browser: _Browser, subject: Subject) -> None:
    states = ["COMPLETED", "RUNNING", "PENDING", "FAILED", "CANCELLED", "CANCELLING", "CRASHED", "PAUSED"]
    past = {"operator": "and_", "name": {}, "state": {"operator": "and_", "type": {"any_": states}}}
    due = {"operator": "and_", "state": {"operator": "and_", "name": {"any_": ["Scheduled"]}}}
    only = {"deployments": _any(subject.deployment)}
    await _start(browser)
    await browser.get("/deployments/", subject.deployment)
    found, *_rest = await asyncio.gather(
        browser.post("/flow_runs/paginate", **only, flow_runs=past, limit=10, page=1, sort="START_TIME_DESC"),
        browser.post("/flow_runs/filter", **only, flow_runs=due, sort="EXPECTED_START_TIME_ASC", limit=1, offset=0),
        browser.get("/flows/", subject.flow),
        browser.get("/automations/related-to/prefect.deployment.", subject.deployment),
    )
    browser.show()
    flows = [run["flow_id"] for run in found["results"]]
    await asyncio.gather(
        browser.post("/flows/filter", flows=_any(*flows), offset=0), _count_tasks_of_each(browser, found["results"])
    )


async def _events(browser: _Browser, _: Subject) -> None:
    day = _past(1)
    chosen = {
        "occurred": {"since": day["after_"], "until": day["before_"]},
        "order": "DESC",
        "event": {"exclude_name": ["prefect.log.write"]},
    }
    hourly: JSON = {"filter": chosen, "time_unit": "hour", "time_interval": 1}
    await _start(browser)
    await asyncio.gather(
        browser.post("/events/filter", filter=chosen, limit=50), browser.post("/events/count-by/time", **hourly)
    )
    browser.show()
    await asyncio.gather(
        browser.post("/events/count-by/event", **hourly),
        *(browser.post(f"/{kind}/filter", offset=0, sort="CREATED_DESC") for kind in ("automations", "deployments")),
        browser.post("/flows/filter", offset=0, sort="CREATED_DESC"),
        *(browser.post(f"/{kind}/filter", offset=0) for kind in ("work_pools", "work_queues")),
        browser.post("/block_documents/filter", offset=0, sort="BLOCK_TYPE_AND_NAME_ASC", include_secrets=False),
    )  # fmt: skip


PAGES: dict[str, Callable[[_Browser, Subject], Awaitable[None]]] = {
    "dashboard": _dashboard,
    "runs": _runs,
    "run": _run,
    "logs of a run": _logs_of_run,
    "deployments": _deployments,
    "deployment": _deployment,
    "event feed": _events,
}
"""The main pages of the UI."""


async def load_pages(api: str, subjects: Sequence[Subject]) -> dict[str, list[Loaded]]:
    """Load each page once for each subject, after a first time that does not count.

    Args:
        api: the URL of the API.
        subjects: the runs and deployments of the pages.

    Returns:
        The measurements by the name of the page.

    Raises:
        httpx.HTTPStatusError: the API refuses a request, or fails.
    """
    found: dict[str, list[Loaded]] = defaultdict(list)
    limits = httpx.Limits(max_connections=CONNECTIONS, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=api, timeout=300, limits=limits) as client:
        for number, subject in enumerate([subjects[0], *subjects]):
            for name, load in PAGES.items():
                browser = _Browser(client)
                await load(browser, subject)
                if number:
                    found[name].append(browser.complete())
    return found
