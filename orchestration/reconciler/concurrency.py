"""Runs coroutines a few at a time."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any


async def gather_bounded(coroutines: Sequence[Coroutine[Any, Any, Any]], limit: int = 8) -> list[Any]:
    """Return the results of coroutines, or their exceptions, in order.

    Args:
        coroutines: what to run.
        limit: how many run at the same time.
    """
    semaphore = asyncio.Semaphore(limit)

    async def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
        async with semaphore:
            return await coroutine

    return await asyncio.gather(*map(run, coroutines), return_exceptions=True)
