"""The resources that the pod of a run requests, by the work pool's base job template and job variables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from orchestration.deployments.quota_file import dig
from orchestration.quantity import format_quantity, parse_quantity
from orchestration.worker.job_template import nest_dotted


@dataclass
class Container:
    """A container with the requests and limits that Kubernetes gives it.

    Args:
        name: the container's name.
        role: when it runs. A sidecar is an init container that keeps running.
        amounts: quantities by key, such as `requests.cpu`. A quantity that is unknown until the run starts has a
            placeholder.
        set_by: what sets a quantity, by key, where it is not the template itself.
        defaulted: keys of the quantities that a LimitRange gives the container.
    """

    name: str
    role: Literal["main", "init", "sidecar"]
    amounts: dict[str, str] = field(default_factory=dict)
    set_by: dict[str, str] = field(default_factory=dict)
    defaulted: set[str] = field(default_factory=set)

    def source(self, key: str) -> str:
        """Return what sets the quantity of `key`."""
        return self.set_by.get(key, f"{key} of container {self.name} in the work pool's base_job_template")

    def add_defaults(self, limit_range_items: list[Mapping[str, Any]]) -> None:
        """Add what Kubernetes gives a container: first its limits as requests, then the defaults of LimitRanges.

        Source: SetDefaults_Pod and SetDefaults_LimitRangeItem of Kubernetes.
        """
        for key in [key for key in self.amounts if key.startswith("limits.")]:
            request = key.replace("limits.", "requests.", 1)
            if request not in self.amounts:
                self.amounts[request] = self.amounts[key]
                self.set_by[request] = self.source(key)
        for item in limit_range_items:
            limits = {**(item.get("max") or {}), **(item.get("default") or {})}
            requests = {**(item.get("min") or {}), **limits, **(item.get("defaultRequest") or {})}
            for kind, amounts in (("limits", limits), ("requests", requests)):
                for resource, value in amounts.items():
                    if (key := f"{kind}.{resource}") not in self.amounts:
                        self.amounts[key] = str(value)
                        self.defaulted.add(key)


def pod_of(template: Mapping[str, Any], job_variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Container]]:
    """Fill in a base job template as the worker does.

    Args:
        template: the base_job_template of a Kubernetes work pool.
        job_variables: those of the deployment.

    Returns:
        The fields of the pod's spec that scopes of a quota look at, and the pod's containers.
    """
    from prefect.utilities.templating import apply_values

    schema = dig(template, "variables", "properties") or {}
    values = {name: variable["default"] for name, variable in schema.items() if variable.get("default") is not None}
    values |= nest_dotted(job_variables)

    spec = dig(template, "job_configuration", "job_manifest", "spec", "template", "spec")
    if not isinstance(spec, Mapping):
        return {}, []
    containers = []
    for key in ("initContainers", "containers"):
        listed = spec.get(key) or []
        # Filling in one entry at a time pairs each container with its entry. A list that is one variable is one entry.
        for entry in [listed] if isinstance(listed, str) else listed:
            for filled in _fill_in(entry, values):
                role: Literal["main", "init", "sidecar"] = "main"
                if key == "initContainers":
                    role = "sidecar" if filled.get("restartPolicy") == "Always" else "init"
                containers.append(_container(entry, filled, role))
    pod = {
        key: apply_values(spec[key], values) for key in ("priorityClassName", "activeDeadlineSeconds") if key in spec
    }
    return pod, containers


def total(containers: list[Container], key: str) -> str:
    """Return the quantity that the pod counts with, or "" if it is unknown until the run starts.

    The quantity is the sum of what runs at the same time, or that of an init container if it is greater.

    Source: Kubernetes, "Resource sharing within containers" of init and sidecar containers.
    """
    stating = [container for container in containers if key in container.amounts]
    if any(is_placeholder(container.amounts[key]) for container in stating):
        return ""
    if len(stating) == 1:
        return stating[0].amounts[key]
    sidecars = peak = main = Decimal(0)
    for container in stating:
        amount = parse_quantity(container.amounts[key])
        if container.role == "main":
            main += amount
        elif container.role == "sidecar":
            sidecars += amount
        else:
            peak = max(peak, sidecars + amount)
    return format_quantity(max(main + sidecars, peak), key)


def sources(containers: list[Container], key: str) -> str:
    """Return what sets the pod's total of `key`, the greatest part first."""
    stating = [container for container in containers if key in container.amounts] or containers[-1:]
    known = [c for c in stating if not is_placeholder(c.amounts.get(key, "0"))] or stating
    known.sort(key=lambda container: -parse_quantity(container.amounts.get(key, "0")))
    return " or ".join(dict.fromkeys(container.source(key) for container in known))


def _fill_in(entry: Any, values: dict[str, Any]) -> list[Mapping[str, Any]]:
    """Return the containers that one entry of the template becomes."""
    from prefect.utilities.templating import apply_values

    filled = [item for item in apply_values([entry], values) if item]
    flat = [inner for item in filled for inner in (item if isinstance(item, list) else [item])]
    return [item for item in flat if isinstance(item, Mapping)]


def _container(entry: Any, filled: Mapping[str, Any], role: Literal["main", "init", "sidecar"]) -> Container:
    from prefect.utilities.templating import find_placeholders

    container = Container(str(filled.get("name")), role)
    for kind in ("requests", "limits"):
        stated = dig(filled, "resources", kind) or {}
        for resource, value in stated.items():
            if value is not None:
                container.amounts[f"{kind}.{resource}"] = str(value)
        for resource in {"cpu", "memory", *stated}:
            step = entry
            for key in ("resources", kind, resource):
                step = step.get(key) if isinstance(step, Mapping) else step
            names = sorted(variable.name for variable in find_placeholders(step)) if isinstance(step, str) else []
            if names:
                container.set_by[f"{kind}.{resource}"] = " and ".join(f"job_variables.{name}" for name in names)
    return container


def is_placeholder(text: str) -> bool:
    """Return whether a quantity has a placeholder, so that its value is unknown until the run starts."""
    return "{{" in text


def is_quantity(text: str) -> bool:
    """Return whether the text is a quantity or has a placeholder."""
    if is_placeholder(text):
        return True
    try:
        parse_quantity(text)
    except ValueError:
        return False
    return True


def exceeds(amount: Any, bound: Any) -> bool:
    """Return whether a quantity is greater than another; False if either has a placeholder."""
    return not is_placeholder(f"{amount}{bound}") and parse_quantity(str(amount)) > parse_quantity(str(bound))
