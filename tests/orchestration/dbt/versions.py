"""The versions of dbt that are tested.

The tests of this folder use the locked version. `TEST_DBT=1.10` selects another version, whose environment is made
once.
"""

import functools
import importlib.metadata
import os
import sys
from pathlib import Path

from tests.interpreters import interpreter

VERSIONS = {
    "1.10": ("dbt-core==1.10.23", "dbt-postgres==1.10.2"),
    "1.11": ("dbt-core==1.11.16", "dbt-postgres==1.11.0"),
    "1.12": ("dbt-core==1.12.0", "dbt-postgres==1.11.0"),
}
"""The requirements of the newest release of each minor version that docs/dbt.md lists as tested."""


_LOCKED = importlib.metadata.version("dbt-core")


@functools.cache
def python_of(version: str) -> Path:
    """Return the interpreter of an environment with a dbt: this environment, a cached one or a new one.

    Args:
        version: a minor version of `VERSIONS`, or a release of dbt-core.
    """
    if version in (_LOCKED, _LOCKED.rpartition(".")[0]):
        return Path(sys.executable)
    requirements = VERSIONS.get(version, (f"dbt-core=={version}", "dbt-postgres"))
    return interpreter(requirements[0], requirements)


def tested() -> Path:
    """Return the interpreter with the dbt that the tests use."""
    return python_of(os.environ.get("TEST_DBT") or _LOCKED)


def minor() -> tuple[int, int]:
    """Return the minor version of that dbt."""
    major, number = (os.environ.get("TEST_DBT") or _LOCKED).split(".")[:2]
    return int(major), int(number)
