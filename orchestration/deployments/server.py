"""A Prefect server's API, as desired state needs it: all of a kind at once, requests made again, clear errors."""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from orchestration.deployments.objects import (
    AUTOMATION,
    DEPLOYMENT,
    LIMIT,
    NOBODY,
    POOL,
    QUEUE,
    TAG_LIMIT,
    VARIABLE,
    Name,
    Object,
    automation,
    runs_one_deployment,
    schedules_by_name,
    with_deployment,
)
from orchestration.deployments.schedules import from_server
from orchestration.errors import DeploymentsError

PAGE = 200
"""What the API gives at most at once."""

AT_ONCE = 1
"""Requests at the same time. With two, most fail on SQLite: what has read cannot write once the other has written. More
are no faster on Postgres.
"""

ANSWER = 75.0
"""Seconds in which an answer must come: on SQLite a server waits for its database for 60 s before it says that others
hold it."""

PATIENCE = 180.0
"""Seconds for which a request is made again that the server could not answer: a lost connection, or a 5xx."""

JSON = dict[str, Any]


class RefusedError(DeploymentsError):
    """The server does not take what it is sent; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """The API at `url`; made by `connected`."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self.client = client
        self.url = url
        self.turns = asyncio.Semaphore(AT_ONCE)
        self.repeated = 0
        """Requests that were made again: what the first one did is not known."""

    async def ask(self, method: str, path: str, body: Any = None, *, absent: bool = False) -> Any:
        """One request; the answer's JSON.

        Args:
            method: of HTTP.
            path: below the API's URL.
            body: sent as JSON.
            absent: a 404 is an answer, None. Any other failure is never read as absence.

        Raises:
            RefusedError: a 4xx, with what the server says.
            DeploymentsError: it does not answer, does not know us, or fails.
        """
        deadline = time.monotonic() + PATIENCE
        pause = 0.1
        while True:
            try:
                async with self.turns:
                    response = await self.client.request(method, path, json=body)
            except httpx.TransportError as error:
                if time.monotonic() > deadline or isinstance(error, httpx.ConnectError):
                    raise DeploymentsError(self.unreachable(error)) from None
            else:
                if response.status_code < 500 or time.monotonic() > deadline:
                    return self.answer(response, f"{method} {path}", absent)
            self.repeated += 1
            pause = min(pause * 2, 3)
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - so that two do not stay in step

    def unreachable(self, error: Exception) -> str:
        """What to say of a server that does not answer."""
        said = str(error) or type(error).__name__
        return (
            f"The Prefect API at {self.url} does not answer: {said}. Start it (`prefect server start`) or name another "
            "in PREFECT_API_URL"
        )

    def answer(self, response: httpx.Response, request: str, absent: bool) -> Any:
        """The JSON of a response, or the error that it is; see `ask`."""
        status = response.status_code
        if status < 300:
            try:
                return response.json() if response.content else None
            except ValueError:
                raise DeploymentsError(
                    f"{self.url} is no Prefect API: it answers {response.headers.get('content-type')}. "
                    "PREFECT_API_URL ends with /api"
                ) from None
        if status == 404 and absent:
            return None
        if status == 405 or (status == 404 and response.text == '{"detail":"Not Found"}'):
            raise DeploymentsError(f"{self.url} is no Prefect API: it has no {request}. PREFECT_API_URL ends with /api")
        if status == 401 or (status == 403 and "detail" not in response.text):
            raise DeploymentsError(
                f"The Prefect API at {self.url} does not know us ({status}). "
                "Set PREFECT_API_AUTH_STRING to USER:PASSWORD"
            )
        try:
            said = response.json()
            said = said.get("exception_detail") or said.get("detail") or said if isinstance(said, dict) else said
        except ValueError:
            said = response.text[:300]
        if isinstance(said, list):
            said = "; ".join(f"{'.'.join(map(str, each.get('loc', [])))}: {each.get('msg')}" for each in said)
        if status >= 500:
            raise DeploymentsError(f"The Prefect API at {self.url} fails ({status}) on {request}: {said}")
        raise RefusedError(f"the server answers {status}: {said}", status)

    async def all(self, path: str, **body: Any) -> list[JSON]:
        """All that a filter endpoint has."""
        found: list[JSON] = []
        while True:
            page = await self.ask("POST", path, {**body, "limit": PAGE, "offset": len(found)})
            found += page
            if len(page) < PAGE:
                return found

    async def all_at_once(self, path: str, count: str) -> list[JSON]:
        """All that a filter endpoint has, its pages at the same time."""
        total = await self.ask("POST", count, {})
        sort = {"sort": "NAME_ASC"}
        pages = await asyncio.gather(
            *(
                self.ask("POST", path, {**sort, "limit": PAGE, "offset": offset})
                for offset in range(0, max(total, 1), PAGE)
            )
        )
        return [each for page in pages for each in page]


