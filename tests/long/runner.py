"""Run long tests one after the other, and record the findings of each when it ends."""

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from orchestration.settings import ROOT
from tests.long import results
from tests.long.catalogue import LONG_TESTS
from tests.long.longtest import Findings, LongTest, NotRunError


@dataclass(frozen=True)
class Row:
    """A line of the table at the end.

    Args:
        name: the name of the long test.
        verdict: `passed`, `failed`, `passed before`, `not run` or `never run`.
        seconds: its duration; None if it is not known.
        note: where the result is recorded, or why it is not.
    """

    name: str
    verdict: str
    seconds: int | None
    note: str


def main(arguments: Sequence[str] | None = None, tests: Sequence[LongTest] = LONG_TESTS, root: Path = ROOT) -> int:
    """Run the selected long tests, and return the exit status.

    Returns:
        0 if all passed, 1 if a test failed or could not run, 2 if an argument is unknown, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.long", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--for", dest="words", nargs="+", default=[], metavar="NAME", help="long tests, or paths that they declare"
    )
    parser.add_argument("--with", dest="given", nargs="+", default=[], metavar="NAME=VALUE", help="sizes, and SEED")
    parser.add_argument("--force", action="store_true", help="run also tests that passed on this content")
    parser.add_argument("--list", action="store_true", help="print the long tests, and on which content they ran")
    options = parser.parse_args(arguments)
    try:
        chosen = _select(tests, options.words)
        given = _parameters(chosen, options.given)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.list:
        _print_table([_state(test, root) for test in chosen])
        return 0
    rows = []
    for number, test in enumerate(chosen, 1):
        print(f"\n== {test.name} ({number} of {len(chosen)}): {test.what}", flush=True)
        own = {name: value for name, value in given.items() if name in test.parameters}
        try:
            rows.append(_run(test, own, tests, root, force=options.force))
        except KeyboardInterrupt:
            print(f"Interrupted: {test.name} is not recorded. Run the same command to resume.", file=sys.stderr)
            return 130
        print(f"== {test.name}: {rows[-1].verdict}", flush=True)
    print()
    _print_table(rows)
    return 0 if all(row.verdict.startswith("passed") for row in rows) else 1


def _select(tests: Sequence[LongTest], words: Sequence[str]) -> list[LongTest]:
    """Return the long tests with these names or declared paths; without words all long tests."""
    names = [test.name for test in tests]
    chosen = set() if words else set(names)
    for word in words:
        found = {word} if word in names else {test.name for test in tests if test.declares(word)}
        if not found:
            raise ValueError(f"FOR={word}: no long test has this name or path. The long tests are {', '.join(names)}.")
        chosen |= found
    return [test for test in tests if test.name in chosen]


def _parameters(tests: Sequence[LongTest], given: Sequence[str]) -> dict[str, float]:
    known = {name for test in tests for name in test.parameters}
    found: dict[str, float] = {}
    for argument in given:
        name, _, value = argument.partition("=")
        if name not in known:
            names = ", ".join(test.name for test in tests)
            raise ValueError(f"{name} is no parameter of {names}. Use {', '.join(sorted(known)) or 'none'}.")
        try:
            number = float(value)
        except ValueError:
            raise ValueError(f"{name}={value} is not a number.") from None
        found[name] = int(number) if number.is_integer() else number
    return found


def _run(test: LongTest, given: dict[str, float], tests: Sequence[LongTest], root: Path, *, force: bool) -> Row:
    """Run a long test unless it passed on this content, and record the result if the test ran at full size."""
    entry = results.load(root).get(test.name)
    state = _state(test, root)
    # A size or a seed on the command line asks for a new run.
    if entry and state.verdict == "passed" and not state.note and not given and not force:
        return Row(test.name, "passed before", entry["seconds"], "on this content; FORCE=1 runs it again")
    parameters = {**test.parameters, **given}
    before = test.hashes(root)
    commit, clean = results.read_revision(root)
    start = time.monotonic()
    try:
        machine = results.describe_machine(cluster=test.cluster)
        findings = test.run(parameters)
    except NotRunError as error:
        print(error, file=sys.stderr)
        return Row(test.name, "not run", None, str(error))
    except Exception as error:
        traceback.print_exc()
        findings = Findings({}, [f"{type(error).__name__}: {error}"])
    seconds = round(time.monotonic() - start)
    for name, value in findings.figures.items():
        print(f"{name}: {value}")
    for failure in findings.wrong:
        print(f"WRONG {failure}")
    verdict = "failed" if findings.wrong else "passed"
    if reduced := test.reduced(parameters):
        return Row(test.name, verdict, seconds, f"not recorded: {', '.join(reduced)}")
    if changed := [path for path, now in test.hashes(root).items() if now != before[path]]:
        return Row(test.name, verdict, seconds, f"not recorded: {', '.join(changed)} changed meanwhile")
    new: results.Entry = {
        "commit": commit,
        "clean": clean,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": machine,
        "seconds": seconds,
        "parameters": parameters,
        "figures": findings.figures,
        "verdict": verdict,
        "reason": "; ".join(findings.wrong)[:1000],
        "paths": before,
    }
    results.record(root, tests, test.name, new)
    return Row(test.name, verdict, seconds, f"recorded in {results.JSON}")


def _state(test: LongTest, root: Path) -> Row:
    """Return the recorded result of a long test."""
    entry = results.load(root).get(test.name)
    if entry is None:
        return Row(test.name, "never run", None, f"due: {test.what}")
    differing = results.find_changes(test, entry, root)
    note = f"on other content: {', '.join(differing)}" if differing else entry["reason"]
    if results.is_due(entry):
        note = f"due: on an older version: {(entry['commit'] or 'unknown')[:7]}"
    return Row(test.name, entry["verdict"], entry["seconds"], note)


def _print_table(rows: Sequence[Row]) -> None:
    cells = [("long test", "verdict", "seconds", "")]
    cells += [(row.name, row.verdict, "" if row.seconds is None else str(row.seconds), row.note) for row in rows]
    name, verdict, seconds, _ = (max(map(len, column)) for column in zip(*cells, strict=True))
    for row in cells:
        print(f"{row[0]:{name}}  {row[1]:{verdict}}  {row[2]:>{seconds}}  {row[3]}".rstrip())
