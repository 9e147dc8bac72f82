"""Reference pages agree with the rendered charts."""

import re

import pytest

from docs import generate
from orchestration.settings import ROOT
from tests.helm.rendering import Object, render

LABELS = ROOT / "docs" / "reference" / "labels-and-annotations.md"


def test_rbac_page_is_current() -> None:
    assert generate.current("rbac") == generate.rbac(), "the page is not current: run make docs"


def test_verb_without_a_reason_is_refused() -> None:
    metadata = {"name": "prefect-work-pool-worker"}
    role = {
        "kind": "Role",
        "metadata": metadata,
        "rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}],
    }
    reference = {"kind": "Role", "name": metadata["name"]}
    binding = {"kind": "RoleBinding", "metadata": metadata, "roleRef": reference, "subjects": [metadata]}
    with pytest.raises(LookupError, match="worker may get secrets, and nothing says why"):
        generate._rules([role, binding])


def _keys(found: object) -> set[str]:
    """Return the keys of labels and annotations in objects and their pod templates."""
    if isinstance(found, list):
        return {key for entry in found for key in _keys(entry)}
    if not isinstance(found, dict):
        return set()
    own: set[str] = set()
    if isinstance(metadata := found.get("metadata"), dict):
        own = {*(metadata.get("labels") or {}), *(metadata.get("annotations") or {})}
    return own | {key for entry in found.values() for key in _keys(entry)}


def test_labels_page_has_all_labels_of_the_charts() -> None:
    tag: Object = {"image": {"tag": "1"}}
    objects = [manifest for chart in ("prefect-server", "prefect-work-pool") for manifest in render(chart, tag, chart)]
    named = set(re.findall(r"`([\w./-]+)`", LABELS.read_text()))
    assert sorted(_keys(objects) - named) == []
