"""Describe dbt's nodes before they run: title, asset key, relation."""

import re
from typing import Any

_SOURCE = re.compile(r"""source\(\s*['"](.+?)['"]\s*,\s*['"](.+?)['"]\s*\)""")

Json = dict[str, Any]


def describe(node: Any, manifest: Any, parents: list[str]) -> Json:
    """Return the fields of `orchestration.dbt.result.Node` that are known before the node runs.

    Args:
        node: dbt's node.
        manifest: dbt's manifest.
        parents: the ids of the nearest shown nodes above.
    """
    kind = str(node.resource_type)
    relational = kind in ("model", "seed", "snapshot")
    return {
        "id": node.unique_id,
        "name": node.name,
        "title": _title(node, manifest),
        "kind": kind,
        "path": node.original_file_path,
        "relation": getattr(node, "relation_name", None) if relational else None,
        "materialized": getattr(node.config, "materialized", None),
        "parents": parents,
        "description": (getattr(node, "description", "") or "")[:500],
        "asset": _asset_key(node, manifest) if relational else "",
        "reads": [
            _asset_key(above, manifest)
            for parent in getattr(node, "depends_on_nodes", ())
            if relational and (above := manifest.nodes.get(parent) or manifest.sources.get(parent))
            if above.relation_name and not above.is_ephemeral_model
        ],
    }


def _asset_key(node: Any, manifest: Any) -> str:
    """Return the address of a node's relation, in the form of the prefect-dbt integration."""
    name = getattr(node, "identifier", None) or node.alias
    return f"{manifest.metadata.adapter_type}://{node.database}/{node.schema}/{name}"


def _title(node: Any, manifest: Any) -> str:
    """Return the name that people read."""
    kind = str(node.resource_type)
    if kind == "source":
        return f"freshness · {node.source_name}.{node.name}"
    if kind == "unit_test":
        version = getattr(node, "version", None)
        return f"unit test · {node.model}{'' if version is None else f'.v{version}'}.{node.name}"
    if kind != "test" or not getattr(node, "test_metadata", None):
        return _versioned_name(node)
    tested = _tested_node(node, manifest)
    subject = f"{tested.source_name}.{tested.name}" if hasattr(tested, "source_name") else _versioned_name(tested)
    name = node.name if _is_named_by_project(node, tested) else node.test_metadata.name
    return f"{name} · {subject}{f'.{node.column_name}' if node.column_name else ''}"


def _tested_node(test: Any, manifest: Any) -> Any:
    """Return the node or source that a generic test tests. Of a source dbt keeps only the call."""
    if match := _SOURCE.search(str(test.test_metadata.kwargs.get("model", ""))):
        for source in manifest.sources.values():
            if (source.source_name, source.name) == match.groups() and source.unique_id in test.depends_on_nodes:
                return source
    attached = getattr(test, "attached_node", None) or next(iter(test.depends_on_nodes), "")
    return manifest.nodes.get(attached) or manifest.sources.get(attached)


def _versioned_name(node: Any) -> str:
    """Return a node's name, with the version of a versioned model."""
    version = getattr(node, "version", None)
    return f"{getattr(node, 'name', '')}{'' if version is None else f'.v{version}'}"


def _is_named_by_project(test: Any, tested: Any) -> bool:
    """Return whether the project names a generic test; otherwise dbt's name lists all arguments."""
    try:
        from dbt.parser.generic_test_builders import synthesize_generic_test_names
    except ImportError:
        return False
    metadata = test.test_metadata
    kind = f"source_{metadata.name}" if hasattr(tested, "source_name") else metadata.name
    kind = f"{metadata.namespace}_{kind}" if metadata.namespace else kind
    subject = f"{tested.source_name}_{tested.name}" if hasattr(tested, "source_name") else getattr(tested, "name", "")
    if getattr(tested, "version", None) is not None:
        subject = f"{subject}_v{tested.version}"
    arguments = {name: value for name, value in metadata.kwargs.items() if name != "model"}
    return test.name not in synthesize_generic_test_names(kind, subject, arguments)
