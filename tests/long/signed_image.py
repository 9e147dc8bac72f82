"""Sign an image by its digest, and refuse to deploy what is not signed.

`make test` does not collect this file: the first builds of cosign and syft take minutes.
"""

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.docker.signing import BASE, KEY, SmallCheckout, image_registry

PASSWORD = "a $pass word"  # noqa: S105 - of keys that the tests make


@dataclass(frozen=True)
class Publisher:
    """Signs images of a small checkout and pushes them to a registry.

    Args:
        checkout: its environment `staging` has the public key.
        registry: the registry's address.
        keys: the folder with the private keys `right.key` and `other.key`.
        cosign: the path of cosign.
    """

    checkout: SmallCheckout
    registry: str
    keys: Path
    cosign: str

    def variables(self, name: str, key: str = "right", **given: str) -> dict[str, str]:
        """Return make's variables that push and sign an image of a repository and a tag: `name` is REPOSITORY:TAG."""
        image = f"{self.registry}/{name}"
        signing = {"COSIGN_KEY": str(self.keys / f"{key}.key"), "COSIGN_PASSWORD": PASSWORD}
        return {"REGISTRY": self.registry, "IMAGE": image} | signing | given

    def push(self, name: str, key: str = "right", **given: str) -> str:
        """Push and sign an image, and return its name by its digest."""
        return self.checkout.output("make", "--silent", "push", "SIGN=1", **self.variables(name, key, **given))

    def refused_push(self, name: str, **given: str) -> str:
        """Push and sign an image, which has to fail in one line, and return the line."""
        done = self.checkout.run("docker/sign", **self.variables(name, **given))
        assert (done.returncode, done.stdout) == (1, "")
        lines = [line for line in done.stderr.splitlines() if not line.startswith(("STEP ", "COMMIT ", "-->"))]
        return lines[-1]

    def push_unsigned(self, name: str) -> str:
        """Push an image without a signature, and return its name by its digest."""
        variables = {"REGISTRY": self.registry, "IMAGE": f"{self.registry}/{name}"}
        self.checkout.output("docker/build", "--push", **variables)
        return self.checkout.output("docker/build", "--digest", **variables)

    def run_cosign(self, *arguments: str) -> str:
        """Run cosign with the private key's password."""
        return self.checkout.output(self.cosign, *arguments, COSIGN_PASSWORD=PASSWORD)

    def refusal(self, name: str) -> str:
        """Return why a deploy of an image is refused, without the lines of its progress."""
        done = self.checkout.deployed(REGISTRY=self.registry, IMAGE=f"{self.registry}/{name}")
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def publisher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    folder = tmp_path_factory.mktemp("signed")
    checkout = SmallCheckout(folder / "checkout").make()
    cosign = checkout.output("docker/sign", "--cosign")
    keys = folder / "keys"
    keys.mkdir()
    for name in ("right", "other"):
        command = [cosign, "generate-key-pair", "--output-key-prefix", name]
        environment = os.environ | {"COSIGN_PASSWORD": PASSWORD}
        subprocess.run(command, cwd=keys, env=environment, check=True, capture_output=True)
    shutil.copy(keys / "right.pub", checkout.folder / KEY)
    checkout.commit()
    (folder / "registry").mkdir()
    with image_registry(folder / "registry") as registry:
        yield Publisher(checkout, registry, keys, cosign)


def _predicates(publisher: Publisher, kind: str, image: str) -> list[Any]:
    """Return the verified predicates of an attestation's type."""
    output = publisher.run_cosign(
        "verify-attestation", "--type", kind, "--key", str(publisher.keys / "right.pub"),
        "--insecure-ignore-tlog=true", image,
    )  # fmt: skip
    statements = [json.loads(base64.b64decode(json.loads(line)["payload"])) for line in output.splitlines()]
    assert {statement["subject"][0]["digest"]["sha256"] for statement in statements} == {image.rpartition(":")[2]}
    return [statement["predicate"] for statement in statements]


