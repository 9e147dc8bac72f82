"""The leases of concurrency slots that a run attempt holds, recorded in the container's termination message.

The Prefect API does not list the holders of a slot, and takes a slot back only when its lease ends: for
`concurrency("name")` after five minutes. Kubernetes keeps the termination message however the container ends. So the
supervisor, or the reconciler, releases the slots of a run attempt that was killed.
"""

import contextlib
import json
import logging
import threading

import httpx

from orchestration.runs import termination_message

logger = logging.getLogger(__name__)

MAX_LEASES = 64
"""How many of the newest leases are recorded: Kubernetes keeps the first 4096 bytes of a message."""


class LeaseLedger:
    """Records the held leases whenever an answer of the Prefect API changes them."""

    def __init__(self) -> None:
        self._held: list[str] = []
        self._lock = threading.Lock()

    def observe(self, request: httpx.Request, response: httpx.Response) -> None:
        """Record the held leases if the API granted a request that took or released a lease."""
        path = request.url.path
        if not response.is_success or not path.endswith(("/increment-with-lease", "/decrement-with-lease")):
            return
        # An answer that cannot be read is no reason to fail the run.
        with self._lock, contextlib.suppress(ValueError, LookupError):
            if path.endswith("/decrement-with-lease"):
                released = json.loads(request.content)["lease_id"]
                self._held = [lease for lease in self._held if lease != released]
            elif (answer := response.json())["limits"]:  # empty if no concurrency limit has that name
                self._held.append(answer["lease_id"])
            self._write()

    def _write(self) -> None:
        try:
            termination_message.write({"leases": self._held[-MAX_LEASES:]})
        except OSError as error:
            logger.warning("The termination message %s cannot be written: %s.", termination_message.MESSAGE_PATH, error)
