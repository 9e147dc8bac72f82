"""Post to a Prefect server what worker and pod of a flow run post, without an interpreter for each run.

The requests are those of a run with two tasks in this project's image, in the order of the server's access log. Clients
retry as those in the pod of a run do. A client keeps its connections to one API replica until they fail, as the
connections to a Service of Kubernetes do.
"""

import asyncio
import base64
import contextlib
import json
import random
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import httpx
from prefect.client.base import PrefectHttpxAsyncClient
from prefect.client.constants import SERVER_API_VERSION
from websockets import Subprotocol
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from orchestration.prefect_compat.events import flow_run_resources, task_run_state_event

TASKS = 2
"""Task runs of a run."""

LOG_BATCHES = 2
LINES_OF_A_BATCH = 10

HEARTBEAT = "prefect.flow-run.heartbeat"

REQUEST_TIMEOUT_SECONDS = 60
"""Prefect's default."""

RECONNECTIONS = 10
"""How often Prefect's client connects again to send an event."""

_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Shared by all clients: each would read the certificate authorities."""


class RunError(Exception):
    """A run could not post what it has to post."""


class Service:
    """The API replicas that answer, as a Service of Kubernetes has them.

    Args:
        ready: the URLs of their APIs.
    """

    def __init__(self, ready: Sequence[str] = ()) -> None:
        self.ready = list(ready)

    def choose(self) -> str:
        """Return the URL of a replica for a new connection.

        Raises:
            ConnectionRefusedError: no replica is ready.
        """
        if not self.ready:
            raise ConnectionRefusedError("no API replica is ready")
        return random.choice(self.ready)  # noqa: S311


@dataclass
class Recorder:
    """Collects what the clients see.

    Args:
        requests: when each request ended, on the clock of `time.monotonic`, and its seconds with all retries.
        attempts: how many attempts had no answer, by the name of the error, or an answer that is an error, by its
            status. Expected answers do not count.
        completed: how many runs have ended.
        failed: why runs could not post.
    """

    requests: list[tuple[float, float]] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    completed: int = 0
    failed: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """The seconds of each request."""
        return [seconds for _, seconds in self.requests]


class _ReplicaTransport(httpx.AsyncBaseTransport):
    """Sends requests to one API replica, and to another one after a failure of the connection."""

    def __init__(self, service: Service, recorder: Recorder) -> None:
        self._service, self._recorder = service, recorder
        self._transport = httpx.AsyncHTTPTransport(
            verify=_NO_TLS, limits=httpx.Limits(max_connections=16, max_keepalive_connections=8, keepalive_expiry=25)
        )
        self._url = ""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        try:
            self._url = self._url or self._service.choose()
            url = self._url + request.url.raw_path.decode()
            response = await self._transport.handle_async_request(
                httpx.Request(request.method, url, headers=request.headers, stream=request.stream)
            )
        except (httpx.TransportError, ConnectionRefusedError) as error:
            self._recorder.attempts[type(error).__name__] += 1
            self._url = ""
            if isinstance(error, ConnectionRefusedError):
                raise httpx.ConnectError(str(error)) from error
            raise
        if response.is_error and not _is_expected(request, response):
            self._recorder.attempts[str(response.status_code)] += 1
        return response

    async def aclose(self) -> None:
        await self._transport.aclose()


def _is_expected(request: httpx.Request, response: httpx.Response) -> bool:
    # Without CSRF protection the server has no tokens, for which each client asks once.
    return response.status_code == httpx.codes.UNPROCESSABLE_ENTITY and request.url.path.endswith("/csrf-token")


class Api:
    """A client of the Prefect API, with the retries of Prefect's client.

    Args:
        service: the API.
        credential: `USER:PASSWORD`.
        recorder: collects the requests.
    """

    def __init__(self, service: Service, credential: str, recorder: Recorder) -> None:
        self.service = service
        self._recorder = recorder
        self.token = credential
        self.authorization = "Basic " + base64.b64encode(credential.encode()).decode()
        self._client = PrefectHttpxAsyncClient(
            base_url="http://api",
            headers={"Authorization": self.authorization, "X-PREFECT-API-VERSION": SERVER_API_VERSION},
            transport=_ReplicaTransport(service, recorder),
            timeout=REQUEST_TIMEOUT_SECONDS,
            enable_csrf_support=True,
        )

    async def __aenter__(self) -> "Api":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request, and return the JSON of the answer.

        Raises:
            RunError: all attempts failed.
        """
        start = time.monotonic()
        try:
            answer = await self._client.request(method, path, json=body)
        except httpx.HTTPStatusError as error:
            raise RunError(f"{method} {path}: {error.response.status_code} {error.response.text[:200]}") from error
        except httpx.HTTPError as error:
            raise RunError(f"{method} {path}: {type(error).__name__}: {error}") from error
        end = time.monotonic()
        self._recorder.requests.append((end, end - start))
        return answer.json() if answer.content else None

    async def set_state(self, run: str, type_: str) -> bool:
        """Propose a state of a flow run, and return whether the run is in the proposed state.

        By the id of a transition the server recognises the retry of a request whose answer was lost.
        """
        transition = str(uuid4())
        state = {"type": type_, "state_details": {"flow_run_id": run, "transition_id": transition}}
        answer = await self.ask("POST", f"/flow_runs/{run}/set_state", {"state": state})
        if answer["status"] == "ACCEPT":
            return True
        details = (answer["state"] or {}).get("state_details") or {}
        return bool(details.get("transition_id") == transition)


