"""Run the contract tests on the oldest and newest supported Prefect, on the newest there is, and across an upgrade."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

from orchestration.settings import ROOT
from tests.interpreters import UvError
from tests.versions.catalogue import (
    CROSS_VERSION_PARTS,
    PARTS,
    PREVIOUS,
    PREVIOUS_PARTS,
    UPGRADE_PARTS,
    Trial,
    UnavailableError,
    choose_versions,
    locked_version,
    prepare_environment,
    previous_release,
)

PAGE, BEGIN, END = "docs/prefect.md", "<!-- begin make test-versions -->", "<!-- end make test-versions -->"

EITHER_VERSION = "either"
"""Stands for the versions of runs that begin before and after an upgrade."""

PROCESSES = 3
"""The number of pytest processes. Their tests wait for servers about a third of the time."""


@dataclass
class Outcome:
    """Counts the tests of a part by their outcome; `seconds` is their total time."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.failed:
            return f"{self.failed} of {self.passed + self.failed} failed"
        if self.skipped:
            return f"{self.passed} passed, {self.skipped} skipped"
        return f"{self.passed} passed" if self.passed else "failed"

    def is_good(self) -> bool:
        """Return whether a test passed and none failed."""
        return self.passed > 0 and not self.failed


@dataclass
class Row:
    """A line of the table: the result of one pair of versions.

    Args:
        server: the Prefect version of the server.
        runs: the Prefect version of worker and runs.
        why: why the versions were tried.
        counts: whether a failure fails `make test-versions`.
        parts: outcomes by part; empty if the versions could not be tried.
        problem: why the versions could not be tried.
    """

    server: str
    runs: str
    why: str
    counts: bool
    parts: dict[str, Outcome]
    problem: str = ""

    def is_good(self) -> bool:
        """Return whether every part passed."""
        return not self.problem and all(outcome.is_good() for outcome in self.parts.values())

    def cells(self) -> list[str]:
        """Return the cells of the line."""
        outcomes = [str(self.parts[part]) if part in self.parts else "" for part in PARTS]
        return [self.server, self.runs, self.why, *(outcomes if self.parts else ["not run", *outcomes[1:]])]


