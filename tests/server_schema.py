"""Create the schema of the Prefect server in a Postgres database, from a dump that is made once on a machine."""

import contextlib
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator

from orchestration.errors import ClusterError
from orchestration.operations.local_cluster import binaries
from orchestration.operations.local_cluster.file_lock import hold_lock
from orchestration.settings import ROOT
from tests.parts import debian_postgres, rows_of, schema_versions


@contextlib.contextmanager
def server_database() -> Iterator[dict[str, str]]:
    """Run a Postgres for a Prefect server, and yield the server's variables; none where Postgres cannot be installed.

    SQLite, the server's own database, refuses each write that begins during another transaction. On a busy machine the
    attempts of workers and of the server's services to write refuse each other for minutes.
    """
    with contextlib.ExitStack() as stack:
        try:
            postgres = stack.enter_context(debian_postgres())
        except (ClusterError, binaries.MissingProgramError):
            yield {}
            return
        create_schema(postgres)
        yield {"PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.replace("postgresql://", "postgresql+asyncpg://")}


MODULES = ("migrations.py", "prefect_compat/server_internals.py", "prefect_compat/server_tables.py")
"""The code of `orchestration` that decides the schema. The dump is made again when the code changes."""


def create_schema(url: str, revision: str = "") -> None:
    """Create the schema in an empty database. The migrations take 8 processor seconds, a restore of their dump 0.3.

    Args:
        url: the database. Its user owns the tables.
        revision: an older revision of Prefect, without the indexes of this project; by default what the Job of a
            release leaves.
    """
    code = hashlib.sha256(b"".join((ROOT / "orchestration" / module).read_bytes() for module in MODULES)).hexdigest()
    [(server,)] = rows_of(url, "show server_version_num")
    file = binaries.cache() / f"{schema_versions()}-postgres-{server}-{revision or code[:8]}.dump"
    with hold_lock(file.with_suffix(".lock")):
        if file.exists():
            restore = ["pg_restore", "--single-transaction", "--no-owner", f"--dbname={url}", str(file)]
            subprocess.run(restore, check=True)
            return
        upgrade = (
            ["prefect", "server", "database", "upgrade", "--yes", "--revision", revision]
            if revision
            else ["orchestration.migrations", "upgrade"]
        )
        database = url.replace("postgresql://", "postgresql+asyncpg://")
        environment = os.environ | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database}
        command = [sys.executable, "-m", *upgrade]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        partial = file.with_suffix(".partial")
        subprocess.run(["pg_dump", "--format=custom", f"--file={partial}", url], check=True)
        partial.replace(file)
