"""Define a long test: what it runs, the paths that decide its outcome, and the hashes of their content."""

import functools
import hashlib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Parameters = Mapping[str, float]
"""Sizes and the seed by their make variables: `{"MINUTES": 30, "SEED": 2013}`."""

LEFT_BY_TOOLS = ("__pycache__", "target", "logs")
"""Folders that are not hashed: compiled Python, and the output of dbt in its project."""


class NotRunError(Exception):
    """The long test cannot run on this machine."""


@dataclass(frozen=True)
class Findings:
    """What a long test found.

    Args:
        figures: measured values by name.
        wrong: descriptions of the failures; empty if the test passed.
    """

    figures: dict[str, str | float]
    wrong: list[str]


@dataclass(frozen=True)
class LongTest:
    """A test that is too long for `make test`.

    Args:
        name: the name for `FOR=` on make's command line.
        what: what the test shows, in one sentence.
        paths: files and folders under the root that decide its outcome; `uv.lock#NAME` is the locked version of a
            package.
        run: runs the test with all `parameters`.
        parameters: the full size.
        cluster: whether the test needs a Kubernetes cluster.
    """

    name: str
    what: str
    paths: Sequence[str]
    run: Callable[[Parameters], Findings] = field(repr=False)
    parameters: Parameters = field(default_factory=dict)
    cluster: bool = False

    def declares(self, word: str) -> bool:
        """Return whether `word` is a declared path, or the name of a folder or file in one."""
        return any(word in (path, Path(path).stem, *Path(path).parts) for path in self.paths)

    def reduced(self, parameters: Parameters) -> list[str]:
        """Return the parameters below the full size, in texts like `MINUTES=2 is below 30`."""
        return [
            f"{name}={parameters.get(name, 0):g} is below {full:g}"
            for name, full in self.parameters.items()
            if name != "SEED" and parameters.get(name, 0) < full
        ]

    def hashes(self, root: Path) -> dict[str, str]:
        """Return the hash of each declared path's content."""
        return {path: _hash(root, path) for path in self.paths}


def files(path: Path) -> Iterator[Path]:
    """Yield the files to hash: `path`, or the files under it without hidden files and without output of tools.

    The names decide, and not git, which a tarball does not have.
    """
    if path.is_file():
        yield path
    elif path.is_dir():
        for child in sorted(path.iterdir()):
            if not child.name.startswith(".") and child.name not in LEFT_BY_TOOLS and child.suffix != ".pyc":
                yield from files(child)


def _hash(root: Path, path: str) -> str:
    file, _, package = path.partition("#")
    if package:
        return _locked((root / file).read_text()).get(package, "")
    content = hashlib.sha256()
    for hashed in files(root / path):
        # The lengths separate a name from its content, and the content from the next name.
        for part in (hashed.relative_to(root).as_posix().encode(), hashed.read_bytes()):
            content.update(b"%d:" % len(part) + part)
    return content.hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def _locked(lock: str) -> dict[str, str]:
    return {package["name"]: package["version"] for package in tomllib.loads(lock)["package"]}
