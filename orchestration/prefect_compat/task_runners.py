"""The private interfaces of Prefect's task runners."""

import threading
from collections.abc import Mapping
from typing import Any


def cancel_events(task_runner: Any) -> Mapping[Any, threading.Event]:
    """Return the events that are set when the flow ends that runs tasks in threads.

    Replaces: `ThreadPoolTaskRunner._cancel_events`
    Why: no signal reaches dbt in a task of another thread
    Until: a task can ask whether its flow is being cancelled
    """
    events: Mapping[Any, threading.Event] = getattr(task_runner, "_cancel_events", {})
    return events
