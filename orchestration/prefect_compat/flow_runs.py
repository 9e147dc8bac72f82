"""Private interfaces of Prefect for the engine: clients, the runner's workspaces, and Prefect's engine.

The engine imports this module before the supervisor lets the run begin, and needs all imports of this module.
"""

import functools
import logging
import os
import runpy
import ssl
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx
import orjson
import prefect
from prefect import context, flow_engine
from prefect._internal import version_checking
from prefect.client import base, orchestration
from prefect.client.schemas.objects import FlowRun, ServerDefaultResultStorage, State
from prefect.client.schemas.responses import DeploymentResponse
from prefect.flow_engine import AsyncFlowRunEngine, FlowRunEngine
from prefect.logging.handlers import APILogWorker
from prefect.runner._workspace_resolver import prepare_workspace as resolve_workspace
from prefect.runner._workspace_resolver import prepare_workspace_for_flow_run
from prefect.runner._workspace_starter import workspace_environment
from prefect.utilities.math import clamped_poisson_interval

from orchestration.prefect_compat import warn_if_untested
from orchestration.prefect_protocol import FLOW_ENTRYPOINT_VARIABLE

warn_if_untested("prefect", prefect.__version__)

_CLIENTS = (base.PrefectHttpxAsyncClient, base.PrefectHttpxSyncClient)


def retry_first_requests() -> None:
    """Let Prefect's clients retry a request without an answer from their first request on.

    Replaces: `_has_connected` of both clients in `prefect.client.base`
    Why: a run creates clients while it runs, and a short outage of the API would fail the run
    Until: a setting has clients retry before their first answer
    """
    for client in _CLIENTS:
        # Each client sets it to False at first.
        client._has_connected = property(lambda _: True, lambda *_: None)  # type: ignore[assignment]


def bound_retry_pauses(longest: Callable[[], float]) -> None:
    """Bound the pauses between a client's retries to `longest` seconds, to which Prefect adds jitter.

    Replaces: `prefect.client.base.clamped_poisson_interval`
    Why: the pauses double up to minutes in which the API may be back
    Until: a setting has the longest pause
    """

    def bounded(average_interval: float, clamping_factor: float = 0.3) -> float:
        return clamped_poisson_interval(min(average_interval, longest()), clamping_factor)

    base.clamped_poisson_interval = bounded  # type: ignore[attr-defined]


class _SharedContext(ssl.SSLContext):
    """Reads its certificate authorities for the first connection."""

    authorities = ""
    """The file of the authorities; empty once it is read."""

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        self._read_authorities()
        return super().wrap_socket(*args, **kwargs)

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        self._read_authorities()
        return super().wrap_bio(*args, **kwargs)

    def _read_authorities(self) -> None:
        if self.authorities:
            self.load_verify_locations(self.authorities)
            self.authorities = ""


class _SharedContexts:
    """Stands for the module `ssl`, and returns one context for each file of certificate authorities."""

    def __getattr__(self, name: str) -> Any:
        return getattr(ssl, name)

    @staticmethod
    @functools.cache
    def create_default_context(*, cafile: str = "") -> ssl.SSLContext:
        if not cafile:
            return ssl.create_default_context()  # Prefect lets it verify nothing
        # OpenSSL finds no authority in this path. Everything else is Python's default.
        context = ssl.create_default_context(capath=os.devnull)
        context.__class__ = _SharedContext
        context.authorities = cafile  # type: ignore[attr-defined]
        return context


def share_certificates() -> None:
    """Let Prefect's clients share an SSL context that reads the certificate authorities for an https URL only.

    Replaces: the name `ssl` in `prefect.client.orchestration` and `prefect._internal.version_checking`
    Why: each client reads all authorities, which takes 20 ms, and a run makes eight clients before its first line
    Until: Prefect's clients share a context
    """
    for module in (orchestration, version_checking):
        module.ssl = _SharedContexts()  # type: ignore[attr-defined]


ANSWER_SECONDS = 60.0
"""How long a run keeps the server's answer to a question that Prefect asks again and again."""


