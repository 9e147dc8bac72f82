"""Test the image's bill of materials.

`make test` does not collect this file: the first build of syft takes minutes.
"""

import json
import re
import subprocess
from pathlib import Path

from orchestration.settings import ROOT
from tests.cluster.namespace import Namespace

LIST_PACKAGES = (
    "import importlib.metadata, json; print(json.dumps([d.name for d in importlib.metadata.distributions()]))"
)


def test_bill_of_materials_names_every_package_of_the_image(namespace: Namespace, image: str, tmp_path: Path) -> None:
    subprocess.run([ROOT / "docker" / "sbom", tmp_path / "sbom.json"], check=True, stdout=subprocess.DEVNULL)
    components = json.loads((tmp_path / "sbom.json").read_text())["components"]
    listed = {(item["purl"].split("/")[0], _normalize(item["name"])) for item in components if "purl" in item}
    namespace.pod("image", "sleep", "600", container={"image": image})
    packages = json.loads(namespace.kubectl("exec", "image", "--", "python", "-c", LIST_PACKAGES))
    assert {_normalize(name) for name in packages} <= {name for kind, name in listed if kind == "pkg:pypi"}
    assert ("pkg:deb", "tini") in listed


def _normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
