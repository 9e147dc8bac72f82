"""Deploy an environment, say what a deploy would change, go back, take it away."""

import difflib
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import yaml

from orchestration.errors import ClusterError
from orchestration.operations import registry, release_diagnosis, sync_check
from orchestration.operations.deploy_history import Deploys
from orchestration.operations.environment import OVERLAYS, POOL, RELEASES, SERVER, Environment, Object, run
from orchestration.progress import step
from orchestration.settings import ROOT

PATIENCE = 600.0
"""Seconds that a release's pods may take to become ready."""

CHARTS = ROOT / "helm"

# What the local cluster's registry has instead of the public images, where no image registry can be reached.
LOCAL_IMAGES = {"postgres": ("localhost:5000/postgres", "17"), "valkey": ("localhost:5000/valkey", "8.1")}


@dataclass(frozen=True)
class Image:
    """An image in a registry: `repository@digest`."""

    repository: str
    digest: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.digest}"


def check(environment: Environment) -> None:
    """That a deploy may begin.

    Raises:
        ClusterError: uncommitted changes would go where others work, or the cluster's user lacks a right.
    """
    if environment.name != "local":
        changed = run(["git", "status", "--porcelain"]).splitlines()
        if changed:
            raise ClusterError(
                f"The checkout has {len(changed)} uncommitted changes ({changed[0].split()[-1]}), and ENV="
                f"{environment.name} takes only what others can see. Commit or stash them"
            )
    for verb, kind in (
        ("create", "deployments.apps"),
        ("create", "secrets"),
        ("create", "configmaps"),
        ("create", "roles.rbac.authorization.k8s.io"),
    ):
        if not _may(environment, verb, kind):
            raise ClusterError(
                f"The user of {environment.context} may not {verb} {kind} in namespace {environment.namespace}. "
                "Ask for a Role that lets you, or name another KUBE_CONTEXT"
            )


def _may(environment: Environment, verb: str, kind: str) -> bool:
    try:
        return environment.kubectl("auth", "can-i", verb, kind).strip() == "yes"
    except ClusterError as error:  # it exits with 1 to say no
        if str(error).strip() == "no":
            return False
        raise


def image_of(environment: Environment) -> Image:
    """The checkout's image, by its digest in the registry; built and pushed first where that is local.

    Raises:
        ClusterError: it cannot be built, or is not in the registry.
    """
    build = str(ROOT / "docker" / "build")
    if environment.name == "local" and not os.environ.get("IMAGE"):
        with step("Building and pushing the image", "1 s unchanged, 6 s for a changed flow, 60 s anew"):
            run([build, "--push"])
    named = run([build, "--digest"]).strip()
    repository, _, digest = named.partition("@")
    return Image(repository, digest)


@contextmanager
def _values(environment: Environment, release: str, image: Image) -> Iterator[list[str]]:
    """helm's options that name a release's values."""
    overrides: Object = {"image": {"repository": image.repository, "digest": image.digest}}
    if release == SERVER and environment.name == "local" and (local := _local_images()):
        for key, name in (("database", "postgres"), ("redis", "valkey")):
            overrides[key] = {"bundled": {"image": {"repository": local[name][0], "tag": local[name][1]}}}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(overrides, file)
        file.flush()
        yield ["--values", str(environment.values / f"{release}.yaml"), "--values", file.name]


@functools.cache
def _local_images() -> dict[str, tuple[str, str]]:
    """`LOCAL_IMAGES`, where the local registry has them."""
    there = all(registry.has(f"{repository}:{tag}") for repository, tag in LOCAL_IMAGES.values())
    return LOCAL_IMAGES if there else {}


@contextmanager
def _surroundings(environment: Environment) -> Iterator[Path]:
    """The kustomization of what surrounds the charts: the overlay, in this namespace, with local images."""
    overlay = OVERLAYS / environment.name
    with tempfile.TemporaryDirectory(prefix=".deploy-", dir=OVERLAYS) as folder:
        kustomization: Object = {"resources": [f"../{overlay.name}"], "namespace": environment.namespace}
        if environment.name == "local" and (local := _local_images()):
            name, tag = local["postgres"]
            kustomization["images"] = [{"name": "postgres", "newName": name, "newTag": tag}]
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        yield Path(folder)


