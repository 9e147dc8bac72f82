"""The files of a checkout are those that git does not ignore, also in an archive without git."""

import subprocess
from pathlib import Path

import pytest

from tests.checkout_files import list_files


@pytest.mark.parametrize("kind", ["a repository", "an archive without git"])
def test_ignored_files_are_left_out(tmp_path: Path, kind: str) -> None:
    listed = {".gitignore", ".ci/run", "flows/raw.py", "flows/new é.py", "docs/.gitignore", "docs/page.md"}
    ignored = {".venv/lib/a.py", "flows/__pycache__/raw.pyc", "docs/draft.md", ".env"}
    for name in listed | ignored:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".gitignore").write_text(".venv\n__pycache__/\n.env\n")
    (tmp_path / "docs/.gitignore").write_text("draft.md\n")
    if kind == "a repository":
        for command in (["init", "-q"], ["add", "flows/raw.py"]):
            subprocess.run(["git", *command], cwd=tmp_path, check=True)
    before = {path for path in tmp_path.rglob("*") if ".git" not in path.parts}
    assert set(list_files(tmp_path)) == listed
    assert set(list_files(tmp_path, "--others", "--ignored", "--exclude-standard", "--", "docs")) == {"docs/draft.md"}
    assert {path for path in tmp_path.rglob("*") if ".git" not in path.parts} == before, "nothing is left"
