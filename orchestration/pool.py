"""The work pool that a release owns: created, or changed in what differs.

    python -m orchestration.pool apply FILE

FILE is YAML with what the pool should be:

    name: default
    type: kubernetes
    description: ""
    concurrency_limit: null
    base_job_template: {job_configuration: {...}, variables: {...}}
    queues:
      - {name: default, priority: 1, concurrency_limit: null, description: ""}

Whether pool or queues are paused is the operators' matter and never changed. Queues that FILE does not have are
left as they are.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool, WorkQueue
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL

from orchestration.errors import PipelineError

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds to wait for the API to answer: it may be starting beside us."""

POOL_FIELDS = ("description", "concurrency_limit", "base_job_template")
QUEUE_FIELDS = ("priority", "concurrency_limit", "description")


async def _once_it_answers(call: Callable[[], Awaitable[T]]) -> T:
    """The first call's result, when the API answers.

    Raises:
        PipelineError: it refuses us, or does not answer in time.
    """
    url = PREFECT_API_URL.value() or "nowhere: PREFECT_API_URL is not set"
    deadline = time.monotonic() + PATIENCE
    told = False
    while True:
        try:
            return await call()
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status in (401, 403):
                raise PipelineError(
                    f"The Prefect API at {url} refuses us ({status}). "
                    "Check the Secret with USER:PASSWORD that api.auth names"
                ) from None
            if status < 500 or time.monotonic() > deadline:
                raise PipelineError(f"The Prefect API at {url} answers {status}: {error.response.text[:300]}") from None
            reason = str(status)
        except (httpx.HTTPError, OSError) as error:
            reason = str(error) or type(error).__name__
            if time.monotonic() > deadline:
                raise PipelineError(
                    f"The Prefect API at {url} does not answer: {reason}. Check api.url and that it can be reached"
                ) from None
        if not told:
            print(f"Waiting for the Prefect API at {url}: {reason}", flush=True)
            told = True
        await asyncio.sleep(1)


def _differing(found: Any, wanted: dict[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The fields whose value is another one. An empty description is none."""
    return {
        field: wanted.get(field)
        for field in fields
        if field in wanted and (getattr(found, field) or None) != (wanted[field] or None)
    }


async def _apply_pool(client: PrefectClient, wanted: dict[str, Any]) -> None:
    name = wanted["name"]

    async def read() -> WorkPool | None:
        # Only the API's own word that there is none means so; any other failure is one.
        try:
            return await client.read_work_pool(name)
        except ObjectNotFound:
            return None

    found = await _once_it_answers(read)
    if found is None:
        fields = {field: wanted.get(field) for field in POOL_FIELDS}
        await client.create_work_pool(WorkPoolCreate(name=name, type=wanted["type"], **fields))
        print(f"Work pool {name}: created.")
        return
    if found.type != wanted["type"]:
        raise PipelineError(
            f"Work pool {name} exists and is of type {found.type}, not {wanted['type']}. Choose another pool.name, or "
            f"delete it with its schedules: prefect work-pool delete {name}"
        )
    changes = _differing(found, wanted, POOL_FIELDS)
    if changes:
        await client.update_work_pool(name, WorkPoolUpdate(**changes))
    print(f"Work pool {name}: {'changed ' + ', '.join(sorted(changes)) if changes else 'as it should be'}.")


async def _apply_queues(client: PrefectClient, pool: str, wanted: list[dict[str, Any]]) -> None:
    found: dict[str, WorkQueue] = {each.name: each for each in await client.read_work_queues(work_pool_name=pool)}
    for queue in wanted:
        name = queue["name"]
        if name not in found:
            made = await client.create_work_queue(name, work_pool_name=pool)
            found[name] = made
            print(f"Queue {name}: created.")
        changes = _differing(found[name], queue, QUEUE_FIELDS)
        if changes:
            await client.update_work_queue(found[name].id, **changes)
            print(f"Queue {name}: changed {', '.join(sorted(changes))}.")


async def apply(wanted: dict[str, Any]) -> None:
    """Make the work pool and its queues as `wanted` says; see the module for its shape.

    Raises:
        PipelineError: the API cannot be reached or refuses, or the pool is of another type.
    """
    async with get_client() as client:
        await _apply_pool(client, wanted)
        try:
            await _apply_queues(client, wanted["name"], wanted.get("queues") or [])
        except httpx.HTTPStatusError as error:
            raise PipelineError(f"A queue was refused: {error.response.text[:300]}") from None


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    if len(arguments) != 2 or arguments[0] != "apply":
        print("usage: python -m orchestration.pool apply FILE", file=sys.stderr)
        return 2
    try:
        asyncio.run(apply(yaml.safe_load(Path(arguments[1]).read_text())))
    except PipelineError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    except httpx.HTTPStatusError as error:
        print(f"The Prefect API refuses the work pool: {error.response.text[:500]}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