def _inputs(environment: Environment, release: str, image: Image) -> str:
    """A name for all that a release is made of: chart, values, image.

    The server's image is what it needs of it: a changed flow does not start the server anew.
    """
    paths = [str(CHARTS / release), str(environment.values / f"{release}.yaml")]
    made_of = [environment.namespace, image.repository if release == SERVER else str(image)]
    if release == SERVER:
        paths += ["docker/Dockerfile", "pyproject.toml", "uv.lock", "orchestration", ":!orchestration/operations"]
        made_of += [os.environ.get("IMAGE", ""), str(_local_images()) if environment.name == "local" else ""]
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *paths]).split("\0")
    contents = [(ROOT / path).read_bytes() for path in sorted(filter(None, listed)) if (ROOT / path).is_file()]
    return hashlib.sha256(b"\0".join([*map(str.encode, made_of), *contents])).hexdigest()[:12]


def _is_current(deploys: Deploys, release: str, history: list[Object], inputs: str) -> bool:
    """Whether the newest revision is deployed, and from the same inputs."""
    if not history or history[-1]["status"] != "deployed":
        return False
    return deploys.inputs.get(release, {}).get(str(history[-1]["revision"])) == inputs


def _history(environment: Environment, release: str) -> list[Object]:
    """A release's revisions, oldest first."""
    try:
        found: list[Object] = json.loads(environment.helm("history", release, "--output", "json"))
    except ClusterError as error:
        if "not found" in str(error):
            return []
        raise
    return found


def deploy(environment: Environment, *, force: bool = False) -> None:
    """Bring the environment to what the checkout says.

    Args:
        environment: where.
        force: also a release that is as it should be, or whose deploy seems to be under way.

    Raises:
        ClusterError: with the object, event and log line that tell why, and how to go back.
    """
    check(environment)
    image = image_of(environment)
    with step(f"Applying k8s/overlays/{environment.name}", "1 s"), _surroundings(environment) as folder:
        environment.kubectl("apply", "--kustomize", str(folder))
        secret = OVERLAYS / environment.name / "warehouse" / "secret"
        if secret.exists():
            run([str(secret), "--context", environment.context, "--namespace", environment.namespace])
    deploys = Deploys(environment)
    deploys.begin()
    for release in RELEASES:
        _deploy_release(environment, release, image, deploys, force)
    deploys.end()


def _deploy_release(environment: Environment, release: str, image: Image, deploys: Deploys, force: bool) -> None:
    inputs = _inputs(environment, release, image)
    history = _history(environment, release)
    if not force and _is_current(deploys, release, history, inputs):
        print(f"{release} is as it should be: revision {history[-1]['revision']}.")
        return
    _unlock(environment, release, history, force)
    with _values(environment, release, image) as options:
        if release == POOL:
            sync_check.check(environment, _sync(environment, options))
        verb, usual = ("Upgrading", "20 s") if history else ("Installing", "30 s")
        with step(f"{verb} {release}", usual):
            description = f"deploy {deploys.made[-1].at}, inputs {inputs}, image {image.digest}"
            deploys.touch(release, history)
            try:
                environment.helm(
                    "upgrade", "--install", release, str(CHARTS / release), *options,
                    "--description", description, "--timeout", "10m", "--history-max", "20",
                )  # fmt: skip
                wait(environment, release)
            except ClusterError as error:
                raise ClusterError(_explained(environment, release, str(error), history)) from None
            deploys.note(release, _history(environment, release)[-1]["revision"], inputs)


def _sync(environment: Environment, options: list[str]) -> sync_check.Sync:
    """What the pool's release with these values brings to the server.

    Raises:
        ClusterError: the chart refuses the values.
    """
    try:
        return sync_check.of(environment.helm("template", POOL, str(CHARTS / POOL), *options))
    except ClusterError as error:
        raise ClusterError(_explained(environment, POOL, str(error), [])) from None


