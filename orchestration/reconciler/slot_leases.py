"""Keeps the concurrency slots of deployments for runs that are Pending.

A claim takes a slot of the run's deployment, with a lease. The engine renews the lease only while the run is Running. A
pod may wait for room for a day. After the deployment's `grace_period_seconds`, 300 s by default, the server would give
the slot to another run, and cancel the first run when its pod starts.
"""

from collections.abc import Iterable
from datetime import datetime, timedelta

from orchestration.prefect_api import RefusedError, Server
from orchestration.reconciler.concurrency import gather_bounded
from orchestration.reconciler.model import Run

FIRST_RENEWAL = timedelta(seconds=30)
"""When a run's lease is renewed first, after its state: most runs are Running by then. A lease lasts 60 s or more."""

RENEWAL_INTERVAL = timedelta(seconds=60)

LEASE_SECONDS = 300
"""For how long a lease is renewed. A reconciler that is away for less loses no slot."""


class SlotLeases:
    """Renews leases of runs. A new reconciler renews them all at once.

    Args:
        server: the Prefect API.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._renewed_at: dict[str, datetime] = {}

    async def renew(self, runs: Iterable[Run], now: datetime) -> None:
        """Renew the leases of the Pending runs that are due.

        A lease that the server does not know has expired: the server takes a slot again when the run begins.

        Args:
            runs: all runs of the round.
            now: the time, on the clock of the API's times.

        Raises:
            PipelineError: the API does not answer.
        """
        held = {run.slot_lease: run for run in runs if run.type == "PENDING" and run.slot_lease}
        self._renewed_at = {lease: time for lease, time in self._renewed_at.items() if lease in held}
        waiting = [lease for lease, run in held.items() if now - run.since > FIRST_RENEWAL]
        due = [
            lease
            for lease in waiting
            if lease not in self._renewed_at or now - self._renewed_at[lease] > RENEWAL_INTERVAL
        ]
        for error in await gather_bounded([self._renew(lease, now) for lease in due]):
            if error and not isinstance(error, RefusedError):
                raise error

    async def _renew(self, lease: str, now: datetime) -> None:
        self._renewed_at[lease] = now
        path = f"/v2/concurrency_limits/leases/{lease}/renew"
        await self._server.ask("POST", path, {"lease_duration": LEASE_SECONDS}, idempotent=True)
