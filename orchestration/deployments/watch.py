"""Looks for drift from time to time, and says so where people look: an artifact and events on the server, metrics."""

import asyncio
import contextlib
import json
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import prometheus_client as prometheus

from orchestration.deployments import drift, record
from orchestration.deployments.drift import Drift
from orchestration.deployments.resources import KINDS, spoken
from orchestration.errors import DeploymentsError, PipelineError
from orchestration.health import Pulse, served
from orchestration.prefect_api import Server, connected

DRIFTED, RESTORED = "desired-state.drifted", "desired-state.restored"
"""Events of the resource `desired-state.SLUG`."""

GRACE = 60
"""Seconds without a look, beside those of three looks, after which the watcher counts as ill."""

FEW = 5
"""Things that a line names."""

WIDTH = 1000
"""Letters of a value that the artifact shows."""


async def watch(owner: str, *, every: float, port: int, wait: float) -> None:
    """Look for drift until SIGTERM or SIGINT.

    Args:
        owner: whose things these are.
        every: seconds from one look to the next.
        port: where `/metrics` and `/health` are served.
        wait: seconds to wait for the API at first. Later a look that fails is counted, and the next one comes.

    Raises:
        PipelineError: the API does not answer at first, or the port cannot be had.
    """
    if not every >= 1:
        raise DeploymentsError(f"--every {every:g} is no number of seconds between looks: give 1 or more")
    state = _State(owner, every)
    with served(state.pulse, port):
        looking = asyncio.create_task(_look_on(state, every, wait))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, looking.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await looking


class _State:
    """What the watcher knows, as `/metrics` and `/health` say it."""

    def __init__(self, owner: str, every: float) -> None:
        self.owner = owner
        self.pulse = Pulse(3 * every + GRACE)
        registry = self.pulse.registry
        self.drifted = prometheus.Gauge(
            "desired_state_drifted_objects",
            "Things that are not as the owner's last sync left them.",
            ["owner", "kind"],
            registry=registry,
        )
        self.last_look = prometheus.Gauge(
            "desired_state_last_look_timestamp_seconds",
            "When drift was last looked for with success.",
            ["owner"],
            registry=registry,
        )
        self.failures = prometheus.Counter(
            "desired_state_look_failures_total", "Looks for drift that failed.", ["owner"], registry=registry
        ).labels(owner)

    def looked(self, found: Sequence[Drift]) -> None:
        """Note what a look found."""
        counts = Counter(each.kind for each in found)
        for kind in KINDS:
            self.drifted.labels(self.owner, kind).set(counts[kind])
        self.last_look.labels(self.owner).set_to_current_time()
        self.pulse.beat()

    def failed(self, reason: str) -> None:
        """Count a failure; said once, until looks succeed or fail otherwise."""
        self.failures.inc()
        # What is wrong is the first sentence. The cure after it may change (which owners the server knows).
        if reason.partition(". ")[0] != self.pulse.trouble.partition(". ")[0]:
            print(f"{reason.rstrip('.')}. Looking again.", file=sys.stderr, flush=True)
        self.pulse.trouble = reason

    def succeeded(self) -> None:
        """Note that what failed, if anything, does so no longer."""
        if self.pulse.trouble:
            print(f"{self.owner}: looks succeed again.", flush=True)
        self.pulse.trouble = ""


async def _look_on(state: _State, every: float, wait: float) -> None:
    said = ""
    async with connected(wait) as api:
        while True:
            try:
                found = await drift.find(api, state.owner)
                state.looked(found)
                text = markdown(state.owner, found)
                if text != said:
                    await _say(api, state.owner, found, text)
                    said = text
            except PipelineError as error:
                state.failed(str(error))
            else:
                state.succeeded()
            await asyncio.sleep(every)


async def _say(api: Server, owner: str, found: Sequence[Drift], text: str) -> None:
    """Say what is new: an event if the artifact there says otherwise, a new artifact, a line."""
    key = f"drift-{record.slug(owner)}"
    there = await api.ask("GET", f"/artifacts/{key}/latest", absent=True)
    # An earlier watcher may have said it already. The artifact comes last: cut off in between, the event comes again.
    if text != (there["data"] if there else markdown(owner, [])):
        await api.ask("POST", "/events", [_event(owner, found)])
    artifact = {"key": key, "type": "markdown", "description": f"What is not as {owner} synced it.", "data": text}
    await api.ask("POST", "/artifacts/", artifact)
    print(summary(owner, found), flush=True)


def _event(owner: str, found: Sequence[Drift]) -> dict[str, Any]:
    return {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": DRIFTED if found else RESTORED,
        "resource": {
            "prefect.resource.id": f"desired-state.{record.slug(owner)}",
            "prefect.resource.name": owner,
        },
        "payload": {
            "summary": summary(owner, found),
            # The values are in the artifact: an event must stay small.
            "objects": [
                {"kind": each.kind, "key": each.key, "fields": [name for name, _, _ in each.fields]} for each in found
            ],
        },
    }


def summary(owner: str, found: Sequence[Drift]) -> str:
    """What drifted, in one line."""
    if not found:
        return f"{owner}: all is as its last sync left it."
    named = [
        f"{spoken((each.kind, each.key))} ({', '.join(name for name, _, _ in each.fields) or 'deleted'})"
        for each in found[:FEW]
    ]
    more = ", ..." if len(found) > FEW else ""
    return f"{owner}: {len(found)} changed since its last sync: {', '.join(named)}{more}"


def markdown(owner: str, found: Sequence[Drift]) -> str:
    """What drifted, field by field. It has no times: the same drift is the same text."""
    if not found:
        return f"All is as the last sync of {owner} left it."
    lines = [f"{len(found)} changed since the last sync of {owner}. `orchestrate sync` brings back what the files say."]
    for each in found:
        by = f", by {each.by}" if each.by else ""
        lines += ["", f"### {'Changed' if each.fields else 'Deleted'}: {spoken((each.kind, each.key))}{by}"]
        if each.fields:
            lines += ["", "| field | last sync | now |", "|---|---|---|"]
            lines += [f"| {_code(name)} | {_value(old)} | {_value(new)} |" for name, old, new in each.fields]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if value is None:
        return "(none)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return _code(text if len(text) <= WIDTH else text[: WIDTH - 3] + "...")


def _code(text: str) -> str:
    """Code in a table: the names of schedules have stars."""
    return "`` " + text.replace("|", "\\|") + " ``"
