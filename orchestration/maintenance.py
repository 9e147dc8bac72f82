"""Have clients wait while migrations run: answer 503 with `Prefect-Maintenance` where the Prefect API fails meanwhile.

A migration may lock a table for longer than the server's statements wait. The server then answers 500, which fails a
run. Prefect's client repeats a request that is answered by this 503 until the header is absent. The migrations may have
ended before the failure is known: a request also has to wait if the schema has changed since its begin.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from orchestration.access.asgi import Application, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

BODY = {"exception_message": "The database's schema is being upgraded."}
HEADERS = {"Prefect-Maintenance": "true", "Retry-After": "5"}

CACHE_SECONDS = 1.0
"""For how long it is known whether migrations run. Many requests may fail at once."""

LOOK_SECONDS = 5.0
"""How long the look into the database may take."""

KEPT_SECONDS = 30.0
"""For how long the last look counts while no other succeeds.

Statements that wait for a migration may hold all connections of the pool.
"""


class MaintenanceAnswers:
    """Passes answers of the API on, except failures while migrations run.

    Args:
        application: the API, with its access control, which reads the API, too.
        look: looks into the database: whether migrations run, and the revision of the schema.
    """

    def __init__(self, application: Application, look: Callable[[], Awaitable[tuple[bool, str | None]]]) -> None:
        self._application = application
        self._look = look
        self._has_looked = False
        self._revision: str | None = None
        self._known = False
        self._upgraded_at = 0.0
        self._known_since = self._known_until = 0.0
        self._lock = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and replace the answer where clients have to wait."""
        is_replaced = False
        began = time.monotonic()
        if not self._has_looked and scope["type"] == "http":
            await self._is_maintenance(began)  # the revision to compare with

        async def answer(message: Message) -> None:
            nonlocal is_replaced
            if message["type"] == "http.response.start" and message["status"] in (500, 503):
                is_replaced = await self._is_maintenance(began)
                if is_replaced:
                    from starlette.responses import JSONResponse  # which the API has imported

                    await JSONResponse(BODY, 503, HEADERS)(scope, receive, send)
            if not is_replaced:
                await send(message)

        try:
            await self._application(scope, receive, answer)
        except Exception:
            # Starlette raises an error again after it has answered 500. The server has logged it.
            if not is_replaced:
                raise

    async def _is_maintenance(self, began: float) -> bool:
        """Return whether migrations run, or have run since a request began."""
        async with self._lock:
            if time.monotonic() > self._known_until:
                try:
                    async with asyncio.timeout(LOOK_SECONDS):
                        self._known, revision = await self._look()
                    self._known_since = time.monotonic()
                    if self._known or (self._has_looked and revision != self._revision):
                        self._upgraded_at = self._known_since
                    self._has_looked, self._revision = True, revision
                except Exception as error:
                    self._known &= time.monotonic() < self._known_since + KEPT_SECONDS
                    logger.warning("Whether migrations run is unknown: %s.", str(error) or type(error).__name__)
                self._known_until = time.monotonic() + CACHE_SECONDS
            return self._known or began < self._upgraded_at
