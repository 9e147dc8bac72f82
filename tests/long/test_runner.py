"""The runner of the long tests records only runs at full size, resumes, and detects changed content."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestration.settings import ROOT
from tests.long import results
from tests.long.longtest import Findings, LongTest, NotRunError, Parameters
from tests.long.runner import main
from tests.long.suite import suite

LOCK = """
[[package]]
name = "prefect"
version = "3.8.8"
[[package]]
name = "ruff"
version = "{ruff}"
"""


@dataclass
class Project:
    """A root with two declared folders, and three long tests that record their runs.

    Args:
        root: the root folder.
        ran: names and parameters of the tests that ran.
        during: by test, a function to call while the test runs.
    """

    root: Path
    ran: list[tuple[str, Parameters]] = field(default_factory=list)
    during: dict[str, Callable[[], Findings | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in ("engine/loop.py", "engine/deep/facts.py", "chart/values.yaml", "tests/long/.keep"):
            (self.root / file).parent.mkdir(parents=True, exist_ok=True)
            (self.root / file).write_text(file)
        (self.root / "uv.lock").write_text(LOCK.format(ruff="1"))

    @property
    def tests(self) -> list[LongTest]:
        size = {"KILLS": 5, "SEED": 1}
        return [
            LongTest("kills", "It kills.", ("engine", "uv.lock#prefect"), self._run("kills"), size),
            LongTest("soak", "It soaks.", ("engine", "chart/values.yaml"), self._run("soak"), {"MINUTES": 30}),
            LongTest("charts", "It renders.", ("chart",), self._run("charts")),
        ]

    def _run(self, name: str) -> Callable[[Parameters], Findings]:
        def run(parameters: Parameters) -> Findings:
            self.ran.append((name, parameters))
            findings = self.during.get(name, lambda: None)()
            return findings or Findings({"runs": 3, "slowest": "a | b"}, [])

        return run

    def make(self, *arguments: str) -> int:
        """Run what `make test-long` runs, and return the exit status."""
        return main(arguments, self.tests, self.root)

    @property
    def problems(self) -> list[str]:
        """The problems for which `make test` would fail."""
        return results.find_problems(self.tests, self.root)

    @property
    def recorded(self) -> list[str]:
        return list(results.load(self.root))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def _interrupt() -> Findings:
    raise KeyboardInterrupt


def test_results_record_what_ran_where(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.make() == 0
    assert project.recorded == ["kills", "soak", "charts"]
    entry = json.loads((project.root / results.JSON).read_text())["kills"]
    assert entry["parameters"] == {"KILLS": 5, "SEED": 1}
    assert (entry["verdict"], entry["reason"], entry["figures"]["runs"]) == ("passed", "", 3)
    assert entry["machine"].keys() == {"architecture", "cores", "memory_gb", "python", "load"}
    assert entry["paths"].keys() == {"engine", "uv.lock#prefect"}
    assert entry["paths"]["uv.lock#prefect"] == "3.8.8"
    assert (entry["commit"], entry["clean"]) == (None, None), "there is no git here"
    page = (project.root / results.PAGE).read_text()
    assert page == results.render_page(project.tests, results.load(project.root))
    assert "`make test-long FOR=kills KILLS=5 SEED=1`" in page
    assert "| runs | 3 |\n| slowest | a \\| b |\n" in page
    table = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split()[:2] for line in table[1:]] == [[name, "passed"] for name in project.recorded]


def test_results_record_the_commit_and_changes_to_it(project: Project) -> None:
    def git(*arguments: str) -> str:
        name = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        return subprocess.check_output(["git", *name, *arguments], cwd=project.root, text=True).strip()

    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "all")
    project.make("--for", "kills", "soak")
    assert {entry["clean"] for entry in results.load(project.root).values()} == {True}, "results are no changes"
    assert results.load(project.root)["soak"]["commit"] == git("rev-parse", "HEAD")
    (project.root / "chart" / "values.yaml").write_text("changed")
    project.make("--for", "charts")
    assert results.load(project.root)["charts"]["clean"] is False


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "engine/loop.py").write_text("engine/loop.pY"),
        lambda root: (root / "engine/deep/facts.py").rename(root / "engine/deep/fact.py"),
        lambda root: (root / "engine/deep/facts.py").rename(root / "engine/facts.py"),
        lambda root: (root / "engine/new.py").write_text(""),
        lambda root: (root / "engine/deep/facts.py").unlink(),
        lambda root: shutil.rmtree(root / "engine"),
    ],
    ids=["a byte", "renamed", "moved", "added", "removed", "all removed"],
)
def test_changed_content_of_a_declared_path_is_reported_with_the_cure(
    project: Project, change: Callable[[Path], object]
) -> None:
    project.make()
    assert project.problems == []
    change(project.root)
    assert project.problems == [
        f"{name} last ran on other content than this: engine. "
        f"Run `make test-long FOR={name}` and commit tests/long/results.json."
        for name in ("kills", "soak")
    ]
    assert project.make() == 0
    assert project.problems == []
    assert [name for name, _ in project.ran] == ["kills", "soak", "charts", "kills", "soak"]


def test_changed_version_of_a_declared_package_is_reported(project: Project) -> None:
    project.make()
    lock = project.root / "uv.lock"
    lock.write_text(LOCK.format(ruff="2"))
    assert project.problems == []
    lock.write_text(lock.read_text().replace("3.8.8", "3.8.9"))
    assert [problem.split(".")[0] for problem in project.problems] == ["kills last ran on other content than this: uv"]


def test_output_of_tools_does_not_count(project: Project) -> None:
    project.make()
    for file in ("engine/__pycache__/loop.cpython-313.pyc", "engine/old.pyc", "engine/.DS_Store", "engine/target/x"):
        (project.root / file).parent.mkdir(exist_ok=True)
        (project.root / file).write_text("")
    assert project.problems == []


def test_new_declared_path_and_larger_size_are_reported(project: Project) -> None:
    project.make()
    kills, soak, charts = project.tests
    more = LongTest("kills", "", (*kills.paths, "chart"), kills.run, kills.parameters)
    longer = LongTest("soak", "", soak.paths, soak.run, {"MINUTES": 60})
    found = results.find_problems([more, longer, charts], project.root)
    assert [problem.split(". ")[0].partition(": ")[2] for problem in found] == ["chart", "MINUTES=30 is below 60"]


def test_missing_and_older_results_are_listed_and_do_not_fail(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    project.make("--for", "kills", "soak")
    file = project.root / results.JSON
    entries = json.loads(file.read_text())
    entries["soak"] |= {"paths": None, "commit": "e54c69cabc"}
    file.write_text(json.dumps(entries))
    (project.root / "engine/new.py").write_text("")
    assert [problem.split()[0] for problem in project.problems] == ["kills"]
    capsys.readouterr()
    assert project.make("--list") == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "kills passed 0 on other content: engine",
        "soak passed 0 due: on an older version: e54c69c",
        "charts never run due: It renders.",
    ]
    due = "Due: 2 long tests without a result of this version. Run them: make test-long FOR='soak charts'"
    assert results.describe_due(project.tests, project.root) == due
    page = results.render_page(project.tests, results.load(project.root))
    assert "| [soak](#soak) | passed, due | e54c69c (an older version) |" in page
    assert "| charts | never run, due |" in page
    assert project.make("--for", "soak", "charts") == 0
    assert results.describe_due(project.tests, project.root) == ""


def test_interrupted_run_keeps_results_and_is_resumed(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    project.during["soak"] = _interrupt
    assert project.make() == 130
    assert capsys.readouterr().err == "Interrupted: soak is not recorded. Run the same command to resume.\n"
    assert project.recorded == ["kills"]
    del project.during["soak"]
    assert project.make() == 0
    assert [name for name, _ in project.ran] == ["kills", "soak", "soak", "charts"]
    assert "passed before" in capsys.readouterr().out
    assert project.make("--for", "kills", "--force") == 0
    assert project.ran[-1][0] == "kills"


def test_reduced_run_is_not_recorded(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    assert project.make("--for", "kills", "--with", "KILLS=1", "SEED=7") == 0
    assert project.ran == [("kills", {"KILLS": 1, "SEED": 7})]
    assert "not recorded: KILLS=1 is below 5" in capsys.readouterr().out
    assert project.recorded == []
    assert project.make("--for", "kills", "--with", "KILLS=6") == 0
    assert results.load(project.root)["kills"]["parameters"] == {"KILLS": 6, "SEED": 1}
    assert project.make("--for", "kills", "--with", "KILLS=1") == 0, "a size on the command line asks for a new run"
    assert len(project.ran) == 3
    assert results.load(project.root)["kills"]["parameters"] == {"KILLS": 6, "SEED": 1}


def test_run_whose_content_changes_is_not_recorded(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    def change() -> None:
        (project.root / "engine/new.py").write_text("")

    project.during["kills"] = change
    project.make("--for", "kills")
    assert "not recorded: engine changed meanwhile" in capsys.readouterr().out
    assert project.recorded == []


def test_failure_is_recorded_and_reported(project: Project) -> None:
    project.during["kills"] = lambda: Findings({"runs": 3}, ["one run is lost", "one is stuck"])

    def crash() -> Findings:
        raise AssertionError("not within 30 s: the end")

    project.during["soak"] = crash
    assert project.make() == 1
    assert project.recorded == ["kills", "soak", "charts"], "the other tests run"
    assert project.problems == [
        f"{name} failed: {reason}. Repair that. Run `make test-long FOR={name}` and commit tests/long/results.json."
        for name, reason in (
            ("kills", "one run is lost; one is stuck"),
            ("soak", "AssertionError: not within 30 s: the end"),
        )
    ]
    project.during.clear()
    assert project.make() == 0, "failed tests run again"
    assert project.problems == []
    assert [name for name, _ in project.ran] == ["kills", "soak", "charts", "kills", "soak"]


def test_long_test_that_cannot_run_is_not_recorded(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> Findings:
        raise NotRunError("There is no cluster")

    project.during["soak"] = refuse
    assert project.make() == 1
    assert project.recorded == ["kills", "charts"]
    assert "not run" in capsys.readouterr().out


def test_path_selects_the_long_tests_that_declare_it(project: Project) -> None:
    for word, names in {
        "engine": ["kills", "soak"],
        "values": ["soak"],
        "chart/values.yaml": ["soak"],
        "charts": ["charts"],
    }.items():
        project.ran.clear()
        project.make("--force", "--for", word)
        assert [name for name, _ in project.ran] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--for", "soka", "kills"],
            "FOR=soka: no long test has this name or path. The long tests are kills, soak, charts.",
        ),
        (["--for", "soak", "--with", "KILLS=1"], "KILLS is no parameter of soak. Use MINUTES."),
        (["--with", "KILLS=many"], "KILLS=many is not a number."),
    ],
)
def test_unknown_argument_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert project.make(*arguments) == 2
    assert capsys.readouterr().err == f"{message}\n"
    assert project.ran == []


def test_long_tests_run_at_the_shipped_pace() -> None:
    """The variable is set before the constants are read."""
    command = "import runpy, sys\nsys.argv = ['tests.long', '--list']\n"
    command += "try: runpy.run_module('tests.long', run_name='__main__')\n"
    command += "except SystemExit: from tests.e2e import pace; print('shipped:', pace.IS_SHIPPED)\n"
    environment = {name: value for name, value in os.environ.items() if name != "PACE"}
    listed = subprocess.check_output([sys.executable, "-c", command], cwd=ROOT, env=environment, text=True)
    assert listed.splitlines()[-1] == "shipped: True"


def test_suite_of_pytest_reports_failures_and_durations(tmp_path: Path) -> None:
    file = tmp_path / "suite.py"
    file.write_text(
        "import os\n"
        "def test_one(record_property): record_property('took', 'Crashed after 2.2 s')\n"
        "def test_two(): assert os.environ['HYPOTHESIS_PROFILE'] == 'long'\n"
    )
    run = suite("-q", str(file), HYPOTHESIS_PROFILE="long")
    assert run({"SEED": 3}) == Findings({"tests": 2, "test_one": "Crashed after 2.2 s"}, [])
    file.write_text(file.read_text() + "def test_three(): assert 1 == 2\n")
    [wrong] = run({}).wrong
    assert wrong.endswith("suite.test_three: assert 1 == 2")
    file.write_text("import pytest\ndef test_one(): pytest.skip('no cluster')\ndef test_two(): pass\n")
    with pytest.raises(NotRunError, match="1 of 2 tests were skipped: test_one: no cluster"):
        run({})
    assert suite(str(tmp_path / "absent.py"))({}).wrong == ["pytest ended with 4"]
