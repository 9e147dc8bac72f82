"""Read and repair the revisions that Helm keeps of a release."""

import json
from datetime import UTC, datetime

from orchestration.errors import ClusterError
from orchestration.operations import rollout
from orchestration.operations.environment import Environment, Object


def revisions(environment: Environment, release: str) -> list[Object]:
    """Return the revisions of a release, oldest first. Empty if the release is not installed."""
    try:
        found: list[Object] = json.loads(environment.helm("history", release, "--output", "json"))
    except ClusterError as error:
        if "not found" in str(error):
            return []
        raise
    return found


def newest_revision(environment: Environment, release: str) -> int:
    """Return the number of the newest revision of an installed release."""
    return int(revisions(environment, release)[-1]["revision"])


def set_aside_interrupted(environment: Environment, release: str, history: list[Object], force: bool) -> None:
    """Delete a pending revision that an interrupted deploy left. Helm refuses any upgrade on top of it.

    Args:
        environment: the environment of the release.
        release: the name of the release.
        history: its revisions, oldest first.
        force: delete the revision although its deploy may still be in progress.

    Raises:
        ClusterError: the deploy of the revision may still be in progress somewhere else.
    """
    if not history or not history[-1]["status"].startswith("pending"):
        return
    revision = history[-1]["revision"]
    age = (datetime.now(UTC) - datetime.fromisoformat(history[-1]["updated"])).total_seconds()
    if age < rollout.TIMEOUT_SECONDS and not force:
        raise ClusterError(
            f"{release}: a deploy began {age:.0f} s ago and has not ended (revision {revision}). Wait "
            "until it ends; if it was interrupted, use FORCE=1"
        )
    print(f"{release}: revision {revision} was interrupted; it is set aside.", flush=True)
    environment.kubectl("delete", "secret", f"sh.helm.release.v1.{release}.v{revision}")