def _unlock(environment: Environment, release: str, history: list[Object], force: bool) -> None:
    """End what an interrupted deploy has left: helm refuses to go on from a revision that is pending.

    Raises:
        ClusterError: it may still be under way, somewhere else.
    """
    if not history or not history[-1]["status"].startswith("pending"):
        return
    revision = history[-1]["revision"]
    age = (datetime.now(UTC) - datetime.fromisoformat(history[-1]["updated"])).total_seconds()
    if age < PATIENCE and not force:
        raise ClusterError(
            f"{release}: a deploy began {age:.0f} s ago and has not ended (revision {revision}). Wait for it; "
            "if it was interrupted, set it aside with FORCE=1"
        )
    print(f"{release}: revision {revision} was interrupted; it is set aside.", flush=True)
    environment.kubectl("delete", "secret", f"sh.helm.release.v1.{release}.v{revision}")


def _explained(environment: Environment, release: str, error: str, history: list[Object]) -> str:
    """The failure of a release, with its evidence and the way back."""
    if "values don't meet the specifications" in error or "execution error at" in error:
        return f"{release} is refused, and nothing was changed: {error.split('): ', 1)[-1]}"
    lines = [f"{release} does not become ready: {error}"]
    lines += [f"  {line}" for line in release_diagnosis.why(environment, release)[:12]]
    good = [each for each in history if each["status"] == "deployed"]
    if good:
        lines.append(f"What ran before goes on running. Go back: make rollback ENV={environment.name}")
    else:
        lines.append(f"Mend it and deploy again, or take it away: make undeploy ENV={environment.name}")
    return "\n".join(lines)


def wait(environment: Environment, release: str) -> None:
    """Wait until a release's pods are the new ones and ready.

    Raises:
        ClusterError: a pod will not start without a person, a Job failed, or it takes longer than `PATIENCE`.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        waiting = [what for what in map(_unready, _workloads(environment, release)) if what]
        if not waiting:
            return
        for pod in environment.objects("pods", "--selector", release_diagnosis.of_release(release)):
            reason = release_diagnosis.hopeless(pod)
            if reason and not pod["metadata"].get("deletionTimestamp"):
                raise ClusterError(f"pod/{pod['metadata']['name']} will not start")
        if failed := [what for what in waiting if what.endswith("failed")]:
            raise ClusterError(", ".join(failed))
        if time.monotonic() > deadline:
            raise ClusterError(f"after {PATIENCE:.0f} s not ready: {', '.join(waiting)}")
        time.sleep(0.5)


def _workloads(environment: Environment, release: str) -> list[Object]:
    found = environment.objects("deployments,statefulsets,jobs", "--selector", release_diagnosis.of_release(release))
    return [each for each in found if "helm.sh/hook" not in each["metadata"].get("annotations", {})]


def _unready(workload: Object) -> str:
    """The workload's name while it is not what its specification says; with "failed" for good."""
    name = f"{workload['kind'].lower()}/{workload['metadata']['name']}"
    spec, status = workload["spec"], workload["status"]
    if workload["kind"] == "Job":
        conditions = {each["type"] for each in status.get("conditions", []) if each["status"] == "True"}
        if "Failed" in conditions:
            return f"{name} failed"
        return "" if "Complete" in conditions else name
    seen = status.get("observedGeneration") == workload["metadata"]["generation"]
    wanted = spec.get("replicas", 1)
    counts = [status.get(key, 0) for key in ("replicas", "updatedReplicas", "readyReplicas")]
    return "" if seen and counts == [wanted] * 3 else name


