"""A Prefect server's API: requests that are made again while it cannot answer, clear errors, all pages of a filter."""

import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import uuid4

import httpx

from orchestration.errors import ApiError

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


CLOCK = timedelta(seconds=3)
"""By how much two clocks may differ unnoticed: the date of an answer has no fractions, and a server makes it once a
second."""


def ahead(response: httpx.Response) -> timedelta:
    """By how much the clock of who answered is ahead of this one; nothing where that is within `CLOCK`, or not said.

    The answer was made at some time after it was asked for: a slow one is no slow clock.
    """
    try:
        said = parsedate_to_datetime(response.headers["Date"])
    except (KeyError, ValueError):
        return timedelta()
    received = datetime.now(UTC)
    asked = received - response.elapsed
    if asked - CLOCK <= said <= received + CLOCK:
        return timedelta()
    return said - (received if said > received else asked)


class Access(httpx.Auth):
    """Gives requests the user and, where the API protects itself against forged requests (CSRF), a token.

    The token is asked for when a request is refused for want of one, so that other servers are not asked. The server
    changes nothing when it refuses.

    Args:
        url: of the API.
        user: USER:PASSWORD; empty is nobody.
    """

    requires_response_body = True

    def __init__(self, url: str, user: str = "") -> None:
        name, _, password = user.partition(":")
        self._user = httpx.BasicAuth(name, password) if user else None
        self._client = str(uuid4())
        self._url = f"{url}/csrf-token?client={self._client}"
        self._token = ""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request, and once more with a new token if the server asks for one."""
        self._sign(request)
        response = yield request
        if response.status_code != 403 or "CSRF token" not in response.text:
            return
        # With what proxies want of the client.
        same = {name: value for name, value in request.headers.items() if not name.startswith("content-")}
        answer = yield httpx.Request("GET", self._url, headers=same)
        if answer.is_success:
            self._token = answer.json()["token"]
            self._sign(request)
            yield request

    def _sign(self, request: httpx.Request) -> None:
        if self._user:
            next(self._user.auth_flow(request))
        if self._token and request.method != "GET":
            request.headers["Prefect-Csrf-Token"] = self._token
            request.headers["Prefect-Csrf-Client"] = self._client


class RefusedError(ApiError):
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
        self.patience = PATIENCE
        self.doubtful = 0
        """Requests that were made again and are not idempotent: the first may have been done as well."""
        self.ahead = timedelta()
        """By how much the server's clock is ahead of this one."""

    @property
    def now(self) -> datetime:
        """The time on the server's clock, as of its last answer."""
        return datetime.now(UTC) + self.ahead

    async def ask(
        self, method: str, path: str, body: Any = None, *, absent: bool = False, idempotent: bool = False
    ) -> Any:
        """One request; the answer's JSON.

        Args:
            method: of HTTP.
            path: below the API's URL.
            body: sent as JSON.
            absent: a 404 is an answer, None. Any other failure is never read as absence.
            idempotent: of a POST: made twice it is as made once.

        Raises:
            RefusedError: a 4xx, with what the server says.
            ApiError: it does not answer, does not know us, or fails.
        """
        deadline = time.monotonic() + self.patience
        pause = 0.01
        while True:
            try:
                async with self.turns:
                    response = await self.client.request(method, path, json=body)
            except httpx.TransportError as error:
                if time.monotonic() > deadline or isinstance(error, httpx.ConnectError):
                    raise ApiError(self.unreachable(error)) from None
            else:
                self.ahead = ahead(response)
                if response.status_code < 500 or time.monotonic() > deadline:
                    return self.answer(response, f"{method} {path}", absent)
            self.doubtful += method == "POST" and not idempotent
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
                raise ApiError(
                    f"{self.url} is no Prefect API: it answers {response.headers.get('content-type')}. "
                    "PREFECT_API_URL ends with /api"
                ) from None
        if status == 404 and absent:
            return None
        if status == 405 or (status == 404 and response.text == '{"detail":"Not Found"}'):
            raise ApiError(f"{self.url} is no Prefect API: it has no {request}. PREFECT_API_URL ends with /api")
        if status == 401 or (status == 403 and "detail" not in response.text):
            raise ApiError(
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
            raise ApiError(f"The Prefect API at {self.url} fails ({status}) on {request}: {said}")
        raise RefusedError(f"the server answers {status}: {said}", status)

    async def all(self, path: str, **body: Any) -> list[JSON]:
        """All that a filter endpoint has."""
        return [each async for page in self.pages(path, **body) for each in page]

    async def pages(self, path: str, **body: Any) -> AsyncIterator[list[JSON]]:
        """The same page by page, for what keeps little of much."""
        offset = 0
        while True:
            page = await self.ask("POST", path, {**body, "limit": PAGE, "offset": offset}, idempotent=True)
            yield page
            offset += len(page)
            if len(page) < PAGE:
                return


@asynccontextmanager
async def connected(wait: float = 0) -> AsyncIterator[Server]:
    """The server of Prefect's settings, once it answers.

    Args:
        wait: seconds to wait for it.

    Raises:
        ApiError: it does not answer, or there is none in the settings.
    """
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    url = (settings.api.url or "").rstrip("/")
    if not url:
        raise ApiError("No Prefect API is named. Set PREFECT_API_URL, like http://127.0.0.1:4200/api")
    auth = settings.api.auth_string.get_secret_value() if settings.api.auth_string else ""
    headers = {name: value.get_secret_value() if hasattr(value, "get_secret_value") else str(value)
               for name, value in (settings.client.custom_headers or {}).items()}  # fmt: skip
    if settings.api.key:
        headers["Authorization"] = f"Bearer {settings.api.key.get_secret_value()}"
    verify: Any = not settings.api.tls_insecure_skip_verify
    if verify and settings.api.ssl_cert_file:
        import ssl

        verify = ssl.create_default_context(cafile=settings.api.ssl_cert_file)
    async with httpx.AsyncClient(
        base_url=url, auth=Access(url, auth), headers=headers, verify=verify, timeout=ANSWER
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
                raise ApiError(server.unreachable(error)) from None
        if time.monotonic() > deadline:
            raise ApiError(f"The Prefect API at {server.url} fails: {reason}. Its log says why")
        if not told:
            print(f"Waiting for the Prefect API at {server.url}: {reason}", file=sys.stderr, flush=True)
            told = True
        await asyncio.sleep(1)
