"""Start the child process: `python -P orchestration/dbt/child`.

Its environment may not have `orchestration`, so the folder is loaded as a package by its path.
"""

import contextlib
import importlib.util
import sys
from pathlib import Path

PACKAGE = "orchestration_dbt_child"
"""Name of the package with `command.py`. Not `dbt_...`: dbt imports top-level modules of such names as plugins."""


def load_package(folder: Path) -> None:
    """Load the folder as the package `PACKAGE`."""
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec
    assert spec.loader
    sys.modules[PACKAGE] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    # Python has put this folder first, where its modules would hide those of dbt and of dbt's Python models.
    del sys.path[0]
    load_package(Path(__file__).resolve().parent)
    with contextlib.suppress(KeyboardInterrupt):  # a signal while dbt was being imported
        importlib.import_module(f"{PACKAGE}.command").main(sys.argv[1:])
