"""The versions, output and exit status of `make test-versions`, with made-up outcomes of the contract tests."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from orchestration.settings import ROOT
from tests.interpreters import UvError
from tests.versions import __main__ as command
from tests.versions import catalogue
from tests.versions.__main__ import Outcome, Row
from tests.versions.catalogue import PARTS, PREVIOUS, UnavailableError

GOOD, BAD = Outcome(passed=3), Outcome(passed=1, failed=2)

Tries = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tries:
    """Return a function that runs the command and returns its exit status, output and errors.

    Runs of the versions in `bad` fail. `away` is raised in place of a trial.
    """
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{command.BEGIN}\nold\n{command.END}\n\nAfter\n")
    monkeypatch.setattr(command, "PAGE", str(page))
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setattr(
        catalogue, "newest_version", lambda wanted: "4.0.0" if wanted == "prefect" else catalogue.locked_version()
    )

    def run(*arguments: str, bad: Sequence[str] = (), away: Exception | None = None) -> tuple[int, str, str]:
        def ran(server: str, runs: str, why: str, counts: bool) -> catalogue.Trial:
            if away:
                raise away
            return catalogue.Trial(server, runs, why, counts, Path(sys.executable))

        monkeypatch.setattr(command, "_prepare_trial", ran)
        outcomes = lambda trial: dict.fromkeys(PARTS, BAD if trial.runs in bad else GOOD)  # noqa: E731
        monkeypatch.setattr(command, "_run_tests", outcomes)
        status = command.main(arguments)
        return status, *capsys.readouterr()

    return run


def test_supported_versions_upgrade_and_rollback_are_tried(tries: Tries, tmp_path: Path) -> None:
    status, output, _ = tries()
    assert status == 0
    lines = [re.split(r" {2,}", line) for line in output.splitlines()]
    locked = catalogue.locked_version()
    supported = (
        [[catalogue.oldest_version()] * 2, [locked] * 2] if catalogue.oldest_version() != locked else [[locked] * 2]
    )
    tried = [
        *supported,
        ["4.0.0", "4.0.0"],
        [locked, PREVIOUS],
        [PREVIOUS, locked],
        [f"{PREVIOUS}, {locked}", "either"],
    ]
    assert [line[:2] for line in lines[1:]] == tried
    assert lines[0] == command.HEAD
    assert "\x1b" not in output
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Before\n")
    assert page.endswith("\n\nAfter\n")
    assert "old" not in page.split("After")[0].replace("oldest", "")
    assert page.count("| 3 passed") == len(PARTS) * len(tried)


def test_failing_supported_version_is_named_and_fails_the_command(tries: Tries) -> None:
    status, output, errors = tries(bad=[catalogue.locked_version()])
    assert status == 1
    assert "2 of 3 failed" in output
    assert re.search(
        rf"^Prefect {catalogue.locked_version()} \(.*newest supported\): failed: signatures", errors, flags=re.M
    )


def test_failing_unsupported_version_is_named_and_does_not_fail_the_command(tries: Tries) -> None:
    status, output, errors = tries(bad=["4.0.0"])
    assert (status, "2 of 3 failed" in output) == (0, True)
    assert "Prefect 4.0.0 (newest on the index, not supported): failed: signatures" in errors


def test_github_shows_the_table_and_a_warning_for_unsupported_versions(
    tries: Tries, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    _, _, errors = tries(bad=["4.0.0"])
    assert "::warning title=make test-versions::Prefect 4.0.0" in errors
    assert "::error" in tries(bad=[PREVIOUS])[2]
    assert summary.read_text().startswith("| server |")


def test_named_versions_are_tried_and_the_page_is_unchanged(tries: Tries, tmp_path: Path) -> None:
    before = (tmp_path / "page.md").read_text()
    status, output, _ = tries("3.9.0", "3.8.8", bad=["3.8.8"])
    assert status == 1
    assert [line.split()[0] for line in output.splitlines()] == ["server", "3.9.0", "3.8.8"]
    assert (tmp_path / "page.md").read_text() == before


def test_json_is_all_of_the_standard_output(tries: Tries) -> None:
    status, output, _ = tries("3.9.0", "--json")
    [row] = json.loads(output)
    assert (status, row["server"], row["runs"], row["counts"]) == (0, "3.9.0", "3.9.0", True)
    assert row["parts"]["engine"] == {"passed": 3, "failed": 0, "skipped": 0, "seconds": 0.0}


@pytest.mark.parametrize("why", [UvError("uv pip failed: no wheel"), UnavailableError("commit 0f9e41d is not here")])
def test_version_that_cannot_be_had_is_not_run_and_fails(tries: Tries, why: Exception) -> None:
    status, output, errors = tries("3.9.0", away=why)
    assert (status, "not run" in output) == (1, True)
    assert f"Prefect 3.9.0 (named): {why}" in errors


def test_clone_without_the_previous_release_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(catalogue, "PREVIOUS_COMMIT", "0" * 40)
    with pytest.raises(UnavailableError, match=r"^Commit 0000000 with Prefect .*git fetch --unshallow\.$"):
        catalogue.previous_release()
    assert [path.name for path in (tmp_path / "prefect-orchestration").iterdir()] == ["checkout-0000000.lock"]


def test_invalid_version_is_refused(tries: Tries) -> None:
    status, output, errors = tries("3.9")
    assert (status, output) == (2, "")
    assert errors == "PREFECT=3.9 is not a version. Name versions as PREFECT='3.9.0 3.9.1'.\n"


def test_unavailable_index_is_one_message(tries: Tries, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(wanted: str) -> str:
        raise UvError("uv pip failed: no connection")

    monkeypatch.setattr(catalogue, "newest_version", away)
    assert tries() == (2, "", "uv pip failed: no connection\n")


def test_part_has_the_outcome_of_its_files(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.orchestration.runs.test_engine" name="a" time="1.5" />
        <testcase classname="tests.orchestration.runs.test_engine" name="b" time="2"><failure message="x" /></testcase>
        <testcase classname="tests.orchestration.runs.test_durable" name="c" time="1"><skipped message="x" /></testcase>
        <testcase classname="" name="tests.orchestration.worker.test_kubernetes_worker" time="0">
        <error message="x" /></testcase>
        </testsuite></testsuites>"""
    )
    found = command.read_report(report, {part: PARTS[part] for part in ("engine", "durable", "worker", "execution")})
    assert found == {
        "engine": Outcome(1, 1, 0, 3.5),
        "durable": Outcome(0, 0, 1, 1.0),
        "worker": Outcome(0, 1, 0, 0.0),
        "execution": Outcome(),
    }
    assert not any(outcome.is_good() for outcome in found.values())
    assert [str(found[part]) for part in ("engine", "execution")] == ["1 of 2 failed", "failed"]


