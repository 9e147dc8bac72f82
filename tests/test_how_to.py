"""How-to pages show values that the charts accept, and name keys that exist."""

import json
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestration.settings import ROOT

PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
CHARTS = ("prefect-server", "prefect-work-pool")


@cache
def _values(chart: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "helm" / chart / "values.yaml").read_text())
    return loaded


def _merged(default: Any, given: Any) -> Any:
    """Return `given` on top of `default`, as Helm merges values."""
    if isinstance(default, dict) and isinstance(given, dict):
        return default | {key: _merged(default.get(key), value) for key, value in given.items()}
    return given


def _shown_values(page: Path) -> Iterator[tuple[set[str], dict[str, Any]]]:
    """Yield the values that a page shows in YAML, each with the charts that have all of the first-level keys."""
    for block in re.findall(r"^ *```yaml\n(.*?)^ *```", page.read_text(), flags=re.M | re.S):
        for shown in yaml.safe_load_all(textwrap.dedent(block)):
            if not isinstance(shown, dict):
                continue
            if shown.get("kind") == "HelmRelease":
                yield {shown["spec"]["releaseName"]}, shown["spec"]["values"]
            elif charts := {chart for chart in CHARTS if set(shown) <= set(_values(chart))}:
                yield charts, shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_values_on_page_are_accepted_by_a_chart(page: Path) -> None:
    for charts, shown in _shown_values(page):
        refusals = []
        for chart in charts:
            schema = json.loads((ROOT / "helm" / chart / "values.schema.json").read_text())
            try:
                jsonschema.validate(_merged(_values(chart), shown), schema)
            except jsonschema.ValidationError as error:
                refusals.append(f"{chart}: {error.json_path}: {error.message}")
        assert len(refusals) < len(charts), refusals


def _has(values: Any, key: str) -> bool:
    """Return whether values have a dotted key, or a mapping on its path that accepts any key."""
    for name in key.split("."):
        if not isinstance(values, dict) or values == {}:
            return True
        if name not in values:
            return False
        values = values[name]
    return True


def test_move_from_prefect_helm_names_keys_that_the_charts_have() -> None:
    page = (ROOT / "docs" / "how-to" / "move-from-prefect-helm.md").read_text()
    answers = " ".join(row.split("|")[2] for row in page.splitlines() if row.startswith("| `"))
    named = set(re.findall(r"`(?!orchestration\b)([a-z]\w*(?:\.\w+)+)(?!\w*\.yaml)", answers))
    assert len(named) > 80
    assert [key for key in sorted(named) if not any(_has(_values(chart), key) for chart in CHARTS)] == []
