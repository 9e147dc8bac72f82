"""The image: its contents, its tag, and that it runs as a pod of the `restricted` standard."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from packaging.requirements import Requirement

from orchestration.settings import ROOT
from tests.cluster.namespace import RESTRICTED, Namespace
from tests.parts import commit_copy_of_checkout

INSIDE = """
import importlib.metadata, json, os, pathlib, shutil, stat
files = {}
for folder, _, names in os.walk("/", onerror=lambda error: None):
    if folder.split("/")[1] in ("proc", "sys", "dev", "tmp", "run", "var"):
        continue
    for name in names:
        found = os.lstat(os.path.join(folder, name))
        if stat.S_ISREG(found.st_mode):
            files[found.st_ino] = found.st_size
def writable(path):
    try:
        pathlib.Path(path, "probe").write_text("")
        return True
    except OSError:
        return False
print(json.dumps({
    "bytes": sum(files.values()),
    "packages": {package.name: package.version for package in importlib.metadata.distributions()},
    "programs": [name for name in ("cc", "gcc", "make", "pip", "uv", "git", "curl") if shutil.which(name)],
    "user": [os.getuid(), os.getgid()],
    "first": pathlib.Path("/proc/1/comm").read_text().strip(),
    "writable": [path for path in ("/", "/app", "/app/flows", "/opt/venv", "/home", "/tmp") if writable(path)],
    "compiled": len(list(pathlib.Path("/app").rglob("*.pyc"))),
    "sources": len(list(pathlib.Path("/app").rglob("*.py"))),
    "operations": pathlib.Path("/app/orchestration/operations").exists(),
    "app": sorted(path.name for path in pathlib.Path("/app").iterdir()),
    "parsed": pathlib.Path("/app/flows/warehouse/target/partial_parse.msgpack").exists(),
    "caches": [path for path in ("/root/.cache", "/var/lib/apt/lists", "/opt/uv")
               if any(pathlib.Path(path).glob("*"))],
}))
"""


def _registry(path: str) -> Any:
    accepted = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
    request = Request(f"http://localhost:5000/v2/{path}", headers={"Accept": accepted})
    with urlopen(request, timeout=60) as response:  # noqa: S310
        return json.load(response)


def _manifest(image: str) -> dict[str, Any]:
    name, _, tag = image.removeprefix("localhost:5000/").rpartition(":")
    manifest: dict[str, Any] = _registry(f"{name}/manifests/{tag}")
    return manifest


@pytest.fixture
def pod(namespace: Namespace, image: str) -> Callable[..., str]:
    """Run a command in a pod of the image and return its standard output."""
    namespace.kubectl("label", "namespace", namespace.name, "pod-security.kubernetes.io/enforce=restricted")
    container = {
        "image": image,
        "command": None,
        "args": ["sleep", "600"],
        "securityContext": RESTRICTED | {"runAsUser": None, "readOnlyRootFilesystem": True},
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "1Gi"}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 - in the pod
    }
    namespace.pod("image", container=container, volumes=[{"name": "tmp", "emptyDir": {}}])
    return lambda *command: namespace.kubectl("exec", "image", "--", *command)


def test_image_contains_what_runs_need_and_nothing_else(pod: Callable[..., str]) -> None:
    inside = json.loads(pod("python", "-c", INSIDE))
    # dbt-core 1.12 brought metricflow, sqlglot and rapidfuzz: 26 MB.
    assert inside["bytes"] < 620e6
    assert inside["user"] == [65532, 65532]
    assert inside["first"] == "tini"
    assert inside["programs"] == []
    assert inside["writable"] == ["/tmp"]  # noqa: S108 - in the pod
    assert inside["compiled"] == inside["sources"] > 10
    assert inside["app"] == ["docs", "flows", "orchestration", "prefect.yaml", "pyproject.toml", "uv.lock"]
    assert not inside["operations"], "deploy tooling runs on the machine of the person who deploys"
    assert inside["parsed"]
    assert inside["caches"] == []

    uv = shutil.which("uv") or str(ROOT / ".uv/bin/uv")
    locked = subprocess.run(
        [uv, "export", "--quiet", "--locked", "--no-hashes", "--no-annotate", "--no-emit-project"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    target = {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "python_version": "3.13",
        "python_full_version": "3.13.5",
    }
    expected = {
        _normal(requirement.name): str(requirement.specifier).removeprefix("==")
        for requirement in map(Requirement, filter(lambda line: line and line[0] != "#", locked.splitlines()))
        if not requirement.marker or requirement.marker.evaluate(target)
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    expected |= {project["name"]: project["version"]}  # its entry points
    assert {_normal(name): version for name, version in inside["packages"].items()} == expected


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.further
def test_image_runs_the_programs_of_the_cluster(pod: Callable[..., str]) -> None:
    assert "3.9" in pod("prefect", "--version")
    pod("python", "-c", "import flows.example_flow, flows.backfill, prefect_kubernetes")
    assert "postgres: 1.11" in pod("dbt", "--version")
    pod("orchestrate", "check")
    pod("python", "-c", "import fsspec; [fsspec.get_filesystem_class(name) for name in ('redis', 's3')]")
    pod("python", "-c", "import orchestration.runs.engine")
    assert pod(
        "python", "-c", "import zoneinfo; print(zoneinfo.TZPATH, zoneinfo.ZoneInfo('Europe/Zurich'))"
    ).split() == [
        "()",
        "Europe/Zurich",
    ]


def test_tag_is_a_text_in_yaml(image: str) -> None:
    """Some YAML parsers read digits alone, and digits around an e, as a number."""
    assert re.fullmatch(r"src-[0-9a-f]{12}", image.rpartition(":")[2])


def test_image_has_user_entrypoint_and_labels_and_no_secret(image: str) -> None:
    config = _registry(
        f"{image.removeprefix('localhost:5000/').rpartition(':')[0]}/blobs/{_manifest(image)['config']['digest']}"
    )["config"]
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"] == ["/usr/bin/tini", "-g", "--"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert re.fullmatch("[0-9a-f]{40}", labels["revision"])
    assert labels["licenses"] == "Apache-2.0"
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert version
    assert labels["version"] == version[1]
    secret = re.compile("password|secret|token", re.IGNORECASE)
    assert not [variable for variable in config["Env"] if secret.search(variable)]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of this checkout that a test may change."""
    copy = tmp_path / "checkout"
    commit_copy_of_checkout(copy)
    return copy


