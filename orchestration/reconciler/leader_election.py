"""Leader election by a Kubernetes Lease.

kubernetes_asyncio 36.1 has a leader election, too. It measures time by the wall clock, and does not bound how long a
former leader's request may be in flight. It imports the whole Kubernetes client, which takes 0.4 to 1.2 s.
"""

import time
from datetime import UTC, datetime
from typing import Any

from orchestration.reconciler.kubernetes_client import TIMEOUT_SECONDS, Cluster


class LeaderElection:
    """Holds a Lease for one of several candidates. The leader renews the Lease in each round.

    A candidate takes over the Lease when it has seen no renewal for the Lease's duration, by its own clock alone. The
    leader acts only while `is_leader`, which ends earlier.

    Args:
        cluster: the cluster with the Lease.
        name: the name of the Lease.
        identity: the name of this candidate.
        duration: seconds after which a Lease that is not renewed may be taken over.
    """

    def __init__(self, cluster: Cluster, name: str, identity: str, duration: int = 15) -> None:
        self.cluster, self.name, self.identity, self.duration = cluster, name, identity, duration
        self.path = f"/apis/coordination.k8s.io/v1/namespaces/{cluster.namespace}/leases"
        self._observed: tuple[Any, float] = (None, 0.0)
        """The newest version of the Lease that was read, and when it was read first, on the monotonic clock."""
        self._until = 0.0
        """Until when this candidate may begin a request, on the monotonic clock."""
        self._written: Any = None
        """The Lease as this candidate has last written it. It need not be read while no other candidate writes it."""

    @property
    def is_leader(self) -> bool:
        """Whether this candidate may begin a request: the request ends before another candidate may act."""
        return time.monotonic() < self._until

    @property
    def deadline(self) -> float:
        """The time on the monotonic clock when another candidate may act. Every action must have ended before."""
        return self._until + 2 * TIMEOUT_SECONDS

    async def acquire_or_renew(self) -> bool:
        """Renew the Lease, or take it over if it has no holder; return whether this candidate leads.

        Raises:
            ClusterError: the Kubernetes API does not answer.
        """
        now = time.monotonic()
        known, self._written = self._written, None
        lease = known or await self.cluster.ask("GET", f"{self.path}/{self.name}", absent=(404,))
        spec = {"holderIdentity": self.identity, "leaseDurationSeconds": self.duration, "renewTime": _micro_time()}
        if lease is None:
            body = {"metadata": {"name": self.name}, "spec": spec}
            written = await self.cluster.ask("POST", self.path, body=body, absent=(409,))
        else:
            holder, version = lease["spec"].get("holderIdentity"), lease["metadata"]["resourceVersion"]
            if self._observed[0] != version:
                self._observed = version, now
            if holder not in (self.identity, "", None) and now - self._observed[1] < self.duration:
                self._until = 0.0
                return False
            # The body has the version that is known: of two candidates at the same time, the API refuses one.
            body = lease | {"spec": spec}
            written = await self.cluster.ask("PUT", f"{self.path}/{self.name}", body=body, absent=(404, 409))
        if known and not written:
            return await self.acquire_or_renew()  # another candidate has written the Lease, or it was deleted
        self._written = written
        self._until = now + self.duration - 2 * TIMEOUT_SECONDS if written else 0.0
        return bool(written)

    async def release(self) -> None:
        """Give up the Lease, so that another candidate can lead immediately."""
        if not self.is_leader:
            return
        lease = await self.cluster.ask("GET", f"{self.path}/{self.name}", absent=(404,))
        if lease and lease["spec"].get("holderIdentity") == self.identity:
            body = lease | {"spec": lease["spec"] | {"holderIdentity": ""}}
            await self.cluster.ask("PUT", f"{self.path}/{self.name}", body=body, absent=(409,))


def _micro_time() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
