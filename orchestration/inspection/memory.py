"""Reports how much memory the runs of a deployment use, and recommends its memory request and limit."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil
from statistics import median
from typing import Any

from orchestration.errors import ApiError
from orchestration.prefect_api import JSON, PAGE_SIZE, Server
from orchestration.protocol import EXCEEDED_LABEL, PEAK_LABEL, whole_number
from orchestration.quantity import quantity_or_zero
from orchestration.reconciler.budget import RetryBudget
from orchestration.terminal import json_text, one_line
from orchestration.work_pools import read_pool_defaults

MIB = 2**20
STEP_BYTES, MIN_BYTES = 32 * MIB, 64 * MIB
"""A recommendation is a multiple of the first number, and at least the second."""

REQUEST_FACTOR, LIMIT_FACTOR = 1.15, 1.30
"""The recommended request is the first factor times the median need; the limit is the second times the highest need."""


@dataclass(frozen=True)
class Usage:
    """The memory that a deployment's newest 200 runs used.

    Args:
        deployment: FLOW/NAME.
        runs: the number of runs whose memory is recorded.
        killed: the number of runs that exceeded their limit.
        median: the median need of a run, in bytes; 0 without a recorded run.
        most: the highest need of a run, in bytes; 0 without a recorded run.
        request: the present memory request, as a Kubernetes quantity; empty if there is none.
        limit: the present memory limit, as a Kubernetes quantity; empty if there is none.
        recommended_request: the recommended memory request; empty without a recorded run.
        recommended_limit: the recommended memory limit; empty without a recorded run.
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


def memory_need(labels: Mapping[str, Any], growth: float) -> int:
    """Return how many bytes a run needed; 0 if that is not recorded.

    Args:
        labels: the run's labels.
        growth: the factor by which a limit grows after it was exceeded. It estimates the need until a retry has used
            more than that limit.
    """
    peak, exceeded = (whole_number(labels.get(label)) for label in (PEAK_LABEL, EXCEEDED_LABEL))
    return peak if peak > exceeded else ceil(exceeded * growth)


def recommend(needs: Sequence[int]) -> tuple[int, int]:
    """Return the recommended request and limit in bytes.

    Args:
        needs: the bytes that the runs needed; at least one number.
    """
    return _round_up(median(needs) * REQUEST_FACTOR), _round_up(max(needs) * LIMIT_FACTOR)


def _round_up(size: float) -> int:
    return max(ceil(size / STEP_BYTES) * STEP_BYTES, MIN_BYTES)


async def read_usage(server: Server, name: str = "") -> list[Usage]:
    """Return the memory usage of the deployments with a name, or of all deployments with a recorded run.

    Args:
        server: the Prefect API.
        name: NAME or FLOW/NAME; empty for all deployments.

    Raises:
        ApiError: no deployment has the name.
    """
    flow, _, deployment_name = name.rpartition("/")
    query: JSON = {"deployments": {"name": {"any_": [deployment_name]}}} if deployment_name else {}
    query |= {"flows": {"name": {"any_": [flow]}}} if flow else {}
    deployments = await server.all("/deployments/filter", **query)
    if name and not deployments:
        raise ApiError(f"There is no deployment {name} on {server.url}. `prefect deployment ls` lists them")
    flows = {flow["id"]: flow["name"] for flow in await server.all("/flows/filter")}
    pools: dict[str, JSON] = {}
    usages = []
    for deployment in deployments:
        pool = deployment["work_pool_name"]
        if pool and pool not in pools:
            pools[pool] = await read_pool_defaults(server, pool)
        variables = pools.get(pool, {}) | (deployment["job_variables"] or {})
        full_name = f"{flows.get(deployment['flow_id'], '?')}/{deployment['name']}"
        usage = await _read_usage_of(server, deployment["id"], full_name, variables)
        if name or usage.runs:
            usages.append(usage)
    return sorted(usages, key=lambda usage: usage.deployment)


async def _read_usage_of(server: Server, deployment: str, name: str, variables: Mapping[str, Any]) -> Usage:
    """Return the memory usage of one deployment.

    Args:
        server: the Prefect API.
        deployment: the deployment's id.
        name: FLOW/NAME.
        variables: its job variables, with the work pool's defaults.
    """
    ended = {
        "deployments": {"id": {"any_": [deployment]}},
        "flow_runs": {"end_time": {"is_null_": False}},
        "sort": "END_TIME_DESC",
        "limit": PAGE_SIZE,
    }
    runs = [run["labels"] or {} for run in await server.ask("POST", "/flow_runs/filter", ended, idempotent=True)]
    growth = RetryBudget.from_job_variables(variables).memory_growth
    needs = [need for run in runs if (need := memory_need(run, growth))]
    request, limit = recommend(needs) if needs else (0, 0)
    return Usage(
        name,
        len(needs),
        sum(bool(run.get(EXCEEDED_LABEL)) for run in runs),
        int(median(needs)) if needs else 0,
        max(needs, default=0),
        *(str(variables.get(name) or "") for name in ("memory_request", "memory_limit")),
        *(f"{size // MIB}Mi" if size else "" for size in (request, limit)),
    )


def print_usage(usages: Sequence[Usage], *, as_json: bool) -> None:
    """Print one line for each deployment, or JSON."""
    if as_json:
        print(json_text([asdict(usage) for usage in usages]))
        return
    if not usages:
        print("No run has a record of its memory. The reconciler records the memory of a run when its pod ends.")
        return
    table = [("DEPLOYMENT", "RUNS", "KILLED", "MEDIAN", "MAX", "REQUEST", "LIMIT", "RECOMMENDED", "")]
    for usage in usages:
        present = [quantity_or_zero(quantity) for quantity in (usage.request, usage.limit)]
        table.append(
            (
                one_line(usage.deployment),
                str(usage.runs),
                str(usage.killed),
                f"{ceil(usage.median / MIB)}Mi" if usage.median else "-",
                f"{ceil(usage.most / MIB)}Mi" if usage.most else "-",
                f"{present[0] / MIB:.0f}Mi" if present[0] else "-",
                f"{present[1] / MIB:.0f}Mi" if present[1] else "-",
                usage.recommended_request or "-",
                usage.recommended_limit or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *rest in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
