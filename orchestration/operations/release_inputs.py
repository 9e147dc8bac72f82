"""Collect what a release is made of: the image, the values, the surroundings in `k8s/`, and a hash of all inputs."""

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from orchestration.operations import image_signature, namespace_of_runs, registry
from orchestration.operations.environment import OVERLAYS, POOL, SERVER, Environment, Object, run_program
from orchestration.progress import step
from orchestration.settings import ROOT

CHARTS = ROOT / "helm"

# The local cluster's registry has these instead of the public images, for machines that reach no image registry.
LOCAL_IMAGES = {
    "postgres": ("localhost:5000/postgres", "17"),
    "valkey": ("localhost:5000/valkey", "8.1"),
    "pgbouncer": ("localhost:5000/pgbouncer", "1.24"),
}


@dataclass(frozen=True)
class Image:
    """An image in a registry, named `repository@digest`."""

    repository: str
    digest: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}"


def checkout_image(environment: Environment) -> Image:
    """Return the checkout's image by its digest in the registry. For `local`, build and push the image first.

    If the environment has a key, verify that the key's owner has signed the image.

    Raises:
        ClusterError: the build fails, or the image is not in the registry, or not signed.
    """
    build = str(ROOT / "docker" / "build")
    if environment.name == "local" and not os.environ.get("IMAGE"):
        with step("Building and pushing the image", "1 s unchanged, 6 s for a changed flow, 60 s from nothing"):
            run_program([build, "--push"])
    name = run_program([build, "--digest"]).strip()
    repository, _, digest = name.partition("@")
    if environment.signing_key.exists():
        tag = run_program([build, "--name"]).strip().rpartition(":")[2]
        image_signature.verify(name, tag, environment.signing_key)
    return Image(repository, digest)


@contextmanager
def values_options(environment: Environment, release: str, image: Image) -> Iterator[list[str]]:
    """Yield Helm's options that name the values of a release. The files exist while the block lasts."""
    overrides: Object = {"image": {"repository": image.repository, "digest": image.digest}}
    if release == POOL and (former := namespace_of_runs.former_namespaces(environment)):
        overrides["runs"] = {"formerNamespaces": former}
    if release == SERVER and environment.name == "local":
        for name, (repository, tag) in local_images().items():
            component: Object = {"image": {"repository": repository, "tag": tag}}
            key = {"postgres": "database", "valkey": "redis"}.get(name, name)
            overrides[key] = component if name == "pgbouncer" else {"bundled": component}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(overrides, file)
        file.flush()
        yield ["--values", str(environment.values / f"{release}.yaml"), "--values", file.name]


def render(environment: Environment, release: str, *options: str) -> str:
    """Return the manifests of a release's chart, as for a cluster with admission policies.

    `helm template` does not ask the cluster for its kinds. `helm upgrade` does, and refuses what the cluster lacks.
    """
    kinds = ("--api-versions", "admissionregistration.k8s.io/v1/ValidatingAdmissionPolicy")
    return environment.helm("template", release, str(CHARTS / release), *kinds, *options)


@functools.cache
def local_images() -> dict[str, tuple[str, str]]:
    """Return those of `LOCAL_IMAGES` that the local registry has. A node of an older checkout lacks some."""
    return {name: image for name, image in LOCAL_IMAGES.items() if registry.has_image(":".join(image))}


@contextmanager
def surroundings(environment: Environment) -> Iterator[list[Path]]:
    """Yield a kustomization for each namespace of the environment, with local images for `local`."""
    with tempfile.TemporaryDirectory(prefix=".deploy-", dir=OVERLAYS) as folder:
        folders = []
        for namespace, part in zip(environment.namespaces, ("overlays", "runs"), strict=False):
            resource = f"../../../{part}/{environment.name}"
            kustomization: Object = {"resources": [resource], "namespace": namespace}
            if environment.name == "local" and "postgres" in local_images():
                name, tag = local_images()["postgres"]
                kustomization["images"] = [{"name": "postgres", "newName": name, "newTag": tag}]
            folders.append(Path(folder) / namespace)
            folders[-1].mkdir()
            (folders[-1] / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        yield folders


def input_hash(environment: Environment, release: str, image: Image, *former_namespaces: str) -> str:
    """Return a hash of all inputs of a release: chart, values and image. The same hash needs no rollout.

    For the server, the packages and `orchestration/` count instead of the image's digest, so that a changed flow
    does not restart the server. `orchestration/operations` is not in the image and does not count.
    """
    paths = [str(CHARTS / release), str(environment.values / f"{release}.yaml")]
    names = [environment.namespace, image.repository if release == SERVER else str(image), *former_namespaces]
    if release == SERVER:
        paths += ["docker/Dockerfile", "pyproject.toml", "uv.lock", "orchestration", ":!orchestration/operations"]
        names += [os.environ.get("IMAGE", ""), str(local_images()) if environment.name == "local" else ""]
    listed = run_program(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths])
    files = [ROOT / path for path in sorted(filter(None, listed.split("\0")))]
    contents = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"\0".join([*map(str.encode, names), *contents])).hexdigest()[:12]
