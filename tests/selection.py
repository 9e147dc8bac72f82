"""Select the test files that a change can affect: `make test CHANGED=1` runs those that need no cluster.

    python -m tests.selection             # compared with where the branch left main; on main, with the newest commit
    python -m tests.selection --base REV  # compared with where the branch left REV

Uncommitted and untracked files are part of the change. A test file depends on its direct and indirect imports, also
those inside functions, on the files and modules that its strings name, on each `conftest.py` above it, and on the files
that `READERS` declares.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

from tests.checkout_files import list_files

ROOT = Path(__file__).resolve().parent.parent

IMAGE = "tests/docker/* tests/e2e/* tests/test_readme.py tests/test_repository.py"
"""Tests that run the whole checkout, as an image or as a copy."""

REFERENCE = "tests/test_docs.py tests/helm/test_reference.py"
"""Tests that compare reference pages with the code and the charts."""

CHARTS = "tests/helm/test_charts.py tests/helm/test_environments.py tests/helm/test_values.py tests/k8s/* tests/e2e/*"
"""Tests that render or install every chart."""

RECORDS = "tests/long/test_results.py"
"""The test that compares the paths that long tests declare with what these last ran on."""

READERS = {
    "helm/*": RECORDS,
    "tests/*": RECORDS,
    "helm/prefect-server/*": (
        "tests/helm/test_prefect_server.py tests/helm/test_backup.py tests/helm/test_pgbouncer.py "
        "tests/helm/test_oidc.py tests/orchestration/access/test_people.py tests/orchestration/test_tls.py "
        "tests/helm/test_tls.py tests/helm/test_cloudnative_pg.py tests/docker/test_stack.py "
        f"tests/test_load_benchmark.py {REFERENCE} {CHARTS}"
    ),
    "helm/prefect-work-pool/*": (
        "tests/helm/test_prefect_work_pool.py tests/helm/test_tls.py tests/orchestration/operations/* "
        f"{REFERENCE} {CHARTS}"
    ),
    "helm/environments/*": (
        f"tests/helm/test_environments.py tests/orchestration/operations/* tests/e2e/* {REFERENCE}"
    ),
    "k8s/*": f"tests/helm/test_environments.py tests/k8s/* tests/e2e/* {RECORDS}",
    "docker/*": f"{IMAGE} {RECORDS}",
    "flows/*": f"{IMAGE} {RECORDS}",
    "flows/warehouse/*": "tests/flows/*",
    "orchestration/*": f"{IMAGE} tests/test_docs.py {RECORDS}",
    "tests/orchestration/access/issuer/*": (
        "tests/orchestration/access/test_people.py tests/orchestration/test_tls.py tests/e2e/test_pgbouncer.py"
    ),
    # fsspec loads this module by an entry point.
    "orchestration/runs/redis_storage.py": "tests/orchestration/runs/*",
    "prefect.yaml": f"tests/orchestration/deployments/* {IMAGE}",
    "docs/*": f"tests/test_repository.py {REFERENCE}",
    "docs/diagnoses/*": "tests/orchestration/test_diagnoses.py tests/orchestration/reconciler/test_causes.py",
    "*.md": "tests/test_repository.py tests/test_docs.py",
    "orchestration/operations/local_cluster/*": "tests/cluster/* tests/docker/* tests/e2e/*",
    ".ci/*": "tests/test_repository.py",
    ".github/*": "tests/test_repository.py tests/versions/test_command.py",
    "Makefile": "tests/test_makefile.py tests/test_docs.py tests/test_readme.py tests/test_repository.py "
    "tests/versions/* tests/e2e/*",
    "pyproject.toml": "tests/*",
    "uv.lock": "tests/*",
    "docs/how-to/*": "tests/test_how_to.py",
    "helm/*/values*": "tests/test_how_to.py",
}
"""Test files that read files without an import or a path, by the pattern of the files."""

TAKES_MINUTES = ("tests/test_readme.py",)
"""Tests that the inner loop skips, in addition to those that need a cluster."""


class BaseError(Exception):
    """The commit to compare with does not exist."""


class Checkout:
    """Finds the test files of a git checkout that depend on changed files.

    Args:
        root: the folder of the checkout.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self._trees: dict[str, ast.Module] = {}
        self._references: dict[ast.AST, set[str]] = {}

    def _git(self, *arguments: str) -> list[str]:
        command = ["git", "-c", "core.quotePath=false", *arguments]
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    @cached_property
    def files(self) -> set[str]:
        """The tracked and untracked files of the checkout, without ignored ones."""
        return set(list_files(self.root))

    @cached_property
    def tests(self) -> list[str]:
        """The test files, sorted."""
        return sorted(name for name in self.files if fnmatch(name, "tests/*test_*.py") and (self.root / name).exists())

    @cached_property
    def _test_names(self) -> frozenset[str]:
        return frozenset(self.tests)

    def changed(self, base: str) -> set[str]:
        """Return the files that differ from the merge base of `base` and HEAD.

        Raises:
            BaseError: there is no merge base.
        """
        try:
            [fork] = self._git("merge-base", base, "HEAD")
        except subprocess.CalledProcessError:
            raise BaseError(f"git has no commit {base!r} to compare with. Name one: make test CHANGED=REV") from None
        untracked = list_files(self.root, "--others", "--exclude-standard")
        return {*self._git("diff", "--name-only", "--no-renames", fork), *untracked}

    def affected(self, changed: set[str]) -> list[str]:
        """Return the test files that depend on one of the files."""
        self.files |= changed  # tests may still import a deleted file by name
        return [test for test in self.tests if self.dependencies(test) & changed]

    def dependencies(self, test: str) -> set[str]:
        """Return the files that a test file depends on, and the file itself."""
        readers = [
            pattern
            for pattern, tests in READERS.items()
            if any(fnmatch(test, test_pattern) for test_pattern in tests.split())
        ]
        return self.named(test) | {name for name in self.files if any(fnmatch(name, pattern) for pattern in readers)}

    def named(self, test: str) -> set[str]:
        """Return the files that a test file imports or names, directly or indirectly, and the file itself."""
        found: set[str] = set()
        left = {test} | self._of_conftests(test)
        while left:
            name = left.pop()
            found.add(name)
            # Of conftest files only the used fixtures count. This file names files in READERS without reading them.
            if name.endswith(".py") and Path(name).name != "conftest.py" and name != "tests/selection.py":
                left |= self._references_of(name, self._tree(name)) - found
        return found

    def _of_conftests(self, test: str) -> set[str]:
        """Return the conftest files of a test and their imports, with those of the fixtures that the test uses."""
        conftests = [f"{folder}/conftest.py" for folder in map(str, Path(test).parents)]
        found = {name for name in conftests if name in self.files}
        fixtures: list[tuple[str, ast.FunctionDef]] = []
        for name in found:
            for node in self._tree(name).body:
                if _is_fixture(node):
                    fixtures.append((name, node))
                else:
                    found = found | self._references_of(name, node)
        used = _requested(self._tree(test))
        while reached := [fixture for fixture in fixtures if fixture[1].name in used]:
            fixtures = [fixture for fixture in fixtures if fixture not in reached]
            for name, node in reached:
                used |= _requested(node)
                found = found | self._references_of(name, node)
        return found

    def _tree(self, name: str) -> ast.Module:
        if name not in self._trees:
            path = self.root / name
            self._trees[name] = ast.parse(path.read_text() if path.exists() else "")
        return self._trees[name]

    def _references_of(self, name: str, part: ast.AST) -> set[str]:
        """Return the files that a part of a Python file imports or names."""
        if part not in self._references:
            self._references[part] = self._find_references(name, part)
        return self._references[part]

    def _find_references(self, name: str, part: ast.AST) -> set[str]:
        found: set[str] = set()
        for node in ast.walk(part):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    found |= self._module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                package = Path(name).parts[: -node.level] if node.level else ()
                module = ".".join([*package, *filter(None, [node.module])])
                for alias in node.names:
                    found |= self._module(f"{module}.{alias.name}")
            elif text := _text(node):
                for token in re.findall(r"[\w./-]*\w", text):
                    # The name of a test file is no dependency: conftest.py and READERS list test files.
                    found |= ({token, str(Path(name).parent / token)} & self.files) - self._test_names
                    if re.fullmatch(r"\w+(\.\w+)+", token):
                        found |= self._module(token)
        return found

    def _module(self, name: str) -> set[str]:
        """Return the files of a module and of its packages."""
        parts = name.split(".")
        packages = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        possible = {f"{package}{end}" for package in packages for end in (".py", "/__init__.py")}
        return (possible | {f"{packages[-1]}/__main__.py"}) & self.files


