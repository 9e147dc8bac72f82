"""The background services on a real Postgres and Redis: which probe turns red at which fault, and green again.

The services may stall for 4 s here, and for 60 s in `make test-long FOR=service-faults`, as in the chart. `make
bench-health` measures the same faults at 60 s.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from websockets import Subprotocol
from websockets.sync.client import connect

from orchestration.services.service_health import RESTART_STALLS
from tests import service_faults
from tests.e2e.pace import IS_SHIPPED, STALL_SECONDS
from tests.parts import debian_postgres, wait_until
from tests.service_faults import Services, probe

LOOP_SECONDS = 60 if IS_SHIPPED else 2
"""The longest interval of the passes that the tests wait for. At the shipped pace these are Prefect's defaults."""

SCALED_SETTINGS = {
    f"PREFECT_SERVER_SERVICES_{name}_FLUSH_INTERVAL": "0.5" for name in ("EVENT_PERSISTER", "TASK_RUN_RECORDER")
} | {
    f"PREFECT_SERVER_SERVICES_{name}_LOOP_SECONDS": str(LOOP_SECONDS)
    for name in ("FOREMAN", "LATE_RUNS", "PAUSE_EXPIRATIONS", "REPOSSESSOR", "SCHEDULER", "CANCELLATION_CLEANUP")
}
SETTINGS = {"PREFECT_REDIS_MESSAGING_PUBLISHER_PUBLISH_EVERY": "3600"} | ({} if IS_SHIPPED else SCALED_SETTINGS)
RED_SECONDS, GREEN_SECONDS = (600, 900) if IS_SHIPPED else (120, 240)
"""Limits for a busy machine."""


@pytest.fixture(scope="module")
def services() -> Iterator[Services]:
    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(debian_postgres())
        template = stack.enter_context(service_faults.migrated_template(postgres))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with (folder / "log").open("w") as log:
            yield stack.enter_context(
                service_faults.running_services(postgres, template, folder, STALL_SECONDS, log, **SETTINGS)
            )


@pytest.fixture(scope="module")
def api(services: Services) -> Iterator[int]:
    """Yield the port of an API of the same server."""
    with service_faults.running_api(services) as port:
        yield port


def assert_recovery(services: Services) -> None:
    """Assert that the services are ready again, and have lost no event."""
    services.wait_for("/ready", True, GREEN_SECONDS)
    services.publish()
    wait_until(lambda: services.count_lost_events() == 0, "all events to be in the database", GREEN_SECONDS)
    services.wait_for("/live", True, GREEN_SECONDS)


def test_every_enabled_service_reports_progress(services: Services) -> None:
    body = services.wait_for("/ready", True, GREEN_SECONDS)
    assert body["reasons"] == []
    wait_until(lambda: services.dependencies() == {"answers"}, "database and Redis to answer", GREEN_SECONDS)
    assert set(body["services"]) == {
        "docket", "TaskRunRecorder", "EventPersister", "ReactiveTriggers", "Actions", "Distributor",
        "schedule_deployments", "schedule_recent_deployments", "monitor_late_runs", "monitor_worker_health",
        "monitor_expired_pauses", "monitor_expired_leases", "reconcile_cleanup_delivery",
        "evaluate_proactive_triggers_periodic", "schedule_event_vacuum_tasks", "monitor_cancelled_flow_runs",
        "monitor_subflow_runs", "ensure_cancelling_timeout_checks",
    }  # fmt: skip
    assert all(service["healthy"] for service in body["services"].values())
    assert_recovery(services)


Fault = Callable[[Services], contextlib.AbstractContextManager[None]]

FURTHER = [] if IS_SHIPPED else [pytest.mark.further]
"""`make test-long FOR=service-faults` tries all faults."""

OUTAGES = [
    pytest.param(service_faults.redis_is_silent, "redis", "EventPersister", marks=FURTHER),
    pytest.param(service_faults.database_is_silent, "database", "monitor_late_runs"),
    pytest.param(service_faults.database_is_read_only, None, "monitor_worker_health", marks=FURTHER),
]
LESSER_OUTAGES: list[tuple[Fault, str | None, str]] = [
    (service_faults.redis_refuses, "redis", "EventPersister"),
    (service_faults.database_refuses, "database", "monitor_late_runs"),
    (service_faults.database_has_no_connections, "database", "monitor_late_runs"),
]
"""A client learns of these at once. `make test` leaves them to `make test-long FOR=service-faults`."""


@pytest.mark.parametrize(("fault", "dependency", "service"), [*OUTAGES, *(LESSER_OUTAGES if IS_SHIPPED else [])])
def test_outage_turns_readiness_red_and_never_restarts(
    services: Services,
    fault: Fault,
    dependency: str | None,
    service: str,
) -> None:
    with fault(services):
        if service != "EventPersister":
            services.publish()

        def is_red() -> bool:
            status, body = services.probe("/ready")
            if status != 503:
                return False
            known = dependency is None or body[dependency] != "answers"
            return known and not body["services"][service]["healthy"]

        wait_until(is_red, f"{service} to be late", RED_SECONDS)
        # Longer than a loop may hang while database and Redis answer.
        time.sleep(RESTART_STALLS * STALL_SECONDS)
        services.wait_for("/live", True, RED_SECONDS)
    assert_recovery(services)


