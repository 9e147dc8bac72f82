"""A long test: what it runs, the paths that decide its outcome, and the hashes of their content."""

import functools
import hashlib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Parameters = Mapping[str, float]
"""Sizes and the seed, as they are named on make's command line: `{"MINUTES": 30, "SEED": 2013}`."""

LEFT_BY_TOOLS = ("__pycache__", "target", "logs")
"""Folders that are not hashed: compiled Python, and what dbt writes in its project."""


class NotRunError(Exception):
    """The long test cannot run on this machine."""


@dataclass(frozen=True)
class Findings:
    """What a long test found.

    Args:
        figures: name to value.
        wrong: what must not be, in sentences; empty if the test passed.
    """

    figures: dict[str, str | float]
    wrong: list[str]


@dataclass(frozen=True)
class LongTest:
    """A test that is too long for `make test`.

    Args:
        name: what people type.
        what: it shows, in one sentence.
        paths: files and folders under the root that decide its outcome; `uv.lock#NAME` is a package's locked version.
        run: runs the test with all of `parameters`.
        parameters: the full size.
        cluster: whether it needs a Kubernetes cluster.
    """

    name: str
    what: str
    paths: Sequence[str]
    run: Callable[[Parameters], Findings] = field(repr=False)
    parameters: Parameters = field(default_factory=dict)
    cluster: bool = False

    def declares(self, word: str) -> bool:
        """Tell whether `word` is a declared path, or a folder or file of one."""
        return any(word in (path, Path(path).stem, *Path(path).parts) for path in self.paths)

    def reduced(self, parameters: Parameters) -> list[str]:
        """Return the sizes that are below the full ones, as `MINUTES=2 is below 30`."""
        return [
            f"{name}={parameters.get(name, 0):g} is below {full:g}"
            for name, full in self.parameters.items()
            if name != "SEED" and parameters.get(name, 0) < full
        ]

    def hashes(self, root: Path) -> dict[str, str]:
        """Return the hash of each declared path's content."""
        return {path: _hash(root, path) for path in self.paths}


def files(path: Path) -> Iterator[Path]:
    """Yield the files that are hashed: `path` itself or what is under it, without hidden files and what tools leave.

    They are chosen by name, as a tarball has no git.
    """
    if path.is_file():
        yield path
    elif path.is_dir():
        for each in sorted(path.iterdir()):
            if not each.name.startswith(".") and each.name not in LEFT_BY_TOOLS and each.suffix != ".pyc":
                yield from files(each)


def _hash(root: Path, path: str) -> str:
    file, _, package = path.partition("#")
    if package:
        return _locked((root / file).read_text()).get(package, "")
    content = hashlib.sha256()
    for each in files(root / path):
        # The lengths keep a name apart from its content, and that from the next name.
        for part in (each.relative_to(root).as_posix().encode(), each.read_bytes()):
            content.update(b"%d:" % len(part) + part)
    return content.hexdigest()[:16]


@functools.lru_cache(maxsize=1)
def _locked(lock: str) -> dict[str, str]:
    return {each["name"]: each["version"] for each in tomllib.loads(lock)["package"]}
