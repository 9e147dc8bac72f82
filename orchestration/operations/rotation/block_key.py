"""Rotate the key that encrypts secret blocks in the server's database.

While the database has the old key, each server reads blocks of both keys and writes blocks of the old one. So the old
key goes into the database until all servers have the new one.
"""

import base64
import secrets

from orchestration.errors import ClusterError
from orchestration.operations.environment import SERVER, Environment
from orchestration.operations.rotation.rotated_secret import RotatedSecret
from orchestration.operations.rotation.rotation import Rotation, read_deployment, referenced_secret, require_generated

VARIABLE = "PREFECT_SERVER_ENCRYPTION_KEY"

KEY_BYTES = 32


class BlockKey(Rotation):
    """Rotates the key, and keeps old keys in the Secret for the backups made with them.

    Args:
        environment: the environment.
        secret: the Secret.
        key: the key of the Secret.
    """

    def __init__(self, environment: Environment, secret: RotatedSecret, key: str) -> None:
        super().__init__(environment, secret, "the server")
        self._key = key

    def new_values(self) -> dict[str, str]:
        """Return a new key."""
        return {self._key: base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()}

    def accept_next(self) -> None:
        """Write the present key into the database, where servers with the next key find it."""
        self._execute("store-key")

    def end_previous(self) -> None:
        """Encrypt all blocks with the new key, and delete the old key from the database."""
        self._execute("encrypt-again")
        if old := self.secret.previous.get(self._key):
            self.secret.write({f"{self._key}.{self.secret.rotation}": old})

    def _execute(self, command: str) -> None:
        api = f"deployment/{SERVER}-api"
        module = ("python", "-m", "orchestration.block_encryption", command)
        try:
            self.environment.kubectl("exec", api, "--container=api", "--", *module)
        except ClusterError as error:
            cause = next((line for line in str(error).splitlines() if not line.startswith("command terminated")), "")
            raise ClusterError(f"The key of the blocks cannot be rotated: {cause}") from None


def server_block_key(environment: Environment) -> BlockKey:
    """Return the rotation of the server's key.

    Raises:
        ClusterError: the server keeps its key in the database, or the Secret is not generated.
    """
    deployment = read_deployment(environment, f"{SERVER}-api")
    name = referenced_secret(deployment, VARIABLE)
    if not name:
        raise ClusterError(f"The server of {environment.name} has its key in the database. Set encryptionKey first")
    secret = RotatedSecret(environment, "encryption", name)
    require_generated(environment, secret)
    [entry] = [
        variable
        for container in deployment["spec"]["template"]["spec"]["containers"]
        for variable in container.get("env", [])
        if variable["name"] == VARIABLE
    ]
    return BlockKey(environment, secret, entry["valueFrom"]["secretKeyRef"]["key"])
