"""The Docker proxy: a worker starts flow runs through this proxy, and cannot use the Docker socket for anything else.

python -m orchestration.worker.docker_proxy --template FILE --images "IMAGE ..." [--pool default]
[--reserved-names "NAME ..."] [--listen SOCKET] [--daemon SOCKET]

`orchestration.worker.docker_policy` has the rules. The proxy answers a refused request with 403 and a message, as
Docker's API does, and logs the refusal. The worker never upgrades a connection (attach, exec), so the proxy refuses
upgrades.

Existing proxies allow too much. Tecnativa's filters by method and path, and wollomatic's also by the sources of bind
mounts. CodesWhat's sockguard 1.7 forwards keys of a container that it does not know.
"""

import argparse
import asyncio
import json
import logging
import signal
import sys
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path

import aiohttp
from aiohttp import web
from yarl import URL

from orchestration import logs
from orchestration.worker import job_template
from orchestration.worker.docker_policy import LONGEST_BODY_BYTES, PROXY_LABEL, Call, Policy, RefusedRequestError

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
STOP_SECONDS = 2.0


class Proxy:
    """Serves the allowed part of the Docker API on a Unix socket.

    Args:
        policy: decides which requests the daemon receives.
        daemon: the daemon's socket.
    """

    def __init__(self, policy: Policy, daemon: Path) -> None:
        self._policy = policy
        self._daemon = daemon

    async def serve(self, socket: Path, stop: asyncio.Event) -> None:
        """Serve on `socket`, for this user alone, until `stop` is set."""
        # When a client closes a stream, `handler_cancellation` closes the connection to the daemon, too.
        server = web.Server(self._answer, handler_cancellation=True, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=STOP_SECONDS)
        await runner.setup()
        try:
            await web.UnixSite(runner, socket).start()
            socket.chmod(0o600)
            logger.info("Listening on %s for the worker. The Docker daemon is at %s.", socket, self._daemon)
            await stop.wait()
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        method, target = request.method, request.raw_path
        try:
            if "Upgrade" in request.headers or "Content-Encoding" in request.headers:
                raise RefusedRequestError("upgraded connections and encoded bodies are not allowed")
            call = self._policy.call(method, target, b"" if method == "GET" else await _read(request))
            async with self._session() as session:
                return await _find_owned(session, call) or await _forward(session, call, request)
        except RefusedRequestError as refused:
            logger.warning("Refused %s %s: %s.", method, target[:200], refused)
            return _error(HTTPStatus.FORBIDDEN, f"the Docker proxy refused this: {refused}")

    def _session(self) -> aiohttp.ClientSession:
        """Return a new session. A connection from before a restart of the daemon would be dead."""
        return aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self._daemon), force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_SECONDS),
            headers={"Accept-Encoding": "identity"},
            auto_decompress=False,
        )


async def _find_owned(session: aiohttp.ClientSession, call: Call) -> web.Response | None:
    """Check that the container of a call was created through the proxy.

    Returns:
        The daemon's answer if the container does not exist; else None.

    Raises:
        RefusedRequestError: the container was not created through the proxy.
    """
    if not call.container:
        return None
    version = call.target.partition("/containers/")[0]
    try:
        async with session.get(_url(f"{version}/containers/{call.container}/json")) as found:
            text = await found.read()
            if found.status != HTTPStatus.OK:
                return web.Response(status=found.status, body=text, content_type="application/json")
    except aiohttp.ClientError as error:
        return _unavailable(error)
    shown = json.loads(text)
    labels = (shown.get("Config") or {}).get("Labels") or {}
    if shown.get("Id") != call.container or labels.get(PROXY_LABEL) != "true":
        raise RefusedRequestError(f"the container {call.container[:12]} was not created by the worker")
    return None


async def _read(request: web.BaseRequest) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise RefusedRequestError(f"the body is longer than {LONGEST_BODY_BYTES} bytes") from None


async def _forward(session: aiohttp.ClientSession, call: Call, request: web.BaseRequest) -> web.StreamResponse:
    """Send a call to the daemon, and stream the answer to the worker."""
    headers = {"Content-Type": "application/json"} if call.body else {}
    try:
        answer = await session.request(
            call.method, _url(call.target), data=call.body, headers=headers, allow_redirects=False
        )
    except aiohttp.ClientError as error:
        return _unavailable(error)
    async with answer:
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        if kind := answer.headers.get("Content-Type"):
            response.headers["Content-Type"] = kind
        if answer.content_length is not None:
            response.content_length = answer.content_length
        await response.prepare(request)
        # If the daemon closes early, this connection closes without the last chunk, so the worker sees the failure.
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


def _url(target: str) -> URL:
    return URL(f"http://docker{target}", encoded=True)


def _unavailable(error: Exception) -> web.Response:
    logger.error("The Docker daemon does not answer: %s.", error)
    return _error(HTTPStatus.BAD_GATEWAY, f"the Docker daemon does not answer the proxy: {error}")


def _error(status: HTTPStatus, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)


async def serve(proxy: Proxy, socket: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await proxy.serve(socket, stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestration.worker.docker_proxy",
        description="Serve the part of the Docker API that a worker needs.",
    )
    parser.add_argument("--template", type=Path, required=True, help="the file with the pool's base job template")
    parser.add_argument("--pool", default="default", help="the pool in that file")
    parser.add_argument(
        "--images", required=True, help="allowed images of flow runs, separated by spaces; * for any characters"
    )
    parser.add_argument(
        "--reserved-names", default="", help="names of services, which no flow run's container may have"
    )
    parser.add_argument("--listen", type=Path, default=Path("/run/docker-proxy/docker.sock"), help="the proxy's socket")
    parser.add_argument("--daemon", type=Path, default=Path("/var/run/docker.sock"), help="the daemon's socket")
    options = parser.parse_args(arguments)

    def run() -> None:
        template = job_template.read(options.template, options.pool)
        policy = Policy.from_template(template, options.images.split(), options.reserved_names.split())
        asyncio.run(serve(Proxy(policy, options.daemon), options.listen))

    return logs.run_component(logger.name, run)


if __name__ == "__main__":
    sys.exit(main())
