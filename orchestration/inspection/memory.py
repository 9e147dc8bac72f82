"""How much memory the runs of a deployment use, and what it should ask for; all of it from the API."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from statistics import median
from typing import Any

from orchestration.errors import ApiError
from orchestration.prefect_api import JSON, PAGE, Server
from orchestration.protocol import EXCEEDED_LABEL, PEAK_LABEL, whole_number
from orchestration.quantity import quantity_or_zero
from orchestration.reconciler.budget import RetryBudget
from orchestration.work_pools import read_pool_defaults

MIB = 2**20
STEP, LEAST = 32 * MIB, 64 * MIB
REQUEST, LIMIT = 1.15, 1.30
"""What is recommended is so much more than the median and than the most that was needed, and a multiple of `STEP`."""


@dataclass(frozen=True)
class Usage:
    """The memory of a deployment's newest runs.

    Args:
        deployment: FLOW/NAME.
        runs: how many are known, of the newest 200.
        killed: how many of them exceeded their limit.
        median: bytes that one needed; 0 if none is known, as all further ones.
        most: the most that one needed.
        request: what each gets now, as it is written; empty if nothing is.
        limit: the same.
        recommended_request: what it should get; empty if nothing is known.
        recommended_limit: the same.
    """

    deployment: str
    runs: int
    killed: int
    median: int
    most: int
    request: str
    limit: str
    recommended_request: str
    recommended_limit: str


def needed(labels: Mapping[str, Any], growth: float) -> int:
    """Bytes that a run needed; 0 if nobody knows.

    Args:
        labels: of the run.
        growth: what a limit is multiplied by after it was exceeded. One that was exceeded and never outgrown was too
            low by nobody knows how much.
    """
    peak, exceeded = (whole_number(labels.get(each)) for each in (PEAK_LABEL, EXCEEDED_LABEL))
    return peak if peak > exceeded else ceil(exceeded * growth)


def recommended(needs: Sequence[int]) -> tuple[int, int]:
    """Request and limit in bytes, of what runs needed: one at least."""
    return _rounded(median(needs) * REQUEST), _rounded(max(needs) * LIMIT)


def _rounded(size: float) -> int:
    return max(ceil(size / STEP) * STEP, LEAST)


async def report(server: Server, name: str = "") -> list[Usage]:
    """Of all deployments with a run whose memory is known, or of those of one name.

    Args:
        server: of the runs.
        name: NAME or FLOW/NAME; empty is all.

    Raises:
        ApiError: none has that name.
    """
    flow, _, own = name.rpartition("/")
    which: JSON = {"deployments": {"name": {"any_": [own]}}} if own else {}
    which |= {"flows": {"name": {"any_": [flow]}}} if flow else {}
    deployments = await server.all("/deployments/filter", **which)
    if name and not deployments:
        raise ApiError(f"There is no deployment {name} on {server.url}. `prefect deployment ls` lists them")
    flows = {each["id"]: each["name"] for each in await server.all("/flows/filter")}
    pools: dict[str, JSON] = {}
    found = []
    for each in deployments:
        pool = each["work_pool_name"]
        if pool and pool not in pools:
            pools[pool] = await read_pool_defaults(server, pool)
        variables = pools.get(pool, {}) | (each["job_variables"] or {})
        usage = await _usage(server, each["id"], f"{flows.get(each['flow_id'], '?')}/{each['name']}", variables)
        if name or usage.runs:
            found.append(usage)
    return sorted(found, key=lambda each: each.deployment)


async def _usage(server: Server, deployment: str, name: str, variables: Mapping[str, Any]) -> Usage:
    ended = {
        "deployments": {"id": {"any_": [deployment]}},
        "flow_runs": {"end_time": {"is_null_": False}},
        "sort": "END_TIME_DESC",
        "limit": PAGE,
    }
    runs = [each["labels"] or {} for each in await server.ask("POST", "/flow_runs/filter", ended, idempotent=True)]
    growth = RetryBudget.from_job_variables(variables).memory_growth
    needs = [size for each in runs if (size := needed(each, growth))]
    request, limit = recommended(needs) if needs else (0, 0)
    return Usage(
        name,
        len(needs),
        sum(bool(each.get(EXCEEDED_LABEL)) for each in runs),
        int(median(needs)) if needs else 0,
        max(needs, default=0),
        *(str(variables.get(each) or "") for each in ("memory_request", "memory_limit")),
        *(f"{each // MIB}Mi" if each else "" for each in (request, limit)),
    )


def show(found: Sequence[Usage], *, as_json: bool) -> None:
    """Print them, one a line."""
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    if not found:
        print("Of no run it is known how much memory it used: the reconciler notes it as runs end.")
        return
    table = [("DEPLOYMENT", "RUNS", "KILLED", "MEDIAN", "MAX", "REQUEST", "LIMIT", "RECOMMENDED", "")]
    for each in found:
        now = [
            f"{quantity_or_zero(size) / MIB:.0f}Mi" if quantity_or_zero(size) else "-"
            for size in (each.request, each.limit)
        ]
        seen = [f"{ceil(size / MIB)}Mi" if size else "-" for size in (each.median, each.most)]
        new = (each.recommended_request or "-", each.recommended_limit or "-")
        table.append((each.deployment, str(each.runs), str(each.killed), *seen, *now, *new))  # type: ignore[arg-type]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *rest in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
