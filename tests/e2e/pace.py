"""How long tests on the cluster wait: scaled down, or with PACE=shipped at the charts' defaults.

`make test` scales what values of the charts set, and the outages that are measured against it, in about the same
proportion. `make test-long` runs the same tests at what is shipped. Pairs on which two components must agree, such as
the fencing interval of supervisor and reconciler, are constants of the code and stay as they are.
"""

import os

IS_SHIPPED = os.environ.get("PACE") == "shipped"


def _paced(scaled: int, shipped: int) -> int:
    return shipped if IS_SHIPPED else scaled


PENDING_TIMEOUT_SECONDS = _paced(15, 600)
"""The chart's `reconciler.pendingTimeoutSeconds`."""

CAPACITY_TIMEOUT_SECONDS = _paced(30, 660)
"""The chart's `reconciler.capacityTimeoutSeconds` where a test waits for its end: a day by default."""

GRACE_SECONDS = _paced(8, 60)
"""The chart's `runs.terminationGracePeriodSeconds`: between a run's SIGTERM and its SIGKILL."""

HEARTBEAT_SECONDS = _paced(6, 30)
"""The chart's `worker.heartbeatSeconds`. After three without one a worker counts as gone."""

PREFETCH_SECONDS = _paced(5, 10)
"""The chart's `worker.prefetchSeconds`."""

WORKERS_AWAY_SECONDS = 6 * HEARTBEAT_SECONDS
"""How long tests leave a pool without a worker: twice what makes one count as gone."""

SERVER_AWAY_SECONDS = _paced(40, 120)
"""How long tests leave a namespace without its Prefect API and then kill the database."""

KUBERNETES_AWAY_SECONDS = _paced(20, 60)
"""How long tests leave the node without the Kubernetes API."""

KUBELET_AWAY_SECONDS = _paced(60, 120)
"""How long tests stop a kubelet: longer than the 50 s after which Kubernetes calls its node NotReady."""
