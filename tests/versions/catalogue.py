"""Choose what `make test-versions` runs: the parts of the contract, and the versions of Prefect."""

import re
import subprocess
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.settings import ROOT
from tests.interpreters import interpreter, uv

PARTS = {
    "signatures": ("tests/orchestration/test_prefect_compat.py",),
    "engine": ("tests/orchestration/runs/test_engine.py",),
    "execution": ("tests/orchestration/runs/test_supervisor.py",),
    "durable": ("tests/orchestration/runs/test_durable.py",),
    "worker": ("tests/orchestration/worker/test_kubernetes_worker.py",),
    "sync": (
        "tests/orchestration/deployments/test_export.py",
        "tests/orchestration/deployments/test_schedules.py",
        "tests/orchestration/deployments/test_sync.py",
    ),
    "server": (
        "tests/orchestration/test_migrations.py",
        "tests/orchestration/local/test_temporary_server.py",
        "tests/orchestration/access/test_control.py",
        "tests/orchestration/access/test_routes.py",
    ),
    "dbt mirror": ("tests/orchestration/dbt/test_nodes.py", "tests/orchestration/dbt/test_outbox.py"),
    "upgrade": ("tests/versions/upgrade.py",),
}
"""The test files of each part of the contract with Prefect; none needs a cluster."""

UPGRADE_PARTS = {"upgrade": PARTS["upgrade"]}
"""The part that runs where the server changes its version under runs."""

SAME_VERSION_PARTS = {part: files for part, files in PARTS.items() if part not in UPGRADE_PARTS}
"""The parts that run where server and runs have the same version."""

CROSS_VERSION_PARTS = {part: PARTS[part] for part in ("engine", "execution", "worker", "sync")}
"""The parts that run where server and runs have different versions."""

PREVIOUS_PARTS = {
    "engine": ("tests/orchestration/test_engine.py",),
    "execution": ("tests/orchestration/test_execution.py",),
    "worker": ("tests/orchestration/test_worker.py",),
    "sync": PARTS["sync"],
}
"""The same parts in the checkout of the previous release."""

PREVIOUS, PREVIOUS_COMMIT = "3.8.8", "0f9e41d17c4b936f92ef472ef25f883c9945fcd8"
"""The Prefect version of the previous releases, and the last commit that locked it. Upgrades are tested from there."""


class UnavailableError(Exception):
    """A version cannot be tried on this machine. The text has the cause and the cure."""


@dataclass(frozen=True)
class Trial:
    """A version of Prefect for the server and one for worker, runs and sync, on which parts of the contract run.

    Args:
        server: the server's version.
        runs: the version of worker, runs and sync.
        why: why these versions are tried, as text for the table.
        counts: whether a failure fails `make test-versions`.
        python: the interpreter of worker, runs and sync.
        root: the checkout whose code and tests run.
        server_python: the interpreter of the server; None for `python`.
        parts: the parts to run, with their test files in `root`.
    """

    server: str
    runs: str
    why: str
    counts: bool
    python: Path
    root: Path = ROOT
    server_python: Path | None = None
    parts: Mapping[str, Sequence[str]] = field(default_factory=lambda: SAME_VERSION_PARTS)


def supported_range() -> Requirement:
    """Return the version bounds of Prefect in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(found for found in map(Requirement, project["dependencies"]) if found.name == "prefect")


def locked_version() -> str:
    """Return the version of Prefect in uv.lock."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    return str(next(package["version"] for package in packages if package["name"] == "prefect"))


def oldest_version() -> str:
    """Return the oldest supported version: the lower bound in pyproject.toml."""
    return next(bound.version for bound in supported_range().specifier if bound.operator in (">=", "=="))


def newest_version(requirement: str) -> str:
    """Return the newest version on the index that fits the requirement.

    Raises:
        UvError: no version fits, or the index does not answer.
    """
    options = ("--no-deps", "--no-annotate", "--no-header", "--upgrade", "-")
    return str(Requirement(uv("pip", "compile", *options, text=requirement).strip()).specifier).removeprefix("==")


def choose_versions(named: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Return the versions to try, in order: why each is tried, and whether its failure counts.

    Args:
        named: versions from the command line; empty for the oldest and newest supported, and the newest on the index.

    Raises:
        UvError: the index does not answer.
        ValueError: a name is not a version.
    """
    if named:
        for version in named:
            if not re.fullmatch(r"\d+\.\d+\.\d+\w*", version):
                raise ValueError(f"PREFECT={version} is not a version. Name versions as PREFECT='3.9.0 3.9.1'.")
        return dict.fromkeys(named, ("named", True))
    supported = supported_range()
    reasons = {
        "oldest supported": oldest_version(),
        "newest supported": newest_version(str(supported)),
        "newest on the index": newest_version("prefect"),
    }
    return {
        version: (
            ", ".join(why for why, chosen in reasons.items() if chosen == version),
            version in supported.specifier,
        )
        for version in sorted(reasons.values(), key=Version)
    }


def prepare_environment(version: str) -> Path:
    """Return the interpreter of the locked environment with another version of Prefect; create it if need be.

    For a version outside the bounds of pyproject.toml, the bounds of Prefect's integrations and of whenever do not
    apply either. All other packages keep their locked versions as far as that Prefect allows.

    Raises:
        UvError: no packages fit that version, or the index does not answer.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = settings["project"]
    wanted = [f"prefect=={version}"]
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = Requirement(text).name
        if name != "prefect":
            follows = name.startswith("prefect-") or name == "whenever"
            wanted.append(name if follows and version not in supported_range().specifier else text)
    with tempfile.TemporaryDirectory() as folder:
        pins, overrides = Path(folder) / "pins.txt", Path(folder) / "overrides.txt"
        pins.write_text("\n".join(_locked_packages(ROOT)))
        overrides.write_text("\n".join(settings["tool"]["uv"]["override-dependencies"]))
        # uv prefers versions that the output file already has.
        options = ("--no-annotate", "--no-header", "--upgrade-package", "prefect", "--override", overrides)
        uv("pip", "compile", *options, "--output-file", pins, "-", text="\n".join(wanted))
        return interpreter(f"prefect-{version}", pins.read_text().splitlines(), "--no-deps")


def previous_release() -> tuple[Path, Path]:
    """Return the interpreter and the checkout of the previous release, with the packages of its lock file.

    Raises:
        UnavailableError: this clone does not have the release's commit.
        UvError: the packages cannot be installed.
    """
    folder = binaries.cache() / f"checkout-{PREVIOUS_COMMIT[:7]}"
    with hold_lock(folder.with_suffix(".lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(prefix=".checkout-", dir=folder.parent) as made:
                archive, files = Path(made) / "archive.tar", Path(made) / "files"
                command = ["git", "archive", f"--output={archive}", PREVIOUS_COMMIT]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
                if done.returncode:
                    commit = f"Commit {PREVIOUS_COMMIT[:7]} with Prefect {PREVIOUS}"
                    raise UnavailableError(
                        f"{commit} cannot be read: {done.stderr.strip()}. Run git fetch --unshallow."
                    )
                files.mkdir()
                subprocess.run(["tar", "-xf", archive, "-C", files], check=True)
                files.rename(folder)
    return interpreter(f"prefect-{PREVIOUS}", _locked_packages(folder), "--no-deps"), folder


def _locked_packages(project: Path) -> list[str]:
    """Return the pinned packages of a project's lock file, as requirements for pip."""
    options = ("--frozen", "--no-emit-project", "--all-extras", "--no-hashes", "--no-annotate", "--no-header")
    return uv("export", *options, "--project", project).splitlines()
