"""How long tests of the charts' programs wait: scaled down, or with PACE=shipped at the charts' defaults.

`make test` scales the waits that the charts' values set, and the outages that are measured against them, in about the
same proportion. `make test-long` runs the same tests at the shipped values. Intervals on which two components must
agree, such as the fencing interval of supervisor and reconciler, are constants of the code and are not scaled.
"""

import os

IS_SHIPPED = os.environ.get("PACE") == "shipped"


def _pick(scaled: int, shipped: int) -> int:
    return shipped if IS_SHIPPED else scaled


PENDING_TIMEOUT_SECONDS = _pick(30, 600)
"""The chart's `reconciler.pendingTimeoutSeconds`. It counts from the Job's creation: with less, one failed pull after a
slow start on a busy node would end a run."""

CAPACITY_TIMEOUT_SECONDS = _pick(60, 660)
"""The chart's `reconciler.capacityTimeoutSeconds` in tests that wait until it expires. The default is a day."""

GRACE_SECONDS = _pick(8, 60)
"""The chart's `runs.terminationGracePeriodSeconds`: between a run's SIGTERM and its SIGKILL."""

ROUND_SECONDS = _pick(5, 2)
"""The chart's `reconciler.everySeconds`, the one wait that is longer in `make test`. The end of a pod starts a round at
once. Each other round takes the processor from other tests: five requests to the Prefect API and four to Kubernetes.
While nothing is live, the interval is ten seconds at both paces."""

IDLE_ROUND_SECONDS = ROUND_SECONDS if IS_SHIPPED else 3 * ROUND_SECONDS
"""The chart's `reconciler.everySeconds` in tests that assert nothing about the work of the reconciler."""

HEARTBEAT_SECONDS = _pick(6, 30)
"""The chart's `worker.heartbeatSeconds` where tests leave a pool without a worker.

A worker counts as offline after three missed heartbeats."""

PREFETCH_SECONDS = _pick(5, 10)
"""The chart's `worker.prefetchSeconds`."""

QUERY_SECONDS = _pick(2, 10)
"""The chart's `worker.querySeconds`, where a test waits for a worker that reads the pool's template again."""

DRIFT_SECONDS = _pick(30, 300)
"""The chart's `drift.everySeconds`."""

LATE_LOOP_SECONDS = _pick(30, 5)
"""Prefect's interval of the services that mark late runs and end pauses. Tests on the cluster wait for none of them."""

PAUSE_SECONDS = 0.1 if IS_SHIPPED else 1.0
"""The shortest pause between two looks of a test at the cluster. A look is a process of kubectl or some requests to the
Prefect API, and most of what tests wait for takes five seconds or more."""

STALL_SECONDS = _pick(4, 60)
"""The server chart's `services.stallSeconds`."""

WORKER_OUTAGE_SECONDS = 6 * HEARTBEAT_SECONDS
"""How long tests leave a pool without a worker: twice the time after which a worker counts as offline."""

SERVER_OUTAGE_SECONDS = _pick(40, 120)
"""How long tests leave a namespace without its Prefect API, before they kill the database."""

KUBERNETES_OUTAGE_SECONDS = _pick(20, 60)
"""How long tests leave the node without the Kubernetes API."""

KUBELET_OUTAGE_SECONDS = _pick(60, 120)
"""How long tests stop a kubelet: longer than the 50 s after which Kubernetes marks its node NotReady."""
