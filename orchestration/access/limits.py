"""Refuse requests that the Prefect API would store and could never read again.

The server stores JSON of any depth, and cannot serialize more than 255 levels.
One run with such parameters would make each list of runs fail, for the UI, workers and reconciler.
"""

import contextlib
import json
import re

from orchestration.access.control import Application, Message, Receive, Scope, Send

MAX_DEPTH = 100
"""How many levels of lists and objects a request may have."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


class DepthError(Exception):
    """A request with more than `MAX_DEPTH` levels."""


class RequestLimits:
    """Passes requests to the API except those whose JSON is too deep.

    The body is looked at when the API reads it, and so after the API has checked the password.

    Args:
        application: the API.
    """

    def __init__(self, application: Application) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer it instead of the API if it is too deep."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        parts: list[bytes] = []
        is_refused = False

        async def checked() -> Message:
            nonlocal is_refused
            message = await receive()
            if message["type"] == "http.request":
                parts.append(message.get("body", b""))
                if not message.get("more_body") and depth(b"".join(parts)) > MAX_DEPTH:
                    is_refused = True
                    raise DepthError
            return message

        async def answer(message: Message) -> None:
            # Starlette answers an unreadable body by itself. Its answer does not name the limit.
            if not is_refused:
                await send(message)

        with contextlib.suppress(DepthError):
            await self._application(scope, checked, answer)
        if is_refused:
            await _refuse(send)


def depth(body: bytes) -> int:
    """Return how many levels of lists and objects a JSON text has."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return 0  # not deeper than the limit, and most requests
    level = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", body)):
        level += 1 if bracket in b"[{" else -1
        deepest = max(deepest, level)
    return deepest


async def _refuse(send: Send) -> None:
    text = f"The request has more than {MAX_DEPTH} levels of lists and objects. Send flatter JSON, or JSON as a text."
    body = json.dumps({"exception_message": "Invalid request received.", "exception_detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 422, "headers": headers})
    await send({"type": "http.response.body", "body": body})