def _is_fixture(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    """Return whether a node is a fixture that only the tests that request it use."""
    decorators = [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]
    return any(decorator.startswith("pytest.fixture") and "autouse" not in decorator for decorator in decorators)


def _requested(tree: ast.AST) -> set[str]:
    """Return the fixtures that tests and fixtures request, by arguments or by `usefixtures`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name.startswith("test_") or "pytest.fixture" in "".join(map(ast.unparse, node.decorator_list)):
                found |= {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".usefixtures"):
            found |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return found


def _text(node: ast.AST) -> str | None:
    """Return the text of a literal or of a path joined by `/`; None for other nodes and texts of several lines."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        left, right = _text(node.left), _text(node.right)
        return right and f"{left}/{right}" if left else right
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value.strip():
        return node.value
    return None


def main(arguments: list[str] | None = None, checkout: Checkout | None = None) -> int:
    """Print the selected test files, and on stderr the skipped ones; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.selection", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base", default="main", help="the branch or commit to compare with (default: %(default)s)")
    checkout = checkout or Checkout()
    try:
        changed = checkout.changed(parser.parse_args(arguments).base)
    except BaseError as error:
        print(error, file=sys.stderr)
        return 1
    selected = checkout.affected(changed)
    for name in _every_test(changed):
        print(f"{name} has changed, which every test depends on.", file=sys.stderr)
    if late := [test for test in selected if test in TAKES_MINUTES]:
        print(f"Left out, as it takes minutes: make test TESTS='{' '.join(late)}'", file=sys.stderr)
    if selected == late:
        print("No other test depends on what has changed." if late else "No test depends on what has changed.",
              file=sys.stderr)  # fmt: skip
    for test in selected:
        if test not in late:
            print(test)
    return 0


def _every_test(changed: set[str]) -> Iterator[str]:
    return (name for name in sorted(changed) if READERS.get(name) == "tests/*")


if __name__ == "__main__":
    sys.exit(main())
