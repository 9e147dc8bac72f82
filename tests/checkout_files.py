"""List the files of a checkout by git's ignore rules, also where there is no repository, as in a release's archive."""

import contextlib
import subprocess
import tempfile
from pathlib import Path

NOT_IGNORED = ("--cached", "--others", "--exclude-standard")


def list_files(root: Path, *arguments: str) -> list[str]:
    """Return the names of files under `root`, relative to it.

    Args:
        root: the folder of the checkout.
        arguments: arguments of `git ls-files`; by default they list the tracked and new files, and no ignored ones.
    """
    with contextlib.ExitStack() as stack:
        repository = []
        if not (root / ".git").exists():
            # An empty repository: every file is a new one.
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            subprocess.run(["git", "init", "-q", folder], check=True)
            repository = [f"--git-dir={folder}/.git", f"--work-tree={root}"]
        command = ["git", *repository, "ls-files", "-z", *(arguments or NOT_IGNORED)]
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name]
