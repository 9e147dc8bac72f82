"""The committed results belong to this content and are complete."""

import re
from collections.abc import Callable
from pathlib import Path

from orchestration.settings import ROOT
from tests.checkout_files import NOT_IGNORED, list_files
from tests.long import results
from tests.long.catalogue import CHART_VALUES, LONG_TESTS, PROPERTIES
from tests.long.longtest import files
from tests.reporting import NOTE
from tests.selection import RECORDS, Checkout

PATHS = sorted({path.partition("#")[0] for test in LONG_TESTS for path in test.paths})


UNRECORDED = {
    "soak", "kills", "sync-kills", "dbt-ends", "faults", "upgrades", "cluster", "service-faults", "properties",
    "chart-values", "random-graphs", "bill-of-materials", "benchmarks", "docker-pool", "cluster-upgrade", "production",
    "cases",
}  # fmt: skip
"""Long tests without a result of this version. Remove each when its result is committed; no name is added."""


def test_long_tests_last_ran_on_this_content_and_passed() -> None:
    assert results.find_problems(LONG_TESTS, ROOT) == []


def test_long_tests_that_are_due_are_named_at_the_end(record_property: Callable[[str, object], None]) -> None:
    entries = results.load(ROOT)
    assert {test.name for test in LONG_TESTS if results.is_due(entries.get(test.name))} <= UNRECORDED
    record_property(NOTE, results.describe_due(LONG_TESTS, ROOT))


def test_results_page_is_current() -> None:
    assert (ROOT / results.PAGE).read_text() == results.render_page(LONG_TESTS, results.load(ROOT))


def test_recorded_results_are_of_full_size() -> None:
    tests = {test.name: test for test in LONG_TESTS}
    for name, entry in results.load(ROOT).items():
        assert not tests[name].reduced(entry["parameters"])


def test_hashed_files_are_those_of_declared_paths_that_git_does_not_ignore() -> None:
    hashed = {file.relative_to(ROOT).as_posix() for path in PATHS for file in files(ROOT / path)}

    def listed(*arguments: str) -> set[str]:
        names = list_files(ROOT, *arguments, "--", *PATHS)
        return {name for name in names if not any(part.startswith(".") for part in name.split("/"))}

    assert {name for name in listed(*NOT_IGNORED) if (ROOT / name).exists()} - hashed == set()
    assert hashed & listed("--others", "--ignored", "--exclude-standard") == set()


def test_changed_file_of_a_declared_path_selects_this_test_file() -> None:
    declared = {file.relative_to(ROOT).as_posix() for path in PATHS for file in files(ROOT / path)}
    assert declared - Checkout().dependencies(RECORDS) == set()
    assert Path(__file__) == ROOT / RECORDS


def test_declared_paths_exist() -> None:
    for test in LONG_TESTS:
        assert [path for path in test.paths if not (ROOT / path.partition("#")[0]).exists()] == []
        assert all(test.hashes(ROOT).values()), "a package is not in uv.lock"


def test_each_property_test_is_in_a_long_test() -> None:
    drawn = re.compile(r"^\s*@(hypothesis\.)?given\(", re.MULTILINE)
    files = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py") if drawn.search(path.read_text())
    }
    assert files == {*PROPERTIES, CHART_VALUES[0]}


def test_each_test_with_scaled_waits_is_in_a_long_test() -> None:
    """The other e2e file, test_surroundings.py, installs no chart."""
    of_cluster = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/e2e").rglob("test_*.py")}
    imports = re.compile(r"^from tests\.e2e\.pace import", re.MULTILINE)
    scaled = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if imports.search(path.read_text())
    }
    repeated = {path for test in LONG_TESTS for path in test.paths}

    def is_repeated(file: str) -> bool:
        return file in repeated or Path(file).parent.as_posix() in repeated

    assert {file for file in of_cluster | scaled if not is_repeated(file)} == {"tests/e2e/test_surroundings.py"}


def test_long_tests_are_found_by_declared_paths() -> None:
    names = [test.name for test in LONG_TESTS]
    assert len(set(names)) == len(names)
    found = [test.name for test in LONG_TESTS if test.declares("reconciler")]
    assert found == ["soak", "faults", "upgrades", "cluster", "cluster-upgrade", "properties", "benchmarks"]