@asynccontextmanager
async def connected(wait: float = 0) -> AsyncIterator[Server]:
    """The server of Prefect's settings, once it answers.

    Args:
        wait: seconds to wait for it.

    Raises:
        DeploymentsError: it does not answer, or there is none in the settings.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    url = (settings.api.url or "").rstrip("/")
    if not url:
        raise DeploymentsError("No Prefect API is named. Set PREFECT_API_URL, like http://127.0.0.1:4200/api")
    auth = settings.api.auth_string.get_secret_value() if settings.api.auth_string else ""
    headers = {name: value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
               for name, value in (settings.client.custom_headers or {}).items()}  # fmt: skip
    if settings.api.key:
        headers["Authorization"] = f"Bearer {settings.api.key.get_secret_value()}"
    verify: Any = not settings.api.tls_insecure_skip_verify
    if verify and settings.api.ssl_cert_file:
        import ssl

        verify = ssl.create_default_context(cafile=settings.api.ssl_cert_file)
    name, _, password = auth.partition(":")
    async with httpx.AsyncClient(
        base_url=url, auth=(name, password) if auth else None, headers=headers, verify=verify, timeout=ANSWER
    ) as client:
        server = Server(client, url)
        await _answers(server, wait)
        yield server


async def _answers(server: Server, wait: float) -> None:
    deadline = time.monotonic() + wait
    told = False
    while wait:
        try:
            response = await server.client.get("/health")
            if response.status_code < 500:
                return
            reason = str(response.status_code)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            if time.monotonic() > deadline:
                raise DeploymentsError(server.unreachable(error)) from None
        if time.monotonic() > deadline:
            raise DeploymentsError(f"The Prefect API at {server.url} fails: {reason}. Its log says why")
        if not told:
            print(f"Waiting for the Prefect API at {server.url}: {reason}", file=sys.stderr, flush=True)
            told = True
        await asyncio.sleep(1)


async def everything(server: Server) -> dict[Name, Object]:
    """All that desired state may be about, by kind and key."""
    variables, limits, pools, queues, automations, deployments, flows = await asyncio.gather(
        server.all("/variables/filter"),
        server.all("/v2/concurrency_limits/filter"),
        server.all("/work_pools/filter"),
        server.all("/work_queues/filter"),
        server.all("/automations/filter"),
        server.all_at_once("/deployments/filter", "/deployments/count"),
        server.all_at_once("/flows/filter", "/flows/count"),
    )
    names = {each["id"]: each["name"] for each in flows}
    found: list[Object] = []
    found += [_made(VARIABLE, each["name"], each, "value", "tags") for each in variables]
    for each in limits:
        # The server keeps those of tags and deployments among them.
        if each["name"].startswith("tag:"):
            fields = {"concurrency_limit": each["limit"]}
            found.append(Object(TAG_LIMIT, each["name"].removeprefix("tag:"), fields, id=each["id"], raw=each))
        elif not each["name"].startswith("deployment:"):
            found.append(_made(LIMIT, each["name"], each, "limit", "slot_decay_per_second", "active"))
    template = ("type", "description", "concurrency_limit", "base_job_template")
    found += [_made(POOL, each["name"], each, *template) for each in pools]
    for each in queues:
        if each.get("work_pool_name"):
            key = f"{each['work_pool_name']}/{each['name']}"
            found.append(_made(QUEUE, key, each, "priority", "concurrency_limit", "description"))
    by_id = {}
    for each in deployments:
        made = deployment(each, names.get(each["flow_id"], ""))
        by_id[made.id] = made
        found.append(made)
    for each in automations:
        target = by_id.get(runs_one_deployment(each))
        fields = automation(each)
        if target:
            target.fields["triggers"][each["name"]] = with_deployment(fields, target.id, NOBODY)
            target.raw["trigger_ids"].setdefault(each["name"], []).append(each["id"])
        else:
            found.append(Object(AUTOMATION, each["name"], fields, id=each["id"], raw=each | {"copy_ids": []}))
    things: dict[Name, Object] = {}
    for thing in found:
        if thing.kind == AUTOMATION and (first := things.get(thing.name)):  # their names are not unique
            first.raw["copy_ids"].append(thing.id)
        else:
            things[thing.name] = thing
    return things


def deployment(raw: JSON, flow: str) -> Object:
    """A deployment as the server gives it."""
    limit = raw.get("global_concurrency_limit") or {}
    own_limit = str(limit.get("name", "")).startswith("deployment:")
    listed = [
        {
            "schedule": from_server(each["schedule"]),
            "active": each["active"],
            "parameters": each["parameters"] or {},
            "slug": each["slug"],
            "id": each["id"],
        }
        for each in sorted(raw["schedules"], key=lambda each: (each["created"], each["id"]))
    ]
    same = ("description", "version", "entrypoint", "path", "work_pool_name", "work_queue_name")
    fields: JSON = {key: raw.get(key) for key in same}
    fields |= {
        "tags": sorted(raw["tags"]),
        "pull_steps": raw.get("pull_steps") or [],
        "job_variables": raw.get("job_variables") or {},
        "parameters": raw.get("parameters") or {},
        "parameter_openapi_schema": raw.get("parameter_openapi_schema") or {},
        "enforce_parameter_schema": raw["enforce_parameter_schema"],
        "concurrency_limit": limit.get("limit") if own_limit else raw.get("concurrency_limit"),
        "concurrency_options": raw.get("concurrency_options"),
        "paused": raw["paused"],
        "schedules": schedules_by_name(listed),
        "triggers": {},
    }
    return Object(DEPLOYMENT, f"{flow}/{raw['name']}", fields, id=raw["id"], raw=raw | {"trigger_ids": {}})


def _made(kind: str, key: str, raw: JSON, *fields: str) -> Object:
    # To the server no description is sometimes an empty one.
    values = {each: raw.get(each) or None if each == "description" else raw.get(each) for each in fields}
    return Object(kind, key, values, id=raw["id"], raw=raw)


async def unfinished(server: Server, deployments: Sequence[Object]) -> dict[str, int]:
    """How many runs of each deployment have begun and not ended, by its id; only where there are any."""
    busy: Mapping[str, Any] = {
        "state": {
            "operator": "or_",
            "type": {"any_": ["PENDING", "RUNNING", "PAUSED", "CANCELLING"]},
            "name": {"any_": ["AwaitingRetry", "AwaitingConcurrencySlot"]},
        }
    }

    async def count(each: Object) -> int:
        body = {"deployments": {"id": {"any_": [each.id]}}, "flow_runs": busy}
        return int(await server.ask("POST", "/flow_runs/count", body))

    counts = await asyncio.gather(*map(count, deployments))
    return {each.id: number for each, number in zip(deployments, counts, strict=True) if number}