HEAD = ["server", "worker and runs", "what", *PARTS]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the contract tests, and return the exit status.

    Returns:
        0 if all supported versions passed, 1 if a supported version failed, 2 if nothing could be run.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description=__doc__)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of Prefect; by default the supported ones")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    rows: list[Row] = []
    try:
        trials = choose_versions(options.versions)
        for version, (why, counts) in trials.items():
            rows.append(_try_versions(version, version, why, counts))
        if not options.versions:
            rows += [
                _try_versions(locked_version(), PREVIOUS, "upgraded server", True),
                _try_versions(PREVIOUS, locked_version(), "upgraded worker and runs", True),
                _try_versions(f"{PREVIOUS}, {locked_version()}", EITHER_VERSION, "server changed in a run", True),
            ]
    except (UvError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print("\n".join(align_columns([HEAD, *(row.cells() for row in rows)])))
    for row in rows:
        if not row.is_good():
            print(describe_failure(row), file=sys.stderr)
    _log(f"{time.monotonic() - began:.0f} s")
    if not options.versions:
        write_page(rows, ROOT / PAGE)
    if "GITHUB_ACTIONS" in os.environ:
        _report_to_github(rows)
    return int(any(row.counts and not row.is_good() for row in rows))


def align_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines with their columns aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def render_markdown(rows: Sequence[Row]) -> list[str]:
    """Return the table in Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def describe_failure(row: Row) -> str:
    """Return a sentence on a line that failed."""
    failed = [part for part, outcome in row.parts.items() if not outcome.is_good()]
    what = row.problem or f"failed: {', '.join(failed)}"
    name = f"Prefect {row.server}" if row.server == row.runs else f"Server {row.server} with runs of {row.runs}"
    return f"{name} ({row.why}{'' if row.counts else ', not supported'}): {what}"


def write_page(rows: Sequence[Row], page: Path) -> None:
    """Replace the table in the page."""
    before, _, rest = page.read_text().partition(f"{BEGIN}\n")
    after = rest.partition(END)[2]
    page.write_text("\n".join([f"{before}{BEGIN}", *render_markdown(rows), END]) + after)


def _try_versions(server: str, runs: str, why: str, counts: bool) -> Row:
    """Run the tests of one pair of versions."""
    row = Row(server, runs, why, counts, {})
    try:
        _log(f"server {server}, worker and runs {runs} ({why}): preparing the environment")
        row.parts = _run_tests(_prepare_trial(server, runs, why, counts))
    except (UvError, UnavailableError) as error:
        row.problem = str(error)
    return row


def _prepare_trial(server: str, runs: str, why: str, counts: bool) -> Trial:
    if server == runs:
        return Trial(server, runs, why, counts, _interpreter(server))
    if runs == EITHER_VERSION:
        return Trial(server, runs, why, counts, _interpreter(locked_version()), parts=UPGRADE_PARTS)
    python, checkout = previous_release()
    if runs == PREVIOUS:
        return Trial(server, runs, why, counts, python, checkout, _interpreter(server), PREVIOUS_PARTS)
    return Trial(server, runs, why, counts, _interpreter(runs), ROOT, python, CROSS_VERSION_PARTS)


def _interpreter(version: str) -> Path:
    """Return the interpreter with this version of Prefect; for the locked version it is the current one."""
    return Path(sys.executable) if version == locked_version() else prepare_environment(version)


def _run_tests(trial: Trial) -> dict[str, Outcome]:
    """Run the trial's tests, with their progress on the standard error."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        variables = {**os.environ, "PYTHONPATH": str(trial.root), "FURTHER_CASES": "1"}
        if trial.server_python:
            variables |= {"PYTEST_PLUGINS": "another_server"}
            variables |= {"SERVER_PYTHON": str(trial.server_python), "SERVER_VERSION": trial.server}
            variables["PYTHONPATH"] += f":{Path(__file__).parent / 'plugin'}"
        command = [str(trial.python), "-m", "pytest", "--quiet", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["--numprocesses", str(PROCESSES), "--dist", "loadfile", "--no-loadscope-reorder"]
        command += [file for files in trial.parts.values() for file in files]
        if trial.root != ROOT:
            # The previous release's tests do not close the websockets that Prefect leaves open (docs/upstream.md).
            command += ["-W", "ignore::ResourceWarning", "-W", "ignore::pytest.PytestUnraisableExceptionWarning"]
        subprocess.run(command, cwd=trial.root, env=variables, stdout=sys.stderr, check=False)
        return read_report(report, trial.parts)


def read_report(report: Path, parts: Mapping[str, Sequence[str]]) -> dict[str, Outcome]:
    """Return the outcome of each part, given with its files, from pytest's report. A part without a test has failed."""
    outcomes = {part: Outcome() for part in parts}
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []  # noqa: S314 - pytest wrote it
    for part, outcome in outcomes.items():
        modules = {file.removesuffix(".py").replace("/", ".") for file in parts[part]}
        for case in cases:
            # A file that cannot be imported is reported as a case with the name of the file.
            if (case.get("classname") or case.get("name")) in modules:
                kinds = {child.tag for child in case}
                failed = bool(kinds & {"failure", "error"})
                outcome.failed += failed
                outcome.skipped += "skipped" in kinds
                outcome.passed += not failed and "skipped" not in kinds
                outcome.seconds = round(outcome.seconds + float(case.get("time") or 0), 1)
    return outcomes


def _report_to_github(rows: Sequence[Row]) -> None:
    """Show the table in the workflow's summary, and a warning for each version that is not supported and fails."""
    for row in rows:
        if not row.is_good():
            kind = "error" if row.counts else "warning"
            print(f"::{kind} title=make test-versions::{describe_failure(row)}", file=sys.stderr)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a") as file:
            file.write("\n".join(render_markdown(rows)) + "\n")


def _log(text: str) -> None:
    print(f"== {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
