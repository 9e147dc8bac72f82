"""Whether a run's pod fits the ResourceQuota and LimitRange objects of its namespace.

A pod that does not fit is refused by Kubernetes each time, after the run was scheduled: nobody sees it before.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import yaml

from orchestration.errors import DeploymentsError
from orchestration.quantity import BINARY_SUFFIXES, parse_quantity
from orchestration.worker.job_template import nested

DEMANDED = frozenset({"cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"})
"""What every container must state if a quota counts it."""


def read(path: Path) -> list[Mapping[str, Any]]:
    """The ResourceQuota and LimitRange objects of a file, as `kubectl get resourcequota,limitrange -o yaml` gives them.

    Args:
        path: YAML or JSON: a List, or objects one after the other. Objects of other kinds are left out.

    Raises:
        DeploymentsError: it cannot be read, or has none of them.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DeploymentsError(f"quota file {path} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise DeploymentsError(f"quota file {path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    found = [each for each in _objects(documents, path) if each["kind"] in ("ResourceQuota", "LimitRange")]
    if not found:
        raise DeploymentsError(
            f"quota file {path} has no ResourceQuota or LimitRange: "
            "write it by kubectl get resourcequota,limitrange -n NAMESPACE -o yaml"
        )
    for each in found:
        spec = each.get("spec") or {}
        hard, bounds = (
            (_at(spec, "hard") or {}, _at(spec, "limits") or []) if isinstance(spec, Mapping) else (None, None)
        )
        right = isinstance(hard, Mapping) and isinstance(bounds, list) and all(isinstance(b, Mapping) for b in bounds)
        if not right:
            raise DeploymentsError(f"quota file {path}: the spec of {_named(each)} is not that of a {each['kind']}")
    return found


def _objects(documents: Iterable[Any], path: Path) -> Iterator[Mapping[str, Any]]:
    """Kubernetes objects of documents and of the lists in them."""
    for document in documents:
        if document is None:
            continue
        if not isinstance(document, Mapping) or not isinstance(document.get("kind"), str):
            raise DeploymentsError(f"quota file {path} has something that is no Kubernetes object: it has no kind")
        kind: str = document["kind"]
        if not kind.endswith("List"):
            yield document
            continue
        # The items of a ResourceQuotaList, as the API gives it, do not repeat their kind.
        of_list = {"kind": kind.removesuffix("List")} if kind != "List" else {}
        items = document.get("items") or []
        yield from _objects([{**of_list, **item} if isinstance(item, Mapping) else item or "" for item in items], path)


@dataclass
class _Container:
    """A container with what Kubernetes makes of its resources.

    Args:
        name: its own.
        role: when it runs; a sidecar is an init container that goes on.
        amounts: quantities by "requests.cpu" and the like; one that is only known when the run starts has {{ in it.
        set_by: what to change them by.
        defaulted: which of them a LimitRange gave it.
    """

    name: str
    role: Literal["main", "init", "sidecar"]
    amounts: dict[str, str] = field(default_factory=dict)
    set_by: dict[str, str] = field(default_factory=dict)
    defaulted: set[str] = field(default_factory=set)

    def cure(self, key: str) -> str:
        """What sets the quantity of `key`."""
        return self.set_by.get(key, f"{key} of container {self.name} in the work pool's base_job_template")


def problems(
    template: Mapping[str, Any], job_variables: Mapping[str, Any], quotas: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Why a run's pod does not fit its namespace, a sentence each with the cure.

    The pod is taken alone: other pods may leave it less. A LimitRange's maxLimitRequestRatio is not looked at.

    Args:
        template: the base_job_template of a Kubernetes work pool.
        job_variables: the deployment's.
        quotas: the namespace's, of :func:`read`.

    Raises:
        DeploymentsError: a quantity of a quota is none.
    """
    pod, containers = _pod(template, job_variables)
    ranges = [(each, item) for each in quotas if each["kind"] == "LimitRange" for item in _limits(each)]
    unreadable = [
        f"container {each.name} has {key} {value!r}, which is no quantity: write one such as "
        f"{'500m' if key.endswith('cpu') else '2Gi'} for {each.cure(key)}"
        for each in containers
        for key, value in each.amounts.items()
        if not _is_quantity(value)
    ]
    if unreadable or not containers:
        return unreadable
    for each, item in ranges:
        for bound in ("max", "min", "default", "defaultRequest"):
            for value in (item.get(bound) or {}).values():
                _known(value, each)
    for container in containers:
        _add_defaults(container, [item for _, item in ranges if item.get("type") == "Container"])
    found = [problem for container in containers for problem in _over_its_limit(container)]
    for each, item in ranges:
        found += _outside(containers, each, item)
    for each in quotas:
        if each["kind"] == "ResourceQuota" and _counts(each, pod, containers):
            found += _over_quota(containers, each)
    return list(dict.fromkeys(found))


def _pod(template: Mapping[str, Any], job_variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[_Container]]:
    """The pod's spec and its containers, of the template filled in as the worker does."""
    from prefect.utilities.templating import apply_values

    schema = _at(template, "variables", "properties") or {}
    values = {name: each["default"] for name, each in schema.items() if each.get("default") is not None}
    values |= nested(job_variables)

    spec = _at(template, "job_configuration", "job_manifest", "spec", "template", "spec")
    if not isinstance(spec, Mapping):
        return {}, []
    containers = []
    for key in ("initContainers", "containers"):
        listed = spec.get(key) or []
        # Each by itself keeps it beside what it is made of; a list that is one variable is made of that.
        pairs = [
            (raw, made) for raw in ([listed] if isinstance(listed, str) else listed) for made in _made(raw, values)
        ]
        for raw, made in pairs:
            role: Literal["main", "init", "sidecar"] = "main"
            if key == "initContainers":
                role = "sidecar" if made.get("restartPolicy") == "Always" else "init"
            containers.append(_container(raw, made, role))
    pod = {
        key: apply_values(spec[key], values) for key in ("priorityClassName", "activeDeadlineSeconds") if key in spec
    }
    return pod, containers


def _made(raw: Any, values: dict[str, Any]) -> list[Mapping[str, Any]]:
    """The containers that one entry of the template becomes."""
    from prefect.utilities.templating import apply_values

    made = [each for each in apply_values([raw], values) if each]
    flat = [inner for each in made for inner in (each if isinstance(each, list) else [each])]
    return [each for each in flat if isinstance(each, Mapping)]


def _container(raw: Any, made: Mapping[str, Any], role: Literal["main", "init", "sidecar"]) -> _Container:
    from prefect.utilities.templating import find_placeholders

    container = _Container(str(made.get("name")), role)
    for kind in ("requests", "limits"):
        stated = _at(made, "resources", kind) or {}
        for resource, value in stated.items():
            if value is not None:
                container.amounts[f"{kind}.{resource}"] = str(value)
        for resource in {"cpu", "memory", *stated}:
            step = raw
            for key in ("resources", kind, resource):
                step = step.get(key) if isinstance(step, Mapping) else step
            names = sorted(each.name for each in find_placeholders(step)) if isinstance(step, str) else []
            if names:
                container.set_by[f"{kind}.{resource}"] = " and ".join(f"job_variables.{name}" for name in names)
    return container


def _add_defaults(container: _Container, items: list[Mapping[str, Any]]) -> None:
    """What a container that states less is given: first its limits as requests, then what a LimitRange has.

    Source: SetDefaults_Pod and SetDefaults_LimitRangeItem of Kubernetes.
    """
    for key in [key for key in container.amounts if key.startswith("limits.")]:
        request = key.replace("limits.", "requests.", 1)
        if request not in container.amounts:
            container.amounts[request] = container.amounts[key]
            container.set_by[request] = container.cure(key)
    for item in items:
        limits = {**(item.get("max") or {}), **(item.get("default") or {})}
        requests = {**(item.get("min") or {}), **limits, **(item.get("defaultRequest") or {})}
        for kind, amounts in (("limits", limits), ("requests", requests)):
            for resource, value in amounts.items():
                if (key := f"{kind}.{resource}") not in container.amounts:
                    container.amounts[key] = str(value)
                    container.defaulted.add(key)


def _over_its_limit(container: _Container) -> Iterator[str]:
    """Requests above their limit: the API server refuses the pod, whatever the quota."""
    for key, value in container.amounts.items():
        limited = key.replace("requests.", "limits.", 1)
        limit = container.amounts.get(limited)
        if key.startswith("requests.") and limit and _more(value, limit):
            whose = "that a LimitRange gives it" if limited in container.defaulted else "of its own"
            yield (
                f"container {container.name} asks for {key.partition('.')[2]} {value} ({key}), more than the {limited} "
                f"{limit} {whose}: lower {container.cure(key)} or raise {container.cure(limited)}"
            )


def _outside(containers: list[_Container], each: Mapping[str, Any], item: Mapping[str, Any]) -> Iterator[str]:
    """What a LimitRange refuses: each container, or the pod in all, below its min or above its max."""
    name = _named(each)
    if item.get("type") == "Container":
        units = [(f"container {container.name}", "container", [container]) for container in containers]
    elif item.get("type") == "Pod":
        units = [("a run", "pod", containers)]
    else:
        return
    for what, unit, parts in units:
        for bound, kinds in (("max", ("limits", "requests")), ("min", ("requests", "limits"))):
            for resource, value in (item.get(bound) or {}).items():
                demanded = f"{kinds[0]}.{resource}"
                if not any(demanded in part.amounts for part in parts):
                    yield (
                        f"{what} states no {demanded} and {name} demands one ({bound} {value} a {unit}): "
                        f"set {_cure(parts, demanded)}"
                    )
                    continue
                verb, says = ("lower", "allows at most") if bound == "max" else ("raise", "demands at least")
                for key in (f"{kind}.{resource}" for kind in kinds):
                    total = _total(parts, key)
                    if total and (_more(total, value) if bound == "max" else _more(value, total)):
                        yield (
                            f"{what} asks for {resource} {total} ({key}) and {name} {says} {value} a {unit}: "
                            f"{verb} {_cure(parts, key)}"
                        )
                        break  # the request that came from the limit has the same cause


def _over_quota(containers: list[_Container], each: Mapping[str, Any]) -> Iterator[str]:
    """What a ResourceQuota refuses of a pod that it counts, even if there is no other."""
    name = _named(each)
    for key, hard in _hard(each).items():
        if key in ("pods", "count/pods", "count/jobs.batch"):
            if _known(hard, each) < 1:
                yield f"{name} allows no run ({key}: {hard}): raise it to 1 or more"
            continue
        counted = key if key.startswith(("requests.", "limits.")) else f"requests.{key}"
        for container in containers:
            if key in DEMANDED and counted not in container.amounts:
                yield (
                    f"{name} demands {counted} and container {container.name} states none: "
                    f"set {container.cure(counted)}, or a default in a LimitRange"
                )
        if any(counted in container.amounts for container in containers):
            _known(hard, each)
            total, resource = _total(containers, counted), counted.partition(".")[2]
            if total and _more(total, hard):
                yield (
                    f"a run asks for {resource} {total} ({counted}) and {name} allows {hard} in all: "
                    f"lower {_cure(containers, counted)}"
                )


def _counts(each: Mapping[str, Any], pod: Mapping[str, Any], containers: list[_Container]) -> bool:
    """Whether a quota counts the pod, by its scopes."""
    spec = each.get("spec") or {}
    selectors = [{"scopeName": scope} for scope in spec.get("scopes") or []]
    selectors += _at(spec, "scopeSelector", "matchExpressions") or []
    priority = str(pod.get("priorityClassName") or "")
    best_effort = not any(key.endswith((".cpu", ".memory")) for each in containers for key in each.amounts)
    terminating = pod.get("activeDeadlineSeconds") is not None
    scopes = {
        "Terminating": terminating,
        "NotTerminating": not terminating,
        "BestEffort": best_effort,
        "NotBestEffort": not best_effort,
    }
    for selector in selectors:
        listed = priority in (selector.get("values") or [])
        of_class = {"In": listed, "NotIn": not listed, "DoesNotExist": not priority}
        scopes["PriorityClass"] = of_class.get(selector.get("operator", "Exists"), bool(priority))
        if not scopes.get(selector["scopeName"], False):
            return False
    return True


def _total(containers: list[_Container], key: str) -> str:
    """What a pod counts with: what runs together, or more if an init container needs more before. "" if not known.

    Source: Kubernetes, "Resource sharing within containers" of init and sidecar containers.
    """
    stated = [container for container in containers if key in container.amounts]
    if len(stated) == 1:
        return "" if "{{" in stated[0].amounts[key] else stated[0].amounts[key]
    if any("{{" in container.amounts[key] for container in stated):
        return ""
    sidecars = peak = main = Decimal(0)
    for container in stated:
        amount = parse_quantity(container.amounts[key])
        if container.role == "main":
            main += amount
        elif container.role == "sidecar":
            sidecars += amount
        else:
            peak = max(peak, sidecars + amount)
    return _text(max(main + sidecars, peak), key)


def _text(amount: Decimal, key: str) -> str:
    """A quantity as people write it."""
    if key.endswith(".cpu") and amount % 1:
        return f"{(amount * 1000).normalize():f}m"
    power = 0
    if key.endswith(("memory", "ephemeral-storage")):
        while amount and amount % 1024 == 0 and power + 1 < len(BINARY_SUFFIXES):
            amount, power = amount / 1024, power + 1
    return f"{amount:f}{BINARY_SUFFIXES[power]}"


def _cure(containers: list[_Container], key: str) -> str:
    """What to change for the pod's total of `key`: the greatest part first."""
    stating = [container for container in containers if key in container.amounts] or containers[-1:]
    known = [container for container in stating if "{{" not in container.amounts.get(key, "0")] or stating
    known.sort(key=lambda container: -parse_quantity(container.amounts.get(key, "0")))
    return " or ".join(dict.fromkeys(container.cure(key) for container in known))


def _more(one: Any, other: Any) -> bool:
    """Whether a quantity is more than another; not if either is only known when the run starts."""
    return "{{" not in f"{one}{other}" and parse_quantity(str(one)) > parse_quantity(str(other))


def _is_quantity(value: str) -> bool:
    if "{{" in value:
        return True
    try:
        parse_quantity(value)
    except ValueError:
        return False
    return True


def _known(value: Any, each: Mapping[str, Any]) -> Decimal:
    """A quantity of the namespace's own."""
    try:
        return parse_quantity(str(value))
    except ValueError:
        raise DeploymentsError(f"{_named(each)} has {value!r}, which is no quantity: correct it") from None


def _limits(each: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    limits: list[Mapping[str, Any]] = _at(each, "spec", "limits") or []
    return limits


def _hard(each: Mapping[str, Any]) -> Mapping[str, Any]:
    hard: Mapping[str, Any] = _at(each, "spec", "hard") or {}
    return hard


def _named(each: Mapping[str, Any]) -> str:
    kind = "quota" if each["kind"] == "ResourceQuota" else "limit range"
    namespace = _at(each, "metadata", "namespace")
    return f"{kind} {_at(each, 'metadata', 'name')} of {f'namespace {namespace}' if namespace else 'the namespace'}"


def _at(value: Any, *keys: str) -> Any:
    """What is at a path of mappings; None if there is nothing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value