class _Events:
    """Emits events by a websocket as Prefect's client does.

    After a failure it sends the unconfirmed events again. When it gives up, events are lost and the run goes on.
    """

    def __init__(self, api: Api, recorder: Recorder) -> None:
        self._api, self._recorder = api, recorder
        self._websocket: ClientConnection | None = None
        self._unconfirmed: list[str] = []

    async def emit(self, event: dict[str, Any]) -> None:
        self._unconfirmed.append(json.dumps(event))
        await self._send(self._unconfirmed[-1:])

    async def confirm(self) -> None:
        """Wait until the server has received all events."""
        await self._send([])

    async def close(self) -> None:
        await self.confirm()
        if self._websocket:
            await self._websocket.close()

    async def _send(self, texts: list[str]) -> None:
        for attempt in range(RECONNECTIONS + 1):
            try:
                if not self._websocket:
                    self._websocket = await _connect(self._api, "/events/in")
                    texts = self._unconfirmed
                for text in texts:
                    await self._websocket.send(text)
                if not texts:
                    await (await self._websocket.ping())
                    self._unconfirmed.clear()
            except (WebSocketException, OSError, TimeoutError):
                self._websocket = None
                if attempt > 1:
                    await asyncio.sleep(1)
            else:
                return
        self._recorder.attempts["events given up"] += 1


async def _connect(api: Api, path: str) -> ClientConnection:
    url = api.service.choose().replace("http", "ws", 1) + path
    headers = {"Authorization": api.authorization}
    websocket = await connect(url, subprotocols=[Subprotocol("prefect")], additional_headers=headers, proxy=None)
    await websocket.send(json.dumps({"type": "auth", "token": api.token}))
    answer = json.loads(await websocket.recv())
    if answer["type"] != "auth_success":
        raise RunError(f"{path}: {answer}")
    return websocket


@contextlib.asynccontextmanager
async def _cancellations_observed(api: Api) -> AsyncIterator[None]:
    """Observe events while the block lasts, as each run does to learn that it is being cancelled."""

    async def observe() -> None:
        while True:
            with contextlib.suppress(WebSocketException, OSError, TimeoutError):
                websocket = await _connect(api, "/events/out")
                names = {"event": {"name": ["prefect.flow-run.Cancelling"]}}
                await websocket.send(json.dumps({"type": "filter", "backfill": True, "filter": names}))
                async with websocket:
                    async for _ in websocket:
                        pass
            await asyncio.sleep(1)

    observing = asyncio.create_task(observe())
    try:
        yield
    finally:
        observing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await observing


@dataclass(frozen=True)
class Credentials:
    """The credentials `USER:PASSWORD` of the clients.

    Args:
        operator: of the client that creates runs.
        worker: of the client that claims them.
        of_run: returns the credential of a flow run.
    """

    operator: str
    worker: str
    of_run: Callable[[str], str]


@dataclass(frozen=True)
class Deployment:
    """A deployment of the benchmark: its id, and the priority of its work queue, of which 1 is the highest."""

    id: str
    priority: int


