"""Serves the health of the background services that run in this process."""

import contextlib
import functools
import os
from collections.abc import Iterator
from datetime import timedelta

from orchestration.errors import SettingsError
from orchestration.health import served_paths
from orchestration.prefect_compat.background_services import (
    observe_services,
    redeliver_lost_passes,
    retry_task_run_writes,
)
from orchestration.services.monitor import monitor
from orchestration.services.service_health import ServiceHealth

PORT_VARIABLE, STALL_VARIABLE = "SERVICES_HEALTH_PORT", "SERVICES_STALL_SECONDS"

WRITE_RETRIES = 10_000
"""How often the recorder tries to write a state of a task run, every 5 s or at each event that follows."""


@contextlib.contextmanager
def services_health_served() -> Iterator[None]:
    """Serve `/ready`, `/live` and `/metrics` during the block if `SERVICES_HEALTH_PORT` is set.

    The block starts the services. A service makes progress if it does so within `SERVICES_STALL_SECONDS`.

    Raises:
        SettingsError: a variable is no number, or the port is in use.
    """
    if not os.environ.get(PORT_VARIABLE):
        yield
        return
    port, stall_seconds = int(_number(PORT_VARIABLE)), _number(STALL_VARIABLE, "60")
    health = ServiceHealth(stall_seconds)
    paths = {"/ready": health.ready, "/live": health.live}
    with served_paths(paths, health.registry, port, f"Set {PORT_VARIABLE} to a free port"):
        retry_task_run_writes(WRITE_RETRIES)
        redeliver_lost_passes(timedelta(seconds=stall_seconds / 2))
        observe_services(health, functools.partial(monitor, health))
        yield


def _number(variable: str, default: str = "") -> float:
    text = os.environ.get(variable, default)
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not number > 0:
        raise SettingsError(f"{variable}={text} is no number above 0. Set {variable} to one")
    return number
