"""Why a pod cannot start, read from what the Kubernetes API returns."""

from datetime import UTC, datetime
from typing import Any

import pytest

from orchestration.operations.release_diagnosis import hopeless_reason

CRASHED = {"terminated": {"exitCode": 1, "reason": "Error"}}
COMPLETED = {"terminated": {"exitCode": 0, "reason": "Completed"}}


@pytest.mark.parametrize("kind", ["initContainerStatuses", "containerStatuses"])
@pytest.mark.parametrize(
    ("state", "restarts", "reason"),
    [
        ({"waiting": {"reason": "CrashLoopBackOff"}}, 2, ""),
        ({"waiting": {"reason": "CrashLoopBackOff"}}, 3, "prefect-server: ended 3 times"),
        (CRASHED, 2, ""),
        (CRASHED, 3, "prefect-server: ended 3 times"),
        (COMPLETED, 3, ""),
    ],
)
def test_crash_loop_is_hopeless_from_the_third_restart(
    kind: str, state: dict[str, Any], restarts: int, reason: str
) -> None:
    status = {"name": "prefect-server", "ready": False, "restartCount": restarts, "state": state}
    created = datetime.now(UTC).isoformat()
    pod = {"metadata": {"creationTimestamp": created}, "status": {kind: [status]}}
    assert hopeless_reason(pod) == reason
