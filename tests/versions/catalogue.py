"""What `make test-versions` runs: the parts of the contract, and the versions of Prefect they run on."""

import re
import subprocess
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
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

SAME_VERSION_PARTS = tuple(part for part in PARTS if part != "upgrade")
"""The parts that run where server and runs have the same version."""

CROSS_VERSION_PARTS = ("engine", "execution", "worker", "sync")
"""The parts that run where server and runs have different versions."""

PREVIOUS, PREVIOUS_COMMIT = "3.8.8", "0f9e41d17c4b936f92ef472ef25f883c9945fcd8"
"""The Prefect that releases had before, and the last commit that locked it: where an upgrade begins."""


class UnavailableError(Exception):
    """A version cannot be tried on this machine; its text is the cause and the cure."""


@dataclass(frozen=True)
class Trial:
    """A version of Prefect for the server and one for worker, runs and sync, on which parts of the contract run.

    Args:
        server: the server's version.
        runs: that of everything else.
        why: for which reason they are tried, in the words of the table.
        counts: whether a failure fails `make test-versions`.
        python: the interpreter of everything else.
        root: the checkout whose code and tests run.
        server_python: the server's interpreter, where that is another one.
        parts: names of `PARTS`.
    """

    server: str
    runs: str
    why: str
    counts: bool
    python: Path
    root: Path = ROOT
    server_python: Path | None = None
    parts: Sequence[str] = SAME_VERSION_PARTS

    def files(self) -> list[str]:
        """Return the test files that the checkout has of the parts."""
        return [file for part in self.parts for file in PARTS[part] if (self.root / file).is_file()]


def supported_range() -> Requirement:
    """Return pyproject.toml's bound of Prefect."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return next(each for each in map(Requirement, project["dependencies"]) if each.name == "prefect")


def locked_version() -> str:
    """Return the version of Prefect in uv.lock."""
    packages = tomllib.loads((ROOT / "uv.lock").read_text())["package"]
    return str(next(each["version"] for each in packages if each["name"] == "prefect"))


def oldest_version() -> str:
    """Return the oldest supported version: pyproject's lower bound."""
    return next(each.version for each in supported_range().specifier if each.operator in (">=", "=="))


def newest_version(requirement: str) -> str:
    """Return the newest version on the index that fits the requirement.

    Raises:
        UvError: none fits, or the index is away.
    """
    options = ("--no-deps", "--no-annotate", "--no-header", "--upgrade", "-")
    return str(Requirement(uv("pip", "compile", *options, text=requirement).strip()).specifier).removeprefix("==")


def choose_versions(named: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """Return the versions to try, in order: why each is tried, and whether its failure counts.

    Args:
        named: versions that a person names; without any: oldest and newest supported, and newest on the index.

    Raises:
        UvError: the index is away.
        ValueError: a name is no version.
    """
    if named:
        for each in named:
            if not re.fullmatch(r"\d+\.\d+\.\d+\w*", each):
                raise ValueError(f"PREFECT={each} is no version. Name versions as PREFECT='3.9.0 3.9.1'.")
        return dict.fromkeys(named, ("named", True))
    supported = supported_range()
    reasons = {
        "oldest supported": oldest_version(),
        "newest supported": newest_version(str(supported)),
        "newest on the index": newest_version("prefect"),
    }
    return {
        version: (", ".join(why for why, each in reasons.items() if each == version), version in supported.specifier)
        for version in sorted(reasons.values(), key=Version)
    }


def prepare_environment(version: str) -> Path:
    """Return the interpreter of the locked environment with another version of Prefect, made if need be.

    Beyond the bounds of pyproject.toml, those of Prefect's integrations and of whenever do not hold either. Everything
    else stays at its locked version as far as that Prefect allows.

    Raises:
        UvError: nothing fits that version, or the index is away.
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
        # What is in the output file already is preferred.
        options = ("--no-annotate", "--no-header", "--upgrade-package", "prefect", "--override", overrides)
        uv("pip", "compile", *options, "--output-file", pins, "-", text="\n".join(wanted))
        return interpreter(f"prefect-{version}", pins.read_text().splitlines(), "--no-deps")


def previous_release() -> tuple[Path, Path]:
    """Return the interpreter and the checkout of the release before, with the packages that its lock file names.

    Raises:
        UnavailableError: this clone does not have its commit.
        UvError: its packages cannot be installed.
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
    """Return the packages that the project's lock file pins, as pip takes them."""
    options = ("--frozen", "--no-emit-project", "--all-extras", "--no-hashes", "--no-annotate", "--no-header")
    return uv("export", *options, "--project", project).splitlines()
