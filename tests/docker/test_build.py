"""The image's tag, which `docker/build` makes from the contents of the files that the image holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.deployments.files import files_for_image
from tests.parts import copy_of_checkout


@pytest.fixture(params=[pytest.param("a repository", marks=pytest.mark.further), "an archive without git"])
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


def _run(checkout: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    path = f"{checkout.parent / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "BUILDER": "docker", "PYTHON": sys.executable} | variables
    command = ["docker/build", *arguments]
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def _name(checkout: Path, base: str = "base") -> str:
    done = _run(checkout, BASE_IMAGE=base)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def _program(checkout: Path, name: str, script: str) -> None:
    """Put a program first on the PATH of `docker/build`."""
    file = checkout.parent / "bin" / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def _digest(letter: str) -> str:
    return f"sha256:{letter * 64}"


FILES = {
    "flows/raw.py": True,
    "orchestration/runs/supervisor.py": True,
    "docs/diagnoses/oom.md": True,
    "docker/uv.txt": True,
    "orchestration/operations/deploy.py": False,
    "README.md": False,
}
"""Files, and whether each is in the image."""


def test_tag_changes_with_a_file_of_the_image_alone(checkout: Path) -> None:
    before = _name(checkout)
    for file, is_in_image in FILES.items():
        with (checkout / file).open("a") as opened:
            opened.write("\n# changed\n")
        after = _name(checkout)
        assert (after != before) is is_in_image, file
        before = after


def test_tag_changes_with_a_file_that_prefect_yaml_includes(checkout: Path) -> None:
    included = checkout / "teams" / "of data" / "one.yaml"
    included.parent.mkdir(parents=True)
    prefect = checkout / "prefect.yaml"
    names = [_name(checkout)]
    prefect.write_text(prefect.read_text() + "\ninclude: ['teams/*/*.yaml']\n")
    for content in ("deployments: []\n", "deployments: []  # changed\n"):
        included.write_text(content)
        names.append(_name(checkout))
    assert len(set(names)) == 3


def test_entrypoint_that_the_image_will_not_have_is_refused(checkout: Path) -> None:
    (checkout / "jobs").mkdir()
    for name in ("jobs/etl.py", "top.py"):
        (checkout / name).write_text("from prefect import flow\n\n@flow\ndef etl(): ...\n")
    prefect = checkout / "prefect.yaml"
    prefect.write_text(prefect.read_text() + "\ninclude: [team.yaml]\n")
    entrypoints = ("jobs/etl.py:etl", "./jobs/etl.py:etl", "jobs.etl:etl", "jobs.etl.etl", "top:etl")
    for entrypoint in entrypoints:
        (checkout / "team.yaml").write_text(f"deployments:\n- name: d\n  entrypoint: {entrypoint}\n")
        done = _run(checkout, BASE_IMAGE="base")
        folder = "top.py" if entrypoint == "top:etl" else "jobs"
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            f"team.yaml:3: the image will not have the entrypoint {entrypoint}. Move it to flows/, or add {folder} to "
            "docker/Dockerfile and to docker/Dockerfile.dockerignore\n"
        )
    with (checkout / "docker" / "Dockerfile.dockerignore").open("a") as ignore:
        ignore.write("!jobs\n!top.py\n")
    listed = "".join(f"- {{name: d, entrypoint: '{entrypoint}'}}\n" for entrypoint in entrypoints)
    (checkout / "team.yaml").write_text(f"deployments:\n{listed}")
    assert _name(checkout)


@pytest.mark.parametrize("ignore", ["*\n!/jobs\n", "*\n!**/*.py\n", "*\n!jobs/*.py\n", "secrets\n", None])
def test_entrypoint_that_the_image_may_have_is_not_refused(tmp_path: Path, ignore: str | None) -> None:
    """The base image may have an absolute path, and a file that is not here. `orchestrate check` explains the rest."""
    for folder in ("jobs", "docker"):
        (tmp_path / folder).mkdir()
    (tmp_path / "jobs/etl.py").touch()
    if ignore:
        (tmp_path / "docker/Dockerfile.dockerignore").write_text(ignore)
    entrypoints = ("/app/jobs/etl.py:etl", "jobs/absent.py:etl", "jobs/etl.py:etl", "jobs.etl:etl", "''", ".jobs:etl")
    listed = "".join(f"- {{name: d, entrypoint: {entrypoint}}}\n" for entrypoint in entrypoints)
    (tmp_path / "team.yaml").write_text(f"deployments:\n{listed}")
    assert files_for_image("team.yaml", tmp_path) == []


def test_tag_and_build_have_the_digest_of_the_base(checkout: Path) -> None:
    log = checkout.parent / "builds"
    _program(checkout, "docker", f'case "$1 $2" in "image inspect") exit 1 ;; "buildx build") echo "$@" >{log} ;; esac')

    def build(local: str) -> tuple[str, str]:
        """Return the image's name and base, on a machine whose local registry has a base of this digest."""
        _program(checkout, "curl", f"printf 'Docker-Content-Digest: {local}\\r\\n'" if local else "exit 22")
        name = _name(checkout, base="")
        [base] = [word for word in log.read_text().split() if word.startswith("BASE_IMAGE=")]
        return name, base.removeprefix("BASE_IMAGE=")

    file = checkout / "docker" / "bases.toml"
    made = [build(_digest("a")), build(_digest("b"))]
    for digest in (_digest("c"), _digest("d")):
        file.write_text(f'# A comment\npython = "python:3.13-slim-trixie@{digest}"\n')
        made.append(build(""))
    names, bases = zip(*made, strict=True)
    assert list(bases) == [
        *(f"localhost:5000/python@{_digest(letter)}" for letter in "ab"),
        *(f"python:3.13-slim-trixie@{_digest(letter)}" for letter in "cd"),
    ]
    assert len(set(names)) == 4


def test_bases_are_updated_where_their_registry_answers_and_stay_elsewhere(checkout: Path) -> None:
    file = checkout / "docker" / "bases.toml"
    before = file.read_text()
    _program(checkout, "skopeo", "echo 'pinging container registry registry-1.docker.io: no route to host' >&2; exit 1")
    done = _run(checkout, "--update-bases")
    assert (done.returncode, done.stdout, file.read_text()) == (1, "", before)
    assert done.stderr == (
        "docker/bases.toml is unchanged: no digest of python:3.13-slim-trixie is known here: pinging container "
        "registry registry-1.docker.io: no route to host. Run make update-bases where its registry can be reached\n"
    )
    for letter in "ab":
        answer = f'[ "$6" = docker://docker.io/library/python:3.13-slim-trixie ] && echo {_digest(letter)}'
        _program(checkout, "skopeo", answer)
        done = _run(checkout, "--update-bases")
        shown = f"python:3.13-slim-trixie@{_digest(letter)}"
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{shown}\n", "")
        assert file.read_text().splitlines()[1:] == [f'python = "{shown}"']
