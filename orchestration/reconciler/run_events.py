"""Builds the reconciler's events on the pages of flow runs."""

from datetime import datetime
from typing import Any
from uuid import uuid4

from orchestration.prefect_api import JSON
from orchestration.reconciler.model import Run

STATE_EVENT_PREFIX = "reconciler.flow-run."
"""Before the name of a state in lower case, the name of the event of a run that the reconciler set to that state."""

GIVEN_UP_EVENT = "reconciler.flow-run.given-up"
"""The event of a crashed run that is not retried. No state of the run records that."""


def build_run_event(run: Run, name: str, occurred: datetime, payload: dict[str, Any], id_: str = "") -> JSON:
    """Return an event whose resource is a flow run.

    Args:
        run: the flow run.
        name: the name of the event.
        occurred: when it happened, on the server's clock.
        payload: the event's data.
        id_: the event's id, by which the server keeps one of several; empty for a new id.
    """
    return {
        "id": id_ or str(uuid4()),
        "occurred": occurred.isoformat(),
        "event": name,
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name},
        "payload": payload,
    }
