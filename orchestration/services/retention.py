"""Deletes old runs, logs and artifacts from the Prefect server's database, as one of its background services.

Prefect deletes events. It cannot delete logs or artifacts before their run, and would delete the last successful run of
a deployment, so that this module deletes runs, too.
"""

import asyncio
import logging
import math
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from orchestration.errors import SettingsError
from orchestration.prefect_compat import expired_records
from orchestration.prefect_compat.background_services import add_service
from orchestration.prefect_compat.expired_records import Batch, Place
from orchestration.prefect_compat.server_internals import database_url

logger = logging.getLogger("orchestration.retention")

VARIABLES = {kind: f"RETENTION_{kind.upper()}_DAYS" for kind in ("runs", "logs", "artifacts")}

EVERY_SECONDS, PASS_SECONDS = 15, 5
"""How often a pass begins, and how long it lasts. A walk over all tables may take many passes."""

REST_SECONDS = 600
"""How long nothing is read after a walk that has found nothing to delete."""

FAST_SECONDS, SLOW_SECONDS = 0.1, 0.25
"""The next batch is twice as large after one that was faster, and half as large after one that was slower."""

FIRST_ROWS, MIN_ROWS, MAX_ROWS = 250, 50, 5000
"""The sizes of a batch."""


@dataclass(frozen=True)
class Ages:
    """Holds how old each kind of record may get; None for ever."""

    runs: timedelta | None = None
    logs: timedelta | None = None
    artifacts: timedelta | None = None

    def any(self) -> bool:
        """Return whether any kind of record is ever deleted."""
        return bool(self.runs or self.logs or self.artifacts)


def read_ages(environment: Mapping[str, str]) -> Ages:
    """Return the ages from the variables `RETENTION_RUNS_DAYS` and so on. Unset and 0 mean for ever.

    Raises:
        SettingsError: a variable is not a number of days.
    """
    ages = {}
    for kind, variable in VARIABLES.items():
        text = environment.get(variable) or "0"
        try:
            days = float(text)
        except ValueError:
            days = math.nan
        if not 0 <= days <= 36500:
            raise SettingsError(
                f"{variable}={text} is no number of days from 0 to 36500. Set {variable} to one; 0 means for ever"
            )
        ages[kind] = timedelta(days=days) or None
    return Ages(**ages)


def add_to_server() -> None:
    """Add the service to those that this process starts later, if an age is set.

    Raises:
        SettingsError: a variable is not a number of days, or the server's database is not a Postgres.
    """
    ages = read_ages(os.environ)
    if not ages.any():
        return
    if not database_url().startswith("postgresql"):
        names = ", ".join(variable for variable in VARIABLES.values() if variable in os.environ)
        raise SettingsError(f"{names} cannot be used: the server's database is not a Postgres. Unset {names}")
    logger.setLevel(logging.INFO)  # the server shows warnings alone
    retention = Retention(ages)

    async def delete_old_records() -> None:
        await retention.enforce()

    add_service(delete_old_records, timedelta(seconds=EVERY_SECONDS))


class Retention:
    """Walks over the records again and again, and deletes the old ones. A pass goes on where the last one stopped."""

    def __init__(self, ages: Ages) -> None:
        self.ages = ages
        self.deleted: Counter[str] = Counter()
        self._walk: AsyncIterator[None] | None = None
        self._rests_until = 0.0

    async def enforce(self) -> None:
        """Delete old records for a few seconds, and less than that if there are none."""
        if time.monotonic() < self._rests_until:
            return
        end = time.monotonic() + PASS_SECONDS
        walk, self._walk = self._walk or self.walk(), None  # an error ends the walk
        async for _ in walk:
            if time.monotonic() > end:
                self._walk = walk
                return
        if self.deleted:
            logger.info("Deleted %s.", ", ".join(f"{n:,} {kind}" for kind, n in self.deleted.items()))
        else:
            self._rests_until = time.monotonic() + REST_SECONDS
        self.deleted.clear()

    async def walk(self) -> AsyncIterator[None]:
        """Delete all old records, a batch in each step.

        Runs come first, as the lines of deleted runs are among the logs to delete. A subflow's run goes in the walk
        after the one that deletes its parent's.
        """
        now = datetime.now(UTC)

        def before(age: timedelta | None) -> datetime | None:
            return now - age if age else None

        runs, logs, artifacts = before(self.ages.runs), before(self.ages.logs), before(self.ages.artifacts)
        deletions: dict[str, Callable[[Place, int], Awaitable[Batch]]] = {}
        if runs:
            deletions["flow runs"] = lambda place, rows: expired_records.delete_runs(runs, place, rows)
            deletions["task runs"] = lambda place, rows: expired_records.delete_task_runs(runs, place, rows)
        if logs or runs:
            deletions["log lines"] = lambda place, rows: expired_records.delete_logs(logs, runs, place, rows)
        if artifacts:
            deletions["artifacts"] = lambda place, rows: expired_records.delete_artifacts(artifacts, place, rows)
        for kind, delete in deletions.items():
            place: Place | None = expired_records.OLDEST
            rows = FIRST_ROWS
            while place:
                start = time.monotonic()
                batch = await delete(place, rows)
                seconds = time.monotonic() - start
                if batch.deleted:
                    self.deleted[kind] += batch.deleted
                place = batch.next
                if seconds > SLOW_SECONDS:
                    rows = max(rows // 2, MIN_ROWS)
                elif seconds < FAST_SECONDS:
                    rows = min(rows * 2, MAX_ROWS)
                yield
                await asyncio.sleep(seconds)  # leaves the database half of the time
