"""The dbt projects of the tests have the promised nodes and outcomes."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.orchestration.dbt.conftest import Built
from tests.orchestration.dbt.projects import FAULTS, FUNCTIONS, NODES, OUTCOMES, every_kind, fast, hold, random_dag


def test_clean_build_has_the_expected_outcomes(built: Built) -> None:
    assert Counter((node.split(".")[0], status) for node, status in built.results.items()) == OUTCOMES
    assert len(built.results) == NODES
    warned = sorted(unique_id.split(".")[2] for unique_id, status in built.results.items() if status == "warn")
    assert warned == ["only_germans", "open_orders"]


def test_every_resource_type_is_in_the_project(built: Built) -> None:
    manifest: dict[str, Any] = json.loads((built.folder / "target" / "manifest.json").read_text())
    own = [
        resource
        for section in manifest.values()
        for resource in (section.values() if isinstance(section, dict) else ())
        if isinstance(resource, dict) and resource.get("package_name") == "shop"
    ]
    assert {resource["resource_type"] for resource in own} == {
        "analysis", "doc", "exposure", *(["function"] * FUNCTIONS), "group", "macro", "metric", "model", "operation",
        "saved_query", "seed", "semantic_model", "snapshot", "source", "test", "unit_test",
    }  # fmt: skip
    models = [resource for resource in own if resource["resource_type"] == "model"]
    assert {model["config"]["materialized"] for model in models} == {
        "ephemeral", "incremental", "materialized_view", "table", "view",
    }  # fmt: skip
    assert {model["config"]["incremental_strategy"] for model in models} == {
        None, "append", "delete+insert", "merge", "microbatch",
    }  # fmt: skip
    assert {model["version"] for model in models} == {None, 1, 2}
    assert [model["name"] for model in models if model["config"]["contract"]["enforced"]] == ["customer_totals"]
    assert list(manifest["disabled"]) == ["model.shop.retired"]
    # Only nodes that run have a result: not an ephemeral model, an analysis or a source.
    executed = {resource["unique_id"] for resource in own} & set(built.results)
    assert executed == set(built.results)


def test_tables_of_a_build_can_be_compared(built: Built) -> None:
    assert built.tables["analytics.large_countries"] == [("DE", 2)]
    assert built.tables["analytics.customer_history"][0] == (1, "Ada", "gold")
    assert built.tables["analytics.visits"][0] == (1, 2)
    assert built.tables["analytics.revenue_by_day"]


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_edits_one_file(fault: str, tmp_path: Path) -> None:
    before = _files(every_kind(tmp_path))
    FAULTS[fault].inject(tmp_path)
    assert [name for name, content in _files(tmp_path).items() if content != before[name]] == [FAULTS[fault].file]


def _files(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*.*")}


def _rng(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - the same each time


def test_same_seed_gives_the_same_random_graph(tmp_path: Path) -> None:
    one, same, other = (
        _files(random_dag(tmp_path / name, _rng(seed), 30)) for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("nodes", [20, 300, 1000])
def test_fast_project_has_the_requested_nodes(tmp_path: Path, nodes: int) -> None:
    files = _files(fast(tmp_path / "fast", nodes))
    models = json.loads(files["models/models.yml"])["models"]
    tests = [test for model in models for column in model["columns"] for test in column["data_tests"]]
    assert len(models) + len(tests) == nodes
    assert len(models) == len([name for name in files if name.endswith(".sql")]) == nodes // 3
    parents = [content.count("ref(") for name, content in files.items() if name.endswith(".sql")]
    assert max(parents) == 4 if nodes > 20 else max(parents) > 0


def test_model_is_held_and_released(tmp_path: Path) -> None:
    project = fast(tmp_path / "fast", 20)
    before = _files(project)
    hold(project, "amber_0", 0.5)
    assert [name for name, content in _files(project).items() if content != before[name]] == ["models/amber_0.sql"]
    hold(project, "amber_0", 0)
    assert _files(project) == before
