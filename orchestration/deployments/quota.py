"""Check whether the pod of a run fits the ResourceQuota and LimitRange objects of its namespace.

Kubernetes refuses a pod that does not fit when the run starts, each time. This check finds it before the deploy.
"""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from orchestration.deployments.pod_resources import Container, exceeds, is_quantity, pod_of, sources, total
from orchestration.deployments.quota_file import dig, title
from orchestration.errors import DeploymentsError
from orchestration.quantity import parse_quantity

DEMANDED = frozenset({"cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"})
"""Keys of a quota that every container must state if the quota counts them."""


def find_problems(
    template: Mapping[str, Any], job_variables: Mapping[str, Any], quotas: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Return why the pod of a run does not fit its namespace, a sentence with the cure for each cause.

    The check looks at one pod alone: other pods may leave it less. It ignores the maxLimitRequestRatio of a LimitRange.

    Args:
        template: the base_job_template of a Kubernetes work pool.
        job_variables: those of the deployment.
        quotas: the namespace's ResourceQuota and LimitRange objects, as :func:`quota_file.read` returns them.

    Raises:
        DeploymentsError: a ResourceQuota or LimitRange has a value that is not a quantity.
    """
    pod, containers = pod_of(template, job_variables)
    ranges = [(quota, item) for quota in quotas if quota["kind"] == "LimitRange" for item in _limits(quota)]
    invalid = [
        f"container {container.name} has {key} {value!r}, which is not a quantity. Write one such as "
        f"{'500m' if key.endswith('cpu') else '2Gi'} for {container.source(key)}"
        for container in containers
        for key, value in container.amounts.items()
        if not is_quantity(value)
    ]
    if invalid or not containers:
        return invalid
    for limit_range, item in ranges:
        for bound in ("max", "min", "default", "defaultRequest"):
            for value in (item.get(bound) or {}).values():
                _parse(value, limit_range)
    for container in containers:
        container.add_defaults([item for _, item in ranges if item.get("type") == "Container"])
    found = [problem for container in containers for problem in _requests_above_limits(container)]
    for limit_range, item in ranges:
        found += _outside_limit_range(containers, limit_range, item)
    for quota in quotas:
        if quota["kind"] == "ResourceQuota" and _is_counted(quota, pod, containers):
            found += _over_quota(containers, quota)
    return list(dict.fromkeys(found))


def count_runs(template: Mapping[str, Any], quotas: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """Return how many runs without job variables of their own the quotas hold at the same time.

    Args:
        template: the base_job_template of a Kubernetes work pool.
        quotas: the namespace's ResourceQuota and LimitRange objects.

    Returns:
        The number of runs, and how messages name the quota that allows no more; None if no quota counts runs.

    Raises:
        DeploymentsError: a ResourceQuota or LimitRange has a value that is not a quantity.
    """
    pod, containers = pod_of(template, {})
    items = [item for quota in quotas if quota["kind"] == "LimitRange" for item in _limits(quota)]
    for container in containers:
        container.add_defaults([item for item in items if item.get("type") == "Container"])
    found = []
    for quota in quotas:
        if quota["kind"] != "ResourceQuota" or not _is_counted(quota, pod, containers):
            continue
        for key, hard in _hard(quota).items():
            if key in ("pods", "count/pods"):
                amount = "1"
            else:
                amount = total(containers, key if key.startswith(("requests.", "limits.")) else f"requests.{key}")
            if amount and is_quantity(amount) and parse_quantity(amount):
                found.append((int(_parse(hard, quota) // parse_quantity(amount)), title(quota)))
    return min(found, default=None)


def _requests_above_limits(container: Container) -> Iterator[str]:
    """Yield the requests above their limit: the API server refuses the pod, whatever the quota."""
    for key, value in container.amounts.items():
        limit_key = key.replace("requests.", "limits.", 1)
        limit = container.amounts.get(limit_key)
        if key.startswith("requests.") and limit and exceeds(value, limit):
            origin = "that a LimitRange gives the container" if limit_key in container.defaulted else "that it states"
            yield (
                f"container {container.name} requests {key.partition('.')[2]} {value} ({key}), more than the "
                f"{limit_key} {limit} {origin}. Lower {container.source(key)} or raise {container.source(limit_key)}"
            )


def _outside_limit_range(
    containers: list[Container], limit_range: Mapping[str, Any], item: Mapping[str, Any]
) -> Iterator[str]:
    """Yield what a LimitRange refuses: a container, or the pod in total, below its min or above its max."""
    name = title(limit_range)
    if item.get("type") == "Container":
        units = [(f"container {container.name}", "container", [container]) for container in containers]
    elif item.get("type") == "Pod":
        units = [("the pod of a run", "pod", containers)]
    else:
        return
    for subject, unit, parts in units:
        for bound, kinds in (("max", ("limits", "requests")), ("min", ("requests", "limits"))):
            for resource, value in (item.get(bound) or {}).items():
                demanded = f"{kinds[0]}.{resource}"
                if not any(demanded in part.amounts for part in parts):
                    yield (
                        f"{subject} has no {demanded}, but {name} demands one ({bound} {value} per {unit}). "
                        f"Set {sources(parts, demanded)}"
                    )
                    continue
                verb, rule = ("Lower", "allows at most") if bound == "max" else ("Raise", "demands at least")
                for key in (f"{kind}.{resource}" for kind in kinds):
                    amount = total(parts, key)
                    greater, smaller = (amount, value) if bound == "max" else (value, amount)
                    if amount and exceeds(greater, smaller):
                        yield (
                            f"{subject} requests {resource} {amount} ({key}), but {name} {rule} {value} per {unit}. "
                            f"{verb} {sources(parts, key)}"
                        )
                        break  # the request that came from the limit has the same cause


def _over_quota(containers: list[Container], quota: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a ResourceQuota refuses of a pod that it counts, even if there is no other pod."""
    name = title(quota)
    for key, hard in _hard(quota).items():
        if key in ("pods", "count/pods", "count/jobs.batch"):
            if _parse(hard, quota) < 1:
                yield f"{name} allows no run ({key}: {hard}). Raise it to 1 or more"
            continue
        counted = key if key.startswith(("requests.", "limits.")) else f"requests.{key}"
        for container in containers:
            if key in DEMANDED and counted not in container.amounts:
                yield (
                    f"{name} demands {counted}, but container {container.name} states none. "
                    f"Set {container.source(counted)}, or a default in a LimitRange"
                )
        if any(counted in container.amounts for container in containers):
            _parse(hard, quota)
            amount, resource = total(containers, counted), counted.partition(".")[2]
            if amount and exceeds(amount, hard):
                yield (
                    f"the pod of a run requests {resource} {amount} ({counted}), but {name} allows {hard} in total. "
                    f"Lower {sources(containers, counted)}"
                )


def _is_counted(quota: Mapping[str, Any], pod: Mapping[str, Any], containers: list[Container]) -> bool:
    """Return whether a ResourceQuota counts the pod, by the quota's scopes."""
    spec = quota.get("spec") or {}
    selectors = [{"scopeName": scope} for scope in spec.get("scopes") or []]
    selectors += dig(spec, "scopeSelector", "matchExpressions") or []
    priority = str(pod.get("priorityClassName") or "")
    best_effort = not any(key.endswith((".cpu", ".memory")) for item in containers for key in item.amounts)
    terminating = pod.get("activeDeadlineSeconds") is not None
    scopes = {
        "Terminating": terminating,
        "NotTerminating": not terminating,
        "BestEffort": best_effort,
        "NotBestEffort": not best_effort,
    }
    for selector in selectors:
        listed = priority in (selector.get("values") or [])
        by_operator = {"In": listed, "NotIn": not listed, "DoesNotExist": not priority}
        scopes["PriorityClass"] = by_operator.get(selector.get("operator", "Exists"), bool(priority))
        if not scopes.get(selector["scopeName"], False):
            return False
    return True


def _parse(value: Any, quota: Mapping[str, Any]) -> Decimal:
    """Return a quantity of a ResourceQuota or LimitRange as a number."""
    try:
        return parse_quantity(str(value))
    except ValueError:
        raise DeploymentsError(f"{title(quota)} has {value!r}, which is not a quantity. Correct it") from None


def _limits(limit_range: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    limits: list[Mapping[str, Any]] = dig(limit_range, "spec", "limits") or []
    return limits


def _hard(quota: Mapping[str, Any]) -> Mapping[str, Any]:
    hard: Mapping[str, Any] = dig(quota, "spec", "hard") or {}
    return hard
