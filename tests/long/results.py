"""Read and write the committed results of the long tests: results.json, and results.md for readers."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import psutil

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import __main__ as local_cluster
from orchestration.operations.local_cluster import binaries
from tests.long.longtest import LongTest, NotRunError

FOLDER = Path("tests/long")
JSON, PAGE = FOLDER / "results.json", FOLDER / "results.md"


class Entry(TypedDict):
    """The result of a long test's last run at full size. Null is what was not recorded.

    `clean` is whether the tree had no changes to the commit. `verdict` is `passed` or `failed`, and `reason` is why the
    test failed. `paths` has the hashes of the declared paths on which the test ran.
    """

    commit: str | None
    clean: bool | None
    date: str
    machine: dict[str, str | float]
    seconds: int | None
    parameters: dict[str, float]
    figures: dict[str, str | float]
    verdict: str
    reason: str
    paths: dict[str, str] | None


def load(root: Path) -> dict[str, Entry]:
    """Return the entries by the name of the long test."""
    file = root / JSON
    entries: dict[str, Entry] = json.loads(file.read_text()) if file.exists() else {}
    return entries


def record(root: Path, tests: Sequence[LongTest], name: str, entry: Entry) -> None:
    """Write an entry, and the page. Both have the order of `tests`."""
    entries = load(root) | {name: entry}
    entries = {test.name: entries[test.name] for test in tests if test.name in entries}
    for file, text in (
        (root / JSON, json.dumps(entries, indent=2, ensure_ascii=False) + "\n"),
        (root / PAGE, render_page(tests, entries)),
    ):
        # A kill leaves the previous file or the new one.
        new = file.with_name(f".{file.name}")
        new.write_text(text)
        new.replace(file)


def find_changes(test: LongTest, entry: Entry, root: Path) -> list[str]:
    """Return the declared paths and sizes that differ from those of the last run; none if they were not recorded."""
    recorded = entry["paths"]
    if recorded is None:
        return []
    differing = [path for path, now in test.hashes(root).items() if recorded.get(path) != now]
    return differing + test.reduced(entry["parameters"])


def is_due(entry: Entry | None) -> bool:
    """Return whether a long test has no result of this version: never recorded, or only for an older version."""
    return entry is None or entry["paths"] is None


def describe_due(tests: Sequence[LongTest], root: Path) -> str:
    """Return a line with the long tests that are due and the command that runs them; empty if none is due."""
    entries = load(root)
    names = [test.name for test in tests if is_due(entries.get(test.name))]
    if not names:
        return ""
    command = f"make test-long FOR='{' '.join(names)}'"
    return f"Due: {len(names)} long tests without a result of this version. Run them: {command}"


def find_problems(tests: Sequence[LongTest], root: Path) -> list[str]:
    """Return the long tests that last ran on other content or failed, in sentences with the cure.

    Those that are due are no problem here: `describe_due` names them.
    """
    found = []
    for test in tests:
        entry = load(root).get(test.name)
        if entry is None or is_due(entry):
            continue
        command = f"Run `make test-long FOR={test.name}` and commit {JSON}"
        if differing := find_changes(test, entry, root):
            paths = ", ".join(differing)
            found.append(f"{test.name} last ran on other content than this: {paths}. {command}.")
        elif entry["verdict"] != "passed":
            found.append(f"{test.name} failed: {entry['reason']}. Repair that. {command}.")
    return found


def read_revision(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit, and whether the tree has no changes to it apart from the results; None without git."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".", f":!{JSON}", f":!{PAGE}")
    return git("rev-parse", "HEAD"), None if changes is None else not changes


def describe_machine(*, cluster: bool) -> dict[str, str | float]:
    """Describe this machine and, with `cluster`, the Kubernetes cluster, which is created if it does not exist.

    Raises:
        NotRunError: there is no cluster, and none can be created.
    """
    found: dict[str, str | float] = {
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
    }
    if cluster:
        try:
            with local_cluster.shared() as context:
                version = json.loads(binaries.kubectl("--context", context, "version", "-o", "json"))
        except ClusterError as error:
            raise NotRunError(str(error)) from None
        found["kubernetes"] = version["serverVersion"]["gitVersion"]
    return found


def render_page(tests: Sequence[LongTest], entries: Mapping[str, Entry]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Results of the long tests",
        "",
        "`make test-long` writes this page and results.json. `make test` fails when the code that a long test declares",
        "is not the code that it last ran on. Its last lines name the long tests that are due: those without a",
        "result of this version.",
        "",
        "| long test | verdict | commit | date | parameters | minutes |",
        "|---|---|---|---|---|---:|",
    ]
    for test in tests:
        if entry := entries.get(test.name):
            minutes = "" if entry["seconds"] is None else f"{entry['seconds'] / 60:.0f}"
            verdict = entry["verdict"] + (", due" if is_due(entry) else "")
            cells = [verdict, _version(entry), entry["date"], _format_parameters(entry["parameters"]), minutes]
            lines.append(f"| [{test.name}](#{test.name}) | {' | '.join(cells)} |")
        else:
            lines.append(f"| {test.name} | never run, due | | | | |")
    for test in tests:
        if entry := entries.get(test.name):
            machine = ", ".join(f"{name} {value}" for name, value in entry["machine"].items())
            command = " ".join(
                filter(None, ["make test-long", f"FOR={test.name}", _format_parameters(entry["parameters"])])
            )
            lines += ["", f"## {test.name}", "", test.what, "", f"`{command}`, {_version(entry)}; {machine}.", ""]
            if entry["reason"]:
                lines += [f"Failed: {' '.join(entry['reason'].split())}", ""]
            lines += ["| | |", "|---|---:|"]
            figures = [(name, str(value).replace("|", "\\|")) for name, value in entry["figures"].items()]
            lines += [f"| {name} | {value} |" for name, value in figures]
    return "\n".join(lines) + "\n"


def _version(entry: Entry) -> str:
    text = (entry["commit"] or "unknown")[:7] + ("" if entry["clean"] is not False else " with changes")
    return f"{text} (an older version)" if is_due(entry) else text


def _format_parameters(parameters: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in parameters.items())
