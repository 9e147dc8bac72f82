"""An HTTP client of the Prefect API: retries, authentication, CSRF tokens, pagination and errors that name the cure.

The retry loop of `Server.ask` is no shorter with tenacity 9.2, which would add 12 ms to each start of the command line.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import uuid4

import httpx

from orchestration import api_settings
from orchestration.api_settings import ApiSettings
from orchestration.errors import ApiError

logger = logging.getLogger(__name__)

PAGE_SIZE = 200
"""How many items the API returns for one request at most."""

CONCURRENT_REQUESTS = 1
"""How many requests are sent at the same time.

Of two, most fail on SQLite: a transaction that has read cannot write once another transaction has written. More
concurrent requests are no faster on Postgres.
"""

RESPONSE_TIMEOUT_SECONDS = 75.0
"""How long to wait for a response. A server on SQLite waits for a locked database for 60 s before it reports that."""

CHECK_TIMEOUT_SECONDS = 10.0
"""How long `check_certificate` waits for the API, which answers after it has shown its certificate."""

RETRY_SECONDS = 180.0
"""For how long a request is retried that the server could not answer: after a lost connection, or a 5xx."""

JSON = dict[str, Any]

CLOCK_TOLERANCE = timedelta(seconds=3)
"""The difference between two clocks that counts as none.

The Date header has no fractions of a second, and a server renews it once a second.
"""


def clock_offset(response: httpx.Response) -> timedelta:
    """Return how far the server's clock is ahead of this machine's clock, by the Date header of a response.

    The server sets the header at some time between request and response. So a slow response is no slow clock.

    Returns:
        Negative if the server's clock is behind. Zero within `CLOCK_TOLERANCE`, and for a response without a date.
    """
    try:
        date = parsedate_to_datetime(response.headers["Date"])
    except (KeyError, ValueError):
        return timedelta()
    received = datetime.now(UTC)
    sent = received - response.elapsed
    if sent - CLOCK_TOLERANCE <= date <= received + CLOCK_TOLERANCE:
        return timedelta()
    return date - (received if date > received else sent)


class Access(httpx.Auth):
    """Adds the user to requests, and a CSRF token if the API asks for one.

    The client fetches a token only after the API has refused a request for the lack of a token. The API changes nothing
    when it refuses a request.

    Args:
        url: the URL of the API.
        user: USER:PASSWORD; empty for an API without authentication.
    """

    requires_response_body = True

    def __init__(self, url: str, user: str = "") -> None:
        name, _, password = user.partition(":")
        self._user = httpx.BasicAuth(name, password) if user else None
        self._client = str(uuid4())
        self._url = f"{url}/csrf-token?client={self._client}"
        self._token = ""

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Send the request, and again with a new token if the API asks for one."""
        self._sign(request)
        response = yield request
        if response.status_code != 403 or "CSRF token" not in response.text:
            return
        # A proxy may ask for the client's other headers.
        headers = {name: value for name, value in request.headers.items() if not name.startswith("content-")}
        token_response = yield httpx.Request("GET", self._url, headers=headers)
        if token_response.is_success:
            self._token = token_response.json()["token"]
            self._sign(request)
            yield request

    def _sign(self, request: httpx.Request) -> None:
        if self._user:
            next(self._user.auth_flow(request))
        if self._token and request.method != "GET":
            request.headers["Prefect-Csrf-Token"] = self._token
            request.headers["Prefect-Csrf-Client"] = self._client


def certificate_refusal(error: Exception) -> str:
    """Return why this client refuses the certificate of the API, and the cure; empty for any other error."""
    found = re.search(r"certificate verify failed: (.*?)(?: \(_ssl\.c|$)", str(error))
    if not found:
        return ""
    return (
        f"its certificate is refused ({found[1].rstrip('.')}). Set PREFECT_API_SSL_CERT_FILE to the certificate of "
        "its CA (api.tls.caSecret of the chart), and PREFECT_API_URL to a name in its certificate"
    )


