"""Defer the removal of a deployment's concurrency limit while a run holds a slot.

Without the limit, Prefect's server fails when such a run ends. See docs/upstream.md.
"""

from orchestration.deployments.resources import DEPLOYMENT, Object, display_name
from orchestration.prefect_api import JSON


def removes_limit(desired: Object, live: Object) -> bool:
    """Return whether a sync would remove a deployment's own concurrency limit."""
    return (
        desired.kind == DEPLOYMENT
        and desired.fields["concurrency_limit"] is None
        and live.fields["concurrency_limit"] is not None
    )


def must_wait(desired: Object, live: Object, raw: JSON) -> bool:
    """Return whether a sync would remove a deployment's concurrency limit while a run holds a slot.

    Args:
        desired: the deployment in the files.
        live: the deployment on the server.
        raw: the API's newest answer about the deployment.
    """
    return removes_limit(desired, live) and _held_slots(raw) > 0


def note(desired: Object, raw: JSON) -> str:
    """Return the note that a sync keeps the limit."""
    held = _held_slots(raw)
    runs = f"{held} run{'s hold' if held > 1 else ' holds'}"
    return (
        f"{display_name(desired.name)}: its concurrency_limit stays while {runs} a slot. The first sync after that "
        "removes it"
    )


def keep_limit(desired: Object, live: Object) -> Object:
    """Return the desired deployment with the limit that it has on the server."""
    kept = {key: live.fields[key] for key in ("concurrency_limit", "concurrency_options")}
    return Object(desired.kind, desired.key, desired.fields | kept, desired.where, masked=desired.masked)


def _held_slots(raw: JSON) -> int:
    """Return how many runs hold a slot of a deployment's own concurrency limit."""
    return int((raw.get("global_concurrency_limit") or {}).get("active_slots") or 0)