def keep_default_storage() -> None:
    """Ask the server for its default storage of results once in `ANSWER_SECONDS`.

    Replaces: `read_server_default_result_storage` of both clients in `prefect.client.orchestration`
    Why: Prefect asks twice before the first line of each flow, and for tasks outside of flows
    Until: Prefect keeps the answer
    """
    read = orchestration.SyncPrefectClient.read_server_default_result_storage
    read_async = orchestration.PrefectClient.read_server_default_result_storage
    kept: dict[str, tuple[float, ServerDefaultResultStorage]] = {}

    def known(url: str) -> ServerDefaultResultStorage | None:
        answer = kept.get(url)
        return answer[1] if answer and time.monotonic() - answer[0] < ANSWER_SECONDS else None

    def read_once(client: orchestration.SyncPrefectClient) -> ServerDefaultResultStorage:
        url = str(client.api_url)
        if not (answer := known(url)):
            answer = read(client)
            kept[url] = time.monotonic(), answer
        return answer

    async def read_once_async(client: orchestration.PrefectClient) -> ServerDefaultResultStorage:
        url = str(client.api_url)
        if not (answer := known(url)):
            answer = await read_async(client)
            kept[url] = time.monotonic(), answer
        return answer

    clients: tuple[Any, Any] = orchestration.SyncPrefectClient, orchestration.PrefectClient
    for client, method in zip(clients, (read_once, read_once_async), strict=True):
        client.read_server_default_result_storage = method


def check_version_once() -> None:
    """Ask the server for its version once, whether or not the API's URL ends with a slash.

    Replaces: `prefect._internal.version_checking._api_version_check_key`
    Why: Prefect asks for each URL once, and its clients for events and for everything else write the URL differently
    Until: Prefect asks once
    """

    def key(api_url: str, client_version: str) -> tuple[str, str]:
        return api_url.rstrip("/"), client_version

    for module in (orchestration, version_checking):
        module._api_version_check_key = key  # type: ignore[attr-defined]


def observe_responses(observe: Callable[[httpx.Request, httpx.Response], None]) -> None:
    """Call `observe` with each request of this process's clients and its response.

    Replaces: `send` of both clients in `prefect.client.base`
    Why: the Prefect API does not list the holders of a concurrency slot, so each run attempt records its leases
    Until: the Prefect API lists the holders of slots
    """
    for client in _CLIENTS:
        client.send = _observed(client.send, observe)  # type: ignore[method-assign]


def _observed(send: Callable[..., Any], observe: Callable[[httpx.Request, httpx.Response], None]) -> Callable[..., Any]:
    """Return a method that sends a request, synchronously or not, and has the response observed."""

    def sent(client: object, request: httpx.Request, *args: Any, **kwargs: Any) -> Any:
        answer = send(client, request, *args, **kwargs)
        if isinstance(answer, httpx.Response):
            observe(request, answer)
            return answer

        async def answered() -> httpx.Response:
            response: httpx.Response = await answer
            observe(request, response)
            return response

        return answered()

    return sent


def limit_log_lines(decide: Callable[[int, int], tuple[bool, str]]) -> None:
    """Send only some log lines of this process and its process pools to the Prefect API.

    Replaces: `prefect.logging.handlers.APILogWorker.send`
    Why: a run sends any number of lines, and the server stores them in the database of all runs
    Until: the server, or a setting, limits the log lines of a run

    Args:
        decide: takes the bytes and the level of a line, and returns whether to send it, and a notice to send before it;
            empty for none.
    """
    send = APILogWorker.send

    def send_some(worker: APILogWorker, item: dict[str, Any] | bytes) -> None:
        line = item if isinstance(item, dict) else orjson.loads(item)
        is_sent, notice = decide(len(line["message"].encode(errors="replace")) + LINE_BYTES, line["level"])
        if notice:
            send(worker, line | {"message": notice, "level": logging.WARNING})
        if is_sent:
            send(worker, item)

    APILogWorker.send = send_some  # type: ignore[assignment,method-assign]


LINE_BYTES = 250
"""Bytes of a log line in a request, without its message: ids, time, level and name of the logger."""


