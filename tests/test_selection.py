"""The selection finds the tests that a change can affect, in a small repository and in this one."""

import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.selection import READERS, RECORDS, Checkout, main

FILES = {
    "orchestration/__init__.py": "",
    "orchestration/deep.py": "VALUE = 1\n",
    "orchestration/middle.py": "def value():\n    from orchestration import deep\n    return deep.VALUE\n",
    "orchestration/program.py": "print('started')\n",
    "orchestration/fixed.py": "",
    "orchestration/unused.py": "",
    "flows/plain.sql": "select 1\n",
    "helm/prefect-server/templates/api.yaml": "kind: Service\n",
    "tests/conftest.py": "import pytest\n@pytest.fixture\ndef fixed():\n    import orchestration.fixed\n",
    "tests/test_middle.py": "from orchestration.middle import value\ndef test_it(): assert value() == 1\n",
    "tests/test_program.py": "COMMAND = ['python', '-m', 'orchestration.program']\n",
    "tests/test_text.py": "from pathlib import Path\nTEXT = Path('.') / 'flows' / 'plain.sql'\n",
    "tests/flows/conftest.py": "import orchestration.deep\n",
    "tests/flows/test_fixed.py": "def test_it(fixed): pass\n",
    "tests/helm/test_prefect_server.py": "def test_it(): pass\n",
    "tests/helm/test_prefect_work_pool.py": "def test_it(): pass\n",
    "uv.lock": "",
}
"""A small repository with each way in which a test can depend on a file."""


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """Return a repository with `FILES` on `main`, and another branch checked out."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    _git(tmp_path, "init", "-q", "-b", "main")
    _commit(tmp_path)
    _git(tmp_path, "checkout", "-q", "-b", "feature")
    return Checkout(tmp_path)


def _git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def _commit(folder: Path) -> None:
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.com", "-c", "commit.gpgsign=false")
    _git(folder, "add", "-A")
    _git(folder, *identity, "commit", "-q", "-m", "A change")


@pytest.mark.parametrize(
    ("changed", "selected"),
    [
        ("orchestration/deep.py", ["tests/flows/test_fixed.py", "tests/test_middle.py"]),
        ("orchestration/program.py", ["tests/test_program.py"]),
        ("orchestration/fixed.py", ["tests/flows/test_fixed.py"]),
        ("orchestration/unused.py", []),
        ("flows/plain.sql", ["tests/test_text.py"]),
        ("helm/prefect-server/templates/api.yaml", ["tests/helm/test_prefect_server.py"]),
        ("tests/test_text.py", ["tests/test_text.py"]),
        ("tests/flows/conftest.py", ["tests/flows/test_fixed.py"]),
        ("tests/conftest.py", sorted(name for name in FILES if "/test_" in name)),
        ("uv.lock", sorted(name for name in FILES if "/test_" in name)),
    ],
)
def test_changed_file_selects_the_tests_that_depend_on_it(
    checkout: Checkout, capsys: pytest.CaptureFixture[str], changed: str, selected: list[str]
) -> None:
    """By imports at any depth and inside functions, `python -m`, paths, used fixtures, conftest files and READERS."""
    (checkout.root / changed).write_text(FILES[changed] + "# changed\n")
    assert main([], checkout) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == selected
    assert ("No test depends on what has changed." in captured.err) is (not selected)
    assert ("uv.lock has changed, which every test depends on." in captured.err) is (changed == "uv.lock")


@pytest.mark.parametrize("committed", [True, False])
def test_changes_of_the_branch_count_and_those_of_main_do_not(checkout: Checkout, committed: bool) -> None:
    _git(checkout.root, "checkout", "-q", "main")
    (checkout.root / "orchestration/deep.py").write_text("VALUE = 2\n")
    _commit(checkout.root)
    _git(checkout.root, "checkout", "-q", "feature")
    (checkout.root / "orchestration/new.py").write_text("")
    (checkout.root / "orchestration/fixed.py").unlink()
    if committed:
        _commit(checkout.root)
    assert checkout.changed("main") == {"orchestration/new.py", "orchestration/fixed.py"}
    assert checkout.affected({"orchestration/fixed.py"}) == ["tests/flows/test_fixed.py"], "a deleted file counts"


def test_untracked_test_is_selected_and_ignored_file_is_not(checkout: Checkout) -> None:
    (checkout.root / ".gitignore").write_text("*.log\n")
    (checkout.root / "tests/test_new.py").write_text("")
    (checkout.root / "tests/test_new.log").write_text("")
    changed = checkout.changed("HEAD")
    assert changed == {".gitignore", "tests/test_new.py"}
    assert checkout.affected(changed) == ["tests/test_new.py"]


def test_unknown_base_is_an_error_with_the_cure(checkout: Checkout, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base", "absent"], checkout) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "git has no commit 'absent' to compare with. Name one: make test CHANGED=REV\n"


UNNAMED = {
    "orchestration/runs/redis_storage.py": "flow runs of test_durable.py: fsspec loads the module by an entry point"
}
"""Modules that no test imports or names, and what runs them instead."""


UNREAD = {
    ".editorconfig": "editors read it",
    ".pre-commit-config.yaml": "pre-commit reads it",
    ".sqlfluff": "a check of make test reads it, whatever has changed",
    ".yamllint": "a check of make test reads it, whatever has changed",
    "mkdocs.yml": "a check of make test reads it, whatever has changed",
}
"""Files outside of tests/ that no test reads, and what reads them instead."""


def test_every_file_is_reached_by_a_test_or_listed_with_its_reason() -> None:
    checkout = Checkout()
    # This file and the one of RECORDS depend on files whose content they do not test.
    tests = [test for test in checkout.tests if test not in (RECORDS, "tests/test_selection.py")]
    named = set[str]().union(*map(checkout.named, tests))
    modules = {
        name for name in checkout.files if name.endswith(".py") and name.startswith(("orchestration/", "flows/"))
    }
    assert modules - named == set(UNNAMED)
    others = {
        name for name in checkout.files - modules if not name.startswith("tests/") and (checkout.root / name).is_file()
    }
    reached = set[str]().union(*map(checkout.dependencies, tests))
    assert others - reached == UNREAD.keys()
    assert modules
    for file in ("docker/Dockerfile", "k8s/base/kustomization.yaml", ".github/workflows/ci.yml", ".env.example"):
        assert file in others


@pytest.mark.parametrize("pattern", READERS)
def test_readers_name_existing_files_and_tests(pattern: str) -> None:
    checkout = Checkout()
    assert any(fnmatch(name, pattern) for name in checkout.files)
    for test_pattern in READERS[pattern].split():
        assert any(fnmatch(test, test_pattern) for test in checkout.tests), f"{pattern} names {test_pattern}"
