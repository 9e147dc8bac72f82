"""What is refused without cosign before an image is signed or deployed, and the provenance of an image.

tests/long/signed_image.py signs and verifies with cosign, which takes minutes to build.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docker.signing import BASE, KEY, SmallCheckout, image_registry


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> SmallCheckout:
    return SmallCheckout(tmp_path_factory.mktemp("small") / "checkout").make()


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with image_registry(tmp_path_factory.mktemp("registry")) as address:
        yield address


@pytest.fixture(scope="module")
def without_cosign(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a machine with the programs of this one, but with neither cosign nor Go."""
    programs, cache = tmp_path_factory.mktemp("bin"), tmp_path_factory.mktemp("cache")
    for folder in map(Path, os.environ["PATH"].split(":")):
        for program in folder.iterdir() if folder.is_dir() else ():
            if program.name not in ("cosign", "go") and not (programs / program.name).is_symlink():
                (programs / program.name).symlink_to(program)
    return {"PATH": str(programs), "XDG_CACHE_HOME": str(cache)}


UNSET = "COSIGN_PASSWORD is not set. Set it to the password of COSIGN_KEY, or to nothing if the key has none"
NO_COSIGN = "There is neither cosign 2 nor Go to build it with. Install one of them"


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ({}, "No key is named to sign with. Name a file or a key of a KMS: make push SIGN=1 COSIGN_KEY=cosign.key"),
        ({"COSIGN_KEY": "LICENSE", "COSIGN_PASSWORD": ""}, NO_COSIGN),
        *(
            pytest.param(*case, marks=pytest.mark.further)
            for case in (
                (
                    {"COSIGN_KEY": "absent.key"},
                    "COSIGN_KEY=absent.key cannot be read. Name the file of the private key",
                ),
                ({"COSIGN_KEY": "LICENSE"}, UNSET),
                ({"COSIGN_KEY": "env://KEY"}, UNSET),
                ({"COSIGN_KEY": "awskms:///alias/images"}, NO_COSIGN),
            )
        ),
    ],
)
def test_signing_without_key_password_or_cosign_is_refused_before_the_build(
    checkout: SmallCheckout, without_cosign: dict[str, str], given: dict[str, str], refusal: str
) -> None:
    # Nothing listens on port 1.
    done = checkout.run("make", "--silent", "push", "SIGN=1", REGISTRY="localhost:1", **without_cosign, **given)
    [line, *made] = done.stderr.splitlines()
    assert (done.stdout, line) == ("", refusal)
    assert all(text.startswith("make: ") for text in made), made
    assert done.returncode == 2


KUBECTL = """#!/bin/sh
echo "$*" >>"{log}"
case "$*" in *"config get-contexts"*) echo here ;; *"auth can-i"*) echo yes ;; esac
"""
"""Records its calls, and answers as a cluster that allows everything."""


def test_deploy_of_an_environment_with_a_key_is_refused_before_it_changes_the_cluster(
    checkout: SmallCheckout, registry: str, without_cosign: dict[str, str], tmp_path: Path
) -> None:
    kubectl, log = tmp_path / "bin" / "kubectl", tmp_path / "log"
    kubectl.parent.mkdir()
    kubectl.write_text(KUBECTL.format(log=log))
    kubectl.chmod(0o755)
    variables = without_cosign | {"PATH": f"{kubectl.parent}:{without_cosign['PATH']}", "REGISTRY": registry}
    checkout.output("docker/build", "--push", REGISTRY=registry)
    digest = checkout.output("docker/build", "--digest", REGISTRY=registry)
    without_key = checkout.deployed(**variables)
    assert (without_key.returncode, without_key.stdout.strip()) == (0, digest), without_key.stderr

    (checkout.folder / KEY).touch()
    checkout.commit()
    command = (sys.executable, "-m", "orchestration.operations", "deploy", "--env", "staging", "--context", "here")
    done = checkout.run(*command, **variables)
    (checkout.folder / KEY).unlink()
    checkout.commit()
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"{NO_COSIGN}."
    calls = log.read_text().splitlines()
    assert any("auth can-i" in call for call in calls)
    assert [call for call in calls if not any(read in call for read in ("config ", " get ", " auth can-i "))] == []


def test_provenance_names_what_the_image_was_built_from(checkout: SmallCheckout, registry: str, tmp_path: Path) -> None:
    remote = ["git", "remote", "add", "origin", "https://someone:secret@git.example.com/team/flows.git"]
    subprocess.run(remote, cwd=checkout.folder, check=True)
    strange = checkout.folder / "flows" / 'a "b" \\ é.py'
    made = []
    for is_clean in (True, False):
        if not is_clean:
            strange.touch()
        name = checkout.output("docker/build", "--provenance", str(tmp_path / "provenance"), REGISTRY=registry)
        tag = checkout.output("docker/build", "--name", REGISTRY=registry).rpartition(":")[2]
        assert name == checkout.output("docker/build", "--digest", REGISTRY=registry)
        definition = json.loads((tmp_path / "provenance").read_text())["buildDefinition"]
        assert definition["externalParameters"] == {
            "image": f"{registry}/prefect-orchestration:{tag}", "tag": tag, "builder": "buildah", "baseImage": BASE,
            "inputs": tag,
        }  # fmt: skip
        made.append((tag, definition["resolvedDependencies"]))
    strange.unlink()
    (clean_tag, [base, clean, *files]), (dirty_tag, [_, dirty, *more_files]) = made
    assert clean_tag != dirty_tag
    assert base == {"name": "base image", "uri": f"docker://{BASE}", "digest": {"sha256": "b" * 64}}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout.folder, capture_output=True, text=True, check=True)
    assert clean == {
        "name": "checkout",
        "uri": "git+https://git.example.com/team/flows.git",
        "digest": {"gitCommit": head.stdout.strip()},
        "annotations": {"clean": True},
    }
    assert dirty == clean | {"annotations": {"clean": False}}
    digests = {found["uri"]: found["digest"]["sha256"] for found in files}
    assert {"file:uv.lock", "file:docker/Dockerfile", "file:flows/example_flow.py"} <= digests.keys()
    listed = subprocess.run(["sha256sum", checkout.folder / "uv.lock"], capture_output=True, text=True, check=True)
    assert digests["file:uv.lock"] == listed.stdout.split()[0]
    assert len(more_files) == len(files) + 1


@pytest.mark.further
def test_push_that_the_registry_refuses_is_explained_in_one_line(checkout: SmallCheckout, tmp_path: Path) -> None:
    with image_registry(tmp_path, maintenance={"readonly": {"enabled": True}}) as registry:
        checkout.output("docker/build", REGISTRY=registry)
        done = checkout.run("docker/build", "--push", REGISTRY=registry)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{registry}/prefect-orchestration:src-")
    assert " is not pushed: " in line
    assert line.endswith(f"log in as a user who may push: buildah login {registry}")
