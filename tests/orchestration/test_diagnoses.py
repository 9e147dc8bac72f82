"""The pages of the diagnoses, as `orchestrate explain` prints them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from orchestration import diagnoses
from orchestration.__main__ import main
from orchestration.diagnosis_table import STATE_DIAGNOSES, Diagnosis
from orchestration.settings import ROOT

WORDS = {
    "oom": "oom",
    "OOMKilled": "oom",
    "oomkilled": "oom",
    "137": "crash",
    "SIGKILL": "crash",
    "SIGSEGV": "crash",
    "Evicted": "disruption",
    "preempted": "disruption",
    "TimedOut": "deadline",
    "DeadlineExceeded": "deadline",
    "ErrImagePull": "image",
    "exceeded quota": "refused",
    "ClaimLost": "claim-lost",
    "Late": "late",
    "Cancelling": "cancelling",
    "given-up": "given-up",
    **STATE_DIAGNOSES,
}
"""Search terms, and the diagnosis that each means."""


def test_each_diagnosis_has_a_page_and_a_row_in_the_index() -> None:
    assert diagnoses.names() == sorted(get_args(Diagnosis))
    index = (ROOT / diagnoses.path(diagnoses.INDEX)).read_text()
    for name in diagnoses.names():
        assert f"[{diagnoses.title(name)}]({name}.md)" in index


def test_explain_finds_the_page_by_the_term_that_people_search_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert {word: diagnoses.find(word) for word in WORDS} == WORDS
    assert main(["explain", "OOMKilled"]) == 0
    assert capsys.readouterr().out.startswith(f"# {diagnoses.title('oom')}\n")


def test_explain_prints_links_as_paths_of_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("", *diagnoses.names()):
        source = (ROOT / diagnoses.path(name or diagnoses.INDEX)).read_text()
        assert main(["explain", name] if name else ["explain"]) == 0
        text = capsys.readouterr().out
        assert "](" not in text
        linked = {link.rpartition("/")[2] for link in re.findall(r"\]\(([^)#]+)", source)}
        assert {link.rpartition("/")[2] for link in re.findall(r"\(docs/([^)#]+)", text)} == linked


@pytest.mark.parametrize("word", ["gremlins", "(", "Crashed", " ", "../errors", "index"])
def test_explain_lists_the_pages_if_the_word_means_none_or_several(
    capsys: pytest.CaptureFixture[str], word: str
) -> None:
    assert main(["explain", word]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.match(r"No page is about|\d+ pages are about", shown.err)
    assert f"\n  {'given-up':<14} {diagnoses.title('given-up')}\n" in shown.err
    assert shown.err.endswith("Name one of them: orchestrate explain NAME.\n")


def test_explain_needs_no_server(tmp_path: Path) -> None:
    """It needs only the folders that the Dockerfile copies."""
    for folder in ("orchestration", diagnoses.FOLDER):
        assert f"\nCOPY {folder} {folder}\n" in (ROOT / "docker/Dockerfile").read_text()
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-P", "-m", "orchestration", "explain", "oom"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == diagnoses.page("oom")
