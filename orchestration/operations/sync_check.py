"""What the pool's release brings to the server: checked before a deploy, compared with the server by a plan.

Both ask `orchestrate`, with the arguments of the release's own Job, on the files of the checkout.
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
from orchestration.operations.environment import POOL, Environment
from orchestration.operations.port_forward import connected, user
from orchestration.progress import step
from orchestration.settings import ROOT

POOL_FILE = "/etc/prefect-pool/pool.yaml"
"""Where the Job has the file with the pool."""

FOLDER = PurePosixPath("/app")
"""Where the image has the checkout, and a run works."""


@dataclass(frozen=True)
class Sync:
    """What the Job of a release does.

    Args:
        owner: whose it is.
        options: `--adopt` and `--prune`, if it is told so.
        files: as the Job names them, without the pool's.
        pool: the text of the file with the pool.
    """

    owner: str
    options: tuple[str, ...]
    files: tuple[str, ...]
    pool: str

    @property
    def elsewhere(self) -> list[str]:
        """The files that only the cluster has: from volumes."""
        return [file for file in self.files if not (FOLDER / file).is_relative_to(FOLDER)]

    @contextmanager
    def here(self) -> Iterator[list[str]]:
        """The files as this machine has them, while the block lasts: relative to the checkout, and last the pool's."""
        with tempfile.TemporaryDirectory() as folder:
            pool = Path(folder) / "pool.yaml"
            pool.write_text(self.pool)
            inside = [FOLDER / file for file in self.files if file not in self.elsewhere]
            yield [*(str(file.relative_to(FOLDER)) for file in inside), str(pool)]


def of(manifest: str) -> Sync:
    """The sync of a release of the pool's chart, as `helm template` renders it."""
    found = {
        each["kind"]: each
        for each in yaml.load_all(manifest, yaml.CSafeLoader)
        if each and each["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "sync"
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
    """That the server and the namespace's quotas would take pool and deployments, as far as it shows without a server.

    Raises:
        ClusterError: what is wrong, where, and the cure.
    """
    quotas = environment.objects("resourcequotas,limitranges")
    with step("Checking the deployments", "5 s"), sync.here() as files, tempfile.NamedTemporaryFile("w") as quota:
        json.dump({"kind": "List", "items": quotas}, quota)
        quota.flush()
        done = _orchestrate("check", files, "--owner", sync.owner, *(["--quota", quota.name] if quotas else []))
        if done.returncode:
            raise ClusterError(f"{POOL} is refused, and nothing was changed: {done.stderr.strip()}")


def plan(environment: Environment, sync: Sync, heading: str) -> bool:
    """Print what the sync would change on the server, if anything, below a line; whether there is anything.

    Raises:
        ClusterError: the server does not answer, or would refuse it.
    """
    if sync.elsewhere:
        print(f"{heading} it cannot be said here, for only the cluster has {', '.join(sync.elsewhere)}.")
        return False
    with step("Asking the server", "5 s"), connected(environment) as api, sync.here() as files:
        url = {"PREFECT_API_URL": str(api.base_url).rstrip("/"), "PREFECT_API_AUTH_STRING": user(environment)}
        options = ("--owner", sync.owner, *sync.options, "--directory", str(FOLDER))
        done = _orchestrate("plan", files, *options, variables=url)
    if done.returncode not in (0, 2):
        raise ClusterError(done.stderr.strip())
    if done.returncode:
        print("\n".join([heading, *(f"  {line}" for line in done.stdout.rstrip().splitlines())]))
    return bool(done.returncode)


def _orchestrate(
    command: str, files: list[str], *options: str, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command on the checkout's files; messages name the pool's file as the Job does."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestration", command, *files, *options],
        cwd=ROOT, env=os.environ | (variables or {}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    done.stdout, done.stderr = (text.replace(files[-1], POOL_FILE) for text in (done.stdout, done.stderr))
    return done