class RefusedError(ApiError):
    """The server refuses a request with a 4xx.

    Args:
        message: what the server answers.
        status: the HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """Sends requests to the Prefect API at a URL, and retries those that the API does not answer.

    Use `connected` to get one for the API of Prefect's settings.

    Args:
        client: the HTTP client, with the API's URL as its base.
        url: the URL of the API, for error messages.
    """

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self.client = client
        self.url = url
        self.retry_seconds = RETRY_SECONDS
        self.ambiguous_retries = 0
        """How many retried requests were not idempotent: the API may have executed the first request, too."""
        self.ahead = timedelta()
        """How far the server's clock is ahead of this machine's clock."""
        self._slots = asyncio.Semaphore(CONCURRENT_REQUESTS)

    @property
    def now(self) -> datetime:
        """Return the time on the server's clock, by its last response."""
        return datetime.now(UTC) + self.ahead

    async def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        absent: bool = False,
        idempotent: bool = False,
    ) -> Any:
        """Send a request, and return the JSON of the response.

        Args:
            method: the HTTP method.
            path: the path below the API's URL.
            body: what to send as JSON.
            headers: headers of this request.
            absent: whether a 404 means that the object does not exist: return None. No other failure means that.
            idempotent: whether a POST may be sent twice without a further effect.

        Raises:
            RefusedError: the server refuses the request with a 4xx.
            ApiError: the server does not answer, authentication failed, or the server fails.
        """
        deadline = time.monotonic() + self.retry_seconds
        pause = 0.01
        while True:
            try:
                async with self._slots:
                    response = await self.client.request(method, path, json=body, headers=headers)
            except httpx.TransportError as error:
                if time.monotonic() > deadline or isinstance(error, httpx.ConnectError):
                    raise ApiError(self.unreachable(error)) from None
            else:
                self.ahead = clock_offset(response)
                if response.status_code < 500 or time.monotonic() > deadline:
                    return self._read(response, f"{method} {path}", absent)
            self.ambiguous_retries += method == "POST" and not idempotent
            pause = min(pause * 2, 3)
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - so that two clients do not stay in step

    def unreachable(self, error: Exception) -> str:
        """Return the error message for a server that does not answer."""
        if refusal := certificate_refusal(error):
            return f"The Prefect API at {self.url} cannot be used: {refusal}"
        cause = str(error) or type(error).__name__
        return (
            f"The Prefect API at {self.url} does not answer: {cause}. "
            "Start it (`prefect server start`) or name another in PREFECT_API_URL"
        )

    def _read(self, response: httpx.Response, request: str, absent: bool) -> Any:
        """Return the JSON of a response, or raise its error. See `ask`."""
        status = response.status_code
        if status < 300:
            try:
                return response.json() if response.content else None
            except ValueError:
                raise ApiError(
                    f"{self.url} is not a Prefect API: it answers {response.headers.get('content-type')}. "
                    "Set PREFECT_API_URL to a URL that ends with /api"
                ) from None
        if status == 404 and absent:
            return None
        if status == 405 or (status == 404 and response.text == '{"detail":"Not Found"}'):
            raise ApiError(
                f"{self.url} is not a Prefect API: it has no {request}. "
                "Set PREFECT_API_URL to a URL that ends with /api"
            )
        if status == 401 or (status == 403 and "detail" not in response.text):
            raise ApiError(
                f"Authentication failed ({status}) at the Prefect API at {self.url}. "
                "Set PREFECT_API_AUTH_STRING to USER:PASSWORD"
            )
        try:
            detail = response.json()
            if isinstance(detail, dict):
                detail = detail.get("exception_detail") or detail.get("detail") or detail
        except ValueError:
            detail = response.text[:300]
        if isinstance(detail, list):
            detail = "; ".join(f"{'.'.join(map(str, error.get('loc', [])))}: {error.get('msg')}" for error in detail)
        if status >= 500:
            raise ApiError(f"The Prefect API at {self.url} fails ({status}) on {request}: {detail}")
        raise RefusedError(f"the server answers {status}: {detail}", status)

    async def all(self, path: str, **body: Any) -> list[JSON]:
        """Return all items of a filter endpoint."""
        return [item async for page in self.pages(path, **body) for item in page]

    async def pages(self, path: str, **body: Any) -> AsyncIterator[list[JSON]]:
        """Yield all items of a filter endpoint page by page, for a caller that keeps few of many."""
        offset = 0
        while True:
            page = await self.ask("POST", path, {**body, "limit": PAGE_SIZE, "offset": offset}, idempotent=True)
            yield page
            offset += len(page)
            if len(page) < PAGE_SIZE:
                return


@asynccontextmanager
async def connected(
    wait: float = 0, report: Callable[[str], None] = logger.info, settings: ApiSettings | None = None
) -> AsyncIterator[Server]:
    """Connect to the server of Prefect's settings once the server answers.

    Args:
        wait: how many seconds to wait for the server; 0 to connect at the first request.
        report: called once with the reason if the server has to be waited for.
        settings: how to reach the server; None to read the settings of this process.

    Raises:
        ApiError: the server does not answer, or the settings name none.
    """
    settings = settings or api_settings.read()
    url = settings.url
    if not url:
        raise ApiError("No Prefect API is named. Set PREFECT_API_URL, like http://127.0.0.1:4200/api")
    verify: Any = settings.is_verified
    if verify and settings.authority_file:
        import ssl

        try:
            verify = ssl.create_default_context(cafile=settings.authority_file)
        except OSError as error:  # ssl.SSLError is one
            raise ApiError(
                f"PREFECT_API_SSL_CERT_FILE={settings.authority_file} cannot be used: {error.strerror or error}. "
                "Set it to a file with the certificate of the CA in PEM"
            ) from None
    async with httpx.AsyncClient(
        base_url=url,
        auth=Access(url, settings.user),
        headers=settings.headers,
        verify=verify,
        timeout=RESPONSE_TIMEOUT_SECONDS,
    ) as client:
        server = Server(client, url)
        await _wait_for(server, wait, report)
        yield server


async def check_certificate() -> None:
    """Check that this client accepts the certificate of the API. An API that does not answer passes the check.

    Raises:
        ApiError: the client refuses the certificate, or the file of the CA cannot be read.
    """
    settings = api_settings.read()
    if not settings.url.startswith("https:"):
        return
    async with connected(settings=settings) as server:
        try:
            await server.client.get("/health", timeout=CHECK_TIMEOUT_SECONDS)
        except httpx.TransportError as error:
            if certificate_refusal(error):
                raise ApiError(server.unreachable(error)) from None


async def _wait_for(server: Server, wait: float, report: Callable[[str], None]) -> None:
    deadline = time.monotonic() + wait
    is_reported = False
    while wait:
        try:
            response = await server.client.get("/health")
            if response.status_code < 500:
                return
            reason = str(response.status_code)
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            if time.monotonic() > deadline or certificate_refusal(error):
                raise ApiError(server.unreachable(error)) from None
        if time.monotonic() > deadline:
            raise ApiError(f"The Prefect API at {server.url} fails: {reason}. Look at the server's log")
        if not is_reported:
            report(f"Waiting for the Prefect API at {server.url}: {reason}")
            is_reported = True
        await asyncio.sleep(1)
