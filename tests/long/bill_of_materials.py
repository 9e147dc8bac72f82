"""The image's bill of materials. `make test` does not collect this file: syft is built for minutes, the first time."""

import json
import re
import subprocess
from pathlib import Path

from orchestration.settings import ROOT
from tests.cluster.namespace import Namespace

LIST_PACKAGES = (
    "import importlib.metadata, json; print(json.dumps([d.name for d in importlib.metadata.distributions()]))"
)


def test_every_package_of_the_image_is_named(namespace: Namespace, image: str, tmp_path: Path) -> None:
    subprocess.run([ROOT / "docker" / "sbom", tmp_path / "sbom.json"], check=True, stdout=subprocess.DEVNULL)
    components = json.loads((tmp_path / "sbom.json").read_text())["components"]
    listed = {(each["purl"].split("/")[0], _normalize(each["name"])) for each in components if "purl" in each}
    namespace.pod("image", "sleep", "600", container={"image": image})
    packages = json.loads(namespace.kubectl("exec", "image", "--", "python", "-c", LIST_PACKAGES))
    assert {_normalize(name) for name in packages} <= {name for kind, name in listed if kind == "pkg:pypi"}
    assert ("pkg:deb", "tini") in listed


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
