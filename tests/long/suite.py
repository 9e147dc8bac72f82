"""Run files of pytest as a long test."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from orchestration.settings import ROOT
from tests.long.longtest import Findings, NotRunError, Parameters


def suite(*arguments: str, **variables: str) -> Callable[[Parameters], Findings]:
    """Return a function that runs pytest and reads its report.

    Args:
        arguments: arguments of pytest.
        variables: environment variables in addition to those of this process.
    """

    def run(parameters: Parameters) -> Findings:
        seed = [f"--hypothesis-seed={parameters['SEED']:.0f}"] if "SEED" in parameters else []
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", *arguments, *seed, "--timeout=3600", f"--junitxml={report}"]
            environment = os.environ | {"FURTHER_CASES": "1"} | variables
            with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
                try:
                    status = process.wait()
                except KeyboardInterrupt:
                    process.wait()  # the terminal has interrupted pytest, too, which cleans up
                    raise
            return read(report, status)

    return run


def read(report: Path, status: int) -> Findings:
    """Return the findings from pytest's report.

    Args:
        report: the report, in JUnit's XML.
        status: pytest's exit status.

    Raises:
        NotRunError: a test was skipped, so the suite does not show what it has to show.
    """
    if not report.exists():
        return Findings({}, [f"pytest ended with {status} and without a report"])
    cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314 - pytest wrote it
    skipped = [f"{case.get('name')}: {reason.get('message')}" for case in cases for reason in case.iter("skipped")]
    # Errors are those of fixtures.
    wrong = [
        f"{case.get('classname')}.{case.get('name')}: {reason.get('message')}"
        for case in cases
        for reason in (*case.iter("failure"), *case.iter("error"))
    ]
    if status and not wrong:
        wrong.append(f"pytest ended with {status}")
    if skipped and not wrong:
        raise NotRunError(f"{len(skipped)} of {len(cases)} tests were skipped: {'; '.join(skipped)}")
    figures: dict[str, str | float] = {"tests": len(cases)}
    for case in cases:
        # The durations that the fault suite measured.
        took = [str(found.get("value")) for found in case.iter("property") if found.get("name") == "took"]
        if took:
            figures[str(case.get("name"))] = "; ".join(took)
    return Findings(figures, wrong)
