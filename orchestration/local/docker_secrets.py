"""Write the passwords and credentials of the Docker stack: `python -m orchestration.local.docker_secrets FOLDER`.

FOLDER has a volume for each of `server`, `worker`, `sync` and `run`, with what their containers need and nothing else.
Standard input is the password of the user `admin`. A generated value stays in the volume `server`: neither a second
start nor an upgrade changes a password or a key.
"""

import base64
import secrets
import shlex
import sys
from pathlib import Path

from orchestration import block_encryption
from orchestration.access.credentials import AUTH_VARIABLE, RUN_KEY_FILE

CREDENTIALS_FOLDER = "credentials"
"""The folder of a volume with the credentials by role, or with the key of runs."""

REDIS_VARIABLES = ("PREFECT_REDIS_MESSAGING_URL", "PREFECT_REDIS_WORKER_CLEANUP_QUEUE_URL", "PREFECT_SERVER_DOCKET_URL")


def write_secrets(folder: Path, password: str) -> None:
    """Write the files of all volumes, and keep generated values.

    Args:
        folder: holds the volumes.
        password: that of the user `admin`.
    """
    server, worker, sync, run = (folder / name for name in ("server", "worker", "sync", "run"))
    for volume in (server, worker):
        (volume / CREDENTIALS_FOLDER).mkdir(exist_ok=True)
    # Postgres reads the first file itself.
    _, prefect, warehouse, redis = (
        _keep(server / name, secrets.token_hex(16)) for name in ("postgres", "prefect", "warehouse", "redis")
    )
    key = _keep(server / "encryption-key", base64.b64encode(secrets.token_bytes(32)).decode())
    credentials = server / CREDENTIALS_FOLDER
    run_key = _keep(credentials / RUN_KEY_FILE, secrets.token_hex(24))
    _write_environment(
        server,
        {
            "PREFECT_SERVER_API_AUTH_STRING": f"admin:{password}",
            AUTH_VARIABLE: f"admin:{password}",
            block_encryption.VARIABLE: key,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://prefect:{prefect}@postgres/prefect",
            **dict.fromkeys(REDIS_VARIABLES, f"redis://:{redis}@redis:6379/0"),
        },
    )
    (worker / CREDENTIALS_FOLDER / RUN_KEY_FILE).write_text(f"{run_key}\n")
    for volume in (worker, sync):
        credential = _keep(credentials / volume.name, f"{volume.name}:{secrets.token_hex(16)}")
        _write_environment(volume, {AUTH_VARIABLE: credential})
    _write_environment(run, {"WAREHOUSE_URL": f"postgresql://warehouse:{warehouse}@postgres/warehouse"})


def _keep(file: Path, generated: str) -> str:
    """Return the value in a file, which becomes the generated value if the file is absent or empty."""
    if not (file.exists() and file.read_text().strip()):
        file.write_text(f"{generated}\n")
    return file.read_text().strip()


def _write_environment(volume: Path, variables: dict[str, str]) -> None:
    """Write a file that containers source. Quotes let a password have any characters."""
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in variables.items()]
    (volume / "environment").write_text("".join(lines))


if __name__ == "__main__":
    write_secrets(Path(sys.argv[1]), sys.stdin.read().rstrip("\n"))
