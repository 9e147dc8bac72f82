"""Access control of the Prefect API, as ASGI middleware in the server's process.

`AccessControl` wraps the API's ASGI application, so every request passes the check. Prefect's own authentication stays
on. A reverse proxy cannot replace this check: Prefect's websockets send their credential in the first message, and
whether a run may write an object depends on the object.
"""

import base64
import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from uuid import UUID

import httpx

from orchestration.access.asgi import Application, Message, Receive, Scope, Send
from orchestration.access.credentials import RUN_USER_PREFIX, Credentials, Identity, basic_credential
from orchestration.access.ownership import DeniedError, Ownership, UnavailableError
from orchestration.access.people import People, is_cross_origin
from orchestration.access.routes import PERMISSIONS, WEBSOCKET, WRITES, Role, Route, RouteTable
from orchestration.protocol import EXPECTED_STATE_HEADER

EVENTS_PATH = "/events/in"

OWNED = frozenset({"create-runs", "report-runs", "emit-events"})
"""Classes in which a flow run may write only its own objects."""

AUTOMATION_HEADERS = frozenset({b"prefect-automation-id", b"prefect-automation-name"})
"""Headers by which the server names the automation that calls it."""

MAX_CHECKED_BODY_BYTES = 32 * 1024 * 1024

expected_state: ContextVar[str] = ContextVar("expected_state", default="")
"""The id of the state that the current request expects, from its header; empty if it expects none."""

audit_log = logging.getLogger("orchestration.access.audit")
logger = logging.getLogger(__name__)