def hold_until_due(now: Callable[[], datetime]) -> None:
    """Let a flow run become Running at its scheduled time, and not before.

    Replaces: `begin_run` of both engines in `prefect.flow_engine`
    Why: the server rounds the time until then to whole seconds, so that runs begin up to half a second early or late
    Until: the server tells the time with its fraction

    Args:
        now: returns the server's time.
    """
    begin, begin_async = FlowRunEngine.begin_run, AsyncFlowRunEngine.begin_run

    def seconds_left(engine: FlowRunEngine[Any, Any] | AsyncFlowRunEngine[Any, Any]) -> float:
        due = engine.state.state_details.scheduled_time
        return max((due - now()).total_seconds(), 0.0) if due else 0.0

    def begin_on_time(engine: FlowRunEngine[Any, Any]) -> State[Any]:
        time.sleep(seconds_left(engine))
        return begin(engine)

    async def begin_async_on_time(engine: AsyncFlowRunEngine[Any, Any]) -> State[Any]:
        await anyio.sleep(seconds_left(engine))
        return await begin_async(engine)

    FlowRunEngine.begin_run = begin_on_time  # type: ignore[assignment,method-assign]
    AsyncFlowRunEngine.begin_run = begin_async_on_time  # type: ignore[assignment,method-assign]


def reload_settings() -> None:
    """Read Prefect's settings from the environment again.

    Replaces: `prefect.context.refresh_global_settings_context`
    Why: a warm pod imports Prefect before it gets the credential of its run
    Until: Prefect documents how a process changes its settings
    """
    context.refresh_global_settings_context()


class Workspace(NamedTuple):
    """Holds the folder of a run's code, and the environment in which to execute the run."""

    directory: Path
    environment: dict[str, str]


class KnownRun(NamedTuple):
    """Holds a flow run and its deployment as the Prefect API has returned them."""

    flow_run: FlowRun
    deployment: DeploymentResponse


def parse_known_run(flow_run: dict[str, Any], deployment: dict[str, Any]) -> KnownRun:
    """Return a flow run and its deployment from the JSON of the Prefect API."""
    return KnownRun(FlowRun.model_validate(flow_run), DeploymentResponse.model_validate(deployment))


async def prepare_workspace(run: str, folder: str, known: KnownRun | None) -> Workspace:
    """Fetch a run's code into a folder, by the pull steps of its deployment.

    Replaces: `prefect.runner._workspace_resolver`, `prefect.runner._workspace_starter`, `PREFECT__FLOW_ENTRYPOINT`
    Why: Prefect executes a run in three processes, each with Prefect's imports
    Until: `prefect flow-run execute` uses one process

    Args:
        run: the run's id.
        folder: an empty folder.
        known: the run and its deployment; None to ask the Prefect API.
    """
    if known:
        async with orchestration.get_client() as client:
            prepared = await resolve_workspace(client, *known, folder)
    else:
        prepared = await prepare_workspace_for_flow_run(run, folder)
    environment = workspace_environment(prepared) | {FLOW_ENTRYPOINT_VARIABLE: prepared.runtime_entrypoint}
    return Workspace(prepared.working_directory, environment)


def use_known_run(known: KnownRun) -> None:
    """Let the engine execute a run as it is known, without asking the Prefect API for it.

    Replaces: `prefect.flow_engine.load_flow_run`
    Why: the supervisor has read the run while the engine imported its modules
    Until: `prefect flow-run execute` uses one process
    """
    # If the run has another state by now, the server refuses the state Running.
    flow_engine.load_flow_run = lambda flow_run_id: known.flow_run  # noqa: ARG005


def run_engine() -> None:
    """Execute the run that the environment names, in this process.

    Replaces: `python -m prefect.engine`, by which Prefect's runner starts a process
    Why: Prefect executes a run in three processes, each with Prefect's imports
    Until: `prefect flow-run execute` uses one process
    """
    # Prefect has imported the module. Prefect's own command executes it again, too.
    warnings.filterwarnings("ignore", "'prefect.engine' found in sys.modules", RuntimeWarning)
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)
