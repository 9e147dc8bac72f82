"""The rules by which a service is late and a restart helps, on a clock that the tests move."""

import re
from collections.abc import Iterator
from unittest.mock import patch

import prometheus_client as prometheus
import pytest

from orchestration.services.service_health import DATABASE, REDIS, ServiceHealth
from orchestration.settings import ROOT

STALL = 60


class Clock:
    """Stands for `time.monotonic`."""

    seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Iterator[Clock]:
    with patch("time.monotonic", Clock()) as clock:
        yield clock


@pytest.fixture
def health(clock: Clock) -> ServiceHealth:
    health = ServiceHealth(STALL)
    health.expect("scheduler", 60, False)
    health.expect("vacuum", 3600, False)
    health.expect("persister", None, True)
    health.expect("logger", None, False)
    for dependency in (DATABASE, REDIS):
        health.check(dependency, None)
    health.tick()
    return health


def wait(health: ServiceHealth, clock: Clock, seconds: float, *passing: str) -> None:
    """Let time pass in which the event loop runs and the services `passing` make progress."""
    for _ in range(int(seconds)):
        clock.seconds += 1
        health.tick()
        for service in passing:
            health.succeed(service)


ALL = ("scheduler", "persister")


def reasons(health: ServiceHealth, path: str = "ready") -> list[str]:
    status, body = getattr(health, path)()
    assert not isinstance(body, str)
    assert (status == 200) == body["healthy"] == (not body["reasons"])
    return list(body["reasons"])


def test_process_is_not_alive_before_the_services_have_started(clock: Clock) -> None:
    health = ServiceHealth(STALL)
    assert reasons(health) == reasons(health, "live") == ["the services have not started yet"]


def test_pass_may_be_late_by_the_stall(health: ServiceHealth, clock: Clock) -> None:
    wait(health, clock, 60 + STALL, "persister")
    assert reasons(health) == []
    wait(health, clock, 1, "persister")
    assert reasons(health) == ["scheduler: no successful pass for 121 s, due every 60 s"]
    assert reasons(health, "live") == [], "a restart does not help"
    health.succeed("scheduler")
    assert reasons(health) == []
    wait(health, clock, 3600 + STALL, *ALL)
    assert [reason.split(":")[0] for reason in reasons(health)] == ["vacuum"]


def test_failed_pass_is_no_progress(health: ServiceHealth, clock: Clock) -> None:
    for _ in range(3):
        wait(health, clock, 60, "persister")
        health.fail("scheduler", ValueError("read-only\nwith the whole statement"))
    assert reasons(health) == ["scheduler: no successful pass for 180 s, due every 60 s: ValueError: read-only"]


def test_pass_of_another_process_counts(health: ServiceHealth, clock: Clock) -> None:
    wait(health, clock, 200, "persister")
    health.succeed("scheduler", seconds_ago=10)
    assert reasons(health) == []


def test_consumer_without_messages_is_healthy_while_its_loop_makes_rounds(health: ServiceHealth, clock: Clock) -> None:
    for _ in range(300):
        wait(health, clock, 1, "scheduler")
        health.round("persister")
    assert reasons(health) == []
    wait(health, clock, STALL + 1, "scheduler")
    assert reasons(health) == ["persister: no round for 61 s"]


def test_waiting_messages_have_to_be_handled(health: ServiceHealth, clock: Clock) -> None:
    def round_with_backlog(messages: int) -> None:
        wait(health, clock, 5, "scheduler")
        health.round("persister")
        health.count_backlog("persister", messages)

    for _ in range(STALL // 5 + 2):
        round_with_backlog(7)
    assert reasons(health)[0].startswith("persister: 7 messages wait, and none is handled")
    health.handle("persister")
    assert reasons(health) == []
    for _ in range(STALL):
        round_with_backlog(7)
        health.handle("persister")
    assert reasons(health) == [], "a busy consumer always has a backlog"
    round_with_backlog(0)
    assert reasons(health) == []


def test_failing_messages_are_no_progress_until_none_is_left(health: ServiceHealth, clock: Clock) -> None:
    for _ in range(STALL // 5 + 2):
        wait(health, clock, 5, "scheduler")
        health.round("persister")
        health.fail("persister", ValueError("no database"))
    assert reasons(health)[0].startswith("persister: fails for ")
    for _ in range(STALL):
        wait(health, clock, 1, "scheduler")
        health.round("persister")
    assert reasons(health) == []


def test_blocked_event_loop_needs_a_restart(health: ServiceHealth, clock: Clock) -> None:
    clock.seconds += STALL + 1
    assert reasons(health) == reasons(health, "live") == ["the event loop is blocked for 61 s"]


@pytest.mark.parametrize("away", [DATABASE, REDIS])
def test_hung_loop_needs_a_restart_only_while_database_and_redis_answer(
    health: ServiceHealth, clock: Clock, away: str
) -> None:
    wait(health, clock, 2 * STALL, "scheduler")
    health.check(away, OSError("refused"))
    wait(health, clock, 10 * STALL, "scheduler")
    assert reasons(health, "live") == []
    health.check(away, None)
    wait(health, clock, 3 * STALL, "scheduler")
    assert reasons(health, "live") == [], "the loop may still wait until its next try"
    wait(health, clock, 1, "scheduler")
    assert reasons(health, "live") == ["persister: hangs for 901 s while database and Redis answer"]


def test_ended_loop_needs_a_restart_only_while_database_and_redis_answer(health: ServiceHealth) -> None:
    health.end("logger", RuntimeError("unexpected"))
    assert reasons(health) == reasons(health, "live") == ["logger: ended: RuntimeError: unexpected"]
    health.check(REDIS, OSError("refused"))
    assert reasons(health, "live") == []
    assert reasons(health) == ["logger: ended: RuntimeError: unexpected"]


def test_metrics_show_health_and_are_documented(health: ServiceHealth, clock: Clock) -> None:
    health.count_backlog("persister", 3)
    wait(health, clock, 121, "persister")
    text = prometheus.generate_latest(health.registry).decode()
    assert 'prefect_service_healthy{service="scheduler"} 0.0' in text
    assert 'prefect_service_healthy{service="vacuum"} 1.0' in text
    assert 'prefect_service_last_progress_seconds{service="scheduler"} 121.0' in text
    assert 'prefect_service_backlog{service="persister"} 3.0' in text
    names = set(re.findall(r"^# TYPE (\w+)", text, flags=re.M))
    assert names == set(re.findall(r"`(prefect_service_\w+)", (ROOT / "docs/reference/metrics.md").read_text()))
