"""The kinds of Secrets that `make rotate` knows, by the names of SECRET=."""

from collections.abc import Callable

from orchestration.errors import ClusterError
from orchestration.operations.environment import Environment
from orchestration.operations.rotation import api_credentials, block_key, postgres_logins, valkey_password
from orchestration.operations.rotation.rotation import Rotation
from orchestration.operations.rotation.rotation import rotate as run_rotation

KINDS: dict[str, tuple[Callable[[Environment], Rotation], str]] = {
    "database": (postgres_logins.server_database, "the login at the server's bundled Postgres"),
    "api": (api_credentials.administrator, "the password of the administrator, for the API and the UI"),
    "roles": (api_credentials.roles, "the credentials of worker, reconciler, sync, viewer, flow runs and oauth2-proxy"),
    "redis": (valkey_password.server_redis, "the password of the bundled Valkey"),
    "encryption": (block_key.server_block_key, "the key that encrypts secret blocks in the server's database"),
    "warehouse": (postgres_logins.local_warehouse, "the login at the warehouse of the local environment"),
}


def rotate(environment: Environment, kind: str, *, keep_old: bool) -> None:
    """Rotate the Secret of a kind, or complete its rotation.

    Raises:
        ClusterError: there is no such kind, or a step failed.
    """
    if kind not in KINDS:
        what = f"SECRET={kind} is unknown" if kind else "No Secret is named"
        known = "\n".join(f"  SECRET={name:<12} {text}" for name, (_, text) in KINDS.items())
        raise ClusterError(f"{what}: make rotate ENV={environment.name} SECRET=NAME, with one of\n{known}")
    find, _ = KINDS[kind]
    run_rotation(find(environment), keep_old=keep_old)