def plan(environment: Environment) -> bool:
    """Print what a deploy would change, in the cluster and on the server, object by object; whether it is anything."""
    image = image_of(environment)
    changed = False
    with _surroundings(environment) as folder:
        done = subprocess.run(
            ["kubectl", "--context", environment.context, "diff", "--kustomize", str(folder)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode > 1:
            raise ClusterError(done.stderr.strip())
        if done.returncode:
            changed = True
            print(done.stdout)
    skipped = set()
    deploys = Deploys(environment)
    for release in RELEASES:
        history = _history(environment, release)
        if _is_current(deploys, release, history, _inputs(environment, release, image)):
            skipped.add(release)
            continue
        before = _manifest(environment, release) if history else {}
        with _values(environment, release, image) as options:
            dry = environment.helm(
                "upgrade", "--install", release, str(CHARTS / release), *options, "--dry-run=server", "--output", "json"
            )
        found = json.loads(dry)
        after = _by_name("\n---\n".join([found["manifest"], *(hook["manifest"] for hook in found.get("hooks") or [])]))
        for name in sorted({*before, *after}):
            old, new = before.get(name, ""), after.get(name, "")
            if old == new:
                continue
            changed = True
            verb = "changed" if old and new else "created" if new else "deleted"
            print(f"{release}: {name} is {verb}")
            if verb == "changed":
                lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=2)
                print("\n".join(f"  {line}" for line in list(lines)[2:]))
    if _history(environment, SERVER):
        with _values(environment, POOL, image) as options:
            heading = "On the server, which FORCE=1 brings back:" if POOL in skipped else "On the server:"
            changed = sync_check.plan(environment, _sync(environment, options), heading) or changed
    else:
        print("On the server: it is not deployed yet, and gets pool and deployments with its first deploy.")
    if not changed:
        print("Nothing would change.")
    return changed


def _manifest(environment: Environment, release: str) -> dict[str, str]:
    return _by_name(f"{environment.helm('get', 'manifest', release)}\n---\n{environment.helm('get', 'hooks', release)}")


class _Lines(yaml.SafeDumper):
    """Writes a text of several lines as such, so that a difference is of lines."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # A line that ends in a space would be written in quotes.
    lines = "\n".join(line.rstrip() for line in value.split("\n"))
    return dumper.represent_scalar("tag:yaml.org,2002:str", lines, style="|" if "\n" in value else None)


_Lines.add_representer(str, _text)


def _by_name(manifest: str) -> dict[str, str]:
    """Each object of a manifest as sorted YAML, by "Kind/name"; what a revision counts and what is secret left out."""
    found = {}
    for each in yaml.safe_load_all(manifest):
        if not each or each["metadata"].get("annotations", {}).get("helm.sh/hook") == "test":
            continue
        if each["kind"] == "Secret":
            each["data"] = dict.fromkeys(each.get("data", {}), "***")
        if each["kind"] == "Job":
            each["metadata"]["name"] = re.sub(r"-\d+$", "", each["metadata"]["name"])
        found[f"{each['kind']}/{each['metadata']['name']}"] = yaml.dump(each, Dumper=_Lines)
    return found


def rollback(environment: Environment, *, force: bool = False) -> None:
    """Take back the newest deploy: of both releases what it changed, pool and deployments included.

    The next rollback takes back the deploy before.

    Args:
        environment: where.
        force: also one that seems to be under way.

    Raises:
        ClusterError: there is nothing to go back to, or what there was does not become ready.
    """
    deploys = Deploys(environment)
    if not deploys.made:
        raise ClusterError(f"There is no deploy in {environment.namespace} to take back")
    histories = {release: _history(environment, release) for release in RELEASES}
    for release, revision in deploys.made[-1].before.items():
        kept = [each["revision"] for each in histories[release]]
        if revision and revision not in kept:
            raise ClusterError(
                f"{release}: revision {revision}, which ran before the deploy of {deploys.made[-1].at}, is not kept. "
                f"Check out what was deployed before, and: make deploy ENV={environment.name}"
            )
    taken = deploys.take_back()
    for release in RELEASES:
        if release not in taken.before:
            continue
        revision = taken.before[release]
        if not revision:
            print(f"{release} was installed by that deploy, and stays.")
            continue
        _unlock(environment, release, histories[release], force)
        with step(f"Rolling {release} back to revision {revision}", "20 s"):
            try:
                environment.helm("rollback", release, str(revision), "--timeout", "10m", "--history-max", "20")
                wait(environment, release)
            except ClusterError as error:
                raise ClusterError(_explained(environment, release, str(error), [])) from None
        inputs = deploys.inputs.get(release, {}).get(str(revision), "")
        deploys.note(release, _history(environment, release)[-1]["revision"], inputs)
    deploys.taken_back()
    print(f"The deploy of {taken.at} is taken back.")


def undeploy(environment: Environment) -> None:
    """Take the releases away. Namespace, volumes and their passwords stay."""
    for release in reversed(RELEASES):
        if _history(environment, release):
            with step(f"Uninstalling {release}", "5 s"):
                environment.helm("uninstall", release, "--wait", "--timeout", "5m")
        else:
            print(f"{release} is not there.")
    Deploys(environment).forget()
    print(
        f"Namespace {environment.namespace} stays, with the databases' volumes and passwords. To remove all of it:\n"
        f"  kubectl --context {environment.context} delete namespace {environment.namespace}"
    )