@pytest.mark.further
def test_emptied_redis_loses_no_later_event(services: Services) -> None:
    service_faults.empty_redis(services)
    emptied = time.monotonic()
    assert_recovery(services)
    # docket schedules a lost pass again within 60 s.
    passes = [
        name
        for name, service in services.report("/ready")["services"].items()
        if service.get("every_seconds", LOOP_SECONDS + 1) <= LOOP_SECONDS
    ]
    assert passes

    def all_passed() -> bool:
        # Not a pass that was in progress when Redis was emptied.
        since = time.monotonic() - emptied - 2 * STALL_SECONDS
        found = services.report("/ready")["services"]
        return all(found[name]["last_progress_seconds_ago"] < since for name in passes)

    wait_until(all_passed, "all passes to continue", GREEN_SECONDS)
    assert_recovery(services)


def test_services_follow_a_failover_of_redis(services: Services) -> None:
    service_faults.fail_redis_over(services)
    assert_recovery(services)


def test_stopped_process_answers_no_probe(services: Services) -> None:
    with service_faults.stopped_process(services):
        assert services.probe("/live")[0] == 0
        assert services.probe("/ready")[0] == 0
    assert_recovery(services)


def test_blocked_event_loop_turns_both_probes_red(services: Services) -> None:
    services.tell("block", str(10 * STALL_SECONDS))  # time for both probes
    assert "event loop" in services.wait_for("/live", False, RED_SECONDS)["reasons"][0]
    services.wait_for("/ready", False, RED_SECONDS)
    assert_recovery(services)


def test_api_without_postgres_is_not_ready_and_stays_alive(services: Services, api: int) -> None:
    for fault in (service_faults.database_refuses, service_faults.database_is_silent):
        with fault(services):
            wait_until(lambda: probe(api, "/api/ready")[0] != 200, "the API not to be ready", RED_SECONDS)
            wait_until(lambda: probe(api, "/api/health")[0] == 200, "the API to be alive", RED_SECONDS)
        wait_until(lambda: probe(api, "/api/ready")[0] == 200, "the API to be ready again", GREEN_SECONDS)


def test_api_keeps_no_event_of_an_open_websocket_in_memory(services: Services, api: int) -> None:
    """Its client takes the event for safe, and would not send it again to another API if this one were killed."""
    url = f"ws://127.0.0.1:{api}/api/events/in"
    with connect(url, subprotocols=[Subprotocol("prefect")], proxy=None, open_timeout=RED_SECONDS) as websocket:
        websocket.send(json.dumps({"type": "auth", "token": ""}))
        assert json.loads(websocket.recv(RED_SECONDS))["type"] == "auth_success"
        services.publish(lambda event: websocket.send(json.dumps(event)))
        wait_until(lambda: services.count_lost_events() == 0, "the event to be in the database", GREEN_SECONDS)


# The services do not recover from these faults. The next test restarts them.
def test_dead_or_hung_service_needs_a_restart_unless_redis_is_away(services: Services) -> None:

    def starts(path: str) -> set[str]:
        return {" ".join(reason.split()[:2]) for reason in services.report(path)["reasons"]}

    services.tell("hang", "ReactiveTriggers")
    wait_until(lambda: "ReactiveTriggers: no" in starts("/ready"), "the hung service to be named", RED_SECONDS)
    wait_until(lambda: starts("/live") == {"ReactiveTriggers: hangs"}, "the hung service to end it", RED_SECONDS)
    services.tell("end", "EventPersister")
    wait_until(lambda: "EventPersister: ended" in starts("/live"), "both services to be named", RED_SECONDS)
    assert "EventPersister: ended" in starts("/ready")
    services.relay.close()
    services.wait_for("/live", True, RED_SECONDS)
    services.connect_redis()
    assert "EventPersister: ended" in services.wait_for("/live", False, RED_SECONDS)["reasons"]
    assert services.process.poll() is None


def test_restart_for_a_dead_service_loses_no_event(services: Services) -> None:
    """Unread events wait in Redis. At SIGTERM a service writes the events that it has read."""
    services.tell("end", "EventPersister")
    services.wait_for("/live", False, RED_SECONDS)
    services.publish()
    services.end()
    with patch.dict(services.environment, {"PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "3600"}):
        services.launch()
    wait_until(services.have_started, "the services to be ready", GREEN_SECONDS)
    services.publish()
    wait_until(services.have_read_all, "the services to read all events", GREEN_SECONDS)
    assert services.count_lost_events() > 0
    services.end()
    assert services.count_lost_events() == 0
    assert services.process.returncode == 0
