"""The image's tag, which `docker/build` makes from the contents of the files that the image holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts import copy_of_checkout


@pytest.fixture(params=["a repository", "an archive without git"])
def checkout(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / "checkout"
    made.mkdir()
    copy_of_checkout(made)
    if request.param == "a repository":
        subprocess.run(["git", "init", "-q"], cwd=made, check=True)
    # Every image is there already: the script prints the name and builds nothing.
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text("#!/bin/sh\n")
    docker.chmod(0o755)
    return made


def _name(checkout: Path) -> str:
    path = f"{checkout.parent / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "BUILDER": "docker", "PYTHON": sys.executable, "BASE_IMAGE": "base"}
    done = subprocess.run(["docker/build"], cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("file", "is_in_image"),
    [
        ("flows/raw.py", True),
        ("orchestration/runs/supervisor.py", True),
        ("docs/diagnoses/oom.md", True),
        ("orchestration/operations/deploy.py", False),
        ("README.md", False),
    ],
)
def test_tag_changes_with_a_file_of_the_image_alone(checkout: Path, file: str, is_in_image: bool) -> None:
    before = _name(checkout)
    with (checkout / file).open("a") as opened:
        opened.write("\n# changed\n")
    assert (_name(checkout) != before) is is_in_image
