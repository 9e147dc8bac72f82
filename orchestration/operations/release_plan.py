"""Print what a deploy would change, object by object: the dry run of `make plan`."""

import difflib
import json
import re
import subprocess

import yaml

from orchestration.errors import ClusterError
from orchestration.operations import helm_release, namespace_of_runs, release_inputs, sync_dry_run
from orchestration.operations.deploy_history import DeployHistory
from orchestration.operations.environment import POOL, RELEASES, SERVER, Environment
from orchestration.operations.release_inputs import Image


def plan(environment: Environment) -> bool:
    """Print what a deploy would change in the cluster and on the Prefect server.

    Returns:
        Whether a deploy would change anything.

    Raises:
        ClusterError: the image is missing, a chart refuses its values, or cluster or server do not answer.
    """
    image = release_inputs.checkout_image(environment)
    history = DeployHistory(environment)
    changed = _plan_surroundings(environment)
    current = set()
    for release in RELEASES:
        revisions = helm_release.revisions(environment, release)
        former = namespace_of_runs.former_namespaces(environment) if release == POOL else []
        if history.is_current(release, revisions, release_inputs.input_hash(environment, release, image, *former)):
            current.add(release)
        elif release == POOL and environment.absent_namespace:
            # Kubernetes checks an object only in a namespace that exists.
            print(f"{release} is changed, with objects in namespace {environment.absent_namespace}.")
            changed = True
        elif release == POOL and (ca := namespace_of_runs.missing_ca(environment)):
            # The chart refuses a Secret that does not exist.
            print(f"{release} is changed, and Secret {ca} is copied to namespace {environment.runs_namespace}.")
            changed = True
        else:
            changed = _plan_release(environment, release, image, is_installed=bool(revisions)) or changed
    if helm_release.revisions(environment, SERVER):
        with release_inputs.values_options(environment, POOL, image) as options:
            heading = "On the server, which FORCE=1 brings back:" if POOL in current else "On the server:"
            sync = sync_dry_run.render_sync(environment, options)
            changed = sync_dry_run.plan(environment, sync, heading) or changed
    else:
        print("On the server: it is not deployed yet. The first deploy creates the pool and the deployments.")
    if not changed:
        print("Nothing would change.")
    return changed


def _plan_surroundings(environment: Environment) -> bool:
    """Print the difference of the overlay in `k8s/`; return whether there is one."""
    is_changed = False
    with release_inputs.surroundings(environment) as folders:
        for namespace, folder in zip(environment.namespaces, folders, strict=True):
            if namespace == environment.absent_namespace:
                print(f"Namespace/{namespace} is created, with the objects of k8s/runs/{environment.name}.")
                is_changed = True
                continue
            done = subprocess.run(
                ["kubectl", "--context", environment.context, "diff", "--kustomize", str(folder)],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode > 1:
                raise ClusterError(done.stderr.strip())
            if done.returncode:
                print(done.stdout)
                is_changed = True
    return is_changed


def _plan_release(environment: Environment, release: str, image: Image, *, is_installed: bool) -> bool:
    """Print each object of a release that a deploy would create, change or delete; return whether there is one."""
    before = _installed_objects(environment, release) if is_installed else {}
    with release_inputs.values_options(environment, release, image) as options:
        dry_run = environment.helm(
            "upgrade", "--install", release, str(release_inputs.CHARTS / release), *options,
            "--dry-run=server", "--output", "json",
        )  # fmt: skip
    rendered = json.loads(dry_run)
    manifests = [rendered["manifest"], *(hook["manifest"] for hook in rendered.get("hooks") or [])]
    after = _objects_by_name(environment, "\n---\n".join(manifests))
    changed = False
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
    return changed


def _installed_objects(environment: Environment, release: str) -> dict[str, str]:
    manifest, hooks = (environment.helm("get", part, release) for part in ("manifest", "hooks"))
    return _objects_by_name(environment, f"{manifest}\n---\n{hooks}")


class _LineDumper(yaml.SafeDumper):
    """Writes a text of several lines as a block, so that a diff compares lines."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    # PyYAML quotes a text with a line that ends in a space.
    lines = "\n".join(line.rstrip() for line in value.split("\n"))
    return dumper.represent_scalar("tag:yaml.org,2002:str", lines, style="|" if "\n" in value else None)


_LineDumper.add_representer(str, _represent_text)


def _objects_by_name(environment: Environment, manifest: str) -> dict[str, str]:
    """Return the objects of a manifest as sorted YAML, by "Kind/name" and a namespace other than the release's.

    Leaves out tests, the data of Secrets, and the revision's number in the names of Jobs.
    """
    found = {}
    for rendered in yaml.safe_load_all(manifest):
        if not rendered or rendered["metadata"].get("annotations", {}).get("helm.sh/hook") == "test":
            continue
        if rendered["kind"] == "Secret":
            rendered["data"] = dict.fromkeys(rendered.get("data", {}), "***")
        if rendered["kind"] == "Job":
            rendered["metadata"]["name"] = re.sub(r"-\d+$", "", rendered["metadata"]["name"])
        namespace = rendered["metadata"].get("namespace", environment.namespace)
        where = "" if namespace == environment.namespace else f" in namespace {namespace}"
        found[f"{rendered['kind']}/{rendered['metadata']['name']}{where}"] = yaml.dump(rendered, Dumper=_LineDumper)
    return found
