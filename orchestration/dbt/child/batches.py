"""The batches of a microbatch model: what is left of them, and how a later attempt runs only those.

After the first batch the relation exists, so without the batches of the first attempt dbt would build only the
`lookback`.
"""

import threading
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from .nodes import Json

Batch = tuple[datetime, datetime]
"""Start and end."""

SEND_INTERVAL_SECONDS = 1.0
"""Shortest time between two reports of one model: a batch may take less than its report."""


class Batches:
    """Counts the batches of the microbatch models of one command."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._done: dict[str, set[Batch]] = {}
        self._all: dict[str, set[Batch]] = {}
        self._reported: dict[str, float] = {}
        """By model, the monotonic time of the last report."""

    def begin(self, model: str, batches: Iterable[Batch]) -> bool:
        """Learn the batches of a model; return whether the model is new."""
        with self._lock:
            if model in self._all:
                return False
            self._all[model], self._done[model] = set(batches), set()
            return True

    def end(self, model: str, batch: Batch) -> bool:
        """Count a batch that is done; return whether a report is due."""
        with self._lock:
            self._done[model].add(batch)
            return time.monotonic() - self._reported.get(model, 0.0) > SEND_INTERVAL_SECONDS

    def report(self, model: str) -> Json | None:
        """Return the model's batches, as ranges; None of a model without batches."""
        with self._lock:
            if model not in self._all:
                return None
            self._reported[model] = time.monotonic()
            done = self._done[model]
            return {"successful": _joined(done), "failed": _joined(self._all[model] - done)}

    def resume(self, task: Any, earlier: dict[str, Json], started: str) -> None:
        """Make dbt run only the failed batches of the models that an earlier attempt began, as its own retry does.

        Args:
            task: dbt's task, before it runs.
            earlier: the reports of the earlier attempt, by the models' ids.
            started: when the earlier attempt started: other models build their batches until then.
        """
        if not hasattr(task, "batch_map"):  # the command builds no model
            return
        if started:
            task.original_invocation_started_at = datetime.fromisoformat(started)
        task.batch_map = {}
        for name, ranges in earlier.items():
            model = task.manifest.nodes.get(name)
            if model is None or not ranges["failed"] or _is_full_refresh(model, task):
                continue
            from dbt.artifacts.schemas.batch_results import BatchResults

            successful, failed = (_split(model, ranges[key]) for key in ("successful", "failed"))
            self.begin(name, [*successful, *failed])
            self._done[name].update(successful)
            task.batch_map[name] = BatchResults(successful=successful, failed=failed)


def _is_full_refresh(model: Any, task: Any) -> bool:
    """Return whether dbt builds the model from its beginning, and so all of its batches."""
    if model.config.full_refresh is not None:
        return bool(model.config.full_refresh)
    return bool(getattr(task.config.args, "FULL_REFRESH", False))


def _joined(batches: Iterable[Batch]) -> list[list[str]]:
    """Return the batches with adjacent ones joined: a model may have thousands."""
    ranges: list[list[datetime]] = []
    for start, end in sorted(batches):
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = end
        else:
            ranges.append([start, end])
    return [[time.astimezone(UTC).isoformat() for time in times] for times in ranges]


def _split(model: Any, ranges: list[list[str]]) -> list[Batch]:
    """Return the model's batches in the ranges."""
    from dbt.materializations.incremental.microbatch import MicrobatchBuilder

    builder = MicrobatchBuilder(model, is_incremental=True, event_time_start=None, event_time_end=None)
    times = [[datetime.fromisoformat(time) for time in pair] for pair in ranges]
    return [batch for start, end in times for batch in builder.build_batches(start, end)]