class Runs:
    """Creates, claims and executes simulated flow runs.

    Args:
        service: the API.
        credentials: those of the clients.
        recorder: collects what the clients see.
    """

    def __init__(self, service: Service, credentials: Credentials, recorder: Recorder) -> None:
        self.service, self.credentials, self.recorder = service, credentials, recorder

    def operator(self) -> Api:
        """Return a client that may do everything."""
        return Api(self.service, self.credentials.operator, self.recorder)

    def worker(self) -> Api:
        """Return a worker's client."""
        return Api(self.service, self.credentials.worker, self.recorder)

    async def create(self, operator: Api, deployment: Deployment, due: datetime | None = None) -> str:
        """Create a scheduled run, and return its id."""
        details = {"scheduled_time": due.isoformat()} if due else {}
        state = {"type": "SCHEDULED", "state_details": details}
        body = {"state": state, "idempotency_key": str(uuid4())}
        return str((await operator.ask("POST", f"/deployments/{deployment.id}/create_flow_run", body))["id"])

    async def claim(self, worker: Api, run: str) -> bool:
        """Claim a run as a worker does, and return whether the server has granted the claim."""
        return await worker.set_state(run, "PENDING")

    async def post_whole_run(self, deployment: Deployment) -> bool:
        """Create, claim and execute a run; record a failure, and return whether there was none."""
        try:
            async with self.operator() as operator:
                run = await self.create(operator, deployment)
            async with self.worker() as worker:
                if not await self.claim(worker, run):
                    raise RunError(f"The claim of run {run} was refused")
                await self.execute(worker, run)
        except RunError as error:
            self.recorder.failed.append(str(error))
            return False
        return True

    async def execute(self, worker: Api, run: str) -> None:
        """Post what worker and pod of a claimed run post until the run is Completed.

        Raises:
            RunError: a request failed, or the server refused a state.
        """
        await worker.ask("PATCH", f"/flow_runs/{run}", {"infrastructure_pid": f"bench:{run}"})
        async with Api(self.service, self.credentials.of_run(run), self.recorder) as api:
            # The supervisor.
            read = await api.ask("GET", f"/flow_runs/{run}")
            await api.ask("GET", f"/flow_run_states/?flow_run_id={run}")
            await api.ask("GET", f"/deployments/{read['deployment_id']}")
            # The engine.
            await api.ask("GET", "/admin/version")
            await api.ask("PATCH", f"/flow_runs/{run}", {"flow_version": "1"})
            events = _Events(api, self.recorder)
            async with _cancellations_observed(api):
                await api.ask("GET", f"/flow_runs/{run}")
                await self._enter(api, run, "RUNNING")
                await api.ask("GET", f"/flow_runs/{run}")
                await api.ask("GET", "/admin/storage")
                flow = await api.ask("GET", f"/flows/{read['flow_id']}")
                await api.ask("GET", f"/deployments/{read['deployment_id']}")
                for event in _events_of(read, flow):
                    await events.emit(event)
                for _ in range(LOG_BATCHES):
                    await api.ask("POST", "/logs/", _log_batch(run))
                await events.close()
                await self._enter(api, run, "COMPLETED")
            # The supervisor looks whether it has to report a crash.
            for _ in range(2):
                await api.ask("GET", f"/flow_runs/{run}")
        self.recorder.completed += 1

    @contextlib.asynccontextmanager
    async def live(self, run: str) -> AsyncIterator["LiveRun"]:
        """Have a claimed run begin, yield the Running run, and complete it at the end of the block.

        Raises:
            RunError: a request failed, or the server refused a state.
        """
        async with Api(self.service, self.credentials.of_run(run), self.recorder) as api:
            read = await api.ask("GET", f"/flow_runs/{run}")
            flow = await api.ask("GET", f"/flows/{read['flow_id']}")
            events = _Events(api, self.recorder)
            async with _cancellations_observed(api):
                await self._enter(api, run, "RUNNING")
                yield LiveRun(api, read, flow, events)
                await events.close()
                await self._enter(api, run, "COMPLETED")
        self.recorder.completed += 1

    async def _enter(self, api: Api, run: str, type_: str) -> None:
        if not await api.set_state(run, type_):
            raise RunError(f"The server refused {type_} of run {run}")


REQUESTS_OF_A_RUN = 17 + LOG_BATCHES
"""Requests of `post_whole_run` that succeed, without the question for a CSRF token of each of the three clients."""


class LiveRun:
    """A Running run that reports from time to time.

    Attributes:
        reports: how many reports the run has posted.
    """

    def __init__(self, api: Api, run: dict[str, Any], flow: dict[str, Any], events: _Events) -> None:
        self.reports = 0
        self._api, self._run, self._events = api, run, events
        self._related = flow_run_resources(_Fields(run), _Fields(flow))

    async def report(self) -> None:
        """Post a heartbeat, the states of one task run and a batch of log lines.

        Raises:
            RunError: the request failed.
        """
        for event in [_heartbeat(self._run, self._related), *_task_run_events(self._related, self.reports)]:
            await self._events.emit(event)
        await self._events.confirm()
        await self._api.ask("POST", "/logs/", _log_batch(self._run["id"]))
        self.reports += 1


def _log_batch(run: str) -> list[dict[str, Any]]:
    line = {
        "name": "prefect.flow_runs",
        "level": 20,
        "message": "Loaded the rows of a day into the table of flights, in 12 s",
        "timestamp": datetime.now(UTC).isoformat(),
        "flow_run_id": run,
    }
    return [line] * LINES_OF_A_BATCH


def _events_of(run: dict[str, Any], flow: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a heartbeat of a run, and the events of its task runs."""
    related = flow_run_resources(_Fields(run), _Fields(flow))
    events = [_heartbeat(run, related)]
    for number in range(TASKS):
        events += _task_run_events(related, number)
    return events


def _heartbeat(run: dict[str, Any], related: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": HEARTBEAT,
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run['id']}", "prefect.resource.name": run["name"]},
        "related": related[1:],
        "payload": {},
    }


def _task_run_events(related: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """Return the events of the states of a task run."""
    about = {"name": f"load-{number}", "task_key": "load", "dynamic_key": str(number), "run_count": 1}
    task_run = uuid4()
    return [
        task_run_state_event(
            task_run, {"type": type_, "name": type_.title(), "message": ""}, datetime.now(UTC), about, related
        )
        for type_ in ("PENDING", "RUNNING", "COMPLETED")
    ]


class _Fields:
    """The fields of a JSON object as attributes."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self.__dict__.update(fields)
