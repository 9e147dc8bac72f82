"""ResourceQuota and LimitRange objects of a file."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from orchestration.errors import DeploymentsError


def read(path: Path) -> list[Mapping[str, Any]]:
    """Return the ResourceQuota and LimitRange objects of a file.

    Args:
        path: YAML or JSON, as `kubectl get resourcequota,limitrange -o yaml` prints it: a List, or one object after the
            other. Objects of other kinds are skipped.

    Raises:
        DeploymentsError: the file cannot be read, or has no such object.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_text()))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DeploymentsError(f"quota file {path} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise DeploymentsError(f"quota file {path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    found = [item for item in _objects(documents, path) if item["kind"] in ("ResourceQuota", "LimitRange")]
    if not found:
        raise DeploymentsError(
            f"quota file {path} has no ResourceQuota or LimitRange. "
            "Write it with: kubectl get resourcequota,limitrange -n NAMESPACE -o yaml"
        )
    for item in found:
        if not _has_valid_spec(item):
            raise DeploymentsError(f"quota file {path}: the spec of {title(item)} is not that of a {item['kind']}")
    return found


def title(item: Mapping[str, Any]) -> str:
    """Return how messages name a ResourceQuota or LimitRange."""
    kind = "quota" if item["kind"] == "ResourceQuota" else "limit range"
    namespace = dig(item, "metadata", "namespace")
    return f"{kind} {dig(item, 'metadata', 'name')} of {f'namespace {namespace}' if namespace else 'the namespace'}"


def dig(value: Any, *keys: str) -> Any:
    """Return the value at a path of mappings, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _has_valid_spec(item: Mapping[str, Any]) -> bool:
    spec = item.get("spec") or {}
    if not isinstance(spec, Mapping):
        return False
    hard, limits = spec.get("hard") or {}, spec.get("limits") or []
    return (
        isinstance(hard, Mapping) and isinstance(limits, list) and all(isinstance(limit, Mapping) for limit in limits)
    )


def _objects(documents: Iterable[Any], path: Path) -> Iterator[Mapping[str, Any]]:
    """Yield the Kubernetes objects of documents and of the Lists in them."""
    for document in documents:
        if document is None:
            continue
        if not isinstance(document, Mapping) or not isinstance(document.get("kind"), str):
            raise DeploymentsError(f"quota file {path} has an entry that is not a Kubernetes object: it has no kind")
        kind: str = document["kind"]
        if not kind.endswith("List"):
            yield document
            continue
        # The items of a ResourceQuotaList, as the API returns it, do not repeat their kind.
        inherited = {"kind": kind.removesuffix("List")} if kind != "List" else {}
        items = document.get("items") or []
        yield from _objects(
            [{**inherited, **item} if isinstance(item, Mapping) else item or "" for item in items], path
        )
