"""Whether the background services make progress, and whether a restart of their process helps.

Readiness and liveness answer two questions. A process is ready while each service makes progress. A process is alive
unless a restart helps: its event loop is blocked, or one of its loops has ended or hangs while database and Redis
answer. A restart does not bring a database or Redis back, so that an outage never ends the process.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import prometheus_client as prometheus

from orchestration.health import Answer

DATABASE, REDIS = "database", "redis"

RESTART_STALLS = 3
"""A loop that hangs for so many times the stall while database and Redis answer needs a restart.

A consumer of messages waits for up to 90 s before it tries Redis again after an outage.
"""


@dataclass
class _Service:
    """Records the progress of a service in this process. All times are those of `time.monotonic`."""

    every: float | None
    has_rounds: bool
    last_success: float
    last_round: float
    passes: int = 0
    failing_since: float | None = None
    last_failure: float = 0.0
    error: str = ""
    end: str = ""
    backlog: int = 0
    waiting_since: float | None = None

    @property
    def last_progress(self) -> float:
        """When the last successful pass was, or the last round of a loop that waits for messages."""
        return self.last_round if self.every is None else self.last_success


@dataclass
class _Dependency:
    """Records whether a database answers. `since` is when it began to answer, or None while it does not."""

    since: float | None = None
    error: str = "not checked yet"


class ServiceHealth:
    """Collects what the services of this process do, and judges it. Methods may be called from several threads.

    Args:
        stall_seconds: how long a service may make no progress while it should.
    """

    def __init__(self, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self.services: dict[str, _Service] = {}
        self.dependencies = {DATABASE: _Dependency(), REDIS: _Dependency()}
        self.last_tick: float | None = None
        self.registry = prometheus.CollectorRegistry()
        self._healthy = prometheus.Gauge(
            "prefect_service_healthy", "1 if the service makes progress.", ["service"], registry=self.registry
        )
        self._progress = prometheus.Gauge(
            "prefect_service_last_progress_seconds",
            "Seconds since the last successful pass, or round of a loop that waits for messages.",
            ["service"],
            registry=self.registry,
        )
        self._backlog = prometheus.Gauge(
            "prefect_service_backlog", "Messages that wait for the service.", ["service"], registry=self.registry
        )

    def expect(self, service: str, every: float | None, has_rounds: bool) -> None:
        """Add a service.

        Args:
            service: the name of its class or function in Prefect.
            every: seconds from one pass to the next; None for a loop that waits for messages.
            has_rounds: whether the loop makes rounds without messages, too.
        """
        found = self.services[service] = _Service(every, has_rounds, time.monotonic(), time.monotonic())
        self._healthy.labels(service).set_function(lambda: not self._trouble(service))
        self._progress.labels(service).set_function(lambda: time.monotonic() - found.last_progress)
        if every is None:
            self._backlog.labels(service).set_function(lambda: found.backlog)

    def round(self, service: str) -> None:
        """Record a round of a service's loop."""
        self.services[service].last_round = time.monotonic()

    def handle(self, service: str) -> None:
        """Record that a service has taken a message."""
        self.round(service)
        self.services[service].waiting_since = None

    def succeed(self, service: str, seconds_ago: float = 0) -> None:
        """Record a successful pass, or a message that was handled, in this or another process."""
        found = self.services[service]
        found.passes += 1
        found.last_success = max(found.last_success, time.monotonic() - seconds_ago)
        if found.last_success > found.last_failure:
            found.failing_since, found.error = None, ""
        self.handle(service)

    def fail(self, service: str, error: BaseException) -> None:
        """Record a pass, or the handling of a message, that failed."""
        found = self.services[service]
        found.last_failure = time.monotonic()
        found.failing_since = found.failing_since or found.last_failure
        found.error = _brief(error)

    def end(self, service: str, error: BaseException | None) -> None:
        """Record that a service's loop has ended, which it does only when the process ends."""
        self.services[service].end = f"ended: {_brief(error)}" if error else "ended"

    def tick(self) -> None:
        """Record that the event loop runs."""
        self.last_tick = time.monotonic()

    def check(self, dependency: str, error: BaseException | None) -> None:
        """Record whether the database or Redis has answered."""
        found = self.dependencies[dependency]
        if error:
            found.since, found.error = None, _brief(error)
        else:
            found.since, found.error = found.since or time.monotonic(), ""

    def count_backlog(self, service: str, messages: int) -> None:
        """Record how many messages wait for a service."""
        found = self.services[service]
        found.backlog = messages
        found.waiting_since = (found.waiting_since or time.monotonic()) if messages else None

    def ready(self) -> Answer:
        """Return the answer to a readiness probe."""
        blocked = self._blocked()
        troubles = {name: trouble for name in self.services if (trouble := self._trouble(name))}
        reasons = [blocked] if blocked else [f"{name}: {trouble}" for name, trouble in troubles.items()]
        return 503 if reasons else 200, self._body(reasons)

    def live(self) -> Answer:
        """Return the answer to a liveness probe."""
        reasons = [blocked] if (blocked := self._blocked()) else self._restart_reasons()
        return 503 if reasons else 200, self._body(reasons)

    def _blocked(self) -> str:
        if self.last_tick is None:
            return "the services have not started yet"
        seconds = time.monotonic() - self.last_tick
        return f"the event loop is blocked for {seconds:.0f} s" if seconds > self.stall_seconds else ""

    def _restart_reasons(self) -> list[str]:
        since = [found.since for found in self.dependencies.values()]
        if None in since:
            return []
        now, limit = time.monotonic(), RESTART_STALLS * self.stall_seconds
        answering = min(now - moment for moment in since if moment is not None)
        reasons = [f"{name}: {found.end}" for name, found in self.services.items() if found.end]
        for name, found in self.services.items():
            seconds = now - found.last_round
            if found.has_rounds and not found.end and seconds > limit and answering > limit:
                reasons.append(f"{name}: hangs for {seconds:.0f} s while database and Redis answer")
        return reasons

    def _trouble(self, service: str) -> str:
        """Return why a service is not healthy, or nothing."""
        found, now, stall = self.services[service], time.monotonic(), self.stall_seconds
        if found.end:
            return found.end
        because = f": {found.error}" if found.error else ""
        if found.every is not None and now - found.last_success > found.every + stall:
            return f"no successful pass for {now - found.last_success:.0f} s, due every {found.every:g} s{because}"
        if found.has_rounds and now - found.last_round > stall:
            return f"no round for {now - found.last_round:.0f} s{because}"
        if found.waiting_since and now - found.waiting_since > stall:
            return f"{found.backlog} messages wait, and none is handled for {now - found.waiting_since:.0f} s{because}"
        # A loop whose failures have stopped has nothing left to do, and is healthy again.
        if found.failing_since and now - found.failing_since > stall and now - found.last_failure < stall:
            return f"fails for {now - found.failing_since:.0f} s{because}"
        return ""

    def _body(self, reasons: list[str]) -> Mapping[str, Any]:
        now = time.monotonic()
        return {
            "healthy": not reasons,
            "reasons": reasons,
            "event_loop_seconds_ago": None if self.last_tick is None else round(now - self.last_tick, 1),
            **{name: found.error or "answers" for name, found in self.dependencies.items()},
            "services": {
                name: {
                    "healthy": not self._trouble(name),
                    "last_progress_seconds_ago": round(now - found.last_progress, 1),
                    **({"backlog": found.backlog} if found.every is None else {"every_seconds": found.every}),
                    **({"error": found.end or found.error} if found.end or found.error else {}),
                }
                for name, found in sorted(self.services.items())
            },
        }


def _brief(error: BaseException) -> str:
    """Return type and first line of an error. An error of SQLAlchemy goes on with the whole statement."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