class AccessControl:
    """Denies what the caller's role does not permit, and writes the audit log.

    Args:
        application: Prefect's API, without the base path.
        credentials: the credentials of all callers.
        server: the server's own credential `USER:PASSWORD`, which Prefect's authentication checks.
        people: identifies people who have logged in by OIDC; None if people cannot.
    """

    def __init__(
        self, application: Application, credentials: Credentials, server: str, people: People | None = None
    ) -> None:
        self._application = application
        self._credentials = credentials
        self._people = people or People(credentials, {})
        self._server = server
        self._authorization = b"Basic " + base64.b64encode(server.encode())
        self._table = RouteTable()
        self._problem = ""
        api = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=application, raise_app_exceptions=False),
            base_url="http://api",
            headers={"Authorization": self._authorization.decode()},
        )
        self._ownership = Ownership(api)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a permitted request to the API, and deny all others."""
        if scope["type"] == "http":
            await self._handle_request(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._handle_websocket(scope, receive, send)
        else:
            await self._application(scope, receive, send)

    def _identify(self, credential: str | None) -> Identity | None:
        identity = self._credentials.identify(credential) if credential else None
        if self._credentials.problem != self._problem:
            self._problem = self._credentials.problem
            if self._problem:
                logger.error("The changed credentials are not used: %s.", self._problem)
        return identity

    def _authorize(self, identity: Identity, method: str, path: str) -> list[tuple[Route, dict[str, str]]]:
        """Return the routes of a permitted request.

        Raises:
            DeniedError: the role has no permission for the route, or the caller has no role.
        """
        if identity.role is None:
            raise DeniedError(f"{identity.user} is in no group with access to Prefect. Ask an operator for access")
        found = self._table.find(method, path)
        permitted = PERMISSIONS[identity.role]
        if not found or not all(route.access in permitted for route, _ in found):
            raise DeniedError(f"The role {identity.role} has no permission for {method} {path}")
        return found

    async def _handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], _path(scope)
        if any(route.access == "open" for route, _ in self._table.find(method, path)):
            await self._application(scope, receive, send)
            return
        identity = self._people.identify(scope) or self._identify(basic_credential(scope["headers"]))
        if identity is None:
            self._audit(scope, method, path, None, 401)
            # Prefect answers with the same text.
            await _answer(send, 401, {"exception_message": "Unauthorized"})
            return
        try:
            _refuse_cross_origin(scope, identity)
            routes = self._authorize(identity, method, path)
            if identity.run_id and any(route.access in OWNED for route, _ in routes):
                body = await _read_body(receive)
                for route, parameters in routes:
                    await self._ownership.check_request(identity.run_id, route, parameters, body)
                receive = _replay(body, receive)
        except UnavailableError as error:
            self._audit(scope, method, path, identity, 503)
            await _answer(send, 503, {"exception_message": str(error)})
            return
        except DeniedError as error:
            self._audit(scope, method, path, identity, 403)
            await _answer(send, 403, {"exception_message": str(error), "detail": str(error)})
            return
        expected_state.set(_header(scope, EXPECTED_STATE_HEADER))
        if not any(route.access in WRITES for route, _ in routes):
            await self._application(self._as_server(scope, identity), receive, send)
            return
        status = 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._application(self._as_server(scope, identity), receive, note_status)
        finally:
            self._audit(scope, method, path, identity, status)

    def _as_server(self, scope: Scope, identity: Identity) -> Scope:
        """Return the request with the server's credential, and without headers that only the server may send."""
        dropped = {b"authorization"}
        if identity.role is not Role.OPERATOR:
            dropped |= AUTOMATION_HEADERS
        headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
        return {**scope, "headers": [*headers, (b"authorization", self._authorization)]}

    async def _handle_websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replace the credential in the first message by the server's credential, if the caller has permission.

        Without permission the message has no credential, and Prefect closes the websocket. The handshake identifies a
        person: the first message of a browser has no credential.
        """
        path = _path(scope)
        person = self._people.identify(scope)
        is_authenticated = False
        run_id: UUID | None = None

        async def receive_checked() -> Message:
            nonlocal is_authenticated, run_id
            message = await receive()
            if message["type"] != "websocket.receive":
                return message
            if is_authenticated:
                while run_id and message["type"] == "websocket.receive":
                    if await self._may_emit(scope, path, run_id, message):
                        break
                    message = await receive()
                return message
            is_authenticated = True
            identity = person or self._identify(_websocket_credential(message))
            run_id = identity.run_id if identity else None
            token = ""
            status = 401
            if identity:
                try:
                    _refuse_cross_origin(scope, identity)
                    self._authorize(identity, WEBSOCKET, path)
                    token, status = self._server, 101
                except DeniedError:
                    status = 403
            if status != 101 or any(route.access in WRITES for route, _ in self._table.find(WEBSOCKET, path)):
                self._audit(scope, WEBSOCKET, path, identity, status)
            return {"type": "websocket.receive", "text": json.dumps({"type": "auth", "token": token})}

        await self._application(scope, receive_checked, send)

    async def _may_emit(self, scope: Scope, path: str, run_id: UUID, message: Message) -> bool:
        """Return whether a flow run may send this message. A message that it may not send is dropped."""
        if path != EVENTS_PATH:
            return True
        try:
            event = json.loads(message.get("text") or "")
            if not isinstance(event, dict):
                raise DeniedError("The message is not an event")
            await self._ownership.check_event(run_id, event)
        except (DeniedError, UnavailableError, ValueError, RecursionError) as error:
            logger.warning("An event of flow run %s is dropped: %s.", run_id, error)
            self._audit(scope, WEBSOCKET, path, Identity(f"{RUN_USER_PREFIX}{run_id}", Role.RUN, run_id), 403)
            return False
        return True

    def _audit(self, scope: Scope, method: str, path: str, identity: Identity | None, status: int) -> None:
        """Write one JSON line: user, call, time, address and status."""
        client = scope.get("client") or ("", 0)
        line = {
            "audit": "prefect-api",
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "user": identity.user if identity else None,
            "role": identity.role.value if identity and identity.role else None,
            "method": method,
            "path": path,
            "client": client[0],
            "forwarded_for": _header(scope, "X-Forwarded-For") or None,
            "status": status,
        }
        audit_log.info("%s", json.dumps(line))


def _path(scope: Scope) -> str:
    """Return the path below the API's base path, as Prefect's router sees it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) or "/"


def _header(scope: Scope, name: str) -> str:
    """Return the first value of a header; empty without one."""
    key = name.lower().encode()
    return next((value for found, value in scope["headers"] if found == key), b"").decode("latin-1")


def _refuse_cross_origin(scope: Scope, identity: Identity) -> None:
    """Raise DeniedError if a page of another origin calls the API in the browser of a person."""
    if identity.is_person and is_cross_origin(scope):
        raise DeniedError("A page of another origin may not call this API. Open the UI at its own address")


def _websocket_credential(message: Message) -> str | None:
    try:
        content = json.loads(message.get("text") or message.get("bytes") or "")
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("type") != "auth":
        return None
    token = content.get("token")
    return token if isinstance(token, str) else None


async def _read_body(receive: Receive) -> bytes:
    """Read a request's whole body.

    Raises:
        DeniedError: the body is too large for a check, or the caller has closed the connection.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise DeniedError("The caller closed the connection")
        body += message.get("body", b"")
        if len(body) > MAX_CHECKED_BODY_BYTES:
            raise DeniedError(f"The request has more than {MAX_CHECKED_BODY_BYTES} bytes")
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    is_sent = False

    async def replay() -> Message:
        nonlocal is_sent
        if is_sent:
            return await receive()
        is_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, status: int, content: dict[str, str]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
