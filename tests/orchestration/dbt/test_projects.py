"""The projects that tests use are what they say, by dbt's own command line."""

import functools
import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from orchestration import warehouse
from tests.orchestration.dbt.projects import (
    FAULTS,
    NODES,
    OUTCOMES,
    Failure,
    command_line,
    every_kind,
    fast,
    hold,
    random_dag,
    tables,
)
from tests.parts import Query, new_database, rows_of

FAILED = {"error", "fail", "runtime error", "partial success"}


class Clean(NamedTuple):
    """A clean build of `every_kind`."""

    status: int
    results: dict[str, str]
    target: Path
    environment: Mapping[str, str]
    query: Query


@pytest.fixture(scope="module")
def clean(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clean]:
    """That build, in a database that stays for the faults."""
    target = tmp_path_factory.mktemp("target")
    project = every_kind(tmp_path_factory.mktemp("clean"))
    with new_database(postgres) as url:
        environment = warehouse.environment()
        status, results = command_line(project, "build", environment=environment, target=target)
        yield Clean(status, results, target, environment, functools.partial(rows_of, url))


def _kinds(results: Mapping[str, str]) -> Counter[tuple[str, str]]:
    return Counter((unique_id.split(".")[0], status) for unique_id, status in results.items())


def test_a_clean_build_ends_as_it_says(clean: Clean) -> None:
    assert clean.status == 0
    assert _kinds(clean.results) == OUTCOMES
    assert len(clean.results) == NODES
    warned = sorted(unique_id.split(".")[2] for unique_id, status in clean.results.items() if status == "warn")
    assert warned == ["only_germans", "open_orders"]


def test_every_resource_type_is_in_the_project(clean: Clean) -> None:
    manifest: dict[str, Any] = json.loads((clean.target / "manifest.json").read_text())
    own = [
        resource
        for section in manifest.values()
        for resource in (section.values() if isinstance(section, dict) else ())
        if isinstance(resource, dict) and resource.get("package_name") == "shop"
    ]
    assert {resource["resource_type"] for resource in own} == {
        "analysis", "doc", "exposure", "function", "group", "macro", "metric", "model", "operation",
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
    # Only the nodes that run have a result: an ephemeral model has none, nor have an analysis and a source.
    executed = {resource["unique_id"] for resource in own} & set(clean.results)
    assert executed == set(clean.results)


def test_what_a_build_left_can_be_compared(clean: Clean) -> None:
    found = tables(clean.query)
    assert found["analytics.large_countries"] == [("DE", 2)]
    assert found["analytics.customer_history"][0] == (1, "Ada", "gold")
    assert found["analytics.visits"][0] == (1, 2)
    assert found["analytics.revenue_by_day"]


Results = tuple[Failure, int, dict[str, str]]


def _meet(fault: str, folder: Path, clean: Clean) -> Results:
    failure = FAULTS[fault](every_kind(folder / fault))
    arguments = list(failure.command)
    if arguments == ["build"] and failure.node:
        kind, _, *names = failure.node.split(".")
        # Hooks run whatever is selected, and of a unit test's name the first part is its model's.
        name = {"operation": "days", "unit_test": names[0]}.get(kind, names[0])
        arguments += ["--select", name if kind == "test" else f"{name}+"]
    target = folder / f"target of {fault}"
    target.mkdir()
    shutil.copy(clean.target / "partial_parse.msgpack", target)
    return failure, *command_line(folder / fault, *arguments, environment=clean.environment, target=target)


@pytest.fixture(scope="module")
def met(request: pytest.FixtureRequest, clean: Clean, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What dbt says of each fault that is asked for; two at a time, as dbt takes seconds to start."""
    asked = [item.callspec.params.get("fault") for item in request.session.items if hasattr(item, "callspec")]
    folder = tmp_path_factory.mktemp("faults")
    with ThreadPoolExecutor(2) as pool:
        yield {fault: pool.submit(_meet, fault, folder, clean) for fault in FAULTS if fault in asked}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_node_and_no_other(met: dict[str, Future[Results]], fault: str) -> None:
    failure, status, results = met[fault].result()
    failed = {unique_id: status for unique_id, status in results.items() if status in FAILED}
    recorded = {failure.node: failure.status} if failure.node and failure.recorded else {}
    assert failed == recorded
    # dbt's 2: it did not get as far as the nodes.
    assert status == (1 if failure.node else 2)


def _files(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*.*")}


def _rng(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - the same each time


def test_a_random_graph_is_its_rngs(tmp_path: Path) -> None:
    one, same, other = (
        _files(random_dag(tmp_path / name, _rng(seed), 30)) for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert one == same
    assert one != other


def test_a_random_graph_has_all_outcomes(tmp_path: Path, database: str) -> None:
    project = random_dag(tmp_path / "random", _rng(3), 40)
    status, results = command_line(project, "build", environment=warehouse.environment())
    assert status == 1
    assert {outcome for _, outcome in _kinds(results)} == {"success", "error", "skipped", "pass", "fail", "warn"}
    assert _kinds(results)["model", "success"] >= 10


@pytest.mark.parametrize("nodes", [20, 300, 1000])
def test_the_fast_project_has_its_size(tmp_path: Path, nodes: int) -> None:
    files = _files(fast(tmp_path / "fast", nodes))
    models = json.loads(files["models/models.yml"])["models"]
    tests = [test for model in models for column in model["columns"] for test in column["data_tests"]]
    assert len(models) + len(tests) == nodes
    assert len(models) == len([name for name in files if name.endswith(".sql")]) == nodes // 3
    parents = [content.count("ref(") for name, content in files.items() if name.endswith(".sql")]
    assert max(parents) == 4 if nodes > 20 else max(parents) > 0


def test_the_fast_project_builds_and_a_model_is_held(tmp_path: Path, database: str) -> None:
    project = fast(tmp_path / "fast", 20)
    before = _files(project)
    hold(project, "amber_0", 0.5)
    status, results = command_line(project, "build", environment=warehouse.environment(), target=tmp_path)
    assert status == 0
    assert _kinds(results) == {("model", "success"): 6, ("test", "pass"): 14}
    taken = {
        result["unique_id"]: result["execution_time"]
        for result in json.loads((tmp_path / "run_results.json").read_text())["results"]
    }
    assert taken["model.fast.amber_0"] >= 0.5
    hold(project, "amber_0", 0)
    assert _files(project) == before
