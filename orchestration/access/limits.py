"""Refuse requests that the Prefect API would store, and fail at later.

The server stores JSON of any depth, and cannot serialize more than 255 levels.
One run with such parameters would make each list of runs fail, for the UI, workers and reconciler.
The server stores any number of tags. The runs of such a deployment could not change their state, as each tag is a
related resource of the state's event.
"""

import contextlib
import json
import re

from orchestration.access.asgi import Application, Message, Receive, Scope, Send

MAX_DEPTH = 100
"""How many levels of lists and objects a request may have."""

MAX_TAGS = 90
"""How many tags a flow, deployment or run may have.

The tags of a run are related resources of its events, and the server takes 100 of an event.
"""

_TAGGED = re.compile(r"/(flows|deployments|flow_runs|task_runs)/")
"""Part of the paths of requests whose `tags` become related resources."""

_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")


class LimitError(Exception):
    """A request beyond a limit, with the limit and the cure."""


class RequestLimits:
    """Passes requests to the API except those whose JSON is too deep or has too many tags.

    The body is looked at when the API reads it, and so after the API has checked the password.

    Args:
        application: the API.
    """

    def __init__(self, application: Application) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer it instead of the API if it is beyond a limit."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        parts: list[bytes] = []
        refusal = ""

        async def checked() -> Message:
            nonlocal refusal
            message = await receive()
            if message["type"] == "http.request":
                parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    refusal = _refusal(scope["path"], b"".join(parts))
                    if refusal:
                        raise LimitError(refusal)
            return message

        async def answer(message: Message) -> None:
            # Starlette answers an unreadable body by itself. Its answer does not name the limit.
            if not refusal:
                await send(message)

        with contextlib.suppress(LimitError):
            await self._application(scope, checked, answer)
        if refusal:
            await _refuse(send, refusal)


def _refusal(path: str, body: bytes) -> str:
    """Return why a request is refused. Empty if it is not."""
    if depth(body) > MAX_DEPTH:
        return (
            f"The request has more than {MAX_DEPTH} levels of lists and objects. Send flatter JSON, or JSON as a text."
        )
    tags = count_tags(body) if _TAGGED.search(f"{path}/") else 0
    if tags > MAX_TAGS:
        return f"The request has {tags:,} tags, and a flow, deployment or run has at most {MAX_TAGS}. Remove some."
    return ""


def count_tags(body: bytes) -> int:
    """Return how many different tags a request sets on one object. 0 if these are few, or the JSON is invalid."""
    if body.count(b'"') <= 2 * MAX_TAGS:
        return 0  # not more than the limit, and most requests
    try:
        content = json.loads(body)
    except ValueError:
        return 0  # the API refuses it
    # A request for many runs is a list.
    return max(map(_count_tags_of, content if isinstance(content, list) else [content]), default=0)


def _count_tags_of(content: object) -> int:
    tags = content.get("tags") if isinstance(content, dict) else None
    return len({tag for tag in tags if isinstance(tag, str)}) if isinstance(tags, list) else 0


def depth(body: bytes) -> int:
    """Return how many levels of lists and objects a JSON text has."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return 0  # not deeper than the limit, and most requests
    level = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", body)):
        level += 1 if bracket in b"[{" else -1
        deepest = max(deepest, level)
    return deepest


async def _refuse(send: Send, text: str) -> None:
    body = json.dumps({"exception_message": "Invalid request received.", "exception_detail": text}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 422, "headers": headers})
    await send({"type": "http.response.body", "body": body})
