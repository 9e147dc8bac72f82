"""Dry-run the sync Job of the work pool's release: check it before a deploy, compare it with the server in a plan.

Both run `orchestrate` with the arguments of the release's Job, on the files of the checkout.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from orchestration.errors import ClusterError
from orchestration.operations import release_inputs, rollout
from orchestration.operations.environment import POOL, Environment
from orchestration.operations.port_forward import api_client, ca_file, read_credentials
from orchestration.progress import step
from orchestration.settings import ROOT

POOL_FILE = "/etc/prefect-pool/pool.yaml"
"""The file with the work pool, as the Job mounts it."""

IMAGE_FOLDER = PurePosixPath("/app")
"""The checkout in the image, and the working directory of runs."""


@dataclass(frozen=True)
class Sync:
    """The arguments of the sync Job of a release.

    Args:
        owner: the owner of the deployments.
        options: `--adopt` and `--prune`, if the Job has them.
        files: the files with deployments as the Job names them, without the file of the pool.
        pool: the content of the file with the pool.
    """

    owner: str
    options: tuple[str, ...]
    files: tuple[str, ...]
    pool: str

    @property
    def volume_files(self) -> list[str]:
        """The files that exist in the cluster alone, because volumes bring them."""
        return [file for file in self.files if not (IMAGE_FOLDER / file).is_relative_to(IMAGE_FOLDER)]

    @contextmanager
    def checkout_files(self) -> Iterator[list[str]]:
        """Yield the files as this machine has them: relative to the checkout, and last the file of the pool."""
        with tempfile.TemporaryDirectory() as folder:
            pool = Path(folder) / "pool.yaml"
            pool.write_text(self.pool)
            inside = [IMAGE_FOLDER / file for file in self.files if file not in self.volume_files]
            yield [*(str(file.relative_to(IMAGE_FOLDER)) for file in inside), str(pool)]


def render_sync(environment: Environment, options: list[str]) -> Sync:
    """Return the sync of the work pool's release with these values.

    Args:
        environment: the environment of the release.
        options: Helm's options that name the values.

    Raises:
        ClusterError: the chart refuses the values.
    """
    try:
        return parse_sync(release_inputs.render(environment, POOL, *options))
    except ClusterError as error:
        raise ClusterError(rollout.explain_failure(environment, POOL, str(error), [])) from None


def parse_sync(manifest: str) -> Sync:
    """Return the sync of a release of the work pool's chart.

    Args:
        manifest: the release as `helm template` renders it.
    """
    found = {
        rendered["kind"]: rendered
        for rendered in yaml.load_all(manifest, yaml.CSafeLoader)
        if rendered and rendered["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "sync"
    }
    parser = argparse.ArgumentParser()
    for option in ("--owner", "--wait"):
        parser.add_argument(option)
    for option in ("--adopt", "--prune"):
        parser.add_argument(option, action="store_true")
    parser.add_argument("files", nargs="*")
    [container] = found["Job"]["spec"]["template"]["spec"]["containers"]
    given = parser.parse_args(container["args"][2:])
    return Sync(
        given.owner,
        tuple(f"--{name}" for name in ("adopt", "prune") if getattr(given, name)),
        tuple(file for file in given.files if file != POOL_FILE),
        found["ConfigMap"]["data"]["pool.yaml"],
    )


def check(environment: Environment, sync: Sync) -> None:
    """Check pool and deployments as far as possible without the server, and against the quotas of runs.

    Raises:
        ClusterError: with the file and line that is wrong, and the cure.
    """
    kinds = ("get", "resourcequotas,limitranges", "--output", "json", "--namespace", environment.runs_namespace)
    quotas = json.loads(environment.kubectl(*kinds))["items"]
    with (
        step("Checking the deployments", "5 s"),
        sync.checkout_files() as files,
        tempfile.NamedTemporaryFile("w") as quota,
    ):
        json.dump({"kind": "List", "items": quotas}, quota)
        quota.flush()
        done = _orchestrate("check", files, "--owner", sync.owner, *(["--quota", quota.name] if quotas else []))
        if done.returncode:
            raise ClusterError(f"{POOL} is refused, and nothing was changed: {done.stderr.strip()}")


def plan(environment: Environment, sync: Sync, heading: str) -> bool:
    """Print what the sync would change on the server, below a heading.

    Returns:
        Whether the sync would change anything.

    Raises:
        ClusterError: the server does not answer, or would refuse the sync.
    """
    if sync.volume_files:
        print(f"{heading} unknown, as only the cluster has {', '.join(sync.volume_files)}.")
        return False
    with (
        step("Asking the server", "5 s"),
        api_client(environment) as api,
        ca_file(environment) as ca,
        sync.checkout_files() as files,
    ):
        variables = {
            "PREFECT_API_URL": str(api.base_url).rstrip("/"),
            "PREFECT_API_AUTH_STRING": read_credentials(environment),
        }
        if ca:
            variables["PREFECT_API_SSL_CERT_FILE"] = ca
        options = ("--owner", sync.owner, *sync.options, "--directory", str(IMAGE_FOLDER))
        done = _orchestrate("plan", files, *options, variables=variables)
    if done.returncode not in (0, 2):
        raise ClusterError(done.stderr.strip())
    if done.returncode:
        print("\n".join([heading, *(f"  {line}" for line in done.stdout.rstrip().splitlines())]))
    return bool(done.returncode)


def _orchestrate(
    command: str, files: list[str], *options: str, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of `orchestrate` on the checkout's files. Its output names the file of the pool as the Job does."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestration", command, *files, *options],
        cwd=ROOT, env=os.environ | (variables or {}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    done.stdout, done.stderr = (text.replace(files[-1], POOL_FILE) for text in (done.stdout, done.stderr))
    return done
