"""Why a pod cannot start, read from what the Kubernetes API returns."""

from datetime import UTC, datetime

import pytest

from orchestration.operations.release_diagnosis import hopeless_reason


@pytest.mark.parametrize(("restarts", "reason"), [(2, ""), (3, "prefect-server: ended 3 times")])
def test_crash_loop_is_hopeless_from_the_third_restart(restarts: int, reason: str) -> None:
    status = {
        "name": "prefect-server",
        "ready": False,
        "restartCount": restarts,
        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
    }
    created = datetime.now(UTC).isoformat()
    pod = {"metadata": {"creationTimestamp": created}, "status": {"containerStatuses": [status]}}
    assert hopeless_reason(pod) == reason
