"""Check for drift at intervals, and report it as an artifact, events, metrics and log lines."""

import asyncio
import contextlib
import json
import logging
import signal
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import prometheus_client as prometheus

from orchestration import api_settings
from orchestration.deployments import drift
from orchestration.deployments import record as records
from orchestration.deployments.drift import Drift, NeverSyncedError
from orchestration.deployments.resources import KINDS, display_name
from orchestration.errors import DeploymentsError, PipelineError
from orchestration.health import Pulse, served
from orchestration.prefect_api import Server, connected

logger = logging.getLogger(__name__)

DRIFTED, RESTORED = "desired-state.drifted", "desired-state.restored"
"""Events of the resource `desired-state.SLUG`. Restored: the drift has ended."""

GRACE_SECONDS = 60
"""The watcher counts as ill after three intervals and this time without a successful check."""

MAX_NAMED_OBJECTS = 5
"""A log line names up to this many objects."""

MAX_VALUE_CHARACTERS = 1000
"""A longer value is cut in the artifact."""


async def watch(owner: str, *, every: float, port: int, wait: float) -> None:
    """Check for drift until SIGTERM or SIGINT.

    Args:
        owner: the owner of the objects.
        every: seconds from one check to the next.
        port: the port of `/metrics` and `/health`.
        wait: seconds to wait for the API at the start. Later a failed check is counted, and the next check follows.

    Raises:
        PipelineError: the API does not answer at the start, or the port is in use.
    """
    if not every >= 1:
        raise DeploymentsError(f"--every {every:g} is too short: checks are at least 1 second apart. Pass 1 or more")
    state = _State(owner, every)
    with served(state.pulse, port):
        checking = asyncio.create_task(_check_forever(state, every, wait))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, checking.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await checking


class _State:
    """Holds the results of drift checks for `/metrics` and `/health`, and logs failures."""

    def __init__(self, owner: str, every: float) -> None:
        self.owner = owner
        self.pulse = Pulse(3 * every + GRACE_SECONDS)
        self.logged_failure = ""
        registry = self.pulse.registry
        self.drifted = prometheus.Gauge(
            "desired_state_drifted_objects",
            "Objects that differ from the owner's last sync.",
            ["owner", "kind"],
            registry=registry,
        )
        self.last_check = prometheus.Gauge(
            "desired_state_last_look_timestamp_seconds",
            "Time of the last successful drift check.",
            ["owner"],
            registry=registry,
        )
        self.failures = prometheus.Counter(
            "desired_state_look_failures_total", "Drift checks that failed.", ["owner"], registry=registry
        ).labels(owner)

    def record_check(self, drifted: Sequence[Drift]) -> None:
        """Record the result of a check."""
        counts = Counter(item.kind for item in drifted)
        for kind in KINDS:
            self.drifted.labels(self.owner, kind).set(counts[kind])
        self.last_check.labels(self.owner).set_to_current_time()
        self.pulse.beat()

    def record_failure(self, error: PipelineError) -> None:
        """Count a failed check. The log has a failure once, until checks succeed or fail for another reason."""
        self.failures.inc()
        identity = _identity(error)
        if identity != self.logged_failure:
            logger.warning("%s. The next drift check tries again.", str(error).rstrip("."))
        self.logged_failure = identity
        self.pulse.trouble = str(error)

    def record_success(self) -> None:
        """Log the end of a failure."""
        if self.logged_failure:
            logger.info("%s: drift checks succeed again.", self.owner)
        self.logged_failure = ""
        self.pulse.trouble = ""


def _identity(error: PipelineError) -> str:
    """Return a text that is equal for failures with the same cause."""
    if isinstance(error, NeverSyncedError):  # its message names the owners of the server, which may change
        return f"{error.owner} has never synced"
    return str(error)


async def _check_forever(state: _State, every: float, wait: float) -> None:
    reported = ""
    async with connected(wait, settings=api_settings.read_in_child()) as server:
        while True:
            try:
                drifted = await drift.find(server, state.owner)
                state.record_check(drifted)
                text = markdown(state.owner, drifted)
                if text != reported:
                    await report(server, state.owner, drifted, text)
                    reported = text
            except PipelineError as error:
                state.record_failure(error)
            else:
                state.record_success()
            await asyncio.sleep(every)


async def report(server: Server, owner: str, drifted: Sequence[Drift], text: str) -> None:
    """Report changed drift as an event, an artifact and a log line.

    There is no event if an earlier watcher has reported the same.

    Args:
        server: the server.
        owner: the owner of the objects.
        drifted: the drift; none if it has ended.
        text: the artifact's Markdown.
    """
    key = f"drift-{records.slug(owner)}"
    latest = await server.ask("GET", f"/artifacts/{key}/latest", absent=True)
    # The artifact comes after the event: a watcher that is killed in between sends the event once more.
    if text != (latest["data"] if latest else markdown(owner, [])):
        await server.ask("POST", "/events", [_event(owner, drifted)])
    artifact = {"key": key, "type": "markdown", "description": f"Drift since the last sync of {owner}.", "data": text}
    await server.ask("POST", "/artifacts/", artifact)
    logger.log(logging.WARNING if drifted else logging.INFO, "%s", summary(owner, drifted))


def _event(owner: str, drifted: Sequence[Drift]) -> dict[str, Any]:
    return {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": DRIFTED if drifted else RESTORED,
        "resource": {
            "prefect.resource.id": f"desired-state.{records.slug(owner)}",
            "prefect.resource.name": owner,
        },
        "payload": {
            "summary": summary(owner, drifted),
            # The artifact has the values. An event must stay small.
            "objects": [
                {"kind": item.kind, "key": item.key, "fields": [name for name, _, _ in item.fields]} for item in drifted
            ],
        },
    }


def summary(owner: str, drifted: Sequence[Drift]) -> str:
    """Return the drift in one line."""
    if not drifted:
        return f"{owner}: no drift since the last sync."
    named = [
        f"{display_name((item.kind, item.key))} ({', '.join(name for name, _, _ in item.fields) or 'deleted'})"
        for item in drifted[:MAX_NAMED_OBJECTS]
    ]
    more = ", ..." if len(drifted) > MAX_NAMED_OBJECTS else ""
    return f"{owner}: {len(drifted)} changed since the last sync: {', '.join(named)}{more}"


def markdown(owner: str, drifted: Sequence[Drift]) -> str:
    """Return the drift, field by field. The text has no times, so that the same drift is the same text."""
    if not drifted:
        return f"No drift since the last sync of {owner}."
    lines = [f"{len(drifted)} changed since the last sync of {owner}. `orchestrate sync` restores what the files say."]
    for item in drifted:
        by = f", by {item.by}" if item.by else ""
        lines += ["", f"### {'Changed' if item.fields else 'Deleted'}: {display_name((item.kind, item.key))}{by}"]
        if item.fields:
            lines += ["", "| field | last sync | now |", "|---|---|---|"]
            lines += [f"| {_code(name)} | {_value(old)} | {_value(new)} |" for name, old, new in item.fields]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if value is None:
        return "(none)"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return _code(text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 3] + "...")


def _code(text: str) -> str:
    """Return code for a table. Names of schedules have stars, which Markdown would read as emphasis."""
    return "`` " + text.replace("|", "\\|") + " ``"