def test_missing_report_fails_every_part(tmp_path: Path) -> None:
    row = Row("1", "1", "", True, command.read_report(tmp_path / "absent.xml", catalogue.CROSS_VERSION_PARTS))
    assert not row.is_good()


def test_parts_are_existing_files_that_need_no_cluster() -> None:
    for files in PARTS.values():
        for file in files:
            path = ROOT / file
            assert path.is_file(), file
            assert not re.search(r"\bcluster: str|: Namespace", path.read_text()), file


def test_previous_release_has_the_files_of_the_same_parts() -> None:
    """They are missing in a clone without history, where `make test-versions` says so."""
    assert catalogue.PREVIOUS_PARTS.keys() == catalogue.CROSS_VERSION_PARTS.keys()
    listing = ["git", "ls-tree", "-r", "--name-only", catalogue.PREVIOUS_COMMIT]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this clone does not have the previous release")
    files = {file for part in catalogue.PREVIOUS_PARTS.values() for file in part}
    assert files <= set(listed.stdout.splitlines())


def test_signatures_hold_on_the_oldest_and_newest_prefect_of_the_lock() -> None:
    """For the installed version the signature tests run as part of the suite. Other versions get an environment."""
    from prefect import __version__

    for version in {catalogue.oldest_version(), catalogue.locked_version()} - {__version__}:
        python = catalogue.prepare_environment(version)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        subprocess.run([python, "-m", "pytest", "-q", *PARTS["signatures"]], cwd=ROOT, env=environment, check=True)


def test_recorded_table_has_the_supported_versions() -> None:
    page = (ROOT / "docs/prefect.md").read_text()
    table = page.split(command.BEGIN)[1].split(command.END)[0]
    tried = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| 3")}
    cure = "Run `make test-versions` and commit docs/prefect.md"
    assert not tried or {catalogue.oldest_version(), catalogue.locked_version()} <= tried, cure
    assert Version(PREVIOUS) < Version(catalogue.oldest_version())


def test_weekly_workflow_runs_what_people_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/versions.yml").read_text())
    assert workflow[True]["schedule"], "YAML 1.1 reads `on` as true"
    steps = workflow["jobs"]["test-versions"]["steps"]
    assert steps[0]["with"] == {"fetch-depth": 0}, "the commit with the Prefect before is needed"
    assert steps[-1]["run"].endswith(" make test-versions")


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [((), ""), (("PREFECT=3.9.0 3.8.8",), " 3.9.0 3.8.8"), (("PREFECT=3.9.0", "JSON=1"), " 3.9.0 --json")],
)
def test_make_passes_the_versions(tmp_path: Path, variables: Sequence[str], arguments: str) -> None:
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    make = ["make", "--silent", "--old-file", ".venv/ready", "test-versions", f"BIN={tmp_path}", *variables]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    assert " ".join(done.stdout.split()) == f"-m tests.versions{arguments}"
