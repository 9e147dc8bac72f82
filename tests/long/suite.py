"""Long tests that are files of pytest's."""

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
    """Return what runs pytest with these arguments and environment variables, and reads what it found."""

    def run(parameters: Parameters) -> Findings:
        seed = [f"--hypothesis-seed={parameters['SEED']:.0f}"] if "SEED" in parameters else []
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", *arguments, *seed, "--timeout=3600", f"--junitxml={report}"]
            with subprocess.Popen(command, cwd=ROOT, env=os.environ | variables) as process:
                try:
                    status = process.wait()
                except KeyboardInterrupt:
                    process.wait()  # the terminal has told it too, and it takes away what it made
                    raise
            return read(report, status)

    return run


def read(report: Path, status: int) -> Findings:
    """Read pytest's report.

    Args:
        report: JUnit's XML.
        status: pytest's exit status.

    Raises:
        NotRunError: a test was skipped, so the suite did not show what it is there for.
    """
    if not report.exists():
        return Findings({}, [f"pytest ended with {status} and without a report"])
    cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314 - pytest wrote it
    skipped = [f"{case.get('name')}: {each.get('message')}" for case in cases for each in case.iter("skipped")]
    # Beside the failures of tests come the errors of what they need.
    wrong = [
        f"{case.get('classname')}.{case.get('name')}: {each.get('message')}"
        for case in cases
        for each in (*case.iter("failure"), *case.iter("error"))
    ]
    if status and not wrong:
        wrong.append(f"pytest ended with {status}")
    if skipped and not wrong:
        raise NotRunError(f"{len(skipped)} of {len(cases)} tests were skipped: {'; '.join(skipped)}")
    figures: dict[str, str | float] = {"tests": len(cases)}
    for case in cases:
        # What the fault suite says of how soon something happened.
        took = [str(each.get("value")) for each in case.iter("property") if each.get("name") == "took"]
        if took:
            figures[str(case.get("name"))] = "; ".join(took)
    return Findings(figures, wrong)