def _build(checkout: Path, *arguments: str) -> str:
    return subprocess.run(
        ["docker/build", *arguments], cwd=checkout, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


@pytest.mark.further
def test_changed_flow_and_included_file_rebuild_only_the_last_layers(
    image: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image contains the files that prefect.yaml includes: the build's last check fails if one is missing."""
    monkeypatch.setenv("PYTHON", sys.executable)
    assert _build(checkout, "--push") == image, "the same files have the same tag"
    flow = checkout / "flows" / "example_flow.py"
    flow.write_text(flow.read_text() + "\n# changed\n")
    (checkout / "teams" / "of data").mkdir(parents=True)
    (checkout / "teams" / "of data" / "one.yaml").write_text(
        "deployments:\n- {name: more, entrypoint: 'flows/backfill.py:backfill', work_pool: {name: default}}\n"
    )
    prefect = checkout / "prefect.yaml"
    prefect.write_text(prefect.read_text() + "\ninclude: ['teams/*/*.yaml']\n")
    changed = _build(checkout, "--push")
    assert changed != image
    before, after = (_manifest(built_image)["layers"] for built_image in (image, changed))
    new = [layer for layer in after if layer not in before]
    assert sum(layer["size"] for layer in new) < 2e6
    (checkout / "docs" / "explanation" / "loading.md").write_text("")
    assert _build(checkout) == changed, "a file that the image does not contain does not change the tag"


def test_included_file_outside_the_checkout_is_refused(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON", sys.executable)
    (checkout.parent / "others.yaml").write_text("deployments: []\n")
    prefect = checkout / "prefect.yaml"
    prefect.write_text(prefect.read_text() + "\ninclude: ['../others.yaml']\n")
    done = subprocess.run(["docker/build"], cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    outside = (
        f"prefect.yaml includes {checkout.parent}/others.yaml, which is outside of {checkout}, from which the image"
    )
    assert done.stderr.startswith(outside)


def test_unknown_builder_is_refused(checkout: Path) -> None:
    (checkout / "flows" / "new.py").write_text("")
    environment = os.environ | {"BUILDER": "kaniko"}
    done = subprocess.run(["docker/build"], cwd=checkout, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "BUILDER=kaniko is unknown. Use docker or buildah"


def test_bill_of_materials_without_syft_and_go_names_what_to_install(tmp_path: Path) -> None:
    """`make test-long FOR=bill-of-materials` writes a bill of materials."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "dirname", "realpath"):
        (programs / name).symlink_to(str(shutil.which(name)))
    environment = {"PATH": str(programs), "HOME": str(tmp_path)}
    command = [ROOT / "docker" / "sbom", tmp_path / "sbom.json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "There is neither syft nor Go to build it with. Install one of them\n"
    assert not (tmp_path / "sbom.json").exists()