def test_signed_image_with_both_attestations_is_deployed(publisher: Publisher) -> None:
    image = publisher.push("signed:1")
    deployed = publisher.checkout.deployed(REGISTRY=publisher.registry, IMAGE=f"{publisher.registry}/signed:1")
    assert (deployed.returncode, deployed.stdout.strip()) == (0, image), deployed.stderr
    [materials] = _predicates(publisher, "cyclonedx", image)
    assert (materials["bomFormat"], materials["metadata"]["component"]["name"]) == ("CycloneDX", image)
    [provenance] = _predicates(publisher, "slsaprovenance1", image)
    built = provenance["buildDefinition"]
    assert built["externalParameters"]["baseImage"] == BASE
    assert built["resolvedDependencies"][1]["annotations"] == {"clean": True}

    # The same image by a second tag, and signed again.
    for name in ("signed:2", "signed:1"):
        assert publisher.push(name) == image
        deployed = publisher.checkout.deployed(REGISTRY=publisher.registry, IMAGE=f"{publisher.registry}/{name}")
        assert (deployed.returncode, deployed.stdout.strip()) == (0, image), deployed.stderr
    assert len(_predicates(publisher, "cyclonedx", image)) == 1


def test_unsigned_image_is_refused(publisher: Publisher) -> None:
    image = publisher.push_unsigned("unsigned:1")
    assert publisher.refusal("unsigned:1") == (
        f"{image} is refused: it has no signature by the key of {KEY} (no signatures found). Push and sign the "
        "image of this checkout with that key: make push SIGN=1"
    )


def test_image_that_another_key_has_signed_is_refused(publisher: Publisher) -> None:
    image = publisher.push("other:1", "other")
    refusal = publisher.refusal("other:1")
    assert refusal.startswith(f"{image} is refused: it has no signature by the key of {KEY} (no matching signatures")


def test_image_without_an_attestation_is_refused(publisher: Publisher) -> None:
    image = publisher.push_unsigned("attested:1")
    key = ("--key", str(publisher.keys / "right.key"), "--yes", "--tlog-upload=false")
    publisher.run_cosign("sign", *key, image)
    assert publisher.refusal("attested:1").startswith(f"{image} is refused: it has no bill of materials by the key of ")
    materials = publisher.keys / "materials.json"
    materials.write_text('{"bomFormat": "CycloneDX", "specVersion": "1.6"}')
    publisher.run_cosign("attest", "--type", "cyclonedx", "--predicate", str(materials), *key, image)
    assert publisher.refusal("attested:1").startswith(f"{image} is refused: it has no provenance by the key of ")


def test_image_that_was_replaced_under_its_tag_is_refused(publisher: Publisher) -> None:
    older = publisher.push("replaced:1")
    licence = publisher.checkout.folder / "LICENSE"
    licence.write_text(licence.read_text() + "changed\n")
    newer = publisher.push("replaced:2")
    assert older != newer
    licence.write_text(licence.read_text() + "changed again\n")
    unsigned = publisher.push_unsigned("replaced:3")
    image = f"{publisher.registry}/replaced"
    for source, tag in ((older, "2"), (unsigned, "1")):
        publisher.checkout.output("buildah", "pull", "--quiet", "--tls-verify=false", source)
        publisher.checkout.output("buildah", "push", "--quiet", "--tls-verify=false", source, f"docker://{image}:{tag}")
    assert publisher.refusal("replaced:1").startswith(f"{unsigned} is refused: it has no signature by the key of ")
    assert publisher.refusal("replaced:2") == (
        f"{older} is refused: the registry has it under the tag 2, but it was signed as 1. Push and sign the image of "
        "this checkout: make push SIGN=1"
    )


def test_key_that_cannot_sign_is_refused_before_the_build(publisher: Publisher) -> None:
    key = publisher.keys / "right.key"
    wrong = publisher.refused_push("wrong:1", COSIGN_PASSWORD="wrong")  # noqa: S106
    assert wrong.startswith(f"COSIGN_KEY={key} cannot be used: ")
    assert wrong.endswith(". Check COSIGN_PASSWORD and the key")
    invalid = publisher.refused_push("wrong:1", COSIGN_KEY=str(publisher.keys / "right.pub"))
    assert invalid.startswith(f"COSIGN_KEY={publisher.keys / 'right.pub'} cannot be used: ")
    absent = publisher.checkout.run("docker/build", "--digest", **publisher.variables("wrong:1"))
    assert "wrong:1 is not in the registry" in absent.stderr


def test_registry_that_does_not_answer_is_named(publisher: Publisher, tmp_path: Path) -> None:
    with image_registry(tmp_path) as registry:
        publisher.checkout.output("docker/build", "--push", REGISTRY=registry, IMAGE=f"{registry}/gone:1")
    assert publisher.refused_push("gone:1", REGISTRY=registry, IMAGE=f"{registry}/gone:1").startswith(
        f"{registry}/gone:1 is not pushed: "
    )
