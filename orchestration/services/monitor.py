"""Measures the event loop, the database, Redis and the backlogs, next to the services in their event loop."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from orchestration.prefect_compat.background_services import count_backlogs, database_answers
from orchestration.services.service_health import DATABASE, REDIS, ServiceHealth

CHECK_SECONDS = 5
"""Seconds between two checks of a dependency, and the timeout of a check."""

PASSES_KEY = "service-passes"
"""The hash in Redis with the time of each service's last successful pass in any process."""


async def monitor(health: ServiceHealth, docket: Any) -> None:
    """Measure until the event loop ends.

    Args:
        health: what is measured, is recorded here.
        docket: the task queue of the services, whose Redis the processes share.
    """

    async def check_redis() -> None:
        await _share_passes(health, docket)
        for service, messages in (await count_backlogs()).items():
            health.count_backlog(service, messages)

    await asyncio.gather(
        _tick(health), _check_forever(health, DATABASE, database_answers), _check_forever(health, REDIS, check_redis)
    )


async def _tick(health: ServiceHealth) -> None:
    while True:
        health.tick()
        await asyncio.sleep(min(1, health.stall_seconds / 10))


async def _check_forever(health: ServiceHealth, dependency: str, check: Callable[[], Awaitable[None]]) -> None:
    every = min(CHECK_SECONDS, health.stall_seconds / 4)
    while True:
        try:
            await asyncio.wait_for(check(), CHECK_SECONDS)
        except Exception as error:
            health.check(dependency, error)
        else:
            health.check(dependency, None)
        await asyncio.sleep(every)


async def _share_passes(health: ServiceHealth, docket: Any) -> None:
    """Exchange the times of the last successful passes with the other processes, which share the passes."""
    key = docket.key(PASSES_KEY)
    async with docket.redis() as redis:
        shared = {name.decode(): float(text) for name, text in (await redis.hgetall(key)).items()}
        now, monotonic = time.time(), time.monotonic()
        newer = {}
        for name, found in health.services.items():
            if found.every is None:
                continue
            last = now - (monotonic - found.last_success)
            if shared.get(name, 0) > last:
                health.succeed(name, max(now - shared[name], 0))
            elif found.passes:
                newer[name] = last
        if newer:
            await redis.hset(key, mapping=newer)
