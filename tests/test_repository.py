"""The repository is consistent: versions agree, links work, pages match the code."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
import yaml

from orchestration.__main__ import main
from orchestration.operations.local_cluster import choice, node_layout
from tests.checkout_files import list_files
from tests.conftest import FIRST

ROOT = Path(__file__).resolve().parent.parent
LOCK = {package["name"]: package for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]}
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@functools.cache
def _tracked() -> list[Path]:
    return [ROOT / name for name in list_files(ROOT) if (ROOT / name).is_file()]


def test_lock_file_is_current() -> None:
    uv = shutil.which("uv") or str(ROOT / ".uv/bin/uv")
    subprocess.run([uv, "lock", "--check"], cwd=ROOT, check=True, capture_output=True)


def test_prefect_yaml_has_the_locked_version() -> None:
    deploy = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    assert deploy["prefect-version"] == LOCK["prefect"]["version"]


def test_image_has_the_entry_points_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    for group, entries in project["entry-points"].items():
        lines = "".join(f"{name} = {value}\\n" for name, value in entries.items())
        assert f"'[{group}]\\n{lines}'" in dockerfile
    assert f"Name: {project['name']}\\nVersion: {project['version']}\\n" in dockerfile
    assert f"{project['name'].replace('-', '_')}-{project['version']}.dist-info" in dockerfile
    for name, value in project["scripts"].items():
        assert f'-m {value.split(".")[0]} "$@"\\n\' >/usr/local/bin/{name}' in dockerfile


def test_base_and_uv_of_the_image_are_recorded_once() -> None:
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert set(re.findall(r"^FROM (\S+)", dockerfile, flags=re.M)) == {"${BASE_IMAGE}", "dependencies"}
    assert "ARG BASE_IMAGE\n" in dockerfile
    assert tomllib.loads((ROOT / "docker/bases.toml").read_text()).keys() == {"python"}
    assert re.search(r"^uv==[\d.]+ \\\n    --hash=sha256:", (ROOT / "docker/uv.txt").read_text(), flags=re.M)
    installs = [
        line
        for line in [*dockerfile.splitlines(), *(ROOT / "Makefile").read_text().splitlines()]
        if " install -" in line
    ]
    assert [line for line in installs if "pip" in line and "--require-hashes" not in line] == []
    assert len([line for line in installs if "uv.txt" in line]) == 2


def test_locked_versions_are_the_tested_minors() -> None:
    assert LOCK["prefect"]["version"].startswith("3.9.")
    assert LOCK["dbt-core"]["version"].startswith("1.12.")


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page. A repeated heading gets a number."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", text, flags=re.M):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


def _broken_links(page: Path) -> list[str]:
    """Return the links of a page to missing files or headings."""
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        file = page.parent / name if name else page
        if not link.startswith("http") and (not file.exists() or (anchor and anchor not in _anchors(file))):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    assert _broken_links(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One `two`, three: [four](b.md)\n## Same\n## Same\n```\n# No heading\n```\n")
    right = ["a.md", "a.md#one-two-three-four", "#right", "a.md#same", "a.md#same-1", "https://example.com/#x"]
    wrong = ["c.md", "c.md#one", "a.md#one", "#wrong", "a.md#same-2", "a.md#no-heading"]
    page = tmp_path / "b.md"
    page.write_text("# Right\n" + " ".join(f"[link]({target})" for target in [*right, *wrong]))
    assert _broken_links(page) == wrong


def test_readme_shows_code_that_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    table = readme.split("## Patterns in the example flow")[1].split("\n\n")[1]
    source = (ROOT / "flows/example_flow.py").read_text() + (ROOT / "flows/backfill.py").read_text()
    folded = " ".join(source.split()).replace("( ", "(").replace(", )", ")")
    shown = [code.replace("\\|", "|") for row in table.splitlines()[2:] for code in re.findall(r"`([^`]+)`", row)]
    assert len(shown) > 10
    for code in shown:
        for part in code.split(", retry_delay"):
            assert part in folded, f"the README shows {code!r}"


def test_pages_and_env_example_have_every_setting() -> None:
    from orchestration import settings

    table = [line for line in (settings.__doc__ or "").splitlines() if line.startswith("| `")]
    assert len(table) == len(settings.Settings.model_fields)
    page = (ROOT / "docs/reference/settings.md").read_text()
    example = (ROOT / ".env.example").read_text()
    for row in table:
        assert row in page
        assert f"# {row.split('`')[1]}=" in example


def test_ci_calls_make_test() -> None:
    assert (ROOT / ".ci/run").read_text().splitlines()[-1] == "make test"
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    last = job["steps"][-1]
    # As root and with the runner's programs. CLUSTER is set, as a runner has Docker: tests have no images for kind.
    command = re.fullmatch(r'sudo -E env "PATH=\$PATH" "LD_LIBRARY_PATH=.*" CLUSTER=(\w+) bash \.ci/run', last["run"])
    assert command
    assert choice.CONTEXTS[command[1]] == node_layout.CONTEXT
    assert last["env"] == {"PYTHON": "python${{ matrix.python }}"}, "without it each job has the distribution's Python"
    [checkout] = [step["with"] for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
    assert checkout == {"fetch-depth": 0}, "without history the upgrade from the previous release is skipped"
    assert {"3.11", "3.13"} <= set(job["strategy"]["matrix"]["python"])


def test_workflows_use_actions_by_commit_and_audit_the_lock_file() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / ".github/workflows").iterdir()}
    used = [line for text in texts.values() for line in re.findall(r"uses: (.*)", text)]
    assert used
    assert not [line for line in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40}  # v[\d.]+", line)]
    steps = yaml.safe_load(texts["versions.yml"])["jobs"]["audit"]["steps"]
    assert steps[-1]["run"] == "make audit"


@pytest.mark.parametrize("python", ["", "a-python-of-your-own"])
def test_ci_uses_the_named_python(tmp_path: Path, python: str) -> None:
    make = tmp_path / "make"
    make.write_text('#!/bin/sh\necho "$* by ${PYTHON:-any}"\n')
    make.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", ROOT / ".ci/run"],
        env=os.environ | {"PATH": path, "PYTHON": python}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    output = done.stdout.strip()
    assert output == f"test by {python}" if python else output in ("test by /usr/bin/python3", "test by any")


def test_orchestration_does_not_import_flows() -> None:
    for path in (ROOT / "orchestration").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) flows", path.read_text(), flags=re.M), path


def test_tree_of_contributing_has_every_package() -> None:
    tree = re.findall(r"```text\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)[0]
    folders: list[str] = []
    drawn = set()
    for indent, name in re.findall(r"^( *)([\w/]+)/ ", tree, flags=re.M):
        folders = [*folders[: len(indent) // 2], name]
        drawn.add("/".join(folders))
    assert [folder for folder in drawn if not (ROOT / folder).is_dir()] == []
    packages = {
        path.parent.relative_to(ROOT).as_posix()
        for path in _tracked()
        if path.name == "__init__.py" and path.is_relative_to(ROOT / "orchestration")
    }
    assert packages - drawn == set()
    top_level = {path.relative_to(ROOT).parts[0] for path in _tracked() if path.parent != ROOT}
    assert {name for name in top_level if not name.startswith(".")} - drawn == set()


def test_image_does_not_import_the_operations_that_it_lacks() -> None:
    assert "orchestration/operations" in (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines()
    in_image = [
        path
        for folder in ("orchestration", "flows")
        for path in (ROOT / folder).rglob("*.py")
        if not path.is_relative_to(ROOT / "orchestration/operations")
    ]
    assert len(in_image) > 50
    # Also as a text: a program that is started by `python -m`.
    pattern = re.compile(r"orchestration[./]operations|from orchestration import .*\boperations\b")
    found = {path: pattern.findall(path.read_text()) for path in in_image}
    # `orchestrate doctor` looks from outside, and says so where the package is missing.
    assert {path: len(lines) for path, lines in found.items() if lines} == {ROOT / "orchestration/__main__.py": 1}


def test_doctor_in_the_image_names_the_place_for_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [module for module in sys.modules if module.startswith("orchestration.operations")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "orchestration.operations", None)
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("doctor is not possible here: there is no orchestration.operations")
    assert error.endswith("Run it in a checkout, as make doctor does.\n")


@pytest.mark.parametrize("module", ["flows/landing.py", "flows/raw.py", "flows/report.py"])
def test_code_of_tasks_imports_no_prefect(module: str) -> None:
    assert not re.search(r"^\s*(from|import) prefect", (ROOT / module).read_text(), flags=re.M)


def test_ordered_test_files_exist() -> None:
    assert [file for file in FIRST if not (ROOT / file).is_file()] == []


def test_names_say_what_they_hold() -> None:
    vague = {"each", "told", "spoken", "said", "its"}
    found: list[str] = []
    for path in (path for path in _tracked() if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name | ast.arg):
                name = node.id if isinstance(node, ast.Name) else node.arg
                found += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}"] if name in vague else []
    assert found == []


def test_no_module_is_called_utils_or_helpers() -> None:
    assert not [path for path in _tracked() if path.stem in ("utils", "helpers", "common", "misc")]
